"""Turns the rows of Dopamine's replay buffer into episodes, whatever files hold them.

:mod:`torchrl_sql.data.importers.dopamine_buffer` explains the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from torchrl_sql.data.importers.dopamine_buffer import NUM_PADDING_ROWS, Segment
from torchrl_sql.data.importers.job import Episode, Position
from torchrl_sql.games import FRAME_SHAPE, find_game

PADDING = "padding"
NO_EPISODE_START = "episode start missing"

_Ending = Literal["terminated", "truncated", "cut"]

logger = logging.getLogger(__name__)


class CheckpointReader(Protocol):
    """The rows of one checkpoint. Scalars are there at once; frames are read in the order of the file.

    Attributes:
        action (integers ``[N]``), reward (floats ``[N]``), terminal (integers ``[N]``).
        time_out (bool ``[N]``, optional): rows at which a time limit ended an episode; None: the files do not say.
    """

    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    time_out: np.ndarray | None

    def path(self, member: str) -> str:
        """The file that holds ``"observation"``, ``"action"``, ``"reward"`` or ``"terminal"``, for messages."""

    def read_frames(self, out: np.ndarray) -> None:
        """Fills ``out`` (uint8 ``[n, 84, 84]``) with the next ``n`` frames."""

    def skip_frames(self, num_frames: int) -> None:
        """Passes over frames."""

    def finish(self) -> None:
        """Checks that no frame is left, and whatever checksum there is."""


def read_episodes(
    segments: Sequence[Segment],
    open_checkpoint: Callable[[int], AbstractContextManager[CheckpointReader]],
    *,
    game: str,
    max_episode_steps: int,
    rewards: Literal["raw", "clipped"] = "clipped",
    state: Mapping[str, Any] | None = None,
) -> Iterator[Episode | Position]:
    """Yields the episodes, and after each segment a position to continue from.

    Each file is read from front to back, and at most a few episodes are held in memory. The last row of a file may
    belong before its first one in time: the episode around it is yielded after the others of that checkpoint.

    Args:
        segments (sequence of Segment): what to read.
        open_checkpoint (callable): opens the checkpoint of a number.

    Keyword Args:
        game (str): whose minimal actions the checkpoints hold.
        max_episode_steps (int): length of a time-out, and of the longest episode.
        rewards (str): ``"clipped"`` refuses those outside [-1, 1].
        state (mapping, optional): of the position to continue from.

    Raises:
        ValueError: if rows contradict the format.
    """
    builder = _EpisodeBuilder(segments, open_checkpoint, game, max_episode_steps, rewards)
    if state is not None:
        builder.place = _Place(**state)
    while builder.place.segment < len(segments):
        yield from builder.read_segment()
    yield from builder.finish()


@dataclass
class _Place:
    """Between two rows: what is read next, and what lies before.

    Attributes:
        segment, time (int): of the next row.
        headless (bool): it is inside an episode whose first rows are missing.
        dropped (dict): rows before that are not transitions, by reason; those of an open episode excepted.
    """

    segment: int = 0
    time: int = 0
    headless: bool = False
    dropped: dict[str, int] = field(default_factory=dict)

    def copy(self) -> _Place:
        return _Place(**asdict(self))

    def drop(self, reason: str, num_rows: int) -> None:
        if num_rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + num_rows


class _OpenEpisode:
    """An episode whose end was not read yet.

    Attributes:
        start (_Place): before its first row, which is padding.
        num_rows (int): rows read, padding included.
    """

    def __init__(self, start: _Place) -> None:
        self.start = start
        self.num_rows = 0
        self.frames: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []

    @property
    def num_steps(self) -> int:
        return max(self.num_rows - NUM_PADDING_ROWS, 0)

    def close(self, ending: _Ending, num_later: int = 0) -> Episode:
        frames, actions, rewards = (
            pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            for pieces in (self.frames, self.actions, self.rewards)
        )
        return Episode(frames, actions, rewards, ending, self.num_rows, num_later)


class _Rows:
    """Rows of a segment in time order: full actions, rewards, terminal flags, ends of episodes."""

    def __init__(
        self, actions: np.ndarray, rewards: np.ndarray, terminals: np.ndarray, time_outs: np.ndarray | None
    ) -> None:
        self.actions, self.rewards, self.terminals = actions, rewards, terminals
        self.tells_time_outs = time_outs is not None
        self.is_end = terminals != 0 if time_outs is None else (terminals != 0) | time_outs
        self._ends = np.append(np.flatnonzero(self.is_end) + 1, len(terminals))

    def __len__(self) -> int:
        return len(self.terminals)

    def end_of_piece(self, start: int) -> int:
        """The time after the next row that ends an episode, or after the last row."""
        return int(self._ends[np.searchsorted(self._ends, start, side="right")])

    def zeros(self, times: slice, frames: np.ndarray) -> int:
        """How many times a third NOOP in a row comes on a black frame, without a reward: as padding would look."""
        may_be_padding = (self.actions[times] == 0) & (self.rewards[times] == 0) & ~frames[:, ::12, ::12].any((1, 2))
        rows = np.flatnonzero(may_be_padding)
        rows = rows[~frames[rows].any((1, 2))]
        return int((rows[2:] - rows[:-2] == 2).sum())


class _EpisodeBuilder:
    """Reads segment after segment and keeps the episode that is open between them."""

    def __init__(
        self,
        segments: Sequence[Segment],
        open_checkpoint: Callable[[int], AbstractContextManager[CheckpointReader]],
        game: str,
        max_episode_steps: int,
        rewards: Literal["raw", "clipped"],
    ) -> None:
        self.segments = segments
        self.open_checkpoint = open_checkpoint
        self.game = game
        self.full_actions = np.array(find_game(game).minimal_actions, np.uint8)
        self.max_episode_steps = max_episode_steps
        self.rewards = rewards
        self.place = _Place()
        self.episode: _OpenEpisode | None = None
        self.unmarked_end: _Place | None = None  # Start of the episode before, if only its length says that it ended.
        self.num_zeros = 0  # Places inside episodes that look like padding.

    def read_segment(self) -> Iterator[Episode | Position]:
        place, segment = self.place, self.segments[self.place.segment]
        if place.time == 0 and segment.start == "unknown":
            yield from self._cut()
            place.headless = True
        with self.open_checkpoint(segment.number) as reader:
            rows = self._rows(segment, reader)
            has_oldest = segment.wraps and place.time == 0
            oldest = np.zeros((1, *FRAME_SHAPE), np.uint8)  # The frame at time 0, which is the last of the file.
            oldest_is_padding = False
            around: _OpenEpisode | None = None  # The episode that the oldest row belongs to.
            late: list[tuple[_OpenEpisode, _Ending]] = []  # `around`, once it ended.
            num_later = 0  # Episodes since then.
            reader.skip_frames(segment.first + max(place.time - segment.wraps, 0))
            while place.time < len(rows):
                start, is_oldest = place.time, has_oldest and place.time == 0
                stop = 1 if is_oldest else rows.end_of_piece(start)
                if place.headless:
                    reader.skip_frames(stop - start - is_oldest)
                    place.time, place.headless = stop, not rows.terminals[stop - 1]
                    place.drop(NO_EPISODE_START, stop - start)
                    continue
                episode = self.episode = self.episode or _OpenEpisode(place.copy())
                stop = min(stop, start + NUM_PADDING_ROWS + self.max_episode_steps - episode.num_rows)
                frames = oldest
                if not is_oldest:
                    frames = np.empty((stop - start, *FRAME_SHAPE), np.uint8)
                    reader.read_frames(frames)
                num_padding = self._append(reader, segment, rows, slice(start, stop), frames)
                if is_oldest:
                    around, oldest_is_padding = episode, num_padding > 0
                place.time = stop
                if ending := self._ending(reader, segment, rows, stop - 1):
                    if episode is around:
                        late = [(episode, ending)]
                    else:
                        num_later += len(late)
                        yield episode.close(ending)
            reader.skip_frames(segment.num_rows - segment.wraps - segment.stop)
            if segment.wraps:
                reader.read_frames(oldest)
                if oldest_is_padding:
                    self._check_padding(reader, segment, 0, oldest[0])
            reader.finish()
            for episode, ending in late:
                yield episode.close(ending, num_later)
        for reason, num_rows in segment.unused.items():
            place.drop(reason, num_rows)
        place.segment, place.time = place.segment + 1, 0
        if place.segment < len(self.segments):
            yield self._position()

    def finish(self) -> Iterator[Episode | Position]:
        yield from self._cut()
        if self.num_zeros:
            logger.warning(
                "%s: %d times inside episodes, a third NOOP on a black frame looks like padding between two. If the "
                "runner's time limit was not %d agent steps, give it as max_episode_steps (--max-episode-steps)",
                *(self.segments[0].name, self.num_zeros, self.max_episode_steps),
            )
        yield Position(None, dict(self.place.dropped), self._parts())

    def _position(self) -> Position:
        place = self.place if self.episode is None else self.episode.start
        return Position(asdict(place), dict(place.dropped), self._parts())

    def _parts(self) -> tuple[str, ...]:
        """Checkpoints that were read to the end."""
        return tuple(dict.fromkeys(str(segment.number) for segment in self.segments[: self.place.segment]))

    def _rows(self, segment: Segment, reader: CheckpointReader) -> _Rows:
        """Checks and translates the scalars."""

        def check(member: str, values: np.ndarray, good: np.ndarray, expected: str, hint: str = "") -> None:
            if not good.all():
                time = int(np.argmin(good))
                raise ValueError(
                    f"{reader.path(member)}: row {segment.row(time)} must be {expected}, got {values[time]}{hint}"
                )

        actions, rewards, terminals = map(segment.in_time_order, (reader.action, reader.reward, reader.terminal))
        time_outs = None if reader.time_out is None else segment.in_time_order(reader.time_out)
        num_actions = len(self.full_actions)
        expected = f"in 0..{num_actions - 1}, the minimal actions of {self.game}"
        check("action", actions, (actions >= 0) & (actions < num_actions), expected)
        if self.rewards == "clipped":
            hint = " (the game's own rewards need rewards='raw', --rewards raw)"
            check("reward", rewards, (rewards >= -1) & (rewards <= 1), "clipped to [-1, 1]", hint)
        else:
            check("reward", rewards, np.isfinite(rewards), "finite")
        check("terminal", terminals, (terminals == 0) | (terminals == 1), "0 or 1")
        return _Rows(self.full_actions[actions], rewards, terminals, time_outs)

    def _append(self, reader: CheckpointReader, segment: Segment, rows: _Rows, times: slice, frames: np.ndarray) -> int:
        """Adds rows to the open episode; returns how many of them are padding."""
        episode = self.episode
        assert episode is not None
        actions, rewards = rows.actions[times], rows.rewards[times]
        num_padding = min(max(NUM_PADDING_ROWS - episode.num_rows, 0), len(frames))
        for index in range(num_padding):  # Action 0 of every minimal set is NOOP, 0 of the full one.
            self._check_padding(reader, segment, times.start + index, frames[index], actions[index], rewards[index])
        episode.num_rows += len(frames)
        if len(frames) > num_padding:
            episode.frames.append(frames[num_padding:])
            episode.actions.append(actions[num_padding:])
            episode.rewards.append(rewards[num_padding:])
            if not rows.tells_time_outs:
                self.num_zeros += rows.zeros(slice(times.start + num_padding, times.stop), frames[num_padding:])
        return num_padding

    def _ending(self, reader: CheckpointReader, segment: Segment, rows: _Rows, time: int) -> _Ending | None:
        """How the open episode ended, if the row at ``time`` is its last."""
        episode = self.episode
        assert episode is not None
        at_limit = episode.num_steps == self.max_episode_steps
        if not rows.is_end[time] and not at_limit:
            return None
        if not episode.num_steps:
            raise ValueError(
                f"{reader.path('terminal')}: row {segment.row(time)} must be padding (the row before it, or the "
                f"one or two before that, ended an episode), but ends one"
            )
        self.place.drop(PADDING, NUM_PADDING_ROWS)
        self.unmarked_end = None if rows.is_end[time] else episode.start
        self.episode = None
        if rows.terminals[time] and (rows.tells_time_outs or not at_limit):
            return "terminated"
        return "truncated"

    def _check_padding(
        self,
        reader: CheckpointReader,
        segment: Segment,
        time: int,
        frame: np.ndarray,
        action: int = 0,
        reward: float = 0.0,
    ) -> None:
        for member, value in (("observation", frame.any()), ("action", action), ("reward", reward)):
            if value and self.unmarked_end is not None:
                start = self.unmarked_end
                first = self.segments[start.segment]
                raise ValueError(
                    f"{reader.path('terminal')}: an episode has more than {self.max_episode_steps} steps (it starts at "
                    f"row {first.row(start.time)} of {first.name}): terminal flags are missing, or max_episode_steps "
                    f"(--max-episode-steps) must be larger"
                )
            if value:
                raise ValueError(
                    f"{reader.path(member)}: row {segment.row(time)} must be padding (zeros), as the first "
                    f"{NUM_PADDING_ROWS} rows of each episode are"
                )

    def _cut(self) -> Iterator[Episode]:
        """The open episode, as far as it goes."""
        episode, self.episode = self.episode, None
        if episode is not None:
            self.place.drop(PADDING, min(episode.num_rows, NUM_PADDING_ROWS))
            if episode.num_steps:
                yield episode.close("cut")
