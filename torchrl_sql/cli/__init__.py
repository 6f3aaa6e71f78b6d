"""The command ``torchrl-sql``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from torchrl_sql.cli import bench, data, evaluate, launch, train

DESCRIPTION = """\
Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL: one policy for many Atari games, learned offline.

  torchrl-sql quickstart                                the whole method in minutes, on a CPU
  torchrl-sql train experiment=quickstart seed=1        one training run from configs/experiment/quickstart.yaml
  torchrl-sql evaluate runs/NAME                        play a trained network, add to runs/NAME/scores.csv
  torchrl-sql report runs/NAME                          scores, intervals and curves as one HTML page
  torchrl-sql launch train experiment=... cluster=...   the same on a SLURM cluster
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except KeyboardInterrupt as interruption:
        message = str(interruption) or "stopped; the same command continues where it was"
        print(f"\n{message}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"torchrl-sql {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Sequence[str]) -> None:
    """Runs a command whose errors, and :class:`KeyboardInterrupt`, are the caller's."""
    _run(parse(arguments))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line without running it.

    Raises:
        SystemExit: if it is not understood; a message has been printed.
    """
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    # Settings may stand before and after options, which argparse's subcommands do not allow by themselves.
    args, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    args.words = words
    return args


def _run(args: argparse.Namespace) -> None:
    os.environ.setdefault("RL_WARNINGS", "False")  # the trainer steps its own target updater
    args.run_command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-sql", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (train, evaluate, data, launch, bench):
        group.add_commands(commands)
    return parser
