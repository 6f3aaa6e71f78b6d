"""What a report is made of: plain data that the composition layer fills in, and the comparison of agents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torchrl_sql.evaluation.episodes import Decoding, EpisodeResult
from torchrl_sql.evaluation.scores import (
    NUM_RESAMPLES,
    Interval,
    Reference,
    RunReturns,
    aggregates,
    game_means,
    probability_of_improvement,
    split_by_reference,
)
from torchrl_sql.games import ACTION_NAMES, GAMES, resolve_games

Role = Literal["method", "bc_greedy", "bc_sampled", "other"]
Verdict = Literal["above", "overlap", "below"]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An evaluated agent: which rows of the episode table are its own, and how the report speaks of it.

    Attributes:
        agent, decoding (str): select its rows.
        label (str): short name on the page, e.g. ``"Scaled QL"``.
        role (str): the first ``"method"`` is the one that findings compare with the others.
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
        num_transitions, num_episodes (int): size of the data.
        bytes_per_transition (float): on disk, everything included.
        rewards (str): ``"raw"``, or ``"clipped"`` where raw returns were never recorded: the data's returns then cannot
            be compared with game scores, and the report says so instead of comparing.
        behaviour (ReturnSummary): returns of the data's episodes.
        components (mapping): behaviour component -> returns of its episodes.
        constant_actions (mapping): action name -> returns of always taking it; may be empty.
        action_counts (sequence of int): how often each of the 18 actions occurs.
    """

    game: str
    behaviour_text: str
    num_transitions: int
    num_episodes: int
    bytes_per_transition: float
    behaviour: ReturnSummary
    components: Mapping[str, ReturnSummary]
    action_counts: Sequence[int]
    constant_actions: Mapping[str, ReturnSummary] = field(default_factory=dict)
    rewards: Literal["raw", "clipped"] = "raw"

    def __post_init__(self) -> None:
        if len(self.action_counts) != len(ACTION_NAMES):
            raise ValueError(
                f"action_counts of {self.game} must have {len(ACTION_NAMES)} entries, got {len(self.action_counts)}"
            )

    @property
    def best_component(self) -> tuple[str, ReturnSummary] | None:
        """The behaviour component with the highest mean return, None with fewer than two components."""
        return max(self.components.items(), key=lambda item: item[1].mean) if len(self.components) > 1 else None

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
    """A gameplay clip: the bytes of an animated GIF, a PNG or an MP4."""

    game: str
    caption: str
    data: bytes
    mime: Literal["image/gif", "image/png", "video/mp4"] = "image/gif"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title (str): of the page.
        introduction (sequence of str): paragraphs on what was run and why.
        games (sequence of str): the games, in the order shown; every agent needs episodes of each.
        agents (sequence of Agent): at least one with role ``"method"``.
        episodes (sequence of EpisodeResult): of all agents; of each, those at its last gradient step are shown.
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


