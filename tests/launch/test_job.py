"""One attempt at a task: what it leaves behind for the batch script and for later attempts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from torchrl_sql import cli
from torchrl_sql.data.catalogue import RECORDINGS_FILE
from torchrl_sql.data.store import FrameStore
from torchrl_sql.launch import job
from torchrl_sql.launch.attempt import ATTEMPT_VARIABLE, Attempt, TaskFolder, newest_checkpoint
from torchrl_sql.launch.group import make_groups
from torchrl_sql.launch.ranks import is_first_of_node
from torchrl_sql.studies.task import Task
from torchrl_sql.training.checkpoint import CheckpointError
from torchrl_sql.training.lock import RunFolderError
from torchrl_sql.training.signals import Interrupted, StopSignals


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Makes an attempt at a training task whose command does what a given function does; returns the exit code."""
    task = Task(name="train", arguments=["train"], group="train", run_dir=str(tmp_path / "run"), folder=str(tmp_path))
    (group,) = make_groups(tmp_path, [task], command="", cluster=None)
    group.create()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def attempt(work, *, name="0.0"):
        monkeypatch.setenv(ATTEMPT_VARIABLE, name)
        return job.run_task(group.folder, 0, run=lambda arguments: work())

    attempt.task = group.task_folder(0)
    attempt.group = group
    yield attempt
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def fail(error):
    def work():
        raise error

    return work


def test_success(attempt):
    assert attempt(lambda: None) == 0
    assert attempt.task.done and attempt.task.newest_attempt() == Attempt(0, 0)
    assert attempt(fail(AssertionError("must not run again")), name="0.1") == 0


def test_work_of_several_processes_is_done_when_all_have_done_their_part(attempt, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, ranks in (("0.0", "0"), ("0.1", "10")):  # the second rank of the first attempt died
        for number in ranks:
            assert not attempt.task.done
            monkeypatch.setenv("RANK", number)
            assert attempt(lambda: None, name=name) == 0
    assert attempt.task.text("done") == "0.1"


def test_preemption_and_stopping(attempt):
    assert attempt(fail(Interrupted("at step 3", requeue=True))) == job.EXIT_REQUEUE
    assert attempt.task.text("requeue") == "0.0" and attempt.task.text("stopped") is None
    assert attempt(fail(Interrupted("at step 5", requeue=False)), name="0.1") == job.EXIT_STOPPED
    assert attempt.task.text("stopped") == "0.1"
    assert not attempt.task.done


@pytest.mark.parametrize(
    "error", [ValueError("seed"), FileNotFoundError("store"), FloatingPointError("nan"), KeyError("x")]
)
def test_errors_that_would_come_again(attempt, error):
    with pytest.raises(type(error)):
        attempt(fail(error))
    assert str(error) in attempt.task.text("FATAL")
    assert attempt(lambda: None, name="0.1") == 1  # not even if the next would succeed
    assert not attempt.task.done
    attempt.task.clear_for_resume()
    assert attempt(lambda: None, name="1.0") == 0


def test_a_wrong_option_would_come_again(attempt, capsys):
    with pytest.raises(ValueError):
        attempt(lambda: cli.run(["evaluate", "random", "--nope"]))
    assert "torchrl-sql evaluate random --nope is not understood" in attempt.task.text("FATAL")
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), OSError("stale file handle")])
def test_errors_of_machines_are_left_to_the_batch_script(attempt, error):
    with pytest.raises(type(error)):
        attempt(fail(error))
    assert attempt.task.text("FATAL") is None and not attempt.task.done


def fail_after_the_signal():
    with StopSignals():
        signal.raise_signal(signal.SIGUSR2)
        raise ValueError("a worker died")


def test_an_error_after_the_signal_is_put_down_to_it(attempt):
    assert attempt(fail_after_the_signal) == job.EXIT_REQUEUE
    assert attempt.task.text("FATAL") is None and attempt.task.text("requeue") == "0.0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_error_after_a_signal_that_ends_the_job_is_not_the_work_s(attempt, number):
    def work():
        with StopSignals():
            signal.raise_signal(number)
            raise ValueError("the compiler's process died")

    with pytest.raises(ValueError):
        attempt(work)
    assert attempt.task.text("FATAL") is None and not attempt.task.done


