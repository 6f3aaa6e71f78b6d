"""Evaluates a policy and keeps every finished episode in a table, so that an interrupted evaluation continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tensordict.nn import TensorDictModuleBase
from tqdm import tqdm

from torchrl_sql.evaluation.episodes import (
    CALIBRATION,
    EVALUATION_VERSIONS,
    SCORES,
    CalibrationPoint,
    Decoding,
    EpisodeResult,
    read_episodes,
)
from torchrl_sql.evaluation.policies import digest_of_weights
from torchrl_sql.evaluation.rollout import Rollout, check_settings, episode_seed, rollout
from torchrl_sql.evaluation.share import WHOLE, Shard
from torchrl_sql.evaluation.tables import TableWriter, part_of
from torchrl_sql.files import write_text
from torchrl_sql.games import resolve_games
from torchrl_sql.provenance import software_versions


def evaluate(
    policy: TensorDictModuleBase,
    games: str | Sequence[str],
    *,
    num_episodes: int,
    epsilon: float = 0.001,
    sticky_action_probability: float = 0.25,
    max_env_frames_per_episode: int = 108_000,
    seed: int = 0,
    folder: Path | None = None,
    agent: str | None = None,
    training_seed: int = 0,
    gradient_step: int = 0,
    decoding: Decoding = "greedy",
    checkpoint: str = "",
    policy_games: Sequence[str] | None = None,
    gamma: float | None = None,
    shard: Shard = WHOLE,
    recorded_games: Collection[str] = (),
    on_recorded: Callable[[Rollout], None] = lambda rollout: None,
) -> list[EpisodeResult]:
    """Plays a policy, many games and episodes at once.

    The same seed gives the same episodes, whatever else is played beside them, in how many shards, and however often
    the evaluation was interrupted: on one kind of machine, with the same versions and number of torch threads, and for
    policies whose randomness comes from ``uniform``.

    Args:
        policy (TensorDictModuleBase): reads any of ``observation`` ``[B, 4, 84, 84]`` uint8, ``game_id`` ``[B]`` int64
            and ``uniform`` ``[B]`` float64 in [0, 1), a random number decided by seed, episode and step; writes
            ``action`` ``[B]`` integers in 0..17, where 4 is LEFT in every game and those a game does not know act as
            NOOP. It keeps no state between calls, and rows beyond the episodes at hand are empty.
        games (str or sequence of str): what to play, as :func:`torchrl_sql.games.resolve_games` takes it.

    Keyword Args:
        num_episodes (int): a game, those already in the table included.
        epsilon (float): probability of a uniformly random legal action in place of the policy's.
        sticky_action_probability (float): that the emulator repeats the last action.
        max_env_frames_per_episode (int): emulator frames at which an episode is cut.
        seed (int): of emulator and exploration.
        folder (Path, optional): where ``scores.csv`` (and, with ``gamma``, ``calibration.csv``) are: episodes they
            hold are not played again, each finished one is added at once, rows of other agents stay. Versions and
            machine are added to ``evaluation_versions.json``.
        agent (str): who plays; this and the next four are columns of :class:`EpisodeResult`. Default ``policy``, but
            needed with a folder if the policy has no parameters by which its rows can be told from another's.
        training_seed (int): its column ``seed``.
        gradient_step (int): how long the policy was trained.
        decoding ("greedy" or "sampled"): how the policy takes its actions.
        checkpoint (str): which weights they are; with a folder, a hash of the policy's by default.
        policy_games (sequence of str, optional): the games in the order of the policy's ``game_id``; default ``games``.
        gamma (float, optional): discount of training, if the policy writes Q-values as ``action_value`` ``[B, 18]``:
            they are recorded beside the realised returns, see :class:`CalibrationPoint`.
        shard (Shard): play only this share of the episodes, and write it to an own part of the tables.
        recorded_games (collection of str): games whose first episode is recorded, played again if it is in the table.
        on_recorded (callable): is given each of those.

    Returns:
        The episodes of this agent and this share, those that the table held included, sorted.

    Raises:
        ValueError: for games that the policy does not know, no episodes, a policy of another action set, one without
            parameters and name, and if the table holds episodes of another protocol, of another checkpoint under the
            same name, or another result of an episode that is played again.
        BlockingIOError: if another process is writing this part of the table.
    """
    games = resolve_games(games)
    policy_games = games if policy_games is None else policy_games
    unknown = [game for game in games if game not in policy_games]
    if unknown:
        raise ValueError(f"games must be among those the policy has ({', '.join(policy_games)}), got {unknown}")
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be at least 1, got {num_episodes}")
    check_settings(policy, epsilon, sticky_action_probability, max_env_frames_per_episode)
    if folder is not None and not checkpoint:
        if next(policy.parameters(), None) is not None:
            checkpoint = digest_of_weights(policy)
        elif agent is None:
            raise ValueError("agent must be given with a folder for a policy without parameters, got None")
    name = "policy" if agent is None else agent

    def result(game: str, episode: int, played: Rollout) -> EpisodeResult:
        return EpisodeResult(
            agent=name,
            seed=training_seed,
            game=game,
            episode=episode,
            episode_seed=played.episode_seed,
            episode_return=played.episode_return,
            length_agent_steps=played.length_agent_steps,
            terminated=played.terminated,
            truncated=played.truncated,
            gradient_step=gradient_step,
            epsilon=epsilon,
            sticky=sticky_action_probability,
            max_env_frames=max_env_frames_per_episode,
            decoding=decoding,
            evaluation_seed=seed,
            checkpoint=checkpoint,
        )

    own = [
        (game, episode)
        for episode in range(num_episodes)
        for number, game in enumerate(games)
        if shard.has(number, episode)
    ]
    with ExitStack() as stack:
        rows: list[EpisodeResult] = []
        if folder is not None:
            scores = stack.enter_context(TableWriter(part_of(folder / SCORES, shard.index, shard.count), EpisodeResult))
            calibration = (
                None
                if gamma is None
                else stack.enter_context(
                    TableWriter(part_of(folder / CALIBRATION, shard.index, shard.count), CalibrationPoint)
                )
            )
            rows = read_episodes(folder / SCORES)
            _check_protocol(folder, rows, (epsilon, sticky_action_probability, max_env_frames_per_episode))
            who = (name, decoding, gradient_step, training_seed)
            rows = [row for row in rows if row.key[:4] == who]
            _check_agent(folder, rows, checkpoint, seed)
        finished = {(row.game, row.episode): row for row in rows}
        missing = [key for key in own if key not in finished or (key[0] in recorded_games and key[1] == 0)]
        if folder is not None and missing:
            _record_versions(part_of(folder / EVALUATION_VERSIONS, shard.index, shard.count))
        bar = stack.enter_context(
            tqdm(
                total=len(own),
                initial=len(own) - len(missing),
                desc=f"evaluate {name}" + (f" at step {gradient_step:,}" if gradient_step else ""),
                unit="episode",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                dynamic_ncols=True,
                disable=folder is None,
            )
        )
        for played in rollout(
            policy,
            policy_games,
            missing,
            epsilon=epsilon,
            sticky_action_probability=sticky_action_probability,
            max_env_frames_per_episode=max_env_frames_per_episode,
            seed=seed,
            record=lambda game, episode: episode == 0 and game in recorded_games,
        ):
            key = (played.game, played.episode)
            row = result(*key, played)
            if finished.get(key, row) != row:
                raise ValueError(
                    f"an episode played again must end as the table says, {finished[key]}, got {row}: it was written "
                    "on another machine or by other versions"
                )
            if played.actions:
                on_recorded(played)
            if key not in finished:
                finished[key] = row
                if folder is not None:
                    if calibration is not None and gamma is not None:
                        calibration.append(_calibration_points(finished[key], played, gamma))
                    scores.append([finished[key]])
            bar.update()
    return sorted((finished[key] for key in own), key=lambda row: row.key)


def _record_versions(path: Path) -> None:
    """Adds what plays now to a JSON list; the lock on the table of scores keeps other writers away."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    versions = software_versions()
    if versions not in known:
        write_text(path, json.dumps([*known, versions], indent=1) + "\n")


