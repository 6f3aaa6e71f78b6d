"""The batch script's decisions, with a stand-in for scontrol."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from torchrl_sql.launch.group import PACKAGE

JOB_SHELL = PACKAGE / "launch" / "job.sh"

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 NodeList=n1"


@pytest.fixture
def attempt(tmp_path):
    """Runs the end of an attempt and returns its exit code, its output, and the calls of scontrol."""
    group, programs = tmp_path / "group", tmp_path / "bin"
    task = group / "task_0"
    task.mkdir(parents=True)
    programs.mkdir()
    calls = tmp_path / "calls"

    def run(code, *, shown=RUNNING, tasks="0", errors="", failures=0, **environment):
        """Of scontrol's calls, so many fail first."""
        (programs / "scontrol").write_text(
            f'#!/bin/sh\necho "$*" >>{calls}\n[ $(grep -c -e "^$1" {calls}) -le {failures} ] && exit 1\n'
            f'[ "$2" = show ] && echo "{shown}"\nexit 0\n'
        )
        (programs / "sleep").write_text("#!/bin/sh\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        calls.write_text("")
        begin = f"source {JOB_SHELL}; torchrl_sql_begin {group} 0 {tasks}"
        script = f"{begin}; echo attempt $TORCHRL_SQL_ATTEMPT of $TORCHRL_SQL_TASK; torchrl_sql_end {code}"
        own = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | environment
        done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
        assert errors in done.stderr and bool(errors) == bool(done.stderr)
        return done.returncode, done.stdout, calls.read_text().splitlines()

    run.task = task
    return run


def test_done_is_success_whatever_the_code(attempt):
    (attempt.task / "done").touch()
    assert attempt(134)[0] == 0 and attempt(134)[2] == []


def test_success_without_the_marker_is_none(attempt):
    code, _, calls = attempt(0)
    assert code == 1 and calls[-1] == "requeue 7"


def test_a_fatal_error_is_not_retried(attempt):
    (attempt.task / "FATAL").write_text("ConfigError: seed\n")
    code, output, calls = attempt(1)
    assert code == 1 and calls == [] and "not retried: ConfigError: seed" in output


def test_asked_to_stop_with_requeue(attempt):
    (attempt.task / "requeue").write_text("0.0\n")
    code, _, calls = attempt(75)
    assert code == 75 and calls == ["-o show job 7", "requeue 7"] and not (attempt.task / "crashes").exists()


def test_a_marker_of_an_earlier_attempt_does_not_count(attempt):
    (attempt.task / "requeue").write_text("0.0\n")
    shown = RUNNING.replace("Restarts=0", "Restarts=1")
    _, output, calls = attempt(137, shown=shown, SLURM_RESTART_COUNT="1")
    assert f"attempt 0.1 of {attempt.task}" in output and calls[-1] == "requeue 7"
    assert (attempt.task / "crashes").read_text() == "0.1 crashed, newest checkpoint: \n"


@pytest.mark.parametrize(("name", "text"), [("stopped", "0.0"), ("cancelled", "0")])
def test_stopped_and_cancelled_are_not_queued_again(attempt, name, text):
    (attempt.task / name).write_text(f"{text}\n")
    (attempt.task / "requeue").write_text("0.0\n")
    code, _, calls = attempt(130)
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
def test_what_slurm_ends_or_requeued_itself_is_left_alone(attempt, shown):
    (attempt.task / "requeue").write_text("0.0\n")
    code, output, calls = attempt(75, shown=shown)
    assert code == 75 and calls == ["-o show job 7"] and "left to SLURM" in output
    (attempt.task / "requeue").unlink()
    assert attempt(137, shown=shown)[2] == ["-o show job 7"] and not (attempt.task / "crashes").exists()


def test_the_controller_may_be_away_for_a_while(attempt):
    code, output, calls = attempt(137, failures=4)
    assert code == 137 and calls == ["-o show job 7"] * 5 + ["requeue 7"] * 5
    assert output.endswith("requeued\n")


@pytest.mark.parametrize(("newest", "is_ours"), [("1.0", False), ("10.0", False), ("0.0", True), ("0.12", True)])
def test_who_has_a_newer_submission_neither_counts_nor_queues_again(attempt, newest, is_ours):
    (attempt.task / "attempt").write_text(f"{newest}\n")
    (attempt.task / "requeue").write_text("0.0\n")
    code, output, calls = attempt(137)
    assert code == 137 and bool(calls) == is_ours and (f"superseded by attempt {newest}" in output) != is_ours
    assert not (attempt.task / "crashes").exists()


def test_crashes_of_other_submissions_do_not_count(attempt):
    (attempt.task / "crashes").write_text("0.0 crashed, newest checkpoint: \n" + "10.0 crashed, newest checkpoint: \n")
    assert attempt(137, TORCHRL_SQL_MAX_CRASHES="3")[2][-1] == "requeue 7"


def test_an_array_element_requeues_itself_only(attempt):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    _, _, calls = attempt(137, tasks="4 0", **array)
    assert calls == ["-o show job 7_1", "requeue 7_1"]
    assert (attempt.task / "crashes").exists()


def test_crashes_without_progress_are_counted(attempt):
    limit = {"TORCHRL_SQL_MAX_CRASHES": "2"}
    for step in ("step_000000010", "step_000000020"):  # there was progress
        (attempt.task / "progress").write_text(f"{step}\n")
        assert attempt(137, **limit)[2][-1] == "requeue 7"
    code, output, calls = attempt(137, **limit)
    assert code == 137 and calls == ["-o show job 7"] and "2 times without a new checkpoint: given up" in output


def test_being_told_to_stop_without_progress_has_a_limit(attempt):
    (attempt.task / "requeue").write_text("0.0\n")
    limit = {"TORCHRL_SQL_MAX_CRASHES": "1"}
    for step in (10, 20, 30):
        (attempt.task / "progress").write_text(f"step_{step:09}\n")
        _, output, calls = attempt(75, **limit)
        assert calls[-1] == "requeue 7" and "told to stop; requeued" in output
    code, output, calls = attempt(75, **limit)
    assert code == 75 and calls == ["-o show job 7"] and "1 times without a new checkpoint: given up" in output


@pytest.mark.parametrize("told", [True, False])
def test_what_cannot_be_counted_is_not_queued_again(attempt, told):
    (attempt.task / "progress").write_text("\n")
    (attempt.task / "crashes").symlink_to("/dev/full")
    if told:
        (attempt.task / "requeue").write_text("0.0\n")
    code, output, calls = attempt(137, errors="No space left on device")
    assert code == 137 and calls == ["-o show job 7"] and "cannot be written: not requeued" in output


def test_a_site_s_strict_shell_does_not_switch_requeueing_off(attempt, tmp_path):
    script = f"""
        set -euo pipefail
        source {JOB_SHELL}
        torchrl_sql_begin {tmp_path / "group"} 0 0
        false | true
        (exit 137)
        torchrl_sql_end $?
    """
    attempt(137)  # makes the stand-in
    own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
    assert done.returncode == 137 and "requeued" in done.stdout and done.stderr == ""


def test_nodes_without_scontrol_say_so_at_once(attempt, tmp_path):
    programs = tmp_path / "few"
    programs.mkdir()
    for name in ("cat", "date", "grep", "env"):
        (programs / name).symlink_to(shutil.which(name))
    (attempt.task / "requeue").write_text("0.0\n")
    script = f"source {JOB_SHELL}; torchrl_sql_begin {tmp_path / 'group'} 0 0; torchrl_sql_end 75"
    own = {"PATH": str(programs), "SLURM_JOB_ID": "7"}
    done = subprocess.run([shutil.which("bash"), "-c", script], env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and done.stderr == ""
    assert "scontrol is not on PATH: not requeued; torchrl-sql resume continues it" in done.stdout


@pytest.mark.parametrize("is_new", [True, False])
def test_a_signal_before_python_has_started_is_blocked_where_coreutils_can(tmp_path, is_new):
    """``env`` has --block-signal from coreutils 8.31."""
    stand_in = tmp_path / "env"
    stand_in.write_text("#!/bin/sh\nexit 125\n")
    stand_in.chmod(0o755)
    path = os.environ["PATH"] if is_new else f"{tmp_path}:{os.environ['PATH']}"
    script = f'source {JOB_SHELL}; echo "[$torchrl_sql_block]"'
    done = subprocess.run(["bash", "-c", script], env={"PATH": path}, capture_output=True, text=True)
    assert done.stdout == ("[env --block-signal=USR2]\n" if is_new else "[]\n")


def test_every_attempt_runs_the_launch_s_code(attempt, tmp_path):
    script = (
        f"source {JOB_SHELL}; torchrl_sql_begin {tmp_path}/launch/train 0 0; echo $PYTHONPATH; echo $PYTHONSAFEPATH"
    )
    own = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "PYTHONPATH": "/mine"}
    done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/launch/code:/mine\n1\n"


@pytest.mark.parametrize(
    ("given", "threads"), [({}, "1"), ({"SLURM_CPUS_PER_TASK": "8"}, "8"), ({"OMP_NUM_THREADS": "3"}, "3")]
)
def test_threads_of_each_process(tmp_path, given, threads):
    script = f"source {JOB_SHELL}; torchrl_sql_begin {tmp_path} 0 0; echo $OMP_NUM_THREADS"
    own = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"} | given
    assert subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True).stdout == f"{threads}\n"
