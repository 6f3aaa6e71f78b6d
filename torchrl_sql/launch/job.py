"""What runs on the nodes: one process of one life of one task.

Every way to start a job ends here: submitit calls :func:`run_task`; ``slurm/*.sh`` and ``torchrl-sql launch --local``
run ``python -m torchrl_sql.launch.job STAGE INDEX``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

from submitit import JobEnvironment

from torchrl_sql.launch.group import Stage
from torchrl_sql.launch.ranks import rank, torchrun_environment
from torchrl_sql.launch.task import LIFE_VARIABLE, Life, TaskFolder
from torchrl_sql.launch.watchdog import EXIT_REQUEUE, EXIT_SUPERSEDED, Watchdog

logger = logging.getLogger(__name__)

EXIT_STOPPED = 130
"""Exit code of a life that was told to stop, and saved."""

_START_ANEW = ("bench", "report")
"""Commands that do not continue where they were stopped."""


class _RequeueRequested(KeyboardInterrupt):
    """SIGUSR2, in commands that need no more than to be run again."""


def run_task(stage_folder: str, index: int) -> None:
    """Works on a task until it is done, or this life of it ends; then leaves the process by :class:`SystemExit`.

    Args:
        stage_folder (str): folder of the :class:`~torchrl_sql.launch.group.Stage`.
        index (int): which of its tasks.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)  # submitit has its own
    stage = Stage.load(Path(stage_folder))
    task = stage.task_folder(index)
    life = Life.parse(os.environ[LIFE_VARIABLE])
    _prepare_signals()
    _remove_stale_results()
    if task.done:
        logger.info("%s is done already", task.path)
        return
    reason = task.reasons_not_to_start(life)
    if reason is not None:
        logger.error("not started: %s", reason)
        sys.exit(1)
    if rank() == 0:
        task.write("life", str(life))
    os.chdir(stage.directory)
    os.environ.update(torchrun_environment(os.environ, restart=life.restart))
    sys.exit(_live(stage, index, task, life))


def _live(stage: Stage, index: int, task: TaskFolder, life: Life) -> int:
    """One life; returns its exit code."""
    is_training = stage.tasks[index].arguments[0] == "train"
    with Watchdog(task, life, stop_seconds=stage.stop_seconds) as watchdog:
        try:
            if is_training:
                _train(task)
            else:
                _run_command(stage.tasks[index].arguments)
        except KeyboardInterrupt as interruption:
            requeue = watchdog.asked_to_requeue or getattr(interruption, "requeue", False)
            logger.info("%s", interruption or "interrupted")
            if requeue and stage.tasks[index].arguments[0] in _START_ANEW:
                return EXIT_REQUEUE  # without the request: it is tried again as often as if it had crashed
            return _end(task, life, "requeue" if requeue else "stopped")
        except Exception as error:
            if task.is_superseded(life):
                return EXIT_SUPERSEDED
            if watchdog.asked_to_requeue:  # which reached, and may have ended, processes that the task started
                logger.exception("an error after SIGUSR2")
                return _end(task, life, "requeue")
            if is_transient(error) or task.text("requeue") == str(life) or task.done:
                raise
            if task.text("FATAL") is None:  # what the first rank says is the cause
                task.write("FATAL", "".join(traceback.format_exception_only(error)).strip())
            raise
    if rank() == 0:
        task.write("done", str(life))
    return 0


def _end(task: TaskFolder, life: Life, how: str) -> int:
    task.write(how, str(life))
    return EXIT_REQUEUE if how == "requeue" else EXIT_STOPPED


def _train(task: TaskFolder) -> None:
    """Trains on all ranks of the job."""
    from torchrl_sql.config import load_run_config
    from torchrl_sql.training import train
    from torchrl_sql.training.signals import StopSignals

    config = load_run_config(task.path / "config.yaml")
    with StopSignals() as stop:
        train(config, stop=stop)


def _run_command(arguments: list[str]) -> None:
    """Any other command: it is run again if it was stopped, and continues unless it is one of ``_START_ANEW``."""
    from torchrl_sql.cli import run

    signal.signal(signal.SIGUSR2, _raise_requeue)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    run(arguments)


def _raise_requeue(signum: int, frame: FrameType | None) -> None:
    raise _RequeueRequested("SIGUSR2: stopping, to be queued again")


def is_transient(error: Exception) -> bool:
    """Whether the same work may succeed if it is started again.

    True for what machines do (processes and nodes that vanish, CUDA, network and file system errors), false for what
    the input does: settings, missing files, damaged data, a loss that is not finite, errors of the program.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return False
    if isinstance(error, (NotImplementedError, RecursionError)):  # RuntimeErrors, but of the program itself
        return False
    return isinstance(error, (RuntimeError, OSError, MemoryError, EOFError))


def _prepare_signals() -> None:
    """Replaces submitit's handlers, and keeps SIGUSR2, which reaches every process of a task, from the helper process
    that multiprocessing starts: it inherits that the signal is blocked now.
    """
    for number in (signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, lambda signum, frame: None)  # not SIG_IGN: it would drop one that is pending
    resource_tracker.ensure_running()


def _remove_stale_results() -> None:
    """Drops what an earlier life left for submitit: it refuses to write beside a half-written result."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return
    result = JobEnvironment().paths.result_pickle
    for path in (result, result.with_name(result.name + ".save_tmp")):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_task(sys.argv[1], int(sys.argv[2]))
