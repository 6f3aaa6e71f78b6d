"""Checkpoints of Dopamine's replay buffer as a source of episodes, whatever files hold them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from torchrl_sql.data.importers.dopamine_buffer import BufferState, Segment, place_checkpoints
from torchrl_sql.data.importers.dopamine_episodes import CheckpointReader, read_episodes
from torchrl_sql.data.importers.job import Episode, EpisodeSource, Position
from torchrl_sql.games import FRAME_SHAPE

MAX_EPISODE_STEPS = 27_000
"""Agent steps after which the runner of DQN-Replay ended an episode."""

OPTIONS = {
    "games": "e.g. train40, or names separated by commas",
    "run": "1 to 5 (default: 1)",
    "checkpoints": "e.g. 0-9, the first 20%%: the paper's sub-optimal set (default: it, or all the folders there are)",
    "workers": "processes, each on one game at a time (default: 1)",
    "max_episode_steps": f"agent steps after which the agent's runner ended an episode (default: {MAX_EPISODE_STEPS})",
    "rewards": "what the agent's runner logged (default: clipped)",
}
"""Options on the command line, with their help."""

_COMPARED_FRAMES = 64


class DopamineSource(EpisodeSource):
    """Checkpoints of one game and run; a subclass opens their files.

    Args:
        format (str): its name on the command line.
        title (str): its name for people.
        game (str): name of the game.

    Keyword Args:
        run (int): which of its runs.
        checkpoints (str or sequence of int): as :func:`parse_checkpoints` takes them.
        max_episode_steps (int): agent steps after which the data's runner ended an episode.
        rewards (str): ``"clipped"``, or ``"raw"`` as the game scored them.

    Raises:
        ValueError: for bad arguments.
    """

    def __init__(
        self,
        format: str,
        title: str,
        game: str,
        *,
        run: int,
        checkpoints: str | Sequence[int],
        max_episode_steps: int,
        rewards: Literal["raw", "clipped"],
    ) -> None:
        if run < 1:
            raise ValueError(f"run must be >= 1, got {run}")
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be >= 1, got {max_episode_steps}")
        self.checkpoints = parse_checkpoints(checkpoints)
        self.max_episode_steps = max_episode_steps
        self.game = game
        self.description = f"{title}, {game} run {run}, checkpoints {_shortened(self.checkpoints)}"
        self.rewards = rewards
        self.request = {
            "format": format,
            "run": run,
            "checkpoints": list(self.checkpoints),
            "max_episode_steps": max_episode_steps,
            "rewards": rewards,
        }

    @abstractmethod
    def state(self, number: int) -> BufferState:
        """What a checkpoint says of itself."""

    @abstractmethod
    def open(self, number: int) -> AbstractContextManager[CheckpointReader]:
        """Opens the rows of a checkpoint."""

    @abstractmethod
    def digest(self, part: str) -> str:
        """Of the contents of the checkpoint whose number ``part`` is."""

    def count_rows(self) -> int:
        """Those of all checkpoints, unused ones included."""
        return sum({segment.number: segment.num_rows for segment in self._segments}.values())

    def read(self, state: Mapping[str, Any] | None) -> Iterator[Episode | Position]:
        """Goes through the checkpoints, with a position after each."""
        return read_episodes(
            self._segments,
            self.open,
            game=self.game,
            max_episode_steps=self.max_episode_steps,
            rewards=self.rewards,
            state=state,
        )

    @cached_property
    def _segments(self) -> tuple[Segment, ...]:
        return place_checkpoints([self.state(number) for number in self.checkpoints], self._repeats)

    def _repeats(self, earlier: BufferState, later: BufferState, rows: np.ndarray) -> bool:
        """Whether two checkpoints hold the same; frames are looked at where only content tells how rows follow."""
        with self.open(earlier.number) as one, self.open(later.number) as other:
            pairs = [(one.action, other.action), (one.reward, other.reward), (one.terminal, other.terminal)]
            if any((ours[rows] != theirs[rows]).any() for ours, theirs in pairs):
                return False
            is_shared = np.zeros(later.num_rows, bool)
            is_shared[rows] = not later.is_past_first_lap
            blocks = np.split(is_shared, range(_COMPARED_FRAMES, later.num_rows, _COMPARED_FRAMES))
            while blocks and not blocks[-1].any():
                blocks.pop()
            for block in blocks:
                frames = np.empty((2, len(block), *FRAME_SHAPE), np.uint8)
                one.read_frames(frames[0])
                other.read_frames(frames[1])
                if (frames[0, block] != frames[1, block]).any():
                    return False
        return True


def parse_checkpoints(checkpoints: str | Sequence[int]) -> tuple[int, ...]:
    """Checkpoint numbers from ``"0-9"``, ``"0-3,5"``, a range or a sequence.

    Raises:
        ValueError: if they are not ascending numbers.
    """
    if isinstance(checkpoints, str):
        numbers: list[int] = []
        for part in checkpoints.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise ValueError(f"checkpoints must be like '0-9' or '0-3,5', got {checkpoints!r}")
            numbers += range(int(first), int(last if dash else first) + 1)
    else:
        numbers = [int(number) for number in checkpoints]
    if not numbers or numbers[0] < 0 or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(f"checkpoints must be ascending numbers from 0 on, got {checkpoints!r}")
    return tuple(numbers)


def _shortened(numbers: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` as ``"0-2,5"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
