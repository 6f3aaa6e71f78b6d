"""How the loss is called when several processes train one network."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import LossModule

from torchrl_sql.training.distributed import Ranks


class LossCall(Protocol):
    """Calls a loss so that the backward pass leaves the mean gradient over ranks in its parameters."""

    def __call__(self, batch: TensorDictBase, *, exchange: bool) -> TensorDict:
        """The loss's entries.

        Args:
            batch (TensorDictBase): this rank's.

        Keyword Args:
            exchange (bool): whether the backward pass of this call exchanges gradients; False for all but the last
                microbatch of a step, whose gradients add up on each rank.
        """


def maybe_compiled(loss: LossModule, compile: bool) -> Any:
    """The loss, or its compiled version: forward and backward as one graph."""
    return torch.compile(loss, fullgraph=True) if compile else loss


class SingleProcess:
    """One process: nothing to exchange.

    Args:
        loss (LossModule): the loss.

    Keyword Args:
        compile (bool): compile it, forward and backward, as one graph.
    """

    def __init__(self, loss: LossModule, *, compile: bool = False) -> None:
        self._call = maybe_compiled(loss, compile)

    def __call__(self, batch: TensorDictBase, *, exchange: bool) -> TensorDict:
        """See :class:`LossCall`."""
        return self._call(batch)


class _Module(nn.Module):
    """A loss as a module that DDP takes: plain tensors come out, and its parameters are registered as they are."""

    def __init__(self, loss: LossModule, compile: bool) -> None:
        super().__init__()
        self.loss = loss
        self._call = [maybe_compiled(loss, compile)]  # in a list: not a second submodule

    def forward(self, batch: TensorDictBase) -> dict[str, torch.Tensor]:
        """The loss's entries."""
        return dict(self._call[0](batch).items())


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
        device_ids = [ranks.device] if ranks.device.type == "cuda" else None
        self._module = DistributedDataParallel(
            _Module(loss, compile), device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def __call__(self, batch: TensorDictBase, *, exchange: bool) -> TensorDict:
        """See :class:`LossCall`."""
        with nullcontext() if exchange else self._module.no_sync():
            return TensorDict(self._module(batch))
