"""The batch script's decisions, with a stand-in for scontrol."""

from __future__ import annotations

import os
import subprocess

import pytest

from torchrl_sql.launch.slurm import JOB_SHELL

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 NodeList=n1"


@pytest.fixture
def life(tmp_path):
    """Runs the end of a life and returns its exit code, its output, and the calls of scontrol."""
    stage, programs = tmp_path / "stage", tmp_path / "bin"
    task = stage / "task_0"
    task.mkdir(parents=True)
    programs.mkdir()
    calls = tmp_path / "calls"

    def run(code, *, shown=RUNNING, tasks="0", errors="", **environment):
        (programs / "scontrol").write_text(
            f'#!/bin/sh\necho "$*" >>{calls}\n[ "$2" = show ] && echo "{shown}"\nexit 0\n'
        )
        (programs / "scontrol").chmod(0o755)
        calls.write_text("")
        begin = f"source {JOB_SHELL}; torchrl_sql_begin {stage} 0 {tasks}"
        script = f"{begin}; echo life $TORCHRL_SQL_LIFE; torchrl_sql_end {code}"
        own = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | environment
        done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
        assert errors in done.stderr and bool(errors) == bool(done.stderr)
        return done.returncode, done.stdout, calls.read_text().splitlines()

    run.task = task
    return run


def test_done_is_success_whatever_the_code(life):
    (life.task / "done").touch()
    assert life(134)[0] == 0 and life(134)[2] == []


def test_success_without_the_marker_is_none(life):
    code, _, calls = life(0)
    assert code == 1 and calls[-1] == "requeue 7"


def test_a_fatal_error_is_not_retried(life):
    (life.task / "FATAL").write_text("ConfigError: seed\n")
    code, output, calls = life(1)
    assert code == 1 and calls == [] and "not retried: ConfigError: seed" in output


def test_asked_to_stop_with_requeue(life):
    (life.task / "requeue").write_text("0.0\n")
    code, _, calls = life(75)
    assert code == 75 and calls == ["-o show job 7", "requeue 7"] and not (life.task / "crashes").exists()


def test_a_marker_of_an_earlier_life_does_not_count(life):
    (life.task / "requeue").write_text("0.0\n")
    shown = RUNNING.replace("Restarts=0", "Restarts=1")
    _, output, calls = life(137, shown=shown, SLURM_RESTART_COUNT="1")
    assert "life 0.1" in output and calls[-1] == "requeue 7"
    assert (life.task / "crashes").read_text() == "0.1 exit code 137 newest checkpoint: \n"


@pytest.mark.parametrize(("name", "text"), [("stopped", "0.0"), ("cancelled", "0")])
def test_stopped_and_cancelled_are_not_queued_again(life, name, text):
    (life.task / name).write_text(f"{text}\n")
    (life.task / "requeue").write_text("0.0\n")
    code, _, calls = life(130)
    assert code == 130 and calls == []


@pytest.mark.parametrize(
    "shown",
    [
        RUNNING.replace("RUNNING", "CANCELLED"),
        RUNNING.replace("RUNNING", "COMPLETING"),
        RUNNING.replace("RUNNING", "PENDING"),
        RUNNING.replace("Restarts=0", "Restarts=1"),
    ],
)
def test_what_slurm_ends_or_requeued_itself_is_left_alone(life, shown):
    (life.task / "requeue").write_text("0.0\n")
    code, output, calls = life(75, shown=shown)
    assert code == 75 and calls == ["-o show job 7"] and "left to SLURM" in output
    (life.task / "requeue").unlink()
    assert life(137, shown=shown)[2] == ["-o show job 7"] and not (life.task / "crashes").exists()


def test_an_array_element_requeues_itself_only(life):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    _, _, calls = life(137, tasks="4 0", **array)
    assert calls == ["-o show job 7_1", "requeue 7_1"]
    assert (life.task / "crashes").exists()


def test_crashes_without_progress_are_counted(life, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (life.task / "run_dir").write_text(f"{tmp_path / 'run'}\n")
    (checkpoints / "step_000000010.pt").touch()
    limit = {"TORCHRL_SQL_MAX_CRASHES": "2"}
    assert life(137, **limit)[2][-1] == "requeue 7"
    (checkpoints / "step_000000020.pt").touch()
    assert life(137, **limit)[2][-1] == "requeue 7"  # there was progress
    code, output, calls = life(137, **limit)
    assert code == 137 and calls == ["-o show job 7"] and "2 times without a new checkpoint: given up" in output


def test_being_told_to_stop_without_progress_has_a_limit(life, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (life.task / "run_dir").write_text(f"{tmp_path / 'run'}\n")
    (life.task / "requeue").write_text("0.0\n")
    limit = {"TORCHRL_SQL_MAX_CRASHES": "1"}
    for step in (10, 20, 30):
        (checkpoints / f"step_{step:09}.pt").touch()
        _, output, calls = life(75, **limit)
        assert calls[-1] == "requeue 7" and "told to stop; requeued" in output
    code, output, calls = life(75, **limit)
    assert code == 75 and calls == ["-o show job 7"] and "1 times without a new checkpoint: given up" in output


@pytest.mark.parametrize("told", [True, False])
def test_what_cannot_be_counted_is_not_queued_again(life, tmp_path, told):
    (life.task / "run_dir").write_text(f"{tmp_path}\n")
    (life.task / "crashes").symlink_to("/dev/full")
    if told:
        (life.task / "requeue").write_text("0.0\n")
    code, output, calls = life(137, errors="No space left on device")
    assert code == 137 and calls == ["-o show job 7"] and "cannot be written: not requeued" in output
