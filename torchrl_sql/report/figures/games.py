"""Bars of scores, game by game, and of the actions in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchrl_sql.games import find_game
from torchrl_sql.report.analysis import BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, DQN, Analysis
from torchrl_sql.report.figures.look import DQN_MARK, STEPS, bar_style, draw_bar, published_style
from torchrl_sql.report.style import COLOURS, WIDTH, Plot, new_figure
from torchrl_sql.report.text import format_score, name_games
from torchrl_sql.statistics.intervals import Interval
from torchrl_sql.statistics.scores import normalised_score, published_agents, split_by_reference

GAMES_IN_ONE_PLOT = 20


def few_games_plot(analysis: Analysis) -> Plot:
    """A panel per game: every policy's mean score as a bar with its interval."""
    games, known = analysis.data.games, analysis.policies
    policies = [
        policy
        for policy in (*analysis.runs, BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT)
        if policy in analysis.policy_columns
    ]
    num_columns = min(2, len(games))
    num_rows = -(-len(games) // 2)
    figure = Figure(figsize=(WIDTH, num_rows * (0.21 * len(policies) + 0.55)), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, game in zip(grid.flat, games, strict=False):
        for row, policy in enumerate(policies):
            if policy in known[game]:
                draw_bar(axes, row, known[game][policy].mean, 0.62, **bar_style(policy, analysis))
        human = find_game(game).human_score
        if human is not None and axes.get_xlim()[0] < human < 1.2 * axes.get_xlim()[1]:
            axes.axvline(human, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
        axes.set_yticks(range(len(policies)), policies)
        axes.set_ylim(len(policies) - 0.4, -0.6)
        axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        axes.set_title(game)
    for axes in list(grid.flat)[len(games) :]:
        axes.set_visible(False)
    return Plot(
        name="scores",
        caption="Mean raw return per episode with 95% intervals. Dashed: the published human score, where it is near.",
        description="; ".join(
            f"{game}: " + ", ".join(f"{policy} {format_score(known[game][policy].mean.point)}"
                                    for policy in policies if policy in known[game])
            for game in games
        ),
        figure=figure,
    )  # fmt: skip


def many_games_plots(analysis: Analysis) -> list[Plot]:
    """Many games, a row each, best first: the main agent, the first it is compared with and the behaviour as bars,
    published scores as marks; one scale for all. If the main agent has no scores, all agents and the behaviour.
    """
    included, excluded = split_by_reference(analysis.data.games, "human")
    absent = analysis.data.absent is not None
    leading = [*analysis.runs] if absent else [analysis.main.label]
    others = [] if absent else [agent.label for agent in analysis.against[:1]]
    bars = {
        game: {
            policy: _normalised(analysis.policies[game][policy].mean, game)
            for policy in (*leading, *others, BEHAVIOUR)
            if policy in analysis.policies[game]
        }
        for game in included
    }
    published = {DQN: {game: score for game in included if (score := _dqn_score(analysis, game)) is not None}}
    if not absent:
        published |= {agent.label: agent.scores for agent in published_agents() if agent.mark is not None}
    marks = {
        game: {
            name: normalised_score(scores[game], game, "human") for name, scores in published.items() if game in scores
        }
        for game in included
    }
    best = {game: max((bar.point for policy, bar in bars[game].items() if policy in leading), default=-np.inf)
            for game in included}  # fmt: skip
    games = sorted(included, key=lambda game: -best[game])
    num_plots = -(-len(games) // GAMES_IN_ONE_PLOT)
    size = -(-len(games) // max(num_plots, 1))
    parts = [games[index * size : (index + 1) * size] for index in range(num_plots)]
    return [_games_plot(analysis, index, part, bars, marks, excluded) for index, part in enumerate(parts)]


def _normalised(interval: Interval, game: str) -> Interval:
    point, low, high = (normalised_score(value, game, "human") for value in interval[:3])
    return Interval(point, low, high, interval.unit)


def _dqn_score(analysis: Analysis, game: str) -> float | None:
    return analysis.policies[game][DQN].mean.point if DQN in analysis.policies[game] else None


def _games_plot(
    analysis: Analysis,
    index: int,
    games: Sequence[str],
    bars: Mapping[str, Mapping[str, Interval]],
    marks: Mapping[str, Mapping[str, float]],
    excluded: Sequence[str],
) -> Plot:
    policies = list(dict.fromkeys(policy for of_game in bars.values() for policy in of_game))
    styles = {agent.label: published_style(agent.mark) for agent in published_agents()} | {DQN: DQN_MARK}
    figure, axes = new_figure(0.082 * len(games) * (len(policies) + 1.3) + 1.35)
    height = 0.8 / max(len(policies), 1)
    for row, game in enumerate(games):
        for place, policy in enumerate(policies):
            if policy in bars[game]:
                y = row - 0.4 + (place + 0.5) * height
                style = bar_style(policy, analysis) | {"linewidth": 0.8}
                draw_bar(axes, y, bars[game][policy], height * 0.86, **style)
        for name, x in marks[game].items():
            axes.plot(x, row, **styles[name])
    values = [x for of_game in bars.values() for interval in of_game.values() for x in interval[:3] if not np.isnan(x)]
    _set_scale(axes, values + [x for of_game in marks.values() for x in of_game.values()])
    axes.set_yticks(range(len(games)), games)
    axes.set_ylim(len(games) - 0.45, -0.55)
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    axes.axvline(1, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    handles: list[Artist] = [Patch(label=policy, **bar_style(policy, analysis)) for policy in policies]
    shown = dict.fromkeys(name for of_game in marks.values() for name in of_game)
    handles += [
        Line2D([], [], label="DQN (wrote DQN-Replay)" if name == DQN else name, **styles[name]) for name in shown
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    missing = f" {name_games(excluded, len(excluded) + len(bars))}: no human score, see the table." if excluded else ""
    return Plot(
        name=f"scores_by_game_{index + 1}",
        caption=f"Human-normalised score (0 random, 1 human) with 95% intervals, best first, {games[0]} to "
        f"{games[-1]}; the marks are published scores, of other protocols.{missing}",
        description=f"Bars of human-normalised score in {len(games)} games, {games[0]} to {games[-1]}, for "
        f"{', '.join(policies)}; the numbers are in the score table.",
        figure=figure,
    )


def _set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Linear, or logarithmic beyond 1 where one game would dwarf the others."""
    lowest, highest = min(values), max(values)
    if highest > 3:
        axes.set_xscale("symlog", linthresh=1, linscale=1.5)
        axes.set_xticks([v for v in (-10, -1, 0, 0.5, 1, 3, 10, 30, 100) if lowest <= v <= highest])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(MaxNLocator(1))
        axes.set_xlim(min(0.0, 1.1 * lowest), 1.15 * highest)
    else:
        axes.set_xlim(min(0.0, 1.1 * lowest), 1.05 * max(highest, 1.0))
    axes.set_xlabel("human-normalised score" + (", logarithmic beyond 1" if highest > 3 else ""))
