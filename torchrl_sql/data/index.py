"""The episodes of many recordings as one sequence of transitions, and which of them can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrl_sql.data.recording import Recording


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Which transitions of a store to draw from; the defaults take all. The conditions add up; nothing is copied.

    They limit the transitions that are drawn: the frames of ``("next", "observation")`` may lie beyond.

    Attributes:
        first_fraction (float): in (0, 1], the first such part of each recording in time order, counted in steps. 0.2 of
            a DQN-Replay run is the "sub-optimal" data of Kumar et al. (2023).
        last_fraction (float): in (0, 1], the last such part of each recording: the episodes that begin in it.
        every_kth_episode (int): >= 1, only the episodes 0, k, 2k, ... of each recording.
        transitions_per_game (int, optional): so many of each game, the first of those left by the other conditions.
        newest_steps (int, optional): of each recording the newest episodes that have at most so many steps together,
            at least the last one: what a replay buffer of this capacity would hold.
    """

    first_fraction: float = 1.0
    last_fraction: float = 1.0
    every_kth_episode: int = 1
    transitions_per_game: int | None = None
    newest_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("first_fraction", "last_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)!r}")
        for name in ("every_kth_episode", "transitions_per_game", "newest_steps"):
            value: Any = getattr(self, name)
            optional = value is None and name != "every_kth_episode"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class EpisodeIndex:
    """Joins the episode tables of all recordings: some 50 bytes per episode, nothing per transition.

    Transitions are numbered game by game in the order of ``games``, then recording by recording, in time order; those
    that cannot be drawn have no number. In each episode, the ones that can are its first.

    Args:
        games (sequence of str): names, ``G`` of them.
        recordings (sequence of Recording): ``R`` recordings, in the order of their games.

    Keyword Args:
        n_steps (int or None): steps of the return. A transition that spans the end of an episode which did not
            terminate needs the frame that follows, and cannot be drawn where it was not stored. None is for returns to
            the episode's end, which those that are cut do not have.
        subset (Subset): a further restriction.

    Attributes:
        recording, recording_game (int64 ``[E]``, ``[R]``): recording of each episode, game of each recording.
        first_frame, stop_frame (int64 ``[E]``): rows of the recording's frame array.
        first_step, num_steps (int64 ``[E]``): rows of the recording's actions and rewards.
        terminated (bool ``[E]``): how the episode ended.
        game_offsets (int64 ``[G + 1]``): game ``g`` has the numbers ``game_offsets[g]..game_offsets[g + 1] - 1``.
        num_unsampleable (int): steps that cannot be drawn because what they need was never stored.

    Raises:
        ValueError: if a game has fewer transitions than ``subset`` asks for.
    """

    def __init__(
        self, games: Sequence[str], recordings: Sequence[Recording], *, n_steps: int | None, subset: Subset
    ) -> None:
        tables = [recording.episodes for recording in recordings]
        num_episodes = np.array([len(table) for table in tables])

        def join(field: str, dtype: type) -> np.ndarray:
            return np.concatenate([table[field].astype(dtype) for table in tables])

        self.recording = np.repeat(np.arange(len(recordings)), num_episodes)
        self.recording_game = np.array([games.index(recording.game) for recording in recordings])
        self.first_frame = join("first_frame", np.int64)
        self.num_steps = join("num_steps", np.int64)
        self.terminated = join("terminated", np.bool_)
        has_final_frame = join("has_final_frame", np.bool_)
        self.stop_frame = self.first_frame + self.num_steps + has_final_frame
        self.first_step = np.concatenate([recording.first_steps() for recording in recordings])

        end_usable = ~join("cut", np.bool_) if n_steps is None else self.terminated | has_final_frame
        before_end = 0 if n_steps is None else np.maximum(self.num_steps - n_steps, 0)
        count = np.where(end_usable, self.num_steps, before_end)
        self.num_unsampleable = int(self.num_steps.sum() - count.sum())

        recording_steps = np.array([recording.num_steps for recording in recordings])
        elapsed = np.concatenate([np.cumsum(table["num_steps"]) - table["num_steps"] for table in tables])
        stop = np.rint(subset.first_fraction * recording_steps).astype(np.int64)[self.recording]
        count = np.minimum(count, np.maximum(stop - elapsed, 0))
        start = recording_steps - np.rint(subset.last_fraction * recording_steps).astype(np.int64)
        count[elapsed < start[self.recording]] = 0
        if subset.newest_steps is not None:
            left = recording_steps[self.recording] - elapsed  # of this episode and those after it
            count[(left > subset.newest_steps) & (left > self.num_steps)] = 0
        episode_in_recording = np.arange(len(count)) - (np.cumsum(num_episodes) - num_episodes)[self.recording]
        count[episode_in_recording % subset.every_kth_episode != 0] = 0
        game = self.recording_game[self.recording]
        per_game = np.bincount(game, weights=count, minlength=len(games)).astype(np.int64)
        if subset.transitions_per_game is not None:
            short = np.flatnonzero(per_game < subset.transitions_per_game)
            if short.size:
                raise ValueError(
                    f"transitions_per_game must be at most the {per_game[short[0]]} that {games[short[0]]} has here, "
                    f"got {subset.transitions_per_game}"
                )
            before = np.cumsum(count) - count - (np.cumsum(per_game) - per_game)[game]
            count = np.clip(subset.transitions_per_game - before, 0, count)
            per_game[:] = subset.transitions_per_game
        self.game_offsets = np.concatenate([[0], np.cumsum(per_game)])
        self._count = count
        self._end = np.cumsum(count)

    def __len__(self) -> int:
        return int(self.game_offsets[-1])

    @property
    def num_drawable_steps(self) -> np.ndarray:
        """int64 ``[E]``: of each episode so many transitions can be drawn, its first ones."""
        return self._count

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Episode and step within it, int64 ``[B]`` each, of transitions int64 ``[B]`` in ``0..len - 1``."""
        episode = np.searchsorted(self._end, index, side="right")
        return episode, index - (self._end[episode] - self._count[episode])
