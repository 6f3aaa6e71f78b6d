"""The episodes of many runs as one sequence of transitions, and which of them can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrl_sql.data.recording import Recording


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which transitions of a store to draw from; the defaults take all. The conditions add up; nothing is copied.

    They limit the transitions that are drawn: the frames of ``("next", "observation")`` may lie beyond.

    Attributes:
        first_fraction (float): in (0, 1], the first such part of each run in time order, counted in steps. 0.2 of a
            DQN-Replay run is the "sub-optimal" data of Kumar et al. (2023).
        every_kth_episode (int): >= 1, only the episodes 0, k, 2k, ... of each run.
        transitions_per_game (int, optional): so many of each game, the first of those left by the other conditions.
    """

    first_fraction: float = 1.0
    every_kth_episode: int = 1
    transitions_per_game: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.first_fraction <= 1.0:
            raise ValueError(f"first_fraction must lie in (0, 1], got {self.first_fraction!r}")
        for name in ("every_kth_episode", "transitions_per_game"):
            value: Any = getattr(self, name)
            optional = value is None and name == "transitions_per_game"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class EpisodeIndex:
    """Joins the episode tables of all runs: some 50 bytes an episode, nothing a transition.

    Transitions are numbered game by game in the order of ``games``, then run by run, in time order; those that cannot
    be drawn have no number. In each episode, those that can are its first ones.

    Args:
        games (sequence of str): names, ``G`` of them.
        runs (sequence of Recording): ``R`` runs, in the order of their games.

    Keyword Args:
        n_steps (int): steps of the return. A transition that spans the end of an episode which did not terminate needs
            the frame that follows, and cannot be drawn where it was not stored.
        part (Part): a further restriction.

    Attributes:
        run, run_game (int64 ``[E]``, ``[R]``): run of each episode, game of each run.
        first_frame, stop_frame (int64 ``[E]``): rows of the run's frame array.
        first_step, num_steps (int64 ``[E]``): rows of the run's actions and rewards.
        terminated (bool ``[E]``): how the episode ended.
        game_offsets (int64 ``[G + 1]``): game ``g`` has the numbers ``game_offsets[g]..game_offsets[g + 1] - 1``.
        num_unsampleable (int): steps that cannot be drawn because the frame they need was never stored.

    Raises:
        ValueError: if a game has fewer transitions than ``part`` asks for.
    """

    def __init__(self, games: Sequence[str], runs: Sequence[Recording], *, n_steps: int, part: Part) -> None:
        tables = [run.episodes for run in runs]
        num_episodes = np.array([len(table) for table in tables])

        def join(field: str, dtype: type) -> np.ndarray:
            return np.concatenate([table[field].astype(dtype) for table in tables])

        self.run = np.repeat(np.arange(len(runs)), num_episodes)
        self.run_game = np.array([games.index(run.game) for run in runs])
        self.first_frame = join("first_frame", np.int64)
        self.num_steps = join("num_steps", np.int64)
        self.terminated = join("terminated", np.bool_)
        has_final_frame = join("has_final_frame", np.bool_)
        self.stop_frame = self.first_frame + self.num_steps + has_final_frame
        self.first_step = np.concatenate([run.first_steps() for run in runs])

        end_usable = self.terminated | has_final_frame
        count = np.where(end_usable, self.num_steps, np.maximum(self.num_steps - n_steps, 0))
        self.num_unsampleable = int(self.num_steps.sum() - count.sum())

        run_steps = np.array([run.num_steps for run in runs])
        last = np.rint(part.first_fraction * run_steps).astype(np.int64)[self.run]
        count = np.minimum(count, np.maximum(last - self.first_step, 0))
        number_in_run = np.arange(len(count)) - (np.cumsum(num_episodes) - num_episodes)[self.run]
        count[number_in_run % part.every_kth_episode != 0] = 0
        game = self.run_game[self.run]
        per_game = np.bincount(game, weights=count, minlength=len(games)).astype(np.int64)
        if part.transitions_per_game is not None:
            short = np.flatnonzero(per_game < part.transitions_per_game)
            if short.size:
                raise ValueError(
                    f"transitions_per_game must be at most the {per_game[short[0]]} that {games[short[0]]} has here, "
                    f"got {part.transitions_per_game}"
                )
            before = np.cumsum(count) - count - (np.cumsum(per_game) - per_game)[game]
            count = np.clip(part.transitions_per_game - before, 0, count)
            per_game[:] = part.transitions_per_game
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
