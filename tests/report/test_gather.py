"""Reports of run folders and tables of scores, made of files that no training wrote."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from tests.builders import calibration_point, episode
from torchrl_sql.cli import main
from torchrl_sql.config import compose_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.tables import TableWriter, part_of
from torchrl_sql.report import write_report
from torchrl_sql.report.analysis import BEHAVIOUR, Analysis
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.context_tables import data_table
from torchrl_sql.report.figures.games import many_games_plots
from torchrl_sql.report.findings import findings
from torchrl_sql.report.gather import gather
from torchrl_sql.report.score_tables import aggregate_table, published_table

GAMES = ("Breakout", "Freeway")


def episodes(agent="scaled_ql", *, games=GAMES, seed=0, step=100, value=5.0, count=2, **changes):
    fields = {"seed": seed, "gradient_step": step, "episode_seed": 0, "checkpoint": f"step.pt sha256:{agent}{seed}"}
    return [
        episode(agent, game, value + index, episode=index, **fields | changes)
        for game in games
        for index in range(count)
    ]


def write(path, rows):
    with TableWriter(path, type(rows[0])) as table:
        table.append(rows)
    return path


def run_folder(folder, *overrides, name="scaled_ql", seed=0, games=GAMES, metrics=None):
    """A run as training leaves it, without its checkpoints."""
    config = compose_run_config(
        [
            "scale=cpu", "data.store=store", f"data.games=[{','.join(games)}]", f"name={name}", f"seed={seed}",
            f"run_dir={folder}", "data.store=/nowhere/store", *overrides,
        ]
    )  # fmt: skip
    (folder / "logs" / "csv" / "scalars" / "train").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    for metric, text in (metrics or {}).items():
        (folder / "logs" / "csv" / "scalars" / "train" / f"{metric}.csv").write_text(text)
    return folder


# Runs


def test_of_runs_that_only_prepare_others_a_study_shows_the_curves(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "title: T\ndata: collect\nreport: {main: after}\n"
        "runs: {before: {set: [method=cpc, data.n_steps=4], decode: []}, after: {from: before, load: encoder}}"
    )
    run_folder(
        tmp_path / "before" / "seed0",
        "method=cpc",
        "data.n_steps=4",
        name="before",
        metrics={"accuracy": "10,0.5\n20,0.75\n"},
    )
    words = ["init.policy=before/seed0/policy.safetensors"]
    after = run_folder(tmp_path / "after" / "seed0", *words, name="after", metrics={"loss_cql": "10,3.0\n"})
    write(after / "scores.csv", episodes("after"))
    data = gather([tmp_path])
    assert [agent.label for agent in data.agents] == ["after"]  # not Scaled QL: what it starts from matters
    (curve,) = [curve for curve in data.curves if curve.agent == "before"]
    assert (curve.gradient_steps, curve.values) == ([10, 20], [0.5, 0.75]) and "found in the batch" in curve.metric
    assert not any("before" in caveat for caveat in data.caveats)


def test_runs_of_one_name_are_seeds_and_the_rest_is_told_apart(tmp_path):
    metrics = {"loss_qvalue": "10,3.0\n20,2.0\n", "learning_rate": "10,0.1\n"}
    for seed in (0, 1):
        folder = run_folder(tmp_path / f"ql{seed}", "method.value_prior_std=1.0", seed=seed, metrics=metrics)
        (folder / "versions.json").write_text(json.dumps({"torch": f"2.1{seed}", "python": "3.11"}))
        write(folder / "scores.csv", episodes(seed=seed))
        (folder / "evaluation_versions.json").write_text(json.dumps([{"ale-py": "0.12"}, {"ale-py": f"0.{seed}"}]))
    bc = run_folder(tmp_path / "bc", "method=bc", name="bc")
    write(bc / "scores.csv", episodes("bc") + episodes("bc", decoding="sampled"))
    data = gather([bc, tmp_path / "ql0", tmp_path / "ql1"])
    assert data.against is None
    assert [(a.label, a.decoding) for a in data.agents] == [
        ("BC greedy", "greedy"),
        ("BC sampled", "sampled"),
        ("Scaled QL", "greedy"),
    ]
    assert data.games == GAMES
    assert [(c.label, c.seed, c.metric, list(c.values)) for c in data.curves] == [
        ("Scaled QL", seed, "TD loss (nats)", [3.0, 2.0]) for seed in (0, 1)
    ]
    assert data.settings["Scaled QL"]["seed"] == "0 / 1"
    assert data.settings["Scaled QL"]["data"]["store"] == "/nowhere/store"
    assert data.versions == {"torch": "2.10 / 2.11", "python": "3.11", "evaluation: ale-py": "0.12 / 0.0 / 0.1"}
    assert data.caveats == ["The store /nowhere/store was not found: the data's returns and statistics are missing."]


def test_sizes_are_a_family_where_asked_for(tmp_path):
    for name in ("resnet34", "resnet50", "resnet18"):
        folder = run_folder(tmp_path / name, f"model.encoder={name}", name=name)
        write(folder / "scores.csv", episodes(name))
    bc = run_folder(tmp_path / "bc", "method=bc", name="bc")
    write(bc / "scores.csv", episodes("bc"))
    paths = [tmp_path / name for name in ("resnet34", "resnet18", "bc", "resnet50")]
    data = gather(paths, x="parameters")
    agents = {agent.agent: agent for agent in data.agents}
    assert [*agents] == ["resnet34", "resnet18", "resnet50", "bc"] and data.x == "parameters"
    assert {name: agent.family for name, agent in agents.items()} == {
        "resnet34": "cql", "resnet18": "cql", "resnet50": "cql", "bc": "BC",
    }  # fmt: skip
    assert agents["resnet50"].x > agents["resnet34"].x > agents["resnet18"].x > 10_000
    assert agents["resnet34"].label == f"cql {agents['resnet34'].num_parameters / 1e6:.0f}M"
    assert agents["bc"].label == "BC"
    assert [agent.label for agent in gather(paths).agents] == ["resnet34", "resnet18", "BC", "resnet50"]


def test_a_setting_is_an_axis_and_other_differences_are_other_families(tmp_path, capsys):
    runs = {
        "first": ["data.first_fraction=0.1"],
        "whole": [],
        "mse_first": ["method=cql_mse", "data.first_fraction=0.1"],
        "mse_whole": ["method=cql_mse"],
    }
    for name, overrides in runs.items():
        folder = run_folder(tmp_path / name, *overrides, name=name)
        write(folder / "scores.csv", episodes(name))
    paths = [tmp_path / name for name in runs]
    agents = gather(paths, x="data.first_fraction").agents
    found = {agent.agent: (agent.family, agent.x, agent.label) for agent in agents}
    assert found == {
        "first": ("cql", 0.1, "cql first_fraction=0.1"),
        "whole": ("cql", 1.0, "cql first_fraction=1"),
        "mse_first": ("mse", 0.1, "mse first_fraction=0.1"),
        "mse_whole": ("mse", 1.0, "mse first_fraction=1"),
    }
    for key, value in (("data.first", "None"), ("method.target", "c51"), ("method.double_q", "False")):
        out = ["--out", str(tmp_path / "page.html"), "--x", key]
        assert main(["report", *map(str, paths), *out]) == 1
        message = f"x must be parameters or a setting that is a number, got {key}, which is {value} of first"
        assert message in capsys.readouterr().err


def test_families_of_one_beginning_all_have_a_name(tmp_path):
    runs = {"main": [], "r34_a": ["model.feature_norm=false", "data.first_fraction=0.5"],
            "r34_b": ["model.feature_norm=false"], "r34": ["method.cql_alpha=0"]}  # fmt: skip
    for name, overrides in runs.items():
        folder = run_folder(tmp_path / name, *overrides, name=name)
        write(folder / "scores.csv", episodes(name))
    families = {
        agent.agent: agent.family
        for agent in gather([tmp_path / name for name in runs], x="data.first_fraction").agents
    }
    assert families["r34_a"] == families["r34_b"] and len(set(families.values())) == 3


def test_an_ablation_is_called_by_its_name_and_is_no_size(tmp_path):
    changes = {
        "scaled_ql": "model.encoder=resnet34",
        "larger_without_norm": "model.encoder=resnet50 model.feature_norm=false",
        "impala": "model.encoder=impala",
        "mse": "model.encoder=resnet50 method=cql_mse",
        "again": "model.encoder=resnet34",
    }
    for name, overrides in changes.items():
        folder = run_folder(tmp_path / name, *overrides.split(), name=name)
        write(folder / "scores.csv", episodes(name))
    labels = {name: "Scaled QL" if name == "scaled_ql" else name for name in changes}
    for first in changes:  # whoever comes first
        data = gather([tmp_path / name for name in sorted(changes, key=lambda name: name != first)])
        assert {(a.agent, a.label, a.family) for a in data.agents} == {(*item, None) for item in labels.items()}
        assert data.agents[0].agent == first and set(data.settings) == {a.label for a in data.agents}
    alone = gather([tmp_path / "impala"])
    assert [agent.label for agent in alone.agents] == ["impala"]


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ({"cql": [], "bc": ["method=bc"]}, {"cql": "Scaled QL", "bc": "BC"}),  # torchrl-sql train scale=paper
        ({"cql": [], "scaled_ql": ["data.n_steps=2"]}, {"cql": "cql", "scaled_ql": "Scaled QL"}),
        ({"cql": [], "scaled_ql_a": ["data.n_steps=2"]}, {"cql": "cql", "scaled_ql_a": "scaled_ql_a"}),
        ({"cql": [], "cql_a": ["data.n_steps=2"]}, {"cql": "Scaled QL", "cql_a": "cql_a"}),
        ({"cql": [], "tuned": ["init.policy=p"]}, {"cql": "cql", "tuned": "tuned"}),
    ],
)
def test_a_run_that_was_given_no_name_is_called_by_its_method_if_no_other_is(tmp_path, runs, labels):
    for name, overrides in runs.items():
        write(run_folder(tmp_path / name, *overrides, name=name) / "scores.csv", episodes(name))
    for paths in itertools.permutations(tmp_path / name for name in runs):
        assert {agent.agent: agent.label for agent in gather(paths).agents} == labels


def test_a_family_without_names_is_called_by_its_method_and_shares_its_label_with_nobody(tmp_path):
    runs = {"cql": [], "cql_a": ["data.first_fraction=0.5"], "cql_b": ["method.cql_alpha=0.7"],
            "cql_c": ["method.cql_alpha=0.7", "data.first_fraction=0.5"]}  # fmt: skip
    for name, overrides in runs.items():
        write(run_folder(tmp_path / name, *overrides, name=name) / "scores.csv", episodes(name))
    for paths in itertools.permutations(tmp_path / name for name in runs):
        families = {agent.agent: agent.family for agent in gather(paths, x="data.first_fraction").agents}
        assert families["cql"] == families["cql_a"] == "Scaled QL"
        assert families["cql_b"] == families["cql_c"] != "Scaled QL"


CHANGES = ("method.cql_alpha=0.7", "data.batch_size=7", "trainer.num_gradient_steps=300")


def test_seeds_that_differ_in_more_and_unlike_games_are_refused(tmp_path):
    first = run_folder(tmp_path / "a", seed=0)
    write(first / "scores.csv", episodes(seed=0))
    for number, change in enumerate(CHANGES):
        other = run_folder(tmp_path / f"b{number}", change, seed=1)
        write(other / "scores.csv", episodes(seed=1))
        with pytest.raises(ValueError, match=f"must differ in their seeds only, but .*{change.replace('=', ' ')}, "):
            gather([first, other])
    other = run_folder(tmp_path / "collected", "collection.num_agent_steps_per_game=7", seed=1)
    write(other / "scores.csv", episodes(seed=1))
    with pytest.raises(ValueError, match=r"must differ in their seeds only, but .* collection .*num_agent_st.*: 7"):
        gather([first, other])
    decides_nothing = ("trainer.log_interval_gradient_steps=7", "collection.seed=1")
    again = run_folder(tmp_path / "again", *decides_nothing, seed=1)
    write(again / "scores.csv", episodes(seed=1))
    assert len({row.seed for row in gather([first, again]).episodes}) == 2
    twice = run_folder(tmp_path / "twice", seed=0)
    write(twice / "scores.csv", episodes(seed=0))
    with pytest.raises(ValueError, match="must have different seeds, got 0 in both"):
        gather([first, twice])
    third = run_folder(tmp_path / "c", name="other", games=("Freeway", "Pong"))
    write(third / "scores.csv", episodes("other", games=("Freeway", "Pong")))
    assert gather([first, third]).games == GAMES and gather([first, third], main="other").games == ("Freeway", "Pong")
    assert gather([first, third], games=["Freeway"]).games == ("Freeway",)


def test_what_was_not_evaluated_is_said(tmp_path):
    both = tmp_path / "both"
    run_folder(both / "ql0", seed=0, games=(*GAMES, "Pong"))
    run_folder(both / "ql1", seed=1, games=(*GAMES, "Pong"))
    write(both / "scores.csv", episodes(seed=0))
    data = gather([both])
    assert data.games == GAMES
    assert "Not shown, for no agent was evaluated there: Pong." in data.caveats
    assert any(
        text.endswith("(scaled_ql, seed 1) has not been evaluated and is not included.") for text in data.caveats
    )


def test_the_data_shown_is_the_part_that_the_method_was_trained_on(tmp_path):
    returns = {"one": [1.0, 9.0, 3.0], "two": [50.0, 50.0, 50.0]}
    for name, values in returns.items():
        store = FrameStore.create(tmp_path / name)
        for game in GAMES:
            with store.writer(game, source=name) as writer:
                for value in values:
                    writer.add_episode(
                        np.zeros((2, 84, 84), np.uint8), np.zeros(1, np.uint8), np.array([value], np.float32), True
                    )
    ours = run_folder(tmp_path / "ours", f"data.store={tmp_path / 'one'}", "data.every_kth_episode=2")
    write(ours / "scores.csv", episodes())
    other = run_folder(tmp_path / "other", f"data.store={tmp_path / 'two'}", "model.feature_norm=false", name="other")
    write(other / "scores.csv", episodes("other"))
    data = gather([ours, other])
    assert [(d.game, d.behaviour.mean, d.num_episodes) for d in data.game_data] == [(game, 2.0, 2) for game in GAMES]
    said = "The data's returns and statistics are of Scaled QL's training data; other had other data."
    assert said in data.caveats
    assert any("part that was trained on: every_kth_episode=2." in text for text in data.caveats)


@pytest.mark.parametrize("place", ["study/store", "study/ours/seed0/store", "study/stores/seed0", "elsewhere/store"])
def test_the_data_is_found_where_run_and_store_were_moved_together(tmp_path, place):
    before, after = tmp_path / "before", tmp_path / "after"
    for store, value in (("study/store", 1.0), (place, 9.0)):  # the study's is another, where the run has its own
        shutil.rmtree(before / store, ignore_errors=True)
        with FrameStore.create(before / store).writer("Pong", source="test") as writer:
            writer.add_episode(np.zeros((1, 84, 84), np.uint8), [0], [value], terminated=True)
    run = run_folder(before / "study/ours/seed0", f"data.store={before / place}", games=["Pong"], name="ours")
    write(run / "scores.csv", episodes("ours", games=["Pong"]))
    before.rename(after)
    assert [data.behaviour.mean for data in gather([after / "study/ours/seed0"]).game_data] == [9.0]


def test_agents_that_play_a_game_each_have_one_page_and_are_not_judged_by_their_own_play(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "title: Lives\nseeds: [0, 1]\ndata: play\nruns: {breakout: {}, freeway: {}}\n"
        "report: {main: breakout, games: [Breakout, Freeway]}\n"
    )
    for game, seed in itertools.product(GAMES, (0, 1)):
        name, store = game.lower(), tmp_path / "stores" / f"seed{seed}"
        words = ("online=cpu", "method=dqn_c51", f"data.store={store}")
        metrics = {"episode_return": "10,1.5\n"}
        folder = run_folder(
            tmp_path / name / f"seed{seed}", *words, name=name, seed=seed, games=[game], metrics=metrics
        )
        write(folder / "scores.csv", episodes(name, games=[game], seed=seed))
        with FrameStore.create(store, exist_ok=True).writer(game, source="itself", run="0") as writer:
            writer.add_episode(np.zeros((1, 84, 84), np.uint8), [0], [99.0], terminated=True)
    data = gather([tmp_path])
    assert data.games == GAMES and [agent.label for agent in data.agents] == ["breakout", "freeway"]
    assert {curve.label for curve in data.curves if "Return" in curve.metric} == {"breakout", "freeway"}
    said = " ".join(text for _, text in findings(Analysis(data)))
    assert "behaviour" not in said and not any("not on this page" in caveat for caveat in data.caveats)
    assert [caveat for caveat in data.caveats if "data" in caveat] == [
        "The data's returns and statistics are of what breakout played while it learned.",
        "Each other agent that learned online has data of its own, the rest had other data.",
    ]
    shutil.rmtree(tmp_path / "freeway")  # its runs failed
    data = gather([tmp_path])
    assert data.games == ("Breakout",) and any("no agent was evaluated there: Freeway" in text for text in data.caveats)
    assert "The data's returns and statistics are of what breakout played while it learned." in data.caveats


def test_pieces_whose_end_was_not_recorded_are_no_returns(tmp_path):
    """The first game has one whole episode of return 10, the second pieces only."""
    store = FrameStore.create(tmp_path / "store")
    for game, endings in zip(GAMES, ([False, True, True], [True, True]), strict=True):
        with store.writer(game, source="test") as writer:
            for cut in endings:
                frames, rewards = np.zeros((3, 84, 84), np.uint8), np.array([0, 0, 1.0 if cut else 10.0])
                writer.add_episode(frames, np.zeros(3, np.uint8), rewards, not cut, cut=cut)
    run = run_folder(tmp_path / "run", f"data.store={tmp_path / 'store'}")
    write(run / "scores.csv", episodes())
    data = gather([run])
    whole, pieces = data.game_data
    assert (whole.behaviour.mean, whole.num_episodes, whole.num_transitions) == (10.0, 1, 7)
    assert (pieces.behaviour, pieces.num_episodes, pieces.num_transitions) == (None, 0, 4)
    assert set(Analysis(data).policies[pieces.game]) == set(Analysis(data).policies[whole.game]) - {BEHAVIOUR}
    cells = {row["game"]: row for row in data_table(Analysis(data)).records}
    assert (cells[whole.game]["behaviour_mean"], cells[pieces.game]["behaviour_mean"]) == (10.0, None)
    write_report(Analysis(data), tmp_path / "report.html")


# Tables without runs


def test_tables_parts_and_the_same_rows_twice(tmp_path):
    rows = episodes(count=3) + episodes("random", checkpoint="", step=0, decoding="sampled")
    whole = write(tmp_path / "scores.csv", rows[:2])
    part = write(part_of(whole, 0, 2), rows[2:])
    data = gather([tmp_path, part, whole])
    assert sorted(data.episodes, key=lambda row: row.key) == sorted(rows, key=lambda row: row.key)
    assert [a.label for a in data.agents] == ["scaled_ql", "random"]
    assert len(gather([part]).episodes) == len(rows) - 2
    assert any("No run was found of scaled_ql, random" in text for text in data.caveats)


def test_two_results_of_one_episode_are_refused(tmp_path):
    first = write(tmp_path / "a" / "scores.csv", episodes())
    other = write(tmp_path / "b" / "scores.csv", episodes(value=6.0))
    with pytest.raises(ValueError, match="hold conflicting rows for the same episode"):
        gather([first, other])


def test_predicted_values_are_read_from_beside_the_scores(tmp_path):
    rows = episodes()
    write(tmp_path / "scores.csv", rows)
    points = [
        calibration_point(row.agent, row.game, gradient_step=row.gradient_step, episode_seed=row.episode)
        for row in rows
    ]
    write(tmp_path / "calibration.csv", points)
    assert gather([tmp_path]).calibration == gather([tmp_path / "scores.csv"]).calibration
    assert len(gather([tmp_path]).calibration) == len(points)


def test_clips_of_the_last_checkpoint_are_shown_with_their_seed(tmp_path):
    folders = [run_folder(tmp_path / f"ql{seed}", seed=seed) for seed in (4, 5)]
    for seed, folder in zip((4, 5), folders, strict=True):
        write(folder / "scores.csv", episodes(seed=seed, value=seed + 0.5))
        (folder / "clips").mkdir()
    (folders[1] / "clips" / "Freeway-scaled_ql-greedy-seed5-100.mp4").write_bytes(b"new")
    (folders[0] / "clips" / "Freeway-scaled_ql-greedy-seed4-50.mp4").write_bytes(b"old")
    (clip,) = gather(folders).clips
    assert (clip.game, clip.mime, clip.data) == ("Freeway", "video/mp4", b"new")
    assert clip.caption == "First evaluation episode of seed 5 (final score 5.5), not selected"
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "Breakout-scaled_ql-greedy-seed4-100.gif").write_bytes(b"gif")  # beside two runs
    (tmp_path / "clips" / "Breakout-scaled_ql-sampled-seed4-100.mp4").write_bytes(b"sampled")
    clip = gather(folders).clips[0]
    assert clip.data == b"gif"
    assert clip.caption == "First evaluation episode of seed 4 (final score 4.5), not selected"


def test_only_random_play_can_be_reported(tmp_path):
    write(tmp_path / "scores.csv", episodes("random", checkpoint="", step=0))
    assert [agent.label for agent in gather([tmp_path]).agents] == ["random"]


# Bad input, through the command


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (episodes()[:0], "must hold episodes, found none"),
        (episodes("constant_UP"), "must hold episodes of an agent beside constant actions"),
    ],
)
def test_bad_tables_end_in_one_line(tmp_path, capsys, rows, message):
    with TableWriter(tmp_path / "scores.csv", EpisodeResult) as table:
        table.append(rows)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("rows", "step", "seeds", "caveat"),
    [
        (
            [*episodes(step=50), *episodes(seed=1, step=50), *episodes()],
            50,
            (0, 1),
            "scaled_ql: scores are those at 50 gradient steps",
        ),
        (
            [*episodes(step=50), *episodes(step=100, games=["Freeway"])],
            50,
            (0,),
            "scaled_ql: scores are those at 50 gradient steps",
        ),
        (
            [*episodes(), *episodes(seed=1, games=["Freeway"])],
            100,
            (0,),
            "scaled_ql is shown without seed 1, not evaluated in each of its games at 100 gradient steps.",
        ),
        (
            [*episodes(), *episodes(seed=1, step=50)],
            100,
            (0,),
            "scaled_ql is shown without seed 1, not evaluated in each of its games at 100 gradient steps.",
        ),
        (
            [*episodes(), *episodes("other", games=["Freeway"])],
            100,
            (0,),
            "other has no episode that counts in Breakout.",
        ),
    ],
)
def test_what_is_unfinished_is_said_and_the_rest_is_shown(tmp_path, rows, step, seeds, caveat):
    write(tmp_path / "scores.csv", rows)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert caveat in page
    with (tmp_path / "report_files" / "protocol.csv").open(newline="") as file:
        shown = [(row["agent"], int(row["gradient_step"]), int(row["seed"])) for row in csv.DictReader(file)]
    assert [row for row in shown if row[0] != "other"] == [("scaled_ql", step, seed) for seed in seeds]


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("data", ["clipped", "none", "elsewhere"])
def test_one_agent_has_a_page_whatever_its_data(tmp_path, num_seeds, data):
    store = FrameStore.create(tmp_path / "store")
    for game in GAMES if data == "clipped" else ():
        with store.writer(game, source="test", rewards="clipped") as writer:
            writer.add_episode(np.zeros((2, 84, 84), np.uint8), np.zeros(1, np.uint8), np.ones(1, np.float32), True)
    for seed in range(num_seeds):
        folder = tmp_path / f"run{seed}"
        if data != "none":
            run_folder(folder, f"data.store={tmp_path / ('store' if data == 'clipped' else 'nowhere')}", seed=seed)
        write(folder / "scores.csv", episodes(seed=seed, value=5.0 + seed))
    folders = [str(tmp_path / f"run{seed}") for seed in range(num_seeds)]
    assert main(["report", *folders, "--out", str(tmp_path / "report.html")]) == 0
    assert "Compared with" not in (tmp_path / "report.html").read_text()


def test_random_play_alone_has_a_page_too(tmp_path):
    write(tmp_path / "scores.csv", episodes("random", checkpoint="", step=0, decoding="sampled"))
    assert main(["report", str(tmp_path)]) == 0


def test_a_page_is_replaced_only_by_one_about_the_same(tmp_path, capsys):
    for name in ("a", "b"):
        write(tmp_path / name / "scores.csv", episodes(name))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["report", a, b]) == 1
    assert "--out must be given with several folders" in capsys.readouterr().err
    assert main(["report", a]) == main(["report", a]) == main(["report", f"{a}/scores.csv", "--title", "Again"]) == 0
    page = tmp_path / "a" / "report.html"
    assert "<title>Again</title>" in page.read_text() and "Written by <code>torchrl-sql report" in page.read_text()
    before = {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    assert main(["report", b, "--out", str(page)]) == 1
    assert "is a report about ., now wanted about ../b; choose another --out" in capsys.readouterr().err
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    assert main(["report", b, "--out", str(other)]) == 1
    assert "was not written as a report by this version" in capsys.readouterr().err
    assert other.read_text() == "<p>mine</p>"
    assert before == {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}


def test_files_of_the_page_before_go_and_others_stay(tmp_path):
    write(tmp_path / "scores.csv", episodes() + episodes("other"))
    assert main(["report", str(tmp_path)]) == 0
    files = tmp_path / "report_files"
    assert (files / "comparison.csv").is_file()
    (files / "mine.csv").write_text("1")
    assert main(["report", str(tmp_path), "--agents", "other"]) == 0
    assert not (files / "comparison.csv").exists() and (files / "scores.png").is_file()
    assert (files / "mine.csv").is_file()


def test_main_and_against_can_be_chosen_and_must_be_there(tmp_path, capsys):
    write(tmp_path / "scores.csv", [*episodes("bc"), *episodes("ours"), *episodes("third")])
    data = gather([tmp_path], main="ours", against=["third"])
    assert ([agent.agent for agent in data.agents], data.main, data.against) == (
        ["ours", "third", "bc"],
        "ours",
        ["third"],
    )
    assert main(["report", str(tmp_path), "--main", "our"]) == 1
    assert "--main must name agents with scores (bc, ours, third), got 'our'" in capsys.readouterr().err


def test_a_study_gives_its_title_and_who_is_compared(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "title: A study\nintroduction: [Why.]\nseeds: [0, 1]\ndata: collect\nruns: {bc: {set: [method=bc]}, ours: {}}\n"
        "report: {main: ours, against: [bc], x: parameters}\n"
    )
    for name, seed in (("bc", 0), ("bc", 1), ("ours", 0)):
        folder = run_folder(tmp_path / name / f"seed{seed}", *["method=bc"] * (name == "bc"), name=name, seed=seed)
        write(folder / "scores.csv", episodes(name, seed=seed))
    data = gather([tmp_path])
    assert (data.title, list(data.introduction), data.agents[0].agent, data.against) == (
        "A study",
        ["Why."],
        "ours",
        ["BC"],
    )
    assert "Not evaluated yet: ours/seed1." in data.caveats
    assert (data.x, data.agents[0].x) == ("parameters", data.agents[0].num_parameters)


STUDY = (
    "title: T\nseeds: [0, 1]\ndata: collect\n"
    "runs: {no_cql: {}, scaled_ql: {}, bc: {set: [method=bc], decode: [greedy, sampled]}, mgdt: {decode: [expert]}}\n"
    "report: {main: scaled_ql, against: [bc, mgdt]}\n"
)


def study_folder(folder, runs, text=STUDY):
    """A study with these runs evaluated, each with two seeds and its returns."""
    (folder / "study.yaml").write_text(text)
    for name, (value, *overrides) in runs.items():
        for seed in (0, 1):
            run = run_folder(folder / name / f"seed{seed}", *overrides, name=name, seed=seed)
            write(run / "scores.csv", episodes(name, seed=seed, value=value + seed / 10, count=3))
    return folder


def test_nobody_stands_in_for_the_agent_that_a_study_is_about(tmp_path, capsys):
    study = study_folder(tmp_path, {"no_cql": (9.0, "method.cql_alpha=0"), "bc": (1.0, "method=bc")})
    assert main(["report", str(study)]) == 0
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    said = "scaled_ql, which the page is about, has no scores yet: nothing is compared."
    assert said in page and said in printed and "<p>scaled_ql has no scores yet.</p>" in page
    assert "Scaled QL" not in page.replace("Scaled QL 80M", "") and "scores higher" not in printed
    assert "<h3>Findings</h3>" not in page and not (tmp_path / "report_files" / "comparison.csv").exists()
    assert findings(Analysis(gather([study], main="no_cql")))  # who is asked for is compared


def test_those_whom_a_study_compares_with_have_no_stand_in_either(tmp_path):
    study = study_folder(tmp_path, {"no_cql": (9.0, "method.cql_alpha=0"), "scaled_ql": (5.0,)})
    data = gather([study])
    assert (data.main, data.against, data.absent) == ("Scaled QL", [], None)
    assert not any("no_cql" in text for _, text in findings(Analysis(data)))
    assert gather([study], agents=["scaled_ql", "no_cql"]).against is None  # these two were asked for
    assert gather([study], against=["no_cql"]).against == ["no_cql"]


def test_without_the_agent_that_a_study_is_about_nobody_else_chooses_the_games(tmp_path):
    study = tmp_path / "study"
    text = "title: T\ndata: collect\nruns: {scaled_ql: {}, only_Pong: {}, only_Freeway: {}}\n"
    for name, games, steps in (("only_Pong", ["Pong"], (50, 100)), ("only_Freeway", ["Freeway"], (100,))):
        run = run_folder(study / name / "seed0", name=name, games=games)
        write(run / "scores.csv", [row for step in steps for row in episodes(name, games=games, step=step)])
        (run / "clips").mkdir()
        (run / "clips" / f"{games[0]}-{name}-greedy-seed0-100.gif").write_bytes(b"gif")
    (study / "study.yaml").write_text(text)
    data = gather([study], aggregate=True)
    assert (data.absent, data.games, data.clips) == ("scaled_ql", ("Freeway", "Pong"), [])
    analysis = Analysis(data)
    assert {*analysis.runs} == {"only_Pong", "only_Freeway"} and not analysis.learning.areas
    assert not any("not on this page" in text or "No area" in text for text in caveats(analysis))
    assert not aggregate_table(analysis, "human").records  # nobody played all games of the page
    data = gather([study], agents=["only_Pong"])
    assert (data.absent, data.games) == (None, ("Pong",))  # who is asked for chooses
    (study / "study.yaml").write_text(f"{text}report: {{games: [Freeway]}}\n")
    assert gather([study]).games == ("Freeway",)


def test_a_page_without_its_agent_has_all_agents_in_many_games_and_none_that_was_published(tmp_path):
    def page(study):
        analysis = Analysis(gather([study]))
        (plot,) = many_games_plots(analysis)
        assert analysis.many_games and write_report(analysis, tmp_path / "report.html")
        return plot, bool(published_table(analysis).records), bool(analysis.aggregates("human"))

    games = ["Assault", "Breakout", "Enduro", "Freeway", "Qbert"]
    (tmp_path / "study.yaml").write_text("title: T\ndata: collect\nruns: {scaled_ql: {}, some: {}, all: {}}\n")
    for name, played in (("some", games[:1]), ("all", games)):
        run = run_folder(tmp_path / name / "seed0", name=name, games=played)
        write(run / "scores.csv", episodes(name, games=played))
    plot, published, aggregated = page(tmp_path)
    assert "for some, all;" in plot.description and not published and aggregated
    shutil.rmtree(tmp_path / "all")
    write(tmp_path / "some" / "seed0" / "scores.csv", episodes("some", games=games[1:3]))
    run = run_folder(tmp_path / "all" / "seed0", name="all", games=games)
    write(run / "scores.csv", episodes("all", games=games[2:]))
    plot, published, aggregated = page(tmp_path)
    assert "for some, all;" in plot.description and not published and not aggregated
    run = run_folder(tmp_path / "scaled_ql" / "seed0", games=games)
    write(run / "scores.csv", episodes(games=games))
    plot, published, aggregated = page(tmp_path)
    assert "for Scaled QL, some;" in plot.description and published and aggregated


def test_an_agent_that_is_evaluated_on_variations_has_a_page_of_these(tmp_path):
    variations = ["Breakout-m4", "Freeway-d1"]
    (tmp_path / "study.yaml").write_text(
        "title: T\ndata: collect\nreport: {main: tuned}\n"
        "runs: {before: {games: [Breakout, Freeway-d1]}, tuned: {from: before, load: all}}\n"
    )
    before = run_folder(tmp_path / "before" / "seed0", name="before")
    write(before / "scores.csv", episodes("before", games=["Breakout", "Freeway-d1"]))
    tuned = run_folder(tmp_path / "tuned" / "seed0", name="tuned", games=variations)
    write(tuned / "scores.csv", episodes("tuned", games=variations))
    assert gather([tmp_path]).games == ("Breakout-m4", "Freeway-d1")
    assert gather([tmp_path], main="before").games == ("Breakout", "Freeway-d1")
    shutil.rmtree(tuned)
    data = gather([tmp_path])
    assert (data.absent, data.games) == ("tuned", ("Breakout", "Freeway-d1"))
    write(before / "scores.csv", episodes("before", games=["Breakout-m4"]))
    alone = run_folder(tmp_path / "alone", name="alone")
    write(alone / "scores.csv", episodes("alone", games=variations))
    data = gather([alone])
    assert data.games == ("Breakout-m4", "Freeway-d1")
    assert "Not shown, for no agent was evaluated there: Breakout and Freeway." in data.caveats


def test_whom_a_study_compares_its_agent_with_is_no_matter_of_others(tmp_path):
    text = STUDY.replace("[bc, mgdt]", "[bc]")
    runs = {"no_cql": (9.0, "method.cql_alpha=0"), "scaled_ql": (5.0,), "bc": (1.0, "method=bc")}
    study = study_folder(tmp_path, runs, text)

    def compared(**chosen):
        analysis = Analysis(gather([study], **chosen))
        return analysis.main.label, [agent.label for agent in analysis.against]

    assert compared() == compared(main="scaled_ql") == compared(main="Scaled QL") == ("Scaled QL", ["BC"])
    assert compared(main="bc") == ("BC", ["no_cql", "Scaled QL"])
    assert compared(agents=["bc", "no_cql"]) == ("no_cql", ["BC"])
    assert compared(main="bc", agents=["bc", "scaled_ql"]) == ("BC", ["Scaled QL"])
    assert compared(agents=["scaled_ql", "bc", "no_cql"]) == ("Scaled QL", ["BC"])
    assert compared(against=["bc", "BC", "no_cql"]) == ("Scaled QL", ["BC", "no_cql"])  # each once
    with pytest.raises(ValueError, match="--against must name others than the main agent, got bc"):
        compared(main="bc", against=["bc"])
    shutil.rmtree(study / "scaled_ql")
    assert gather([study]).absent == "scaled_ql"
    data = gather([study], agents=["bc", "no_cql"])  # they were asked for
    assert data.absent is None and any("no_cql scores higher than BC" in text for _, text in findings(Analysis(data)))


def test_a_pair_that_is_compared_already_is_not_compared_again(tmp_path):
    text = STUDY.replace("[bc, mgdt]", "[bc, mgdt], pairs: [[no_cql, bc], [bc, no_cql], [scaled_ql, bc]]")
    study = study_folder(tmp_path, {"no_cql": (9.0,), "scaled_ql": (5.0,), "bc": (1.0, "method=bc")}, text)

    def judged(**chosen):
        texts = [text for _, text in findings(Analysis(gather([study], **chosen))) if "scores higher" in text]
        return sorted(tuple(word for word in ("no_cql", "Scaled QL", "BC") if word in text) for text in texts)

    ours, theirs, pair = ("Scaled QL", "BC"), ("no_cql", "Scaled QL"), ("no_cql", "BC")
    assert judged() == sorted([ours, pair])
    assert judged(main="no_cql") == sorted([theirs, pair, ours])
    assert judged(main="bc", against=["no_cql"]) == sorted([pair, ours])


def test_a_study_names_further_pairs_which_are_compared_by_all_their_decodings(tmp_path):
    text = STUDY.replace("[bc, mgdt]", "[mgdt], pairs: [[no_cql, bc], [mgdt, bc]]")
    study = study_folder(tmp_path, {"no_cql": (9.0,), "scaled_ql": (5.0,), "bc": (1.0, "method=bc")}, text)
    for seed in (0, 1):
        table = study / "bc" / f"seed{seed}" / "scores.csv"
        write(table, episodes("bc", seed=seed, decoding="sampled", value=1.0 + seed / 10, count=3))
    data = gather([study])
    assert data.pairs == [("no_cql", "BC greedy"), ("no_cql", "BC sampled")]  # mgdt is not evaluated yet
    found = [text for _, text in findings(Analysis(data)) if "scores higher" in text]
    assert found == [f"no_cql scores higher than BC {decoding} on Breakout and Freeway."
                     for decoding in ("greedy", "sampled")]  # fmt: skip


def test_decodings_that_a_study_no_longer_names_are_left_out_and_named(tmp_path):
    study = study_folder(tmp_path, {"scaled_ql": (5.0,), "bc": (1.0, "method=bc")})
    write(study / "bc" / "seed0" / "scores.csv", episodes("bc", decoding="sampled"))
    said = "Not shown, for the study names no such decoding, though episodes are in the tables: bc sampled."
    data = gather([study])
    assert [agent.label for agent in data.agents] == ["Scaled QL", "BC greedy", "BC sampled"]
    assert said not in data.caveats
    (study / "study.yaml").write_text(STUDY.replace("[greedy, sampled]", "[greedy]"))
    data = gather([study])
    assert [agent.label for agent in data.agents] == ["Scaled QL", "BC"] and said in data.caveats
    alone = gather([study / "bc" / "seed0"])  # outside its study
    assert [agent.label for agent in alone.agents] == ["BC greedy", "BC sampled"]


def test_a_score_that_is_no_number_is_named_by_line(tmp_path, capsys):
    table = write(tmp_path / "scores.csv", episodes(value=7.25))
    table.write_text(table.read_text().replace("7.25", "nan", 1))
    assert main(["report", str(tmp_path)]) == 1
    assert f"{table}, line 2: episode_return must be finite, got nan" in capsys.readouterr().err


def test_games_can_be_chosen_and_must_be_there(tmp_path, capsys):
    write(tmp_path / "scores.csv", episodes() + episodes("other", games=["Freeway"]))
    out = tmp_path / "pages" / "freeway.html"
    assert main(["report", str(tmp_path / "scores.csv"), "--games", "Freeway", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert not [line for line in printed.splitlines() if line.startswith("Breakout")] and f"Report: {out}" in printed
    assert "Not shown, though episodes are in the tables: Breakout." in out.read_text()
    assert main(["report", str(tmp_path), "--games", "Pong"]) == 1
    assert "games must have been evaluated, got ('Pong',)" in capsys.readouterr().err


def test_unequal_numbers_of_episodes_are_stated(tmp_path, capsys):
    rows = episodes(count=5) + episodes("other", count=2)
    rows = [dataclasses.replace(row, truncated=True, terminated=False) if row.episode == 4 else row for row in rows]
    write(tmp_path / "scores.csv", rows)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Runs have between 2 and 5 episodes per game and seed" in page
    assert "2 of 14 episodes were cut at the frame limit" in page


def test_only_the_agents_asked_for(tmp_path, capsys):
    write(tmp_path / "scores.csv", [*episodes("bc"), *episodes("ours"), *episodes("third")])
    data = gather([tmp_path], agents=["third", "bc"])
    assert [agent.agent for agent in data.agents] == ["bc", "third"] and {row.agent for row in data.episodes} == {
        "bc", "third"
    }  # fmt: skip
    assert main(["report", str(tmp_path), "--agents", "bc,fourth"]) == 1
    assert "--agents must name agents with scores (bc, ours, third), got 'fourth'" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--agents", "bc", "--main", "ours"]) == 1
    assert "--main must name agents with scores (bc), got 'ours'" in capsys.readouterr().err


def test_the_step_is_chosen_on_the_command_line(tmp_path, capsys):
    write(tmp_path / "scores.csv", [*episodes(step=50), *episodes(step=100, value=9.0)])
    assert main(["report", str(tmp_path), "--step", "50"]) == 0
    with (tmp_path / "report_files" / "score_table.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["mean_return"] == "5.5"
    assert main(["report", str(tmp_path), "--step", "70"]) == 1
    assert "--step must be one at which scaled_ql was evaluated (50, 100), got 70" in capsys.readouterr().err


def test_json_is_all_that_is_printed(tmp_path, capsys):
    write(tmp_path / "scores.csv", episodes() + episodes("other"))
    assert main(["report", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["page"] == str(tmp_path / "report.html") and data["agents"] == ["other", "scaled_ql"]
    assert data["made"]["command"] == f"torchrl-sql report {tmp_path} --json"
    assert {*data["made"]} == {"command", "date", "commit", "machine"}
    assert {"score_table", "protocol", "comparison"} <= {*data["tables"]}


def test_constant_actions_are_shown_without_the_data_too(tmp_path):
    ours = run_folder(tmp_path / "ours")
    write(ours / "scores.csv", episodes())
    rows = [
        episode(f"constant_{name}", "Freeway", value, episode=index, episode_seed=index, gradient_step=0)
        for name, value in (("UP", 20.0), ("DOWN", 0.0))
        for index in range(2)
    ]
    write(tmp_path / "constant" / "scores.csv", rows)
    best = Analysis(gather([ours, tmp_path / "constant"])).policies["Freeway"]["Best constant"]
    assert (best.mean.point, best.num_episodes, best.detail) == (20.0, 2, "always UP")
