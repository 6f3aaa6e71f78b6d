"""Plots along an axis: scores of a family of agents, scores of evaluated checkpoints, and what training logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from torchrl_sql.report.analysis import ALL, Analysis, Line
from torchrl_sql.report.figures.look import CAP_SIZE, STEPS, colour, marker, point_style
from torchrl_sql.report.learning import GRADIENT_STEPS
from torchrl_sql.report.model import Curve
from torchrl_sql.report.style import COLOURS, SMALL_WIDTH, WIDTH, Plot, new_figure
from torchrl_sql.statistics.intervals import Interval
from torchrl_sql.statistics.scores import Array

PANELS_IN_ONE_PLOT = 10
MAX_POINTS = 150
"""Of a training curve; longer ones are shown as means of so many blocks."""
LABELS_INSIDE = 4
"""As many labels leave room for the lines of a small plot; more are beside them, and lines have markers."""
LABEL_LENGTH = 18
"""Characters that two columns of a small plot's legend have room for."""
_MARGIN = 0.1
"""Of an axis of settings, at each end, as a share of the data's range."""
_CHARACTER_POINTS = 5.0
"""More than a character of a tick's label is wide."""
WIDE_AXIS = 8
"""Where the ends of an axis are so many times apart, it is logarithmic."""


def line_plots(analysis: Analysis, lines: Sequence[Line], *, name: str, axis: str) -> list[Plot]:
    """Scores along an axis with intervals: the IQM over the games that are aggregated, then each game."""
    if not lines:
        return []
    points = analysis.along(lines)
    games = [game for game in analysis.data.games if game in points]
    num_plots = -(-len(games) // PANELS_IN_ONE_PLOT)
    size = -(-len(games) // num_plots)
    parts = {f"{name}_by_game_{index + 1}": games[index * size : (index + 1) * size] for index in range(num_plots)}
    parts = ({name: [ALL]} if ALL in points else {}) | parts

    def plot(name: str, panels: Sequence[str]) -> Plot:
        span = panels[0] if len(panels) == 1 else f"{panels[0]} to {panels[-1]}"
        what = "Human-normalised IQM over games" if panels == [ALL] else f"Mean raw return in {span}"
        return Plot(
            name=name,
            caption=f"{what} against {axis}, with 95% intervals.",
            description=f"{what} of {', '.join(line.label for line in lines)} against {axis}; see the table.",
            figure=_panels(analysis, lines, {panel: points[panel] for panel in panels}, axis),
        )

    return [plot(name, panels) for name, panels in parts.items()]


def _panels(
    analysis: Analysis, lines: Sequence[Line], panels: Mapping[str, Mapping[str, Mapping[float, Interval]]], axis: str
) -> Figure:
    """A panel per name: each line's intervals by place on the axis."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    legend_height = 0.17 * -(-len(lines) // 3) + 0.1
    height = (2.2 if columns == 1 else 1.3) * rows + 0.4 + legend_height
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.subplots(rows, columns, squeeze=False)
    # Fixed margins: a constrained layout of many panels takes seconds.
    figure.subplots_adjust(
        left=0.1, right=0.97, top=1 - (legend_height + 0.2) / height, bottom=0.45 / height, wspace=0.26, hspace=0.62
    )
    drawn: dict[str, Any] = {}
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        there = [line for line in lines if curves.get(line.label)]
        shifts = _shifts(there) if axis == analysis.learning.axis else [0.0] * len(there)
        for line, shift in zip(there, shifts, strict=True):
            _draw_line(axes, line, analysis, {x + shift: interval for x, interval in curves[line.label].items()})
        drawn |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_title("Human-normalised IQM" if name == ALL else name, fontsize=8.5)
        _set_axis(axes, axis, lines, steps=axis == analysis.learning.axis, label=False)
        axes.tick_params(axis="both", labelsize=7, labelcolor=COLOURS["muted"][0])
        axes.yaxis.set_major_locator(MaxNLocator(3 if columns > 1 else 5, steps=STEPS))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend([*drawn.values()], [*drawn], loc="upper left", ncols=3, fontsize=8)
    figure.supxlabel(axis, fontsize=9, color=COLOURS["muted"][0], y=0.05 / height)
    return figure


def _shifts(lines: Sequence[Line]) -> list[float]:
    """How far each line is moved along a linear axis, so that intervals at the same place can be told apart."""
    places = sorted({x for line in lines for x in line.runs})
    gap = min((after - before for before, after in pairwise(places)), default=0.0)
    step = min(0.3 * gap / len(lines), 0.03 * (places[-1] - places[0]))  # as little as tells them apart
    return [step * (index - (len(lines) - 1) / 2) for index in range(len(lines))]


def _draw_line(axes: Axes, line: Line, analysis: Analysis, points: Mapping[float, Interval]) -> None:
    reach = [
        [interval.point - interval.low for interval in points.values()],
        [interval.high - interval.point for interval in points.values()],
    ]
    style = point_style(line.agent, analysis) | {"markersize": 3.5}
    axes.errorbar(
        [*points], [interval.point for interval in points.values()], yerr=reach, label=line.label, capsize=CAP_SIZE - 1,
        linestyle="--" if line.agent.decoding == "sampled" else "-", linewidth=1.3, elinewidth=1.1, **style,
    )  # fmt: skip


def _set_axis(axes: Axes, axis: str, lines: Sequence[Line] = (), *, steps: bool, label: bool = True) -> None:
    axes.set_xlabel(axis if label else "")
    axes.grid()
    places = sorted({x for line in lines for x in line.runs})
    logarithmic = not steps and bool(places) and places[0] > 0 and places[-1] / places[0] >= WIDE_AXIS
    if logarithmic:
        axes.set_xscale("log")
    if steps:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5 if label else 4, steps=STEPS))
    else:
        number = EngFormatter(places=0, sep="") if axis == "parameters" else FuncFormatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_major_formatter(number)
        longest = max((len(number(place)) for place in places), default=0)
        points = axes.get_window_extent().width / axes.figure.dpi * 72 / (1 + 2 * _MARGIN)
        share = _CHARACTER_POINTS * (longest + 1) / points
        axes.set_xticks(_apart(places, share, math.log if logarithmic else float))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=_MARGIN)


def _apart(places: Sequence[float], share: float, scale: Callable[[float], float]) -> list[float]:
    """The first place, the last, and of those between as many as leave this share of the axis to each label."""
    if len(places) < 2:
        return list(places)
    end = scale(places[-1])
    room = share * (end - scale(places[0]))
    kept = [places[0]]
    for place in places[1:-1]:
        if scale(place) - scale(kept[-1]) >= room and end - scale(place) >= room:
            kept.append(place)
    return [*kept, places[-1]]


def training_plots(analysis: Analysis) -> list[Plot]:
    """One panel per training metric, one line per run."""
    metrics = list(dict.fromkeys(curve.metric for curve in analysis.data.curves))
    return [_metric_plot(analysis, index, metric) for index, metric in enumerate(metrics)]


def _metric_plot(analysis: Analysis, index: int, metric: str) -> Plot:
    curves = [curve for curve in analysis.data.curves if curve.metric == metric]
    labels = {curve.label for curve in curves}
    columns = 2 if max(map(len, labels)) <= LABEL_LENGTH else 1
    legend_rows = 0 if len(labels) <= LABELS_INSIDE else -(-len(labels) // columns)
    figure, axes = new_figure(2.1 + 0.17 * legend_rows, width=SMALL_WIDTH)
    labelled: set[str] = set()
    for curve in curves:
        agent = next((agent for agent in analysis.data.agents if agent.agent == curve.agent), None)
        steps, values = thinned(curve)
        axes.plot(
            steps, values, color=colour(agent, analysis),
            linewidth=1.5 if len(curves) <= 2 else 1.1, alpha=1.0 if len(curves) <= 2 else 0.8,
            label=None if curve.label in labelled else curve.label,
            marker=marker(agent, analysis) if legend_rows and agent is not None else None, markersize=3,
            markevery=max(1, len(steps) // 4),
        )  # fmt: skip
        labelled.add(curve.label)
    axes.set_title(metric)
    _set_axis(axes, GRADIENT_STEPS, steps=True)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=COLOURS["muted"][0])
    if legend_rows:
        figure.legend(loc="outside lower left", ncols=columns)
    elif len(labels) > 1:
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
