"""The episode table: one row per finished evaluation episode, and its CSV file (``runs/<name>/scores.csv``)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Decoding = Literal["greedy", "sampled"]
"""How an action is taken from the network's output: its argmax, or a draw from its softmax."""


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One finished episode of one agent in one game.

    Attributes:
        agent (str): which agent, e.g. ``"scaled_ql"``.
        seed (int): training seed of the agent.
        game (str): name in :data:`torchrl_sql.games.GAMES`.
        episode (int): number of the episode within (agent, decoding, gradient step, seed, game), from 0.
        episode_seed (int): emulator seed.
        episode_return (float): sum of the raw, unclipped game rewards.
        length_agent_steps (int): decisions taken; one is ``frame_skip`` emulator frames.
        terminated (bool): the game was over.
        truncated (bool): the episode was cut at the frame limit.
        gradient_step (int): gradient steps the agent was trained for.
        epsilon (float): probability of a uniformly random action.
        sticky (float): probability that the emulator repeats the last action.
        max_env_frames (int): emulator frames at which an episode is cut.
        decoding (str): ``"greedy"`` or ``"sampled"``.

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

    def __post_init__(self) -> None:
        if not self.agent or not self.game:
            raise ValueError(f"agent and game must be named, got agent={self.agent!r}, game={self.game!r}")
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
        if self.decoding not in ("greedy", "sampled"):
            raise ValueError(f"decoding must be 'greedy' or 'sampled', got {self.decoding!r}")


COLUMNS = tuple(field.name for field in fields(EpisodeResult))


def write_episodes(path: str | os.PathLike[str], episodes: Iterable[EpisodeResult]) -> Path:
    """Writes an episode table as CSV, replacing ``path`` in one step (a killed writer leaves the old file).

    Floats are written so that reading gives them back bit for bit; booleans as ``true`` and ``false``.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for episode in episodes:
            writer.writerow([_to_text(getattr(episode, name)) for name in COLUMNS])
    os.replace(temporary, path)
    return path


def read_episodes(path: str | os.PathLike[str]) -> list[EpisodeResult]:
    """Reads an episode table written by :func:`write_episodes`.

    Raises:
        ValueError: if the file is empty, its header is not exactly :data:`COLUMNS`, or a row has a missing, malformed,
            NaN or out-of-range value; the message names file, line and column.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path}: header must be {','.join(COLUMNS)}, got {','.join(header) or 'an empty file'}")
        episodes = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if len(row) != len(COLUMNS):
                raise ValueError(f"{where}: expected {len(COLUMNS)} values, got {len(row)}")
            values = {name: _from_text(name, text, where) for name, text in zip(COLUMNS, row, strict=True)}
            try:
                episodes.append(EpisodeResult(**values))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return episodes


def _to_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_text(name: str, text: str, where: str) -> Any:
    kind = EpisodeResult.__annotations__[name]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {name} must be {kind}, got {text!r}") from error
