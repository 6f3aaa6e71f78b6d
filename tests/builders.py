"""Rows of the tables, and what else tests need many of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from torchrl_sql.evaluation.episodes import CalibrationPoint, EpisodeResult
from torchrl_sql.report import Returns


def episode(agent: str = "ours", game: str = "Breakout", value: float = 1.0, **changes: object) -> EpisodeResult:
    """A row of scores.csv."""
    fields: dict[str, object] = {
        "seed": 0, "episode": 0, "episode_seed": 0, "length_agent_steps": 9, "terminated": True, "truncated": False,
        "gradient_step": 100, "epsilon": 0.001, "sticky": 0.25, "max_env_frames": 108_000, "decoding": "greedy",
    }  # fmt: skip
    return EpisodeResult(agent=agent, game=game, episode_return=float(value), **(fields | changes))


def episodes(agent: str, game: str, returns: Iterable[float], **changes: object) -> list[EpisodeResult]:
    """An agent's episodes 0, 1, ... of a game."""
    return [
        episode(agent, game, value, **{"episode": index, "episode_seed": index} | changes)
        for index, value in enumerate(returns)
    ]


def calibration_point(agent: str = "ours", game: str = "Pong", **changes: object) -> CalibrationPoint:
    """A row of calibration.csv."""
    fields: dict[str, object] = {
        "gradient_step": 100, "seed": 0, "episode_seed": 0, "agent_step": 0, "predicted_value": 1.0,
        "discounted_return": 2.0, "truncated": False,
    }  # fmt: skip
    return CalibrationPoint(agent=agent, game=game, **(fields | changes))


def returns(mean: float, std: float = 0.0, num_episodes: int = 16) -> Returns:
    """An even number of returns with this mean and standard deviation."""
    reach = std * np.sqrt((num_episodes - 1) / num_episodes)
    return Returns(mean + reach * np.tile([1.0, -1.0], num_episodes // 2))
