"""What the losses share: running a Q-value actor up to its values, and reading actions and weights from a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import LossModule

from torchrl_sql.arguments import check_choice


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
        hint = ": give its .actor" if isinstance(getattr(actor, "actor", None), QValueActor) else ""
        raise TypeError(
            f"{argument} must be a torchrl.modules.QValueActor or DistributionalQValueActor, "
            f"got {type(actor).__name__}{hint}"
        )
    if actor.action_space not in ("categorical", "one_hot"):
        raise ValueError(f"{argument} must have a categorical or one-hot action, got {actor.action_space!r}")


def check_reduction(reduction: object, use_prioritized_weights: object) -> None:
    """Raises ``ValueError`` for words that TorchRL would take for something else."""
    check_choice("reduction", reduction, ("mean", "sum", "none", None))
    check_choice("use_prioritized_weights", use_prioritized_weights, (True, False, "auto"))


def check_kept(keep: Sequence[NestedKey], actor: QValueActor) -> list[NestedKey]:
    """``keep`` as a list; raises ``ValueError`` for a key that is not written before the choice of an action.

    A string is no sequence of keys: ``TypeError``.
    """
    if isinstance(keep, str):
        raise TypeError(f"keep must be a sequence of keys, such as [{keep!r}], got {keep!r}")
    written = dict.fromkeys(key for module in list(actor.module)[:-1] for key in module.out_keys)
    for key in keep:
        check_choice("each key of keep", key, written)
    return list(keep)


def action_values(
    actor: QValueActor, params: TensorDictParams, inputs: TensorDict, action_value_key: NestedKey
) -> Tensor:
    """Runs an actor with the given parameters up to its action values, leaving out the choice of an action.

    The last module of a Q-value actor chooses the action. A loss does not need it, it may mask the values, and
    TorchRL's reads a tensor back to the host (``if (log_softmax_values > 0).any()``), which breaks compiled graphs.

    Returns:
        ``[*B, A]`` values or ``[*B, N, A]`` log-probabilities, normalized, in float32 or wider.

    Raises:
        KeyError: if the actor writes no entry of that name.
    """
    with params.to_module(actor, preserve_module_state=False):
        for module in list(actor.module)[:-1]:
            module(inputs)
    if (values := inputs.get(action_value_key, None)) is None:
        raise KeyError(
            f"the network must write {action_value_key!r}, its action values, got {list(actor.out_keys)}: name them "
            "with set_keys(action_value=...)"
        )
    if values.dtype in (torch.bfloat16, torch.float16):
        # Rounded log-probabilities do not sum to one: normalize again.
        values = values.float()
        if isinstance(actor, DistributionalQValueActor):
            values = values.log_softmax(-2)
    return values


def mask_illegal(values: Tensor, actor: QValueActor, inputs: TensorDict, data_action: Tensor | None = None) -> Tensor:
    """Q-values or logits ``[*B, A]``, the least number where the actor's own action mask forbids an action.

    Args:
        values (Tensor): ``[*B, A]``.
        actor (QValueActor): its last module names the mask, if it has one.
        inputs (TensorDict): what the actor has read and written.
        data_action (Tensor, optional): ``[*B]`` indices of actions that stay whatever the mask says, because data has
            them: a penalty or a likelihood without them would have no bound.
    """
    mask_key = getattr(actor.module[-1], "action_mask_key", None)
    if mask_key is None:
        return values
    legal = inputs[mask_key]
    if data_action is not None:
        legal = legal.scatter(-1, data_action.unsqueeze(-1), True)
    return values.masked_fill(~legal, torch.finfo(values.dtype).min)


def action_index(action: Tensor, num_actions: int, batch_shape: torch.Size, action_space: str) -> Tensor:
    """The ``[*B]`` int64 indices of actions given as ``[*B]`` or ``[*B, 1]`` indices, or ``[*B, A]`` one-hot.

    Raises:
        ValueError: for any other shape, and for floating-point actions.
    """
    if not action.is_floating_point():
        if action_space == "one_hot" and action.shape == (*batch_shape, num_actions):
            return action.to(torch.uint8).argmax(-1)
        if action_space == "categorical" and action.shape == batch_shape:
            return action.long()
        if action_space == "categorical" and action.shape == (*batch_shape, 1):
            return action.squeeze(-1).long()
    expected = f"[*B, {num_actions}]" if action_space == "one_hot" else "[*B] or [*B, 1]"
    raise ValueError(
        f"{action_space} action must be {expected} with *B={tuple(batch_shape)} and of integers, "
        f"got {tuple(action.shape)} of {action.dtype}"
    )


def writes(network: TensorDictModule, key: NestedKey) -> bool:
    """Whether the network writes a key, in any of the forms that a key has."""
    return unravel_key(key) in map(unravel_key, network.out_keys)


def check_written(network: TensorDictModule, outputs: Sequence[str], given: Mapping[str, NestedKey | None]) -> None:
    """Raises ``ValueError`` where ``set_keys`` is given a key for an output that the network does not write."""
    for name in outputs:
        if (key := given.get(name)) is not None and not writes(network, key):
            raise ValueError(f"{name} must be a key that the network writes ({network.out_keys}), got {key!r}")


def priority_weights(loss: LossModule, tensordict: TensorDictBase, batch_shape: torch.Size) -> Tensor | None:
    """The batch's ``priority_weight`` as ``[*B]``, if there is one and the loss uses it.

    Raises:
        KeyError: if the loss was told to use it and it is not there.
        ValueError: unless its shape is that of the batch's first dimensions, each weight being for all behind.
    """
    key = loss.tensor_keys.priority_weight
    weights = tensordict.get(key, None) if loss.use_prioritized_weights else None
    if weights is None:
        if loss.use_prioritized_weights is True:
            raise KeyError(f"use_prioritized_weights=True needs {key!r}, which is not in the batch")
        return None
    shape = weights.shape
    if shape != batch_shape and shape[-1:] == (1,):
        shape = shape[:-1]
    if shape != batch_shape[: len(shape)] or (batch_shape and not shape):
        raise ValueError(f"{key!r} must be [*B] with *B={tuple(batch_shape)}, got {tuple(weights.shape)}")
    return weights.reshape(*shape, *(1 for _ in batch_shape[len(shape) :])).expand(batch_shape)


def mean_over_batch(loss: LossModule, tensordict: TensorDictBase, weights: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function from ``[*B]`` to its detached mean, with the mask and the weights that the loss is reduced with."""

    def mean(values: Tensor) -> Tensor:
        return loss._reduce_loss(values.detach(), tensordict, weights=weights, reduction="mean")

    return mean


def next_inputs(
    actor: QValueActor, tensordict: TensorDictBase, batch_shape: torch.Size, static_keys: Sequence[NestedKey]
) -> TensorDict:
    """What the actor reads, of the next step; ``static_keys`` from the root where ``"next"`` lacks them.

    Raises:
        KeyError: naming a key that is not there.
    """
    found = {}
    for key in actor.in_keys:
        next_key = unravel_key(("next", key))
        value = tensordict.get(next_key, None)
        if value is None and key in static_keys:
            value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"{next_key!r} is not in the batch, which has {sorted(tensordict.keys(True, True), key=str)}"
            )
        found[key] = value
    return TensorDict(found, batch_shape)
