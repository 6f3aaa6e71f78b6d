"""Behavioural cloning with the Q-network's architecture: the baseline that the method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import action_index, action_values, check_actor


class DiscreteBCLoss(LossModule):
    """Cross-entropy between the policy ``softmax(action_value)`` and the data's actions.

    Args:
        actor_network (QValueActor): any of TorchRL's with scalar values (``make_q_actor(..., num_atoms=None)``) and a
            categorical or one-hot action. A distributional one is refused: its support would bound the logits.

    Keyword Args:
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"`` (a loss of shape ``[*B]``).
        use_prioritized_weights (bool or "auto"): weigh samples by the ``priority_weight`` entry; ``"auto"`` where the
            batch has one.

    Reads: ``actor_network.in_keys``; ``action`` ``[*B]`` or ``[*B, 1]`` indices, or ``[*B, A]`` one-hot; optional
    ``priority_weight`` ``[*B]``.

    Returns:
        ``loss_bc``, and ``accuracy``: the detached share of samples whose greedy action is the data's.

    Raises:
        TypeError, ValueError: if ``actor_network`` does not fit or ``reduction`` is unknown.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch and of the network's output."""

        action_value: NestedKey = "action_value"
        action: NestedKey = "action"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    out_keys: ClassVar[list[str]] = ["loss_bc", "accuracy"]

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: QValueActor,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        check_actor(actor_network, "actor_network")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if isinstance(actor_network, DistributionalQValueActor):
            raise TypeError("actor_network must be a QValueActor with scalar values, got DistributionalQValueActor")
        self.reduction = reduction
        self.use_prioritized_weights = use_prioritized_weights
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Nothing to forward: there is no value target."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments."""
        return [*self.actor_network.in_keys, self.tensor_keys.action]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        inputs = TensorDict({key: tensordict[key] for key in self.actor_network.in_keys}, tensordict.batch_size)
        logits = action_values(self.actor_network, self.actor_network_params, inputs, keys.action_value)
        batch_shape = logits.shape[:-1]
        action = action_index(tensordict[keys.action], logits.shape[-1], batch_shape, self.actor_network.action_space)
        log_probs = logits.log_softmax(-1)
        loss = -log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is not None:
            weights = weights.reshape(batch_shape)
        out = TensorDict(
            {
                "loss_bc": self._reduce_loss(loss, tensordict, weights=weights),
                "accuracy": (logits.argmax(-1) == action).to(logits.dtype).mean(),
            }
        )
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out
