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


def published_name(agent: str) -> str:
    """``Scaled QL 80M`` for ``Scaled_QL_80M``."""
    return agent.replace("_", " ")


def colour(agent: Agent | None, analysis: Analysis) -> str:
    """By role, paler for the agents after a role's first (smaller sizes)."""
    if agent is None or agent.role == "other":
        return COLOURS["other"][0]
    place = _place(agent, analysis)
    if agent.role == "method":
        return COLOURS[("method", "method2", "method3")[min(place, 2)]][0]
    return COLOURS[("bc", "bc2")[min(place, 1)]][0]


def marker(agent: Agent, analysis: Analysis) -> str:
    """Tells apart the agents of one role where colours alone could fail."""
    return "os^Dv"[min(_place(agent, analysis), 4)]


def point_style(agent: Agent, analysis: Analysis) -> dict[str, Any]:
    """Of a point with colour and marker; hollow for sampled decoding."""
    own = colour(agent, analysis)
    face = COLOURS["paper"][0] if agent.decoding == "sampled" else own
    return {"marker": marker(agent, analysis), "markersize": 5, "color": own, "markerfacecolor": face}


def bar_style(policy: str, analysis: Analysis) -> dict[str, Any]:
    """Solid for agents that act greedily and the behaviour; outlined for their variants."""
    agents = {agent.label: agent for agent in analysis.data.agents}
    own = colour(agents[policy], analysis) if policy in agents else COLOURS["data"][0]
    outlined = policy in (BEST_BEHAVIOUR, BEST_CONSTANT) or (policy in agents and agents[policy].decoding == "sampled")
    return {"facecolor": COLOURS["paper"][0] if outlined else own, "edgecolor": own, "linewidth": 1.2}


def _place(agent: Agent, analysis: Analysis) -> int:
    return [other for other in analysis.data.agents if other.role == agent.role].index(agent)