@pytest.mark.parametrize("work", [fail(Interrupted("", requeue=True)), fail_after_the_signal])
@pytest.mark.parametrize(("kind", "marker"), [("bench", None), ("import", "0.0")])
def test_what_starts_anew_asks_for_no_requeue(attempt, kind, marker, work):
    attempt.group.tasks[0] = replace(attempt.group.tasks[0], arguments=[kind])
    attempt.group.save()
    assert attempt(work) == job.EXIT_REQUEUE
    assert attempt.task.text("FATAL") is None
    assert attempt.task.text("requeue") == marker


def test_a_signal_stops_a_command_that_has_no_handler_of_its_own(attempt):
    def work():
        signal.raise_signal(signal.SIGUSR2)
        time.sleep(60)

    assert attempt(work) == job.EXIT_REQUEUE
    assert attempt.task.text("requeue") == "0.0"


def test_a_signal_that_came_before_there_was_a_handler_is_not_lost(attempt):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.raise_signal(signal.SIGUSR2)
    assert attempt(lambda: time.sleep(60)) == job.EXIT_REQUEUE


def test_a_rank_that_is_ended_because_another_was_stopped_does_not_decide_for_it(attempt, tmp_path, monkeypatch):
    """SLURM sends SIGTERM to the others of a rank that exits: in the middle of a command, before training has begun."""
    listed = FrameStore.create(tmp_path / "store").path / RECORDINGS_FILE
    listed.unlink()
    os.mkfifo(listed)
    attempt.group.tasks[0] = replace(attempt.group.tasks[0], arguments=["inspect", str(tmp_path / "store")])
    attempt.group.save()
    attempt.task.write("requeue", "0.0")
    monkeypatch.setenv(ATTEMPT_VARIABLE, "0.0")
    command = [sys.executable, "-m", "torchrl_sql.cli.job", str(attempt.group.folder), "0"]
    with subprocess.Popen(command) as process, listed.open("w"):  # which opens once the command is reading
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    assert attempt.task.text("requeue") == "0.0" and attempt.task.text("stopped") is None


def test_progress_is_the_newest_checkpoint_at_the_start_and_when_it_was_told_to_stop(attempt, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)

    def save(step):
        (checkpoints / f"step_{step:09}.pt").touch()

    def work():
        assert attempt.task.text("progress") == "step_000000090"
        save(100)
        raise Interrupted("", requeue=True)

    save(90)
    attempt(work)
    assert attempt.task.text("progress") == "step_000000100" == newest_checkpoint(str(tmp_path / "run"))
    with pytest.raises(OSError):
        attempt(fail(OSError(5, "I/O")), name="0.1")
    assert attempt.task.text("progress") == "step_000000100"


def test_a_study_s_task_is_recorded_as_done_in_the_study(attempt):
    task = attempt.group.tasks[0]
    attempt(fail(Interrupted("", requeue=True)))
    assert task.record()["seconds"] is None
    attempt(lambda: None, name="0.1")
    assert task.record()["seconds"] >= 0


def test_the_first_error_of_an_attempt_counts(attempt):
    def work():
        attempt.task.write("FATAL", "of rank 1")
        raise ValueError("of rank 0")

    with pytest.raises(ValueError):
        attempt(work)
    assert attempt.task.text("FATAL") == "of rank 1"


def test_an_older_attempt_leaves_the_newer_ones_task_alone(attempt):
    def work():
        attempt.task.write("attempt", "1.0")
        raise ValueError("the files under an orphan's feet are gone")

    assert attempt(work, name="0.3") == job.EXIT_SUPERSEDED
    assert attempt.task.text("FATAL") is None
    assert attempt(lambda: None, name="0.4") == 1
    assert not attempt.task.done


def test_a_cancelled_submission_does_not_start(attempt):
    attempt.task.write("cancelled", "0")
    assert attempt(lambda: None, name="0.1") == 1
    assert attempt(lambda: None, name="1.0") == 0


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (RuntimeError("[enforce fail at gloo] Connection closed by peer [10.1.2.3]:4000"), True),
        (RuntimeError("NCCL error: unhandled system error"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), True),
        (torch.distributed.DistBackendError("x"), True),
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), True),
        (ConnectionResetError(), True),
        (OSError(5, "I/O"), True),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), False),
        (RuntimeError("Invalid device string: 'cuda:abc'"), False),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214), True),
        (BackendCompilerFailed("inductor", ValueError("x"), None), False),
        (RunFolderError("another process trains in it"), True),
        (NotImplementedError(), False),
        (CheckpointError(), False),
        (TypeError(), False),
    ],
)
def test_which_errors_may_pass(error, transient):
    assert job.is_transient(error, has_checkpoint=True) == job.is_transient(error, has_checkpoint=False) == transient


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        torch.AcceleratorError("CUDA error: invalid device ordinal", 101),
        FileNotFoundError(),
        PermissionError(),
    ],
)
def test_what_was_there_once_may_be_there_again(error):
    assert job.is_transient(error, has_checkpoint=True) and not job.is_transient(error, has_checkpoint=False)


