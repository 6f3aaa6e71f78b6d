"""Imports DQN-Replay (Agarwal et al., 2020): gzipped NumPy files of Dopamine's replay buffer.

Layout: ``<root>/<Game>/<run 1..5>/replay_logs/`` with, for each checkpoint ``k``, ``$store$_observation_ckpt.<k>.gz``,
the same for ``action``, ``reward`` and ``terminal``, ``add_count_ckpt.<k>.gz`` and ``invalid_range_ckpt.<k>.gz``: a
gzipped ``numpy.save`` of an array. The public copy is ``gs://atari-replay-datasets/dqn``: 1,000,000 rows and about
0.2 GB a checkpoint. :mod:`torchrl_sql.data.importers.dopamine_buffer` says what the rows mean.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickletools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from torchrl_sql.data.importers.dopamine_buffer import BufferState
from torchrl_sql.data.importers.dopamine_source import MAX_EPISODE_STEPS, OPTIONS, DopamineSource
from torchrl_sql.data.importers.job import Format, ImportJob, ImportSummary
from torchrl_sql.data.importers.pool import run_imports
from torchrl_sql.games import FRAME_SHAPE, resolve_games

try:
    import fsspec
except ImportError:
    fsspec = None

STORE_MEMBERS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "observation": (np.dtype("u1"), FRAME_SHAPE),
    "action": (np.dtype("<i4"), ()),
    "reward": (np.dtype("<f4"), ()),
    "terminal": (np.dtype("u1"), ()),
}
"""Arrays of the buffer: type and shape of one row."""

_STATE_MEMBERS = {"add_count": (0, "one integer"), "invalid_range": (1, "integers [horizon + 4]")}
"""The other files of a checkpoint: rank, and what they are."""

_EPISODE_ENDS = "episode_end_indices"
_MAX_ENDS_BYTES = 1 << 28
_MAX_STATE_ENTRIES = 1_000
_GZIP_TRAILER_BYTES = 8  # CRC32 and length of what was compressed.
_SKIP_FRAMES = 64
_READ_BYTES = 1 << 18
"""Inflated at a time: little enough to be in the processor's cache when it is copied."""

_open_gzip: Callable[..., io.BufferedIOBase] = gzip.GzipFile
_damage_errors: tuple[type[Exception], ...] = (ValueError, gzip.BadGzipFile, zlib.error)
with suppress(ImportError):  # Inflates faster; much of an import is that.
    from zlib_ng import gzip_ng, zlib_ng

    _open_gzip = gzip_ng.GzipNGFile
    _damage_errors = (ValueError, gzip.BadGzipFile, cast(Any, zlib_ng).error)


def import_dqn_replay(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    games: str | Sequence[str],
    run: int = 1,
    checkpoints: str | Sequence[int] = "0-9",
    workers: int = 1,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    rewards: Literal["raw", "clipped"] = "clipped",
    progress: bool = False,
) -> list[ImportSummary]:
    """Imports games of DQN-Replay into a store; run ``r`` becomes the run named ``"r"`` of each game.

    The default checkpoints are the first 20% of a run: the sub-optimal set of Kumar et al. (2023). A game appears in
    the store when it is complete. Called again with the same arguments, an import that was stopped at any instant
    continues, from the checkpoint it was in, and ends in the same files byte for byte; the checkpoints that it read
    before must hold what they held. Checkpoints of plain Dopamine can be read too: where they overlap, rows come once.
    Needs less than 2 GB of memory per worker, whatever the size.

    With ``workers > 1`` a script must guard its top level with ``if __name__ == "__main__":``.

    Args:
        source (path or URL): the folder that holds the games. URLs (``gs://...``) are read through fsspec.
        store_path (path): the store; made if absent.

    Keyword Args:
        games (str or sequence): as :func:`torchrl_sql.games.resolve_games` takes them.
        run (int): which of the runs, 1 to 5.
        checkpoints (str or sequence of int): ascending, e.g. ``"0-9"`` or ``"0-3,5"``. An episode that continues in a
            checkpoint that is not among them is cut.
        workers (int): processes, each working on one game at a time.
        max_episode_steps (int): agent steps after which the data's runner ended an episode.
        rewards (str): ``"clipped"``, or ``"raw"`` where the runner did not clip them.
        progress (bool): show a bar with rate and time left on standard error.

    Returns:
        One summary a game, in the order of ``games``.

    Raises:
        ImportFailedError: after the other games, if files are missing or damaged; it names them and says why.
        ValueError, OSError: for bad arguments, or if the store cannot be opened or created.
        ImportError: for a URL, if fsspec or its driver for this kind of object store is not installed.
    """
    root = _Folder(os.fspath(source))
    sources = [
        DQNReplaySource(
            root.location,
            game,
            run=run,
            checkpoints=checkpoints,
            max_episode_steps=max_episode_steps,
            rewards=rewards,
        )
        for game in resolve_games(games)
    ]
    root.names()
    jobs = [ImportJob(source, Path(store_path), str(run)) for source in sources]
    return run_imports(jobs, workers=workers, progress=progress)


