"""Plots of predicted values against the returns that followed."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.figures.look import colour
from torchrl_sql.report.model import Agent
from torchrl_sql.report.style import COLOURS, SMALL_WIDTH, Plot, new_figure
from torchrl_sql.report.text import format_interval, two_digits
from torchrl_sql.statistics.calibration import Calibration

MAX_SCATTERED = 400


def calibration_plots(analysis: Analysis) -> list[Plot]:
    """Predictions of the first agent that has any: a panel per game, or all games in one plot."""
    label = next(iter(analysis.calibration), None)
    if label is None:
        return []
    agent = next(agent for agent in analysis.agents if agent.label == label)
    games = {game: values for game, values in analysis.calibration[label].items() if values.num_episodes}
    if not games:
        return []
    if analysis.many_games:
        return [_all_games(analysis, agent, games)]
    return [_one_game(analysis, agent, game, values) for game, values in games.items()]


def _one_game(analysis: Analysis, agent: Agent, game: str, values: Calibration) -> Plot:
    figure, axes = new_figure(2.9, width=SMALL_WIDTH)
    shown = np.linspace(0, len(values.predicted) - 1, min(MAX_SCATTERED, len(values.predicted))).astype(int)
    axes.plot(
        values.predicted[shown], values.realised[shown], ".", color=COLOURS["data"][0], markersize=2.5, alpha=0.5,
        label="states",
    )  # fmt: skip
    predicted, realised = values.bins()
    axes.plot(
        predicted, realised, "-o", color=colour(agent, analysis), markersize=4.5, linewidth=1.4, label="decile means"
    )
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2), label="equal")
    axes.grid()
    axes.set_title(game, fontweight="bold")
    axes.set_xlabel("predicted value")
    axes.set_ylabel("discounted return")
    axes.legend()
    return Plot(
        name=f"calibration_{game}",
        caption=f"{game}: discounted return against the value that {agent.label} predicted; points below the "
        "dashed line are overestimates.",
        description=f"{game}: mean predicted minus realised {values.bias.point:.2f} "
        f"{format_interval(values.bias, two_digits)}, over {len(values.predicted)} states.",
        figure=figure,
    )


def _all_games(analysis: Analysis, agent: Agent, games: dict[str, Calibration]) -> Plot:
    ink = colour(agent, analysis)
    order = sorted(games, key=lambda game: -games[game].bias.point)
    figure, axes = new_figure(0.19 * len(order) + 1.0)
    for row, game in enumerate(order):
        predicted, realised = games[game].predicted.mean(), games[game].realised.mean()
        axes.plot([predicted, realised], [row, row], color=COLOURS["data"][0], linewidth=1.4)
        axes.plot(realised, row, "o", markersize=5, color=ink, markerfacecolor=COLOURS["paper"][0])
        axes.plot(predicted, row, "o", markersize=5, color=ink)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("value (clipped rewards, discounted)")
    style: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none", "color": ink}
    figure.legend(
        handles=[
            Line2D([], [], label="predicted", **style),
            Line2D([], [], label="realised", **(style | {"markerfacecolor": COLOURS["paper"][0]})),
        ],
        loc="outside upper left",
        ncols=2,
    )
    return Plot(
        name="calibration",
        caption=f"Mean value that {agent.label} predicted and mean discounted return that followed, by game, the most "
        "overestimated first.",
        description="Predicted minus realised: " + "; ".join(f"{g} {games[g].bias.point:.2f}" for g in order),
        figure=figure,
    )
