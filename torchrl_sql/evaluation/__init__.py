"""Agents play in the emulator; every finished episode is kept in a table."""

from torchrl_sql.evaluation.episodes import (
    CalibrationPoint,
    EpisodeResult,
    read_calibration,
    read_episodes,
    returns_of,
)
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy
from torchrl_sql.evaluation.protocol import AgentId, Protocol, Share
from torchrl_sql.evaluation.runner import evaluate

__all__ = [
    "AgentId",
    "CalibrationPoint",
    "ConstantPolicy",
    "EpisodeResult",
    "Protocol",
    "RandomPolicy",
    "Share",
    "evaluate",
    "read_calibration",
    "read_episodes",
    "returns_of",
]
