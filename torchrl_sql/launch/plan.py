"""From arguments to tasks: which work, with which settings, in which folders."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from torchrl_sql.cli import parse
from torchrl_sql.config import ConfigError, compose_run_config
from torchrl_sql.launch.group import Task

RUNS = Path("runs")
"""Where launches make their folders."""


_MAX_NAME_BYTES = 255
"""Of Linux's file systems."""


class PlannedTask(NamedTuple):
    """A task with what is known about it before its folder exists."""

    task: Task
    config: str | None = None
    """Of a training run: its resolved configuration as YAML."""
    name: str = ""
    """Of a training run: its agent's name."""


def choose_root(name: str, *, out: Path | None = None) -> Path:
    """A folder for a launch that does not exist yet: ``runs/NAME-DATE-TIME-RANDOM``, or ``out``.

    Raises:
        ConfigError: if ``out`` exists.
    """
    if out is None:
        return RUNS / f"{folder_name(name)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if out.exists():
        raise ConfigError(f"--into must be a new folder, but {out} exists; torchrl-sql resume continues a launch")
    return out


def expand_sweep(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every combination of values separated by commas, as Hydra writes them: ``seed=0,1 model=resnet34,resnet50``.

    Returns:
        For each combination its label (``seed=0,model=resnet34``; empty if nothing is swept) and its overrides.

    Raises:
        ConfigError: for overrides that Hydra cannot read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(f"settings must be key=value, got {error.override!r}") from None
    fixed = [text for override, text in zip(parsed, overrides, strict=True) if not override.is_sweep_override()]
    swept = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        for override in parsed
        if override.is_sweep_override()
    ]
    return [(",".join(values), [*fixed, *values]) for values in product(*swept)]


def plan_training(overrides: Sequence[str], root: Path) -> list[PlannedTask]:
    """One training run for each combination of ``overrides``.

    A single run's folder is ``root`` itself; each of several has its own in it. Runs that differ in more than their
    seed are different agents: their label without the seed becomes part of their name.

    Raises:
        ConfigError: for settings that cannot be run.
    """
    for override in overrides:
        if override.startswith("run_dir="):
            raise ConfigError(f"the launcher makes the run's folder: give --into instead of {override}")
    combinations = expand_sweep(overrides)
    planned: list[PlannedTask] = []
    for label, own in combinations:
        config = compose_run_config(own)
        config.run_dir = str((root if len(combinations) == 1 else root / folder_name(label)).resolve())
        agent = ",".join(part for part in label.split(",") if part and not part.startswith("seed="))
        if agent and not any(override.startswith("name=") for override in own):
            config.name = f"{config.name}-{folder_name(agent)}"
        task = Task(label=label, arguments=["train", *own], run_dir=config.run_dir)
        planned.append(PlannedTask(task, config.to_yaml(), config.name))
    labels: dict[str | None, str] = {}
    for task, _, _ in planned:
        if task.run_dir in labels:
            raise ConfigError(f"{labels[task.run_dir]} and {task.label} would share the folder {task.run_dir}")
        labels[task.run_dir] = task.label
        if len(os.fsencode(Path(task.run_dir or "").name)) > _MAX_NAME_BYTES:
            raise ConfigError(
                f"{task.label} is too long for the name of a run's folder: sweep fewer settings at a time"
            )
    return planned


def plan_command(kind: str, arguments: Sequence[str], *, label: str = "") -> PlannedTask:
    """Any other command of ``torchrl-sql`` as a task.

    Raises:
        SystemExit: if the command does not understand its arguments; it has said why.
    """
    parse([kind, *arguments])
    return PlannedTask(Task(label=label, arguments=[kind, *arguments]))


def plan_evaluation(agents: Sequence[str], options: Sequence[str], *, num_shares: int) -> list[PlannedTask]:
    """Evaluations of agents, each split into shares of its episodes, all of which write parts of one table.

    Args:
        agents (sequence of str): runs, checkpoints, ...
        options (sequence of str): further arguments of ``torchrl-sql evaluate``.

    Keyword Args:
        num_shares (int): shares of each.

    Raises:
        ConfigError: if ``num_shares`` is less than 1.
        SystemExit: as for :func:`plan_command`.
    """
    if num_shares < 1:
        raise ConfigError(f"--shares must be at least 1, got {num_shares}")
    if num_shares == 1:
        return [plan_command("evaluate", [agent, *options], label=agent) for agent in agents]
    shares = [f"{number}/{num_shares}" for number in range(1, num_shares + 1)]
    return [
        plan_command("evaluate", [agent, *options, "--share", share], label=f"{agent} {share}")
        for agent in agents
        for share in shares
    ]


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_")
