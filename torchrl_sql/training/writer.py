"""Checkpoints written beside training: it waits for a copy to host memory, not for the disk."""

from __future__ import annotations

import errno
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from torchrl_sql.training.checkpoint import DISK_FULL, delete_superfluous, make_room, save_checkpoint

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Checkpoints in a row that a full disk may cost before training stops."""

_CONTINUES = "make room, and the same command continues from the newest one"


class HostCopies:
    """Copies nested values to host memory, into the same buffers each time: page-locked ones for device tensors."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, content: Any) -> Any:
        """A copy of tensors in dicts and lists; valid until the next call. Other values are taken as they are."""
        devices: set[torch.device] = set()
        copied = self._copy(content, (), devices)
        for device in devices:
            torch.accelerator.current_stream(device).synchronize()
        return copied

    def _copy(self, value: Any, key: tuple[Any, ...], devices: set[torch.device]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name), devices) for name, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, (*key, index), devices) for index, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        on_device = value.device.type != "cpu"
        if on_device:
            devices.add(value.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty_like(value, device="cpu", pin_memory=on_device)
            self._buffers[key] = buffer
        return buffer.copy_(value, non_blocking=True)


class CheckpointWriter:
    """Saves checkpoints in a thread, at most one at a time, and deletes superfluous ones.

    If the disk is full, older checkpoints make room (:func:`~torchrl_sql.training.checkpoint.make_room`). If that does
    not suffice, this one is given up with an error in the log and the next is tried as usual, ``MAX_FAILURES`` times in
    a row: training on would be in vain. That and any other failure is raised by the next call of
    a method.

    Args:
        folder (Path): of the checkpoints.

    Keyword Args:
        num_kept, milestone_interval: see :func:`~torchrl_sql.training.checkpoint.delete_superfluous`.

    Attributes:
        newest_step (int or None): gradient step of the newest checkpoint written here.
        num_written (int): checkpoints written here.
        num_failures (int): checkpoints given up since the newest.
        stall_seconds (float): how long :meth:`save` kept its callers waiting, in all.
    """

    def __init__(self, folder: Path, *, num_kept: int, milestone_interval: int | None) -> None:
        self.folder = folder
        self.num_kept = num_kept
        self.milestone_interval = milestone_interval
        self.newest_step: int | None = None
        self.num_written = 0
        self.num_failures = 0
        self.stall_seconds = 0.0
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None
        for left_behind in folder.glob("step_*.tmp"):
            left_behind.unlink()

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Copy ``content`` to host memory and begin to write it; waits for a write that is under way."""
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if waited > 1:
            logger.warning("waited %.1f s for the checkpoint before: it is written more slowly than they come", waited)
        copied = self._copies.copy(content)
        self.stall_seconds += time.perf_counter() - started
        self._writing = self._thread.submit(self._write, step, copied)

    def check(self) -> None:
        """Raise what a write failed with; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is under way; raises what it failed with."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self, step: int) -> None:
        """Wait until the checkpoint of ``step``, the last one asked for, is on disk.

        Raises:
            OSError: if the disk was full.
        """
        self.wait()
        if self.newest_step != step:
            message = f"the checkpoint of gradient step {step}, the last one, could not be written: {_CONTINUES}"
            raise OSError(errno.ENOSPC, message, str(self.folder))

    def close(self) -> None:
        """Let a write that is under way end."""
        self._thread.shutdown()

    def _write(self, step: int, content: dict[str, Any]) -> None:
        def save() -> None:
            save_checkpoint(self.folder, step, content)

        try:
            make_room(save, self.folder, milestone_interval=self.milestone_interval)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.num_failures += 1
            logger.error(
                "DISK FULL: the checkpoint of gradient step %d was not written (%s); the newest in %s is kept",
                step,
                error,
                self.folder,
            )
            if self.num_failures >= MAX_FAILURES:
                message = f"{self.num_failures} checkpoints in a row could not be written: training stops, {_CONTINUES}"
                raise OSError(error.errno, message, str(self.folder)) from error
            return
        self.newest_step = step
        self.num_written += 1
        self.num_failures = 0
        delete_superfluous(self.folder, num_kept=self.num_kept, milestone_interval=self.milestone_interval)
