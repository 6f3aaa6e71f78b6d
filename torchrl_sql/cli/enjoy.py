"""``torchrl-sql enjoy``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl_sql.arguments import check_count, check_number
from torchrl_sql.cli.evaluate import add_decoding, check_agent


def add_commands(commands: Any) -> None:
    """Adds the parser of this command to ``commands``, the subparsers of ``torchrl-sql``."""
    enjoy = commands.add_parser("enjoy", help="watch an agent play, or film it", description=_enjoy.__doc__)
    enjoy.add_argument(
        "agent",
        metavar="AGENT",
        help="a policy.safetensors file, a run's folder, a checkpoint, random, noop or constant_ACTION",
    )
    enjoy.add_argument(
        "--game", metavar="A,B", help="names separated by commas, side by side (default: its first game)"
    )
    enjoy.add_argument("--out", type=Path, metavar="FILE", help="a .gif or .mp4, in place of a window")
    enjoy.add_argument("--episodes", type=int, default=1, help="per game, one after the other (default: 1)")
    enjoy.add_argument("--seed", type=int, help="of emulator and exploration (default: the run's, or 0)")
    enjoy.add_argument("--seconds", type=float, help="of each episode, from its start (default: all of it)")
    enjoy.add_argument("--fps", type=int, default=15, choices=(1, 3, 5, 15), help="pictures per second (default: 15)")
    add_decoding(enjoy)
    enjoy.set_defaults(run_command=_enjoy)


def _enjoy(args: argparse.Namespace) -> None:
    """Plays episodes and shows them in the emulator's colours: in a window, or in a file with --out. An agent acts 15
    times per second. Nothing is added to tables of scores.
    """
    check_agent(args.agent)
    from torchrl_sql.envs.console import FRAME_SKIP
    from torchrl_sql.evaluation.agents import make_agents
    from torchrl_sql.evaluation.films import check_file, check_window, film, show, write_film
    from torchrl_sql.evaluation.rollout import rollout
    from torchrl_sql.games import resolve_games

    check_count("--episodes", args.episodes)
    if args.seconds is not None:
        check_number("--seconds", args.seconds, 0, above=True)
    if args.out is None:
        check_window()
    else:
        check_file(args.out)
    agent, *others = make_agents(
        args.agent, None if args.game is None else resolve_games(args.game), decoding=args.decoding, device=args.device
    )
    if others:
        raise ValueError(f"{args.agent} must be one agent, got {len(others) + 1}")
    games = agent.games if args.game is not None else agent.games[:1]
    protocol = agent.protocol if args.seed is None else replace(agent.protocol, seed=args.seed)
    emulator = protocol.emulator
    if args.seconds is not None:
        num_steps = max(round(args.seconds * 15), 1)
        emulator = replace(emulator, max_env_frames=min(emulator.max_env_frames, FRAME_SKIP * num_steps))
    wanted = [(game, episode) for episode in range(args.episodes) for game in games]
    played = {
        (one.game, one.episode): one
        for one in rollout(
            agent.policy,
            agent.policy_games,
            wanted,
            emulator,
            epsilon=protocol.epsilon,
            seed=protocol.seed,
            record=lambda game, episode: True,
        )
    }
    for game, episode in wanted:
        one = played[game, episode]
        print(f"{game}, episode {episode}: return {one.episode_return:g} in {one.length_agent_steps:,} agent steps")
    pictures = film(
        [[played[game, episode] for episode in range(args.episodes)] for game in games], emulator, fps=args.fps
    )
    if args.out is None:
        show(pictures, fps=args.fps, title=f"{agent.id.name}: {', '.join(games)}")
        return
    write_film(args.out, pictures, fps=args.fps)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")
