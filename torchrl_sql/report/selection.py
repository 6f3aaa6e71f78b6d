"""Which of an agent's episodes a report compares."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.report.model import Agent, ReportData


class Selection(NamedTuple):
    """An agent's episodes, and which of them count: those at ``step`` of ``seeds`` in ``games``."""

    step: int
    seeds: set[int]
    games: tuple[str, ...]
    complete: list[int]
    """Steps at which these seeds were evaluated in all these games, ascending."""
    rows: list[EpisodeResult]
    """At any step and of any seed, in the report's games."""
    counts: dict[int, Counter[tuple[int, str]]]
    """Of ``rows``, ``{gradient step: {(seed, game): episodes}}``, steps ascending."""

    @property
    def seeds_left_out(self) -> list[int]:
        """Seeds that were not evaluated in all the games at the step."""
        return sorted({row.seed for row in self.rows} - self.seeds)


def select(data: ReportData) -> dict[str, Selection]:
    """What counts of each agent, by label: of all its seeds as many as were evaluated at one gradient step in each of
    the agent's games, at the last such step, or at ``data.step``. Agents without such a seed are missing.

    Raises:
        ValueError: if a trained agent was not evaluated at ``data.step``.
    """
    rows: dict[tuple[str, str], list[EpisodeResult]] = defaultdict(list)
    for row in data.episodes:
        if row.game in data.games:
            rows[row.agent, row.decoding].append(row)
    selections = {agent.label: _select(data, agent, rows[agent.agent, agent.decoding]) for agent in data.agents}
    return {label: selection for label, selection in selections.items() if selection.seeds}


def _select(data: ReportData, agent: Agent, rows: list[EpisodeResult]) -> Selection:
    counts: dict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
    for row in sorted(rows, key=lambda row: row.gradient_step):
        counts[row.gradient_step][row.seed, row.game] += 1
    steps = [*counts]
    if data.step is not None and any(steps):  # random play has not been trained for any
        if data.step not in steps:
            raise ValueError(
                f"--step must be one at which {agent.label} was evaluated ({', '.join(map(str, steps))}), got "
                f"{data.step}; evaluate it there, or leave the agent out with --agents"
            )
        steps = [data.step]
    played = {game for step in steps for _, game in counts[step]}
    games = tuple(game for game in data.games if game in played)
    seeds = {
        step: {seed for seed, _ in counts[step] if all((seed, game) in counts[step] for game in games)}
        for step in steps
    }
    step = max(steps, key=lambda step: (len(seeds[step]), step), default=0)
    pairs = [(seed, game) for seed in seeds.get(step, ()) for game in games]
    complete = [other for other in counts if all(pair in counts[other] for pair in pairs)]
    return Selection(step, seeds.get(step, set()), games, complete, rows, dict(counts))
