"""How the loss is called, and where its parameters live, when several processes train one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import LossModule, TargetNetUpdater

from torchrl_sql.training.ranks import Ranks


class LossCall(Protocol):
    """Calls a loss so that the backward pass leaves the mean gradient over ranks in its parameters."""

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True, eager: bool = False) -> TensorDict:
        """The loss's entries.

        Args:
            batch (TensorDictBase): this rank's.

        Keyword Args:
            exchange (bool): whether the backward pass of this call exchanges gradients; False for all but the last
                microbatch of a step, whose gradients add up on each rank.
            eager (bool): leave the compiled version aside.
        """


class SingleProcess:
    """One process: nothing to exchange.

    Args:
        loss (LossModule): the loss.

    Keyword Args:
        compile (bool): compile it, forward and backward, as one graph.
    """

    def __init__(self, loss: LossModule, *, compile: bool = False) -> None:
        self._call = _Versions(loss, compile)

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True, eager: bool = False) -> TensorDict:
        """See :class:`LossCall`."""
        return self._call(batch, eager)


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
            _ReplicatedModule(loss, _Versions(loss, compile)),
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        self._ready = False

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True, eager: bool = False) -> TensorDict:
        """See :class:`LossCall`."""
        if not self._ready and torch.is_grad_enabled():
            self._build_buckets(batch, eager)
        with nullcontext() if exchange else self._module.no_sync():
            return TensorDict(self._module(batch, eager))

    def _build_buckets(self, batch: TensorDictBase, eager: bool) -> None:
        """A backward pass for nothing. DDP arranges its buckets anew after the first one, and sums of more than two
        ranks are rounded by their place in a bucket: a continued run would differ from one that ran through.
        """
        losses = self._module(batch.clone(), eager)
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        self._module.zero_grad(set_to_none=True)
        self._ready = True


class Sharded:
    """FSDP2 (``fully_shard``): each rank keeps one part of every parameter, of its target and of its optimizer state.

    All parameters are one group: gathered before the forward pass, kept through the backward pass, where gradients are
    averaged and scattered. (The loss runs functionally, one network with two sets of parameters, so that layers cannot
    be groups of their own.) What is left on each rank for good shrinks with the number of ranks.

    Replaces the loss's parameters by ``DTensor`` ones: make the optimizer afterwards, the target updater with
    :meth:`make_target_updater`, and call the loss through this object only.

    Args:
        loss (LossModule): on its device, with the same values on each rank.
        ranks (Ranks): of a process group.

    Keyword Args:
        compile (bool): see :class:`SingleProcess`.
    """

    def __init__(self, loss: LossModule, ranks: Ranks, *, compile: bool = False) -> None:
        self._module = _ShardedModule(loss, _Versions(loss, compile))
        fully_shard(self._module, mesh=init_device_mesh(ranks.device.type, (ranks.world_size,)))
        self._module.take_parts()

    def __call__(self, batch: TensorDictBase, *, exchange: bool = True, eager: bool = False) -> TensorDict:
        """See :class:`LossCall`."""
        self._module.set_requires_gradient_sync(exchange)  # type: ignore[operator]  # fully_shard adds it
        return TensorDict(self._module(batch, eager))

    def make_target_updater(self, make: Callable[[LossModule], TargetNetUpdater]) -> TargetNetUpdater:
        """``make(loss)`` for this rank's parts: each element follows its own source.

        TorchRL's updaters use operations that ``DTensor`` does not know.
        """
        with self._module.local_parts():
            return make(self._module.loss)


class _Versions:
    """A loss and its compiled version."""

    def __init__(self, loss: LossModule, compile: bool) -> None:
        self.loss = loss
        self.compiled: Callable[..., Any] = torch.compile(loss, fullgraph=True) if compile else loss

    def __call__(self, batch: TensorDictBase, eager: bool) -> TensorDict:
        return self.loss(batch) if eager else self.compiled(batch)


class _ReplicatedModule(nn.Module):
    """A loss as a module of one forward: DDP looks for its parameters and hands out plain tensors."""

    def __init__(self, loss: LossModule, call: _Versions) -> None:
        super().__init__()
        self.loss = loss
        self._call = call

    def forward(self, batch: TensorDictBase, eager: bool) -> dict[str, Tensor]:
        return dict(self._call(batch, eager).items())


class _ShardedModule(nn.Module):
    """Holds a loss's parameters and targets for ``fully_shard``, which swaps the entries of ``values`` between parts
    and whole tensors; puts into the loss what it needs: whole tensors for a forward pass, parts otherwise.
    """

    def __init__(self, loss: LossModule, call: _Versions) -> None:
        super().__init__()
        self._call = call
        self.values = nn.ParameterList()
        self._places: dict[int, int] = {}
        sets = _parameter_sets(loss)
        for name, params in sets.items():
            sources = sets[name.removeprefix("target_")]
            for key, value in params.items(True, True):
                if isinstance(sources.get(key), nn.Parameter):  # not buffers, which are small
                    self._places[id(value)] = len(self.values)
                    trained = isinstance(value, nn.Parameter)
                    self.values.append(nn.Parameter(value.detach(), requires_grad=trained))
        self._parts: dict[str, TensorDictParams] = {}
        self._whole: dict[str, TensorDictParams] = {}

    @property
    def loss(self) -> LossModule:
        """Not a submodule: ``fully_shard`` would take its parameters too."""
        return self._call.loss

    def take_parts(self) -> None:
        """After ``fully_shard``: puts the parts into the loss and lets the whole tensors go."""
        self._parts = self._filled(_parameter_sets(self.loss))
        self._places = {id(value): place for place, value in enumerate(self.values)}
        self._install(self._parts)
        for name, params in self._parts.items():
            if not name.startswith("target_"):
                params.to_module(getattr(self.loss, name.removesuffix("_params")))  # it holds the parameters too

    @contextmanager
    def local_parts(self) -> Iterator[None]:
        """While inside, the loss has this rank's parts as plain tensors in the same memory."""

        def local(value: Tensor) -> Tensor:
            if not isinstance(value, DTensor):
                return value
            return nn.Parameter(value.to_local().detach(), requires_grad=value.requires_grad)

        self._install(_mapped(self._parts, local))
        try:
            yield
        finally:
            self._install(self._parts)

    def forward(self, batch: TensorDictBase, eager: bool) -> dict[str, Tensor]:
        # fully_shard makes the whole tensors once and gives them memory while they are needed.
        self._whole = self._whole or self._filled(self._parts)
        self._install(self._whole)
        try:
            return dict(self._call(batch, eager).items())
        finally:
            self._install(self._parts)

    def _filled(self, sets: dict[str, TensorDictParams]) -> dict[str, TensorDictParams]:
        """Parameter sets with the present entries of ``values`` in their places."""

        def present(value: Tensor) -> Tensor:
            place = self._places.get(id(value))
            return value if place is None else self.values[place]

        return _mapped(sets, present)

    def _install(self, sets: dict[str, TensorDictParams]) -> None:
        for name, params in sets.items():
            setattr(self.loss, name, params)


def _parameter_sets(loss: LossModule) -> dict[str, TensorDictParams]:
    return {name: child for name, child in loss.named_children() if isinstance(child, TensorDictParams)}


def _mapped(sets: dict[str, TensorDictParams], function: Callable[[Tensor], Tensor]) -> dict[str, TensorDictParams]:
    return {
        name: TensorDictParams(params.apply(function, filter_empty=False), no_convert=True)
        for name, params in sets.items()
    }


def whole(state: Any) -> Any:
    """Nested values with every ``DTensor`` gathered; to be called by all ranks."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def part_like(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on each rank, as the reference is: this rank's part of it if that is a ``DTensor``."""
    if not isinstance(reference, DTensor):
        return value
    value = value.to(reference.device)
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
