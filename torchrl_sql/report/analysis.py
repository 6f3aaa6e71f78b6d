"""The statistics of a report, each computed once from its data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.games import GAMES
from torchrl_sql.report.model import Agent, GameData, ReportData, Role
from torchrl_sql.statistics.aggregates import (
    BootstrapScores,
    Interval,
    aggregates,
    game_means,
    probability_of_improvement,
)
from torchrl_sql.statistics.calibration import Calibration, calibrate
from torchrl_sql.statistics.scores import Reference, RunReturns, split_by_reference

MANY_GAMES = 7
"""From so many games on, a report shows them together instead of one by one."""

BEHAVIOUR = "Behaviour mean"
BEST_BEHAVIOUR = "Best behaviour"
BEST_CONSTANT = "Best constant"
RANDOM = "Random"
HUMAN = "Human"
DQN = "DQN"

Verdict = Literal["above", "overlap", "below"]


def compare(ours: Interval, theirs: Interval) -> Verdict:
    """``"above"`` or ``"below"`` if the two 95% intervals are apart, ``"overlap"`` otherwise (touching counts)."""
    if ours.low > theirs.high:
        return "above"
    return "below" if ours.high < theirs.low else "overlap"


class LearningCurve(NamedTuple):
    """One agent's scores at each checkpoint where every seed played every game, and the other checkpoints.

    ``num_episodes`` has the fewest and the most episodes that a seed played of a game, by those checkpoints.
    """

    scores: dict[int, BootstrapScores]
    incomplete_steps: tuple[int, ...]
    num_episodes: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Analysis:
    """What a report shows of its data."""

    data: ReportData

    @property
    def method(self) -> Agent:
        """The agent the others are compared with."""
        return next(agent for agent in self.data.agents if agent.role == "method")

    def first(self, role: Role) -> Agent | None:
        """The first agent of a role."""
        return next((agent for agent in self.data.agents if agent.role == role), None)

    @property
    def many_games(self) -> bool:
        """Whether the games are shown together instead of one by one."""
        return len(self.data.games) >= MANY_GAMES

    @cached_property
    def _by_agent(self) -> dict[str, list[EpisodeResult]]:
        games = set(self.data.games)
        found: dict[tuple[str, str], list[EpisodeResult]] = defaultdict(list)
        for episode in self.data.episodes:
            if episode.game in games:
                found[episode.agent, episode.decoding].append(episode)
        return {agent.label: found[agent.agent, agent.decoding] for agent in self.data.agents}

    @cached_property
    def episodes(self) -> dict[str, list[EpisodeResult]]:
        """The episodes that count, by agent label: those of the report's games at the agent's last gradient step."""
        found = {}
        for label, rows in self._by_agent.items():
            last_step = max((row.gradient_step for row in rows), default=0)
            found[label] = [row for row in rows if row.gradient_step == last_step]
        return found

    @cached_property
    def runs(self) -> dict[str, RunReturns]:
        """Raw returns by agent label, all with the report's games.

        Raises:
            ValueError: if an agent's episodes are none, incomplete or ambiguous; see
                :meth:`torchrl_sql.statistics.scores.RunReturns.from_episodes`.
        """
        return {agent.label: self._returns(agent, None) for agent in self.data.agents}

    def _returns(self, agent: Agent, gradient_step: int | None) -> RunReturns:
        return RunReturns.from_episodes(
            self._by_agent[agent.label],
            agent=agent.agent,
            decoding=agent.decoding,
            games=self.data.games,
            gradient_step=gradient_step,
        )

    def _bootstrap(self, runs: RunReturns) -> BootstrapScores:
        return BootstrapScores.from_returns(runs, num_resamples=self.data.num_resamples, seed=self.data.bootstrap_seed)

    @cached_property
    def scores(self) -> dict[str, BootstrapScores]:
        """Raw run scores with their resamples, by agent label."""
        return {label: self._bootstrap(runs) for label, runs in self.runs.items()}

    @cached_property
    def learning_curves(self) -> dict[str, LearningCurve]:
        """Scores against gradient steps, by the label of agents that were evaluated at two checkpoints or more.

        A checkpoint counts if every seed of the agent was evaluated there in every game.
        """
        curves = {}
        for agent in self.data.agents:
            final = self.runs[agent.label]
            wanted = {(seed, game) for seed in final.seeds for game in final.games}
            found: dict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
            for row in self._by_agent[agent.label]:
                found[row.gradient_step][row.seed, row.game] += 1
            steps = sorted(found)
            if len(steps) < 2:
                continue
            complete = [step for step in steps if found[step].keys() == wanted]
            curves[agent.label] = LearningCurve(
                {
                    step: self.scores[agent.label] if step == steps[-1] else self._bootstrap(self._returns(agent, step))
                    for step in complete
                },
                tuple(step for step in steps if step not in complete),
                {step: (min(found[step].values()), max(found[step].values())) for step in complete},
            )
        return curves

    @cached_property
    def calibration(self) -> dict[str, dict[str, Calibration]]:
        """``{label: {game: predicted against realised return}}`` at the last step; what is unknown is left out."""
        found = {}
        for agent in self.data.agents:
            if agent.decoding != "greedy" or not self.episodes[agent.label]:
                continue
            step = self.episodes[agent.label][0].gradient_step
            rows = [row for row in self.data.calibration if (row.agent, row.gradient_step) == (agent.agent, step)]
            games = calibrate(
                rows, self.data.games, num_resamples=self.data.num_resamples, seed=self.data.bootstrap_seed
            )
            if games:
                found[agent.label] = games
        return found

    @cached_property
    def game_means(self) -> dict[str, dict[str, Interval]]:
        """``{label: {game: mean raw return with interval}}``."""
        return {label: game_means(scores) for label, scores in self.scores.items()}

    @cached_property
    def game_data(self) -> dict[str, GameData]:
        """The data by game."""
        return {data.game: data for data in self.data.game_data}

    def split(self, reference: Reference) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The report's games with and without such a reference score."""
        return split_by_reference(self.data.games, reference)

    def normalised(self, reference: Reference) -> dict[str, BootstrapScores]:
        """Normalised run scores over the games with such a reference score, by label; empty if there are none."""
        games, _ = self.split(reference)
        return {
            label: scores.select(games).normalised(reference)
            for label, scores in (self.scores if games else {}).items()
        }

    def aggregates(self, reference: Reference) -> dict[str, dict[str, Interval]]:
        """``{label: {aggregate: interval}}`` over the games with such a reference score; empty if there are none."""
        if reference not in self._aggregates:
            self._aggregates[reference] = {
                label: aggregates(scores) for label, scores in self.normalised(reference).items()
            }
        return self._aggregates[reference]

    @cached_property
    def _aggregates(self) -> dict[Reference, dict[str, dict[str, Interval]]]:
        return {}

    def policies(self, game: str) -> dict[str, tuple[Interval, int | None, str]]:
        """All that is known of one game's scores, ``{policy: (mean raw return, episodes, detail)}`` in column order.

        Agents come first, then the data and simple policies, then published scores (which have no interval here:
        ``low`` and ``high`` are NaN, and the number of episodes is None). What is unknown is left out. The published
        score of DQN, which wrote DQN-Replay, stands in where the data's own returns are unknown.
        """
        return self._policies[game]

    @cached_property
    def _policies(self) -> dict[str, dict[str, tuple[Interval, int | None, str]]]:
        return {game: self._find_policies(game) for game in self.data.games}

    def _find_policies(self, game: str) -> dict[str, tuple[Interval, int | None, str]]:
        found: dict[str, tuple[Interval, int | None, str]] = {}
        for label, means in self.game_means.items():
            runs = self.runs[label]
            found[label] = (means[game], int(runs.counts[:, runs.games.index(game)].sum()), "")
        data = self.game_data.get(game)
        has_returns = data is not None and data.rewards == "raw"
        if data is not None and data.behaviour is not None and has_returns:
            found[BEHAVIOUR] = (data.behaviour.interval, data.behaviour.num_episodes, "")
            if data.best_behaviour is not None:
                name, summary = data.best_behaviour
                found[BEST_BEHAVIOUR] = (summary.interval, summary.num_episodes, name)
        if data is not None and data.best_constant_action is not None:
            name, summary = data.best_constant_action
            found[BEST_CONSTANT] = (summary.interval, summary.num_episodes, f"always {name}")
        published = {RANDOM: GAMES[game].random_score, HUMAN: GAMES[game].human_score}
        if not has_returns:
            published[DQN] = GAMES[game].dqn_score
        for label, score in published.items():
            if score is not None:
                found[label] = (Interval(score, math.nan, math.nan), None, "")
        return found

    @cached_property
    def policy_columns(self) -> list[str]:
        """Every policy that :meth:`policies` knows in at least one game, in column order."""
        known = {policy for game in self.data.games for policy in self.policies(game)}
        agents = [agent.label for agent in self.data.agents]
        order = [*agents, BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, RANDOM, HUMAN, DQN]
        return [policy for policy in order if policy in known]

    def probability_of_improvement(self, other: str) -> Interval:
        """Chance that a run of the method beats a run of another agent in the same game, by raw returns."""
        return probability_of_improvement(self.scores[self.method.label], self.scores[other])

    def verdicts(self, other: str) -> dict[str, Verdict]:
        """How the method compares with another policy, game by game: by their 95% intervals, apart or overlapping."""
        return {
            game: compare(policies[self.method.label][0], policies[other][0])
            for game in self.data.games
            if other in (policies := self.policies(game))
        }
