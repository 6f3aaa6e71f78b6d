"""Plays behaviour policies in the emulator and hands whole episodes to a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np

from torchrl_sql.envs.atari import DEFAULT_EMULATOR, Emulator
from torchrl_sql.envs.slots import Slot, Slots
from torchrl_sql.games import find_game

_COMMIT_INTERVAL_AGENT_STEPS = 10_000


class BehaviourPolicy(Protocol):
    """What :func:`collect` plays, e.g. :class:`torchrl_sql.envs.behaviours.SkillMixture`."""

    @property
    def behaviour_names(self) -> tuple[str, ...]:
        """Labels of the kinds of episodes."""

    def start_episode(self, rng: np.random.Generator) -> tuple[int, Callable[[np.ndarray], int]]:
        """Returns a behaviour index and the policy of one episode: newest frame ``[84, 84]`` -> action in 0..17."""


class EpisodeWriter(Protocol):
    """Where episodes go; the writer of :class:`torchrl_sql.data.FrameStore` is one."""

    @property
    def num_episodes(self) -> int:
        """Episodes held, those just added included."""

    @property
    def num_steps(self) -> int:
        """Agent steps held, those just added included."""

    def add_episode(
        self, frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, *, terminated: bool, behaviour: int
    ) -> None:
        """Appends an episode."""

    def commit(self) -> None:
        """Publishes what was appended."""


@dataclass
class _Episode:
    index: int
    behaviour: int
    act: Callable[[np.ndarray], int]
    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False


def collect(
    writer: EpisodeWriter,
    policy: BehaviourPolicy,
    game: str,
    num_agent_steps: int,
    emulator: Emulator = DEFAULT_EMULATOR,
    *,
    seed: int = 0,
    num_envs: int | None = None,
    progress: Callable[[int], None] = lambda num_agent_steps: None,
) -> None:
    """Appends whole episodes until the writer holds at least ``num_agent_steps`` steps.

    Episode ``i`` is a function of (``seed``, ``game``, ``i``) and is written in order, so an interrupted collection
    that is called again ends in the same store as one that ran through. Truncated episodes are stored with their
    final frame.

    Args:
        writer (EpisodeWriter): where episodes go; those it already holds are not played again.
        policy (BehaviourPolicy): what chooses the actions.
        game (str): its name, as :func:`torchrl_sql.games.find_game` takes it.
        num_agent_steps (int): transitions wanted, those already in ``writer`` included.
        emulator (Emulator): how the game runs.

    Keyword Args:
        seed (int): seed of emulator and policy.
        num_envs (int, optional): episodes played at a time; default two per core. Those under way at the end are lost.
        progress (callable): is given the number of agent steps in the store after each episode.
    """
    if writer.num_steps >= num_agent_steps:
        return
    num_committed = writer.num_steps
    for episode in _play(policy, game, emulator, seed=seed, first_index=writer.num_episodes, num_envs=num_envs):
        writer.add_episode(
            np.stack(episode.frames),
            np.array(episode.actions),
            np.array(episode.rewards, dtype=np.float32),
            terminated=episode.terminated,
            behaviour=episode.behaviour,
        )
        progress(writer.num_steps)
        done = writer.num_steps >= num_agent_steps
        if done or writer.num_steps - num_committed >= _COMMIT_INTERVAL_AGENT_STEPS:
            writer.commit()
            num_committed = writer.num_steps
        if done:
            return


def _play(
    policy: BehaviourPolicy, game: str, emulator: Emulator, *, seed: int, first_index: int, num_envs: int | None
) -> Iterator[_Episode]:
    """Episodes ``first_index`` and so on, in this order, without end."""
    seed_key = find_game(game).seed_key
    indices = count(first_index)
    finished: dict[int, _Episode] = {}

    def start(slot: Slot[_Episode] | None = None) -> None:
        index = next(indices)
        rng = np.random.default_rng([seed, *seed_key, index])
        emulator_seed = int(rng.integers(2**31 - 1))
        slots.start(_Episode(index, *policy.start_episode(rng)), game, emulator_seed, slot=slot)

    with Slots[_Episode](emulator) as slots:
        for _ in range(num_envs or 2 * slots.num_threads):
            start()
        while (slot := slots.next()) is not None:
            episode = slot.episode
            if episode.actions:
                episode.rewards.append(slot.reward)
            if not slot.terminated:
                episode.frames.append(slot.observation[-1].copy())
            if slot.terminated or slot.truncated:
                episode.terminated = slot.terminated
                finished[episode.index] = episode
                start(slot)
                while first_index in finished:
                    yield finished.pop(first_index)
                    first_index += 1
                continue
            action = episode.act(episode.frames[-1])
            episode.actions.append(action)
            slots.send(slot, action)