@dataclass(frozen=True)
class Analysis:
    """The statistics a report shows, computed once from its data."""

    data: ReportData

    @property
    def method(self) -> Agent:
        """The agent the others are compared with."""
        return next(agent for agent in self.data.agents if agent.role == "method")

    @cached_property
    def episodes(self) -> dict[str, list[EpisodeResult]]:
        """The episodes shown, by agent label: those of the report's games at the agent's last gradient step."""
        found = {}
        for agent in self.data.agents:
            rows = [e for e in self.data.episodes if e.agent == agent.agent and e.decoding == agent.decoding]
            last_step = max((e.gradient_step for e in rows), default=0)
            found[agent.label] = [e for e in rows if e.gradient_step == last_step and e.game in self.data.games]
        return found

    @cached_property
    def runs(self) -> dict[str, RunReturns]:
        """Raw returns by agent label, all with the report's games."""
        return {
            agent.label: RunReturns.from_episodes(
                self.data.episodes, agent=agent.agent, decoding=agent.decoding, games=self.data.games
            )
            for agent in self.data.agents
        }

    @cached_property
    def game_means(self) -> dict[str, dict[str, Interval]]:
        """``{label: {game: mean raw return with interval}}``."""
        options = {"num_resamples": self.data.num_resamples, "seed": self.data.bootstrap_seed}
        return {label: game_means(runs, **options) for label, runs in self.runs.items()}

    @cached_property
    def game_data(self) -> dict[str, GameData]:
        """The data by game."""
        return {data.game: data for data in self.data.game_data}

    def split(self, reference: Reference) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The report's games with and without such a reference score."""
        return split_by_reference(self.data.games, reference)

    def aggregates(self, reference: Reference) -> dict[str, dict[str, Interval]]:
        """``{label: {aggregate: interval}}`` over the games with such a reference score; empty if there are none."""
        if reference not in self._aggregates:
            games, _ = self.split(reference)
            options = {"num_resamples": self.data.num_resamples, "seed": self.data.bootstrap_seed}
            self._aggregates[reference] = {
                label: aggregates(runs.select(games).normalised(reference), **options)
                for label, runs in (self.runs if games else {}).items()
            }
        return self._aggregates[reference]

    @cached_property
    def _aggregates(self) -> dict[Reference, dict[str, dict[str, Interval]]]:
        return {}

    def policies(self, game: str) -> dict[str, tuple[Interval, int | None, str]]:
        """All that is known of one game's scores, ``{policy: (mean raw return, episodes, detail)}`` in column order.

        Agents come first, then the data and simple policies, then published scores (which have no interval here:
        ``low`` and ``high`` are NaN, and the number of episodes is None). What is unknown is left out.
        """
        found: dict[str, tuple[Interval, int | None, str]] = {}
        for label, means in self.game_means.items():
            runs = self.runs[label]
            found[label] = (means[game], int(runs.counts[:, runs.games.index(game)].sum()), "")
        data = self.game_data.get(game)
        if data is not None and data.rewards == "raw":
            found[BEHAVIOUR] = (data.behaviour.interval, data.behaviour.num_episodes, "")
            if data.best_component is not None:
                name, summary = data.best_component
                found[BEST_COMPONENT] = (summary.interval, summary.num_episodes, name)
        if data is not None and data.best_constant_action is not None:
            name, summary = data.best_constant_action
            found[BEST_CONSTANT] = (summary.interval, summary.num_episodes, f"always {name}")
        for label, score in ((RANDOM, GAMES[game].random_score), (HUMAN, GAMES[game].human_score)):
            if score is not None:
                found[label] = (Interval(score, math.nan, math.nan), None, "")
        return found

    @property
    def policy_columns(self) -> list[str]:
        """Every policy that :meth:`policies` knows in at least one game, in column order."""
        known = {policy for game in self.data.games for policy in self.policies(game)}
        order = [*(agent.label for agent in self.data.agents), BEHAVIOUR, BEST_COMPONENT, BEST_CONSTANT, RANDOM, HUMAN]
        return [policy for policy in order if policy in known]

    def probability_of_improvement(self, other: str) -> Interval:
        """Chance that a run of the method beats a run of another agent in the same game, by raw returns."""
        return probability_of_improvement(
            self.runs[self.method.label],
            self.runs[other],
            num_resamples=self.data.num_resamples,
            seed=self.data.bootstrap_seed,
        )

    def verdicts(self, other: str) -> dict[str, Verdict]:
        """How the method compares with another policy, game by game: by their 95% intervals, apart or overlapping."""
        return {
            game: compare(policies[self.method.label][0], policies[other][0])
            for game in self.data.games
            if other in (policies := self.policies(game))
        }


BEHAVIOUR = "Behaviour mean"
BEST_COMPONENT = "Best component"
BEST_CONSTANT = "Best constant"
RANDOM = "Random"
HUMAN = "Human"


def compare(ours: Interval, theirs: Interval) -> Verdict:
    """``"above"`` or ``"below"`` if the two 95% intervals are apart, ``"overlap"`` otherwise (touching counts)."""
    if ours.low > theirs.high:
        return "above"
    return "below" if ours.high < theirs.low else "overlap"
