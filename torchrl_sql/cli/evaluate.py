"""``torchrl-sql evaluate`` and ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_sql.evaluation.episodes import EpisodeResult
    from torchrl_sql.evaluation.share import Shard


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    evaluate = commands.add_parser(
        "evaluate",
        help="play trained networks in the emulator",
        description=_evaluate.__doc__,
        epilog="A SLURM array of eight tasks: #SBATCH --array=1-8, and in the script --shard $SLURM_ARRAY_TASK_ID/8",
    )
    evaluate.add_argument(
        "agents",
        nargs="+",
        metavar="AGENT",
        help="a run's folder (its newest checkpoint), checkpoints (all of a run: RUN/checkpoints/*.pt), random or noop",
    )
    evaluate.add_argument("--games", help="train40, heldout5, all, or names separated by commas (default: the run's)")
    evaluate.add_argument(
        "--episodes", type=int, help="a game, those in the table included (default: the run's, or 16)"
    )
    evaluate.add_argument("--sticky", type=float, help="sticky-action probability (default: the run's, or 0.25)")
    evaluate.add_argument("--epsilon", type=float, help="of random actions (default: the run's, or 0.001)")
    evaluate.add_argument("--seed", type=int, help="of emulator and exploration (default: the run's, or 0)")
    evaluate.add_argument(
        "--max-env-frames", type=int, help="emulator frames at which an episode is cut (default: the run's, or 108000)"
    )
    evaluate.add_argument("--decoding", choices=("greedy", "sampled"), default="greedy", help="default: greedy")
    evaluate.add_argument("--out", type=Path, help="folder of scores.csv (default: the run's)")
    evaluate.add_argument(
        "--shard",
        metavar="K/N",
        help="play the K-th of N shares of the episodes, each into its own part of the table; reports read all parts "
        "(default: everything, or by RANK and WORLD_SIZE where torchrun sets them)",
    )
    evaluate.add_argument(
        "--video", action="store_true", help="save a clip of each game's first episode in the folder's clips/"
    )
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    evaluate.set_defaults(run_command=_evaluate)

    report = commands.add_parser("report", help="write one HTML page about evaluated runs", description=_report.__doc__)
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_OR_SCORES",
        help="folders that hold scores.csv, or such tables; same-named runs are seeds of one agent",
    )  # fmt: skip
    report.add_argument("--games", help="some of the games, separated by commas (default: the runs' games)")
    report.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    report.set_defaults(run_command=_report)


def _evaluate(args: argparse.Namespace) -> None:
    """Plays agents in the emulator and adds each finished episode to scores.csv. Episodes that it has already are not
    played again: the same command continues an interrupted evaluation.
    """
    from torchrl_sql.evaluation.share import Shard

    shard = Shard.from_environment() if args.shard is None else Shard.parse(args.shard)
    folders = [_evaluate_agent(agent, args, shard) for agent in args.agents]
    for folder in dict.fromkeys(folders):
        print(f"Scores: {folder / 'scores.csv'}. Next: torchrl-sql report {folder}")


def _evaluate_agent(name: str, args: argparse.Namespace, shard: Shard) -> Path:
    from torchrl_sql.evaluation.agents import SIMPLE_PROTOCOL, evaluate_checkpoint, evaluate_simple_agent, mark_if_best
    from torchrl_sql.evaluation.clips import has_video_encoder
    from torchrl_sql.games import resolve_games
    from torchrl_sql.training.build import find_checkpoint, load_actor

    options = {
        "num_episodes_per_game": args.episodes,
        "sticky_action_probability": args.sticky,
        "epsilon": args.epsilon,
        "seed": args.seed,
        "max_env_frames_per_episode": args.max_env_frames,
    }
    given = {key: value for key, value in options.items() if value is not None}
    games = None if args.games is None else resolve_games(args.games)
    if name in ("random", "noop"):
        if games is None or args.out is None:
            raise ValueError(f"{name} needs --games and --out, having no run: e.g. --games all --out runs/{name}")
        if args.video:
            raise ValueError(f"--video is for networks, got it with {name}")
        episodes = evaluate_simple_agent(name, games, replace(SIMPLE_PROTOCOL, **given), args.out, shard=shard)
        folder = args.out
    else:
        path = Path(name)
        checkpoint = find_checkpoint(path)
        trained = load_actor(checkpoint)
        folder = args.out or _run_folder(path, checkpoint)
        if args.video and not has_video_encoder():
            print("Clips are short GIFs: pip install torchrl-sql[video] brings an encoder for MP4.")
        episodes = evaluate_checkpoint(
            trained,
            replace(trained.config.evaluation, **given),
            folder,
            games=games,
            decoding=args.decoding,
            device=args.device,
            shard=shard,
            clips=folder / "clips" if args.video else None,
        )
        own_protocol = not given.keys() - {"num_episodes_per_game"}
        in_run = checkpoint.parent.name == "checkpoints"
        if in_run and args.decoding == "greedy" and games is None and own_protocol:
            if shard.count == 1:
                mark_if_best(checkpoint.parent.parent, trained, episodes)
            else:
                print("A share of the episodes does not mark the run's best checkpoint; the same command without does.")
    _print_means(name, episodes)
    return folder


def _run_folder(given: Path, checkpoint: Path) -> Path:
    """Where a checkpoint's tables go: its run."""
    folder = given if given.is_dir() else checkpoint.parent.parent
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--out must be given with {given}, which is not in the folder of a run")
    return folder


def _print_means(name: str, episodes: Sequence[EpisodeResult]) -> None:
    """A line a game: enough to see that it worked; `torchrl-sql report` has the statistics."""
    returns: dict[str, list[float]] = {}
    for episode in episodes:
        returns.setdefault(episode.game, []).append(episode.episode_return)
    print(f"{name}: mean return of {len(episodes)} episodes")
    for game, values in returns.items():
        print(f"  {game:<16} {sum(values) / len(values):>12,.1f}   ({len(values)} episodes)")


def _report(args: argparse.Namespace) -> None:
    """Writes a self-contained page: aggregates with intervals, scores by game, learning curves, value calibration, data
    statistics, clips and settings. Plots (PNG, SVG) and tables (CSV) can be saved from the page and lie beside it.
    """
    from torchrl_sql.games import resolve_games
    from torchrl_sql.report import format_score_table, write_report
    from torchrl_sql.report.gather import gather

    data = gather(args.runs, games=None if args.games is None else resolve_games(args.games))
    first = args.runs[0]
    page = write_report(data, args.out or (first if first.is_dir() else first.parent) / "report.html")
    print(format_score_table(data))
    print(f"\nReport: {page.resolve()}")
