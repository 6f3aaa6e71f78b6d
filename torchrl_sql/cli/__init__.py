"""The command ``torchrl-sql``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchrl_sql
from torchrl_sql.cli import bench, config, data, enjoy, evaluate, launch, probe, report, study, train
from torchrl_sql.errors import is_out_of_memory
from torchrl_sql.files import expand_path

DESCRIPTION = """\
Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL: one policy for many Atari games, learned offline.

  torchrl-sql quickstart                                the whole method in minutes, on a CPU
  torchrl-sql study STUDY --seeds 0,1,2                 runs, evaluations and one page, of configs/study/
  torchrl-sql train scale=cpu data.store=STORE          one training run, settings from configs/
  torchrl-sql train-online scale=cpu data.games=Pong    the same, but the network plays and learns from that
  torchrl-sql evaluate runs/NAME                        play a trained network, add to runs/NAME/scores.csv
  torchrl-sql report runs/NAME                          scores, intervals and curves as one HTML page
  torchrl-sql launch train scale=... cluster=...        the same on a SLURM cluster
"""
EXIT_CLOSED_PIPE = 141
"""As a shell reports a process that SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(torchrl_sql.__name__).setLevel(logging.INFO)  # of other packages, warnings are enough
    try:
        with _stopping_at_sigterm():
            _run(args)
        if sys.stdout is not None:  # as it is after `>&-`
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        message = str(interruption) or "stopped; the same command continues where it was"
        print(f"\n{message}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as in `torchrl-sql inspect STORE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"torchrl-sql {args.command}: {_describe(error)}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = ": ".join(["there is not enough memory", *str(error).splitlines()[:1]])
        print(f"torchrl-sql {args.command}: {reason}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, unless the command handles it."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) in (signal.SIG_IGN, None):
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(error: Exception) -> str:
    """What is wrong, in words where the operating system gives a number."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    problems = {
        FileNotFoundError: "does not exist",
        FileExistsError: "is there already" + ", as a file" * os.path.isfile(error.filename),
        NotADirectoryError: "is no folder",
        IsADirectoryError: "is a folder, not a file",
    }
    return f"{error.filename} {problems.get(type(error), f'cannot be used: {error.strerror}')}"


def run(arguments: Sequence[str]) -> None:
    """Run a command whose errors, :class:`KeyboardInterrupt` and signals are the caller's.

    SIGTERM ends it at once: SLURM sends it to a job's ranks when another has ended, whose word on why counts.

    Raises:
        ValueError: if the arguments are not understood, too.
    """
    try:
        args = parse(arguments)
    except SystemExit:
        raise ValueError(f"torchrl-sql {shlex.join(arguments)} is not understood: the log says why") from None
    _run(args)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line without running it.

    Raises:
        SystemExit: if it is not understood, or asks for help or the version; it has been printed.
    """
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        parser.print_help()
        raise SystemExit(0)
    # Settings may stand before and after options, which argparse's subcommands do not allow by themselves.
    args, rest = parser.parse_known_args(words)
    command: argparse.ArgumentParser = args.parser
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]:
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(unknown, command)}")
    if rest:
        args.overrides += rest
    args.words = words
    return args


def _suggestion(unknown: Sequence[str], command: argparse.ArgumentParser) -> str:
    options = [option for action in command._actions for option in action.option_strings]
    close = {match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], options, n=1)}
    return f"; did you mean {' or '.join(sorted(close))}?" if close else ""


def _run(args: argparse.Namespace) -> None:
    os.environ.setdefault("RL_WARNINGS", "False")  # the trainer steps its own target updater
    expand_paths(args)  # here, not where a job is planned
    args.run_command(args)


def expand_paths(args: argparse.Namespace) -> None:
    """Replaces ``~`` and environment variables in a command's paths.

    Raises:
        ValueError: if a variable is not set, or there is no such user.
    """
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, expand_path(value))
        elif isinstance(value, list):
            setattr(args, name, [expand_path(each) if isinstance(each, Path) else each for each in value])


class CommandParser(argparse.ArgumentParser):
    """A command's parser. ``fill``, if there is one, adds to it when it is used: what it imports may take seconds."""

    fill: Callable[[CommandParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Fills the parser first."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-sql", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"torchrl-sql {torchrl_sql.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for group in (study, train, evaluate, enjoy, report, probe, data, launch, bench, config):
        group.add_commands(commands)
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in your shell",
        description='For bash: eval "$(torchrl-sql completion bash)", in ~/.bashrc.',
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run_command=_completion)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _completion(args: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(_parser(), shell=args.shell))
