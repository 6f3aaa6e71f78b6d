"""Tasks on this machine: order, side by side, failures, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from torchrl_sql.studies.local import format_seconds, run_tasks
from torchrl_sql.studies.task import Task


def task(name, program="", *, after=(), **more):
    return Task(name=name, arguments=["x", program], group="x", after=list(after), **more)


def test_tasks_run_in_order_and_their_output_is_kept(start, tmp_path, capfdbinary):
    tasks = [task("a", "print('of a')"), task("b", "print('of b')", after=["a"])]
    said = []
    assert run_tasks(tasks, start, say=said.append) == {}
    assert capfdbinary.readouterr().out == b"of a\nof b\n"
    assert (tmp_path / "logs" / "b.log").read_text() == "of b\n"
    assert [line.split(":")[0] for line in said] == ["a", "a", "b", "b"]


def test_a_failure_costs_what_depends_on_it_and_nothing_else(start):
    tasks = [
        task("data"),
        task("train0", "raise SystemExit(3)", after=["data"]),
        task("train1", after=["data"]),
        task("evaluate0", "print('must not run')", after=["train0"]),
        task("evaluate1", "print('runs')", after=["train1"]),
        task("report", "print('runs too')", after=["evaluate0", "evaluate1"], tolerant=True),
    ]
    failed = run_tasks(tasks, start, num_jobs=2)
    assert failed["train0"].startswith("exit code 3, see ") and failed["evaluate0"] == "needs train0"
    assert set(failed) == {"train0", "evaluate0"}


def test_jobs_run_side_by_side(start, tmp_path):
    meet = "import pathlib, time\nhere = pathlib.Path({0!r})\n(here / {1!r}).touch()\n"
    meet += "while not (here / {2!r}).exists(): time.sleep(0.01)"
    folder = str(tmp_path)
    tasks = [task("a", meet.format(folder, "a", "b")), task("b", meet.format(folder, "b", "a"))]
    assert run_tasks(tasks, start, num_jobs=2) == {}  # each waits for the other


def test_tasks_side_by_side_show_their_last_lines_now_and_then(start):
    say = "import time; print('one', flush=True); print('half\\rmore', end='', flush=True); time.sleep(2)"
    said = []
    assert (
        run_tasks([task("a", say), task("b", say)], start, num_jobs=2, say=said.append, seconds_between_lines=0.5) == {}
    )
    assert {"a: more", "b: more"} <= set(said)


def test_no_jobs_are_refused(start):
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        run_tasks([task("a")], start, num_jobs=0)


def test_what_is_done_is_not_done_again(start, tmp_path):
    tasks = [task("a", "raise SystemExit(1)"), task("b", after=["a"])]
    said = []
    assert run_tasks(tasks, start, is_done=lambda each: each.name == "a", say=said.append) == {}
    assert said[0] == "a: done already" and not (tmp_path / "logs" / "a.log").exists()


def test_a_task_that_stops_by_itself_stops_the_rest(start):
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task("a", "raise SystemExit(130)"), task("b", after=["a"])], start)


TOLD = """
import signal, sys
from pathlib import Path
from torchrl_sql.studies.local import Start, run_tasks
from torchrl_sql.studies.task import Task
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which ignores it
child = (
    "import os, signal, time\\n"
    "def end(*_): os.write(1, b'saved\\\\n'); time.sleep(0.2); os.write(1, b'not lost\\\\n'); os._exit(130)\\n"
    "signal.signal(signal.SIGTERM, end);"
    "print('ready', flush=True); time.sleep(60)"
)
try:
    tasks = [Task(name="a", arguments=["x"], group="x"), Task(name="b", arguments=["x"], group="x")]
    run_tasks(tasks, lambda task: Start([sys.executable, "-c", child], {}, Path(sys.argv[1])))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_task_waited_for(tmp_path, number):
    command = [sys.executable, "-c", TOLD, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "saved\nnot lost\nstopped\n"
    assert process.returncode == 0 and (tmp_path / "log").read_text() == "ready\nsaved\nnot lost\n"


def test_a_task_saves_though_the_terminal_is_gone(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", TOLD, str(tmp_path / "log")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        process.stderr.read()
    assert (tmp_path / "log").read_text() == "ready\nsaved\nnot lost\n"


def test_an_error_of_ours_does_not_leave_tasks_behind(start, tmp_path):
    def say(line):
        if line.startswith("b"):
            raise OSError("the terminal is gone")

    since = time.monotonic()
    with pytest.raises(OSError, match="terminal"):
        run_tasks([task("a", "import time; time.sleep(300)"), task("b")], start, num_jobs=2, say=say)
    assert time.monotonic() - since < 200


def test_handlers_are_put_back(start):
    before = signal.getsignal(signal.SIGTERM)
    run_tasks([task("a")], start)
    assert signal.getsignal(signal.SIGTERM) == before


def test_times_for_people():
    assert [format_seconds(seconds) for seconds in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
