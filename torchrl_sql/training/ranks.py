"""One process per device: where this process stands among them, and what they agree on."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

T = TypeVar("T")

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

    def share(self, value: Any) -> Any:
        """Rank 0's value on each rank; waits for it.

        Args:
            value: of rank 0: what ``torch.load(weights_only=True)`` reads, with tensors in dicts, lists and tuples on
                the host. The other ranks' are not looked at.

        Returns:
            On rank 0 ``value`` itself; elsewhere an equal one, its tensors contiguous.
        """
        if self._host_group is None:
            return value
        skeleton = io.BytesIO()
        if self.is_main:
            torch.save(pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value), skeleton)
        size = self._from_main(torch.tensor(skeleton.tell()))
        content = self._from_main(
            torch.frombuffer(skeleton.getbuffer(), dtype=torch.uint8)
            if self.is_main
            else torch.empty(int(size), dtype=torch.uint8)
        )
        if self.is_main:
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self._from_main(tensor.contiguous())
            return value
        received = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
        return pytree.tree_map_only(
            Tensor, lambda tensor: self._from_main(torch.empty(tensor.shape, dtype=tensor.dtype)), received
        )

    def _from_main(self, tensor: Tensor) -> Tensor:
        """Fill a contiguous tensor with rank 0's, byte by byte: gloo does not know every dtype."""
        if tensor.numel():
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self._host_group)
        return tensor

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0; what it returns is :meth:`share`d, what it raises every rank raises.

        Raises:
            Exception: rank 0's; on the other ranks ``OSError``, ``MemoryError``, ``RuntimeError`` or ``ValueError`` of
                the same text, because of a :class:`RaisedByMain`.
        """
        if self._host_group is None:
            return work()
        value: T | None = None
        problem: Exception | None = None
        if self.is_main:
            try:
                value = work()
            except Exception as error:
                problem = error
        told, value = self.share((_tell(problem), value))
        self.maximum(0)  # whoever left before the others have received it would take it away
        if problem is not None:
            raise problem
        if told is not None:
            raise _told(*told) from RaisedByMain()
        return cast(T, value)

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


class RaisedByMain(Exception):
    """The cause of an error that rank 0 had: what is to be made of it is for rank 0 to say."""


_KINDS = (OSError, MemoryError, RuntimeError, ValueError)
"""The kinds of errors that others are told; an error of no kind is told as one of the last."""


def _tell(error: Exception | None) -> tuple[int, list[Any]] | None:
    """An error in plain values, for :func:`_told` on another rank."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return 0, [error.errno, error.strerror, None if error.filename is None else str(error.filename)]
    kind = next((index for index, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)
    return kind, [str(error)]


def _told(kind: int, arguments: list[Any]) -> Exception:
    return _KINDS[kind](*arguments)


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
        ValueError: if some of the variables are there and others are not, one is no number, or other nodes could not
            reach this one, see :func:`check_address`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(0, 1, device)
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set, but {', '.join(missing)} must be too (torchrun sets them all)")
    check_address(os.environ, socket.gethostbyname)
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


def check_address(environment: Mapping[str, str], resolve: Callable[[str], str]) -> None:
    """Refuse to join processes of several nodes under an address that means this node on each of them.

    Gloo announces the address that the host's own name resolves to. Where ``/etc/hosts`` makes that 127.0.1.1, as
    Debian does, the other nodes would try to reach themselves, until the time is up.

    Args:
        environment (mapping): e.g. ``os.environ``.
        resolve (callable): a host's name -> its IPv4 address, e.g. ``socket.gethostbyname``.

    Raises:
        ValueError: saying which variable mends it.
    """
    num_here = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    is_one_host = num_here == environment["WORLD_SIZE"] or environment["MASTER_ADDR"].startswith(("127.", "localhost"))
    if is_one_host or "GLOO_SOCKET_IFNAME" in environment:
        return
    host = os.uname().nodename
    try:
        address = resolve(host)
    except OSError:  # then gloo looks for an interface by itself
        return
    if address.startswith("127."):
        raise ValueError(
            f"{host} resolves to {address} here, where the other nodes cannot reach it: set GLOO_SOCKET_IFNAME to the "
            "network interface between the nodes, e.g. cluster.environment.GLOO_SOCKET_IFNAME=ib0"
        )
