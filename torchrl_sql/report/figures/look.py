"""What an agent looks like, in every plot of a report."""

from __future__ import annotations

from typing import Any

from torchrl_sql.report.analysis import BEST_BEHAVIOUR, BEST_CONSTANT, Analysis
from torchrl_sql.report.model import Agent
from torchrl_sql.report.style import COLOURS

STEPS = [1, 2, 2.5, 5, 10]
"""Distances of ticks."""

REFERENCE_AXIS = {"human": "human-normalised", "dqn": "DQN-normalised"}

PUBLISHED_MARKS: dict[str, dict[str, Any]] = {
    name: {
        "marker": marker,
        "markersize": size,
        "markerfacecolor": COLOURS["paper"][0],
        "markeredgecolor": COLOURS["ink"][0],
        "linestyle": "none",
    }
    for name, marker, size in (("Scaled_QL_80M", "D", 4.2), ("MGDT_200M", "o", 4.4), ("MTBC_120M", "v", 4.6))
}
"""Published agents that stand beside ours in plots of games: the method, a return-conditioned one, cloning."""

DQN_MARK: dict[str, Any] = {
    "marker": "|",
    "markersize": 9,
    "markeredgewidth": 1.8,
    "markeredgecolor": COLOURS["data"][0],
    "linestyle": "none",
}


def colour(agent: Agent | None, analysis: Analysis) -> str:
    """One colour for the main agent and its sizes, one for those it is compared with, paler for later ones."""
    for names, agents in _palettes(analysis):
        if agent in agents:
            return COLOURS[names[min(agents.index(agent), len(names) - 1)]][0]
    return COLOURS["other"][0]


def _palettes(analysis: Analysis) -> list[tuple[tuple[str, ...], list[Agent]]]:
    ours = [analysis.main, *(agent for agent in reversed(analysis.sizes) if agent != analysis.main)]
    first = {agent.agent for agent in analysis.against[:1]}
    theirs = [agent for agent in analysis.against if agent.agent in first and agent not in ours]
    return [(("method", "method2", "method3"), ours), (("bc", "bc2"), theirs)]


def marker(agent: Agent, analysis: Analysis) -> str:
    """Tells apart the agents of one colour where shades alone could fail."""
    alike = [other for other in analysis.agents if colour(other, analysis) == COLOURS["other"][0]]
    for _, agents in [*_palettes(analysis), ((), alike)]:
        if agent in agents:
            return "os^Dv"[min(agents.index(agent), 4)]
    return "o"


def point_style(agent: Agent, analysis: Analysis) -> dict[str, Any]:
    """Of a point with colour and marker; hollow for sampled decoding."""
    own = colour(agent, analysis)
    face = COLOURS["paper"][0] if agent.decoding == "sampled" else own
    return {"marker": marker(agent, analysis), "markersize": 5, "color": own, "markerfacecolor": face}


def bar_style(policy: str, analysis: Analysis) -> dict[str, Any]:
    """Solid for agents that act greedily and the behaviour; outlined for their variants."""
    agents = {agent.label: agent for agent in analysis.agents}
    own = colour(agents[policy], analysis) if policy in agents else COLOURS["data"][0]
    outlined = policy in (BEST_BEHAVIOUR, BEST_CONSTANT) or (policy in agents and agents[policy].decoding == "sampled")
    return {"facecolor": COLOURS["paper"][0] if outlined else own, "edgecolor": own, "linewidth": 1.2}
