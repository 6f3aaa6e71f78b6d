"""The statistics of a report, each computed once from its data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from torchrl_sql.evaluation.episodes import EpisodeResult, returns_of
from torchrl_sql.games import GAMES
from torchrl_sql.report.model import Agent, GameData, ReportData, Returns
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
from torchrl_sql.statistics.scores import Array, Reference, RunReturns, split_by_reference

MANY_GAMES = 7
"""From so many games on, a report shows them together instead of one by one."""

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


class LearningCurve(NamedTuple):
    """One agent's returns at each checkpoint where every seed played every game, and the other checkpoints.

    ``num_episodes`` has the fewest and the most episodes that a seed played of a game, by those checkpoints.
    """

    runs: dict[int, RunReturns]
    incomplete_steps: tuple[int, ...]
    num_episodes: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Analysis:
    """What a report shows of its data."""

    data: ReportData

    @cached_property
    def agents(self) -> list[Agent]:
        """The agents shown: those of which a seed was evaluated in every game at some gradient step.

        Raises:
            ValueError: if the main agent is none of them, or there is none.
        """
        shown = [agent for agent in self.data.agents if self._seeds[agent.label]]
        if not shown or self.data.main not in ("", *(agent.label for agent in shown)):
            raise ValueError(
                f"{self.data.main or 'an agent'} must have been evaluated in each of {', '.join(self.data.games)} at "
                "one gradient step; evaluate it there, or choose the games with --games"
            )
        return shown

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
        return [agent for agent in others if agent not in self.sizes]

    @cached_property
    def sizes(self) -> list[Agent]:
        """The sizes of the main agent, itself included, smallest first; empty with fewer than two."""
        return next((group for group in self.size_groups if self.main in group), [])

    @cached_property
    def size_groups(self) -> list[list[Agent]]:
        """Agents that differ in the size of their network only, smallest first."""
        groups: dict[tuple[str, str], list[Agent]] = defaultdict(list)
        for agent in self.agents:
            if agent.group is not None and agent.num_parameters is not None:
                groups[agent.group, agent.decoding].append(agent)
        return [
            sorted(group, key=lambda agent: agent.num_parameters or 0)
            for group in groups.values()
            if len({agent.num_parameters for agent in group}) > 1
        ]

    @property
    def many_games(self) -> bool:
        """Whether the games are shown together instead of one by one."""
        return len(self.data.games) >= MANY_GAMES

    @cached_property
    def _rows(self) -> dict[str, list[EpisodeResult]]:
        """All episodes in the report's games, by agent label."""
        games = set(self.data.games)
        rows: dict[tuple[str, str], list[EpisodeResult]] = defaultdict(list)
        for row in self.data.episodes:
            if row.game in games:
                rows[row.agent, row.decoding].append(row)
        return {agent.label: rows[agent.agent, agent.decoding] for agent in self.data.agents}

    @cached_property
    def _seeds(self) -> dict[str, set[int]]:
        """The seeds that count, by agent label: as many as were evaluated in every game at one gradient step."""
        seeds = {}
        for label, rows in self._rows.items():
            games: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
            for row in rows:
                games[row.gradient_step][row.seed].add(row.game)
            complete = [
                {seed for seed, played in by_seed.items() if len(played) == len(self.data.games)}
                for _, by_seed in sorted(games.items())
            ]
            seeds[label] = max(reversed(complete), key=len, default=set())
        return seeds

    @cached_property
    def left_out(self) -> dict[str, tuple[list[str], list[int]]]:
        """What the page cannot show, by agent label: games without an episode, and seeds that are behind the others."""
        left_out = {}
        for label, rows in self._rows.items():
            played, seeds = {row.game for row in rows}, {row.seed for row in rows}
            games = [game for game in self.data.games if game not in played]
            if games or not self._seeds[label] or seeds != self._seeds[label]:
                left_out[label] = (games, sorted(seeds - self._seeds[label]))
        return left_out

    @cached_property
    def _by_agent(self) -> dict[str, list[EpisodeResult]]:
        """The episodes of the seeds that count, by agent label."""
        return {label: [row for row in rows if row.seed in self._seeds[label]] for label, rows in self._rows.items()}

    @cached_property
    def _counts(self) -> dict[str, dict[int, Counter[tuple[int, str]]]]:
        """Numbers of episodes, ``{label: {gradient step: {(seed, game): episodes}}}``, steps ascending."""
        counts: dict[str, dict[int, Counter[tuple[int, str]]]] = {}
        for label, rows in self._by_agent.items():
            steps: dict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
            for row in sorted(rows, key=lambda row: row.gradient_step):
                steps[row.gradient_step][row.seed, row.game] += 1
            counts[label] = dict(steps)
        return counts

    @cached_property
    def _complete_steps(self) -> dict[str, list[int]]:
        """Where each agent was evaluated with every seed that counts in every game, by label."""
        return {
            label: [
                step for step, counts in steps.items() if len(counts) == len(self._seeds[label]) * len(self.data.games)
            ]
            for label, steps in self._counts.items()
        }

    def step(self, label: str) -> int:
        """The gradient step at which an agent is compared: its last one that was evaluated in full."""
        return self._complete_steps[label][-1]

    @cached_property
    def episodes(self) -> dict[str, list[EpisodeResult]]:
        """The episodes that count, by agent label: those of the report's games at :meth:`step`."""
        return {
            agent.label: [row for row in self._by_agent[agent.label] if row.gradient_step == self.step(agent.label)]
            for agent in self.agents
        }

    @cached_property
    def runs(self) -> dict[str, RunReturns]:
        """Raw returns by agent label, all with the report's games.

        Raises:
            ValueError: if an agent's episodes are ambiguous.
        """
        return {agent.label: self._returns(agent, self.step(agent.label)) for agent in self.agents}

    def _returns(self, agent: Agent, gradient_step: int) -> RunReturns:
        return returns_of(
            self._by_agent[agent.label],
            agent=agent.agent,
            decoding=agent.decoding,
            games=self.data.games,
            gradient_step=gradient_step,
        )

    @cached_property
    def one_seed(self) -> bool:
        """Whether the main agent has one training seed, so that nothing can be said of its method."""
        return len(self.runs[self.main.label].seeds) == 1

    @cached_property
    def learning_curves(self) -> dict[str, LearningCurve]:
        """Returns against gradient steps, by the label of agents that were evaluated at two checkpoints or more."""
        curves = {}
        for agent in self.agents:
            counts, complete = self._counts[agent.label], self._complete_steps[agent.label]
            if len(counts) > 1:
                curves[agent.label] = LearningCurve(
                    {step: self._returns(agent, step) for step in complete},
                    tuple(step for step in counts if step not in complete),
                    {step: (min(counts[step].values()), max(counts[step].values())) for step in complete},
                )
        return curves

    @cached_property
    def calibration(self) -> dict[str, dict[str, Calibration]]:
        """``{label: {game: predicted against realised return}}`` at the same step; what is unknown is left out."""
        calibration: dict[str, dict[str, Calibration]] = defaultdict(dict)
        for agent in self.agents:
            if agent.decoding != "greedy":
                continue
            key = (agent.agent, self.step(agent.label))
            of_agent = [
                point
                for point in self.data.calibration
                if (point.agent, point.gradient_step) == key and point.seed in self._seeds[agent.label]
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

    @cached_property
    def game_data(self) -> dict[str, GameData]:
        """The data by game."""
        return {data.game: data for data in self.data.game_data}

    def split(self, reference: Reference) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The report's games with and without such a reference score."""
        return split_by_reference(self.data.games, reference)

    def normalised(self, reference: Reference) -> dict[str, RunReturns]:
        """Normalised returns over the games with such a reference score, by label; empty if there are none."""
        games, _ = self.split(reference)
        if not games:
            return {}
        return {label: runs.select(games).normalised(reference) for label, runs in self.runs.items()}

    def aggregates(self, reference: Reference) -> dict[str, dict[str, Interval]]:
        """``{label: {aggregate: interval}}`` over the games with such a reference score; empty if there are none."""
        if reference not in self._aggregates:
            self._aggregates[reference] = {
                label: aggregates(runs) for label, runs in self.normalised(reference).items()
            }
        return self._aggregates[reference]

    @cached_property
    def _aggregates(self) -> dict[Reference, dict[str, dict[str, Interval]]]:
        return {}

    def iqm_difference(self, label: str, other: str) -> Interval:
        """An agent's human-normalised interquartile mean minus another's."""
        normalised = self.normalised("human")
        return aggregate_differences(normalised[label], normalised[other])["IQM"]

    def policies(self, game: str) -> dict[str, Score]:
        """All that is known of one game's scores by policy, in column order.

        Agents come first, then the data and simple policies, then published scores. What is unknown is left out. The
        published score of DQN, which wrote DQN-Replay, stands in where the data's own returns are unknown.
        """
        return self._policies[game]

    @cached_property
    def _policies(self) -> dict[str, dict[str, Score]]:
        return {game: self._find_policies(game) for game in self.data.games}

    def _find_policies(self, game: str) -> dict[str, Score]:
        policies = {}
        for label, runs in self.runs.items():
            num_episodes = int(runs.counts[:, runs.games.index(game)].sum())
            policies[label] = Score(self.game_means[label][game], num_episodes)

        def add(policy: str, returns: Returns, detail: str = "") -> None:
            policies[policy] = Score(returns.interval, returns.num_episodes, detail, returns.values)

        data = self.game_data.get(game)
        behaviour = data.behaviour if data is not None and data.rewards == "raw" else None
        if data is not None and behaviour is not None:
            add(BEHAVIOUR, behaviour)
            if data.best_behaviour is not None:
                name, returns = data.best_behaviour
                add(BEST_BEHAVIOUR, returns, name)
        if data is not None and data.best_constant_action is not None:
            name, returns = data.best_constant_action
            add(BEST_CONSTANT, returns, f"always {name}")
        published = {RANDOM: GAMES[game].random_score, HUMAN: GAMES[game].human_score}
        if data is None or data.rewards == "clipped":
            published[DQN] = GAMES[game].dqn_score
        for label, score in published.items():
            if score is not None:
                policies[label] = Score(Interval(score, math.nan, math.nan), returns=np.array([score]))
        return policies

    @cached_property
    def policy_columns(self) -> list[str]:
        """Every policy that :meth:`policies` knows in at least one game, in column order."""
        known = {policy for game in self.data.games for policy in self.policies(game)}
        agents = [agent.label for agent in self.agents]
        order = [*agents, BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, RANDOM, HUMAN, DQN]
        return [policy for policy in order if policy in known]

    def probability_of_improvement(self, other: str) -> Interval:
        """Chance that a run of the main agent beats a run of another agent in the same game, by raw returns."""
        return probability_of_improvement(self.runs[self.main.label], self.runs[other])

    def verdicts(self, other: str) -> dict[str, Verdict]:
        """How the main agent compares with another policy in each game that it is known of, by their difference."""
        runs = self.runs[self.main.label]
        if other in self.runs:
            differences = game_differences(runs, self.runs[other])
        else:
            differences = {
                game: difference_to(runs, game, score.returns)
                for game in self.data.games
                if (score := self.policies(game).get(other)) is not None and score.returns is not None
            }
        return {game: verdict(difference) for game, difference in differences.items()}
