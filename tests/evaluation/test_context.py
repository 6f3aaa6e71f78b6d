from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from torchrl_sql.envs import Emulator
from torchrl_sql.evaluation.rollout import rollout
from torchrl_sql.modules import DecisionTransformerPolicy, make_decision_transformer

SHORT = Emulator(max_env_frames=240)
GAMES = ["Breakout", "Freeway"]


class Spy(TensorDictModule):
    """Acts by its random number, and notes all that it is given at each step of a lone episode."""

    def __init__(self, context_steps: int = 0):
        super().__init__(lambda uniform: (18 * uniform).long(), ["uniform"], ["action"])
        self.seen = []
        if context_steps:
            self.context_steps = context_steps

    def forward(self, tensordict):
        self.seen.append(tensordict[0].clone())
        return super().forward(tensordict)


def test_a_context_is_what_happened():
    spy = Spy(context_steps=3)
    (result,) = rollout(spy, GAMES, [("Freeway", 1)], SHORT, epsilon=0.5, record=lambda *_: True)
    assert len(spy.seen) == result.length_agent_steps == 60
    for step, state in enumerate(spy.seen):
        first, known = max(0, step - 2), min(step + 1, 3)
        context = state["context"]
        assert context["mask"].tolist() == [True] * known + [False] * (3 - known)
        assert context["action"].tolist() == result.actions[first:step] + [0] * (4 - known)
        assert context["reward"][:, 0].tolist() == result.rewards[first:step] + [0] * (4 - known)
        for k in range(known):  # a step's frame is the newest of its stack
            assert torch.equal(context["observation"][k], spy.seen[first + k]["observation"][-1])
        assert not context["observation"][known:].any()


def test_numbers_for_returns_have_a_stream_of_their_own():
    """What agents without a context are given stays what it was."""
    plain, other = Spy(), Spy(context_steps=1)
    for spy in (plain, other):
        list(rollout(spy, GAMES, [("Freeway", 1)], SHORT))
    assert [s["uniform"] for s in plain.seen] == [s["uniform"] for s in other.seen]
    assert "context" not in plain.seen[0] and "return_uniform" not in plain.seen[0]
    drawn = np.array([float(s["return_uniform"]) for s in other.seen])
    assert len(set(drawn)) == 60 and 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() < 1
    assert set(drawn).isdisjoint(float(s["uniform"]) for s in other.seen)


@pytest.mark.parametrize("decoding", ["expert", "expert_128"])
def test_a_decision_transformer_plays_the_same_in_any_company(decoding):
    torch.manual_seed(0)
    network = make_decision_transformer(width=64, num_layers=1, patch_size=42).eval()
    policy = DecisionTransformerPolicy(network, GAMES, decoding=decoding)

    def play(episodes, **settings):
        played = rollout(policy, GAMES, episodes, SHORT, record=lambda *_: True, **settings)
        return {(r.game, r.episode, tuple(r.actions)) for r in played}

    together = play([(game, episode) for episode in range(2) for game in GAMES])
    assert len({actions for *_, actions in together}) == 4
    assert play([("Breakout", 1), ("Freeway", 0)], num_parallel=1) < together
