"""``torchrl-sql train``."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OVERRIDES_HELP = (
    "settings as group=choice or key=value, e.g. scale=cpu method=cql_hl_gauss seed=1; "
    "the keys are explained in torchrl_sql/config/schema.py and the files of configs/"
)


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    train = commands.add_parser("train", help="train a network offline, from a store", description=_train.__doc__)
    train.add_argument("--config", type=Path, help="a whole configuration, as --print-config prints it")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    train.set_defaults(run_command=_train)


def _train(args: argparse.Namespace) -> None:
    """Trains a network from a store; continues the run in run_dir if there is one."""
    from torchrl_sql.config import compose_run_config, load_run_config

    if args.config is not None and args.overrides:
        raise ValueError(f"--config takes no settings beside the file's own, got {args.overrides[0]!r}")
    config = compose_run_config(args.overrides) if args.config is None else load_run_config(args.config)
    if args.print_config:
        print(config.to_yaml(), end="")
        return
    from torchrl_sql.training import train

    folder = train(config, evaluate=_evaluate_checkpoint)
    if os.environ.get("RANK", "0") == "0":
        print(f"Trained: {folder}. Next: torchrl-sql evaluate {shlex.quote(str(folder))}")


def _evaluate_checkpoint(checkpoint: Path, on_decision: Callable[[], None]) -> Mapping[str, float]:
    # Runs without evaluation do not wait for this import.
    from torchrl_sql.evaluation.agents import evaluate_checkpoint

    return evaluate_checkpoint(checkpoint, on_decision)
