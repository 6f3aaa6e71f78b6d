"""What evaluation leaves behind: a row per episode (``scores.csv``), and predicted values beside what followed."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchrl_sql.envs import Emulator
from torchrl_sql.evaluation.protocol import DECODINGS, AgentId, Decoding
from torchrl_sql.evaluation.tables import read_table
from torchrl_sql.statistics.scores import RunReturns

SCORES = "scores.csv"
"""File name of the table of episodes."""
EVALUATION_VERSIONS = "evaluation_versions.json"
"""File name of the versions and machines that played; with parts, like the tables."""
CALIBRATION = "calibration.csv"
"""File name of the table of predicted values."""


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One finished episode of one agent in one game.

    Attributes:
        agent (str): name of the :class:`AgentId`, whose other fields are columns too.
        seed (int): its training seed.
        game (str): name as :func:`torchrl_sql.games.find_game` takes it.
        episode (int): number of the episode within (agent, decoding, gradient step, seed, game), from 0.
        episode_seed (int): emulator seed; decided by the evaluation seed, the game and the episode's number.
        episode_return (float): sum of the raw, unclipped game rewards.
        length_agent_steps (int): decisions taken; one is four emulator frames.
        terminated (bool): the game was over.
        truncated (bool): the episode was cut at the frame limit.
        gradient_step (int): of the agent.
        epsilon (float): of the :class:`Protocol`.
        sticky (float): sticky-action probability of its emulator.
        max_env_frames (int): frame limit of its emulator.
        decoding (str): of the agent.
        evaluation_seed (int): seed of the protocol.
        checkpoint (str): of the agent.

    Raises:
        ValueError: if the return is not finite, the episode has not ended, or a value is out of its range.
    """

    agent: str
    seed: int
    game: str
    episode: int
    episode_seed: int
    episode_return: float
    length_agent_steps: int
    terminated: bool
    truncated: bool
    gradient_step: int
    epsilon: float
    sticky: float
    max_env_frames: int
    decoding: Decoding
    evaluation_seed: int = 0
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if not self.agent or not self.game:
            raise ValueError(f"agent and game must be named, got agent={self.agent!r}, game={self.game!r}")
        if len((self.agent + self.checkpoint).splitlines()) > 1:
            raise ValueError(f"agent and checkpoint must be one line, got {self.agent!r} and {self.checkpoint!r}")
        if not math.isfinite(self.episode_return):
            raise ValueError(f"episode_return must be finite, got {self.episode_return}")
        for name in ("length_agent_steps", "max_env_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.terminated or self.truncated):
            raise ValueError("an episode must be terminated or truncated: an unfinished one has no return yet")
        for name in ("episode", "gradient_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("epsilon", "sticky"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {self.decoding!r}")

    @property
    def key(self) -> tuple[str, str, int, int, str, int]:
        """Which episode it is: a table has at most one result of it."""
        return (*self.agent_id.key, self.game, self.episode)

    @property
    def agent_id(self) -> AgentId:
        """Who played it."""
        return AgentId(
            name=self.agent,
            training_seed=self.seed,
            gradient_step=self.gradient_step,
            decoding=self.decoding,
            checkpoint=self.checkpoint,
        )

    @property
    def emulator(self) -> Emulator:
        """How its game ran."""
        return Emulator(sticky_action_probability=self.sticky, max_env_frames=self.max_env_frames)


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """What a network predicted at one step of an evaluation episode, and what came of it.

    Recorded at an episode's first step and every 50th, for greedy agents whose outputs are values.

    Attributes:
        agent (str): whose episode, as in :class:`EpisodeResult`.
        gradient_step (int): likewise.
        seed (int): likewise.
        game (str): likewise.
        episode_seed (int): likewise.
        agent_step (int): decisions taken before this one.
        predicted_value (float): Q of the action taken there (its greedy one, save at exploration steps), in the units
            of training: clipped rewards, discounted.
        discounted_return (float): sum of the rewards from this step to the episode's end, each clipped to [-1, 1] and
            discounted with the gamma of training.
        truncated (bool): the episode was cut at the frame limit, so that its return lacks what would have followed.

    Raises:
        ValueError: if a value is not finite or the step is negative.
    """

    agent: str
    gradient_step: int
    seed: int
    game: str
    episode_seed: int
    agent_step: int
    predicted_value: float
    discounted_return: float
    truncated: bool

    def __post_init__(self) -> None:
        for name in ("predicted_value", "discounted_return"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.agent_step < 0:
            raise ValueError(f"agent_step must not be negative, got {self.agent_step}")

    @property
    def key(self) -> tuple[str, int, int, str, int, int]:
        """Which step of which episode it is: a table has at most one prediction of it."""
        return (self.agent, self.gradient_step, self.seed, self.game, self.episode_seed, self.agent_step)


def read_episodes(path: str | os.PathLike[str]) -> list[EpisodeResult]:
    """Reads an episode table and the parts that parallel evaluations left beside it: sorted, each episode once.

    A half-written last line, of an evaluation at work or killed, is left out with a warning.

    Raises:
        FileNotFoundError: if neither ``path`` nor a part of it exists.
        ValueError: if a file is empty or has other columns, a value is missing, malformed, NaN or out of
            its range, or two results of one episode differ; the message names file, line and column.
    """
    return read_table(Path(path), EpisodeResult, lambda row: row.key)


def read_calibration(path: str | os.PathLike[str]) -> list[CalibrationPoint]:
    """Reads a table of predicted values, as :func:`read_episodes` reads one of episodes."""
    return read_table(Path(path), CalibrationPoint, lambda row: row.key)


def returns_of(
    episodes: Iterable[EpisodeResult],
    *,
    agent: str,
    decoding: Decoding,
    games: Sequence[str] | None = None,
    gradient_step: int | None = None,
) -> RunReturns:
    """One agent's returns at one gradient step, which all its seeds and games must have reached.

    The order of the rows does not matter.

    Args:
        episodes (iterable of EpisodeResult): rows, of any agents.

    Keyword Args:
        agent (str): whose rows to take.
        decoding (str): ``"greedy"`` or ``"sampled"`` rows.
        games (sequence of str, optional): games and their order; by default all the agent has, alphabetically.
        gradient_step (int, optional): of the checkpoints; by default the last one evaluated.

    Raises:
        ValueError: if there are no such rows, a (seed, game) pair has no episode, an episode is listed twice,
            a seed's come from different checkpoints, or epsilon, the sticky probability or the frame limit differ
            among the rows.
    """
    rows = [row for row in episodes if row.agent == agent and row.decoding == decoding]
    if not rows:
        raise ValueError(f"there is no episode of agent {agent!r} with decoding {decoding!r}")
    seeds = sorted({row.seed for row in rows})
    if games is None:
        games = sorted({row.game for row in rows})
    if len(set(games)) != len(games) or not games:
        raise ValueError(f"games must be distinct and at least one, got {tuple(games)}")
    step = max(row.gradient_step for row in rows) if gradient_step is None else gradient_step
    rows = [row for row in rows if row.gradient_step == step and row.game in games]
    who = f"{agent!r} ({decoding}) at gradient step {step}"
    _check_alike(rows, who)
    returns: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        run = returns[row.seed, row.game]
        if row.episode in run:
            raise ValueError(f"episode {row.episode} of {who}, seed {row.seed}, game {row.game}, is listed twice")
        run[row.episode] = row.episode_return
    missing = [(seed, game) for seed in seeds for game in games if not returns[seed, game]]
    if missing:
        seed, game = missing[0]
        raise ValueError(
            f"{who} has no episode of seed {seed} in {game}"
            + (f", nor for {len(missing) - 1} other (seed, game) pairs" if len(missing) > 1 else "")
            + "; evaluate it there, or choose the games that all have"
        )
    counts = np.array([[len(returns[seed, game]) for game in games] for seed in seeds], dtype=np.int64)
    values = np.full((*counts.shape, int(counts.max())), np.nan)
    for s, seed in enumerate(seeds):
        for g, game in enumerate(games):
            run = returns[seed, game]
            values[s, g, : len(run)] = [run[episode] for episode in sorted(run)]
    trained = any(row.gradient_step or row.checkpoint for row in rows)
    return RunReturns(games=tuple(games), seeds=tuple(seeds), values=values, counts=counts, trained=trained)


def _check_alike(rows: Sequence[EpisodeResult], who: str) -> None:
    protocols = sorted({(row.epsilon, row.sticky, row.max_env_frames) for row in rows})
    if len(protocols) > 1:
        raise ValueError(f"episodes of {who} mix protocols (epsilon, sticky, frame limit): {protocols}")
    weights = {(row.seed, row.checkpoint) for row in rows}
    if len(weights) > len({seed for seed, _ in weights}):
        raise ValueError(f"episodes of {who} mix checkpoints of one seed: {sorted(weights)}")
