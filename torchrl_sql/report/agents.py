"""Which agents a report has, what each is called, and which of them are sizes of one method."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product, takewhile
from typing import Any, NamedTuple

from torchrl_sql.config import RunConfig
from torchrl_sql.config.study import StudyConfig
from torchrl_sql.evaluation.agents import ConstantAgent
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.protocol import Decoding
from torchrl_sql.methods import METHODS, make_method
from torchrl_sql.report.model import Agent
from torchrl_sql.report.text import format_x

PARAMETERS = "parameters"
"""The axis along which networks grow: every setting of the section ``model`` may change with it."""


def find_agents(runs: Sequence[RunConfig], episodes: Sequence[EpisodeResult], x: str | None = None) -> list[Agent]:
    """Every agent of the tables but constant actions, the runs first, in the order given.

    A run that is named like its method, ``scaled_ql`` or ``bc``, is called by the method's label, and so is one that
    was given no name, ``cql``, where no other is named like the method; every other, an ablation say, by its own name.
    With ``x``, runs that differ in nothing else are a family; its members are called by the family and their place on
    the axis.

    Args:
        runs (sequence of RunConfig): evaluated runs.
        episodes (sequence of EpisodeResult): of all agents.
        x (str, optional): ``"parameters"``, or a key of the runs' settings such as ``"data.first_fraction"``.

    Raises:
        ValueError: if there are constant actions only, or ``x`` is no number of a run.
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
    paces = {name: config.online.agent_steps_per_gradient_step for name, config in configs.items() if config.online}
    places = {name: _place(config, x, parameters[name]) for name, config in configs.items()} if x else {}
    families = _families(configs, x)
    places_of = Counter((families[name], place) for name, place in places.items())
    if crowded := [family for (family, _), count in places_of.items() if count > 1]:
        raise ValueError(f"runs of {crowded[0]} must differ in {x}; leave some out, or choose another --x")
    sizes = Counter(families.values())
    labels = {
        name: f"{family} {format_x(places[name], x)}" if x and sizes[family] > 1 else family
        for name, family in families.items()
    }
    agents = [
        Agent(
            agent=name,
            decoding=decoding,
            label=labels.get(name, name) + (f" {decoding}" if len(of_agent) > 1 else ""),
            num_parameters=parameters.get(name),
            x=places.get(name),
            agent_steps_per_gradient_step=paces.get(name),
            family=families[name] + (f" {decoding}" if len(of_agent) > 1 else "") if name in places else None,
        )
        for name, of_agent in decodings.items()
        for decoding in sorted(of_agent)
    ]
    if not agents:
        raise ValueError("the tables must hold episodes of an agent beside constant actions, found none")
    return agents


