"""Evaluates a policy and keeps every finished episode in a table, so that an interrupted evaluation continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tensordict.nn import TensorDictModuleBase
from tqdm import tqdm

from torchrl_sql.envs import Emulator
from torchrl_sql.evaluation.episodes import (
    CALIBRATION,
    EVALUATION_VERSIONS,
    SCORES,
    CalibrationPoint,
    EpisodeResult,
    read_episodes,
)
from torchrl_sql.evaluation.policies import check_action_set, digest_of_weights
from torchrl_sql.evaluation.protocol import WHOLE, AgentId, Protocol, Share
from torchrl_sql.evaluation.rollout import Rollout, episode_seed, rollout
from torchrl_sql.evaluation.tables import TableWriter, part_of
from torchrl_sql.files import write_text
from torchrl_sql.games import place_of, resolve_games
from torchrl_sql.provenance import software_versions


def evaluate(
    policy: TensorDictModuleBase,
    games: str | Sequence[str],
    protocol: Protocol,
    *,
    agent: AgentId | None = None,
    policy_games: Sequence[str] | None = None,
    gamma: float | None = None,
    folder: Path | str | None = None,
    share: Share = WHOLE,
    recorded: Collection[tuple[str, int]] = (),
    on_recorded: Callable[[Rollout], None] = lambda rollout: None,
    on_decision: Callable[[], None] = lambda: None,
) -> list[EpisodeResult]:
    """Plays a policy, many games and episodes at once.

    The same seed gives the same episodes, whatever else is played beside them, in how many shares, and however often
    the evaluation was interrupted: on one kind of machine, with the same versions and number of torch threads, and for
    policies whose randomness comes from ``uniform``.

    Args:
        policy (TensorDictModuleBase): reads any of ``observation`` ``[B, 4, 84, 84]`` uint8, ``game_id`` ``[B]`` int64
            and ``uniform`` ``[B]`` float64 in [0, 1), a random number decided by seed, episode and step; writes
            ``action`` ``[B]`` integers in 0..17, where 4 is LEFT in every game and those a game does not know act as
            NOOP. It keeps no state between calls, and rows beyond the episodes at hand are empty.
        games (str or sequence of str): what to play, as :func:`torchrl_sql.games.resolve_games` takes it.
        protocol (Protocol): how; its number of episodes includes those already in the table.

    Keyword Args:
        agent (AgentId, optional): who plays. Default the name ``policy``, but needed with a folder if the policy has no
            parameters by which its rows can be told from another's. With a folder, the default of its checkpoint is a
            hash of the policy's parameters.
        policy_games (sequence of str, optional): the games in the order of the policy's ``game_id``; default what the
            policy itself, or a module in it, has as ``games``, else ``games``. A variation that is not among them is
            played as its game.
        gamma (float, optional): discount of training, if the policy writes Q-values as ``action_value`` ``[B, 18]``:
            they are recorded beside the realised returns, see :class:`CalibrationPoint`.
        folder (Path or str, optional): where ``scores.csv`` (and, with ``gamma``, ``calibration.csv``) are: episodes
            they hold are not played again, each finished one is added at once, rows of other agents stay. Versions and
            machine are added to ``evaluation_versions.json``.
        share (Share): play only this share of the episodes, and write it to its own part of the tables.
        recorded (collection of (str, int)): games and numbers of episodes that are recorded, played again if they are
            in the table.
        on_recorded (callable): is given each of those.
        on_decision (callable): is called often; what it raises ends the evaluation, which can be continued.

    Returns:
        The episodes of this agent and this share, those that the table held included, sorted.

    Raises:
        ValueError: for games that the policy does not know, a policy of another action set, one without parameters and
            name, and if the table holds episodes of another protocol, of another checkpoint under the same name, or
            another result of an episode that is played again.
        BlockingIOError: if another process is writing this part of the table.
    """
    games = resolve_games(games)
    if policy_games is None:
        policy_games = _games_of(policy) or games
    unknown = [game for game in games if place_of(game, policy_games) is None]
    if unknown:
        raise ValueError(
            f"games must be among those the policy has ({', '.join(policy_games)}) or variations of them, got {unknown}"
        )
    check_action_set(policy)
    agent = _identify(policy, agent, hashed=folder is not None)
    episodes = [
        (game, episode)
        for episode in range(protocol.num_episodes)
        for index, game in enumerate(games)
        if share.has(index, episode)
    ]
    with ExitStack() as stack:
        tables = None
        finished: dict[tuple[str, int], EpisodeResult] = {}
        if folder is not None:
            tables = _Tables(stack, Path(folder), share, with_calibration=gamma is not None)
            finished = {(row.game, row.episode): row for row in tables.rows_of(agent, protocol)}
        missing = [key for key in episodes if key not in finished or key in recorded]
        if tables is not None and missing:
            tables.record_versions()
        bar = stack.enter_context(_progress(agent, len(episodes), len(missing), hidden=tables is None))
        for played in rollout(
            policy,
            policy_games,
            missing,
            protocol.emulator,
            epsilon=protocol.epsilon,
            seed=protocol.seed,
            record=lambda game, episode: (game, episode) in recorded,
            on_decision=on_decision,
        ):
            key = (played.game, played.episode)
            row = _row(agent, protocol, played)
            if finished.get(key, row) != row:
                raise ValueError(
                    f"an episode played again must end as the table says, {finished[key]}, got {row}: it was written "
                    "on another machine or by other versions"
                )
            if played.actions:
                on_recorded(played)
            if key not in finished:
                finished[key] = row
                if tables is not None:
                    tables.add(row, [] if gamma is None else _calibration_points(row, played, gamma))
            bar.update()
    return sorted((finished[key] for key in episodes), key=lambda row: row.key)


def _games_of(policy: TensorDictModuleBase) -> Sequence[str] | None:
    """The tuple or list of names that the outermost module with one has."""
    return next(
        (games for module in policy.modules() if isinstance(games := getattr(module, "games", None), (tuple, list))),
        None,
    )


def _identify(policy: TensorDictModuleBase, agent: AgentId | None, *, hashed: bool) -> AgentId:
    """The agent with what it does not say itself: a name, and with ``hashed`` the hash of its weights."""
    named = AgentId(name="policy") if agent is None else agent
    if not hashed or named.checkpoint:
        return named
    if next(policy.parameters(), None) is not None:
        return replace(named, checkpoint=digest_of_weights(policy))
    if agent is None:
        raise ValueError("agent must be given with a folder for a policy without parameters, got None")
    return agent


def _progress(agent: AgentId, total: int, missing: int, *, hidden: bool) -> tqdm:
    return tqdm(
        total=total,
        initial=total - missing,
        desc=f"evaluate {agent.name}" + (f" at step {agent.gradient_step:,}" if agent.gradient_step else ""),
        unit="episode",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        disable=hidden,
    )


def _row(agent: AgentId, protocol: Protocol, played: Rollout) -> EpisodeResult:
    return EpisodeResult(
        agent=agent.name,
        seed=agent.training_seed,
        game=played.game,
        episode=played.episode,
        episode_seed=played.episode_seed,
        episode_return=played.episode_return,
        length_agent_steps=played.length_agent_steps,
        terminated=played.terminated,
        truncated=played.truncated,
        gradient_step=agent.gradient_step,
        epsilon=protocol.epsilon,
        sticky=protocol.emulator.sticky_action_probability,
        max_env_frames=protocol.emulator.max_env_frames,
        decoding=agent.decoding,
        evaluation_seed=protocol.seed,
        checkpoint=agent.checkpoint,
    )


class _Tables:
    """A share's parts of a folder's tables, locked until ``stack`` closes."""

    def __init__(self, stack: ExitStack, folder: Path, share: Share, *, with_calibration: bool) -> None:
        self._folder, self._share = folder, share
        self._scores = stack.enter_context(TableWriter(self._part(SCORES), EpisodeResult))
        self._calibration: TableWriter[CalibrationPoint] | None = None
        if with_calibration:
            self._calibration = stack.enter_context(TableWriter(self._part(CALIBRATION), CalibrationPoint))

    def _part(self, name: str) -> Path:
        return part_of(self._folder / name, self._share.index, self._share.count)

    def rows_of(self, agent: AgentId, protocol: Protocol) -> list[EpisodeResult]:
        """An agent's episodes in all parts; refuses tables that these would not continue."""
        rows = read_episodes(self._folder / SCORES)
        _check_protocol(self._folder, rows, protocol)
        rows = [row for row in rows if row.agent_id.key == agent.key]
        _check_agent(self._folder, rows, agent, protocol.seed)
        return rows

    def add(self, row: EpisodeResult, points: list[CalibrationPoint]) -> None:
        """Adds a finished episode; what was predicted first, for the row says that the episode is done."""
        if self._calibration is not None:
            self._calibration.append(points)
        self._scores.append([row])

    def record_versions(self) -> None:
        """Adds what plays now to a JSON list; the lock on the table of scores keeps other writers away."""
        path = self._part(EVALUATION_VERSIONS)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        versions = software_versions()
        if versions not in known:
            write_text(path, json.dumps([*known, versions], indent=1) + "\n")


