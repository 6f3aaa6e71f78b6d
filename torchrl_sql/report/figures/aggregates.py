"""Plots over all games: intervals of aggregates, performance profiles."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchrl_sql.report.analysis import MANY_GAMES, Analysis
from torchrl_sql.report.figures.look import STEPS, colour, draw_row, point_style
from torchrl_sql.report.style import WIDTH, Plot, new_figure
from torchrl_sql.report.text import format_interval, plural, sentence, two_digits
from torchrl_sql.statistics.intervals import AGGREGATES, performance_profile


def aggregate_plot(analysis: Analysis) -> Plot | None:
    """The four human-normalised aggregates of every agent as points with intervals."""
    estimates = analysis.aggregates("human")
    if not estimates:
        return None
    agents = [agent for agent in analysis.agents if agent.label in estimates]
    figure = Figure(figsize=(WIDTH, 2 * (0.2 * len(agents) + 0.62)), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, aggregate in zip(grid.flat, AGGREGATES, strict=True):
        for row, agent in enumerate(agents):
            draw_row(axes, row, estimates[agent.label][aggregate], **point_style(agent, analysis))
        axes.set_title(sentence(aggregate))
        axes.set_ylim(len(agents) - 0.4, -0.6)
        axes.set_yticks(range(len(agents)), [agent.label for agent in agents])
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    games = plural(len(analysis.aggregate_games("human")), "game")
    return Plot(
        name="aggregates",
        caption=f"Human-normalised aggregates over {games} with 95% intervals. Of the optimality gap, less is better.",
        description="; ".join(
            f"{label}: IQM {two_digits(values['IQM'].point)} {format_interval(values['IQM'], two_digits)}"
            for label, values in estimates.items()
        ),
        figure=figure,
    )


def profile_plot(analysis: Analysis) -> Plot | None:
    """Performance profiles of all agents."""
    scores = analysis.normalised("human")
    games = analysis.aggregate_games("human")
    if len(games) < MANY_GAMES or not scores:  # a handful of steps
        return None
    top = float(np.quantile(np.concatenate([runs.run_scores().ravel() for runs in scores.values()]), 0.98))
    thresholds = np.linspace(0, max(1.2, min(top, 8.0)), 121)
    figure, axes = new_figure(3.0)
    for agent in analysis.agents:
        if agent.label not in scores:
            continue
        fraction, low, high = performance_profile(scores[agent.label], thresholds)
        ink = colour(agent, analysis)
        style = "--" if agent.decoding == "sampled" else "-"
        axes.plot(thresholds, fraction, style, color=ink, linewidth=1.6, label=agent.label)
        axes.fill_between(thresholds, low, high, color=ink, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, thresholds[-1])
    axes.grid()
    axes.set_xlabel("human-normalised score τ")
    axes.set_ylabel("share of games above τ")
    figure.legend(loc="outside upper left", ncols=3)
    return Plot(
        name="performance_profile",
        caption=f"Performance profile: share of {len(games)} games in which an agent scores above τ, mean over seeds. "
        "Higher is better; bands are 95% intervals.",
        description="Performance profiles. Share of runs above the human score: "
        + "; ".join(f"{label} {(runs.run_scores() > 1).mean():.2f}" for label, runs in scores.items()),
        figure=figure,
    )
