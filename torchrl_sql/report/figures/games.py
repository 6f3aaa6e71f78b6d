"""Bars of scores, game by game, and of the actions in the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchrl_sql.games import ACTION_NAMES, GAMES
from torchrl_sql.report.analysis import BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, DQN, Analysis
from torchrl_sql.report.figures.look import DQN_MARK, PUBLISHED_MARKS, STEPS, bar_style
from torchrl_sql.report.model import GameData
from torchrl_sql.report.score_tables import published_name
from torchrl_sql.report.style import COLOURS, SMALL_WIDTH, Plot, new_figure
from torchrl_sql.report.text import format_score, name_games
from torchrl_sql.statistics.scores import normalised_score, published_scores

GAMES_IN_ONE_PLOT = 20


def game_plot(analysis: Analysis, game: str) -> Plot:
    """One game: every policy's score as a bar with its interval, on the human-normalised scale where there is one."""
    bars = _bars(analysis, game)
    to_x = _scale(game)
    normalised = GAMES[game].human_score is not None
    figure, axes = new_figure(0.27 * len(bars) + 0.75)
    reach = [0.0]
    for row, (policy, (point, low, high)) in enumerate(bars.items()):
        x, low, high = to_x(point), to_x(low), to_x(high)
        alone = np.isnan(low)
        style = bar_style(policy, analysis)
        if policy not in analysis.policy_columns or policy == DQN:
            style |= {"facecolor": COLOURS["paper"][0], "linestyle": (0, (2, 1.5))}
        axes.barh(row, x, height=0.62, **style)
        for colour, width in (("paper", 2.6), ("ink", 1.1)):  # a light rim keeps the line visible on a dark bar
            axes.plot([low, high], [row, row], color=COLOURS[colour][0], linewidth=width, solid_capstyle="butt")
        reach += [x] if alone else [x, low, high]
        axes.annotate(
            format_score(point),
            (max(x, 0) if alone else max(x, high, 0), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    span = max(reach) - min(reach) or 1.0
    axes.set_xlim(min(reach) - 0.02 * span, max(reach) + 0.16 * span)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    if normalised and axes.get_xlim()[1] > 1:
        axes.axvline(1, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.set_xlabel("human-normalised score (numbers: raw)" if normalised else "raw score")
    axes.set_title(game, fontweight="bold")
    published_too = any(policy not in analysis.policy_columns or policy == DQN for policy in bars)
    return Plot(
        name=f"scores_{game}",
        caption=f"{game}: mean score of each policy with its 95% interval."
        + (" Dashed: published scores, of other protocols and without intervals." if published_too else ""),
        description=f"Bar chart for {game}. "
        + "; ".join(f"{policy} {format_score(interval[0])}" for policy, interval in bars.items()),
        figure=figure,
    )


def _bars(analysis: Analysis, game: str) -> dict[str, tuple[float, float, float]]:
    """Policy -> (score, low, high); NaN where there is no interval."""
    known = analysis.policies(game)
    agents = (agent.label for agent in analysis.agents)
    bars: dict[str, tuple[float, float, float]] = {
        policy: known[policy].mean[:3]
        for policy in (*agents, BEHAVIOUR, BEST_BEHAVIOUR, BEST_CONSTANT, DQN)
        if policy in known
    }
    scores = published_scores()
    return bars | {
        published_name(agent): (scores[agent][game], np.nan, np.nan)
        for agent in PUBLISHED_MARKS
        if game in scores[agent]
    }


def _scale(game: str) -> Callable[[float], float]:
    if GAMES[game].human_score is None:
        return lambda score: score
    return lambda score: float(normalised_score(score, game, "human"))


def all_games_plots(analysis: Analysis) -> list[Plot]:
    """Many games, a row each, best first: the main agent, the first it is compared with and the behaviour as bars,
    published scores as marks; one scale for all.
    """
    included, excluded = analysis.split("human")
    labels = [agent.label for agent in (analysis.main, *analysis.against[:1])]
    bars = {
        game: {
            policy: [float(normalised_score(value, game, "human")) for value in known[policy].mean[:3]]
            for policy in (*labels, BEHAVIOUR)
            if policy in (known := analysis.policies(game))
        }
        for game in included
    }
    marks = {
        game: {
            agent: float(normalised_score(published_scores()[agent][game], game, "human"))
            for agent in PUBLISHED_MARKS
            if game in published_scores()[agent]
        }
        | (
            {DQN: float(normalised_score(analysis.policies(game)[DQN].mean.point, game, "human"))}
            if DQN in analysis.policies(game)
            else {}
        )
        for game in included
    }
    games = sorted(included, key=lambda game: -bars[game][labels[0]][0])
    num_plots = -(-len(games) // GAMES_IN_ONE_PLOT)
    size = -(-len(games) // max(num_plots, 1))
    parts = [games[index * size : (index + 1) * size] for index in range(num_plots)]
    return [_games_plot(analysis, index, part, bars, marks, excluded) for index, part in enumerate(parts)]


def _games_plot(
    analysis: Analysis,
    index: int,
    games: Sequence[str],
    bars: Mapping[str, Mapping[str, Sequence[float]]],
    marks: Mapping[str, Mapping[str, float]],
    excluded: Sequence[str],
) -> Plot:
    policies = list(dict.fromkeys(policy for values in bars.values() for policy in values))
    figure, axes = new_figure(0.082 * len(games) * (len(policies) + 1.3) + 1.35)
    height = 0.8 / len(policies)
    for row, game in enumerate(games):
        for place, policy in enumerate(policies):
            if policy in bars[game]:
                y = row - 0.4 + (place + 0.5) * height
                x, low, high = bars[game][policy]
                axes.barh(y, x, height=height * 0.86, **(bar_style(policy, analysis) | {"linewidth": 0.8}))
                for colour, width in (("paper", 2.0), ("ink", 0.9)):
                    axes.plot([low, high], [y, y], color=COLOURS[colour][0], linewidth=width, solid_capstyle="butt")
        for name, x in marks[game].items():
            axes.plot(x, row, **(DQN_MARK if name == DQN else PUBLISHED_MARKS[name]))
    values = [x for of_game in bars.values() for interval in of_game.values() for x in interval if not np.isnan(x)]
    _set_scale(axes, values + [x for of_game in marks.values() for x in of_game.values()])
    axes.set_yticks(range(len(games)), games)
    axes.set_ylim(len(games) - 0.45, -0.55)
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    axes.axvline(1, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    handles: list[Artist] = [Patch(label=policy, **bar_style(policy, analysis)) for policy in policies]
    shown = {name for of_game in marks.values() for name in of_game}
    if DQN in shown:
        handles.append(Line2D([], [], label="DQN (wrote DQN-Replay)", **DQN_MARK))
    handles += [
        Line2D([], [], label=published_name(name), **style) for name, style in PUBLISHED_MARKS.items() if name in shown
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


def action_plot(data: GameData) -> Plot:
    """How often each of the 18 actions occurs in one game's data."""
    counts = np.asarray(data.action_counts, dtype=np.float64)
    shares = counts / max(counts.sum(), 1.0)
    legal = set(GAMES[data.game].minimal_actions)
    figure, axes = new_figure(3.1, width=SMALL_WIDTH)
    colours = [COLOURS["method" if action in legal else "data"][0] for action in range(len(ACTION_NAMES))]
    axes.barh(range(len(ACTION_NAMES)), shares, color=colours, height=0.7)
    axes.set_yticks(range(len(ACTION_NAMES)), ACTION_NAMES, fontsize=7.5)
    axes.set_ylim(len(ACTION_NAMES) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_title(data.game, fontweight="bold")
    return Plot(
        name=f"actions_{data.game}",
        caption=f"{data.game}: share of each action in the data. Blue actions are legal; grey ones act as NOOP.",
        description=f"Share of actions in the data of {data.game}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in zip(ACTION_NAMES, shares, strict=True) if share >= 0.01),
        figure=figure,
    )
