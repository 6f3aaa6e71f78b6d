"""``torchrl-sql evaluate`` and ``report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    evaluate = commands.add_parser(
        "evaluate", help="play a trained network in the emulator", description=_evaluate.__doc__
    )
    evaluate.add_argument("run_or_checkpoint", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint")
    evaluate.add_argument("--games", help="some of the network's games, separated by commas (default: all)")
    evaluate.add_argument("--decoding", choices=("greedy", "sampled"), default="greedy", help="default: greedy")
    evaluate.add_argument(
        "--scores", type=Path, help="CSV to add episodes to (default: scores.csv in the run's folder)"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. evaluation.num_episodes_per_game=16")
    evaluate.set_defaults(run_command=_evaluate)

    report = commands.add_parser("report", help="write one HTML page about evaluated runs", description=_report.__doc__)
    report.add_argument("runs", nargs="+", type=Path, help="folders that hold scores.csv; same-named runs are seeds")
    report.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    report.set_defaults(run_command=_report)


def _evaluate(args: argparse.Namespace) -> None:
    """Plays a trained network in the emulator and adds each finished episode to a CSV table; episodes that the table
    has already are not played again.
    """
    from torchrl_sql.config import override_run_config
    from torchrl_sql.games import resolve_games
    from torchrl_sql.stages import evaluate_checkpoint
    from torchrl_sql.training.build import find_checkpoint, load_actor

    checkpoint = find_checkpoint(args.run_or_checkpoint)
    if args.scores is None and not args.run_or_checkpoint.is_dir():
        raise ValueError("--scores must be given with a checkpoint, e.g. --scores scores.csv")
    trained = load_actor(checkpoint)
    config = trained.config
    evaluation = override_run_config(config, args.overrides, section="evaluation").evaluation
    scores = args.scores or args.run_or_checkpoint / "scores.csv"
    games = None if args.games is None else resolve_games(args.games)
    evaluate_checkpoint(trained, evaluation, scores, games=games, decoding=args.decoding)
    print(f"Episodes: {scores}. Next: torchrl-sql report {scores.parent}")


def _report(args: argparse.Namespace) -> None:
    """Writes a self-contained page: tables, intervals, learning curves, data statistics, clips and settings."""
    from torchrl_sql.evaluation.report import format_score_table, write_report
    from torchrl_sql.run_report import gather

    data = gather(args.runs)
    page = write_report(data, args.out or args.runs[0] / "report.html")
    print(format_score_table(data))
    print(f"\nReport: {page.resolve()}")
