"""Batches of frames straight from the shards of many runs, for training.

The files are plain Zarr v3 (see ``frames.py``, which writes them through TensorStore). This reader knows the one layout
that the package writes: it looks chunks up in the shard indices, checks their CRC32C, lets zstd decode many chunks in
one call into a buffer that stays in the cache, and gathers the wanted frames in another. Both calls run without the
GIL, so that several threads read side by side; ``benchmarks/results/buffer.md`` has the comparison with TensorStore.

Legend: W windows, L frames of a window, K frames of a chunk.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import zstandard

from torchrl_sql.data.frames import FRAME_SHAPE, FrameLayout, shard_path
from torchrl_sql.data.run import Run

_CRC32C_RESIDUE = 0x48674BC7
"""CRC32C of any bytes followed by their own CRC32C, little endian."""

_WINDOWS_AT_ONCE = 32
"""Windows decoded together: their chunks should fit the processor's cache, and amortise the calls."""

_MISSING = np.uint64(2**64 - 1)
"""Offset and size of a chunk that was never written."""


class DamagedFramesError(ValueError):
    """Frames that were committed are missing, or are not what was written."""


class FrameDamage(NamedTuple):
    """Frames ``first_frame..stop_frame - 1`` of a run that cannot be read, why, and the file they should be in."""

    path: Path
    reason: str
    first_frame: int
    stop_frame: int


class Shard:
    """Where the chunks of one shard file lie.

    Args:
        path (Path): the file.
        num_chunks (int): chunks a shard has.

    Attributes:
        offset, size (memoryview of uint32): of each chunk, its CRC32C included; size 0: never written.

    Raises:
        ValueError: if the index is not intact.
        OSError: if the file cannot be read.
    """

    __slots__ = ("offset", "path", "size")

    def __init__(self, path: Path, num_chunks: int) -> None:
        self.path = path
        index_bytes = 16 * num_chunks + 4
        with path.open("rb") as file:
            num_bytes = file.seek(0, os.SEEK_END)
            end = num_bytes - index_bytes
            if not 0 <= end < 2**32:
                raise ValueError(f"its {num_bytes} bytes cannot end in an index of {index_bytes}")
            file.seek(end)
            data = file.read(index_bytes)
        if google_crc32c.value(data) != _CRC32C_RESIDUE:
            raise ValueError("the CRC32C of its index does not match")
        entries = np.frombuffer(data, "<u8", 2 * num_chunks).reshape(num_chunks, 2).copy()
        entries[entries[:, 0] == _MISSING] = 0
        if (entries > end).any() or (entries.sum(1) > end).any():
            raise ValueError(f"its index points beyond byte {end}, where the chunks end")
        self.offset, self.size = (memoryview(column) for column in np.ascontiguousarray(entries.T.astype(np.uint32)))


