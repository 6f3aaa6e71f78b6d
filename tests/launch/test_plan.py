"""From arguments to tasks."""

from __future__ import annotations

import pytest
import yaml

from torchrl_sql.config import ConfigError
from torchrl_sql.launch.plan import choose_root, expand_sweep, folder_name, plan_command, plan_evaluation, plan_training


def test_sweeps_are_products():
    assert expand_sweep(["scale=cpu", "data.store=store", "seed=0,1", "model.encoder=resnet34,resnet50"]) == [
        (label, ["scale=cpu", "data.store=store", *label.split(",")])
        for label in (
            "seed=0,model.encoder=resnet34",
            "seed=0,model.encoder=resnet50",
            "seed=1,model.encoder=resnet34",
            "seed=1,model.encoder=resnet50",
        )
    ]


def test_lists_are_no_sweeps():
    words = ["data.games=[Breakout,Freeway]", "name='a,b'"]
    assert expand_sweep(words) == [("", words)]


def test_seeds_share_a_name_and_other_choices_do_not(tmp_path):
    seeds = plan_training(["scale=cpu", "data.store=store", "seed=0,1"], tmp_path)
    assert [planned.name for planned in seeds] == ["cql", "cql"]
    assert [planned.task.run_dir for planned in seeds] == [f"{tmp_path}/seed=0", f"{tmp_path}/seed=1"]
    sizes = plan_training(["scale=cpu", "data.store=store", "method.cql_alpha=0.1,0.2", "seed=0,1"], tmp_path)
    assert [planned.name for planned in sizes] == [f"cql-method.cql_alpha=0.{i}" for i in (1, 1, 2, 2)]
    assert [yaml.safe_load(planned.config)["method"]["cql_alpha"] for planned in sizes] == [0.1, 0.1, 0.2, 0.2]
    assert len({planned.task.run_dir for planned in sizes}) == 4


@pytest.mark.parametrize("values", ["seed=0,0", "name='a b','a,b'"])
def test_two_runs_never_share_a_folder(tmp_path, values):
    with pytest.raises(ConfigError, match="would share the folder"):
        plan_training(["scale=cpu", "data.store=store", values], tmp_path)


def test_a_label_too_long_for_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too long for the name"):
        plan_training(["scale=cpu", "data.store=store", f"name={'a' * 300},b"], tmp_path)


def test_what_the_launcher_decides_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give --into instead of run_dir=x"):
        plan_training(["scale=cpu", "data.store=store", "run_dir=x"], tmp_path)
    with pytest.raises(ConfigError, match="'seed'"):
        plan_training(["scale=cpu", "data.store=store", "seed"], tmp_path)


def test_each_launch_has_a_folder_of_its_own(tmp_path):
    assert choose_root("a b") != choose_root("a b")
    assert choose_root("a b").name.startswith("a_b-")
    assert choose_root("x", out=tmp_path / "new") == tmp_path / "new"
    with pytest.raises(ConfigError, match="must be a new folder"):
        choose_root("x", out=tmp_path)


def test_commands_are_checked_before_they_are_submitted(capsys):
    assert plan_command("evaluate", ["runs/x"]).task.arguments == ["evaluate", "runs/x"]
    with pytest.raises(SystemExit):
        plan_command("evaluate", ["runs/x", "--decode", "greedy"])
    assert "unrecognized arguments: --decode" in capsys.readouterr().err


def test_evaluations_are_split_into_shares_of_each_agent():
    planned = plan_evaluation(["runs/a", "runs/b"], ["--episodes", "9"], num_shares=2)
    assert [p.task.arguments for p in planned] == [
        ["evaluate", run, "--episodes", "9", "--share", share]
        for run in ("runs/a", "runs/b")
        for share in ("1/2", "2/2")
    ]
    (whole,) = plan_evaluation(["runs/a"], [], num_shares=1)
    assert whole.task.arguments == ["evaluate", "runs/a"]
    with pytest.raises(ConfigError, match="--shares must be at least 1, got 0"):
        plan_evaluation(["runs/a"], [], num_shares=0)


def test_folder_names():
    assert folder_name("seed=0,data.games=[A,B]") == "seed=0_data.games=_A_B"
