"""``torchrl-sql config``."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the parser of this command to ``commands``, the subparsers of ``torchrl-sql``."""
    config = commands.add_parser(
        "config", help="explain settings, list and print their files", description=_config.__doc__
    )
    config.add_argument(
        "key", nargs="?", help="a setting (optim.eps), a section (optim) or a file to print (study/quickstart)"
    )
    config.set_defaults(run_command=_config)


def _config(args: argparse.Namespace) -> None:
    """Lists the choices of configs/; with a key, says what a setting is, what it must be, and which file sets it to
    what, with the source of the value. A printed file is a start for your own: `torchrl-sql config study/quickstart >
    mine.yaml`, then `torchrl-sql study mine.yaml`; for a run, `torchrl-sql train --print-config ... > mine.yaml`, then
    `torchrl-sql train --config mine.yaml`.
    """
    from torchrl_sql.config import configs_dir
    from torchrl_sql.config.explain import explain, overview

    if args.key is None:
        print("Choices, as GROUP=NAME (train --print-config shows what they amount to):\n")
        print(f"{overview()}\n\nMore: torchrl-sql config KEY, SECTION or GROUP/NAME, e.g. optim.eps, optim, scale/cpu")
    elif "/" in args.key:
        file = configs_dir() / f"{args.key.removesuffix('.yaml')}.yaml"
        if not file.is_file() or not file.resolve().is_relative_to(configs_dir().resolve()) or ".." in file.parts:
            raise ValueError(f"there is no {args.key} among the choices of `torchrl-sql config`")
        print(file.read_text(encoding="utf-8"), end="")
    else:
        print(explain(args.key))
