"""Plots over all games: intervals of aggregates, performance profiles, scaling, published agents."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.figures.look import REFERENCE_AXIS, STEPS, colour, point_style
from torchrl_sql.report.score_tables import MIN_PUBLISHED_GAMES, published_games, published_iqm, published_name
from torchrl_sql.report.style import COLOURS, WIDTH, Plot, new_figure
from torchrl_sql.report.text import format_interval, plural, two_digits
from torchrl_sql.statistics.intervals import AGGREGATES, aggregates, performance_profile
from torchrl_sql.statistics.scores import Reference, published_scores

MIN_GAMES_OF_PROFILE = 5
"""With fewer, a performance profile is a handful of steps."""


def aggregate_plot(analysis: Analysis, reference: Reference) -> Plot | None:
    """The four aggregates of every agent as points with intervals."""
    estimates = analysis.aggregates(reference)
    if not estimates:
        return None
    agents = analysis.agents
    figure = Figure(figsize=(WIDTH, 2 * (0.26 * len(agents) + 0.62)), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, aggregate in zip(grid.flat, AGGREGATES, strict=True):
        for row, agent in enumerate(agents):
            interval = estimates[agent.label][aggregate]
            ends = [interval.low, interval.high]
            axes.plot(ends, [row, row], color=colour(agent, analysis), linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(interval.point, row, **point_style(agent, analysis))
        better = "lower is better" if aggregate == "optimality gap" else ""
        axes.set_title(aggregate[0].upper() + aggregate[1:])
        axes.set_xlabel(better)
        axes.set_ylim(len(agents) - 0.4, -0.6)
        axes.set_yticks(range(len(agents)), [agent.label for agent in agents])
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    games, _ = analysis.split(reference)
    name = REFERENCE_AXIS[reference]
    return Plot(
        name="aggregates" if reference == "human" else f"aggregates_{reference}",
        caption=f"{name[0].upper()}{name[1:]} aggregates over {plural(len(games), 'game')} with 95% intervals.",
        description="; ".join(
            f"{label}: IQM {two_digits(values['IQM'].point)} {format_interval(values['IQM'], two_digits)}"
            for label, values in estimates.items()
        ),
        figure=figure,
    )


def profile_plot(analysis: Analysis) -> Plot | None:
    """Performance profiles of all agents."""
    games, _ = analysis.split("human")
    if len(games) < MIN_GAMES_OF_PROFILE:
        return None
    scores = analysis.normalised("human")
    top = float(np.quantile(np.concatenate([runs.run_scores().ravel() for runs in scores.values()]), 0.98))
    thresholds = np.linspace(0, max(1.2, min(top, 8.0)), 121)
    figure, axes = new_figure(3.0)
    for agent in analysis.agents:
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


def scaling_plot(analysis: Analysis) -> Plot | None:
    """IQM against the number of parameters, of agents that come in at least two sizes."""
    estimates = {label: values["IQM"] for label, values in analysis.aggregates("human").items()}
    groups = analysis.size_groups
    if not estimates or not groups:
        return None
    figure, axes = new_figure(2.9)
    for group in groups:
        sizes = [agent.num_parameters or 0 for agent in group]
        points = [estimates[agent.label].point for agent in group]
        dashes = "--" if group[0].decoding == "sampled" else "-"
        axes.plot(sizes, points, dashes, color=colour(group[-1], analysis), linewidth=1.4)
        for size, agent in zip(sizes, group, strict=True):
            point, low, high, _ = estimates[agent.label]
            axes.vlines(size, low, high, color=colour(agent, analysis), linewidth=5, alpha=0.35)
            axes.plot(size, point, linestyle="none", label=agent.label, **point_style(agent, analysis))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axes.set_xticks(sorted({agent.num_parameters or 0 for group in groups for agent in group}))
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.15)
    axes.grid()
    axes.set_xlabel("parameters")
    axes.set_ylabel("human-normalised IQM")
    figure.legend(loc="outside upper left", ncols=3)
    games, _ = analysis.split("human")
    return Plot(
        name="scaling",
        caption=f"Human-normalised IQM over {len(games)} games against the number of parameters, with 95% intervals.",
        description="; ".join(
            f"{agent.label}: {agent.num_parameters:,} parameters, IQM {estimates[agent.label].point:.2f}"
            for group in groups
            for agent in group
        ),
        figure=figure,
    )


def published_plot(analysis: Analysis) -> Plot | None:
    """IQM of our agents and of published ones over the games that all have and that have a human score."""
    games = [game for game in published_games(analysis) if game in analysis.split("human")[0]]
    if len(games) < MIN_PUBLISHED_GAMES:
        return None
    ours = {label: aggregates(scores.select(games))["IQM"] for label, scores in analysis.normalised("human").items()}
    theirs = {published_name(name): published_iqm(name, games) for name in published_scores()}
    agents = {agent.label: agent for agent in analysis.agents}
    rows = [*ours, *sorted(theirs, key=lambda name: -theirs[name])]
    figure, axes = new_figure(0.22 * len(rows) + 0.7)
    for row, name in enumerate(rows):
        if name in agents:
            ends = [ours[name].low, ours[name].high]
            axes.plot(ends, [row, row], color=colour(agents[name], analysis), linewidth=5, alpha=0.35)
            axes.plot(ours[name].point, row, **point_style(agents[name], analysis))
        else:
            axes.plot(theirs[name], row, "D", color=COLOURS["data"][0], markersize=4.5)
    axes.axhline(len(ours) - 0.5, color=COLOURS["muted"][0], linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("human-normalised IQM")
    return Plot(
        name="published_agents",
        caption=f"Human-normalised IQM over the {len(games)} games that published agents share with this report; "
        "protocols differ, and published scores come without intervals.",
        description="; ".join(
            [f"{name} {ours[name].point:.2f}" for name in ours] + [f"{name} {theirs[name]:.2f}" for name in theirs]
        ),
        figure=figure,
    )