FORMAT = Format("dqn-replay", "gzipped checkpoints of DQN-Replay; a folder or URL", import_dqn_replay, OPTIONS)


class DQNReplaySource(DopamineSource):
    """Gzipped checkpoints of one game and run.

    Args:
        root (str): the folder that holds the games, a path or a URL.
        game (str): name of the game.
    """

    def __init__(self, root: str, game: str, *, run: int, **options: Any) -> None:
        super().__init__("dqn-replay", "DQN-Replay", game, run=run, **options)
        self._folder = _Folder(root, game, str(run), "replay_logs")

    def state(self, number: int) -> BufferState:
        """Reads the small files."""
        values = {}
        for member, (rank, meaning) in _STATE_MEMBERS.items():
            with _open_array(self._folder, _file_name(member, number)) as array:
                is_small = max(array.shape, default=1) <= _MAX_STATE_ENTRIES
                if array.dtype.kind not in "iu" or len(array.shape) != rank or not is_small:
                    raise ValueError(f"{array.path} must be {meaning}, got {array.dtype} {list(array.shape)}")
                values[member] = array.read_all().astype(np.int64)
        name = f"{self._folder.location}/*_ckpt.{number}.gz"
        return BufferState(number, name, self._num_rows, int(values["add_count"]), values["invalid_range"])

    def digest(self, part: str) -> str:
        """Of the checksums that end the checkpoint's files."""
        digest = hashlib.sha256()
        has_ends = _file_name(_EPISODE_ENDS, int(part)) in self._names
        for member in (*STORE_MEMBERS, *_STATE_MEMBERS, *[_EPISODE_ENDS] * has_ends):
            with self._folder.open(_file_name(member, int(part))) as file:
                file.seek(-_GZIP_TRAILER_BYTES, os.SEEK_END)
                digest.update(file.read())
        return digest.hexdigest()

    @cached_property
    def _num_rows(self) -> int:
        """Capacity of the buffer, once all files are there."""
        found = self._names
        names = [_file_name(member, k) for k in self.checkpoints for member in (*STORE_MEMBERS, *_STATE_MEMBERS)]
        missing = [name for name in names if name not in found]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            there = sorted({int(match[1]) for name in found if (match := re.fullmatch(r"\S+_ckpt\.(\d+)\.gz", name))})
            raise FileNotFoundError(
                f"{self._folder.location} lacks {', '.join(missing[:3])}{more}; checkpoints that are there: "
                f"{', '.join(map(str, there)) or 'none'}"
            )
        with _open_array(self._folder, _file_name("terminal", self.checkpoints[0])) as array:
            return array.expect("terminal", None)

    @contextmanager
    def open(self, number: int) -> Iterator[_Reader]:
        """Reads the scalars, and frames as they are asked for."""
        with ExitStack() as stack:
            arrays = {
                member: stack.enter_context(_open_array(self._folder, _file_name(member, number)))
                for member in STORE_MEMBERS
            }
            for member, array in arrays.items():
                array.expect(member, self._num_rows)
            yield _Reader(arrays, self._episode_ends(number))

    @cached_property
    def _names(self) -> set[str]:
        return self._folder.names()

    def _episode_ends(self, number: int) -> np.ndarray | None:
        """Rows that end episodes, where newer Dopamine lists them: bool ``[N]``."""
        name = _file_name(_EPISODE_ENDS, number)
        if name not in self._names:
            return None
        path, is_end = f"{self._folder.location}/{name}", np.zeros(self._num_rows, bool)
        try:
            with self._folder.open(name) as file, _open_gzip(fileobj=file, mode="rb") as stream:
                rows = _integers(stream.read(_MAX_ENDS_BYTES))
            if len(rows) and (min(rows) < 0 or max(rows) >= len(is_end)):
                raise ValueError(f"rows must lie in 0..{len(is_end) - 1}, got {min(rows)}..{max(rows)}")
            is_end[rows] = True
        except Exception as error:
            if _is_of_the_system(error):
                raise
            raise ValueError(f"{path} is damaged, or no list of rows: {error!r}") from error
        return is_end


class _Reader:
    """The rows of one checkpoint, as ``dopamine_episodes.CheckpointReader`` describes."""

    def __init__(self, arrays: Mapping[str, _Array], is_end: np.ndarray | None) -> None:
        self._arrays = arrays
        self.action, self.reward, self.terminal = (arrays[m].read_all() for m in ("action", "reward", "terminal"))
        self.time_out: np.ndarray | None = None if is_end is None else is_end & (self.terminal == 0)

    def path(self, member: str) -> str:
        return self._arrays[member].path

    def read_frames(self, out: np.ndarray) -> None:
        self._arrays["observation"].read_into(out)

    def skip_frames(self, num_frames: int) -> None:
        scratch = np.empty((min(num_frames, _SKIP_FRAMES), *FRAME_SHAPE), np.uint8)
        for first in range(0, num_frames, _SKIP_FRAMES):
            self.read_frames(scratch[: num_frames - first])

    def finish(self) -> None:
        self._arrays["observation"].finish()


