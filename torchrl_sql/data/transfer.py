"""Batches on their way to a device: every byte once, ahead of time, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


def copy_blocks(batch: TensorDict, copy: Callable[[Tensor], Tensor]) -> TensorDict:
    """Copy a batch whose entries are views of shared memory, such as the two stacks of a transition.

    Args:
        batch (TensorDict): its entries cover the memory that they view.
        copy (callable): copies a contiguous tensor; it gets each block of memory once.

    Returns:
        The same shapes and strides, as views of the copies.
    """
    blocks: dict[tuple[int, torch.dtype], Tensor] = {}

    def view(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        key = (storage.data_ptr(), value.dtype)
        if key not in blocks:
            blocks[key] = copy(value.as_strided((storage.nbytes() // value.element_size(),), (1,), 0))
        return blocks[key].as_strided(value.shape, value.stride(), value.storage_offset())

    copied = batch.apply(view)
    assert copied is not None
    return copied


class DeviceCopies:
    """Copies batches to a device, on a CUDA device in a stream of its own.

    Several threads may :meth:`send`, each at any time before the batch is needed. :meth:`receive` makes the receiving
    thread's stream wait for the copy; neither makes the host wait. What is in page-locked memory is copied from where
    it lies; the memory is not used again before it was copied (torch's allocator sees to that).

    Args:
        device (torch.device): for CUDA with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: TensorDict) -> tuple[TensorDict, torch.cuda.Event | None]:
        """Begin to copy; returns what :meth:`receive` takes."""
        if self._stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._stream):
            batch = copy_blocks(batch, lambda block: block.pin_memory().to(self.device, non_blocking=True))
            return batch.to(self.device), self._stream.record_event()

    def receive(self, sent: tuple[TensorDict, torch.cuda.Event | None]) -> TensorDict:
        """The batch on the device, for work in the present stream."""
        batch, event = sent
        if event is not None:
            present = torch.cuda.current_stream(self.device)
            present.wait_event(event)
            for value in batch.values(True, True):
                value.record_stream(present)  # else its memory might be given away before that work is done
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceCopies, (self.device,)
