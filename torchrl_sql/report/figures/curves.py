"""Plots against gradient steps: scores of evaluated checkpoints, and what training logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.figures.look import STEPS, colour, point_style
from torchrl_sql.report.model import Agent, Curve
from torchrl_sql.report.style import COLOURS, SMALL_WIDTH, WIDTH, Plot, new_figure
from torchrl_sql.statistics.intervals import Interval, aggregates, game_means
from torchrl_sql.statistics.scores import Array, RunReturns, split_by_reference

PANELS_IN_ONE_PLOT = 10
MAX_POINTS = 150
"""Of a training curve; longer ones are shown as means of so many blocks."""


def learning_curve_plot(analysis: Analysis) -> Plot | None:
    """Human-normalised IQM at each checkpoint that was evaluated in full."""
    games, _ = analysis.split("human")
    if not analysis.learning_curves or not games:
        return None
    figure, axes = new_figure(2.9)
    values = []
    for agent in _agents_with_curves(analysis):
        curve = _estimates(analysis, agent, games)
        _draw_curve(axes, agent, analysis, curve)
        points = ", ".join(f"{step:,} steps {interval.point:.2f}" for step, interval in curve.items())
        values.append(f"{agent.label}: {points}")
    _set_step_axis(axes)
    axes.set_ylabel("human-normalised IQM")
    figure.legend(loc="outside upper left", ncols=3)
    return Plot(
        name="learning_curve",
        caption=f"Human-normalised IQM over {len(games)} game{'s' * (len(games) > 1)} against gradient steps, with 95% "
        "intervals: the checkpoints at which every seed was evaluated in every game.",
        description="IQM against gradient steps. " + "; ".join(values),
        figure=figure,
    )


def game_learning_curve_plots(analysis: Analysis) -> list[Plot]:
    """A panel per game: the mean score at each checkpoint that was evaluated in full."""
    if not analysis.learning_curves:
        return []
    games = list(analysis.data.games)
    num_plots = -(-len(games) // PANELS_IN_ONE_PLOT)
    size = -(-len(games) // num_plots)
    parts = [games[index * size : (index + 1) * size] for index in range(num_plots)]
    return [_game_panels(analysis, index, part) for index, part in enumerate(parts)]


def _game_panels(analysis: Analysis, index: int, games: Sequence[str]) -> Plot:
    agents = _agents_with_curves(analysis)
    rows = -(-len(games) // 2)
    legend_height = 0.17 * -(-len(agents) // 3) + 0.1
    height = 1.25 * rows + 0.4 + legend_height
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.subplots(rows, 2, squeeze=False)
    # Fixed margins: a constrained layout of many panels takes seconds.
    figure.subplots_adjust(
        left=0.08, right=0.98, top=1 - (legend_height + 0.2) / height, bottom=0.42 / height, wspace=0.22, hspace=0.62
    )
    for axes, game in zip(grid.flat, games, strict=False):
        for agent in agents:
            _draw_curve(axes, agent, analysis, _estimates(analysis, agent, [game]))
        axes.set_title(game if split_by_reference([game], "human")[0] else f"{game} (raw)", fontsize=8.5)
        _set_step_axis(axes, label=False)
        axes.tick_params(axis="both", labelsize=7, labelcolor=COLOURS["muted"][0])
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    for axes in list(grid.flat)[len(games) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=3, fontsize=8)
    figure.supxlabel("gradient steps", fontsize=9, color=COLOURS["muted"][0], y=0.05 / height)
    return Plot(
        name=f"learning_curves_by_game_{index + 1}",
        caption=f"Human-normalised score against gradient steps with 95% intervals, {games[0]} to {games[-1]}.",
        description=f"Scores against gradient steps in {', '.join(games)}; the numbers are in learning_curves.csv.",
        figure=figure,
    )


def _agents_with_curves(analysis: Analysis) -> list[Agent]:
    return [agent for agent in analysis.agents if agent.label in analysis.learning_curves]


def _estimates(analysis: Analysis, agent: Agent, games: Sequence[str]) -> dict[int, Interval]:
    """By gradient step, the IQM over several games or the mean score of one."""
    runs = analysis.learning_curves[agent.label].runs
    return {step: _iqm_or_mean(returns.select(games)) for step, returns in runs.items()}


def _iqm_or_mean(runs: RunReturns) -> Interval:
    if split_by_reference(runs.games, "human")[0]:
        runs = runs.normalised("human")
    return aggregates(runs)["IQM"] if len(runs.games) > 1 else game_means(runs)[runs.games[0]]


def _draw_curve(axes: Axes, agent: Agent, analysis: Analysis, curve: Mapping[int, Interval]) -> None:
    ink = colour(agent, analysis)
    style = point_style(agent, analysis) | {"markersize": 3.5}
    low, high = ([interval[end] for interval in curve.values()] for end in (1, 2))
    axes.fill_between([*curve], low, high, color=ink, alpha=0.15, linewidth=0)
    axes.plot(
        [*curve], [interval.point for interval in curve.values()],
        linestyle="--" if agent.decoding == "sampled" else "-", linewidth=1.4, label=agent.label, **style,
    )  # fmt: skip


def _set_step_axis(axes: Axes, *, label: bool = True) -> None:
    axes.set_xlabel("gradient steps" if label else "")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.grid()


def training_plots(analysis: Analysis) -> list[Plot]:
    """One panel per training metric, one line per run."""
    metrics = list(dict.fromkeys(curve.metric for curve in analysis.data.curves))
    return [_metric_plot(analysis, index, metric) for index, metric in enumerate(metrics)]


def _metric_plot(analysis: Analysis, index: int, metric: str) -> Plot:
    curves = [curve for curve in analysis.data.curves if curve.metric == metric]
    figure, axes = new_figure(2.1, width=SMALL_WIDTH)
    labelled: set[str] = set()
    for curve in curves:
        agent = next((agent for agent in analysis.data.agents if agent.agent == curve.agent), None)
        steps, values = thinned(curve)
        axes.plot(
            steps, values, color=colour(agent, analysis),
            linewidth=1.5 if len(curves) <= 2 else 1.1, alpha=1.0 if len(curves) <= 2 else 0.8,
            label=None if curve.label in labelled else curve.label,
        )  # fmt: skip
        labelled.add(curve.label)
    axes.set_title(metric)
    _set_step_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=COLOURS["muted"][0])
    if len(labelled) > 1:
        axes.legend()
    else:
        axes.set_title(curves[0].label, loc="right", color=COLOURS["muted"][0], fontsize=8.5)
    return Plot(
        name=f"curve_{index}_" + "".join(c if c.isalnum() else "_" for c in metric.lower()).strip("_"),
        caption=metric,
        description=f"{metric} against gradient steps. Last values: "
        + "; ".join(f"{c.label} seed {c.seed} {c.values[-1]:.3g}" for c in curves if len(c.values)),
        figure=figure,
    )


def thinned(curve: Curve) -> tuple[Array, Array]:
    """The curve, as means of at most 150 blocks of neighbouring points."""
    steps = np.asarray(curve.gradient_steps, dtype=np.float64)
    values = np.asarray(curve.values, dtype=np.float64)
    if len(steps) <= MAX_POINTS:
        return steps, values
    blocks = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return np.array([steps[b].mean() for b in blocks]), np.array([values[b].mean() for b in blocks])
