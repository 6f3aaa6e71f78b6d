"""Learning curves: agents' returns at several gradient steps, and the areas under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torchrl_sql.report.model import Agent
from torchrl_sql.statistics.curves import area_under_curve
from torchrl_sql.statistics.scores import RunReturns

GRADIENT_STEPS = "gradient steps"


@dataclass(frozen=True)
class LearningCurves:
    """Of the agents that were evaluated in full at two checkpoints or more.

    Attributes:
        runs (mapping): ``{agent: {gradient step: returns}}``, steps ascending.
        main (Agent, optional): the agent that the page is about, with a curve or not; None if it has no scores.
        against (sequence of Agent): those that it is compared with, likewise.
    """

    runs: Mapping[Agent, Mapping[int, RunReturns]]
    main: Agent | None
    against: Sequence[Agent]

    @cached_property
    def paces(self) -> set[float | None]:
        """Agent steps per gradient step of all agents; None of those that do not play."""
        return {agent.agent_steps_per_gradient_step for agent in self.runs}

    @property
    def pace(self) -> float | None:
        """That of all agents, if they have the same."""
        return next(iter(self.paces)) if len(self.paces) == 1 else None

    @property
    def axis(self) -> str:
        """What curves are against: agent steps if all agents played equally many per gradient step."""
        return (
            GRADIENT_STEPS
            if self.pace is None
            else f"agent steps since learning began ({self.pace:g} per gradient step)"
        )

    @cached_property
    def area_steps(self) -> list[int]:
        """Gradient steps at which the main agent and those that it is compared with were evaluated in full, ascending.

        Of the latter, one that has fewer than two of them in common with those before it does not count. Empty if the
        main agent has no curve or no scores.
        """
        steps = [*self.runs.get(self.main, ())] if self.main else []
        for agent in self.against:
            shared = [step for step in steps if step in self.runs.get(agent, ())]
            steps = shared if len(shared) > 1 else steps
        return steps

    @cached_property
    def areas(self) -> dict[str, RunReturns]:
        """Mean returns over the span of :attr:`area_steps`, by label of the agents that were evaluated at each."""
        return {
            agent.label: area_under_curve({step: curve[step] for step in self.area_steps})
            for agent, curve in self.runs.items()
            if self.area_steps and {*self.area_steps} <= curve.keys()
        }
