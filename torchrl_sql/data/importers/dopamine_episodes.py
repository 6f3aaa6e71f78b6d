"""Turns the rows of Dopamine's replay buffer into episodes, whatever files hold them.

:mod:`torchrl_sql.data.importers.dopamine_buffer` explains the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np

from torchrl_sql.data.importers.dopamine_buffer import MAX_EPISODE_STEPS, NUM_PADDING_ROWS, PlacedCheckpoint
from torchrl_sql.data.importers.job import Episode, Position
from torchrl_sql.games import FRAME_SHAPE, GAMES

PADDING = "padding"
PAST_CURSOR = "past the cursor"
NO_EPISODE_START = "episode start missing"

_Ending = Literal["terminated", "truncated", "cut"]


class CheckpointReader(Protocol):
    """The rows of one checkpoint. Scalars are there at once; frames are read in the order of the file.

    Attributes:
        action (integers ``[N]``), reward (floats ``[N]``), terminal (integers ``[N]``).
    """

    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray

    def path(self, member: str) -> str:
        """The file that holds ``"observation"``, ``"action"``, ``"reward"`` or ``"terminal"``, for messages."""

    def read_frames(self, out: np.ndarray) -> None:
        """Fills ``out`` (uint8 ``[n, 84, 84]``) with the next ``n`` frames."""

    def skip_frames(self, num_frames: int) -> None:
        """Passes over frames."""

    def finish(self) -> None:
        """Checks that no frame is left, and whatever checksum there is."""


def read_episodes(
    placed: Sequence[PlacedCheckpoint],
    open_checkpoint: Callable[[int], AbstractContextManager[CheckpointReader]],
    *,
    game: str,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Episode | Position]:
    """Yields the episodes, and after each checkpoint a position to continue from.

    Each file is read once, from front to back, and at most a few episodes are held in memory. The last row of a file
    belongs before its first one in time: the episode around it is yielded after the others of that checkpoint.

    Args:
        placed (sequence of PlacedCheckpoint): what to read.
        open_checkpoint (callable): opens the checkpoint of a number.

    Keyword Args:
        game (str): whose minimal actions the checkpoints hold.
        max_episode_steps (int): length of a time-out, and of the longest episode.
        state (mapping, optional): of the position to continue from.

    Raises:
        ValueError: if rows contradict the format.
    """
    builder = _EpisodeBuilder(placed, open_checkpoint, game, max_episode_steps)
    if state is not None:
        builder.segment, builder.time = state["segment"], state["time"]
        builder.headless, builder.dropped = state["headless"], dict(state["dropped"])
    while builder.segment < len(placed):
        yield from builder.read_segment()
    yield from builder.finish()


class _OpenEpisode:
    """An episode whose end was not read yet.

    Attributes:
        start (tuple): segment and time of its first row, padding included, and rows dropped before it.
        num_rows (int): rows read, padding included.
    """

    def __init__(self, start: tuple[int, int, dict[str, int]]) -> None:
        self.start = start
        self.num_rows = 0
        self.frames: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []

    @property
    def num_steps(self) -> int:
        return max(self.num_rows - NUM_PADDING_ROWS, 0)

    def close(self, ending: _Ending) -> Episode:
        frames, actions, rewards = (
            parts[0] if len(parts) == 1 else np.concatenate(parts)
            for parts in (self.frames, self.actions, self.rewards)
        )
        return Episode(frames, actions, rewards, ending, self.num_rows)


class _EpisodeBuilder:
    """Reads segment after segment (a placed checkpoint each) and keeps the episode that is open between them."""

    def __init__(
        self,
        placed: Sequence[PlacedCheckpoint],
        open_checkpoint: Callable[[int], AbstractContextManager[CheckpointReader]],
        game: str,
        max_episode_steps: int,
    ) -> None:
        self.placed = placed
        self.open_checkpoint = open_checkpoint
        self.game = game
        self.full_actions = np.array(GAMES[game].minimal_actions, np.uint8)
        self.max_episode_steps = max_episode_steps
        self.segment, self.time = 0, 0  # What is read next.
        self.headless = False  # Inside an episode whose first rows are missing.
        self.dropped: dict[str, int] = {}  # Of what lies before, the open episode excepted.
        self.episode: _OpenEpisode | None = None

    def read_segment(self) -> Iterator[Episode | Position]:
        checkpoint = self.placed[self.segment]
        num_unused = checkpoint.num_rows - checkpoint.wraps - checkpoint.cursor
        before = dict(self.dropped)
        if self.time == 0:
            if checkpoint.start == "unknown":
                yield from self._cut()
                self.headless = True
            self._drop(PAST_CURSOR, num_unused)
        with self.open_checkpoint(checkpoint.number) as reader:
            actions, rewards, terminals = self._scalars(checkpoint, reader)
            oldest = _OldestRow() if checkpoint.wraps and self.time == 0 else None
            finished: tuple[_OpenEpisode, _Ending] | None = None  # Ended, but its frame in the oldest row is to come.
            reader.skip_frames(max(self.time - checkpoint.wraps, 0))
            for stop in _piece_ends(terminals, self.time):
                start, self.time = self.time, stop
                if self.headless:
                    self._drop(NO_EPISODE_START, stop - start)
                    reader.skip_frames(stop - start - (oldest is not None and start == 0))
                    self.headless = not terminals[stop - 1]
                    continue
                if self.episode is None:
                    self.episode = _OpenEpisode((self.segment, start, before if start == 0 else dict(self.dropped)))
                self._append(
                    reader, checkpoint, start, actions[start:stop], rewards[start:stop], oldest if start == 0 else None
                )
                if terminals[stop - 1]:
                    episode, ending = self._end(reader, checkpoint, stop - 1)
                    if oldest is not None and start == 0:
                        finished = episode, ending
                    else:
                        yield episode.close(ending)
            if checkpoint.wraps:
                reader.skip_frames(num_unused)
                frame = oldest.frame if oldest is not None else np.empty((1, *FRAME_SHAPE), np.uint8)
                reader.read_frames(frame)
                if oldest is not None and oldest.is_padding:
                    _check_padding(reader, checkpoint, 0, frame)
            else:
                reader.skip_frames(num_unused)
            reader.finish()
            if finished is not None:
                yield finished[0].close(finished[1])
        self.segment, self.time = self.segment + 1, 0
        if self.segment < len(self.placed):
            yield self._position()

    def finish(self) -> Iterator[Episode | Position]:
        yield from self._cut()
        yield Position(None, dict(self.dropped))

    def _position(self) -> Position:
        segment, time, dropped = (
            (self.segment, self.time, dict(self.dropped)) if self.episode is None else self.episode.start
        )
        state = {"segment": segment, "time": time, "headless": self.headless, "dropped": dropped}
        return Position(state, dropped)

    def _scalars(
        self, checkpoint: PlacedCheckpoint, reader: CheckpointReader
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checked actions (full set), rewards and terminals, in time order, unused rows left out."""

        def in_time_order(rows: np.ndarray) -> np.ndarray:
            used = rows[: checkpoint.cursor]
            return np.concatenate((rows[-1:], used)) if checkpoint.wraps else used

        def check(member: str, values: np.ndarray, good: np.ndarray, expected: str) -> None:
            if not good.all():
                time = int(np.argmin(good))
                raise ValueError(
                    f"{reader.path(member)}: row {checkpoint.row(time)} must be {expected}, got {values[time]}"
                )

        actions, rewards, terminals = map(in_time_order, (reader.action, reader.reward, reader.terminal))
        num_actions = len(self.full_actions)
        expected = f"in 0..{num_actions - 1}, the minimal actions of {self.game}"
        check("action", actions, (actions >= 0) & (actions < num_actions), expected)
        check("reward", rewards, np.abs(rewards) <= 1, "clipped to [-1, 1]")
        check("terminal", terminals, (terminals == 0) | (terminals == 1), "0 or 1")
        return self.full_actions[actions], rewards, terminals

    def _append(
        self,
        reader: CheckpointReader,
        checkpoint: PlacedCheckpoint,
        start: int,
        actions: np.ndarray,
        rewards: np.ndarray,
        oldest: _OldestRow | None,
    ) -> None:
        """Adds rows from time ``start`` on to the open episode; ``oldest``: the first one's frame comes later."""
        episode = self.episode
        assert episode is not None
        num_rows = len(actions)
        num_padding = min(max(NUM_PADDING_ROWS - episode.num_rows, 0), num_rows)
        if episode.num_steps + num_rows - num_padding > self.max_episode_steps:
            segment, time, _ = episode.start
            first = self.placed[segment]
            raise ValueError(
                f"{reader.path('terminal')}: an episode has more than {self.max_episode_steps} steps (it starts at row "
                f"{first.row(time)} of {first.name}): terminal flags are missing, or max_episode_steps must be larger"
            )
        lacking = int(oldest is not None)
        padding = np.zeros((num_padding, *FRAME_SHAPE), np.uint8)
        frames = np.empty((num_rows - num_padding, *FRAME_SHAPE), np.uint8)
        if oldest is not None:
            oldest.is_padding = num_padding > 0
            oldest.frame = (padding if num_padding else frames)[:1]
        reader.read_frames(padding[lacking:])
        reader.read_frames(frames[lacking if not num_padding else 0 :])
        for place in range(num_padding):
            # Action 0 of every minimal set is NOOP, 0 of the full one.
            _check_padding(reader, checkpoint, start + place, padding[place], actions[place], rewards[place])
        episode.num_rows += num_rows
        if len(frames):
            episode.frames.append(frames)
            episode.actions.append(actions[num_padding:])
            episode.rewards.append(rewards[num_padding:])

    def _end(self, reader: CheckpointReader, checkpoint: PlacedCheckpoint, time: int) -> tuple[_OpenEpisode, _Ending]:
        episode = self.episode
        assert episode is not None
        if not episode.num_steps:
            raise ValueError(
                f"{reader.path('terminal')}: row {checkpoint.row(time)} must be padding (the row before it, or the "
                f"one or two before that, ended an episode), but is terminal"
            )
        self.episode = None
        self._drop(PADDING, NUM_PADDING_ROWS)
        return episode, "truncated" if episode.num_steps == self.max_episode_steps else "terminated"

    def _cut(self) -> Iterator[Episode]:
        """The open episode, as far as it goes."""
        episode, self.episode = self.episode, None
        if episode is not None:
            self._drop(PADDING, min(episode.num_rows, NUM_PADDING_ROWS))
            if episode.num_steps:
                yield episode.close("cut")

    def _drop(self, reason: str, num_rows: int) -> None:
        if num_rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + num_rows


class _OldestRow:
    """Where the frame of a checkpoint's oldest row goes, which is the last of the file."""

    def __init__(self) -> None:
        self.frame = np.empty((1, *FRAME_SHAPE), np.uint8)
        self.is_padding = False


def _piece_ends(terminals: np.ndarray, first: int) -> list[int]:
    """Cuts times ``first ..`` after each terminal row; the last piece may lack one."""
    ends: list[int] = (np.flatnonzero(terminals[first:]) + first + 1).tolist()
    if first < len(terminals) and (not ends or ends[-1] != len(terminals)):
        ends.append(len(terminals))
    return ends


def _check_padding(
    reader: CheckpointReader,
    checkpoint: PlacedCheckpoint,
    time: int,
    frame: np.ndarray,
    action: int = 0,
    reward: float = 0.0,
) -> None:
    for member, value in (("observation", frame.any()), ("action", action), ("reward", reward)):
        if value:
            raise ValueError(
                f"{reader.path(member)}: row {checkpoint.row(time)} must be padding (zeros), as the first "
                f"{NUM_PADDING_ROWS} rows of each episode are"
            )
