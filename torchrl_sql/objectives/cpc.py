"""The loss of contrastive predictive coding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import check_reduction


class ContrastivePredictionLoss(LossModule):
    """InfoNCE (arXiv:1807.03748): which of the batch's next states follows a state?

    Candidates are the transition's own next state and those of the batch's other transitions: of all games, as in MGDT
    (arXiv:2205.15241), or of the same game. With microbatches or several processes, a batch is what one forward pass
    sees. A terminal state has no next one: it counts as a loss of 0, and is no candidate of others.

    Args:
        actor_network (TensorDictModule): writes ``scores`` ``[B, B]`` of state ``i`` and next state ``j``, as one
            around :class:`torchrl_sql.modules.ContrastivePredictor` does.

    Keyword Args:
        same_game (bool): only states of the same game are candidates, so that telling games apart earns nothing.
        reduction (str): ``"mean"`` (also as None), ``"sum"`` or ``"none"`` (a loss of shape ``[B]``).

    Reads: ``actor_network.in_keys``, ``game_id`` ``[B]`` int64, ``("next", "terminated")`` ``[B, 1]`` bool.

    Returns:
        ``loss_cpc`` in nats, the logarithm of the number of candidates at chance; ``accuracy``: the share of states
        whose own next state has the highest score of all candidates.

    Raises:
        TypeError, ValueError: if ``actor_network`` is no TensorDictModule, ``reduction`` is unknown, or the scores are
            not ``[B, B]``.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch and of the network's output."""

        scores: NestedKey = "scores"
        game_id: NestedKey = "game_id"
        terminated: NestedKey = ("next", "terminated")

    default_keys = _AcceptedKeys

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule,
        *,
        same_game: bool = False,
        reduction: Literal["mean", "sum", "none"] | None = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(actor_network, TensorDictModule):
            raise TypeError(f"actor_network must be a TensorDictModule, got {type(actor_network).__name__}")
        check_reduction(reduction, "auto")
        self.same_game = same_game
        self.reduction = reduction or "mean"
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments."""
        own = (self.tensor_keys.game_id, self.tensor_keys.terminated)
        return list(dict.fromkeys([*self.actor_network.in_keys, *map(unravel_key, own)]))

    @property
    def out_keys(self) -> list[str]:
        """Keys of the result: the loss, then the metric."""
        return ["loss_cpc", "accuracy"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        game_id, terminated = tensordict[keys.game_id], tensordict[keys.terminated].squeeze(-1)
        inputs = TensorDict({key: tensordict[key] for key in self.actor_network.in_keys}, game_id.shape)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            self.actor_network(inputs)
        scores = inputs[keys.scores]
        if scores.shape != (len(game_id), len(game_id)):
            raise ValueError(f"scores must be {[len(game_id)] * 2}, got {list(scores.shape)}")
        is_candidate = ~terminated.expand_as(scores)
        if self.same_game:
            is_candidate = is_candidate & (game_id.unsqueeze(-1) == game_id)
        own = torch.eye(len(game_id), dtype=torch.bool, device=scores.device)
        scores = scores.float().masked_fill(~(is_candidate | own), -torch.inf)
        loss = -scores.log_softmax(-1).diagonal().masked_fill(terminated, 0.0)
        is_right = (scores.argmax(-1) == torch.arange(len(game_id), device=scores.device)) & ~terminated
        out = TensorDict(
            {
                "loss_cpc": self._reduce_loss(loss, tensordict),
                "accuracy": is_right.sum() / (~terminated).sum().clamp_min(1),
            }
        )
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out
