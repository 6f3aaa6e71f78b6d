"""Policies that evaluation provides: random play, always one action. Any other TensorDict module will
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

from torchrl_sql.games import ACTION_NAMES, NUM_ACTIONS, legal_action_mask, resolve_games
from torchrl_sql.modules import sample_index


class RandomPolicy(TensorDictModuleBase):
    """Uniform over each game's legal actions.

    Reads: ``game_id``, ``uniform``. Writes: ``action`` ``[B]`` int64.
    """

    in_keys: ClassVar[list[str]] = ["game_id", "uniform"]
    out_keys: ClassVar[list[str]] = ["action"]

    def __init__(self, games: Sequence[str]):
        super().__init__()
        self.games = resolve_games(games)
        self.legal = legal_action_mask(self.games)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``action``, see :class:`RandomPolicy`."""
        tensordict["action"] = sample_index(self.legal[tensordict["game_id"]], tensordict["uniform"])
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
            "action set must have its outputs mapped by torchrl_sql.games.find_game(game).minimal_actions first"
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
