"""A watch over the training loop: says so, and where it stands, when no step comes any more."""

from __future__ import annotations

import faulthandler
import logging
import tempfile
import threading
import time
from typing import Self

logger = logging.getLogger(__name__)


class StallWatch:
    """Logs a warning with the stacks of all threads if :meth:`beat` is not called for some time.

    Once a stall; a beat ends it, and says how long it was. A context manager: it watches inside.

    Args:
        timeout_seconds (float): from when on it is a stall.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._last = time.monotonic()
        self._warned = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def beat(self) -> None:
        """A step was made."""
        now = time.monotonic()
        if self._warned:
            logger.warning("training goes on after %.0f s without a gradient step", now - self._last)
            self._warned = False
        self._last = now

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.timeout_seconds / 10):
            waited = time.monotonic() - self._last
            if waited > self.timeout_seconds and not self._warned:
                self._warned = True
                logger.warning("STALL: no gradient step for %.0f s; what the threads do:\n%s", waited, _stacks())


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