class _Array:
    """One gzipped ``.npy`` file, read from front to back and checked."""

    def __init__(self, path: str, stream: io.BufferedIOBase) -> None:
        self.path = path
        self._stream = stream
        with self._named(Exception):  # NumPy's parser of headers may raise anything.
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"it has .npy version {version}")
            self.shape, is_fortran, self.dtype = read_header[version](stream)
            if is_fortran and len(self.shape) > 1:
                raise ValueError("its array is in Fortran order")
            if self.dtype.hasobject:
                raise ValueError("it holds Python objects")
            if min(self.shape, default=0) < 0:
                raise ValueError(f"its shape is {list(self.shape)}")

    def expect(self, member: str, num_rows: int | None) -> int:
        """Checks type and shape of a member of the buffer; returns the number of rows."""
        dtype, row_shape = STORE_MEMBERS[member]
        is_shape = len(self.shape) == 1 + len(row_shape) and self.shape[1:] == row_shape
        if self.dtype != dtype or not is_shape or self.shape[0] != (num_rows or self.shape[0]) or not self.shape[0]:
            sizes = ", ".join(map(str, (num_rows or "N", *row_shape)))
            raise ValueError(f"{self.path} must be {dtype} [{sizes}], got {self.dtype} {list(self.shape)}")
        return self.shape[0]

    def read_into(self, out: np.ndarray) -> None:
        """Fills ``out`` with the next bytes."""
        view, num_filled = memoryview(cast(Any, out.reshape(-1).view(np.uint8))), 0
        with self._named():
            while num_filled < len(view):
                num_read = self._stream.readinto(view[num_filled : num_filled + _READ_BYTES])
                if not num_read:
                    raise ValueError(f"it ends before the array {list(self.shape)} that its header announces")
                num_filled += num_read

    def read_all(self) -> np.ndarray:
        """The whole array; checks that nothing follows."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        self.finish()
        return out

    def finish(self) -> None:
        """Checks that the file ends here; this is also when gzip compares its checksum."""
        with self._named():
            if self._stream.read(1):
                raise ValueError(f"it goes on after the array {list(self.shape)} that its header announces")

    @contextmanager
    def _named(self, *errors: type[Exception]) -> Iterator[None]:
        """Says which file it was."""
        try:
            yield
        except EOFError as error:
            raise ValueError(f"{self.path} is truncated: {error}") from error
        except (*_damage_errors, *errors) as error:
            if _is_of_the_system(error):
                raise
            raise ValueError(f"{self.path} is damaged: {error}") from error


def _is_of_the_system(error: Exception) -> bool:
    """Whether a file cannot be read at present, whatever it holds; bad gzip is an OSError, too, without a number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def _open_array(folder: _Folder, name: str) -> Iterator[_Array]:
    with folder.open(name) as file, _open_gzip(fileobj=file, mode="rb") as stream:
        yield _Array(f"{folder.location}/{name}", stream)


class _Folder:
    """A folder on disk or in an object store."""

    def __init__(self, *parts: str) -> None:
        self.location = "/".join((parts[0].rstrip("/"), *parts[1:])) if len(parts) > 1 else parts[0]
        self._is_url = "://" in parts[0]
        if self._is_url:
            try:
                if fsspec is None:
                    raise ImportError("fsspec is not installed")
                fsspec.core.url_to_fs(self.location)
            except ImportError as error:  # Of fsspec itself, or of the package for this kind of object store.
                raise ImportError(
                    f"{parts[0]} cannot be read: {error} (pip install 'torchrl-sql[fsspec]' brings fsspec and gs://)"
                ) from error

    def names(self) -> set[str]:
        """Names of the files and folders in it."""
        if not self._is_url:
            return set(os.listdir(self.location))
        system, path = fsspec.core.url_to_fs(self.location)
        return {entry.rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)}

    def open(self, name: str) -> IO[bytes]:
        path = f"{self.location}/{name}"
        if not self._is_url:
            return open(path, "rb")
        return cast("IO[bytes]", fsspec.open(path, "rb").open())


def _integers(data: bytes) -> list[int]:
    """Numbers of a NumPy array or of a pickled set of them. A pickle is read as tokens: nothing in it is executed."""
    if data.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"it must hold integers [n], got {array.dtype} {list(array.shape)}")
        return array.tolist()
    tokens: list[tuple[str, Any]] = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
    if ("EMPTY_SET", None) not in tokens:
        raise ValueError("it must be a NumPy array or a pickled set")
    scalars = [argument for name, argument in tokens if name == "SHORT_BINBYTES"]  # NumPy's, whose dtype has integers.
    if scalars:
        return [int.from_bytes(argument, "little") for argument in scalars]
    return [argument for name, argument in tokens if name in ("BININT", "BININT1", "BININT2")]


def _file_name(member: str, checkpoint: int) -> str:
    prefix = "$store$_" if member in STORE_MEMBERS else ""
    return f"{prefix}{member}_ckpt.{checkpoint}.gz"
