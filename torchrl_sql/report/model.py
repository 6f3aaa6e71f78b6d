"""What a report is made of: plain data that the composition layer fills in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchrl_sql.evaluation.episodes import CalibrationPoint, Decoding, EpisodeResult
from torchrl_sql.games import ACTION_NAMES, resolve_games
from torchrl_sql.statistics.aggregates import NUM_RESAMPLES, Interval

Role = Literal["method", "bc_greedy", "bc_sampled", "other"]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An evaluated agent: which rows of the episode table are its own, and how the report speaks of it.

    Attributes:
        agent, decoding (str): select its rows.
        label (str): short name on the page, e.g. ``"Scaled QL"``.
        role (str): the first ``"method"`` is the one that findings compare with the others, the first
            ``"bc_greedy"`` the one that plots of many games show beside it.
        num_parameters (int, optional): for the plot of score against size, drawn from two sizes on.
    """

    agent: str
    label: str
    role: Role
    decoding: Decoding = "greedy"
    num_parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReturnSummary:
    """Mean and standard deviation (of single episodes) of raw episode returns."""

    mean: float
    std: float
    num_episodes: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std >= 0 and self.num_episodes >= 1):
            raise ValueError(f"a summary needs a finite mean, std >= 0 and at least one episode, got {self}")

    @property
    def interval(self) -> Interval:
        """The mean with its normal 95% interval."""
        half_width = 1.96 * self.std / math.sqrt(self.num_episodes)
        return Interval(self.mean, self.mean - half_width, self.mean + half_width)


@dataclass(frozen=True, kw_only=True)
class GameData:
    """The data of one game and what simple policies score in it.

    Attributes:
        game (str): name of the game.
        behaviour_text (str): how the data was made, in a sentence or two.
        num_transitions, num_episodes (int): size of the data; episodes whose end it does not show are not counted.
        bytes_per_transition (float): on disk, everything included.
        rewards (str): ``"raw"``, or ``"clipped"`` where raw returns were never recorded: the data's returns then cannot
            be compared with game scores, and the report says so instead of comparing.
        behaviour (ReturnSummary, optional): returns of these episodes; None if there is none.
        behaviours (mapping): behaviour -> returns of its episodes.
        constant_actions (mapping): action name -> returns of always taking it; may be empty.
        action_counts (sequence of int): how often each of the 18 actions occurs.
    """

    game: str
    behaviour_text: str
    num_transitions: int
    num_episodes: int
    bytes_per_transition: float
    behaviour: ReturnSummary | None
    behaviours: Mapping[str, ReturnSummary]
    action_counts: Sequence[int]
    constant_actions: Mapping[str, ReturnSummary] = field(default_factory=dict)
    rewards: Literal["raw", "clipped"] = "raw"

    def __post_init__(self) -> None:
        if len(self.action_counts) != len(ACTION_NAMES):
            raise ValueError(
                f"action_counts of {self.game} must have {len(ACTION_NAMES)} entries, got {len(self.action_counts)}"
            )

    @property
    def best_behaviour(self) -> tuple[str, ReturnSummary] | None:
        """The behaviour with the highest mean return, None with fewer than two behaviours."""
        return max(self.behaviours.items(), key=lambda item: item[1].mean) if len(self.behaviours) > 1 else None

    @property
    def best_constant_action(self) -> tuple[str, ReturnSummary] | None:
        """The constant action with the highest mean return, None if none was tried."""
        return max(self.constant_actions.items(), key=lambda item: item[1].mean) if self.constant_actions else None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training metric of one run against gradient steps; ``metric`` is the panel's title, with its unit."""

    agent: str
    label: str
    metric: str
    seed: int
    gradient_steps: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.gradient_steps) != len(self.values):
            raise ValueError(
                f"curve {self.metric!r} of {self.agent!r} needs as many values as gradient steps, "
                f"got {len(self.values)} and {len(self.gradient_steps)}"
            )


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A gameplay clip: the bytes of an animated GIF or an MP4."""

    game: str
    caption: str
    data: bytes
    mime: Literal["image/gif", "video/mp4"] = "image/gif"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title (str): of the page.
        introduction (sequence of str): paragraphs on what was run and why.
        games (sequence of str): the games, in the order shown; every agent needs episodes of each.
        agents (sequence of Agent): at least one with role ``"method"``.
        episodes (sequence of EpisodeResult): of all agents. Those at an agent's last gradient step are its scores;
            earlier ones make its learning curve.
        calibration (sequence of CalibrationPoint): predicted values and what followed; may be empty.
        game_data (sequence of GameData): at most one a game; a game without is shown without.
        curves, clips: may be empty.
        settings (mapping): title -> resolved settings (nested mappings are flattened).
        caveats (sequence of str): what a careful reader must know, beside what the report finds out by itself.
        versions (mapping): software and machine, name -> version.
        num_resamples, bootstrap_seed (int): of the intervals.
    """

    title: str
    introduction: Sequence[str]
    games: Sequence[str]
    agents: Sequence[Agent]
    episodes: Sequence[EpisodeResult]
    calibration: Sequence[CalibrationPoint] = ()
    game_data: Sequence[GameData] = ()
    curves: Sequence[Curve] = ()
    clips: Sequence[Clip] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    num_resamples: int = NUM_RESAMPLES
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        resolve_games(self.games)
        labels = [agent.label for agent in self.agents]
        if len(set(labels)) != len(labels):
            raise ValueError(f"agents must have distinct labels, got {labels}")
        if not any(agent.role == "method" for agent in self.agents):
            raise ValueError(f"one agent must have the role 'method', got {[(a.label, a.role) for a in self.agents]}")
        for name, items in (("game_data", self.game_data), ("clips", self.clips)):
            unknown = [item.game for item in items if item.game not in self.games]
            if unknown:
                raise ValueError(f"{name} names {unknown}, which are not among the report's games {list(self.games)}")
        if len({data.game for data in self.game_data}) != len(self.game_data):
            raise ValueError(f"game_data must be one a game, got {[data.game for data in self.game_data]}")
