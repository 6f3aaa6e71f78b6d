from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical, OneHot
from torchrl.modules import QValueActor

from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy, check_action_set
from torchrl_sql.modules import NetworkPolicy

GAMES = ["Freeway", "Breakout"]  # NOOP, UP, DOWN; NOOP, FIRE, RIGHT, LEFT


def batch(number=4, uniform=0.0):
    return TensorDict(
        observation=torch.randint(256, (number, 4, 84, 84), dtype=torch.uint8),
        game_id=torch.arange(number) % 2,
        uniform=torch.full((number,), uniform, dtype=torch.float64),
        batch_size=[number],
    )


class Logits(torch.nn.Module):
    """The same 18 outputs for every observation."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values))

    def forward(self, observation):
        return self.values.expand(len(observation), -1)


def logits_actor(values):
    return QValueActor(
        TensorDictModule(Logits(values), ["observation"], ["action_value"]), spec=Categorical(len(values))
    )


def test_random_and_constant():
    assert RandomPolicy(GAMES)(batch(4, uniform=0.99))["action"].tolist() == [5, 4, 5, 4]
    assert RandomPolicy(GAMES)(batch(4, uniform=0.0))["action"].tolist() == [0, 0, 0, 0]
    assert ConstantPolicy(7)(batch(3))["action"].tolist() == [7, 7, 7]


def test_other_action_sets_are_refused():
    with pytest.raises(ValueError, match=r"full set of 18 actions .* but its action spec has 4"):
        check_action_set(NetworkPolicy(logits_actor([0.0] * 4), GAMES))
    with pytest.raises(ValueError, match="got a one-hot spec"):
        check_action_set(QValueActor(torch.nn.Linear(2, 18), in_keys=["observation"], spec=OneHot(18)))
    check_action_set(torch.nn.Linear(2, 18))  # says nothing of its actions: checked as it plays
