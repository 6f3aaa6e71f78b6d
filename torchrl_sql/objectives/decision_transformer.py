"""The loss of return-conditioned sequence models (MGDT, arXiv:2205.15241)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import check_reduction, check_written, mean_over_batch, priority_weights, writes


class DecisionTransformerLoss(LossModule):
    """Mean of the cross-entropies of return, actions and rewards (without return tokens, of the latter two).

    Of the return only the window's first step counts. Padded steps count as zero loss, so that microbatches add up to
    their batch, and every stored step weighs the same in windows that begin at each, but for an episode's first
    ``K - 1``, which are in fewer.

    Args:
        actor_network (TensorDictModule): writes ``action_logits``, ``reward_logits``, ``reward_token`` and maybe
            ``return_logits``, ``return_token``, as :func:`torchrl_sql.modules.make_decision_transformer`'s does.

    Keyword Args:
        class_averaged (bool): divide each cross-entropy by its number of classes too, as the notebook's helper does: a
            return then weighs 18/121 of an action, a reward 18/4.
        reduction (str): ``"mean"`` (also as None), ``"sum"`` or ``"none"`` (losses of shape ``[*B]``).
        use_prioritized_weights (bool or "auto"): weigh windows by the ``priority_weight`` entry; ``"auto"`` where the
            batch has one.

    Reads: ``actor_network.in_keys``; ``action`` ``[*B, K]`` int64; ``mask`` ``[*B, K]`` bool, False for padding;
    optional ``priority_weight`` ``[*B]``.

    Returns:
        ``loss_action``, ``loss_reward`` and, with return tokens, ``loss_return``, weighted so that the objective is
        their sum; ``accuracy``: the share of steps, with the batch's weights, whose likeliest action is the data's.

    Raises:
        TypeError, ValueError: if ``actor_network`` does not fit, ``reduction`` is unknown, or the batch has other
            shapes.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch and of the network's outputs."""

        action: NestedKey = "action"
        mask: NestedKey = "mask"
        action_logits: NestedKey = "action_logits"
        reward_logits: NestedKey = "reward_logits"
        reward_token: NestedKey = "reward_token"
        return_logits: NestedKey = "return_logits"
        return_token: NestedKey = "return_token"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule,
        *,
        class_averaged: bool = False,
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(actor_network, TensorDictModule):
            raise TypeError(f"actor_network must be a TensorDictModule, got {type(actor_network).__name__}")
        check_reduction(reduction, use_prioritized_weights)
        self.class_averaged = class_averaged
        self.reduction = reduction or "mean"
        self.use_prioritized_weights = use_prioritized_weights
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)

    def set_keys(self, **kwargs: NestedKey) -> None:
        """As TorchRL's; raises ``ValueError`` for outputs that the network does not write."""
        outputs = ("action_logits", "reward_logits", "reward_token", "return_logits", "return_token")
        check_written(self.actor_network, outputs, kwargs)
        super().set_keys(**kwargs)

    def train(self, mode: bool = True) -> DecisionTransformerLoss:
        """Switches the network's dropout too: the network is not one of the loss's modules."""
        super().train(mode)
        self.actor_network.train(mode)
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments."""
        own = (self.tensor_keys.action, self.tensor_keys.mask)
        return list(dict.fromkeys([*self.actor_network.in_keys, *map(unravel_key, own)]))

    @property
    def out_keys(self) -> list[str]:
        """Keys of the result: the losses, then the metric."""
        returns = ["loss_return"] if self._has_returns else []
        return ["loss_action", "loss_reward", *returns, "accuracy"]

    @property
    def _has_returns(self) -> bool:
        return writes(self.actor_network, self.tensor_keys.return_logits)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        action, mask = tensordict[keys.action], tensordict[keys.mask]
        if action.ndim < 1 or mask.shape != action.shape:
            raise ValueError(f"action and mask must be [*B, K], got {list(action.shape)} and {list(mask.shape)}")
        inputs = TensorDict({key: tensordict[key] for key in self.actor_network.in_keys}, action.shape[:-1])
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            self.actor_network(inputs)
        action_logits = inputs[keys.action_logits]
        losses = {
            "loss_action": self._cross_entropy(action_logits, action, mask),
            "loss_reward": self._cross_entropy(inputs[keys.reward_logits], inputs[keys.reward_token], mask),
        }
        if self._has_returns:
            first = slice(0, 1)
            logits, token = inputs[keys.return_logits].unsqueeze(-2), inputs[keys.return_token].unsqueeze(-1)
            losses["loss_return"] = self._cross_entropy(logits, token, mask[..., first])
        weights = priority_weights(self, tensordict, action.shape[:-1])
        result = {
            name: self._reduce_loss(loss / len(losses), tensordict, weights=weights) for name, loss in losses.items()
        }
        mean = mean_over_batch(self, tensordict, weights)
        right = (action_logits.argmax(-1) == action) & mask
        result["accuracy"] = mean(right.sum(-1).float()) / mean(mask.sum(-1).float())
        out = TensorDict(result)
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out

    def _cross_entropy(self, logits: Tensor, token: Tensor, mask: Tensor) -> Tensor:
        """``[*B]``: mean over the steps of logits ``[*B, K, N]`` against tokens ``[*B, K]``, padded ones being 0."""
        log_probs = logits.float().log_softmax(-1) if logits.dtype.itemsize < 4 else logits.log_softmax(-1)
        loss = -log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        loss = loss.masked_fill(~mask, 0.0).mean(-1)
        return loss / logits.shape[-1] if self.class_averaged else loss