def _check_protocol(folder: Path, rows: Iterable[EpisodeResult], protocol: Protocol) -> None:
    for row in rows:
        if (row.epsilon, row.emulator) != (protocol.epsilon, protocol.emulator):
            raise ValueError(
                f"{folder / SCORES} holds episodes at {_conditions(row.epsilon, row.emulator)}, wanted "
                f"{_conditions(protocol.epsilon, protocol.emulator)}: scores of different protocols cannot be "
                "compared; choose another folder (--out)"
            )


def _conditions(epsilon: float, emulator: Emulator) -> str:
    return (
        f"epsilon {epsilon:g}, sticky {emulator.sticky_action_probability:g}, frame limit {emulator.max_env_frames:,}"
    )


def _check_agent(folder: Path, rows: Iterable[EpisodeResult], agent: AgentId, seed: int) -> None:
    """Rows that would continue those of this agent must be of the same weights and the same episodes."""
    for row in rows:
        if (row.checkpoint, row.evaluation_seed) != (agent.checkpoint, seed):
            raise ValueError(
                f"{folder / SCORES} holds episodes of {row.agent} (training seed {row.seed}, gradient step "
                f"{row.gradient_step}) from checkpoint {row.checkpoint or 'none'!r} with evaluation seed "
                f"{row.evaluation_seed}, wanted checkpoint {agent.checkpoint or 'none'!r} and seed {seed}; choose "
                "another folder (--out) or delete the table"
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
