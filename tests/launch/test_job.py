"""One life of a task: what it leaves behind for the batch script and for later lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from torchrl_sql.launch import job
from torchrl_sql.launch.group import Task, new_stage
from torchrl_sql.launch.task import LIFE_VARIABLE, Life, TaskFolder
from torchrl_sql.training.checkpoint import CheckpointError
from torchrl_sql.training.signals import Interrupted


@pytest.fixture
def live(tmp_path, monkeypatch):
    """Runs a training life whose training is a given function; returns the exit code and the task's folder."""
    stage = new_stage(
        tmp_path, "train", [Task(label="", arguments=["train"])], command="", stop_seconds=60, cluster=None
    )
    stage.create([None])
    monkeypatch.delenv("RANK", raising=False)

    def live(work, *, life="0.0"):
        monkeypatch.setenv(LIFE_VARIABLE, life)
        monkeypatch.setattr(job, "_train", lambda task: work())
        with pytest.raises(SystemExit) as end:
            job.run_task(str(stage.folder), 0)
            sys.exit(0)
        return end.value.code

    live.task = stage.task_folder(0)
    live.stage = stage
    return live


def fail(error):
    def work():
        raise error

    return work


def test_success(live):
    assert live(lambda: None) == 0
    assert live.task.done and live.task.newest_life() == Life(0, 0)
    assert live(fail(AssertionError("must not run again")), life="0.1") == 0


def test_preemption_and_stopping(live):
    assert live(fail(Interrupted("at step 3", requeue=True))) == job.EXIT_REQUEUE
    assert live.task.text("requeue") == "0.0" and live.task.text("stopped") is None
    assert live(fail(Interrupted("at step 5", requeue=False)), life="0.1") == job.EXIT_STOPPED
    assert live.task.text("stopped") == "0.1"
    assert not live.task.done


@pytest.mark.parametrize(
    "error", [ValueError("seed"), FileNotFoundError("store"), FloatingPointError("nan"), KeyError("x")]
)
def test_errors_that_would_come_again(live, error):
    with pytest.raises(type(error)):
        live(fail(error))
    assert str(error) in live.task.text("FATAL")
    assert live(lambda: None, life="0.1") == 1  # not even if the next would succeed
    assert not live.task.done
    live.task.clear_for_resume()
    assert live(lambda: None, life="1.0") == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection closed by peer"), OSError("stale file handle"), MemoryError()]
)
def test_errors_of_machines_are_left_to_the_batch_script(live, error):
    with pytest.raises(type(error)):
        live(fail(error))
    assert live.task.text("FATAL") is None and not live.task.done


def test_an_error_after_the_signal_is_put_down_to_it(live):
    def work():
        signal.raise_signal(signal.SIGUSR2)
        raise ValueError("a worker died")

    assert live(work) == job.EXIT_REQUEUE
    assert live.task.text("FATAL") is None and live.task.text("requeue") == "0.0"


@pytest.mark.parametrize(("kind", "marker"), [("bench", None), ("import", "0.0")])
def test_what_starts_anew_asks_for_no_requeue(live, monkeypatch, kind, marker):
    live.stage.tasks[0].arguments[0] = kind
    live.stage.save()
    monkeypatch.setattr(job, "_run_command", lambda arguments: fail(Interrupted("", requeue=True))())
    assert live(None) == job.EXIT_REQUEUE
    assert live.task.text("requeue") == marker


def test_the_first_error_of_a_life_counts(live):
    def work():
        live.task.write("FATAL", "of rank 1")
        raise ValueError("of rank 0")

    with pytest.raises(ValueError):
        live(work)
    assert live.task.text("FATAL") == "of rank 1"


def test_an_older_life_leaves_the_newer_ones_task_alone(live):
    def work():
        live.task.write("life", "1.0")
        raise ValueError("the files under an orphan's feet are gone")

    assert live(work, life="0.3") == job.EXIT_SUPERSEDED
    assert live.task.text("FATAL") is None
    assert live(lambda: None, life="0.4") == 1
    assert not live.task.done


def test_a_cancelled_submission_does_not_start(live):
    live.task.write("cancelled", "0")
    assert live(lambda: None, life="0.1") == 1
    assert live(lambda: None, life="1.0") == 0


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (RuntimeError(), True),
        (ConnectionResetError(), True),
        (OSError(5, "I/O"), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (NotImplementedError(), False),
        (CheckpointError(), False),
        (TypeError(), False),
    ],
)
def test_which_errors_may_pass(error, transient):
    assert job.is_transient(error) == transient


def test_lives_are_ordered():
    assert Life(0, 9) < Life(0, 10) < Life(1, 0)
    assert Life.parse(str(Life(2, 13)) + "\n") == Life(2, 13)


HANGS = """
import signal, sys
from pathlib import Path
from torchrl_sql.launch.task import Life, TaskFolder
from torchrl_sql.launch.watchdog import Watchdog
signal.signal(signal.SIGUSR2, lambda *_: None)
with Watchdog(TaskFolder(Path(sys.argv[1])), Life(0, 0), stop_seconds=0.5):
    print("ready", flush=True)
    # A wait in C code, as in a collective: handlers written in Python do not run.
    import ctypes
    while True:
        ctypes.CDLL(None).pause()
"""


@pytest.fixture
def hanging(tmp_path):
    """A process whose main thread hangs under a watchdog."""
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_hangs_is_queued_again_after_the_signal(hanging, tmp_path):
    time.sleep(0.7)
    assert hanging.poll() is None  # without a signal nothing happens
    hanging.send_signal(signal.SIGUSR2)
    assert hanging.wait(10) == job.EXIT_REQUEUE
    assert TaskFolder(tmp_path).text("requeue") == "0.0"


def test_the_watch_goes_on_when_files_cannot_be_read_or_written(hanging, tmp_path):
    (tmp_path / "life").mkdir()  # reading it is an OSError that is no FileNotFoundError
    (tmp_path / "requeue").mkdir()
    time.sleep(1.5)
    assert hanging.poll() is None
    hanging.send_signal(signal.SIGUSR2)
    assert hanging.wait(10) == job.EXIT_REQUEUE


def test_an_orphan_ends_when_a_newer_life_starts(hanging, tmp_path):
    TaskFolder(tmp_path).write("life", "0.1")
    assert hanging.wait(10) == job.EXIT_SUPERSEDED
    assert TaskFolder(tmp_path).text("requeue") is None


def test_half_written_results_of_an_earlier_life_are_dropped(live, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    stale = [tmp_path / "5_0_result.pkl", tmp_path / "5_0_result.pkl.save_tmp"]
    for file in stale:
        file.touch()
    assert live(lambda: None) == 0
    assert not any(file.exists() for file in stale)
    assert os.getcwd() == live.stage.directory
