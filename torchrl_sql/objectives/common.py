"""What the losses share: running a Q-value actor up to its values, and reading actions from a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict, TensorDictParams
from torch import Tensor
from torchrl.modules import DistributionalQValueActor, QValueActor


def check_actor(actor: object, argument: str) -> None:
    """Raises unless ``actor`` is a TorchRL Q-value actor with a discrete action.

    Args:
        actor (object): what the user passed.
        argument (str): the argument's name, for the message.

    Raises:
        TypeError: if it is no :class:`~torchrl.modules.QValueActor` (distributional ones are).
        ValueError: if its action space is neither categorical nor one-hot.
    """
    if not isinstance(actor, QValueActor):
        raise TypeError(
            f"{argument} must be a torchrl.modules.QValueActor or DistributionalQValueActor, got {type(actor).__name__}"
        )
    if actor.action_space not in ("categorical", "one_hot"):
        raise ValueError(f"{argument} must have a categorical or one-hot action, got {actor.action_space!r}")


def action_values(
    actor: QValueActor, params: TensorDictParams, inputs: TensorDict, action_value_key: NestedKey
) -> Tensor:
    """Runs an actor with the given parameters up to its action values, leaving out the choice of an action.

    The last module of a Q-value actor chooses the action. A loss does not need it, it may mask the values, and
    TorchRL's reads a tensor back to the host (``if (log_softmax_values > 0).any()``), which breaks compiled graphs.

    Returns:
        ``[*B, A]`` values or ``[*B, N, A]`` log-probabilities, normalized, in float32 or wider.
    """
    with params.to_module(actor, preserve_module_state=False):
        for module in list(actor.module)[:-1]:
            module(inputs)
    values = inputs[action_value_key]
    if values.dtype in (torch.bfloat16, torch.float16):
        # Rounded log-probabilities do not sum to one: normalize again.
        values = values.float()
        if isinstance(actor, DistributionalQValueActor):
            values = values.log_softmax(-2)
    return values


def action_index(action: Tensor, num_actions: int, batch_shape: torch.Size, action_space: str) -> Tensor:
    """The ``[*B]`` int64 indices of actions given as ``[*B]`` or ``[*B, 1]`` indices, or ``[*B, A]`` one-hot.

    Raises:
        ValueError: for any other shape.
    """
    if action_space == "one_hot" and action.shape == (*batch_shape, num_actions):
        return action.to(torch.uint8).argmax(-1)
    if action_space == "categorical" and action.shape == batch_shape:
        return action.long()
    if action_space == "categorical" and action.shape == (*batch_shape, 1):
        return action.squeeze(-1).long()
    expected = f"[*B, {num_actions}]" if action_space == "one_hot" else "[*B] or [*B, 1]"
    raise ValueError(
        f"{action_space} action must be {expected} with *B={tuple(batch_shape)}, got {tuple(action.shape)}"
    )


def require_finite(entries: Mapping[NestedKey, Tensor]) -> None:
    """Raises ``ValueError`` naming the first entry with a value that is not finite. Reads it back to the host."""
    for key, value in entries.items():
        num_bad = int((~torch.isfinite(value)).sum())
        if num_bad:
            raise ValueError(f"{key!r} must be finite, got {num_bad} non-finite of {value.numel()} values")
