"""What a report is made of: plain data that the composition layer fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrl_sql.evaluation.episodes import CalibrationPoint, Decoding, EpisodeResult
from torchrl_sql.evaluation.probing import ProbeResult
from torchrl_sql.games import ACTION_NAMES, resolve_games
from torchrl_sql.statistics.intervals import Interval, student
from torchrl_sql.statistics.scores import Array


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An evaluated agent: which rows of the episode table are its own, and how the report speaks of it.

    Attributes:
        agent (str): its name in the table.
        label (str): short name on the page, e.g. ``"Scaled QL"``.
        decoding ("greedy" or "sampled"): with the name, selects its rows.
        num_parameters (int, optional): of its network.
        x (float, optional): its place on the page's axis, see :attr:`ReportData.x`.
        family (str, optional): what agents that differ in ``x`` only have in common, e.g. ``"BC"``: a line joins their
            scores, and they are not compared with one another.
        agent_steps_per_gradient_step (float, optional): that it played while it learned; None if it learned offline.
    """

    agent: str
    label: str
    decoding: Decoding = "greedy"
    num_parameters: int | None = None
    x: float | None = None
    family: str | None = None
    agent_steps_per_gradient_step: float | None = None


@dataclass(frozen=True, eq=False)
class Returns:
    """Episode returns of what is not trained: the data, or a fixed policy.

    Attributes:
        values (array): float64 ``[E]``, raw, finite, at least one.
    """

    values: Array

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values) or not np.isfinite(self.values).all():
            raise ValueError(f"returns must be finite numbers [E], at least one, got {self.values}")

    @property
    def mean(self) -> float:
        """Over episodes."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Of single episodes; 0 of one."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def num_episodes(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def interval(self) -> Interval:
        """The mean with Student's 95% interval over episodes."""
        point, low, high = (float(value) for value in student(self.values))
        return Interval(point, low, high, "episodes")


@dataclass(frozen=True, kw_only=True)
class GameData:
    """The data of one game.

    Attributes:
        game (str): name of the game.
        behaviour_text (str): how the data was made, in a sentence or two.
        num_transitions (int): size of the data.
        num_episodes (int): likewise; episodes whose end it does not show are not counted.
        bytes_per_transition (float): on disk, everything included.
        rewards (str): ``"raw"``, or ``"clipped"`` where raw returns were never recorded: the data's returns then cannot
            be compared with game scores, and the report says so instead of comparing.
        behaviour (Returns, optional): returns of these episodes; None if there is none.
        behaviours (mapping): behaviour -> returns of its episodes.
        action_counts (sequence of int): how often each of the 18 actions occurs.
    """

    game: str
    behaviour_text: str
    num_transitions: int
    num_episodes: int
    bytes_per_transition: float
    behaviour: Returns | None
    behaviours: Mapping[str, Returns]
    action_counts: Sequence[int]
    rewards: Literal["raw", "clipped"] = "raw"

    def __post_init__(self) -> None:
        if len(self.action_counts) != len(ACTION_NAMES):
            raise ValueError(
                f"action_counts of {self.game} must have {len(ACTION_NAMES)} entries, got {len(self.action_counts)}"
            )

    @property
    def best_behaviour(self) -> tuple[str, Returns] | None:
        """The behaviour with the highest mean return, None with fewer than two behaviours."""
        return max(self.behaviours.items(), key=lambda item: item[1].mean) if len(self.behaviours) > 1 else None


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
class Picture:
    """A PNG; ``name`` is its file's, without the ending."""

    name: str
    title: str
    caption: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title (str): of the page.
        introduction (sequence of str): paragraphs on what was run and why.
        games (sequence of str): the games, in the order shown. An agent that lacks some is left out of aggregates.
        agents (sequence of Agent): at least one.
        main (str): label of the agent that the page is about; by default the first.
        absent (str, optional): name of the agent that the page is about, if it has no scores: then none is compared.
        against (sequence of str, optional): labels of the agents that findings compare it with; by default all others
            outside its family; of another family, the one that has the main agent's place: its value of the setting,
            or its rank among as many sizes.
        pairs (sequence of two str): labels of further agents that findings compare, one with the other.
        x (str, optional): what agents of a family differ in along an axis, e.g. ``"parameters"``.
        step (int, optional): gradient steps at which trained agents are compared; by default the last of each at which
            all its seeds were evaluated in all its games.
        aggregate (bool): whether there are aggregates of fewer than five games too.
        episodes (sequence of EpisodeResult): of all agents. Those at the step compared are an agent's scores; all make
            its learning curve.
        calibration (sequence of CalibrationPoint): predicted values and what followed; may be empty.
        game_data (sequence of GameData): at most one per game; a game without is shown without.
        constant_actions (mapping): game -> action name -> returns of always taking it; may be empty.
        curves, clips: may be empty.
        probes (ProbeResult, optional): what is read from encoders.
        reconstructions (sequence of Picture): of masked auto-encoders; may be empty.
        settings (mapping): title -> resolved settings (nested mappings are flattened).
        caveats (sequence of str): what a careful reader must know, beside what the report finds out by itself.
        versions (mapping): software and machine, name -> version.
        sources (sequence of Path): what the page is made of; a page made of something else is not overwritten.
        made (mapping): what made the page: command, date, commit, machine.
    """

    title: str
    introduction: Sequence[str]
    games: Sequence[str]
    agents: Sequence[Agent]
    episodes: Sequence[EpisodeResult]
    main: str = ""
    absent: str | None = None
    against: Sequence[str] | None = None
    pairs: Sequence[tuple[str, str]] = ()
    x: str | None = None
    step: int | None = None
    aggregate: bool = False
    calibration: Sequence[CalibrationPoint] = ()
    game_data: Sequence[GameData] = ()
    constant_actions: Mapping[str, Mapping[str, Returns]] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    clips: Sequence[Clip] = ()
    probes: ProbeResult | None = None
    reconstructions: Sequence[Picture] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    sources: Sequence[Path] = ()
    made: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolve_games(self.games)
        labels = [agent.label for agent in self.agents]
        if len(set(labels)) != len(labels):
            raise ValueError(f"agents must have distinct labels, got {labels}")
        named = [*(self.against or ()), *([self.main] if self.main else []), *chain(*self.pairs)]
        if not labels or not set(named) <= set(labels):
            raise ValueError(f"main and against must be among the labels of the agents {labels}, got {named}")
        for name, items in (("game_data", self.game_data), ("clips", self.clips)):
            unknown = [item.game for item in items if item.game not in self.games]
            if unknown:
                raise ValueError(f"{name} names {unknown}, which are not among the report's games {list(self.games)}")
        if len({data.game for data in self.game_data}) != len(self.game_data):
            raise ValueError(f"game_data must be one per game, got {[data.game for data in self.game_data]}")
