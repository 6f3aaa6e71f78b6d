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
    offline = commands.add_parser("train", help="train a network offline, from a store", description=_train.__doc__)
    online = commands.add_parser(
        "train-online", help="train a network that plays, and keep what it plays", description=_train_online.__doc__
    )
    for train, command in ((offline, _train), (online, _train_online)):
        train.add_argument("--config", type=Path, help="a whole configuration, as --print-config prints it")
        train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
        train.set_defaults(run_command=command)


def _train_online(args: argparse.Namespace) -> None:
    """Trains a network on what it plays itself, with the settings of configs/online/; the store of all that it played
    is made in run_dir, for torchrl-sql train. Continues the run in run_dir if there is one.
    """
    chosen = dict(word.split("=", 1) for word in args.overrides if "=" in word)
    if "scale" in chosen and "online" not in chosen:
        args.overrides = [*args.overrides, f"online={chosen['scale']}"]
    _train(args)


def _train(args: argparse.Namespace) -> None:
    """Trains a network from a store; continues the run in run_dir if there is one."""
    from torchrl_sql.config import compose_run_config, load_run_config

    if args.config is not None and args.overrides:
        raise ValueError(f"--config takes no settings beside the file's own, got {args.overrides[0]!r}")
    config = compose_run_config(args.overrides) if args.config is None else load_run_config(args.config)
    if args.command == "train-online" and config.online is None:
        raise ValueError("train-online needs online settings: online=NAME, or the section in the file of --config")
    if args.print_config:
        print(config.to_yaml(), end="")
        return
    from torchrl_sql.methods import make_method
    from torchrl_sql.training import train

    folder = train(config, evaluate=_evaluate_checkpoint)
    if os.environ.get("RANK", "0") == "0":
        acts = make_method(config.method).values != "none"
        policy = shlex.quote(str(folder / "policy.safetensors"))
        following = f"evaluate {shlex.quote(str(folder))}" if acts else f"train init.policy={policy} ..."
        print(f"Trained: {folder}. Next: torchrl-sql {following}")


def _evaluate_checkpoint(checkpoint: Path, on_decision: Callable[[], None]) -> Mapping[str, float]:
    # Runs without evaluation do not wait for this import.
    from torchrl_sql.evaluation.agents import evaluate_checkpoint

    return evaluate_checkpoint(checkpoint, on_decision)
