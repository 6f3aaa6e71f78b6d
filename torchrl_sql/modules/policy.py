"""Acting: a Q-network as a policy of the legal actions.

Legend: B batch, A actions, N whatever is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import DistributionalQValueActor, QValueActor

from torchrl_sql.games import legal_action_mask, resolve_games


class NetworkPolicy(TensorDictModuleBase):
    """Plays a Q-value actor (or the logits of a cloning network), never an action that the game does not know.

    Reads: ``observation`` ``[*B, 4, 84, 84]`` uint8, ``game_id`` ``[*B]`` int64; to sample also ``uniform`` ``[*B]``
    float64.
    Writes: ``action`` ``[*B]`` int64, ``action_value`` ``[*B, 18]`` float: Q-values (the expectation of a return
    distribution) or logits.

    Args:
        actor (QValueActor or DistributionalQValueActor): over the 18 actions.
        games (sequence of str): its games, in the order of its ``game_id``; kept as ``games``.

    Keyword Args:
        decoding ("greedy" or "sampled"): the argmax, or a draw from the softmax of ``action_value``.

    Raises:
        ValueError: for another decoding, an unknown game, or another number of games than the actor has.
        FloatingPointError: when playing, for values that are not finite.
    """

    def __init__(self, actor: QValueActor, games: Sequence[str], *, decoding: str = "greedy"):
        super().__init__()
        if decoding not in ("greedy", "sampled"):
            raise ValueError(f"decoding must be 'greedy' or 'sampled', got {decoding!r}")
        self.games = resolve_games(games)
        num_games = getattr(actor.module[0].module, "num_games", len(self.games))
        if len(self.games) != num_games:
            raise ValueError(f"games must be the actor's {num_games}, got {len(self.games)}: {', '.join(self.games)}")
        self.in_keys = ["observation", "game_id"] + ["uniform"] * (decoding == "sampled")
        self.out_keys = ["action", "action_value"]
        self.actor = actor
        self.spec = actor.spec
        self.decoding = decoding
        self.is_distributional = isinstance(actor, DistributionalQValueActor)
        device = next(actor.parameters()).device
        self.register_buffer("legal", legal_action_mask(self.games).to(device), persistent=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``action`` and ``action_value``."""
        # The network itself: the actor's own choice is not wanted, and the wrappers cost a fifth of a small network.
        network = self.actor.module[0]
        outputs = network.module(*(tensordict[key] for key in network.in_keys))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        value_BA = outputs[network.out_keys.index("action_value")]
        if self.is_distributional:
            value_BA = (value_BA.log_softmax(-2).exp() * self.actor.support.unsqueeze(-1)).sum(-2)
        check_outputs(value_BA)
        legal_BA = self.legal[tensordict["game_id"]]
        preference_BA = value_BA.double().masked_fill(~legal_BA, -torch.inf)
        if self.decoding == "greedy":
            tensordict["action"] = preference_BA.argmax(-1)
        else:
            tensordict["action"] = sample_index(preference_BA.softmax(-1), tensordict["uniform"])
        tensordict["action_value"] = value_BA
        return tensordict


def check_outputs(values: Tensor) -> Tensor:
    """The values, if they are finite.

    Raises:
        FloatingPointError: if not.
    """
    if not values.isfinite().all():
        raise FloatingPointError("the network's outputs must be finite, got NaN or infinity: its training diverged")
    return values


def sample_index(weight_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index at which the cumulative weight exceeds the uniform number's share of the total: ``[B]`` int64.

    The sums are in float64; indices of weight 0 are never drawn, unless all weights are 0: then it is 0.
    """
    cumulative_BN = weight_BN.double().cumsum(-1)
    return (cumulative_BN > uniform_B.unsqueeze(-1) * cumulative_BN[..., -1:]).int().argmax(-1)
