"""Stages of jobs that a user's own batch script started."""

from __future__ import annotations

import pytest

from torchrl_sql.config import ConfigError
from torchrl_sql.launch.group import Stage, find_launch
from torchrl_sql.launch.prepare import prepare

JOB = {"SLURM_JOB_ID": "5"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_life_of_a_job_has_the_same_folder_and_every_job_another():
    words = ["scale=cpu", "data.store=store", "seed=3"]
    first = prepare("train", words, JOB)
    assert prepare("train", words, JOB | {"SLURM_RESTART_COUNT": "1"}) == first
    assert prepare("train", words, JOB) != first  # ids start anew with a new cluster
    other = prepare("train", ["scale=cpu", "data.store=store", "seed=4"], JOB | {"SLURM_RESTART_COUNT": "1"})
    assert other != first and "seed: 4" in (other / "task_0" / "config.yaml").read_text()
    stage = Stage.load(first)
    assert stage.submissions[0].job == "5" and stage.cluster is None and stage.kind == "train"
    assert stage.tasks[0].run_dir == str(first.parents[1])


@pytest.mark.parametrize("content", ["", "[]", '{"format": "torchrl_sql launch 1"}'])
def test_records_of_others_are_passed_over(here, caplog, content):
    first = prepare("train", ["scale=cpu", "data.store=store"], JOB)
    other = here / "runs" / "other" / "launch" / "train"
    other.mkdir(parents=True)
    (other / "launch.json").write_text(content)
    assert prepare("train", ["scale=cpu", "data.store=store"], JOB | {"SLURM_RESTART_COUNT": "1"}) == first
    assert find_launch("5") == first.parents[1]
    assert "passed over: " + str(other) in caplog.text


def test_an_array_element_takes_its_combination():
    words = ["scale=cpu", "data.store=store", "seed=0,7"]
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1"}
    stage = Stage.load(prepare("train", words, array))
    assert stage.submissions[0].job == "8_1" and len(stage.tasks) == 1
    assert "seed: 7" in (stage.folder / "task_0" / "config.yaml").read_text()
    assert find_launch("8") == find_launch("8_1") == stage.folder.parents[1]
    other = prepare("train", words, array | {"SLURM_ARRAY_TASK_ID": "0"})
    with pytest.raises(ValueError, match="give one of 8_0, 8_1"):
        find_launch("8")
    assert find_launch("8_0") == other.parents[1]
    with pytest.raises(ConfigError, match="array element 2 has no settings"):
        prepare("train", words, array | {"SLURM_ARRAY_TASK_ID": "2"})
    with pytest.raises(ConfigError, match="sbatch --array=0-1"):
        prepare("train", words, JOB)


def test_other_commands_are_checked(here, capsys):
    stage = Stage.load(prepare("evaluate", ["runs/x"], JOB))
    assert stage.tasks[0].arguments == ["evaluate", "runs/x"] and stage.tasks[0].run_dir is None
    with pytest.raises(SystemExit):
        prepare("evaluate", [], JOB)
    assert "are required" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no setting 'method\.alhpa'"):
        prepare("train", ["scale=cpu", "data.store=store", "method.alhpa=1"], JOB)
    assert len(list((here / "runs").iterdir())) == 1
