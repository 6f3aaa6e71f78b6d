"""The statistics of a report, each computed once from its data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from torchrl_sql.evaluation.episodes import EpisodeResult, returns_of
from torchrl_sql.games import find_game
from torchrl_sql.report.agents import PARAMETERS
from torchrl_sql.report.learning import LearningCurves
from torchrl_sql.report.model import Agent, GameData, ReportData, Returns
from torchrl_sql.report.selection import Selection, select
from torchrl_sql.statistics.calibration import Calibration, calibrate
from torchrl_sql.statistics.intervals import (
    Interval,
    Verdict,
    aggregate_differences,
    aggregates,
    difference_to,
    game_differences,
    game_means,
    probability_of_improvement,
    verdict,
)
from torchrl_sql.statistics.scores import (
    Array,
    PublishedAgent,
    Reference,
    RunReturns,
    published_agents,
    split_by_reference,
)

MANY_GAMES = 5
"""From so many games on, a report aggregates them and shows them together; fewer are shown one by one."""

ALL = "IQM"
"""Stands in the place of a game for the human-normalised interquartile mean over games."""
BEHAVIOUR = "Behaviour mean"
BEST_BEHAVIOUR = "Best behaviour"
BEST_CONSTANT = "Best constant"
RANDOM = "Random"
HUMAN = "Human"
DQN = "DQN"


class Score(NamedTuple):
    """What is known of a policy in a game.

    ``num_episodes`` is None for a published score, whose interval is unknown. ``returns`` ``[E]`` are those of a policy
    that is not trained, or the one published score; an agent's are in :attr:`Analysis.runs`.
    """

    mean: Interval
    num_episodes: int | None = None
    detail: str = ""
    returns: Array | None = None


class Line(NamedTuple):
    """Returns along an axis, of one agent at each of its complete checkpoints or of a family of agents."""

    label: str
    agent: Agent
    """Whose look it has."""
    runs: Mapping[float, RunReturns]


@dataclass(frozen=True)
class Analysis:
    """What a report shows of its data.

    Raises:
        ValueError: if the main agent has no episode that counts, or no agent has.
    """

    data: ReportData

    def __post_init__(self) -> None:
        if not self.selection or self.data.main not in ("", *self.selection):
            raise ValueError(
                f"{self.data.main or 'an agent'} must have a training seed that was evaluated in each of its games at "
                f"one gradient step, among {', '.join(self.data.games)}; evaluate it there, or choose with --games"
            )

    # Which episodes count

    @cached_property
    def selection(self) -> dict[str, Selection]:
        """By the label of agents that have some."""
        return select(self.data)

    @cached_property
    def agents(self) -> list[Agent]:
        """Those with episodes that count."""
        return [agent for agent in self.data.agents if agent.label in self.selection]

    @cached_property
    def episodes(self) -> dict[str, list[EpisodeResult]]:
        """The episodes that count, by agent label."""
        return {
            label: [row for row in which.rows if row.gradient_step == which.step and row.seed in which.seeds]
            for label, which in self.selection.items()
        }

    @cached_property
    def runs(self) -> dict[str, RunReturns]:
        """Raw returns by agent label, each with those of the report's games that the agent has.

        Raises:
            ValueError: if an agent's episodes are ambiguous.
        """
        return {agent.label: self._returns(agent, self.selection[agent.label].step) for agent in self.agents}

    def _returns(self, agent: Agent, gradient_step: int) -> RunReturns:
        which = self.selection[agent.label]
        return returns_of(
            [row for row in which.rows if row.seed in which.seeds],
            agent=agent.agent,
            decoding=agent.decoding,
            games=which.games,
            gradient_step=gradient_step,
        )

    # Who is compared with whom

    @cached_property
    def main(self) -> Agent:
        """The agent that the page is about."""
        return next(agent for agent in self.agents if self.data.main in ("", agent.label))

    @cached_property
    def against(self) -> list[Agent]:
        """The agents that findings compare the main one with."""
        others = [agent for agent in self.agents if agent != self.main]
        if self.data.against is not None:
            return [agent for label in self.data.against for agent in others if agent.label == label]
        strangers = {agent: self._place(agent) for agent in others if agent not in self.family}
        ours = self._place(self.main)
        return [agent for agent, place in strangers.items() if place is None or ours is None or place == ours]

    def _place(self, agent: Agent) -> tuple[float, ...] | None:
        """Its place on the axis, the same in different families if they are compared there: a setting's value; as
        methods have networks of different sizes, its rank among those of its family, and how many these are.
        """
        if agent.family is None or agent.x is None:
            return None
        if self.data.x != PARAMETERS:
            return (agent.x,)
        sizes = [other.x for other in self.data.agents if other.family == agent.family and other.x is not None]
        return sum(size < agent.x for size in sizes), len(sizes)

    @cached_property
    def unmatched(self) -> list[str]:
        """Families that the main agent is not compared with, as none of theirs is known to have its place."""
        if self.data.against is not None:
            return []
        compared = {agent.family for agent in (self.main, *self.against)}
        return [*dict.fromkeys(agent.family for agent in self.agents if agent.family and agent.family not in compared)]

    @cached_property
    def comparisons(self) -> list[tuple[Agent, Agent]]:
        """Whom findings compare: the main agent with each of :attr:`against`, then those of the page's further pairs
        that are not compared yet.
        """
        by_label = {agent.label: agent for agent in self.agents}
        compared = [(self.main, other) for other in self.against]
        for one, other in self.data.pairs:
            if {one, other} <= {*by_label} and {one, other} not in [{x.label, y.label} for x, y in compared]:
                compared.append((by_label[one], by_label[other]))
        return compared

    @property
    def family(self) -> list[Agent]:
        """The main agent's family, itself included, by place on the axis; empty if it has none."""
        return self.families.get(self.main.family or "", [])

    @cached_property
    def families(self) -> dict[str, list[Agent]]:
        """Agents that differ in :attr:`Agent.x` only, ascending; of two and more."""
        families: dict[str, list[Agent]] = defaultdict(list)
        for agent in self.agents:
            if agent.family is not None:
                families[agent.family].append(agent)
        return {
            name: sorted(agents, key=lambda agent: agent.x or 0.0)
            for name, agents in families.items()
            if len(agents) > 1
        }

    @property
    def many_games(self) -> bool:
        """Whether the games are shown together instead of one by one."""
        return len(self.data.games) >= MANY_GAMES

    @property
    def one_seed(self) -> bool:
        """Whether the main agent has one training seed, so that nothing can be said of its method."""
        runs = self.runs[self.main.label]
        return runs.trained and len(runs.seeds) == 1

    # Lines along an axis

    @cached_property
    def learning(self) -> LearningCurves:
        """Returns at gradient steps, of agents that were evaluated in full at two checkpoints or more."""
        steps = {agent: self.selection[agent.label].complete for agent in self.agents}
        runs = {
            agent: {step: self._returns(agent, step) for step in complete}
            for agent, complete in steps.items()
            if len(complete) > 1
        }
        return LearningCurves(runs, None if self.data.absent else self.main, self.against)

    @cached_property
    def learning_curves(self) -> list[Line]:
        """Those of :attr:`learning`, along its axis."""
        scale = self.learning.pace or 1.0
        return [
            Line(agent.label, agent, {scale * step: runs for step, runs in curve.items()})
            for agent, curve in self.learning.runs.items()
        ]

    @cached_property
    def lines(self) -> list[Line]:
        """Returns of each family along the page's axis."""
        return [
            Line(name, agents[-1], {agent.x or 0.0: self.runs[agent.label] for agent in agents})
            for name, agents in self.families.items()
        ]

    def along(self, lines: Sequence[Line]) -> dict[str, dict[str, dict[float, Interval]]]:
        """Scores of lines, ``{game: {line: {x: mean raw return}}}``; those of :data:`ALL` are human-normalised IQMs."""
        scores: dict[str, dict[str, dict[float, Interval]]] = {game: {} for game in (ALL, *self.data.games)}
        for line in lines:
            for x, runs in line.runs.items():
                for game, mean in self.scores_of(runs).items():
                    scores[game].setdefault(line.label, {})[x] = mean
        return {game: of_game for game, of_game in scores.items() if of_game}

    def scores_of(self, runs: RunReturns) -> dict[str, Interval]:
        """Mean return in each game, and the human-normalised IQM as that of :data:`ALL` if all its games are there."""
        whole = self.aggregate_games("human")
        scores = game_means(runs)
        if whole and {*whole} <= {*runs.games}:
            scores[ALL] = aggregates(runs.select(whole).normalised("human"))["IQM"]
        return scores

    def area_verdicts(self, other: str) -> dict[str, Verdict]:
        """How the main agent's area compares with another agent's in each game of both, and in :data:`ALL`."""
        pair = _in_common(self.learning.areas[self.main.label], self.learning.areas[other])
        if pair is None:
            return {}
        differences, whole = game_differences(*pair), self.aggregate_games("human")
        if whole and {*whole} <= {*pair[0].games}:
            ours, theirs = (runs.select(whole).normalised("human") for runs in pair)
            differences[ALL] = aggregate_differences(ours, theirs)["IQM"]
        return {game: verdict(difference) for game, difference in differences.items()}

    # Statistics

    @cached_property
    def calibration(self) -> dict[str, dict[str, Calibration]]:
        """``{label: {game: predicted against realised return}}`` at the same step; what is unknown is left out."""
        calibration: dict[str, dict[str, Calibration]] = defaultdict(dict)
        for agent in self.agents:
            if agent.decoding != "greedy":
                continue
            key = (agent.agent, self.selection[agent.label].step)
            of_agent = [
                point
                for point in self.data.calibration
                if (point.agent, point.gradient_step) == key and point.seed in self.selection[agent.label].seeds
            ]
            for game in self.data.games:
                if points := [point for point in of_agent if point.game == game]:
                    calibration[agent.label][game] = calibrate(
                        np.array([point.predicted_value for point in points]),
                        np.array([point.discounted_return for point in points]),
                        seeds=[point.seed for point in points],
                        episodes=[point.episode_seed for point in points],
                        cut=[point.truncated for point in points],
                    )
        return dict(calibration)

    @cached_property
    def game_means(self) -> dict[str, dict[str, Interval]]:
        """``{label: {game: mean raw return with interval}}``."""
        return {label: game_means(runs) for label, runs in self.runs.items()}

    def aggregate_games(self, reference: Reference) -> tuple[str, ...]:
        """The games that are aggregated: of the main agent's, or of the page's if that has no scores, those with such a
        reference score; none if they are few and nobody asked for aggregates.
        """
        of_page = self.data.games if self.data.absent else self.runs[self.main.label].games
        games, _ = split_by_reference(of_page, reference)
        return games if len(games) >= MANY_GAMES or self.data.aggregate else ()

    def normalised(self, reference: Reference) -> dict[str, RunReturns]:
        """Normalised returns over the games that are aggregated, by label of the agents that have all of them."""
        games = self.aggregate_games(reference)
        return {
            label: runs.select(games).normalised(reference)
            for label, runs in self.runs.items()
            if games and {*games} <= {*runs.games}
        }

    def aggregates(self, reference: Reference) -> dict[str, dict[str, Interval]]:
        """``{label: {aggregate: interval}}``; empty if nothing is aggregated."""
        return {label: aggregates(runs) for label, runs in self.normalised(reference).items()}

    def iqm_difference(self, label: str, other: str) -> Interval:
        """An agent's human-normalised interquartile mean minus another's; both have aggregates."""
        normalised = self.normalised("human")
        return aggregate_differences(normalised[label], normalised[other])["IQM"]

    @cached_property
    def policies(self) -> dict[str, dict[str, Score]]:
        """All that is known of each game's scores, ``{game: {policy: score}}``, policies in column order.

        Agents come first, then the data and simple policies, then published scores. What is unknown is left out. The
        published score of DQN, which wrote DQN-Replay, stands in where the data's own returns are unknown.
        """
        return {game: self._policies_of(game) for game in self.data.games}

    def _policies_of(self, game: str) -> dict[str, Score]:
        policies = {
            label: Score(self.game_means[label][game], int(runs.counts[:, runs.games.index(game)].sum()))
            for label, runs in self.runs.items()
            if game in runs.games
        }

        def add(policy: str, returns: Returns, detail: str = "") -> None:
            policies[policy] = Score(returns.interval, returns.num_episodes, detail, returns.values)

        data = self.game_data.get(game)
        behaviour = data.behaviour if data is not None and data.rewards == "raw" else None
        if data is not None and behaviour is not None:
            add(BEHAVIOUR, behaviour)
            if data.best_behaviour is not None:
                name, returns = data.best_behaviour
                add(BEST_BEHAVIOUR, returns, name)
        if constants := self.data.constant_actions.get(game):
            name, returns = max(constants.items(), key=lambda item: item[1].mean)
            add(BEST_CONSTANT, returns, f"always {name}")
        known = find_game(game)
        published = {RANDOM: known.random_score, HUMAN: known.human_score}
        if data is None or data.rewards == "clipped":
            published[DQN] = known.dqn_score
        for label, score in published.items():
            if score is not None:
                policies[label] = Score(Interval(score, math.nan, math.nan), returns=np.array([score]))
        return policies

    @cached_property
    def policy_columns(self) -> list[str]:
        """Every policy that is known of at least one game, in column order."""
        known = {policy for policies in self.policies.values() for policy in policies}
        order = [*self.runs, BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, RANDOM, HUMAN, DQN]
        return [policy for policy in order if policy in known]

    @cached_property
    def game_data(self) -> dict[str, GameData]:
        """The data by game."""
        return {data.game: data for data in self.data.game_data}

    @cached_property
    def published(self) -> dict[str, PublishedAgent]:
        """Published agents by label; empty if they have no game in common with the main agent."""
        return {agent.label: agent for agent in published_agents()} if self.published_games else {}

    @cached_property
    def published_games(self) -> list[str]:
        """The main agent's games in which every published agent has a score; none if it has no scores itself."""
        if self.data.absent:
            return []
        return [
            game
            for game in self.runs[self.main.label].games
            if all(game in agent.scores for agent in published_agents())
        ]

    def probability_of_improvement(self, other: str) -> Interval | None:
        """Chance that a run of the main agent beats a run of another agent in the same game, by raw returns."""
        pair = _in_common(self.runs[self.main.label], self.runs[other])
        return None if pair is None else probability_of_improvement(*pair)

    def verdicts(self, other: str, of: str | None = None) -> dict[str, Verdict]:
        """How an agent, by default the main one, compares with another policy in each game known of both, by their
        difference.
        """
        runs = self.runs[of or self.main.label]
        if other in self.runs:
            pair = _in_common(runs, self.runs[other])
            differences = {} if pair is None else game_differences(*pair)
        else:
            differences = {
                game: difference_to(runs, game, score.returns)
                for game in runs.games
                if (score := self.policies[game].get(other)) is not None and score.returns is not None
            }
        return {game: verdict(difference) for game, difference in differences.items()}


def _in_common(x: RunReturns, y: RunReturns) -> tuple[RunReturns, RunReturns] | None:
    """The returns of two agents in the games of both."""
    games = [game for game in x.games if game in y.games]
    return (x.select(games), y.select(games)) if games else None
