"""The checkpoints of Dopamine's circular replay buffer: which of their rows come when.

DQN-Replay (Agarwal et al., 2020) is a log of such checkpoints. What follows was read off the code that wrote it:
``OutOfGraphReplayBuffer`` (google/dopamine, ``replay_memory/circular_replay_buffer.py``), its subclass
``OutOfGraphLoggedReplayBuffer`` (google-research/batch_rl, ``baselines/replay_memory/logged_replay_buffer.py``) and
Dopamine's ``discrete_domains/run_experiment.py``.

**Cursor.** The buffer has ``N`` rows, made with ``np.empty``. A row is written at the cursor ``add_count % N``, then
``add_count`` grows by one. ``add_count`` therefore counts every row since the run began. ``invalid_range`` holds the
rows ``cursor - horizon ... cursor + stack - 1`` modulo ``N``: its fourth entry from the end is the cursor, too.

**Checkpoint k** is written when ``add_count % N == N - 1``: one row early. Row ``N - 1`` still holds what was written
``N`` rows ago, the last row of the lap before: in time it comes *before* row 0, not after row ``N - 2``. In the first
lap it was never written. In time order, then, checkpoint 0 is rows ``0 .. N - 2``, and checkpoint ``k`` is row
``N - 1``, then rows ``0 .. N - 2``: without a gap and without an overlap.

**The final flush** (checkpoint 50) writes the buffer at whatever cursor the run ended, with ``add_count`` reduced
modulo ``N``. Rows that were not overwritten since repeat the checkpoint before: all of them if that was written at the
very end. (Some copies may have all their counts reduced: the checkpoint's number then stands for the laps.)

**Plain Dopamine** leaves files of the same names with the whole ring at whatever cursor, several times per lap. A
checkpoint's new rows are those after the end of the one before, whatever wrote it.

**A lost lap.** ``add`` tests the cursor once a call, but a call that starts an episode writes four rows. If row
``N - 2`` is one of its first three, the cursor jumps over ``N - 1``, the test misses it, and the whole lap is
overwritten before it is logged. ``add_count`` then grows by ``2 N`` from one checkpoint to the next. The open episode
is cut there, and rows up to the next episode's start are dropped: how that episode began is unknown. Right before a
final flush a lost lap does not show in ``add_count``, but the rows that should repeat the checkpoint before do not.

**Padding.** Three (``stack - 1``) rows of zeros precede an episode's first row: ``add`` writes them if the buffer is
empty or if the row before ended an episode. Position tells padding, content does not: a black frame is not padding.

**Ends.** ``terminal`` is set on an episode's last row. That is a game over (not a lost life), or the runner's limit of
27,000 agent steps. The runner does not tell them apart: an episode of exactly that length is taken to be truncated. In
newer Dopamine a row at the limit is not terminal: some versions list such rows in ``episode_end_indices``, in others
only the length and the padding that follows tell. The frame after the last row is not logged, so a truncated episode's
last transition has no next observation.

**Actions** index the game's minimal action set; **rewards** were clipped to [-1, 1] by the runner before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

STACK_SIZE = 4
NUM_PADDING_ROWS = STACK_SIZE - 1
PAST_CURSOR = "past the cursor"
REPEATED = "in an earlier checkpoint"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BufferState:
    """What a checkpoint says of itself.

    Attributes:
        number (int): ``k``.
        name (str): where it is, for messages.
        num_rows (int): ``N``, the buffer's capacity.
        add_count (int): rows written before it was saved; for a final flush modulo ``N``.
        invalid_range (int array ``[horizon + 4]``): rows around the cursor.
    """

    number: int
    name: str
    num_rows: int
    add_count: int
    invalid_range: np.ndarray

    @property
    def cursor(self) -> int:
        """The row that would have been written next."""
        return self.add_count % self.num_rows

    @property
    def is_past_first_lap(self) -> bool:
        """Whether ``add_count`` says so: else it may also be that laps are missing in it."""
        return self.add_count >= self.num_rows


@dataclass(frozen=True)
class Segment:
    """Rows of a checkpoint that lie together in time and that no checkpoint before it holds.

    In time order they are row ``num_rows - 1`` if ``wraps``, then rows ``first .. stop - 1``.

    Attributes:
        number, name, num_rows: as in :class:`BufferState`.
        first, stop (int): rows.
        wraps (bool): the file's last row comes before them.
        start (str): what comes before the first row: nothing (``"run"``), the last row of the segment before
            (``"previous"``), or rows that are not there (``"unknown"``).
        unused (mapping): rows of the checkpoint in none of its segments, by reason; counted with the last of these.
    """

    number: int
    name: str
    num_rows: int
    first: int
    stop: int
    wraps: bool
    start: Literal["run", "previous", "unknown"]
    unused: Mapping[str, int]

    def row(self, time: int) -> int:
        """The row at a place in time order."""
        return self.num_rows - 1 if self.wraps and time == 0 else self.first + time - self.wraps

    def in_time_order(self, rows: np.ndarray) -> np.ndarray:
        """Picks the segment's rows out of all (array ``[num_rows]``)."""
        rows_after = rows[self.first : self.stop]
        return np.concatenate((rows[-1:], rows_after)) if self.wraps else rows_after