def _check_protocol(folder: Path, rows: Iterable[EpisodeResult], wanted: tuple[float, float, int]) -> None:
    for row in rows:
        found = (row.epsilon, row.sticky, row.max_env_frames)
        if found != wanted:
            raise ValueError(
                f"{folder / SCORES} holds episodes at (epsilon, sticky, frame limit) {found}, wanted {wanted}: scores "
                "of different protocols cannot be compared; choose another folder (--out)"
            )


def _check_agent(folder: Path, rows: Iterable[EpisodeResult], checkpoint: str, seed: int) -> None:
    """Rows that would continue those of this agent must be of the same weights and the same episodes."""
    for row in rows:
        if (row.checkpoint, row.evaluation_seed) != (checkpoint, seed):
            raise ValueError(
                f"{folder / SCORES} holds episodes of {row.agent} (training seed {row.seed}, gradient step "
                f"{row.gradient_step}) from checkpoint {row.checkpoint or 'none'!r} with evaluation seed "
                f"{row.evaluation_seed}, wanted checkpoint {checkpoint or 'none'!r} and seed {seed}; choose another "
                "folder (--out) or delete the table"
            )
        if row.episode_seed != (expected := episode_seed(seed, row.game, row.episode)):
            raise ValueError(
                f"{folder / SCORES}: episode {row.episode} of {row.game} must have the episode seed {expected}, got "
                f"{row.episode_seed}: it was written by another version"
            )


def _calibration_points(row: EpisodeResult, played: Rollout, gamma: float) -> list[CalibrationPoint]:
    """What was predicted, beside the discounted sum of clipped rewards from there to the episode's end."""
    returns, total = [0.0] * len(played.rewards), 0.0
    for step in reversed(range(len(played.rewards))):
        total = max(-1.0, min(1.0, played.rewards[step])) + gamma * total
        returns[step] = total
    return [
        CalibrationPoint(
            agent=row.agent,
            gradient_step=row.gradient_step,
            seed=row.seed,
            game=row.game,
            episode_seed=row.episode_seed,
            agent_step=step,
            predicted_value=value,
            discounted_return=returns[step],
            truncated=row.truncated,
        )
        for step, value in played.predictions
    ]
