"""Runs tasks on this machine, several at a time, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from torchrl_sql.studies.task import Task

EXIT_STOPPED = 130
"""Exit code of a command that was told to stop, and saved."""

_POLL_SECONDS = 0.1


class Start(NamedTuple):
    """How to start a task."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    """Its output is added there."""


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    log: Path
    position: int
    """In the log: what was shown already."""
    since: float = field(default_factory=time.monotonic)


def run_tasks(
    tasks: Sequence[Task],
    start: Callable[[Task], Start],
    *,
    is_done: Callable[[Task], bool] = Task.is_done,
    num_jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
    seconds_between_lines: float = 60.0,
) -> dict[str, str]:
    """Runs the tasks that are not done, each once those that it waits for are over.

    A task that fails costs what depends on it, nothing else. With one job at a time its output is shown too, with
    several the last line of each now and then.

    Args:
        tasks (sequence of Task): each after those that it waits for.
        start (callable): how to start one.

    Keyword Args:
        is_done (callable): whether a task is complete, asked before it would start.
        num_jobs (int): tasks at the same time.
        say (callable): is given a line of progress for people.
        seconds_between_lines (float): how often the last line of each of several tasks is shown.

    Returns:
        Why tasks failed, by name; empty if all are done.

    Raises:
        ValueError: if ``num_jobs`` is less than 1.
        KeyboardInterrupt: if this process or a task was told to stop; tasks that were running have ended by then.
    """
    if num_jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {num_jobs}")
    waiting = list(tasks)
    running: list[_Running] = []
    failed: dict[str, str] = {}
    said = time.monotonic()
    with _passing_on(running) as told:
        while waiting or running:
            for task in list(waiting):
                blocked = {other.name for other in waiting} | {each.task.name for each in running}
                if not blocked.isdisjoint(task.after):
                    continue
                broken = [name for name in task.after if name in failed]
                if broken and not task.tolerant:
                    failed[task.name] = f"needs {broken[0]}"
                elif is_done(task):
                    say(f"{task.name}: done already")
                elif len(running) >= num_jobs or told:
                    continue
                else:
                    say(f"{task.name}: {task.command}")
                    task.write_record(seconds=None)
                    running.append(_begin(task, start(task)))
                waiting.remove(task)
            for each in list(running):
                code = each.process.poll()
                if num_jobs == 1 or each.task.tolerant:
                    _show(each)
                if code is None:
                    continue
                running.remove(each)
                name, seconds = each.task.name, time.monotonic() - each.since
                if code == 0 or is_done(each.task):
                    each.task.write_record(seconds=seconds)
                    say(f"{name}: done in {format_seconds(seconds)}{_left(waiting, running)}")
                elif code in (EXIT_STOPPED, -signal.SIGINT):
                    told.append(signal.SIGINT)
                elif not told:
                    failed[name] = f"exit code {code}, see {each.log}"
                    say(f"{name}: failed after {format_seconds(seconds)}, {failed[name]}")
            if num_jobs > 1 and time.monotonic() - said > seconds_between_lines:
                said = time.monotonic()
                for each in running:
                    say(f"{each.task.name}: {_last_line(each.log)}")
            if told and not running:
                raise KeyboardInterrupt
            if running:
                time.sleep(_POLL_SECONDS)
    return failed


def format_seconds(seconds: float) -> str:
    """``1:02:03``, or ``2:03``."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _left(waiting: Sequence[Task], running: Sequence[_Running]) -> str:
    parts = [f"running: {', '.join(each.task.name for each in running)}"] if running else []
    return "".join(f"; {part}" for part in [*parts, f"{len(waiting)} left"])


def _begin(task: Task, start: Start) -> _Running:
    start.log.parent.mkdir(parents=True, exist_ok=True)
    with start.log.open("ab") as file:
        position = file.tell()
        process = subprocess.Popen(
            start.command, env=start.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    return _Running(task, process, start.log, position)


def _show(each: _Running) -> None:
    """Copies what a task has written since to the terminal."""
    with each.log.open("rb") as file:
        file.seek(each.position)
        text = file.read()
    each.position += len(text)
    if sys.stdout is None:  # closed before this process began
        return
    try:
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
    except OSError:  # the terminal is gone: the task still saves, and its log says so
        pass


def _last_line(log: Path) -> str:
    """What a task has said last."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 1000, 0))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "started")


@contextmanager
def _passing_on(running: Sequence[_Running]) -> Iterator[list[int]]:
    """Collects the signals that end this process. Ctrl-C reaches the tasks from the terminal, and is for them to
    handle; SIGTERM is passed on, and SIGHUP as SIGTERM, unless it is ignored (nohup).
    """
    told: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if number != signal.SIGINT:
            for each in running:
                each.process.terminate()

    handled = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in handled}
    try:
        yield told
    finally:
        for each in running:  # only after an error of ours
            each.process.terminate()
        for each in running:
            each.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
