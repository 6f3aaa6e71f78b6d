"""Runs import jobs, in this process or in several, and shows how far they are."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import sharedctypes
from typing import Any

from tqdm import tqdm

from torchrl_sql.data.importers.job import STAGING_FOLDER, ImportJob, ImportSummary, run_import
from torchrl_sql.data.store import FrameStore

logger = logging.getLogger(__name__)


class ImportFailedError(RuntimeError):
    """Some games could not be imported; nothing of them is in the store.

    Attributes:
        failures (mapping): error by game.
        summaries (list of ImportSummary): the games that were imported.
    """

    def __init__(self, failures: Mapping[str, Exception], summaries: Sequence[ImportSummary]) -> None:
        self.failures = dict(failures)
        self.summaries = list(summaries)
        super().__init__(
            f"{len(failures)} of {len(failures) + len(summaries)} games could not be imported:\n"
            + "\n".join(f"  {game}: {_text(error)}" for game, error in failures.items())
        )


def run_imports(jobs: Sequence[ImportJob], *, workers: int = 1, progress: bool = False) -> list[ImportSummary]:
    """Runs the jobs, all into one store, which is created if there is none.

    A job that fails does not stop the others. Jobs that are done already are not run again.

    Args:
        jobs (sequence of ImportJob): one a game.

    Keyword Args:
        workers (int): processes; each works on one game at a time. 1: this process.
        progress (bool): show a bar with rate and time left on standard error.

    Raises:
        ImportFailedError: after all jobs, if some failed.
        ValueError, OSError: if the store cannot be opened or created.
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    store = FrameStore.create(jobs[0].store_path, exist_ok=True)
    outcomes: dict[str, ImportSummary | Exception] = {}
    if workers == 1 or len(jobs) == 1:
        with _ProgressBar(len(jobs), enabled=progress) as bar:
            for index, job in enumerate(jobs):
                outcomes[job.source.game] = _attempt(job, bar.reporter(index))
    else:
        context = multiprocessing.get_context("spawn")  # Forking a process that has threads is not safe.
        stop = sharedctypes.RawValue("b", 0)
        with (
            _ProgressBar(len(jobs), enabled=progress) as bar,
            ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (bar.rows, stop)) as pool,
        ):
            futures = {pool.submit(_work, index, job): job.source.game for index, job in enumerate(jobs)}
            pending: set[Future[ImportSummary | Exception]] = set(futures)
            try:
                while pending:
                    _, pending = wait(pending, timeout=0.5)
                    bar.refresh()
            except BaseException:
                stop.value = 1
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            for future, game in futures.items():
                try:
                    outcomes[game] = future.result()
                except BrokenProcessPool as error:
                    outcomes[game] = error
    with suppress(OSError):  # Not empty while other imports go on, or can be continued.
        for job in jobs:
            (store.path / STAGING_FOLDER / job.source.game).rmdir()
    with suppress(OSError):
        (store.path / STAGING_FOLDER).rmdir()
    failures = {game: outcome for game, outcome in outcomes.items() if isinstance(outcome, Exception)}
    summaries = [outcome for outcome in outcomes.values() if isinstance(outcome, ImportSummary)]
    if failures:
        raise ImportFailedError(failures, summaries)
    return summaries


def _attempt(job: ImportJob, report: Callable[[int, int], None]) -> ImportSummary | Exception:
    try:
        return run_import(job, report)
    except Exception as error:  # Whatever a damaged file of one game leads to, the others go on.
        logger.error("%s was not imported: %s", job.source.game, _text(error))
        return error


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, ValueError)) and str(error) else repr(error)


class _JobRows(ctypes.Structure):
    """Rows of one job: done when it started, done now, in all (0: not known yet)."""

    started: int
    done: int
    total: int
    _fields_ = (("started", ctypes.c_int64), ("done", ctypes.c_int64), ("total", ctypes.c_int64))

    def report(self, num_done: int, num_rows: int) -> None:
        if not self.total:
            self.started = num_done
        self.done, self.total = num_done, num_rows


class _ProgressBar:
    """A bar over all jobs. Its ``rows`` lie in memory that worker processes share."""

    def __init__(self, num_jobs: int, *, enabled: bool) -> None:
        self.rows: Any = sharedctypes.RawArray(_JobRows, num_jobs)
        self._bar = tqdm(unit=" rows", unit_scale=True, smoothing=0, disable=not enabled, desc="import")

    def reporter(self, index: int) -> Callable[[int, int], None]:
        def report_and_show(num_done: int, num_rows: int) -> None:
            self.rows[index].report(num_done, num_rows)
            self.refresh()

        return report_and_show

    def refresh(self) -> None:
        known = [job.total for job in self.rows if job.total]
        if known:  # Games that have not started are taken to be of average size.
            self._bar.total = sum(known) + (len(self.rows) - len(known)) * sum(known) // len(known)
            self._bar.initial = sum(job.started for job in self.rows)
            self._bar.update(sum(job.done for job in self.rows) - self._bar.n)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.refresh()
        self._bar.close()


_worker_rows: Any = None
_worker_stop: Any = None


class _StoppedError(BaseException):
    """Ends a worker's job when the parent gives up."""


def _start_worker(rows: Any, stop: Any) -> None:
    """Set-up of a worker process: where to report, and how to end with the parent."""
    global _worker_rows, _worker_stop
    _worker_rows, _worker_stop = rows, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears it, too, and sets `stop`.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leaves when the parent was killed; what was committed stays, and the next import continues from there."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(index: int, job: ImportJob) -> ImportSummary | Exception:
    def report_or_stop(num_done: int, num_rows: int) -> None:
        if _worker_stop.value:
            raise _StoppedError
        _worker_rows[index].report(num_done, num_rows)

    outcome = _attempt(job, report_or_stop)
    if isinstance(outcome, Exception):
        try:
            pickle.loads(pickle.dumps(outcome))
        except Exception:  # It would break the pool on its way, and with it the other games.
            return RuntimeError(_text(outcome))
    return outcome
