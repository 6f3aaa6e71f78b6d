"""Policies that evaluation provides: trained networks, random play, always one action. Any other TensorDict module will
do as well: see :func:`torchrl_sql.evaluation.runner.evaluate`.

Legend: B batch, G games, A actions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Composite, OneHot
from torchrl.modules import DistributionalQValueActor, QValueActor

from torchrl_sql.evaluation.protocol import DECODINGS, Decoding
from torchrl_sql.games import ACTION_NAMES, NUM_ACTIONS, legal_action_mask


class NetworkPolicy(TensorDictModuleBase):
    """Plays a Q-value actor (or the logits of a cloning network), never an action that the game does not know.

    Reads: ``observation`` ``[B, 4, 84, 84]`` uint8, ``game_id`` ``[B]`` int64, ``uniform`` ``[B]`` float64.
    Writes: ``action`` ``[B]`` int64, ``action_value`` ``[B, 18]`` float: Q-values (the expectation of a return
    distribution) or logits.

    Args:
        actor (QValueActor or DistributionalQValueActor): over the 18 actions.
        games (sequence of str): its games, in the order of its ``game_id``.

    Keyword Args:
        decoding ("greedy" or "sampled"): the argmax, or a draw from the softmax of ``action_value``.

    Raises:
        ValueError: for another decoding, other action sets and, when playing, values that are not finite.
    """

    in_keys: ClassVar[list[str]] = ["observation", "game_id", "uniform"]
    out_keys: ClassVar[list[str]] = ["action", "action_value"]

    def __init__(self, actor: QValueActor, games: Sequence[str], *, decoding: Decoding = "greedy"):
        super().__init__()
        if decoding not in DECODINGS:
            raise ValueError(f"decoding must be 'greedy' or 'sampled', got {decoding!r}")
        check_action_set(actor)
        self.actor = actor
        self.decoding = decoding
        self.support = actor.support if isinstance(actor, DistributionalQValueActor) else None
        device = next(actor.parameters()).device
        self.register_buffer("legal", legal_action_mask(games).to(device), persistent=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``action`` and ``action_value``, see :class:`NetworkPolicy`."""
        value_BA = self.actor(tensordict.select("observation", "game_id"))["action_value"]
        if self.support is not None:
            value_BA = (value_BA.exp() * self.support.unsqueeze(-1)).sum(-2)
        if not value_BA.isfinite().all():
            raise ValueError("the network's outputs must be finite, got NaN or infinity: its training diverged")
        legal_BA = self.legal[tensordict["game_id"]]
        preference_BA = value_BA.double().masked_fill(~legal_BA, -torch.inf)
        if self.decoding == "greedy":
            tensordict["action"] = preference_BA.argmax(-1)
        else:
            tensordict["action"] = draw(preference_BA.softmax(-1), tensordict["uniform"])
        tensordict["action_value"] = value_BA
        return tensordict


class RandomPolicy(TensorDictModuleBase):
    """Uniform over each game's legal actions.

    Reads: ``game_id``, ``uniform``. Writes: ``action`` ``[B]`` int64.
    """

    in_keys: ClassVar[list[str]] = ["game_id", "uniform"]
    out_keys: ClassVar[list[str]] = ["action"]

    def __init__(self, games: Sequence[str]):
        super().__init__()
        self.legal = legal_action_mask(games)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``action``, see :class:`RandomPolicy`."""
        tensordict["action"] = draw(self.legal[tensordict["game_id"]], tensordict["uniform"])
        return tensordict


class ConstantPolicy(TensorDictModuleBase):
    """Always the same of the 18 actions (one that the game does not know acts as NOOP).

    Writes: ``action`` ``[B]`` int64.
    """

    in_keys: ClassVar[list[str]] = ["game_id"]
    out_keys: ClassVar[list[str]] = ["action"]

    def __init__(self, action: int):
        super().__init__()
        self.action = action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``action``, see :class:`ConstantPolicy`."""
        tensordict["action"] = torch.full_like(tensordict["game_id"], self.action)
        return tensordict


def draw(weight_BA: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first action at which the cumulative weight exceeds the uniform number's share of the total: ``[B]`` int64.

    The sums are in float64; actions of weight 0 are never drawn.
    """
    cumulative_BA = weight_BA.double().cumsum(-1)
    return (cumulative_BA > uniform_B.unsqueeze(-1) * cumulative_BA[:, -1:]).int().argmax(-1)


def check_action_set(policy: torch.nn.Module) -> None:
    """Refuses a policy whose action spec is not the 18 actions.

    Raises:
        ValueError: if it declares another number of actions (a game's minimal set, say) or one-hot actions.
    """
    spec = getattr(policy, "spec", None)
    if isinstance(spec, Composite):
        spec = spec.get("action", None)
    number = getattr(getattr(spec, "space", None), "n", None)
    if number is not None and number != NUM_ACTIONS:
        raise ValueError(
            f"the policy must act in the full set of {NUM_ACTIONS} actions (torchrl_sql.games.ACTION_NAMES: "
            f"{', '.join(ACTION_NAMES[:4])}, ...), but its action spec has {number}: a policy of a game's minimal "
            "action set must have its outputs mapped by torchrl_sql.games.GAMES[game].minimal_actions first"
        )
    if isinstance(spec, OneHot):
        raise ValueError("the policy's action must be an index in 0..17 (Categorical spec), got a one-hot spec")


def digest_of_weights(module: nn.Module) -> str:
    """Tells weights apart: a hash of the module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy() if value.ndim else str(value.item()).encode())
    return f"sha256:{digest.hexdigest()[:16]}"
