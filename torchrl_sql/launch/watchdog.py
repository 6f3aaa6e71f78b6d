"""A thread that ends a process whose main thread cannot."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from torchrl_sql.launch.attempt import Attempt, TaskFolder

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit code of an attempt that is to be continued (EX_TEMPFAIL)."""
EXIT_SUPERSEDED = 76
"""Exit code of a process whose task has a newer attempt."""
LOOK_SECONDS = 10.0
"""How often one process per node looks for a newer attempt."""
OTHERS_LOOK_SECONDS = 300.0
"""How often the others do, which mostly hear of it by their collectives: the shared file system serves all of them."""


class Watchdog:
    """Watches over one attempt of a task, as a context manager in the main thread.

    Python runs signal handlers between two of the main thread's instructions: a process that waits in a collective for
    a peer that is stopped or gone never runs them. The interpreter's wake-up descriptor is written at once, though.

    - SIGUSR2, and the process has not ended ``stop_seconds`` later: it asks for a requeue, if the work ``continues``,
      and exits. Its newest checkpoint counts.
    - A newer attempt of the task has started (SLURM restarts a job when it loses sight of a node, whose processes may
      live on): it exits, before it writes anything more.

    Args:
        task (TaskFolder): the task.
        attempt (Attempt): this process's.

    Keyword Args:
        continues (bool): whether a later attempt goes on where this one ends.
        stop_seconds (float): time to react to SIGUSR2.
        look_seconds (float): between two looks for a newer attempt.
    """

    def __init__(
        self, task: TaskFolder, attempt: Attempt, *, continues: bool, stop_seconds: float, look_seconds: float
    ) -> None:
        self._task = task
        self._attempt = attempt
        self._continues = continues
        self._stop_seconds = stop_seconds
        self._look_seconds = look_seconds
        self._ended = threading.Event()
        self._received = b""
        self._reading = threading.Lock()
        self._read, self._write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._exit_if_superseded()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous)
        self._ended.set()
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def received(self, *signals: signal.Signals) -> bool:
        """Whether one of these signals, which have handlers, arrived; also if the thread has not run since."""
        with self._reading, suppress(BlockingIOError):
            while True:
                self._received += os.read(self._read, 256)
        return any(number in self._received for number in signals)

    def _exit_if_superseded(self) -> None:
        try:
            superseded = self._task.is_superseded(self._attempt)
        except (OSError, ValueError) as error:  # shared file systems have passing troubles: ask again
            logger.warning("the task's newest attempt is not readable: %s", error)
            return
        if superseded:
            logger.error("attempt %s was superseded by a newer one: exiting", self._attempt)
            os._exit(EXIT_SUPERSEDED)

    def _watch(self) -> None:
        deadline = math.inf
        next_look = time.monotonic() + self._look_seconds
        while True:
            select.select([self._read], [], [], max(0.0, min(deadline, next_look) - time.monotonic()))
            asked = self.received(signal.SIGUSR2)
            if self._ended.is_set():
                return
            if asked and deadline == math.inf:
                deadline = time.monotonic() + self._stop_seconds
            if time.monotonic() >= next_look:
                self._exit_if_superseded()
                next_look = time.monotonic() + self._look_seconds
            if time.monotonic() >= deadline:
                try:
                    logger.error(
                        "not stopped %g s after SIGUSR2 (a rank hangs): exiting, to continue from the last checkpoint",
                        self._stop_seconds,
                    )
                    if self._continues:
                        self._task.write("requeue", str(self._attempt))
                except OSError as error:
                    logger.error("no request to be requeued: %s", error)  # the batch script takes it for a crash
                finally:
                    os._exit(EXIT_REQUEUE)