def test_memory_that_torch_does_not_get_was_enough_if_there_is_a_checkpoint(attempt, tmp_path):
    """Also if this attempt has made none yet."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_000000100.pt").touch()
    for name in ("0.0", "0.1"):
        with pytest.raises(RuntimeError):
            attempt(lambda: torch.empty(2**60), name=name)
        assert attempt.task.text("FATAL") is None
    (checkpoints / "step_000000100.pt").unlink()
    with pytest.raises(RuntimeError):
        attempt(lambda: torch.empty(2**60), name="0.2")
    assert "can't allocate memory" in attempt.task.text("FATAL")


def test_attempts_are_ordered():
    assert Attempt(0, 9) < Attempt(0, 10) < Attempt(1, 0)
    assert Attempt.parse(str(Attempt(2, 13)) + "\n") == Attempt(2, 13)


HANGS = """
import signal, sys
from pathlib import Path
from torchrl_sql.launch.attempt import Attempt, TaskFolder
from torchrl_sql.launch.watchdog import Watchdog
signal.signal(signal.SIGUSR2, lambda *_: None)
continues, look_seconds = sys.argv[2] != "bench", float(sys.argv[3])
task = TaskFolder(Path(sys.argv[1]))
with Watchdog(task, Attempt(0, 0), continues=continues, stop_seconds=0.5, look_seconds=look_seconds):
    print("ready", flush=True)
    # A wait in C code, as in a collective: handlers written in Python do not run.
    import ctypes
    while True:
        ctypes.CDLL(None).pause()
"""


@pytest.fixture(params=[("train", 0.2)])
def hanging(tmp_path, request):
    """A process at such a task whose main thread hangs under a watchdog that looks for a newer attempt so often
    (seconds).
    """
    command = [sys.executable, "-c", HANGS, str(tmp_path), *map(str, request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("hanging", "marker"),
    [(("train", 0.2), "0.0"), (("train", 300), "0.0"), (("bench", 300), None)],
    indirect=["hanging"],
)
def test_a_process_that_hangs_is_queued_again_after_the_signal(hanging, marker, tmp_path):
    time.sleep(0.7)
    assert hanging.poll() is None  # without a signal nothing happens
    hanging.send_signal(signal.SIGUSR2)
    assert hanging.wait(300) == job.EXIT_REQUEUE
    assert TaskFolder(tmp_path).text("requeue") == marker


def test_the_watch_goes_on_when_files_cannot_be_read_or_written(hanging, tmp_path):
    (tmp_path / "attempt").mkdir()  # reading it is an OSError that is no FileNotFoundError
    (tmp_path / "requeue").mkdir()
    time.sleep(1.5)
    assert hanging.poll() is None
    hanging.send_signal(signal.SIGUSR2)
    assert hanging.wait(300) == job.EXIT_REQUEUE


def test_an_orphan_ends_when_a_newer_attempt_starts(hanging, tmp_path):
    TaskFolder(tmp_path).write("attempt", "0.1")
    assert hanging.wait(300) == job.EXIT_SUPERSEDED
    assert TaskFolder(tmp_path).text("requeue") is None


@pytest.mark.parametrize("hanging", [("train", 300)], indirect=True)
def test_who_seldom_looks_leaves_the_file_system_alone(hanging, tmp_path):
    TaskFolder(tmp_path).write("attempt", "0.1")
    time.sleep(1)
    assert hanging.poll() is None


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"SLURM_LOCALID": "0", "SLURM_PROCID": "8"}, True),
        ({"SLURM_LOCALID": "3", "SLURM_PROCID": "11"}, False),
        ({"LOCAL_RANK": "1", "RANK": "1"}, False),
    ],
)
def test_one_process_per_node_looks_often(monkeypatch, environment, first):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_of_node() == first
