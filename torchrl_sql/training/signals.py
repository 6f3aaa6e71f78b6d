"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """Training stopped at somebody's wish, after saving a checkpoint or before a gradient step.

    Attributes:
        requeue (bool): whether the job is to be queued again (SIGUSR2 on any rank).
    """

    def __init__(self, message: str, *, requeue: bool) -> None:
        super().__init__(message)
        self.requeue = requeue


class StopSignals:
    """Turns signals into flags, so that training saves and stops between two gradient steps.

    - SIGINT, SIGTERM, SIGHUP (a terminal or connection that was lost): save, then stop. A second SIGINT raises
      ``KeyboardInterrupt`` at once. SIGHUP stays ignored where it was, as under ``nohup``.
    - SIGUSR2: save, then stop and ask to be queued again: what schedulers send before they take a node away.

    A context manager for the main thread. Entering also unblocks SIGUSR2: a job started under
    ``env --block-signal=USR2`` cannot be killed by one that comes before its handlers; it is delivered then.

    Attributes:
        stop (bool): whether any of these was received.
        requeue (bool): whether SIGUSR2 was received.
    """

    def __init__(self) -> None:
        self.stop = False
        self.requeue = False
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Ends what comes before gradient steps and has nothing to save.

        Raises:
            Interrupted: if any of these was received.
        """
        if self.stop:
            message = "stopped before the first gradient step of this start; the same command continues"
            raise Interrupted(message, requeue=self.requeue)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        first, self.stop = not self.stop, True
        self.requeue = self.requeue or number == signal.SIGUSR2
        if first:  # not through logging: its locks may be held where the signal came
            again = "; press Ctrl-C again to stop without saving" if number == signal.SIGINT else ""
            with suppress(OSError):  # nobody may read it any more: Ctrl-C ends a ``tee`` too
                os.write(2, f"\n{signal.Signals(number).name}: stopping once all is saved{again}\n".encode())
