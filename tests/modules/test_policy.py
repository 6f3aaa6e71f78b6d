from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical
from torchrl.modules import QValueActor

from torchrl_sql.modules import NetworkPolicy, make_q_actor, sample_index

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


def test_greedy_takes_the_best_legal_action():
    values = [0.0] * 18
    values[1], values[3], values[5], values[17] = 4.0, 5.0, 3.0, 9.0
    out = NetworkPolicy(logits_actor(values), GAMES)(batch())
    assert out["action"].tolist() == [5, 3, 5, 3]  # Freeway: DOWN; Breakout: RIGHT; never 17
    assert out["action_value"].tolist() == [values] * 4


def test_sampling_has_the_softmax_frequencies_of_legal_actions():
    values = [0.0] * 18
    values[2], values[9] = np.log(3.0), 50.0
    policy = NetworkPolicy(logits_actor(values), ["Freeway"], decoding="sampled")
    state = batch(2_000)
    state["game_id"][:] = 0
    state["uniform"] = torch.rand(2_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = policy(state)["action"].bincount(minlength=18) / 2_000
    np.testing.assert_allclose(counts[[0, 2, 5]], [0.2, 0.6, 0.2], atol=0.04)
    assert counts.sum() == counts[[0, 2, 5]].sum()


def test_an_index_is_drawn_by_hand():
    weight = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    for uniform, action in ((0.0, 1), (0.66, 1), (0.67, 3), (1.0 - 2.0**-53, 3)):
        assert sample_index(weight, torch.tensor([uniform], dtype=torch.float64)).item() == action


def test_value_of_a_distribution_is_its_expectation():
    actor = make_q_actor(GAMES, encoder="resnet_small", num_atoms=3, v_min=-1.0, v_max=2.0).eval()
    state = batch()
    log_probs = actor(state.clone())["action_value"]
    expected = (log_probs.exp() * torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1)).sum(1)
    torch.testing.assert_close(NetworkPolicy(actor, GAMES)(state)["action_value"], expected)


def test_a_policy_moves_with_all_it_needs():
    actor = make_q_actor(GAMES, encoder="resnet_small", num_atoms=3, v_min=-1.0, v_max=2.0).eval()
    policy = NetworkPolicy(actor, GAMES).to("meta")
    for module in policy.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in [*policy.parameters(), *policy.buffers()]} == {"meta"}


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="must be finite, got NaN or infinity"):
        NetworkPolicy(logits_actor([0.0] * 17 + [float("nan")]), GAMES)(batch())


def test_a_policy_says_which_games_it_has():
    actor = make_q_actor(GAMES, encoder="resnet_small")
    assert NetworkPolicy(actor, ["Freeway-m0", "Breakout"]).games == tuple(GAMES)
    with pytest.raises(ValueError, match="games must be the actor's 2, got 1: Pong"):
        NetworkPolicy(actor, ["Pong"])


def test_unknown_decoding_is_refused():
    with pytest.raises(ValueError, match="decoding must be 'greedy' or 'sampled', got 'best'"):
        NetworkPolicy(logits_actor([0.0] * 18), GAMES, decoding="best")
