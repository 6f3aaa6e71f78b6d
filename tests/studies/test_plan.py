"""From settings to tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from torchrl_sql.cli import parse
from torchrl_sql.cli.study import check_given_store, read_study
from torchrl_sql.config import ConfigError, compose_run_config, list_choices, load
from torchrl_sql.config.study import combined, find_study, load_study
from torchrl_sql.data import FrameStore
from torchrl_sql.studies.plan import (
    choose_root,
    expand,
    folder_name,
    plan_evaluation,
    plan_study,
    plan_training,
    quoted,
)

TRAIN = ["scale=cpu", "data.store=store"]


def test_a_study_is_data_then_runs_then_evaluations_then_one_page(make_study, tmp_path):
    tasks = {task.name: task for task in plan_study(make_study(), tmp_path)}
    assert {name: task.after for name, task in tasks.items()} == {
        "collect": [],
        "train-q-seed0": ["collect"],
        "evaluate-q-seed0-greedy": ["train-q-seed0"],
        "train-q-seed1": ["collect"],
        "evaluate-q-seed1-greedy": ["train-q-seed1"],
        "train-bc-seed1": ["collect"],
        "evaluate-bc-seed1-greedy": ["train-bc-seed1"],
        "evaluate-bc-seed1-sampled": ["evaluate-bc-seed1-greedy"],
        "constant": ["collect"],
        "report": [
            "evaluate-q-seed0-greedy", "evaluate-q-seed1-greedy", "evaluate-bc-seed1-greedy",
            "evaluate-bc-seed1-sampled", "constant",
        ],
    }  # fmt: skip
    assert tasks["constant"].inputs == {}  # it reads no data, it only leaves the processor to the collection
    assert [name for name, task in tasks.items() if task.tolerant] == ["report"]
    assert tasks["train-q-seed0"].group == tasks["train-q-seed1"].group != tasks["train-bc-seed1"].group
    assert tasks["train-bc-seed1"].run_dir == str(tmp_path / "bc" / "seed1")


def test_probes_read_the_encoders_of_runs_that_only_prepare_others_before_the_page(make_study, tmp_path):
    asked = ("{main: q,", "{main: q, probes: [Pong, Freeway],")
    unplayed = ("decode: [greedy, sampled], seeds: [1]", "decode: []")
    tasks = {task.name: task for task in plan_study(make_study(asked, unplayed), tmp_path)}
    assert tasks["probe"].arguments == [
        "probe", *(str(tmp_path / "bc" / f"seed{seed}") for seed in (0, 1)), "--games", "Pong,Freeway",
        "--out", str(tmp_path),
    ]  # fmt: skip
    assert tasks["probe"].after == ["train-bc-seed0", "train-bc-seed1"] and "probe" in tasks["report"].after
    assert tasks["probe"].makes == ["probes.json", "probes.png"]
    make_study(("{main: q,", "{main: q, probes: [Alien],"), unplayed)
    with pytest.raises(ConfigError, match=r"report.probes must be games with labels \(.*Pong.*\), got 'Alien'"):
        read_study(str(tmp_path / "study.yaml"), [], None)
    parse(tasks["probe"].arguments)
    for changes in ([asked], [asked, unplayed, ("method=bc]", "method=mgdt, model=mgdt_small]")]):
        with pytest.raises(ConfigError, match=r"report.probes needs a run with decode: \[\] and an encoder of stacked"):
            plan_study(make_study(*changes), tmp_path)


def test_a_task_is_the_command_that_makes_its_configuration(make_study, tmp_path):
    for task in plan_study(make_study(), tmp_path / "it's a study"):
        parse(task.arguments)
        if task.kind == "train":
            assert compose_run_config(task.arguments[1:]).to_yaml() == task.config


def test_settings_of_a_method_are_not_those_of_another(make_study, tmp_path):
    tasks = {task.name: task for task in plan_study(make_study(), tmp_path)}
    assert tasks["train-q-seed1"].settings["method.cql_alpha"] == 0.3
    assert tasks["train-bc-seed1"].settings["method.name"] == "bc"
    assert "method.cql_alpha" not in tasks["train-bc-seed1"].settings


def test_training_that_evaluates_owns_the_table_too(make_study, tmp_path):
    def made(*changes):
        tasks = {task.name: task for task in plan_study(make_study(*changes), tmp_path)}
        return "q/seed0/scores.csv" in tasks["train-q-seed0"].makes

    interval = "trainer.evaluation_interval_gradient_steps=3, trainer.checkpoint_interval_gradient_steps=3"
    assert made(("scale=cpu", f"scale=cpu, {interval}")) and not made()


def test_training_whose_scores_others_cannot_make_is_done_again_with_another_protocol(make_study, tmp_path):
    interval = "trainer.evaluation_interval_gradient_steps=3, trainer.checkpoint_interval_gradient_steps=3"

    def key(more):
        study = make_study(("scale=cpu", f"scale=cpu, {more}"))
        return {task.name: task.key for task in plan_study(study, tmp_path)}["train-q-seed0"]

    assert key(interval) != key(f"{interval}, evaluation.epsilon=0.5")
    assert key("num_threads=1") == key("evaluation.epsilon=0.5")
    assert key(interval) != key(interval.replace("=3", "=6"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[greedy, sampled]", "[greedy, expert]"), r"runs.bc.decode must be among greedy, sampled .* got 'expert'"),
        (("[method=bc], decode: [greedy, sampled]", "[method=mae]"), "runs.bc.decode must be empty with method mae"),
        (("q: {}", "q: {games: [Pong]}"), r"runs.q.games must be its games \(Breakout, Freeway\) or .* got 'Pong'"),
        (("{main: q,", "{main: q, games: [Pnog],"), r"report.games must be .* play \(Breakout, Freeway\), got 'Pnog'"),
        (("data: collect", "data: import 'x"), 'data must be a command line, got "import \'x"'),
        (
            ("bc: {set: [method=bc], decode: [greedy, sampled], seeds: [1]}\nreport: {main: q,",
             "bc: {set: [method=bc, data.games=Pong], decode: []}\nreport: {main: q, games: [Pong],"),
            r"report.games must be .* play \(Breakout, Freeway\), got 'Pong'",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_played_is_refused_before_anything_is_trained(make_study, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        plan_study(make_study(change), tmp_path)


def test_constant_actions_are_played_where_the_main_run_is(make_study, tmp_path):
    def games(*changes):
        tasks = {task.name: task for task in plan_study(make_study(*changes), tmp_path)}
        return tasks["constant"].settings["games"]

    variations = ("q: {}", "q: {games: [Breakout-m4, Freeway-d1]}")
    assert games() == ["Breakout", "Freeway"]
    assert games(variations) == ["Breakout-m4", "Freeway-d1"]
    assert games(variations, ("{main: q,", "{main: q, games: [Freeway],")) == ["Freeway"]


def test_two_runs_that_would_play_into_one_recording_are_refused(tmp_path):
    study = load_study(find_study("dqn_replay_mini"))
    twice = replace(study, runs=study.runs | {"again": study.runs["breakout"]})
    with pytest.raises(ConfigError, match="train-breakout-seed0 and train-again-seed0 would both make"):
        plan_study(twice, tmp_path)


def test_the_number_of_workers_is_no_other_import(make_study, tmp_path):
    def first(words):
        return plan_study(make_study(("data: collect", f"data: import dqn-replay X {words}")), tmp_path)[0]

    assert first("--workers 2 --games Pong").key == first("--workers 8 --games Pong").key != first("--games Alien").key
    assert "8" in first("--workers 8").arguments


def test_data_that_is_there_is_not_made(make_study, tmp_path):
    tasks = plan_study(make_study(("data: collect", "data: /data/store")), tmp_path)
    assert tasks[0].name == "train-q-seed0" and tasks[0].after == []
    assert "data.store=/data/store" in tasks[0].arguments


def test_data_can_be_an_import(make_study, tmp_path):
    source = "dqn-replay '/a b' --games Breakout,Freeway"
    first, second, *_ = plan_study(make_study(("data: collect", f"data: import {source}")), tmp_path)
    words = ["dqn-replay", "/a b", "--games", "Breakout,Freeway", "--out", str(tmp_path / "store")]
    assert first.arguments == ["import", *words] and second.after == ["import"]


@pytest.mark.parametrize("key", ["name=x", "run_dir=x", "seed=1", "data.store=x", "+seed=1"])
def test_what_a_study_decides_is_refused(make_study, tmp_path, key):
    with pytest.raises(ConfigError, match="a study decides"):
        plan_study(make_study(("scale=cpu,", f"scale=cpu, {key},")), tmp_path)


def test_a_run_that_starts_from_another_waits_for_that_runs_seed(make_study, tmp_path):
    study = make_study(("bc: {", "bc: {from: q, load: all, "))
    tasks = {task.name: task for task in plan_study(study, tmp_path)}
    tuned = tasks["train-bc-seed1"]
    assert tuned.after == ["collect", "train-q-seed1"] and "train-q-seed1" in tuned.inputs
    assert f"init.policy={tmp_path}/q/seed1/policy.safetensors" in tuned.arguments
    assert compose_run_config(tuned.arguments[1:]).to_yaml() == tuned.config
    assert tuned.settings["init.load"] == "all" and "init.load" not in tasks["train-q-seed1"].settings


def test_what_the_first_run_learns_from_decides_the_second(make_study, tmp_path):
    def key(*changes, folder=tmp_path):
        study = make_study(("bc: {", "bc: {from: q, load: encoder, "), *changes)
        return {task.name: task.key for task in plan_study(study, folder)}["train-bc-seed1"]

    assert key() == key(folder=tmp_path / "moved") != key(("q: {}", "q: {set: [method.cql_alpha=0.4]}"))
    assert key() != key(("load: encoder", "load: all"))
    assert key() != key(("[method=bc]", "[method=bc,init.freeze=true]"))


def test_where_a_run_starts_is_said_once(make_study, tmp_path):
    for override in ("init.policy=x", "init.load=all"):
        study = make_study(("bc: {set: [method=bc]", f"bc: {{from: q, load: all, set: [method=bc,{override}]"))
        with pytest.raises(ConfigError, match=r"runs.bc must have from and load or init\.(policy|load), got both"):
            plan_study(study, tmp_path)


def scales(name):
    return yaml.safe_load(find_study(name).read_text()).get("scales", ["cpu"])


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in list_choices("study") for scale in scales(name)])
def test_the_tasks_of_every_study_at_every_scale_are_commands(tmp_path, name, scale):
    study = load_study(find_study(name), scale=scale)
    tasks = plan_study(replace(study, seeds=[0, 1]), tmp_path)
    for task in tasks:
        parse(task.arguments)
    assert ("import" in {task.kind for task in tasks}) == (scale == "paper" and name != "dqn_replay_mini")
    trained = [task for task in tasks if task.kind == "train"]
    assert len(trained) == len({task.key for task in trained})
    first = {task.group: task for task in reversed(trained)}
    for task in first.values():
        assert compose_run_config(task.arguments[1:]).to_yaml() == task.config


@pytest.mark.parametrize("name", ["comparison", "data_quality", "scaling", "ablation", "multitask", "transfer_offline"])
def test_claims_are_studied_at_three_scales_with_three_seeds(name):
    assert list(scales(name)) == ["cpu", "gpu", "paper"]
    assert load_study(find_study(name)).seeds == [0, 1, 2]


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_methods_are_compared_on_each_part_of_the_data(tmp_path, scale):
    study = load_study(find_study("data_quality"), scale=scale, store="store")
    compared = [[study.report.main, other] for other in study.report.against] + study.report.pairs
    parts, others = {"first": (0.2, 1.0), "all": (1.0, 1.0), "last": (1.0, 0.2)}, ["bc", "mgdt"]
    others += ["bc_transformer"] * (scale != "cpu")
    assert compared == [[f"scaled_ql_{part}", f"{other}_{part}"] for part in parts for other in others]

    def trainings(study):
        tasks = plan_study(replace(study, seeds=[0]), tmp_path)
        return {task.name.split("-")[1]: task.settings for task in tasks if task.kind == "train"}

    settings = trainings(study)
    methods = {name.rpartition("_")[0] for name in settings}
    for method in methods:
        each = [settings[f"{method}_{part}"] for part in parts]
        assert [(one["data.first_fraction"], one["data.last_fraction"]) for one in each] == list(parts.values())
        fractions = {"data.first_fraction": 1.0, "data.last_fraction": 1.0}
        assert each[0] | fractions == each[1] | fractions == each[2] | fractions
    if scale != "cpu":  # the comparison's methods, each in its settings
        comparison = load_study(find_study("comparison"), scale=scale, store="store")
        compared_with = trainings(comparison)
        assert methods == set(compared_with)
        for method in methods:
            ours, theirs = settings[f"{method}_all"], compared_with[method]
            assert {*ours} == {*theirs} and {key for key in ours if ours[key] != theirs[key]} <= {"data.games"}
            assert study.runs[f"{method}_all"].decode == comparison.runs[method].decode


@pytest.mark.parametrize(
    ("name", "scale", "shared"),
    [
        ("scaling", "cpu", ["scaled_ql", "hl_gauss", "mse", "bc", "mgdt"]),
        ("scaling", "gpu", ["scaled_ql", "hl_gauss", "mse", "bc", "mgdt"]),
        ("scaling", "paper", ["scaled_ql", "hl_gauss", "mse", "bc", "mgdt"]),
        ("ablation", "cpu", ["scaled_ql", "no_cql"]),
        ("ablation", "gpu", ["scaled_ql", "no_cql"]),
        ("multitask", "cpu", ["scaled_ql"]),
    ],
)
def test_runs_that_studies_name_alike_are_the_same(tmp_path, name, scale, shared):
    def trainings(name):
        study = load_study(find_study(name), scale=scale)
        tasks = plan_study(replace(study, seeds=[0]), tmp_path / name)
        return {task.name.split("-")[1]: task.key for task in tasks if task.kind == "train"}

    here, there = trainings(name), trainings("comparison")
    assert [run for run in here if here[run] == there.get(run)] == shared


def test_a_run_with_another_model_leaves_out_settings_of_the_common_one(make_study, tmp_path):
    words = '["scale=cpu", "data.games=[Breakout,Freeway]", model.encoder=nature]'
    text = '[scale=cpu, "data.games=[Breakout,Freeway]", method.cql_alpha=0.3]'
    other = "bc: {set: [method=bc_transformer, model=mgdt_small]"
    study = make_study((text, words), ("bc: {set: [method=bc]", other))
    tasks = {task.name: task for task in plan_study(study, tmp_path)}
    assert tasks["train-q-seed1"].settings["model.encoder"] == "nature"
    assert "model.encoder" not in tasks["train-bc-seed1"].settings


def test_only_what_decides_results_changes_a_task(make_study, tmp_path):
    def keys(*changes, folder=tmp_path):
        return {task.name: task.key for task in plan_study(make_study(*changes), folder)}

    def changed(*changes):
        before = keys()
        return [name for name, key in keys(*changes).items() if key != before[name]]

    assert changed(("title: A study", "title: B")) == []
    assert changed(("method.cql_alpha=0.3", "method.cql_alpha=0.3, trainer.log_interval_gradient_steps=7")) == []
    assert keys(folder=tmp_path / "moved") == keys()
    of_q = ["train-q-seed0", "evaluate-q-seed0-greedy", "train-q-seed1", "evaluate-q-seed1-greedy"]
    assert changed(("cql_alpha=0.3", "cql_alpha=0.4")) == [*of_q, "report"]
    evaluations = [name for name in keys() if name.startswith(("evaluate", "constant"))]
    assert changed(("cql_alpha=0.3", "cql_alpha=0.3, evaluation.epsilon=0.5")) == [*evaluations, "report"]
    games = ("[Breakout,Freeway]", "[Breakout,Pong]")
    assert changed(games) == list(keys())


def test_several_values_are_products():
    assert expand([*TRAIN, "seed=0,1", "model.encoder=resnet34,resnet50"]) == [
        (label, [*TRAIN, *label.split(",")])
        for label in (
            "seed=0,model.encoder=resnet34",
            "seed=0,model.encoder=resnet50",
            "seed=1,model.encoder=resnet34",
            "seed=1,model.encoder=resnet50",
        )
    ]


def test_lists_are_one_value():
    words = ["data.games=[Breakout,Freeway]", "name='a,b'"]
    assert expand(words) == [("", words)]


def test_seeds_share_a_name_and_other_choices_do_not(tmp_path):
    seeds = plan_training([*TRAIN, "seed=0,1"], tmp_path)
    assert [yaml.safe_load(task.config)["name"] for task in seeds] == ["cql", "cql"]
    assert [task.run_dir for task in seeds] == [f"{tmp_path}/seed=0", f"{tmp_path}/seed=1"]
    alphas = plan_training([*TRAIN, "method.cql_alpha=0.1,0.2", "seed=0,1"], tmp_path)
    configs = [yaml.safe_load(task.config) for task in alphas]
    assert [config["name"] for config in configs] == [f"cql-method.cql_alpha=0.{i}" for i in (1, 1, 2, 2)]
    assert [config["method"]["cql_alpha"] for config in configs] == [0.1, 0.1, 0.2, 0.2]
    assert len({task.run_dir for task in alphas}) == 4


def test_files_are_composed_once_for_any_number_of_seeds(tmp_path):
    """Hydra takes a tenth of a second for them, and arrays have up to thousands of runs."""
    load._compose.cache_clear()
    assert len(plan_training([*TRAIN, "seed=range(0,100)"], tmp_path)) == 100
    assert load._compose.cache_info().misses == 1


@pytest.mark.parametrize("values", ["seed=0,0", "name='a b','a,b'"])
def test_two_runs_never_share_a_folder(tmp_path, values):
    with pytest.raises(ConfigError, match="would share the folder"):
        plan_training([*TRAIN, values], tmp_path)


def test_launched_runs_that_play_keep_their_stores_in_their_folders(tmp_path):
    for task in plan_training(["scale=cpu", "online=cpu", "data.games=Breakout", "seed=0,1"], tmp_path):
        assert f"store: {task.run_dir}/store\n" in task.config
    given = plan_training(["scale=cpu", "online=cpu", "data.games=Breakout", "data.store=mine"], tmp_path)
    assert "store: mine\n" in given[0].config


@pytest.mark.parametrize(
    "words",
    [
        [
            f"name={'a' * 200},b",
            "trainer.num_gradient_steps=1000,2000",
            "trainer.milestone_interval_gradient_steps=1000,2000",
        ],
        [f"data.store={'a' * 230},b"],  # fits a folder, but not a name, which job and page would refuse
    ],
)
def test_a_label_too_long_for_a_folder_is_refused(tmp_path, words):
    with pytest.raises(ConfigError, match="too long for the name"):
        plan_training([*TRAIN, *words], tmp_path)


def test_what_the_launcher_decides_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give --into instead of run_dir=x"):
        plan_training([*TRAIN, "run_dir=x"], tmp_path)
    with pytest.raises(ConfigError, match="'seed'"):
        plan_training([*TRAIN, "seed"], tmp_path)


def test_processes_must_share_the_batch(tmp_path):
    with pytest.raises(ConfigError, match=r"data.batch_size must be a multiple of the 5 processes"):
        plan_training(TRAIN, tmp_path, num_ranks=5)


def test_each_launch_has_a_folder_of_its_own(tmp_path):
    assert choose_root("a b") != choose_root("a b")
    assert choose_root("a b").name.startswith("a_b-") and choose_root("///").name.startswith("launch-")
    assert choose_root("x", out=tmp_path / "new") == tmp_path / "new"
    with pytest.raises(ConfigError, match="must be a new folder"):
        choose_root("x", out=tmp_path)


def test_evaluations_are_split_into_shares_of_each_agent():
    tasks = plan_evaluation(["runs/a", "runs/b"], ["--episodes", "9"], num_shares=2)
    assert [task.arguments for task in tasks] == [
        ["evaluate", run, "--episodes", "9", "--share", share]
        for run in ("runs/a", "runs/b")
        for share in ("1/2", "2/2")
    ]
    (whole,) = plan_evaluation(["runs/a"], [], num_shares=1)
    assert whole.arguments == ["evaluate", "runs/a"]
    with pytest.raises(ConfigError, match="--shares must be at least 1, got 0"):
        plan_evaluation(["runs/a"], [], num_shares=0)


def test_folder_names():
    assert folder_name("seed=0,data.games=[A,B]") == "seed=0_data.games=_A_B"


def test_later_settings_replace_earlier_ones():
    assert combined(["scale=cpu", "a=1"], ["scale=gpu"], ["b=2"]) == ["scale=gpu", "a=1", "b=2"]


@pytest.mark.parametrize(
    "path", ["/a/b-c.d", "a b", "it's", "a,b", "a=b", "(a)", "back\\slash", "back\\'s", "\\\\", "$HOME", "#"]
)
def test_quoted_paths_are_read_as_they_are(path):
    assert compose_run_config([*TRAIN, f"run_dir={quoted(path)}"]).run_dir == path


@pytest.mark.parametrize(
    ("x", "value"), [("data.first", "None"), ("method.double_q", "False"), ("method.target", "c51")]
)
def test_an_axis_that_is_no_number_is_refused_before_anything_runs(make_study, tmp_path, x, value):
    with pytest.raises(ConfigError, match=f"report.x must be .* a number, got '{x}', {value} in q"):
        plan_study(make_study(("{main: q,", f"{{main: q, x: {x},")), tmp_path)
    assert plan_study(make_study(("{main: q,", "{main: q, x: data.first_fraction,")), tmp_path)
    assert plan_study(make_study(("{main: q,", "{main: q, x: parameters,")), tmp_path)


def test_runs_that_play_take_no_other_data():
    with pytest.raises(
        ConfigError, match=r"dqn_replay_mini\.yaml: its runs play their own data.*data\.store=elsewhere"
    ):
        load_study(find_study("dqn_replay_mini"), store="elsewhere")


@pytest.mark.parametrize("name", ["collect", "import", "play", "study", "study of mine"])
def test_a_store_that_is_called_like_a_way_to_make_one_is_a_store(tmp_path, name):
    study = load_study(find_study("comparison"), store=name)
    tasks = plan_study(study, tmp_path)
    assert {task.kind for task in tasks} == {"train", "evaluate", "report"}
    assert {task.settings["data"] for task in tasks if task.kind == "train"} == {name}


def test_runs_that_play_share_a_store_per_seed(tmp_path):
    study = load_study(find_study("dqn_replay_mini"))
    tasks = {task.name: task for task in plan_study(study, tmp_path)}
    for game in ("Breakout", "Freeway"):
        task = tasks[f"train-{game.lower()}-seed0"]
        config = compose_run_config(task.arguments[1:])
        assert (config.data.store, config.run_dir) == (f"{tmp_path}/stores/seed0", f"{tmp_path}/{game.lower()}/seed0")
        assert config.online is not None and f"stores/seed0/{game}" in task.makes
        assert "data" not in task.settings and task.settings["online.num_emulators"] == 4


def test_settings_of_the_command_line_are_for_all_runs():
    assert "optim.eps=1e-4" in read_study("multitask", ["optim.eps=1e-4"], None).common
    with pytest.raises(ConfigError, match=r"data.batch_size is not one for all runs, only_Assault, .* set it"):
        read_study("multitask", ["data.batch_size=256"], None)


def test_seeds_trained_apart_see_the_same_data(tmp_path):
    def collected(seeds, *overrides):
        study = read_study("comparison", ["data.games=[Pong]", *overrides], seeds)
        return plan_study(study, tmp_path)[0].key

    assert collected([1]) == collected([2]) == collected(None) != collected([1], "collection.seed=1")


def test_the_seed_that_a_file_gives_its_data_stays(make_study, tmp_path):
    make_study(("scale=cpu", "scale=cpu, collection.seed=7"))
    for seeds in (None, [5]):
        collected = plan_study(read_study(str(tmp_path / "study.yaml"), [], seeds), tmp_path)[0]
        assert collected.settings["seed"] == 7


def test_a_study_whose_data_is_play_has_runs_that_play(tmp_path):
    changed = replace(load_study(find_study("dqn_replay_mini")), common=["scale=cpu"])
    with pytest.raises(ConfigError, match=r"runs.breakout must have the setting online=NAME, for the study's data is"):
        plan_study(changed, tmp_path)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_lives_of_one_study_are_the_data_of_another(tmp_path, scale):
    lives = {task.name: task for task in plan_study(load_study(find_study("dqn_replay_mini"), scale=scale), tmp_path)}
    tasks = {task.name: task for task in plan_study(load_study(find_study("data_quality"), scale=scale), tmp_path)}
    played = [f"train-{name}-seed0" for name in ("breakout", "qbert", "freeway", "mspacman")]
    assert [name for name in tasks if name in lives] == [*played, "report"]
    for name in played:
        assert tasks[name].settings == lives[name].settings and tasks[name].makes == lives[name].makes
        assert tasks[name].arguments == lives[name].arguments and tasks[name].config == lives[name].config
    learned = tasks["train-bc_first-seed2"]
    assert learned.after == played and {*learned.inputs} == {*played}
    assert f"data.store={tmp_path}/stores/seed0" in learned.arguments and "data" not in learned.settings


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("study", r"a study must be FILE.yaml or one of .*dqn_replay_mini.*, got ''"),
        ("study dqn_replay", r"a study must be FILE.yaml or one of .*dqn_replay_mini.*, got 'dqn_replay'"),
        ("study demo", r"data must be study NAME, one whose data is play, got 'study demo', with 'collect'"),
        ("study dqn_replay_mini", r"runs.q must have games that .* plays \(Breakout, .*, MsPacman\), got Pong"),
    ],
)
def test_lives_that_are_no_data_are_refused(make_study, tmp_path, data, message):
    study = make_study(("data: collect", f"data: {data}"), ("[Breakout,Freeway]", "[Breakout,Pong]"))
    with pytest.raises(ConfigError, match=message):
        plan_study(study, tmp_path)


@pytest.mark.parametrize(
    ("lives", "message"),
    [
        (
            "{lives: {set: [data.games=Breakout], seeds: [1]}}",
            r"data must be a study with runs of its first seed, 0, got",
        ),
        ("{bc: {set: [data.games=Breakout]}}", r"runs.bc must have another name: the data's, study .*, has such a run"),
    ],
)
def test_lives_of_another_seed_or_with_the_names_of_runs_are_refused(make_study, tmp_path, lives, message):
    file = tmp_path / "lives.yaml"
    file.write_text(f"{{title: Lives, data: play, common: [scale=cpu, online=cpu], runs: {lives}}}")
    with pytest.raises(ConfigError, match=message):
        plan_study(make_study(("data: collect", f"data: study {file}")), tmp_path)


def test_in_a_study_with_other_data_a_run_that_plays_has_a_store_of_its_own_and_waits_for_its_source_only(tmp_path):
    tasks = {task.name: task for task in plan_study(load_study(find_study("transfer_online")), tmp_path)}
    ql, scratch, zero = (
        tasks[name] for name in ("train-ql-seed1", "train-scratch-seed1", "evaluate-pre_ql-seed1-greedy")
    )
    assert (ql.after, scratch.after, zero.after) == (["train-pre_ql-seed1"], [], ["train-pre_ql-seed1"])
    config = compose_run_config(ql.arguments[1:])
    assert config.data.store == f"{tmp_path}/ql/seed1/store" and "ql/seed1/store" in ql.makes
    assert config.to_yaml() == ql.config  # what a launched job reads
    assert zero.arguments[zero.arguments.index("--games") + 1].split(",") == list(config.games)


def test_the_given_store_has_the_games_of_what_is_to_do(make_study, tmp_path, monkeypatch):
    def tasks(store):
        return plan_study(replace(make_study(), data=store), tmp_path / "study")

    def record(game, run="0"):
        with store.writer(game, run=run, source="test") as writer:
            writer.add_episode(np.zeros((8, 84, 84), np.uint8), np.zeros(8, int), np.zeros(8), terminated=True)

    store = FrameStore.create(tmp_path / "store")
    monkeypatch.setenv("STORES", str(tmp_path))
    record("Breakout", "1")
    record("Breakout", "2")
    with pytest.raises(ValueError, match=r"game 'Freeway' is not in the store .*, which holds Breakout"):
        check_given_store(tasks("$STORES/store"))
    record("Freeway")
    check_given_store(tasks("$STORES/store"))
    with pytest.raises(FileNotFoundError, match=r"store\.json is missing"):
        check_given_store(tasks(str(tmp_path / "absent")))
    check_given_store(tasks(str(tmp_path / "absent")), elsewhere=True)
    done = tasks(str(tmp_path / "absent"))
    for task in done:
        (tmp_path / "study" / task.makes[0]).mkdir(parents=True, exist_ok=True)
        task.write_record(seconds=1.0)
    check_given_store(done)
