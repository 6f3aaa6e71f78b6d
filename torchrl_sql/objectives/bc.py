"""Behavioural cloning with the Q-network's architecture: the baseline that the method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import (
    action_index,
    action_values,
    check_actor,
    check_kept,
    check_reduction,
    mask_illegal,
    mean_over_batch,
    priority_weights,
)


class DiscreteBCLoss(LossModule):
    """Cross-entropy between the policy ``softmax(action_value)`` and the data's actions.

    Where the actor has an action mask of its own, the policy is over the legal actions and the data's own.

    Args:
        actor_network (QValueActor): any of TorchRL's with scalar values (``make_q_actor(..., num_atoms=None)``) and a
            categorical or one-hot action. A distributional one is refused: its support would bound the logits.

    Keyword Args:
        reduction (str): ``"mean"`` (also as None), ``"sum"`` or ``"none"`` (a loss of shape ``[*B]``).
        use_prioritized_weights (bool or "auto"): weigh samples by the ``priority_weight`` entry; ``"auto"`` where the
            batch has one.
        keep (sequence of NestedKey): outputs of the network, such as ``"features"``, to be returned with their graph.

    Reads: ``actor_network.in_keys``; ``action`` ``[*B]`` or ``[*B, 1]`` indices, or ``[*B, A]`` one-hot; optional
    ``priority_weight`` ``[*B]``.

    Returns:
        ``loss_bc``, and ``accuracy``: the detached share of samples, with the batch's mask and weights, whose greedy
        action is the data's; then what ``keep`` names.

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

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: QValueActor,
        *,
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
        keep: Sequence[NestedKey] = (),
    ) -> None:
        super().__init__()
        check_actor(actor_network, "actor_network")
        check_reduction(reduction, use_prioritized_weights)
        if isinstance(actor_network, DistributionalQValueActor):
            raise TypeError("actor_network must be a QValueActor with scalar values, got DistributionalQValueActor")
        self.reduction = reduction or "mean"
        self.use_prioritized_weights = use_prioritized_weights
        self.keep = check_kept(keep, actor_network)
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments."""
        return [*self.actor_network.in_keys, self.tensor_keys.action]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the result."""
        return ["loss_bc", "accuracy", *self.keep]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys, network = self.tensor_keys, self.actor_network
        inputs = TensorDict({key: tensordict[key] for key in network.in_keys})  # dispatch can only guess a batch size
        logits = action_values(network, self.actor_network_params, inputs, keys.action_value)
        batch_shape = logits.shape[:-1]
        action = action_index(tensordict[keys.action], logits.shape[-1], batch_shape, network.action_space)
        log_probs = mask_illegal(logits, network, inputs, action).log_softmax(-1)
        loss = -log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        greedy = mask_illegal(logits, network, inputs).argmax(-1)
        weights = priority_weights(self, tensordict, batch_shape)
        mean = mean_over_batch(self, tensordict, weights)
        out = TensorDict(
            {
                "loss_bc": self._reduce_loss(loss, tensordict, weights=weights),
                "accuracy": mean((greedy == action).to(logits.dtype)),
            }
        )
        for key in self.keep:
            out[key] = inputs[key]
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out
