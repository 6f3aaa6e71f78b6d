"""The loss of masked auto-encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import check_reduction


class MaskedAutoencodingLoss(LossModule):
    """Squared error over all pixels, as in Atari-PB (arXiv:2406.06037).

    Args:
        actor_network (TensorDictModule): writes ``reconstruction`` and ``target``, both ``[B, K, H, W]``, as one around
            :class:`torchrl_sql.modules.MaskedAutoencoder` does.

    Keyword Args:
        reduction (str): ``"mean"`` (also as None), ``"sum"`` or ``"none"`` (a loss of shape ``[B]``).

    Reads: ``actor_network.in_keys``.

    Returns:
        ``loss_mae``, the mean over pixels, in squared units of the target; ``unexplained``: the error's share of the
        target's variance over the batch, 1 for a network that always paints the mean colour.

    Raises:
        TypeError, ValueError: if ``actor_network`` is no TensorDictModule or ``reduction`` is unknown.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the network's outputs."""

        reconstruction: NestedKey = "reconstruction"
        target: NestedKey = "target"

    default_keys = _AcceptedKeys

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self, actor_network: TensorDictModule, *, reduction: Literal["mean", "sum", "none"] | None = "mean"
    ) -> None:
        super().__init__()
        if not isinstance(actor_network, TensorDictModule):
            raise TypeError(f"actor_network must be a TensorDictModule, got {type(actor_network).__name__}")
        check_reduction(reduction, "auto")
        self.reduction = reduction or "mean"
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments."""
        return list(self.actor_network.in_keys)

    @property
    def out_keys(self) -> list[str]:
        """Keys of the result: the loss, then the metric."""
        return ["loss_mae", "unexplained"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        inputs = TensorDict({key: tensordict[key] for key in self.in_keys})  # dispatch can only guess a batch size
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            self.actor_network(inputs)
        target = inputs[keys.target].detach()
        if (found := inputs[keys.reconstruction].shape) != target.shape:
            raise ValueError(
                f"{keys.reconstruction} must have the target's shape, {list(target.shape)}, got {list(found)}"
            )
        error = (inputs[keys.reconstruction] - target).square().flatten(1).mean(-1)
        variance = target.var(correction=0).clamp_min(1e-12)
        out = TensorDict(
            {
                "loss_mae": self._reduce_loss(error, tensordict),
                "unexplained": error.detach().mean() / variance,
            }
        )
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out
