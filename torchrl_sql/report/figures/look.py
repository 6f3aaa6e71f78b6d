"""What an agent looks like, in every plot of a report."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from torchrl_sql.report.analysis import BEST_BEHAVIOUR, BEST_CONSTANT, Analysis
from torchrl_sql.report.model import Agent
from torchrl_sql.report.style import COLOURS
from torchrl_sql.statistics.intervals import Interval

STEPS = [1, 2, 2.5, 5, 10]
"""Distances of ticks."""

MARKER_SIZE = 5
CAP_SIZE = 4.5
"""Half the width of an interval's ends, in points: they stand out beside the marker of the narrowest interval."""

DQN_MARK: dict[str, Any] = {
    "marker": "|",
    "markersize": 9,
    "markeredgewidth": 1.8,
    "markeredgecolor": COLOURS["data"][0],
    "linestyle": "none",
}


def published_style(mark: str | None) -> dict[str, Any]:
    """Of a published agent's score."""
    ink, paper = COLOURS["ink"][0], COLOURS["paper"][0]
    style = {"marker": mark or "D", "markersize": 4.4, "markerfacecolor": paper, "markeredgecolor": ink}
    return style | {"linestyle": "none"}


def colour(agent: Agent | None, analysis: Analysis) -> str:
    """One colour for the main agent and its family, one for those it is compared with, paler for later ones."""
    for names, agents in _palettes(analysis):
        if agent in agents:
            return COLOURS[names[min(agents.index(agent), len(names) - 1)]][0]
    return COLOURS["other"][0]


def _palettes(analysis: Analysis) -> list[tuple[tuple[str, ...], list[Agent]]]:
    ours = [analysis.main, *(agent for agent in reversed(analysis.family) if agent != analysis.main)]
    theirs = analysis.against[:1]
    theirs += [
        agent
        for agent in analysis.agents
        for first in theirs[:1]
        if agent not in [first, *ours]
        and (agent.agent == first.agent or (agent.family is not None and agent.family == first.family))
    ]
    rest: dict[str, list[Agent]] = defaultdict(list)
    for agent in analysis.agents:
        if agent not in [*ours, *theirs]:
            rest[agent.family or agent.agent].append(agent)
    others = zip(cycle([(name,) for name in COLOURS if name.startswith("other")]), rest.values(), strict=False)
    return [(("method", "method2", "method3"), ours), (("bc", "bc2"), theirs), *others]


def marker(agent: Agent, analysis: Analysis) -> str:
    """Tells apart the agents of one colour, and colours where they alone could fail."""
    groups = [agents for _, agents in _palettes(analysis)]
    place, agents = next((place, agents) for place, agents in enumerate(groups) if agent in agents)
    return "os^Dv"[(place + place // 5 + agents.index(agent)) % 5]  # the other colours come again after five


def point_style(agent: Agent, analysis: Analysis) -> dict[str, Any]:
    """Of a point with colour and marker; hollow for sampled decoding."""
    own = colour(agent, analysis)
    face = COLOURS["paper"][0] if agent.decoding == "sampled" else own
    return {"marker": marker(agent, analysis), "markersize": MARKER_SIZE, "color": own, "markerfacecolor": face}


def draw_row(axes: Axes, row: float, interval: Interval, **style: Any) -> None:
    """A point and its interval, lying; ``style`` is that of a point."""
    axes.plot(interval.point, row, **style)
    reach = [[interval.point - interval.low], [interval.high - interval.point]]
    axes.errorbar(interval.point, row, xerr=reach, color=style["color"], capsize=CAP_SIZE, linewidth=1.6, zorder=1.9)


def bar_style(policy: str, analysis: Analysis) -> dict[str, Any]:
    """Solid for agents that act greedily and the behaviour; outlined for their variants."""
    agents = {agent.label: agent for agent in analysis.agents}
    own = colour(agents[policy], analysis) if policy in agents else COLOURS["data"][0]
    outlined = policy in (BEST_BEHAVIOUR, BEST_CONSTANT) or (policy in agents and agents[policy].decoding == "sampled")
    return {"facecolor": COLOURS["paper"][0] if outlined else own, "edgecolor": own, "linewidth": 1.2}


def draw_bar(axes: Axes, row: float, interval: Interval, height: float, **style: Any) -> None:
    """A bar and its interval, lying."""
    axes.barh(row, interval.point, height=height, **style)
    reach = [[interval.point - interval.low], [interval.high - interval.point]]
    for name, width, cap in (("paper", 2.6, 3.0), ("ink", 1.1, 2.4)):  # a rim keeps the line visible on a dark bar
        axes.errorbar(
            interval.point, row, xerr=reach, fmt="none", color=COLOURS[name][0], linewidth=width, capsize=cap,
            capthick=width,
        )  # fmt: skip
