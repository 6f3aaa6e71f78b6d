"""``torchrl-sql report``."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the parser of this command to ``commands``, the subparsers of ``torchrl-sql``."""
    report = commands.add_parser("report", help="write one HTML page about evaluated runs", description=_report.__doc__)
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_OR_SCORES",
        help="folders of runs or studies, or tables of scores; same-named runs are seeds of one agent",
    )  # fmt: skip
    report.add_argument("--games", help="some of the games, separated by commas (default: the runs' games)")
    report.add_argument("--main", metavar="NAME", help="the agent that the page is about (default: the first run)")
    report.add_argument("--against", metavar="A,B", help="agents that it is compared with (default: all others)")
    report.add_argument("--title", help="of the page (default: the names of the agents, or a study's title)")
    report.add_argument("--out", type=Path, help="the page (default: report.html in the folder, if it is only one)")
    report.set_defaults(run_command=_report)


def _report(args: argparse.Namespace) -> None:
    """Writes a self-contained page: aggregates with intervals, scores by game, learning curves, value calibration, data
    statistics, clips and settings. Plots (PNG, SVG) and tables (CSV) can be saved from the page and lie beside it.
    """
    from torchrl_sql.games import resolve_games
    from torchrl_sql.provenance import describe_benchmark
    from torchrl_sql.report import format_score_table, write_report
    from torchrl_sql.report.gather import gather

    first = args.runs[0]
    if args.out is None and len(args.runs) > 1:
        raise ValueError("--out must be given with several folders: a page in one of them would hide that folder's own")
    data = gather(
        args.runs,
        games=None if args.games is None else resolve_games(args.games),
        main=args.main,
        against=[] if args.against is None else args.against.split(","),
        title=args.title,
    )
    made = describe_benchmark()
    command = shlex.join(["torchrl-sql", *args.words])
    data = replace(data, provenance=f"Written by {command} on {made['date']}, commit {made['commit']}.")
    page = write_report(data, args.out or (first if first.is_dir() else first.parent) / "report.html")
    print(format_score_table(data))
    print(f"\nReport: {page.resolve()}")
