"""How the loss is called, and gradients are averaged, when one process trains a network, or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import LossModule

from torchrl_sql.training.ranks import Ranks


class LossCall(Protocol):
    """Calls a loss so that :meth:`average_gradients` leaves the mean gradient over ranks in its parameters."""

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True) -> TensorDict:
        """The loss's entries.

        Args:
            batch (TensorDictBase): this rank's.

        Keyword Args:
            exchange (bool): whether the backward pass of this call exchanges gradients; False for all but the last
                microbatch of a step, whose gradients add up on each rank.
        """

    def average_gradients(self) -> None:
        """To be called after a step's last backward pass, unless that did it already."""


class SingleProcess:
    """One process: nothing to exchange.

    Args:
        loss (LossModule): the loss.

    Keyword Args:
        compile (bool): compile it, forward and backward, each as one graph of kernels for fixed shapes.
    """

    def __init__(self, loss: LossModule, *, compile: bool = False) -> None:
        self._loss: Callable[[TensorDictBase], TensorDict] = loss
        if compile:
            # TensorDict notes classes that it meets in arithmetic and moves; a class it notes later compiles all anew.
            _ = (TensorDict(a=torch.zeros(())) / 2 / 2.0).to(torch.device("cpu"))
            self._loss = torch.compile(loss, fullgraph=True, dynamic=False, options=compiler_options(loss))

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True) -> TensorDict:
        """The loss's entries; there is nobody to exchange gradients with."""
        return self._loss(batch)

    def average_gradients(self) -> None:
        """There is nobody to exchange gradients with."""


def compiler_options(loss: LossModule, device: str | None = None) -> dict[str, Any]:
    """Of ``torch.compile``, for a loss on a kind of device; default the one where its parameters are."""
    if (device or next(loss.parameters()).device.type) == "cpu":
        # Channels-last costs more than it gains (benchmarks/results/update_step.md).
        return {"layout_optimization": False}
    networks = [value for value in vars(loss).values() if isinstance(value, nn.Module)]  # where TorchRL keeps them
    if any(isinstance(module, nn.GroupNorm) for network in networks for module in network.modules()):
        # Kernels that hold a whole map are slower (benchmarks/results/gpu.md).
        return {"triton.persistent_reductions": False}
    return {}


class AveragedAfterwards(SingleProcess):
    """Each rank holds the whole network; one all-reduce averages all gradients after the backward pass.

    For recorded steps: nothing but the device's own work happens in forward and backward pass. Unlike with
    :class:`Replicated`, none of the exchange hides behind the backward pass.

    Args:
        loss (LossModule): on its device; it gets rank 0's weights.
        ranks (Ranks): of a process group.

    Keyword Args:
        compile (bool): see :class:`SingleProcess`.
    """

    def __init__(self, loss: LossModule, ranks: Ranks, *, compile: bool = False) -> None:
        super().__init__(loss, compile=compile)
        self._ranks = ranks
        self._parameters = list(loss.parameters())
        for weight in _in_memory_order(value for value in loss.state_dict().values() if value.is_floating_point()):
            distributed.broadcast(weight, src=0)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Wait for no rank on the host."""
        gradients = _in_memory_order(parameter.grad for parameter in self._parameters if parameter.grad is not None)
        sums = torch.cat(gradients)
        distributed.all_reduce(sums)
        sums /= self._ranks.world_size
        torch._foreach_copy_(gradients, sums.split([gradient.numel() for gradient in gradients]))


def _in_memory_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Flat views of dense tensors, whatever their layout: weights and gradients have the same one on each rank."""
    return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]


class Replicated:
    """``DistributedDataParallel``: each rank holds the whole network, gradients are averaged in the backward pass.

    The target parameters are buffers of the loss: they are the same on each rank from the start and follow the same
    updates, so nothing but gradients travels.

    Args:
        loss (LossModule): on its device.
        ranks (Ranks): of a process group.

    Keyword Args:
        compile (bool): see :class:`SingleProcess`.
    """

    def __init__(self, loss: LossModule, ranks: Ranks, *, compile: bool = False) -> None:
        self._module = DistributedDataParallel(
            _PlainOutputs(loss, compile=compile),
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        self._devices = [ranks.device] if ranks.device.type == "cuda" else []
        self._has_buckets = False

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True) -> TensorDict:
        """The loss's entries; the last backward pass of a step averages the gradients of all ranks."""
        if not self._has_buckets:
            self._build_buckets(batch)
        with nullcontext() if exchange else self._module.no_sync():
            return TensorDict(self._module(batch))

    def average_gradients(self) -> None:
        """The backward pass did."""

    def _build_buckets(self, batch: TensorDictBase) -> None:
        """Run a backward pass for nothing. DDP arranges its buckets anew after the first one, and sums of more than two
        ranks are rounded by their place in a bucket: a continued run would differ from one that ran through. So it
        would if dropout drew from the generators here, which a checkpoint restores before.
        """
        with torch.random.fork_rng(self._devices):
            losses = self._module(batch.clone())
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        self._module.zero_grad(set_to_none=True)
        self._has_buckets = True


class _PlainOutputs(nn.Module):
    """A loss that returns a dict: DDP finds its parameters here, and hooks tensors in plain containers only."""

    def __init__(self, loss: LossModule, *, compile: bool) -> None:
        super().__init__()
        self.loss = loss
        self._call = SingleProcess(loss, compile=compile)  # no module: the parameters are registered once

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        return dict(self._call(batch).items())
