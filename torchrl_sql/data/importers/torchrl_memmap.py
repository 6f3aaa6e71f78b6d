"""Imports the memory-mapped folders that TorchRL's ``AtariDQNExperienceReplay`` makes out of DQN-Replay.

Layout, as written by torchrl 0.14: ``<root>/<Game>/<run>/<k>/`` with ``add_count.memmap``, ``invalid_range.memmap``,
``data/observation.memmap`` (``N + 1`` rows, the last one empty), ``data/action.memmap``, ``data/next/reward.memmap``
and ``data/next/terminated.memmap``; a ``meta.json`` in each folder gives types and shapes. The rows are those of
DQN-Replay's checkpoint ``k``, padding and stale row included: :mod:`torchrl_sql.data.importers.dopamine_buffer` says
what they mean. The files are mapped here, not loaded through tensordict: that would unpickle what a folder may hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrl_sql.data.importers.dopamine_buffer import BufferState
from torchrl_sql.data.importers.dopamine_source import MAX_EPISODE_STEPS, OPTIONS, DopamineSource
from torchrl_sql.data.importers.job import Format, ImportJob, ImportSummary
from torchrl_sql.data.importers.pool import run_imports
from torchrl_sql.games import FRAME_SHAPE, resolve_games

_MEMBERS: dict[str, tuple[str, str, np.dtype]] = {
    "observation": ("data", "observation", np.dtype("u1")),
    "action": ("data", "action", np.dtype("i4")),
    "reward": ("data/next", "reward", np.dtype("f4")),
    "terminal": ("data/next", "terminated", np.dtype("u1")),
}
"""Arrays of the buffer: folder, name and type."""

_DTYPES: dict[str, np.dtype] = {
    "torch.uint8": np.dtype("u1"),
    "torch.int32": np.dtype("<i4"),
    "torch.int64": np.dtype("<i8"),
    "torch.float32": np.dtype("<f4"),
}
_DIGESTED_FRAMES = 64


def import_torchrl_memmap(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    games: str | Sequence[str],
    run: int = 1,
    checkpoints: str | Sequence[int] | None = None,
    workers: int = 1,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    rewards: Literal["raw", "clipped"] = "clipped",
    progress: bool = False,
) -> list[ImportSummary]:
    """Imports what ``AtariDQNExperienceReplay("<Game>/<run>", root=source)`` has downloaded and converted.

    Rows, resuming and failures are as for :func:`~torchrl_sql.data.importers.import_dqn_replay`.

    Args:
        source (path): the ``root`` of the data set; TorchRL's default is ``~/.cache/torchrl/atari``.
        store_path (path): the store; made if absent.

    Keyword Args:
        games (str or sequence): as :func:`torchrl_sql.games.resolve_games` takes them.
        run (int): which of the runs, 1 to 5.
        checkpoints (str or sequence of int, optional): which of the folders; default all that are there.
        workers (int): processes, each working on one game at a time.
        max_episode_steps (int): agent steps after which the data's runner ended an episode.
        rewards (str): ``"clipped"``, or ``"raw"`` where the runner did not clip them.
        progress (bool): show a bar with rate and time left on standard error.

    Returns:
        One summary a game, in the order of ``games``.

    Raises:
        FileNotFoundError: if ``source`` lacks a game or its run.
        ImportFailedError: after the other games, if files are missing or damaged; it names them and says why.
    """
    jobs = []
    for game in resolve_games(games):
        folder = Path(source) / game / str(run)
        there = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
        if not there:
            raise FileNotFoundError(f"{folder} has no checkpoint folders (0, 1, ...)")
        memmaps = TorchRLMemmapSource(
            folder,
            game,
            run=run,
            checkpoints=there if checkpoints is None else checkpoints,
            max_episode_steps=max_episode_steps,
            rewards=rewards,
        )
        jobs.append(ImportJob(memmaps, Path(store_path), str(run)))
    return run_imports(jobs, workers=workers, progress=progress)


FORMAT = Format(
    "torchrl-memmap", "folders that TorchRL's AtariDQNExperienceReplay makes", import_torchrl_memmap, OPTIONS
)


class TorchRLMemmapSource(DopamineSource):
    """Memory-mapped checkpoints of one game and run.

    Args:
        folder (Path): holds the folders of the checkpoints.
        game (str): name of the game.
    """

    def __init__(self, folder: Path, game: str, **options: Any) -> None:
        super().__init__("torchrl-memmap", "DQN-Replay through TorchRL", game, **options)
        self._folder = folder

    def state(self, number: int) -> BufferState:
        """Reads the small files."""
        folder = self._folder / str(number)
        add_count = _map(folder, "add_count")
        invalid_range = _map(folder, "invalid_range")
        if add_count.dtype.kind != "i" or add_count.ndim or invalid_range.dtype.kind != "i" or invalid_range.ndim != 1:
            raise ValueError(
                f"{folder}: add_count and invalid_range must be an integer and a list of integers, got "
                f"{add_count.dtype} {list(add_count.shape)} and {invalid_range.dtype} {list(invalid_range.shape)}"
            )
        num_rows = len(_Reader(folder).action)
        return BufferState(number, str(folder), num_rows, int(add_count), np.array(invalid_range))

    def digest(self, part: str) -> str:
        """Of all actions, rewards and flags, and of some frames."""
        reader, digest = _Reader(self._folder / part), hashlib.sha256()
        num_rows = len(reader.action)
        frames = reader.frames[np.linspace(0, num_rows - 1, _DIGESTED_FRAMES, dtype=np.int64)]
        for array in (reader.action, reader.reward, reader.terminal, frames):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @contextmanager
    def open(self, number: int) -> Iterator[_Reader]:
        """Maps the files."""
        yield _Reader(self._folder / str(number))


class _Reader:
    """The rows of one folder, as ``dopamine_episodes.CheckpointReader`` describes."""

    time_out: np.ndarray | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        arrays = {member: _map(folder / where, name) for member, (where, name, _) in _MEMBERS.items()}
        num_rows = len(arrays["action"])
        for member, array in arrays.items():
            is_frames = member == "observation"
            expected = (num_rows + 1, *FRAME_SHAPE) if is_frames else (num_rows,)
            dtype = _MEMBERS[member][2]
            if array.dtype != dtype or array.shape != expected:
                raise ValueError(
                    f"{self.path(member)} must be {dtype} {list(expected)} (action has {num_rows} rows), "
                    f"got {array.dtype} {list(array.shape)}"
                )
        self.frames, self._next_row = arrays["observation"], 0
        self.action, self.reward, self.terminal = (np.array(arrays[m]) for m in ("action", "reward", "terminal"))

    def path(self, member: str) -> str:
        where, name, _ = _MEMBERS[member]
        return str(self._folder / where / f"{name}.memmap")

    def read_frames(self, out: np.ndarray) -> None:
        out[:] = self.frames[self._next_row : self._next_row + len(out)]
        self._next_row += len(out)

    def skip_frames(self, num_frames: int) -> None:
        self._next_row += num_frames

    def finish(self) -> None:
        if self._next_row != len(self.action):
            raise AssertionError(f"{self._next_row} of {len(self.action)} rows were read")


def _map(folder: Path, name: str) -> np.ndarray:
    """Maps ``<folder>/<name>.memmap`` with the type and shape that ``<folder>/meta.json`` gives."""
    meta, path = folder / "meta.json", folder / f"{name}.memmap"
    try:
        entry = json.loads(meta.read_text(encoding="utf-8"))[name]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{meta} does not describe {name}: {error!r}") from error
    num_bytes = dtype.itemsize * prod(shape)
    if min(shape, default=1) < 1 or path.stat().st_size != num_bytes:
        raise ValueError(f"{path} must have {num_bytes} bytes ({dtype} {list(shape)}), got {path.stat().st_size}")
    return np.memmap(path, dtype, mode="r", shape=shape)
