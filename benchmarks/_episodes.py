"""Episodes of a random policy with repeated actions, for the benchmarks of the buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.games import GAMES

EIGHT_GAMES = ("Pong", "Breakout", "Seaquest", "SpaceInvaders", "BeamRider", "Qbert", "Enduro", "UpNDown")
"""From nearly still pictures to nearly none that repeats."""

REPEAT_PROBABILITY = 0.6
"""Probability of repeating the last action: 2.5 agent steps an action on average."""


@dataclass
class Episode:
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def play(game: str, *, seed: int = 0, max_steps: int = 27_000) -> Iterator[Episode]:
    """Whole episodes without end, frames ``[T + 1, 84, 84]``; those of ``max_steps`` are truncated."""
    rng = np.random.default_rng(seed)
    legal = np.array(GAMES[game].minimal_actions)
    vector = AtariVector(game, 1, Emulator(max_env_frames=4 * max_steps))
    while True:
        frames, actions, rewards, done, action = [], [], [], False, int(rng.choice(legal))
        frames.append(vector.reset(rng.integers(0, 2**31, 1))[0, -1].copy())
        while not done:
            if rng.random() >= REPEAT_PROBABILITY:
                action = int(rng.choice(legal))
            observation, reward, terminated, truncated = vector.step(np.array([action]))
            frames.append(observation[0, -1].copy())
            actions.append(action)
            rewards.append(float(reward[0]))
            done = bool(terminated[0] or truncated[0])
        yield Episode(np.stack(frames), np.array(actions), np.array(rewards), bool(terminated[0]))
