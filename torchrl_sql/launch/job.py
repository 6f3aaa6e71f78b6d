"""What runs on the nodes: one process of one attempt of one task.

Every way to start a job ends here: the batch scripts that submitit writes, ``slurm/*.sh`` and
``torchrl-sql launch --local`` run ``python -m torchrl_sql.cli.job GROUP INDEX``.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

from torchrl_sql.errors import is_out_of_memory
from torchrl_sql.launch.attempt import ATTEMPT_VARIABLE, Attempt, TaskFolder, newest_checkpoint
from torchrl_sql.launch.group import Group
from torchrl_sql.launch.ranks import is_first_of_node, num_ranks, rank, torchrun_environment
from torchrl_sql.launch.watchdog import EXIT_REQUEUE, EXIT_SUPERSEDED, LOOK_SECONDS, OTHERS_LOOK_SECONDS, Watchdog
from torchrl_sql.studies.local import EXIT_STOPPED
from torchrl_sql.studies.task import Task

logger = logging.getLogger(__name__)

_START_ANEW = ("bench", "probe", "report")
"""Commands that do not continue where they were stopped."""


_OF_MACHINES = re.compile(
    r"torch\.distributed|AcceleratorError|cuda error|cudnn|cublas|nccl|gloo|connection|peer|socket|timed? ?out|worker|"
    r"thread|mmap|i/o error|input/output|BrokenProcessPool",
    re.IGNORECASE,
)
"""In the classes and texts of a RuntimeError, which torch raises for everything: not for errors of the program."""

_MISSING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, MemoryError)
"""What the input, or a node on which something is not as elsewhere, leads to."""


def run_task(group_folder: Path, index: int, *, run: Callable[[Sequence[str]], None]) -> int:
    """Works on a task until it is done, or this attempt at it ends.

    Args:
        group_folder (Path): folder of the :class:`~torchrl_sql.launch.group.Group`.
        index (int): which of its tasks.

    Keyword Args:
        run (callable): runs a command of ``torchrl-sql``, given its arguments. Errors and ``KeyboardInterrupt`` are
            the caller's.

    Returns:
        The exit code.
    """
    group = Group.load(group_folder)
    folder, task = group.task_folder(index), group.tasks[index]
    attempt = Attempt.parse(os.environ[ATTEMPT_VARIABLE])
    os.chdir(group.directory)
    signal.signal(signal.SIGUSR2, lambda signum, frame: None)  # not SIG_IGN: it would drop one that is pending
    resource_tracker.ensure_running()  # the helper process inherits that SIGUSR2 is blocked now: it reaches all of us
    if folder.done:
        logger.info("%s is done already", folder.path)
        return 0
    if (reason := folder.reason_not_to_start(attempt)) is not None:
        logger.error("not started: %s", reason)
        return 1
    if rank() == 0:
        folder.write("attempt", str(attempt))
        _note_progress(task, folder)
    os.environ.update(torchrun_environment(os.environ, restart=attempt.restart))
    return _work(task, folder, attempt, stop_seconds=group.stop_seconds, run=run)


def _work(
    task: Task, folder: TaskFolder, attempt: Attempt, *, stop_seconds: float, run: Callable[[Sequence[str]], None]
) -> int:
    """One attempt; returns its exit code."""
    since = time.monotonic()
    look_seconds = LOOK_SECONDS if is_first_of_node() else OTHERS_LOOK_SECONDS
    continues = task.kind not in _START_ANEW
    with Watchdog(
        folder, attempt, continues=continues, stop_seconds=stop_seconds, look_seconds=look_seconds
    ) as watchdog:
        try:
            if rank() == 0:
                task.write_record(seconds=None)
            signal.signal(signal.SIGUSR2, _raise_requeue)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            run(task.arguments)
        except KeyboardInterrupt as interruption:
            requeue = watchdog.received(signal.SIGUSR2) or getattr(interruption, "requeue", False)
            logger.info("%s", interruption or "interrupted")
            if rank() == 0:
                _note_progress(task, folder)
            if requeue:
                return _requeue(folder, attempt, continues=continues)
            folder.write("stopped", str(attempt))
            return EXIT_STOPPED
        except Exception as error:
            if folder.is_superseded(attempt):
                return EXIT_SUPERSEDED
            if watchdog.received(signal.SIGUSR2):  # which reached, and may have ended, processes that the task started
                logger.exception("an error after SIGUSR2")
                return _requeue(folder, attempt, continues=continues)
            if watchdog.received(signal.SIGTERM, signal.SIGINT):  # the same; whoever sent it decides what follows
                raise
            may_pass = is_transient(error, has_checkpoint=newest_checkpoint(task.run_dir) != "")
            if may_pass or folder.text("requeue") == str(attempt) or folder.done:
                raise
            if folder.text("FATAL") is None:  # what the first rank says is the cause
                folder.write("FATAL", "".join(traceback.format_exception_only(error)).strip())
            raise
    if num_ranks() > 1:
        folder.write(f"done.{rank()}", str(attempt))
    # Ranks of an evaluation end one by one: the last one finds that all have.
    if num_ranks() == 1 or all(folder.text(f"done.{each}") == str(attempt) for each in range(num_ranks())):
        task.write_record(seconds=time.monotonic() - since)
        folder.write("done", str(attempt))
    return 0


def _note_progress(task: Task, folder: TaskFolder) -> None:
    if task.run_dir is not None:
        folder.write("progress", newest_checkpoint(task.run_dir))


def _requeue(folder: TaskFolder, attempt: Attempt, *, continues: bool) -> int:
    if continues:  # else, without the request, it counts as a crash: there is a limit to those
        folder.write("requeue", str(attempt))
    return EXIT_REQUEUE


def _raise_requeue(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("SIGUSR2: stopping, to be queued again")


def is_transient(error: Exception, *, has_checkpoint: bool) -> bool:
    """Whether the same work may succeed if it is started again.

    True for what machines do (processes and nodes that vanish, CUDA, network and file system errors, a run's folder
    that another process still holds), and for errors that rank 0 had: it decides itself. False for what the input
    does: settings, damaged data, a loss that is not finite, errors of the program.

    Args:
        error (Exception): what ended the work.

    Keyword Args:
        has_checkpoint (bool): whether the work went well for a while: then memory, devices and files were there.
    """
    names = _classes(error)
    if "torchrl_sql.training.ranks.RaisedByMain" in {name for cause in _causes(error) for name in _classes(cause)}:
        return True
    text = f"{names} {error}"
    if isinstance(error, _MISSING) or is_out_of_memory(error):
        return has_checkpoint
    if isinstance(error, (NotImplementedError, RecursionError)):  # RuntimeErrors, but of the program itself
        return False
    if isinstance(error, RuntimeError):
        if any(name.startswith(("torch._dynamo.", "torch._inductor.")) for name in names):
            return False
        return _OF_MACHINES.search(text) is not None and (has_checkpoint or "invalid device" not in text.lower())
    return isinstance(error, (OSError, EOFError)) or "torchrl_sql.training.lock.RunFolderError" in names


def _classes(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while (error := error and error.__cause__) is not None:
        yield error
