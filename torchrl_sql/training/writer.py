"""Checkpoints written beside training: it waits for a copy to host memory, not for the disk."""

from __future__ import annotations

import errno
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from torchrl_sql.training.checkpoint import DISK_FULL, delete_superfluous, save_checkpoint

logger = logging.getLogger(__name__)


class HostCopies:
    """Copies nested values to host memory, into the same buffers each time: page-locked ones for CUDA tensors."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, content: Any) -> Any:
        """A copy of tensors in dicts and lists; valid until the next call. Other values are taken as they are."""
        copied = self._copy(content, ())
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, key: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, (*key, index)) for index, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(value, non_blocking=True)


class CheckpointWriter:
    """Saves checkpoints in a thread, at most one at a time, and deletes superfluous ones.

    If the disk is full, the checkpoint is given up with an error in the log, older ones stay, and the next is tried as
    usual. Any other failure is raised by the next call of a method.

    Args:
        folder (Path): of the checkpoints.

    Keyword Args:
        num_kept, milestone_interval: see :func:`~torchrl_sql.training.checkpoint.delete_superfluous`.

    Attributes:
        newest_step (int or None): gradient step of the newest checkpoint written here.
        num_written (int): checkpoints written here.
        stall_seconds (float): how long :meth:`save` kept its callers waiting, in all.
    """

    def __init__(self, folder: Path, *, num_kept: int, milestone_interval: int | None) -> None:
        self.folder = folder
        self.num_kept = num_kept
        self.milestone_interval = milestone_interval
        self.newest_step: int | None = None
        self.num_written = 0
        self.stall_seconds = 0.0
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None
        for left_behind in folder.glob("step_*.tmp"):
            left_behind.unlink()

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Copies ``content`` to host memory and begins to write it; waits for a write that is under way."""
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if waited > 1:
            logger.warning("waited %.1f s for the checkpoint before: it is written more slowly than they come", waited)
        copied = self._copies.copy(content)
        self.stall_seconds += time.perf_counter() - started
        self._writing = self._thread.submit(self._write, step, copied)

    def check(self) -> None:
        """Raises what a write failed with; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the write that is under way; raises what it failed with."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self, step: int) -> None:
        """Waits until the checkpoint of ``step``, the last one asked for, is on disk.

        Raises:
            OSError: if the disk was full.
        """
        self.wait()
        if self.newest_step != step:
            message = f"the checkpoint of gradient step {step}, the last one, could not be written"
            raise OSError(errno.ENOSPC, message, str(self.folder))

    def close(self) -> None:
        """Lets a write that is under way end."""
        self._thread.shutdown()

    def _write(self, step: int, content: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.folder, step, content)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            logger.error(
                "DISK FULL: the checkpoint of gradient step %d was not written (%s); those in %s are kept, training "
                "goes on and the next one will be tried",
                step,
                error,
                self.folder,
            )
            return
        self.newest_step = step
        self.num_written += 1
        delete_superfluous(self.folder, num_kept=self.num_kept, milestone_interval=self.milestone_interval)
