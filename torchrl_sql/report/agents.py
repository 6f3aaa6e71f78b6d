"""Which agents a report has, what each is called, and which of them are sizes of one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torchrl_sql.config import RunConfig
from torchrl_sql.evaluation.agents import ConstantAgent
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.protocol import Decoding
from torchrl_sql.methods import METHODS, make_method
from torchrl_sql.report import Agent
from torchrl_sql.report.text import format_size

_SIZES = ("resnet18", "resnet34", "resnet50", "resnet101")
"""Encoders that are one architecture in several sizes; any other one is another method."""


def find_agents(runs: Sequence[RunConfig], episodes: Sequence[EpisodeResult]) -> list[Agent]:
    """Every agent of the tables but constant actions, the runs first, in the order given.

    A run that differs from the first one of its method in nothing but the size of the encoder is called by the method,
    and such runs are a group; every other run, an ablation say, is called by its name.

    Args:
        runs (sequence of RunConfig): evaluated runs.
        episodes (sequence of EpisodeResult): of all agents.

    Raises:
        ValueError: if there are constant actions only.
    """
    configs: dict[str, RunConfig] = {}
    for config in runs:
        configs.setdefault(config.name, config)
    decodings: dict[str, list[Decoding]] = {name: [] for name in configs}
    for row in sorted(episodes, key=lambda row: not row.checkpoint):  # trained agents before random play
        of_agent = decodings.setdefault(row.agent, [])
        if ConstantAgent.action_of(row.agent) is None and row.decoding not in of_agent:
            of_agent.append(row.decoding)
    parameters = {name: _num_parameters(config) for name, config in configs.items()}
    labels: dict[str, str] = {}
    groups: dict[str, str] = {}
    for method, names in _size_series(configs).items():
        for name in names:
            size = f" {format_size(parameters[name])}" if len(names) > 1 else ""
            labels[name], groups[name] = METHODS[method].label + size, method
    agents = [
        Agent(
            agent=name,
            decoding=decoding,
            label=labels.get(name, name) + (f" {decoding}" if len(of_agent) > 1 else ""),
            num_parameters=parameters.get(name),
            group=groups.get(name),
        )
        for name, of_agent in decodings.items()
        for decoding in sorted(of_agent)
    ]
    if not agents:
        raise ValueError("the tables must hold episodes of an agent beside constant actions, found none")
    return agents


def arrange(agents: Sequence[Agent], main: str | None, against: Sequence[str]) -> tuple[list[Agent], list[str] | None]:
    """The agents in the order of the page, and the labels of those that the first one is compared with.

    Args:
        agents (sequence of Agent): as :func:`find_agents` gives them.
        main (str, optional): name or label of the agent that the page is about; by default the first.
        against (sequence of str): names or labels; if empty, the second result is None.

    Raises:
        ValueError: for a name that no agent has.
    """

    def named(name: str, option: str) -> list[Agent]:
        found = [agent for agent in agents if name in (agent.agent, agent.label)]
        if not found:
            known = ", ".join(dict.fromkeys(agent.agent for agent in agents))
            raise ValueError(f"{option} must name agents with scores ({known}), got {name!r}")
        return found

    first = agents[0] if main is None else named(main, "--main")[0]
    compared = [agent for name in against for agent in named(name, "--against") if agent != first]
    rest = [agent for agent in agents if agent != first and agent not in compared]
    sizes = [agent for agent in rest if agent.group is not None and agent.group == first.group]
    sizes = sorted(sizes, key=lambda agent: (agent.decoding != first.decoding, -(agent.num_parameters or 0)))
    others = [agent for agent in rest if agent not in sizes]
    return [first, *sizes, *compared, *others], [agent.label for agent in compared] or None


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that decide what is learned, beside the seeds and the place of the data."""
    values = asdict(config)
    trainer = ("num_gradient_steps", "target_update_interval_gradient_steps", "precision")
    collection = {key: value for key, value in values["collection"].items() if key != "seed"}
    return {"collection": collection} | {
        f"{section}.{key}": value
        for section in ("data", "model", "method", "optim", "trainer")
        for key, value in values[section].items()
        if (section != "trainer" or key in trainer) and f"{section}.{key}" not in ("data.store", "data.prefetch")
    }


def _size_series(configs: Mapping[str, RunConfig]) -> dict[str, list[str]]:
    """By method: the first run's name and those that differ from it in the size of the encoder only."""
    series: dict[str, list[str]] = {}
    for name, config in configs.items():
        names = series.setdefault(config.method.name, [name])
        encoder, others = _encoder(config), [configs[other] for other in names]
        if (
            name != names[0]
            and {encoder, _encoder(others[0])} <= {*_SIZES}
            and encoder not in [_encoder(other) for other in others]
            and _apart_from_size(config) == _apart_from_size(others[0])
        ):
            names.append(name)
    return series


def _encoder(config: RunConfig) -> str | None:
    return getattr(config.model, "encoder", None)


def _apart_from_size(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in deciding_settings(config).items() if key != "model.encoder"}


def _num_parameters(config: RunConfig) -> int:
    network = make_method(config.method).network(config.model, config.games)
    return sum(parameter.numel() for parameter in network.parameters())
