"""``torchrl-sql evaluate``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sql.files import check_outside_stores
from torchrl_sql.games import ACTION_NAMES

if TYPE_CHECKING:
    from torchrl_sql.config import RunConfig
    from torchrl_sql.evaluation.agents import Agent
    from torchrl_sql.evaluation.episodes import EpisodeResult
    from torchrl_sql.evaluation.protocol import Protocol, Share


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    evaluate = commands.add_parser(
        "evaluate",
        help="play trained networks in the emulator",
        description=_evaluate.__doc__,
        epilog="A SLURM array of eight tasks: #SBATCH --array=1-8, and in the script --share $SLURM_ARRAY_TASK_ID/8",
    )
    evaluate.add_argument(
        "agents",
        nargs="+",
        metavar="AGENT",
        help="a run's folder (its newest checkpoint, or its policy.safetensors if there is none), a folder that holds "
        "runs, checkpoints (all of a run: RUN/checkpoints/*.pt), a policy.safetensors, random, noop, constant_ACTION, "
        "or constant: each legal action of each game",
    )
    evaluate.add_argument(
        "--games",
        help="train40, heldout5, all, or names separated by commas, e.g. Freeway,Freeway-m1 (default: the run's)",
    )
    evaluate.add_argument(
        "--episodes", type=int, help="per game, those in the table included (default: the run's, or 16)"
    )
    evaluate.add_argument("--sticky", type=float, help="sticky-action probability (default: the run's, or 0.25)")
    evaluate.add_argument("--epsilon", type=float, help="of random actions (default: the run's, or 0.001)")
    evaluate.add_argument("--seed", type=int, help="of emulator and exploration (default: the run's, or 0)")
    evaluate.add_argument(
        "--max-env-frames", type=int, help="emulator frames at which an episode is cut (default: the run's, or 108000)"
    )
    evaluate.add_argument("--out", type=Path, help="folder of scores.csv (default: the run's)")
    evaluate.add_argument(
        "--share",
        metavar="K/N",
        help="play the K-th of N shares of the episodes, each into its own part of the table; reports read all parts "
        "(default: everything, or by RANK and WORLD_SIZE where torchrun sets them); marks no best checkpoint",
    )
    evaluate.add_argument(
        "--video", action="store_true", help="save a clip of one episode of each game in the folder's clips/"
    )
    evaluate.add_argument("--episode", type=int, metavar="N", help="the episode of --video, from 0 (default: 0)")
    add_decoding(evaluate)
    evaluate.set_defaults(run_command=_evaluate)


def add_decoding(command: argparse.ArgumentParser) -> None:
    """Adds how a trained network acts, and where."""
    command.add_argument(
        "--decoding",
        choices=("greedy", "sampled", "expert", "expert_128"),
        help="expert and expert_128 ask a return-conditioned network for a high return (default: expert for those, "
        "else greedy)",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def check_agent(word: str) -> None:
    """Checks that a word may name an agent, before torch is imported: that a mistake is named at once.

    Raises:
        FileNotFoundError: if not.
        ValueError: for a constant action that is none.
    """
    action = word.removeprefix("constant_")
    if action != word and action not in ACTION_NAMES and not Path(word).exists():
        raise ValueError(f"{word} must be constant_ and an action ({', '.join(ACTION_NAMES)}), got {action!r}")
    if not (action != word or word in ("random", "noop", "constant") or Path(word).exists()):
        raise FileNotFoundError(
            f"{word} must be a checkpoint, the folder of a trained run or one that holds such folders, a "
            "policy.safetensors, random, noop, constant_ACTION or constant; it does not exist"
        )


def _evaluate(args: argparse.Namespace) -> None:
    """Plays agents in the emulator and adds each finished episode to scores.csv. Episodes that it has already are not
    played again: the same command continues an interrupted evaluation. Scores of a run's own games and settings are
    added to its loggers, too.
    """
    for word in args.agents:
        check_agent(word)
    from torchrl_sql.evaluation.clips import has_video_encoder
    from torchrl_sql.evaluation.protocol import Share
    from torchrl_sql.games import resolve_games

    if args.out is not None:
        check_outside_stores(args.out, "--out")
    share = Share.from_environment() if args.share is None else Share.parse(args.share)
    games = None if args.games is None else resolve_games(args.games)
    if args.video and not has_video_encoder():
        print("Clips are short GIFs: pip install torchrl-sql[video] brings an encoder for MP4.")
    if args.episode is not None and not args.video:
        raise ValueError("--episode chooses what --video shows; it needs --video")
    folders = list(_play(args, games, share))
    for folder in dict.fromkeys(folders):
        print(f"Scores: {folder / 'scores.csv'}. Next: torchrl-sql report {shlex.quote(str(folder))}")


def _play(args: argparse.Namespace, games: Sequence[str] | None, share: Share) -> Iterator[Path]:
    """Evaluates one agent after the other; yields the folders of their tables."""
    from torchrl_sql.config import load_run_config
    from torchrl_sql.evaluation.agents import make_agents

    for word in args.agents:
        for agent in make_agents(word, games, decoding=args.decoding, device=args.device):
            folder = args.out or agent.run_dir
            if folder is None:
                raise ValueError(f"--out must be given with {word}, which is not in the folder of a run")
            config = None
            if agent.run_dir is not None and share.count == 1:  # read before anything is played
                config = load_run_config(agent.run_dir / "config.yaml")
            episodes = agent.evaluate(
                folder,
                protocol=_changed(agent.protocol, args),
                share=share,
                clips=folder / "clips" if args.video else None,
                clip_episode=args.episode or 0,
            )
            if share.count == 1:  # a share's own means are of other episodes than those of other checkpoints
                agent.mark_if_best(episodes)
                if config is not None:
                    _log(agent, episodes, config)
            step = "" if agent.run_dir is None else f" of {agent.run_dir} at gradient step {agent.id.gradient_step:,}"
            _print_means(agent.id.name + step, episodes)
            yield folder


def _log(agent: Agent, episodes: Sequence[EpisodeResult], config: RunConfig) -> None:
    """Adds the scores of an idle run to its loggers."""
    from torchrl_sql.training.lock import RunFolderError, RunLock
    from torchrl_sql.training.logs import log_scores

    scores = agent.scores(episodes)
    if agent.run_dir is None or not scores:
        return
    loggers, step = config.trainer.loggers, agent.id.gradient_step
    if "wandb" in loggers and find_spec("wandb") is None:
        print("The run logs to W&B, which is not installed here: its scores are not added there.")
        loggers = [name for name in loggers if name != "wandb"]
    try:
        with RunLock(agent.run_dir):
            log_scores(agent.run_dir / "logs", loggers, run_name=config.name, step=step, scores=scores)
    except RunFolderError as error:
        print(f"Scores are not added to the run's loggers: {error}")


def _changed(protocol: Protocol, args: argparse.Namespace) -> Protocol:
    """A protocol with what the command line says of it."""

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    emulator = replace(
        protocol.emulator, **given(sticky_action_probability=args.sticky, max_env_frames=args.max_env_frames)
    )
    changes = given(epsilon=args.epsilon, num_episodes=args.episodes, seed=args.seed)
    return replace(protocol, emulator=emulator, **changes)


def _print_means(name: str, episodes: Sequence[EpisodeResult]) -> None:
    """A line per game: enough to see that it worked; `torchrl-sql report` has the statistics."""
    returns: dict[str, list[float]] = {}
    for episode in episodes:
        returns.setdefault(episode.game, []).append(episode.episode_return)
    print(f"{name}: mean return by game")
    for game, values in returns.items():
        print(f"  {game:<16} {sum(values) / len(values):>12,.1f}   ({len(values)} episode{'s' * (len(values) != 1)})")