def _families(configs: Mapping[str, RunConfig], x: str | None) -> dict[str, str]:
    """By a run's name, what it and those that differ from it in ``x`` only are called: the words that their names begin
    with, as the method's label if they say the same (``bc_transformer`` is BC (transformer)) and no run starts from
    another or learns online. Where no run's name says the label, that which runs have by default stands for it.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, config in configs.items():
        apart = {
            key: value
            for key, value in deciding_settings(config).items()
            if x is None or (key != x and not (x == PARAMETERS and key.startswith("model.")))
        }
        group = next((names for settings, names in groups if x and settings == apart), None)
        if group is None:
            groups.append((apart, [name]))
        else:
            group.append(name)
    named_by_run = any(config.init.policy is not None or config.online is not None for config in configs.values())
    families: dict[str, str] = {}
    for _, names in groups:
        words = zip(*(name.split("_") for name in names), strict=False)
        shared = "_".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, words))
        method = configs[names[0]].method.name
        label = METHODS[method].label
        plain = re.sub(r"\W+", "_", label.lower()).strip("_")
        said = any(f"{name}_".startswith(f"{plain}_") for name in configs)
        own = plain if said else method  # a run's name is its method's where none was given
        is_plain = shared == own and not named_by_run and (own in names or own not in configs)
        labels = (*[label] * is_plain, shared or method, names[0])
        taken = {*families.values(), *configs} - {*names}
        families |= dict.fromkeys(names, next(label for label in labels if label not in taken))
    return families


def _place(config: RunConfig, x: str, num_parameters: int) -> float:
    value = num_parameters if x == PARAMETERS else deciding_settings(config).get(x)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"x must be {PARAMETERS} or a setting that is a number, got {x}, which is {value} of {config.name}"
        )
    return value


class Compared(NamedTuple):
    """Who is compared with whom.

    Attributes:
        main (str, optional): name or label of the agent that the page is about; by default the first.
        against (sequence of str, optional): names or labels; by default all others.
        pairs (sequence of two str): labels of further agents, one compared with the other.
        absent (str, optional): name of the agent that the page is about, if it has no scores.
    """

    main: str | None
    against: Sequence[str] | None
    pairs: Sequence[tuple[str, str]] = ()
    absent: str | None = None


def compared_by(
    study: StudyConfig,
    agents: Sequence[Agent],
    chosen: Sequence[Agent],
    main: str | None,
    against: Sequence[str] | None,
) -> Compared:
    """What a study compares of its agents with scores, or of those of them that were ``chosen``; ``main`` and
    ``against`` come before what it names. Those whom it names are compared with the agent that it is about only; any
    other is compared with all. Nobody takes the place of an agent that has no scores yet, unless agents were chosen.
    """
    planned = study.report.main or next(iter(study.runs))
    kept = chosen or agents
    names = {agent.agent for agent in kept}
    absent = planned if main is None and not chosen and planned not in names else None
    if main is None and planned in names:
        main = planned
    if against is None and absent is not None:
        against = []
    elif against is None and main is not None and named(kept, main, "--main")[0].agent == planned:
        there = [name for name in study.report.against if name in names]
        if study.report.against and (there or not chosen):  # else all that were chosen
            against = there
    pairs = [
        (one.label, other.label)
        for first, second in study.report.pairs
        for one, other in product(kept, kept)
        if (one.agent, other.agent) == (first, second)
    ]
    return Compared(main, against, pairs, absent)


def arrange(
    agents: Sequence[Agent], main: str | None, against: Sequence[str] | None
) -> tuple[list[Agent], list[str] | None]:
    """The agents in the order of the page, and the labels of those that the first one is compared with.

    Args:
        agents (sequence of Agent): as :func:`find_agents` gives them.
        main (str, optional): name or label of the agent that the page is about; by default the first.
        against (sequence of str, optional): names or labels; if None, the second result is None.

    Raises:
        ValueError: for a name that no agent has.
    """
    first = agents[0] if main is None else named(agents, main, "--main")[0]
    called = dict.fromkeys(agent for name in against or () for agent in named(agents, name, "--against"))
    compared = [agent for agent in called if agent != first]
    rest = [agent for agent in agents if agent != first and agent not in compared]
    rest.sort(key=lambda agent: agent.family is None or agent.family != first.family)
    return [first, *compared, *rest], None if against is None else [agent.label for agent in compared]


def named(agents: Sequence[Agent], name: str, option: str) -> list[Agent]:
    """The agents of a name or label; a ValueError about ``option`` if there is none."""
    found = [agent for agent in agents if name in (agent.agent, agent.label)]
    if not found:
        known = ", ".join(dict.fromkeys(agent.agent for agent in agents))
        raise ValueError(f"{option} must name agents with scores ({known}), got {name!r}")
    return found


def deciding_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that decide what is learned, beside the seeds and the places of the data and of the first weights."""
    places = ("init.policy", "init.sha256", "online.offline_store")
    settings = {key: value for key, value in config.deciding_settings().items() if key not in places}
    collection = {key: value for key, value in asdict(config.collection).items() if key != "seed"}
    return {"collection": collection} | settings


def _num_parameters(config: RunConfig) -> int:
    network = make_method(config.method).network(config.model, config.games)
    return sum(parameter.numel() for parameter in network.parameters())
