"""Emulators that play episodes, each at its own pace.

Creating an emulator loads its ROM, which takes as long as many steps, so that starts run in the background, and
emulators are kept.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import numpy as np

from torchrl_sql.envs.atari import AtariVector, Emulator

Episode = TypeVar("Episode")

_MAX_KEPT = 64
_kept: dict[tuple[int, str, Emulator], list[AtariVector]] = {}
"""Idle emulators by process (forks would share their connections), game and settings."""


def _take(game: str, emulator: Emulator) -> AtariVector:
    idle = _kept.get((os.getpid(), game, emulator), [])
    while idle:
        if (vector := idle.pop()).runs:
            return vector
    return AtariVector(game, 1, emulator)


def _keep(vector: AtariVector, emulator: Emulator) -> None:
    if sum(map(len, _kept.values())) < _MAX_KEPT:
        _kept.setdefault((os.getpid(), vector.game, emulator), []).append(vector)


class Slot(Generic[Episode]):
    """One emulator and the episode that it plays.

    Attributes:
        episode (Episode): what its caller keeps of the episode.
        observation (array): uint8 ``[4, 84, 84]``, what is seen now.
        reward (float): raw, of the last step.
        terminated, truncated (bool): whether the episode has ended with the last step.
    """

    def __init__(self, emulator: Emulator, episode: Episode) -> None:
        self.episode = episode
        self.observation: np.ndarray
        self.reward = 0.0
        self.terminated = self.truncated = False
        self._emulator = emulator
        self._vector: AtariVector | None = None
        self._stepping = False

    @property
    def game(self) -> str | None:
        """The game whose emulator this is, if there is one yet."""
        return None if self._vector is None else self._vector.game

    def start(self, game: str, seed: int) -> None:
        """Begins an episode; the emulator is kept if it is the game's."""
        if self.game != game:
            self.release()
            self._vector = _take(game, self._emulator)
        assert self._vector is not None
        self.observation = self._vector.reset(np.array([seed]))[0]
        self.terminated = self.truncated = False

    def release(self) -> None:
        """Gives the emulator back."""
        if self._vector is not None:
            _keep(self._vector, self._emulator)  # what it was asked last is dropped when it begins anew
            self._vector, self._stepping = None, False

    def send(self, action: int) -> None:
        """Starts a step with one of the 18 actions, without waiting for it."""
        assert self._vector is not None
        self._vector.send(np.array([action]))
        self._stepping = True

    def receive(self) -> None:
        """Waits for the step under way, if there is one."""
        if self._stepping:
            assert self._vector is not None
            observation, reward, terminated, truncated = self._vector.recv()
            self._stepping = False
            self.observation, self.reward = observation[0], float(reward[0])
            self.terminated, self.truncated = bool(terminated[0]), bool(truncated[0])


class Slots(Generic[Episode]):
    """Emulators that take turns: a context manager.

    Args:
        emulator (Emulator): how they run.

    Attributes:
        num_threads (int): of the starts: one per core.
    """

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.num_threads = len(os.sched_getaffinity(0))
        self._starters = ThreadPoolExecutor(self.num_threads, thread_name_prefix="start")
        self._slots: list[Slot[Episode]] = []
        self._starting: deque[tuple[Slot[Episode], Future[None]]] = deque()
        self._stepping: deque[Slot[Episode]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._starters.shutdown(cancel_futures=True)
        for slot in self._slots:
            slot.release()

    def __len__(self) -> int:
        return len(self._starting) + len(self._stepping)

    def start(self, episode: Episode, game: str, seed: int, *, slot: Slot[Episode] | None = None) -> None:
        """Begins an episode in the background, in a slot whose episode has ended or in a new one."""
        if slot is None:
            slot = Slot(self._emulator, episode)
            self._slots.append(slot)
        slot.episode = episode
        self._starting.append((slot, self._starters.submit(slot.start, game, seed)))

    def send(self, slot: Slot[Episode], action: int) -> None:
        """Starts a step in a slot that :meth:`next` gave; its turn comes after all others'."""
        slot.send(action)
        self._stepping.append(slot)

    def next(self, *, wait: bool = True) -> Slot[Episode] | None:
        """Takes out the slot whose step, or start, was asked for first, and waits for its step to end.

        Keyword Args:
            wait (bool): wait for a start, too, if no slot has begun to play.
        """
        while self._starting and (self._starting[0][1].done() or (wait and not self._stepping)):
            slot, started = self._starting.popleft()
            started.result()
            self._stepping.append(slot)
        if not self._stepping:
            return None
        slot = self._stepping.popleft()
        slot.receive()
        return slot
