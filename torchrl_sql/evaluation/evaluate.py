"""Evaluates a policy and keeps every finished episode in a table, so that an interrupted evaluation continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from torchrl_sql.config import EvaluationConfig
from torchrl_sql.evaluation.episodes import Decoding, EpisodeResult, read_episodes
from torchrl_sql.evaluation.rollout import Policy, Rollout, episode_seed, rollout
from torchrl_sql.evaluation.tables import TableWriter


def evaluate(
    policy: Policy,
    games: Sequence[str],
    protocol: EvaluationConfig,
    table: Path,
    *,
    agent: str,
    seed: int,
    gradient_step: int,
    evaluated_games: Sequence[str] | None = None,
    decoding: Decoding = "greedy",
    record_first: bool = False,
) -> list[Rollout]:
    """Plays the episodes that a table lacks and adds each to it as it ends.

    Args:
        policy (Policy): what is evaluated.
        games (sequence of str): its games, in the order of its ``game_id``.
        protocol (EvaluationConfig): episodes a game (those in the table included), exploration, emulator, seed.
        table (Path): CSV of :class:`EpisodeResult` rows, created if absent; rows of other agents stay.

    Keyword Args:
        agent (str): name in the table.
        seed (int): training seed.
        gradient_step (int): gradient steps the policy was trained for.
        evaluated_games (sequence of str, optional): which of the games to play; default all.
        decoding ("greedy" or "sampled"): how actions follow from the policy's preferences.
        record_first (bool): keep the frames of each game's first episode, playing it again if it is in the table.

    Returns:
        The recorded episodes.

    Raises:
        ValueError: if the table holds episodes of the same agent under another protocol.
    """
    rows = read_episodes(table) if table.is_file() else []
    same = [row for row in rows if (row.agent, row.seed, row.decoding) == (agent, seed, decoding)]
    now = (gradient_step, protocol.epsilon, protocol.sticky_action_probability, protocol.max_env_frames_per_episode)
    for row in same:
        before = (row.gradient_step, row.epsilon, row.sticky, row.max_env_frames)
        seeds = (row.episode_seed, episode_seed(protocol.seed, row.game, row.episode))
        if before != now or seeds[0] != seeds[1]:
            raise ValueError(
                f"{table} holds episodes of {agent} ({decoding}) at (gradient step, epsilon, sticky, frame limit) "
                f"{before} and episode seed {seeds[0]}, wanted {now} and {seeds[1]}; choose another table or delete it"
            )
    finished = {(row.game, row.episode) for row in same}
    wanted = [(game, episode) for episode in range(protocol.num_episodes_per_game) for game in evaluated_games or games]
    missing = [key for key in wanted if key not in finished or (record_first and key[1] == 0)]
    recorded = []
    bar = tqdm(
        total=len(missing),
        desc=f"evaluate {agent} ({decoding})",
        unit="episode",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
    with bar, TableWriter(table, EpisodeResult) as writer:
        for result in rollout(
            policy,
            games,
            missing,
            decoding=decoding,
            epsilon=protocol.epsilon,
            sticky_action_probability=protocol.sticky_action_probability,
            max_env_frames_per_episode=protocol.max_env_frames_per_episode,
            seed=protocol.seed,
            record=lambda game, episode: record_first and episode == 0,
        ):
            if result.frames:
                recorded.append(result)
            if (result.game, result.episode) not in finished:
                row = EpisodeResult(
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
                    epsilon=protocol.epsilon,
                    sticky=protocol.sticky_action_probability,
                    max_env_frames=protocol.max_env_frames_per_episode,
                    decoding=decoding,
                    evaluation_seed=protocol.seed,
                )
                writer.append([row])
            bar.update()
    return recorded
