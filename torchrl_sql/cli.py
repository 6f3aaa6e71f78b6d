"""The command ``torchrl-sql``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL: one policy for many Atari games, learned offline.

  torchrl-sql quickstart                                the whole method in minutes, on a CPU
  torchrl-sql train experiment=quickstart seed=1        one training run from configs/experiment/quickstart.yaml
  torchrl-sql evaluate runs/NAME                        play a trained network, add to runs/NAME/scores.csv
  torchrl-sql report runs/NAME                          scores, intervals and curves as one HTML page
"""

OVERRIDES_HELP = (
    "settings as group=choice or key=value, e.g. experiment=quickstart model=resnet50 objective.cql_alpha=0.5; "
    "the keys are explained in torchrl_sql/config.py and the files of configs/"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    # Settings may stand before and after options, which argparse's subcommands do not allow by themselves.
    args, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("RL_WARNINGS", "False")  # the trainer steps its own target updater
    try:
        args.run_command(args)
    except KeyboardInterrupt as interruption:
        message = str(interruption) or "stopped; the same command continues where it was"
        print(f"\n{message}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"torchrl-sql {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-sql", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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

    collect = commands.add_parser(
        "collect", help="make a store of emulator data with behaviour policies", description=_collect.__doc__
    )
    collect.add_argument("overrides", nargs="+", metavar="key=value", help=OVERRIDES_HELP)
    collect.set_defaults(run_command=_collect)

    train = commands.add_parser("train", help="train a network offline, from a store", description=_train.__doc__)
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    train.set_defaults(run_command=_train)

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

    importer = commands.add_parser("import", help="read a data set of others into a store", description=_import.__doc__)
    importer.add_argument("format", choices=("dqn-replay", "torchrl-memmap", "minari"), help="what SOURCE is")
    importer.add_argument("source", metavar="SOURCE", help="its folder (dqn-replay: or a URL, with fsspec installed)")
    importer.add_argument("--out", type=Path, required=True, help="the store; made if absent")
    importer.add_argument("--games", help="e.g. train40, or names separated by commas (minari: one name, if unclear)")
    importer.add_argument("--run", help="dqn-replay, torchrl-memmap: 1 to 5 (default: 1); minari: name in the store")
    importer.add_argument("--checkpoints", help="e.g. 0-9, the paper's sub-optimal set (default for dqn-replay)")
    importer.add_argument("--workers", type=int, default=1, help="processes, each on one game at a time (default: 1)")
    importer.set_defaults(run_command=_import)

    verify = commands.add_parser("verify", help="compare every checksum of a store", description=_verify.__doc__)
    verify.add_argument("store", type=Path, help="folder of the store")
    verify.set_defaults(run_command=_verify)

    inspect = commands.add_parser("inspect", help="show what a store holds", description=_inspect.__doc__)
    inspect.add_argument("store", type=Path, help="folder of the store")
    inspect.set_defaults(run_command=_inspect)
    return parser


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


def _collect(args: argparse.Namespace) -> None:
    """Fills data.store with episodes of scripted behaviour policies, as the experiment's collection settings say."""
    from torchrl_sql.config import compose_run_config
    from torchrl_sql.stages import collect_data

    store = collect_data(compose_run_config(args.overrides))
    _print_store(store.path)


def _train(args: argparse.Namespace) -> None:
    """Trains a network from a store; continues the run in run_dir if there is one."""
    from torchrl_sql.config import compose_run_config
    from torchrl_sql.training import train

    config = compose_run_config(args.overrides)
    if args.print_config:
        print(config.to_yaml(), end="")
        return
    folder = train(config)
    print(f"Trained: {folder}. Next: torchrl-sql evaluate {folder}")


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


def _inspect(args: argparse.Namespace) -> None:
    """Shows transitions, episodes, returns, actions and bytes of each game in a store."""
    _print_store(args.store)


def _import(args: argparse.Namespace) -> None:
    """Reads DQN-Replay, TorchRL's AtariDQNExperienceReplay folders or a Minari data set into a store. The same command
    continues an import that was stopped.
    """
    from torchrl_sql.data import importers

    failed: importers.ImportFailedError | None = None
    try:
        if args.format == "minari":
            summaries = importers.import_minari(args.source, args.out, game=args.games, run=args.run, progress=True)
        else:
            if args.games is None:
                raise ValueError("--games must be given, e.g. --games train40")
            read = importers.import_dqn_replay if args.format == "dqn-replay" else importers.import_torchrl_memmap
            settings = {"games": args.games, "run": int(args.run or 1), "workers": args.workers, "progress": True}
            if args.checkpoints is not None:
                settings["checkpoints"] = args.checkpoints
            summaries = read(args.source, args.out, **settings)
    except importers.ImportFailedError as error:
        failed, summaries = error, list(error.summaries)
    if summaries:
        print(importers.summary_table(summaries))
    if failed is not None:
        raise ValueError(failed)


def _verify(args: argparse.Namespace) -> None:
    """Reads a whole store once, compares every checksum and names each damaged part."""
    from tqdm import tqdm

    from torchrl_sql.data import FrameStore
    from torchrl_sql.data.verify import verify

    store = FrameStore.open(args.store)
    with tqdm(desc="verify", unit="file", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        damages = list(verify(store, progress=progress))
    for damage in damages:
        print(damage)
    if damages:
        raise ValueError(f"{len(damages)} damaged parts in {args.store}")
    print(f"{args.store} is intact")


def _print_store(path: Path) -> None:
    from torchrl_sql.data import FrameStore
    from torchrl_sql.data.inspect import format_summaries, summarise

    print(format_summaries(list(summarise(FrameStore.open(path)))))


if __name__ == "__main__":
    sys.exit(main())
