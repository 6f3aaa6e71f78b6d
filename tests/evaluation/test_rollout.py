from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrl_sql.config import EvaluationConfig
from torchrl_sql.envs import AtariVector
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.evaluation.evaluate import evaluate
from torchrl_sql.evaluation.rollout import _choose, _draw, constant_policy, episode_seed, random_policy, rollout
from torchrl_sql.games import legal_action_mask

SHORT = {"max_env_frames_per_episode": 240}


def key(result):
    return (result.game, result.episode, result.episode_seed, result.episode_return, result.length_agent_steps)


def test_constant_policy_plays_as_the_emulator_does_alone():
    (result,) = rollout(
        constant_policy(2), ["Freeway"], [("Freeway", 3)], epsilon=0.0, seed=5, record=lambda *_: True, **SHORT
    )
    vector = AtariVector("Freeway", 1, **SHORT)
    observation = vector.reset(np.array([episode_seed(5, "Freeway", 3)]))
    total, frames = 0.0, []
    truncated = np.array([False])
    while not truncated[0]:
        frames.append(observation[0, -1].copy())
        observation, reward, _, truncated = vector.step(np.array([2]))
        total += reward[0]
    assert result.episode_return == total
    assert result.length_agent_steps == len(frames) == 60
    assert result.truncated and not result.terminated
    np.testing.assert_array_equal(np.stack(result.frames), np.stack(frames))
    assert sum(result.rewards) == total and set(result.values) == {1.0}


def test_an_episode_does_not_depend_on_what_else_is_played():
    games = ["Breakout", "Freeway"]
    episodes = [(game, episode) for episode in range(3) for game in games]

    def play(**settings):
        return {
            key(r)
            for r in rollout(
                random_policy, games, settings.pop("episodes", episodes), decoding="sampled", **settings, **SHORT
            )
        }

    parallel = play()
    assert len(parallel) == 6
    assert play(max_parallel=1) == parallel
    assert play(max_parallel=3) == parallel
    assert play(episodes=[("Freeway", 2)]) < parallel
    assert play(seed=1).isdisjoint(parallel)


def test_choices_follow_preferences_exploration_and_the_mask():
    legal = legal_action_mask(["Freeway"]).expand(4, -1)  # NOOP, UP, DOWN
    preference = torch.zeros(4, 18, dtype=torch.float64)
    preference[:, 5] = 1.0
    preference[~legal] = -torch.inf
    noise = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.999, 0.0]], dtype=torch.float64)
    chosen = _choose(preference, legal, noise, decoding="greedy", epsilon=0.1)
    assert chosen.tolist() == [5, 0, 2, 5]


def test_sampling_has_the_softmax_frequencies():
    probability = torch.tensor([0.2, 0.0, 0.5, 0.3]).expand(20_000, -1)
    drawn = _draw(probability, torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(drawn.bincount(minlength=4) / 20_000, [0.2, 0.0, 0.5, 0.3], atol=0.015)
    assert _draw(probability[:1], torch.tensor([1.0 - 1e-16], dtype=torch.float64)).item() == 3


def test_bad_settings_are_refused_before_playing():
    with pytest.raises(ValueError, match=r"policy's games \(Pong\), got Breakout"):
        next(rollout(random_policy, ["Pong"], [("Breakout", 0)]))
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], got 2"):
        next(rollout(random_policy, ["Pong"], [("Pong", 0)], epsilon=2))
    with pytest.raises(ValueError, match="decoding must be greedy or sampled"):
        next(rollout(random_policy, ["Pong"], [("Pong", 0)], decoding="best"))


def test_an_interrupted_evaluation_continues(tmp_path):
    def run(name, num_episodes, epsilon=0.001):
        protocol = EvaluationConfig(
            num_episodes_per_game=num_episodes,
            epsilon=epsilon,
            sticky_action_probability=0.25,
            max_env_frames_per_episode=240,
            seed=0,
        )
        table = tmp_path / f"{name}.csv"
        evaluate(random_policy, ["Breakout"], protocol, table, agent="a", seed=0, gradient_step=7, decoding="sampled")
        return sorted(read_episodes(table), key=lambda row: row.episode)

    whole = run("whole", 4)
    run("parts", 2)
    assert run("parts", 4) == whole and [row.episode for row in whole] == [0, 1, 2, 3]
    before = (tmp_path / "parts.csv").read_bytes()
    run("parts", 4)
    assert (tmp_path / "parts.csv").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds episodes of a \(sampled\) at"):
        run("parts", 4, epsilon=0.5)
