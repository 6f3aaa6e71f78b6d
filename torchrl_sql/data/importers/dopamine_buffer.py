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
modulo ``N``. Rows from the cursor on, except row ``N - 1``, repeat the checkpoint before. (Some copies may have all
their counts reduced: the checkpoint's number then stands for the laps.)

**A lost lap.** ``add`` tests the cursor once a call, but a call that starts an episode writes four rows. If row
``N - 2`` is one of its first three, the cursor jumps over ``N - 1``, the test misses it, and the whole lap is
overwritten before it is logged. ``add_count`` then grows by ``2 N`` from one checkpoint to the next. The open episode
is cut there, and rows up to the next episode's start are dropped: how that episode began is unknown. (Right before a
final flush a lost lap does not show in ``add_count``.)

**Padding.** Three (``stack - 1``) rows of zeros precede an episode's first row: ``add`` writes them if the buffer is
empty or if the row before is terminal. Position tells padding, content does not: a black frame is not padding.

**Ends.** ``terminal`` is set on an episode's last row. That is a game over (not a lost life), or the runner's limit of
27,000 agent steps. The runner does not tell them apart: an episode of exactly that length is taken to be truncated. The
frame after the last row is not logged, so a truncated episode's last transition has no next observation.

**Actions** index the game's minimal action set; **rewards** were clipped to [-1, 1] by the runner before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

STACK_SIZE = 4
NUM_PADDING_ROWS = STACK_SIZE - 1

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
    """

    number: int
    name: str
    num_rows: int
    first: int
    stop: int
    wraps: bool
    start: Literal["run", "previous", "unknown"]

    def row(self, time: int) -> int:
        """The row at a place in time order."""
        return self.num_rows - 1 if self.wraps and time == 0 else self.first + time - self.wraps

    def in_time_order(self, rows: np.ndarray) -> np.ndarray:
        """Picks the segment's rows out of all (array ``[num_rows]``)."""
        rows_after = rows[self.first : self.stop]
        return np.concatenate((rows[-1:], rows_after)) if self.wraps else rows_after

    @property
    def num_unused(self) -> int:
        """Rows of the checkpoint that are not in the segment."""
        return self.num_rows - self.wraps - (self.stop - self.first)


def place_checkpoints(states: Sequence[BufferState]) -> tuple[Segment, ...]:
    """Finds out which rows of each checkpoint are new, and whether they continue the checkpoint before.

    Args:
        states (sequence of BufferState): in ascending order of ``number``.

    Raises:
        ValueError: if ``add_count`` and ``invalid_range`` contradict each other or the order of the checkpoints.
    """
    placed: list[Segment] = []
    end = None  # Rows written when the previous checkpoint was saved, counted from the start of the run.
    for state in states:
        num_rows, cursor = state.num_rows, state.add_count % state.num_rows
        if placed and num_rows != placed[-1].num_rows:
            raise ValueError(f"{state.name} must have {placed[-1].num_rows} rows as {placed[-1].name}, got {num_rows}")
        if state.invalid_range.size <= STACK_SIZE or state.invalid_range[-STACK_SIZE] % num_rows != cursor:
            raise ValueError(
                f"{state.name}: add_count {state.add_count} puts the cursor at row {cursor}, "
                f"but invalid_range is {state.invalid_range.tolist()}"
            )
        previous = placed[-1].number if placed else None
        wraps = state.number > 0 or state.add_count >= num_rows
        if not wraps:
            begin, stop = 0, state.add_count
        elif state.add_count >= num_rows:
            begin, stop = state.add_count - cursor - 1, state.add_count
        else:  # A final flush: the lap number is not recorded.
            laps = state.number if end is None or previous != state.number - 1 else end // num_rows + 1
            begin, stop = laps * num_rows - 1, laps * num_rows + cursor
        if end is not None and stop <= end:
            raise ValueError(f"{state.name}: add_count {state.add_count} is not after that of {placed[-1].name}")
        start: Literal["run", "previous", "unknown"] = "unknown"
        if begin == 0:
            start = "run"
        elif begin == end:
            start = "previous"
        elif end is not None:
            logger.warning("%s does not continue %s: rows between them are missing", state.name, placed[-1].name)
        placed.append(Segment(state.number, state.name, num_rows, 0, cursor, wraps, start))
        end = stop
    return tuple(placed)
