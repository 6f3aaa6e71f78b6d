"""``torchrl-sql quickstart`` and ``train``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from torchrl_sql.cli.settings import OVERRIDES_HELP


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    quickstart = commands.add_parser(
        "quickstart",
        help="collect, train, evaluate and report, at small scale, in one go",
        description=_quickstart.__doc__,
    )
    quickstart.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, help="of data, training and evaluation (default: 0)")
    quickstart.add_argument("--fresh", action="store_true", help="start over instead of continuing")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    quickstart.set_defaults(run_command=_quickstart)

    train = commands.add_parser("train", help="train a network offline, from a store", description=_train.__doc__)
    train.add_argument("--config", type=Path, help="a whole configuration, as --print-config prints it")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    train.set_defaults(run_command=_train)


def _quickstart(args: argparse.Namespace) -> None:
    """Runs the method end to end at small scale.

    Collects emulator data, trains one network for all games with CQL + C51 and one by behavioural cloning, evaluates
    them in the emulator and writes report.html and scores.csv. Continues an interrupted run.
    """
    from torchrl_sql.quickstart import quickstart

    seed = [] if args.seed is None else [f"seed={args.seed}"]
    page = quickstart(
        args.out,
        overrides=[*args.overrides, *seed],
        fresh=args.fresh,
        say=lambda line: print(line, flush=True),
    )
    print(f"\nReport: {page.resolve()}")


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

    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"Trained: {folder}. Next: torchrl-sql evaluate {folder}")
