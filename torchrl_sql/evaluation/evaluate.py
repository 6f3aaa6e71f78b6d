"""Evaluates a policy and keeps every finished episode in a table, so that an interrupted evaluation continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from torchrl_sql.evaluation.episodes import Decoding, EpisodeResult, read_episodes, write_episodes
from torchrl_sql.evaluation.rollout import Policy, Rollout, rollout


def evaluate(
    policy: Policy,
    games: Sequence[str],
    table: Path,
    *,
    agent: str,
    seed: int,
    gradient_step: int,
    num_episodes: int,
    evaluated_games: Sequence[str] | None = None,
    decoding: Decoding = "greedy",
    epsilon: float = 0.001,
    sticky_action_probability: float = 0.25,
    max_env_frames_per_episode: int = 108_000,
    evaluation_seed: int = 0,
    record_first: bool = False,
) -> list[Rollout]:
    """Plays the episodes that a table lacks and adds each to it as it ends.

    Args:
        policy (Policy): what is evaluated.
        games (sequence of str): its games, in the order of its ``game_id``.
        table (Path): CSV of :class:`EpisodeResult` rows, created if absent; rows of other agents stay.

    Keyword Args:
        agent (str), seed (int), gradient_step (int): whose episodes these are: name, training seed, training length.
        num_episodes (int): wanted for each game, those in the table included.
        evaluated_games (sequence of str, optional): which of the games to play; default all.
        decoding, epsilon, sticky_action_probability, max_env_frames_per_episode: see :func:`rollout`.
        evaluation_seed (int): decides emulator and exploration noise.
        record_first (bool): keep the frames of each game's first episode (and play it again if it was not recorded now).

    Returns:
        The recorded episodes.

    Raises:
        ValueError: if the table holds episodes of the same agent under another protocol.
    """
    rows = read_episodes(table) if table.is_file() else []
    same = [row for row in rows if (row.agent, row.seed, row.decoding) == (agent, seed, decoding)]
    for row in same:
        before, now = (row.gradient_step, row.epsilon, row.sticky), (gradient_step, epsilon, sticky_action_probability)
        if before != now:
            raise ValueError(
                f"{table} holds episodes of {agent} ({decoding}) at (gradient step, epsilon, sticky) {before}, "
                f"wanted {now}; choose another table or delete it"
            )
    finished = {(row.game, row.episode) for row in same}
    wanted = [(game, episode) for episode in range(num_episodes) for game in evaluated_games or games]
    missing = [key for key in wanted if key not in finished or (record_first and key[1] == 0)]
    recorded = []
    bar = tqdm(
        total=len(missing),
        desc=f"evaluate {agent} ({decoding})",
        unit="episode",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
    with bar:
        for result in rollout(
            policy,
            games,
            missing,
            decoding=decoding,
            epsilon=epsilon,
            sticky_action_probability=sticky_action_probability,
            max_env_frames_per_episode=max_env_frames_per_episode,
            seed=evaluation_seed,
            record=lambda game, episode: record_first and episode == 0,
        ):
            if result.frames:
                recorded.append(result)
            if (result.game, result.episode) not in finished:
                rows.append(
                    EpisodeResult(
                        agent=agent,
                        seed=seed,
                        game=result.game,
                        episode=result.episode,
                        episode_seed=result.episode_seed,
                        episode_return=result.episode_return,
                        length_agent_steps=result.length_agent_steps,
                        terminated=result.terminated,
                        truncated=result.truncated,
                        gradient_step=gradient_step,
                        epsilon=epsilon,
                        sticky=sticky_action_probability,
                        decoding=decoding,
                    )
                )
                write_episodes(table, rows)
            bar.update()
    return recorded