def place_checkpoints(
    states: Sequence[BufferState], repeats: Callable[[BufferState, BufferState, np.ndarray], bool]
) -> tuple[Segment, ...]:
    """Finds out which rows of each checkpoint are new, and whether they continue the checkpoint before.

    Args:
        states (sequence of BufferState): in ascending order of ``number``.
        repeats (callable): whether an earlier and a later checkpoint hold the same in some rows (int64 ``[n]``).

    Raises:
        ValueError: if ``add_count`` and ``invalid_range`` contradict each other or the order of the checkpoints, or if
            rows that two checkpoints should share differ.
    """
    segments: list[Segment] = []
    previous: BufferState | None = None
    end = 0  # Rows written when the previous checkpoint was saved, counted from the start of the run.
    for index, state in enumerate(states):
        if previous is not None and state.num_rows != previous.num_rows:
            raise ValueError(
                f"{state.name} must have {previous.num_rows} rows as {previous.name}, got {state.num_rows}"
            )
        if state.add_count < 0:
            raise ValueError(f"{state.name}: add_count must be >= 0, got {state.add_count}")
        around = state.invalid_range
        if around.size <= STACK_SIZE or around[-STACK_SIZE] % state.num_rows != state.cursor:
            raise ValueError(
                f"{state.name}: add_count {state.add_count} puts the cursor at row {state.cursor}, "
                f"but invalid_range is {around.tolist()}"
            )
        # Only the last count is reduced, or all are.
        is_reduced = state.number > 0 and not any(later.is_past_first_lap for later in states[index:])
        count = _rows_written(state, previous, end, repeats, is_reduced=is_reduced)
        begin = max(end, count - state.num_rows)
        if previous is None and is_reduced:  # Whether the rows after the cursor were ever written is unknown.
            begin = count - state.cursor - 1
        start: Literal["run", "previous", "unknown"] = "unknown"
        if begin == 0:
            start = "run"
        elif previous is not None and begin == end:
            start = "previous"
        elif previous is not None:
            logger.warning("%s does not continue %s: rows between them are missing", state.name, previous.name)
        segments += _segments(state, count - begin, start)
        previous, end = state, count
    return tuple(segments)


def _rows_written(
    state: BufferState,
    previous: BufferState | None,
    end: int,
    repeats: Callable[[BufferState, BufferState, np.ndarray], bool],
    *,
    is_reduced: bool,
) -> int:
    """Rows that the run had written when the checkpoint was saved: ``add_count`` with its laps."""
    num_rows = state.num_rows
    if previous is None:
        return state.number * num_rows + state.cursor if is_reduced else state.add_count
    count = state.add_count
    if is_reduced:
        # The first that is not before `end`; where counts go on past a lap, each checkpoint left out between is one.
        num_laps = state.number - previous.number - 1 if previous.is_past_first_lap else 0
        least = end + num_laps * num_rows
        count = least + (state.cursor - least) % num_rows
    if count < end:
        raise ValueError(f"{state.name}: add_count {count} is not after that of {previous.name}")
    shared = np.arange(max(count - num_rows, end - num_rows, 0), end) % num_rows
    if not shared.size or repeats(previous, state, shared):
        return count
    if not is_reduced:
        raise ValueError(
            f"{state.name}: by its add_count {count} it holds {len(shared)} rows of {previous.name}, but they differ: "
            f"are these checkpoints of one run?"
        )
    count += num_rows  # At least a lap was lost, or is missing.
    return count if previous.number == state.number - 1 else max(count, state.number * num_rows + state.cursor)


def _segments(state: BufferState, num_new: int, start: Literal["run", "previous", "unknown"]) -> list[Segment]:
    """The newest ``num_new`` rows of a checkpoint: those before the cursor, and before them the file's last ones."""
    num_older = max(num_new - state.cursor, 0)
    first = state.cursor - min(num_new, state.cursor)
    wraps = num_older == 1
    unused = {PAST_CURSOR: state.num_rows - state.cursor - num_older, REPEATED: first}

    def segment(first: int, stop: int, *, wraps: bool, last: bool, start: Any = start) -> Segment:
        return Segment(state.number, state.name, state.num_rows, first, stop, wraps, start, unused if last else {})

    if num_older < 2:
        return [segment(first, state.cursor, wraps=wraps, last=True)]
    older = segment(state.num_rows - num_older, state.num_rows, wraps=False, last=not state.cursor)
    newer = segment(0, state.cursor, wraps=False, last=True, start="previous")
    return [older, newer] if state.cursor else [older]
