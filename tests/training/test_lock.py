from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torchrl_sql.training import lock as lock_module
from torchrl_sql.training import train
from torchrl_sql.training.checkpoint import list_checkpoints
from torchrl_sql.training.lock import LOCK_FILE, RunFolderError, RunLock

HOLD = """
import sys
from pathlib import Path
from torchrl_sql.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def attempt_at(monkeypatch, task, attempt):
    monkeypatch.setenv("TORCHRL_SQL_TASK", task)
    monkeypatch.setenv("TORCHRL_SQL_ATTEMPT", attempt)


def move_owner(folder, **changes):
    """As if the owner were another process, e.g. on another host."""
    path = folder / LOCK_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_living_owner_is_named(tmp_path, owner):
    message = rf"is being trained by process {owner.pid} on {os.uname().nodename}, .*: wait for it, or .* {tmp_path}/"
    with pytest.raises(RunFolderError, match=message):
        RunLock(tmp_path)


@pytest.mark.parametrize("reaped", [True, False])
def test_an_owner_that_was_killed_on_this_host_is_in_nobodys_way(tmp_path, owner, reaped):
    owner.send_signal(signal.SIGKILL)
    if reaped:
        owner.wait()
    else:
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    with RunLock(tmp_path) as lock:
        lock.check()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_with_the_owners_number_is_not_taken_for_it(tmp_path):
    RunLock(tmp_path)
    move_owner(tmp_path, started="another boot 1")
    RunLock(tmp_path).check()


def test_an_owner_on_another_host_may_be_alive(tmp_path):
    RunLock(tmp_path)
    move_owner(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(RunFolderError, match=r"process 7 on elsewhere, .*if that process is gone, delete .*\.lock"):
        RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    RunLock(tmp_path).check()


def be_silent(folder, seconds):
    """As if the owner had touched its file so long ago."""
    os.utime(folder / LOCK_FILE, (time.time() - seconds,) * 2)


def test_an_owner_on_another_host_that_was_silent_for_ten_minutes_is_in_nobodys_way(tmp_path):
    with RunLock(tmp_path) as before:
        move_owner(tmp_path, host="elsewhere")
        be_silent(tmp_path, 590)
        with pytest.raises(RunFolderError, match=r"on elsewhere, which gave a sign of life 59\d s ago: wait"):
            RunLock(tmp_path)
        be_silent(tmp_path, 610)
        RunLock(tmp_path).check()
        move_owner(tmp_path, pid=7)  # this process is both
        with pytest.raises(RunFolderError, match="was taken over by process 7"):
            before.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_an_owner_on_this_host_is_asked_for_however_silent(tmp_path, owner):
    be_silent(tmp_path, 1000)
    with pytest.raises(RunFolderError, match=f"process {owner.pid} on"):
        RunLock(tmp_path)


def test_an_owner_gives_signs_of_life_until_it_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    path = tmp_path / LOCK_FILE
    with RunLock(tmp_path):
        be_silent(tmp_path, 1000)
        deadline = time.monotonic() + 300
        while time.time() - path.stat().st_mtime > 900:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        move_owner(tmp_path, host="elsewhere")
        time.sleep(0.1)  # a touch may be under way
        be_silent(tmp_path, 1000)
        time.sleep(0.3)
        assert time.time() - path.stat().st_mtime > 900


def test_an_owner_that_is_just_writing_its_name_is_not_taken_for_what_a_crash_left(tmp_path):
    RunLock(tmp_path)
    path = tmp_path / LOCK_FILE
    text = path.read_text()
    path.write_text("")
    writing = threading.Timer(0.1, path.write_text, [text])
    writing.start()
    with pytest.raises(RunFolderError, match="is being trained by"):
        RunLock(tmp_path)
    writing.join()


@pytest.mark.parametrize(
    ("task", "attempt", "is_next"),
    [
        ("T", "0.3", True),  # requeued
        ("T", "1.0", True),  # resumed as another job
        ("T", "0.10", True),
        ("T", "0.2", False),
        ("T", "0.1", False),
        ("U", "0.3", False),  # another launch into the same folder
    ],
)
def test_the_next_attempt_at_a_task_need_not_know_whether_the_one_before_is_gone(
    tmp_path, monkeypatch, task, attempt, is_next
):
    attempt_at(monkeypatch, "T", "0.2")
    before = RunLock(tmp_path)
    move_owner(tmp_path, host="elsewhere")
    attempt_at(monkeypatch, task, attempt)
    if not is_next:
        with pytest.raises(RunFolderError, match=r"on elsewhere, attempt 0.2 of T"):
            RunLock(tmp_path)
        return
    RunLock(tmp_path).check()
    with pytest.raises(
        RunFolderError, match=rf"was taken over by process .*, attempt {attempt} of T: this process stops"
    ):
        before.check()
    with before:  # and leaves the file of the owner alone
        pass
    assert (tmp_path / LOCK_FILE).is_file()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"host": "a"}', "[]", "\0\0\0"])
def test_what_a_crash_left_of_a_lock_is_in_nobodys_way(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    RunLock(tmp_path).check()


def test_a_lock_that_somebody_deleted_is_made_again(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    lock.check()
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)


def test_a_second_start_leaves_the_run_alone(make_config):
    config = make_config()
    folder = Path(config.run_dir)
    with RunLock(folder):
        with pytest.raises(RunFolderError, match="is being trained by"):
            train(config)
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    train(config)
    assert not (folder / LOCK_FILE).exists()


def test_a_run_that_was_taken_over_stops_before_it_saves(make_config, monkeypatch):
    config = make_config()
    folder = Path(config.run_dir)
    check = RunLock.check

    def taken_over_after_the_first_checkpoint(self):
        if list_checkpoints(folder / "checkpoints"):
            move_owner(folder, host="elsewhere")
        check(self)

    monkeypatch.setattr(RunLock, "check", taken_over_after_the_first_checkpoint)
    with pytest.raises(RunFolderError, match=r"was taken over by process \d+ on elsewhere"):
        train(config)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_000000004.pt"]
    assert (folder / LOCK_FILE).is_file()
