"""Emulators that step together: what is played depends on seeds and actions only, and can be played again from them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchrl_sql.envs.atari import DEFAULT_EMULATOR, Emulator
from torchrl_sql.envs.slots import Slot
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK, resolve_games


class EmulatorError(OSError):
    """An emulator that cannot go on; the message names it."""


@dataclass
class PlayedEpisode:
    """An episode, under way or over.

    Attributes:
        emulator (int): which one plays it.
        number (int): of the emulator's episodes, from 0.
        labels (dict): what its caller wants to know of its beginning, numbers by name.
        frames (list of uint8 ``[84, 84]``): the newest frame of each observation; the last one too, if a time-out ended
            the episode.
        actions (list of int), rewards (list of float): of each step; rewards are raw.
        terminated, truncated (bool): how it ended.
        crc32 (int): of all observations and rewards so far.
    """

    emulator: int
    number: int
    labels: dict[str, float]
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    actions: list[int] = field(default_factory=list, repr=False)
    rewards: list[float] = field(default_factory=list, repr=False)
    terminated: bool = False
    truncated: bool = False
    crc32: int = 0

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.terminated or self.truncated

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to play it again."""
        actions = torch.tensor(self.actions, dtype=torch.uint8)
        return {"emulator": self.emulator, "number": self.number, "labels": dict(self.labels), "actions": actions,
                "crc32": self.crc32}  # fmt: skip


