"""How long training stood still for want of a batch."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

MAX_STEPS_AHEAD = 16
"""Gradient steps that the host may issue before the GPU has taken them: their batches wait in its memory."""


class DataWait:
    """Adds up the time inside its ``with``, around the call that gets a batch, on the device's clock.

    A host that issues steps to a GPU ahead of time waits for batches, too, while the GPU still has steps to take. So
    there two events in the present stream mark each wait: it begins once all that was issued before is done, and ends
    once the batch is there. On the CPU it is the caller's time.

    Args:
        device (torch.device): where the steps are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._began: float | torch.cuda.Event = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        """Waits for the GPU, too, if it is so many steps behind."""
        if len(self._waits) >= MAX_STEPS_AHEAD:
            self._add_oldest()
        self._began = self._now()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            return
        ended = self._now()
        if isinstance(self._began, float):
            self._seconds += ended - self._began
        else:
            self._waits.append((self._began, ended))

    def take_seconds(self) -> float:
        """The sum since the last call; waits for the GPU."""
        while self._waits:
            self._add_oldest()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # a host that waits leaves its core to the readers
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_oldest(self) -> None:
        began, ended = self._waits.popleft()
        ended.synchronize()
        self._seconds += began.elapsed_time(ended) / 1e3
