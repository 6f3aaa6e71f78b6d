"""``torchrl-sql report`` and ``reconstruct``."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl_sql.files import check_exists


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    report = commands.add_parser("report", help="write one HTML page about evaluated runs", description=_report.__doc__)
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_OR_SCORES",
        help="folders of runs or studies, or tables of scores; same-named runs are seeds of one agent",
    )  # fmt: skip
    report.add_argument("--games", help="some of the games, separated by commas (default: those of the main agent)")
    report.add_argument("--agents", metavar="A,B", help="only these agents (default: all)")
    report.add_argument("--main", metavar="NAME", help="the agent that the page is about (default: the first run)")
    report.add_argument("--against", metavar="A,B", help="agents that it is compared with (default: all others)")
    report.add_argument(
        "--x", metavar="KEY",
        help="draw scores along an axis: parameters, or a setting that runs differ in, e.g. data.first_fraction",
    )  # fmt: skip
    report.add_argument(
        "--step", type=int, metavar="N",
        help="compare trained agents at N gradient steps (default: the last at which all seeds were evaluated)",
    )  # fmt: skip
    report.add_argument("--aggregate", action="store_true", help="aggregates over games even of fewer than five")
    report.add_argument("--title", help="of the page (default: the names of the agents, or a study's title)")
    report.add_argument("--out", type=Path, help="the page (default: report.html in the folder, if it is only one)")
    report.add_argument(
        "--json", action="store_true", help="print all tables, caveats and findings as JSON instead of the summary"
    )
    report.set_defaults(run_command=_report)
    reconstruct = commands.add_parser(
        "reconstruct", help="draw what a masked auto-encoder makes of frames", description=_reconstruct.__doc__
    )
    reconstruct.add_argument("run", type=Path, help="folder of a trained run with method=mae")
    reconstruct.add_argument("--states", type=int, default=6, metavar="N", help="per game (default: 6)")
    reconstruct.add_argument("--seed", type=int, default=0, help="which states, and what is hidden of them")
    reconstruct.add_argument("--out", type=Path, help="the picture (default: reconstructions.png in the run)")
    reconstruct.set_defaults(run_command=_reconstruct)


def _report(args: argparse.Namespace) -> None:
    """Writes a self-contained page: scores and aggregates with intervals, learning curves, value calibration, data
    statistics, clips and settings. Plots (PNG, SVG) and tables (CSV, LaTeX) can be saved from the page and lie beside
    it.
    """
    for folder in args.runs:
        check_exists(folder)
    from torchrl_sql.games import resolve_games
    from torchrl_sql.provenance import describe_benchmark
    from torchrl_sql.report import Analysis, summary_data, summary_text, write_report
    from torchrl_sql.report.gather import gather

    first = args.runs[0]
    if args.out is None and len(args.runs) > 1:
        raise ValueError("--out must be given with several folders: a page in one of them would hide that folder's own")
    data = gather(
        args.runs,
        games=None if args.games is None else resolve_games(args.games),
        agents=_names(args.agents),
        main=args.main,
        against=_names(args.against) or None,
        x=args.x,
        step=args.step,
        aggregate=args.aggregate,
        title=args.title,
    )
    machine = describe_benchmark()
    made = {
        "command": shlex.join(["torchrl-sql", *args.words]),
        "date": machine["date"],
        "commit": machine["commit"],
        "machine": f"{machine['processor']}, {machine['num_cores']} cores, {machine['memory_gigabytes']:g} GB",
    }
    analysis = Analysis(replace(data, made=made))
    page = write_report(analysis, args.out or (first if first.is_dir() else first.parent) / "report.html")
    if args.json:
        print(json.dumps(summary_data(analysis) | {"page": str(page.resolve())}, indent=1, allow_nan=False))
    else:
        print(f"{summary_text(analysis)}\n\nReport: {page.resolve()}")


def _reconstruct(args: argparse.Namespace) -> None:
    """Draws frames of a run's data as a PNG: as they are, with the hidden places grey, and as its decoder sees them."""
    from torchrl_sql.report.reconstructions import draw_reconstructions

    picture = draw_reconstructions(args.run, states_per_game=args.states, seed=args.seed)
    out = args.out or args.run / "reconstructions.png"
    picture.save(out)
    print(f"Reconstructions: {out.resolve()}")


def _names(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")