class Lockstep:
    """``N`` emulators, each of one game, that all take a step at a time.

    A new episode begins where one has ended; the others wait for it. Emulator ``i`` plays game ``i`` modulo the number
    of games, and its ``k``-th episode has a seed that follows from ``seed``, ``i`` and ``k``.

    Args:
        games (sequence of str): what is played.
        num_emulators (int): ``N``, a multiple of the number of games.
        emulator (Emulator): how they run.

    Keyword Args:
        seed (int): of all episodes.

    Attributes:
        games (tuple of str): as given; ``game_id`` indexes them.
        game_id (int64 ``[N]``): what each emulator plays.
        observation (uint8 ``[N, 4, 84, 84]``): what is seen now.
        episodes (list of PlayedEpisode): under way.

    Raises:
        ValueError: if the emulators cannot be divided among the games.
    """

    def __init__(
        self, games: Sequence[str], num_emulators: int, emulator: Emulator = DEFAULT_EMULATOR, *, seed: int
    ) -> None:
        if num_emulators < 1 or num_emulators % len(games):
            raise ValueError(f"num_emulators must be a multiple of the {len(games)} games, got {num_emulators}")
        self.games = tuple(resolve_games(games))
        self.game_id = np.arange(num_emulators) % len(games)
        self.observation = np.zeros((num_emulators, FRAME_STACK, *FRAME_SHAPE), np.uint8)
        self.episodes: list[PlayedEpisode] = []
        self._seed = seed
        self._slots: list[Slot[None]] = [Slot(emulator, None) for _ in range(num_emulators)]
        self._starters = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="start")

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, labels: Mapping[str, float]) -> None:
        """Starts the first episode of each emulator."""
        self.episodes = [PlayedEpisode(index, 0, dict(labels)) for index in range(len(self))]
        list(self._starters.map(self._start, self.episodes))

    def step(self, actions: np.ndarray, labels: Mapping[str, float]) -> list[PlayedEpisode]:
        """One step of each emulator.

        Args:
            actions (int ``[N]``): in 0..17.
            labels (mapping): of episodes that begin after this step.

        Returns:
            The episodes that ended with it, by emulator.

        Raises:
            EmulatorError: if an emulator fails.
        """
        for episode, action in zip(self.episodes, actions.tolist(), strict=True):
            self._send(episode, action)
        for episode, action in zip(self.episodes, actions.tolist(), strict=True):
            self._receive(episode, action)
        ended = [episode for episode in self.episodes if episode.over]
        for episode in ended:
            begun = PlayedEpisode(episode.emulator, episode.number + 1, dict(labels))
            self.episodes[episode.emulator] = begun
        list(self._starters.map(self._start, [self.episodes[episode.emulator] for episode in ended]))
        return ended

    def play_again(
        self, states: Sequence[Mapping[str, Any]], on_step: Callable[[], None] = lambda: None
    ) -> list[PlayedEpisode]:
        """Continues where other emulators of this kind were.

        Args:
            states (sequence of mapping): :meth:`PlayedEpisode.state_dict` of the episodes under way and of any that had
                ended before, in any order.
            on_step (callable): is called before each step, by several threads; what it raises ends the playing.

        Returns:
            Those that had ended, in the order given.

        Raises:
            ValueError: if the emulators do not play what they played: they are of another version.
            LookupError, TypeError: if these are not such states.
        """
        episodes = [PlayedEpisode(s["emulator"], s["number"], dict(s["labels"])) for s in states]
        actions = [state["actions"].tolist() for state in states]
        of_emulator: list[list[int]] = [[] for _ in self._slots]
        for row in sorted(range(len(episodes)), key=lambda row: episodes[row].number):
            of_emulator[episodes[row].emulator].append(row)

        def play(rows: list[int]) -> PlayedEpisode:
            for row in rows:
                self._start(episodes[row])
                for action in actions[row]:
                    on_step()
                    if not episodes[row].over:
                        self._send(episodes[row], action)
                        self._receive(episodes[row], action)
                if episodes[row].over is (row == rows[-1]) or episodes[row].crc32 != states[row]["crc32"]:
                    raise ValueError(
                        f"episode {episodes[row]} is not what it was: is this another version of ale-py or torchrl_sql?"
                    )
            return episodes[rows[-1]]

        self.episodes = list(self._starters.map(play, of_emulator))
        return [episode for episode in episodes if episode.over]

    def close(self) -> None:
        """Gives the emulators back."""
        self._starters.shutdown()
        for slot in self._slots:
            slot.release()

    def _start(self, episode: PlayedEpisode) -> None:
        index = episode.emulator
        # A stream of its own: evaluation's emulator seeds come from three such numbers too.
        seeds = np.random.SeedSequence([self._seed, index, episode.number], spawn_key=(1,)).generate_state(1)
        slot = self._slots[index]
        with self._naming(episode):
            slot.start(self.games[self.game_id[index]], int(seeds[0] & 0x7FFFFFFF))
        episode.frames.append(slot.observation[-1].copy())
        episode.crc32 = zlib.crc32(episode.frames[-1].tobytes())
        self.observation[index] = slot.observation

    def _send(self, episode: PlayedEpisode, action: int) -> None:
        with self._naming(episode):
            self._slots[episode.emulator].send(action)

    def _receive(self, episode: PlayedEpisode, action: int) -> None:
        index = episode.emulator
        slot = self._slots[index]
        with self._naming(episode):
            slot.receive()
        episode.actions.append(action)
        episode.rewards.append(slot.reward)
        episode.terminated, episode.truncated = slot.terminated, slot.truncated
        seen = zlib.crc32(slot.observation[-1].tobytes(), episode.crc32)
        episode.crc32 = zlib.crc32(np.float64(slot.reward).tobytes(), seen)
        if not slot.terminated:
            episode.frames.append(slot.observation[-1].copy())
        self.observation[index] = slot.observation

    @contextmanager
    def _naming(self, episode: PlayedEpisode) -> Iterator[None]:
        """Says which emulator failed."""
        try:
            yield
        except (RuntimeError, ChildProcessError) as error:
            game = self.games[self.game_id[episode.emulator]]
            raise EmulatorError(
                f"emulator {episode.emulator} of {game} failed at step {len(episode.actions)} of its episode "
                f"{episode.number}: {error}"
            ) from error
