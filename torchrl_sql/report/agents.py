"""Which agents a report has, what each is called, and which of them are sizes of one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from torchrl_sql.config import RunConfig
from torchrl_sql.evaluation.agents import ConstantAgent
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.methods import METHODS, make_method
from torchrl_sql.report import Agent, Role
from torchrl_sql.report.text import format_size

_SIZES = ("resnet18", "resnet34", "resnet50", "resnet101")
"""Encoders that are one architecture in several sizes; any other one is another method."""


def find_agents(runs: Sequence[RunConfig], episodes: Sequence[EpisodeResult]) -> list[Agent]:
    """Every agent of the tables but constant actions: the method and its sizes first, then cloning, then others.

    The method is the first run of Q-learning, or without one the first agent. A run has its role, and a label by its
    method, if it differs from the first one of that method in nothing but the size of the encoder; every other
    run, an ablation say, is called by its name.

    Args:
        runs (sequence of RunConfig): evaluated runs, in the order given to the report.
        episodes (sequence of EpisodeResult): likewise.

    Raises:
        ValueError: if there are constant actions only.
    """
    configs: dict[str, RunConfig] = {}
    for config in runs:
        configs.setdefault(config.name, config)
    played = dict.fromkeys((row.agent, row.decoding) for row in episodes if ConstantAgent.action_of(row.agent) is None)
    if not played:
        raise ValueError("the tables must hold episodes of an agent beside constant actions, found none")
    parameters = {name: _num_parameters(config) for name, config in configs.items()}
    series = _size_series(configs)
    learning_values = [names for method, names in series.items() if METHODS[method].values == "q"]
    method_series = next(iter([*learning_values, *series.values()]), None)
    if method_series is None:
        trained = [row.agent for row in episodes if row.checkpoint]
        method_series = [trained[0] if trained else next(iter(played))[0]]
    labels = {
        name: METHODS[method].label + (f" {format_size(parameters[name])}" if len(names) > 1 else "")
        for method, names in series.items()
        for name in names
    }
    agents = []
    for name, decoding in played:
        role: Role = "other"
        if name in method_series:
            role = "method"
        elif name in labels:
            role = "bc_greedy" if decoding == "greedy" else "bc_sampled"
        only = len([other for other, _ in played if other == name]) == 1
        plain = (decoding == "greedy" and role == "method") or (only and name not in labels)
        label = labels.get(name, name)
        agents.append(
            Agent(
                agent=name,
                decoding=decoding,
                label=label if plain else f"{label} {decoding}",
                role=role,
                num_parameters=parameters.get(name),
            )
        )
    order: tuple[Role, ...] = ("method", "bc_greedy", "bc_sampled", "other")
    first = method_series[0]
    return sorted(agents, key=lambda a: (order.index(a.role), a.agent != first, -(a.num_parameters or 0)))


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
        encoder, others = config.model.encoder, [configs[other] for other in names]
        if (
            name != names[0]
            and {encoder, others[0].model.encoder} <= {*_SIZES}
            and encoder not in [other.model.encoder for other in others]
            and _apart_from_size(config) == _apart_from_size(others[0])
        ):
            names.append(name)
    return series


def _apart_from_size(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in deciding_settings(config).items() if key != "model.encoder"}


def _num_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        network = make_method(config.method).network(config.model, config.games)
    return sum(parameter.numel() for parameter in network.parameters())
