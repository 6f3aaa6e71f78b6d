"""Recordings in the file format of DQN-Replay: checkpoints of Dopamine's logging replay buffer.

``data/importers/dopamine_buffer.py`` says what their rows mean.
"""

from __future__ import annotations

import gzip
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_sql.data.chunks import StoredFrames
from torchrl_sql.data.export import check_free, new_folder
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import FRAME_SHAPE, NUM_ACTIONS, find_game, illegal_actions, resolve_games

logger = logging.getLogger(__name__)

_NUM_PADDING_ROWS = 3
_TIME_LIMIT_STEPS = 27_000
"""A truncated episode of this length is terminal in DQN-Replay. Other time-outs are listed, as newer Dopamine does."""
_NUM_ROWS_AT_ONCE = 1024


def export_dqn_replay(
    store: FrameStore,
    path: str | os.PathLike[str],
    games: str | Sequence[str] | None = None,
    *,
    num_rows: int = 1_000_000,
    gzip_level: int = 6,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes recordings as ``PATH/<Game>/<1, 2, ...>/replay_logs``, whose names and files are those of DQN-Replay.

    ``import dqn-replay`` gives the episodes back, in the order in which they were played; of raw rewards with
    ``rewards="raw"``. Not in the format, so not written: frames after a time-out's last step (without which
    that step is no transition that can be sampled), behaviours and labels (``epsilon``, ...); and recordings without
    episodes, which a warning names. The folder appears when it is whole.

    Args:
        store (FrameStore): what to write.
        path (path): the new folder.
        games (str or sequence of str, optional): see :func:`torchrl_sql.games.resolve_games`; default all.

    Keyword Args:
        num_rows (int): capacity of the buffer, which is what a checkpoint holds; less for a recording that needs less.
        gzip_level (int): 1 (fast) to 9 (small).
        progress (callable): is given the number of rows done and of all.

    Returns:
        The ``replay_logs`` folders.

    Raises:
        FileExistsError: if ``path`` is there already.
        ValueError: if there is no episode; for what the format cannot hold: actions that the game does not know, and
            episodes that are cut with others after them, which would join.
    """
    if num_rows <= _NUM_PADDING_ROWS + 1:
        raise ValueError(f"num_rows must be > {_NUM_PADDING_ROWS + 1}, got {num_rows}")
    target = Path(path)
    check_free(target)
    logs: dict[Path, _Log] = {}
    for game in store.games if games is None else resolve_games(games):
        recordings = store.recordings_of(game)
        for recording in recordings:
            if not recording.num_episodes:
                logger.warning("%s, run %r has no episodes: it is left out", game, recording.name)
        for number, recording in enumerate([each for each in recordings if each.num_episodes], start=1):
            logs[Path(game) / str(number) / "replay_logs"] = _Log(recording, num_rows)
    if not logs:
        raise ValueError(f"{store} has no episodes to export")
    num_done, num_all = 0, sum(log.num_rows * len(log.ends) for log in logs.values())
    with new_folder(target) as unfinished:
        for folder, log in logs.items():
            (unfinished / folder).mkdir(parents=True)
            for number in range(len(log.ends)):
                for num_written in log.write(unfinished / folder, number, gzip_level):
                    num_done += num_written
                    progress(num_done, num_all)
    return [target / folder for folder in logs]


class _Log:
    """The rows of a recording in time order, padding included, and where its checkpoints end.

    Attributes:
        ends (list of int): rows written before each checkpoint.
    """

    def __init__(self, recording: Recording, num_rows: int) -> None:
        name = f"{recording.game}, run {recording.name!r}"
        if illegal := illegal_actions(recording.game, np.bincount(recording.actions, minlength=NUM_ACTIONS).tolist()):
            raise ValueError(f"{name}: the format has only the actions of {recording.game}, got {illegal}")
        episodes = recording.episodes
        if num_joined := int(episodes["cut"][:-1].sum()):
            raise ValueError(
                f"{name}: {num_joined} episodes whose end was not recorded have others after them, "
                f"with which they would become one"
            )
        self.frames = StoredFrames([recording])
        lengths = episodes["num_steps"]
        first_rows = np.cumsum(lengths + _NUM_PADDING_ROWS) - lengths
        last_rows = first_rows + lengths - 1
        is_step = np.ones(int(lengths.sum()) + _NUM_PADDING_ROWS * len(lengths), bool)
        self.num_rows = num_rows = min(num_rows, len(is_step) + 1)
        is_step[(first_rows[:, None] - np.arange(1, _NUM_PADDING_ROWS + 1)).ravel()] = False

        def rows(dtype: str, padding: int, steps: np.ndarray) -> np.ndarray:
            array = np.full(len(is_step), padding, dtype)
            array[is_step] = steps
            return array

        step = np.repeat(recording.first_steps() - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        frame = np.repeat(episodes["first_frame"] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        minimal = np.zeros(NUM_ACTIONS, np.int32)
        legal = find_game(recording.game).minimal_actions
        minimal[list(legal)] = np.arange(len(legal))
        self.frame = rows("<i8", -1, frame)
        self.scalars = {
            "action": rows("<i4", 0, minimal[recording.actions[step]]),
            "reward": rows("<f4", 0, recording.rewards[step]),
            "terminal": np.zeros(len(is_step), "u1"),
        }
        at_limit = lengths == _TIME_LIMIT_STEPS
        self.lists_ends = bool((at_limit == episodes["terminated"])[~episodes["cut"]].any())
        is_terminal = episodes["terminated"] | (at_limit & (not self.lists_ends))
        self.scalars["terminal"][last_rows[is_terminal]] = 1
        self.is_end = np.zeros(len(is_step), bool)
        self.is_end[last_rows[~episodes["cut"]]] = True
        self.ends = list(range(num_rows - 1, len(is_step) + 1, num_rows))
        if not self.ends or self.ends[-1] < len(is_step):  # The final flush.
            self.ends.append(len(is_step))

    def write(self, folder: Path, number: int, gzip_level: int) -> Iterator[int]:
        """Writes a checkpoint; yields the rows that were written, block by block."""
        end = self.ends[number]
        cursor, row = end % self.num_rows, np.arange(self.num_rows)
        time = end - cursor + row - self.num_rows * (row >= cursor)  # Negative: never written.

        def save(member: str, array: np.ndarray) -> None:
            with _open(folder / f"{member}_ckpt.{number}.gz", gzip_level) as file:
                np.save(file, array, allow_pickle=False)

        is_flush = end % self.num_rows != self.num_rows - 1
        save("add_count", np.array(cursor if is_flush else end))
        save("invalid_range", np.arange(cursor - 1, cursor + 4) % self.num_rows)
        for name, values in self.scalars.items():
            save(f"$store$_{name}", np.where(time < 0, values.dtype.type(0), values[np.maximum(time, 0)]))
        if self.lists_ends:
            rows = np.flatnonzero((time >= 0) & self.is_end[np.maximum(time, 0)])
            with _open(folder / f"episode_end_indices_ckpt.{number}.gz", gzip_level) as file:
                pickle.dump(set(rows.tolist()), file)  # As Dopamine does, which reads it back.
        frame = np.where(time < 0, -1, self.frame[np.maximum(time, 0)])
        with _open(folder / f"$store$_observation_ckpt.{number}.gz", gzip_level) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_rows, *FRAME_SHAPE)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, self.num_rows, _NUM_ROWS_AT_ONCE):
                block = frame[first : first + _NUM_ROWS_AT_ONCE]
                frames = np.zeros((len(block), *FRAME_SHAPE), np.uint8)
                if (block >= 0).any():
                    frames[block >= 0] = self.frames[block[block >= 0]]
                file.write(frames.tobytes())
                yield len(block)


def _open(path: Path, gzip_level: int) -> Any:
    return gzip.GzipFile(path, "wb", gzip_level, mtime=0)  # Equal contents, equal files.
