"""One process per device: where this process stands among them, and what they agree on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

_SETTLE_SECONDS = 0.2
"""Milliseconds are enough on an idle machine."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank (int): 0 writes and logs.
        world_size (int): number of processes.
        device (torch.device): this process's own.
    """

    rank: int
    world_size: int
    device: torch.device
    _host_group: distributed.ProcessGroup | None = None
    """Gloo group of all ranks for values on the host; ``None`` for one process."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def maximum(self, value: int) -> int:
        """The greatest of all ranks' values; waits for every rank."""
        if self._host_group is None:
            return value
        tensor = torch.tensor(value)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._host_group)
        return int(tensor)

    def broadcast(self, value: int) -> int:
        """Rank 0's value; waits for it."""
        if self._host_group is None:
            return value
        tensor = torch.tensor(value)
        distributed.broadcast(tensor, src=0, group=self._host_group)
        return int(tensor)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of tensors on their devices, without waiting for the device; changes ``values``."""
        if self._host_group is not None:
            distributed.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every rank's tensor on the host, of the same shape on each; waits for every rank."""
        if self._host_group is None:
            return [value]
        values = [torch.empty_like(value) for _ in range(self.world_size)]
        distributed.all_gather(values, value, group=self._host_group)
        return values

    def agreement(self) -> Agreement:
        """A vote that is held at each step."""
        return Agreement(self._host_group)


class Agreement:
    """The greatest of all ranks' numbers, one call late, so that no rank waits for the others.

    Each call hands in this rank's number and returns the greatest of the numbers that all ranks handed in at the call
    before (0 at the first): the same on each rank. With one process the number itself comes back.
    """

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self._group = group
        self._votes = torch.zeros((), dtype=torch.int64)
        self._reduction: distributed.Work | None = None

    def __call__(self, number: int) -> int:
        """See :class:`Agreement`."""
        if self._group is None:
            return number
        self.finish()
        agreed = int(self._votes)
        self._votes.fill_(number)
        self._reduction = distributed.all_reduce(
            self._votes, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def finish(self) -> None:
        """Waits for what is under way; to be called by every rank after the last vote."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None


@contextmanager
def process_group(device: torch.device, *, timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Joins the processes that torchrun or a launcher started; leaves them whatever happens.

    A CUDA device becomes the process's current one.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment say how many there
    are and where to meet. Without ``WORLD_SIZE``, or with 1, this is the only process and no group is made.

    Args:
        device (torch.device): NCCL joins CUDA devices (with their index), gloo CPUs.

    Keyword Args:
        timeout_seconds (float): how long to wait for the others, at the start and in a step.

    Raises:
        ValueError: if some of the variables are there and others are not, or one is no number.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(0, 1, device)
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set, but {', '.join(missing)} must be too (torchrun sets them all)")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    distributed.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Ranks(rank, world_size, device, distributed.new_group(backend="gloo", timeout=timeout))
    finally:
        # Gloo's threads take the interpreter's lock to let go of the last tensors. If the group is destroyed while one
        # waits for the lock, torch 2.13 waits for that thread with the lock held: a deadlock, or an abort at exit.
        time.sleep(_SETTLE_SECONDS)
        distributed.destroy_process_group()
