"""A thread that ends a process whose main thread cannot."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from types import TracebackType
from typing import Self

from torchrl_sql.launch.task import Life, TaskFolder

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit code of a life that is to be continued (EX_TEMPFAIL)."""
EXIT_SUPERSEDED = 76
"""Exit code of a process whose task has a newer life."""
_POLL_SECONDS = 1.0


class Watchdog:
    """Watches over one life of a task, as a context manager in the main thread.

    Python runs signal handlers between two of the main thread's instructions: a process that waits in a collective for
    a peer that is stopped or gone never runs them. The interpreter's wake-up descriptor is written at once, though.

    - SIGUSR2, and the process has not ended ``stop_seconds`` later: it asks for a requeue and exits. Its newest
      checkpoint counts.
    - A newer life of the task has started (SLURM restarts a job when it loses sight of a node, whose processes may live
      on): it exits, before it writes anything more.

    Args:
        task (TaskFolder): the task.
        life (Life): this process's.

    Keyword Args:
        stop_seconds (float): time to react to SIGUSR2.

    Attributes:
        asked_to_requeue (bool): whether SIGUSR2 arrived.
    """

    def __init__(self, task: TaskFolder, life: Life, *, stop_seconds: float) -> None:
        self.asked_to_requeue = False
        self._task = task
        self._life = life
        self._stop_seconds = stop_seconds
        self._ended = threading.Event()
        self._read, self._write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
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

    def _watch(self) -> None:
        deadline = None
        while True:
            readable, _, _ = select.select([self._read], [], [], _POLL_SECONDS)
            received = os.read(self._read, 256) if readable else b""
            if self._ended.is_set():
                return
            if signal.SIGUSR2 in received and deadline is None:
                self.asked_to_requeue = True
                deadline = time.monotonic() + self._stop_seconds
            if self._task.is_superseded(self._life):
                logger.error("life %s was superseded by %s: exiting", self._life, self._task.newest_life())
                os._exit(EXIT_SUPERSEDED)
            if deadline is not None and time.monotonic() > deadline:
                logger.error(
                    "not stopped %g s after SIGUSR2 (a rank hangs): exiting, to continue from the newest checkpoint",
                    self._stop_seconds,
                )
                self._task.write("requeue", str(self._life))
                os._exit(EXIT_REQUEUE)