class FrameReader:
    """Reads windows of consecutive frames from the frame arrays of several runs, in batches.

    Several threads may read at a time, also after ``fork``. Shard indices stay in memory (8 bytes a chunk, a third of
    a byte a frame), and files stay open, up to half the number that the process may open (``ulimit -n``).

    Args:
        runs (sequence of Run): ``R`` runs of one store. Rows beyond their committed frames are never read.

    Raises:
        FileNotFoundError, ValueError: if a frame array is missing, malformed, shorter than its manifest says, or
            chunked in another way than the others.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        layouts = [FrameLayout.read(run.path / "frames") for run in runs]
        for run, layout in zip(runs, layouts, strict=True):
            path = run.path / "frames"
            if layout.num_frames < run.num_frames:
                raise ValueError(f"{path} must hold the {run.num_frames} committed frames, got {layout.num_frames}")
            if layout.chunking != layouts[0].chunking:
                raise ValueError(
                    f"{path} must have (chunks, shards) of {layouts[0].chunking} frames as the other runs, "
                    f"got {layout.chunking}"
                )
        self._runs = list(runs)
        self._chunk_frames, shard_frames = layouts[0].chunking
        self._chunk_bytes = self._chunk_frames * FRAME_SHAPE[0] * FRAME_SHAPE[1]
        self._chunks_per_shard = shard_frames // self._chunk_frames
        num_shards = [-(-run.num_frames // shard_frames) for run in runs]
        # The shards of all runs are numbered through, and so are their chunks.
        self._first_shard = np.cumsum([0, *num_shards])
        self._shards: dict[int, Shard] = {}
        self._files: dict[int, _OpenFile] = {}
        self._max_files = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1)
        self._thread = threading.local()

    @property
    def num_shards(self) -> int:
        """Shard files of all runs."""
        return int(self._first_shard[-1])

    def read(
        self, run: np.ndarray, start: np.ndarray, first: np.ndarray, stop: np.ndarray, *, length: int
    ) -> np.ndarray:
        """Reads ``W >= 1`` windows. Chunks that neighbouring windows share are decoded once.

        Args:
            run (int ``[W]``): which run.
            start (int64 ``[W]``): first frame of the window; may lie before ``first``.
            first (int64 ``[W]``): first frame of the episode; earlier ones are returned as zeros.
            stop (int64 ``[W]``): one past its last frame; later ones are returned as zeros.

        Keyword Args:
            length (int): ``L``, frames of each window.

        Returns:
            uint8 ``[W, L, 84, 84]``.

        Raises:
            DamagedFramesError: if a chunk that is needed is not intact.
        """
        frame = start[:, None] + np.arange(length)
        row = np.clip(frame, first[:, None], stop[:, None] - 1)
        chunk, row_in_chunk = np.divmod(row, self._chunk_frames)
        chunk += (self._first_shard[run] * self._chunks_per_shard)[:, None]

        # Each group of windows is decoded on its own: `keys` lists its distinct chunks, group by group.
        num_groups = -(-len(run) // _WINDOWS_AT_ONCE)
        num_chunks = self.num_shards * self._chunks_per_shard
        group = np.arange(len(run)) // _WINDOWS_AT_ONCE
        keys, position = np.unique(group[:, None] * num_chunks + chunk, return_inverse=True)
        group_start = np.searchsorted(keys, np.arange(num_groups + 1) * num_chunks).tolist()
        try:
            source = self._fetch((keys % num_chunks).tolist())
        except _BadChunks as error:
            raise self._damaged_frames_error(error) from error.__cause__
        decoded_row = position.reshape(row.shape) * self._chunk_frames + row_in_chunk

        out = np.empty((len(run), length, *FRAME_SHAPE), np.uint8)
        for number, (begin, end) in enumerate(pairwise(group_start)):
            windows = slice(number * _WINDOWS_AT_ONCE, (number + 1) * _WINDOWS_AT_ONCE)
            decoded = self._decode(source[begin:end])
            # mode="clip": the default mode would gather into a copy of `out`.
            decoded.take(decoded_row[windows] - begin * self._chunk_frames, 0, out=out[windows], mode="clip")
        outside = frame != row
        if outside.any():
            out[outside] = 0
        return out

    def check_shard(self, number: int) -> Iterator[FrameDamage]:
        """Reads all committed chunks of a shard, in ``0..num_shards - 1``; yields what is wrong with them."""
        run = self._run_of_shard(number)
        begin = number * self._chunks_per_shard
        committed = -(-self._runs[run].num_frames // self._chunk_frames)
        end = min(begin + self._chunks_per_shard, int(self._first_shard[run]) * self._chunks_per_shard + committed)
        try:
            self._load_shard(number)
        except _BadChunks as error:
            yield self._describe(error)[1]
            return
        for chunk in range(begin, end):
            try:
                self._fetch([chunk])
            except _BadChunks as error:
                yield self._describe(error)[1]

    def _fetch(self, chunks: list[int]) -> list[memoryview]:
        """The compressed bytes of chunks, checked, without their CRC32C."""
        places = []
        for chunk in chunks:
            number, local = divmod(chunk, self._chunks_per_shard)
            shard = self._shards.get(number) or self._load_shard(number)
            file = self._files.get(number) or self._open_file(number)
            offset, size = shard.offset[local], shard.size[local]
            if _advise is not None:  # Sets the disk to work on all chunks before the first one is waited for.
                _advise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            places.append((file, offset, size))
        found = []
        for chunk, (file, offset, size) in zip(chunks, places, strict=True):
            try:
                data = os.pread(file.descriptor, size, offset)
            except OSError as error:
                raise _BadChunks(chunk, chunk + 1, str(error)) from error
            if google_crc32c.value(data) != _CRC32C_RESIDUE:
                reason = "the CRC32C does not match" if size else "it was never written"
                raise _BadChunks(chunk, chunk + 1, reason)
            found.append(memoryview(data)[:-4])
        return found

    def _decode(self, source: list[memoryview]) -> np.ndarray:
        """Frames of chunks, uint8 ``[chunks * K, 84, 84]``, in a buffer that this thread's next call overwrites."""
        num_bytes = len(source) * self._chunk_bytes
        scratch = getattr(self._thread, "scratch", None)
        if scratch is None or scratch.size < num_bytes:
            scratch = self._thread.scratch = np.empty(num_bytes, np.uint8)
            self._thread.decompressor = zstandard.ZstdDecompressor()
        decoded = scratch[:num_bytes]
        with self._thread.decompressor.stream_reader(b"".join(source), read_across_frames=True) as reader:
            # zstd decodes a frame in place where the whole of it fits into what is left of the buffer.
            found = reader.readinto(decoded)
        if found != num_bytes:
            raise ValueError(f"{len(source)} chunks must decode to {num_bytes} bytes, got {found}")
        return decoded.reshape(-1, *FRAME_SHAPE)

    def _load_shard(self, number: int) -> Shard:
        begin = number * self._chunks_per_shard
        try:
            shard = Shard(self._shard_path(number), self._chunks_per_shard)
        except FileNotFoundError as error:
            raise _BadChunks(begin, begin + self._chunks_per_shard, "the file is missing") from error
        except (OSError, ValueError) as error:
            raise _BadChunks(begin, begin + self._chunks_per_shard, str(error)) from error
        self._shards[number] = shard
        return shard

    def _open_file(self, number: int) -> _OpenFile:
        if len(self._files) >= self._max_files:
            self._files.popitem()  # Access is random, so it does not matter which one goes.
        file = self._files[number] = _OpenFile(self._shards[number].path)
        return file

    def _run_of_shard(self, number: int) -> int:
        return int(np.searchsorted(self._first_shard, number, side="right")) - 1

    def _shard_path(self, number: int) -> Path:
        run = self._run_of_shard(number)
        return shard_path(self._runs[run].path / "frames", number - int(self._first_shard[run]))

    def _describe(self, error: _BadChunks) -> tuple[Run, FrameDamage]:
        number, local = divmod(error.begin, self._chunks_per_shard)
        index = self._run_of_shard(number)
        run = self._runs[index]
        first = (error.begin - int(self._first_shard[index]) * self._chunks_per_shard) * self._chunk_frames
        stop = min(first + (error.end - error.begin) * self._chunk_frames, run.num_frames)
        reason = f"chunk {local}: {error.reason}" if error.end == error.begin + 1 else error.reason
        return run, FrameDamage(self._shard_path(number), reason, first, stop)

    def _damaged_frames_error(self, error: _BadChunks) -> DamagedFramesError:
        run, damage = self._describe(error)
        first, stop = run.steps_of_frames(damage.first_frame, damage.stop_frame)
        return DamagedFramesError(
            f"{damage.path} is damaged: {damage.reason}. It holds the frames of transitions {first} to {stop - 1} of "
            f"{run.game}, run {run.name!r}"
        )


class _BadChunks(Exception):
    """Chunks ``begin..end - 1`` of one shard, as numbered through, cannot be read."""

    def __init__(self, begin: int, end: int, reason: str) -> None:
        super().__init__(begin, end, reason)
        self.begin, self.end, self.reason = begin, end, reason


class _OpenFile:
    """A file descriptor that is closed when the last thread lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.descriptor)


_advise = getattr(os, "posix_fadvise", None)  # macOS has none.
