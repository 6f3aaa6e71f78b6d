"""Batches of frames straight from the shards of many recordings, for training.

The files are plain Zarr v3 (see ``frames.py``, which writes them through TensorStore). This reader knows the one layout
that the package writes: it maps the shard files into memory, looks chunks up in their indices, lets zstd decode many in
one call, compares their CRC32C, and copies the wanted frames. ``benchmarks/results/buffer.md`` has the comparison with
TensorStore. Two things make threads scale:

- The GIL is let go once for many chunks, not at each system call and chunk, 1,800 times a batch: beside a busy training
  thread it must be asked back each time.
- Decoded chunks, 141 KB each, are freed at once, into a heap that keeps its memory: see :func:`_keep_freed_memory`.

Pages that were read stay mapped. They belong to the page cache, which processes share and the kernel takes back when it
needs to, but programs like ``ps`` count them as the process's. Unmapping them now and then would keep that number small
and make batches of a large store slower.

Legend: W windows, L frames of a window, K frames of a chunk, P pieces (of windows, each within a chunk).
"""

from __future__ import annotations

import mmap
import resource
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import zstandard

from torchrl_sql.data.frames import FrameLayout, shard_path
from torchrl_sql.data.mapping import MappedFile
from torchrl_sql.data.recording import Recording
from torchrl_sql.games import FRAME_SHAPE

_CRC32C_RESIDUE = 0x48674BC7
"""CRC32C of any bytes followed by their own CRC32C, little endian."""

_FRAME_BYTES = FRAME_SHAPE[0] * FRAME_SHAPE[1]

_WINDOWS_AT_ONCE = 16
"""Windows decoded together: their chunks should stay in the processor's cache, and make up for the cost of a call."""

_MAX_SHARDS = 50_000
"""Files mapped at a time; Linux allows a process 65,530 mappings."""

_READS_TO_ANNOUNCE = 100
"""Reads, after the first and after each that waited for the disk, for which the disk is told beforehand what will be
read. It then fetches all chunks of a batch at a time; where everything is in memory, telling it only costs time."""

_MISSING = 2**64 - 1
"""Offset and size of a chunk that was never written."""

_NEVER_WRITTEN = "it was never written"
_WRONG_CRC32C = "the CRC32C does not match"


class DamagedFramesError(ValueError):
    """Frames that were committed are missing, or are not what was written."""


class FrameDamage(NamedTuple):
    """Frames ``first_frame..stop_frame - 1`` of a recording that cannot be read, why, and their file."""

    path: Path
    reason: str
    first_frame: int
    stop_frame: int


class Shard:
    """One shard file, mapped into memory.

    Args:
        path (Path): the file.
        num_chunks (int): chunks a shard has.

    Attributes:
        file (MappedFile): it.
        view (memoryview of bytes): its bytes.
        index (memoryview of uint64): offset and size of each chunk in turn, its CRC32C included; a copy, 12 KB in
            shards of the default size, which spares a batch a page fault for each of its chunks.

    Raises:
        ValueError: if the index is not intact.
        OSError: if the file cannot be read.
    """

    __slots__ = ("file", "index", "view")

    def __init__(self, path: Path, num_chunks: int) -> None:
        index_bytes = 16 * num_chunks + 4
        self.file = MappedFile(path)
        self.file.advise(mmap.MADV_RANDOM)
        self.view = self.file.view
        end = len(self.view) - index_bytes  # of the mapping itself: a writer may replace the file meanwhile
        if end < 0:
            raise ValueError(f"its {len(self.view)} bytes cannot end in an index of {index_bytes}")
        if google_crc32c.value(bytes(self.view[end:])) != _CRC32C_RESIDUE:
            raise ValueError("the CRC32C of its index does not match")
        self.index = memoryview(bytes(self.view[end:-4])).cast("Q")
        offset, size = np.array(self.index).reshape(num_chunks, 2).T
        if ((offset != _MISSING) & ((offset > end) | (size > end) | (offset + size > end))).any():
            raise ValueError(f"its index points beyond byte {end}, where the chunks end")


class FrameReader:
    """Reads windows of consecutive frames from the frame arrays of several recordings, in batches.

    Several threads may read at a time, also after ``fork``.

    Args:
        recordings (sequence of Recording): ``R`` recordings of one store. Rows beyond their committed frames are
            never read.

    Raises:
        FileNotFoundError, ValueError: if a frame array is missing, malformed, shorter than its manifest says, or
            chunked in another way than the others.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        layouts = [FrameLayout.read(recording.path / "frames") for recording in recordings]
        for recording, layout in zip(recordings, layouts, strict=True):
            path = recording.path / "frames"
            if layout.num_frames < recording.num_frames:
                raise ValueError(
                    f"{path} must hold the {recording.num_frames} committed frames, got {layout.num_frames}"
                )
            if layout.chunking != layouts[0].chunking:
                raise ValueError(
                    f"{path} must have (chunks, shards) of {layouts[0].chunking} frames as the other recordings, "
                    f"got {layout.chunking}"
                )
        self._recordings = list(recordings)
        self._chunk_frames, shard_frames = layouts[0].chunking
        self._chunks_per_shard = shard_frames // self._chunk_frames
        num_shards = [-(-recording.num_frames // shard_frames) for recording in recordings]
        # The shards of all recordings are numbered through, and so are their chunks.
        self._first_shard = np.cumsum([0, *num_shards])
        self._shards: dict[int, Shard] = {}
        self._reads_to_announce = _READS_TO_ANNOUNCE
        self._thread = threading.local()
        _keep_freed_memory()

    @property
    def num_shards(self) -> int:
        """Shard files of all recordings."""
        return int(self._first_shard[-1])

    def read(
        self,
        recording: np.ndarray,
        start: np.ndarray,
        first: np.ndarray,
        stop: np.ndarray,
        *,
        length: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads ``W`` windows. Chunks that neighbouring windows share are decoded once.

        Args:
            recording (int ``[W]``): which recording.
            start (int64 ``[W]``): first frame of the window; may lie before ``first``.
            first (int64 ``[W]``): first frame of the episode; earlier ones are returned as zeros.
            stop (int64 ``[W]``): one past its last frame; later ones are returned as zeros.

        Keyword Args:
            length (int): ``L``, frames of each window.
            out (uint8 ``[W, L, 84, 84]``, optional): contiguous, where to write them.

        Returns:
            uint8 ``[W, L, 84, 84]``, ``out`` if it is given.

        Raises:
            DamagedFramesError: if a chunk that is needed is not intact.
        """
        begin, end = np.maximum(start, first), np.minimum(start + length, stop)
        if out is None:
            out = np.empty((len(recording), length, *FRAME_SHAPE), np.uint8)
        out[end - begin < length] = 0
        target = out.data.cast("B")

        # Pieces: what a window takes from one chunk.
        window, number = np.indices((len(recording), (length - 2) // self._chunk_frames + 2))
        chunk = begin[:, None] // self._chunk_frames + number
        piece_begin = np.maximum(chunk * self._chunk_frames, begin[:, None])
        piece_end = np.minimum((chunk + 1) * self._chunk_frames, end[:, None])
        some = piece_begin < piece_end
        from_byte = (piece_begin - chunk * self._chunk_frames)[some] * _FRAME_BYTES
        to_byte = (window * length + piece_begin - start[:, None])[some] * _FRAME_BYTES
        num_bytes = (piece_end - piece_begin)[some] * _FRAME_BYTES
        chunk += (self._first_shard[recording] * self._chunks_per_shard)[:, None]

        # Groups of windows are decoded one after the other: `keys` lists their distinct chunks, group by group.
        group, num_chunks = window[some] // _WINDOWS_AT_ONCE, self.num_shards * self._chunks_per_shard
        keys, position = np.unique(group * num_chunks + chunk[some], return_inverse=True)
        groups = np.arange(-(-len(recording) // _WINDOWS_AT_ONCE) + 1)
        first_key = np.searchsorted(keys, groups * num_chunks)
        first_piece = np.searchsorted(group, groups)
        pieces = list(
            zip(
                (position - first_key[group]).tolist(),
                from_byte.tolist(),
                to_byte.tolist(),
                num_bytes.tolist(),
                strict=True,
            )
        )
        disk_waits = _num_disk_waits()
        try:
            chunks = (keys % num_chunks).tolist()
            if self._reads_to_announce > 0:
                self._announce(chunks)
            for (a, b), (c, d) in zip(pairwise(first_key.tolist()), pairwise(first_piece.tolist()), strict=True):
                decoded = self._decode([self._find(chunk) for chunk in chunks[a:b]])
                for where, source_byte, target_byte, count in pieces[c:d]:
                    target[target_byte : target_byte + count] = decoded[where][source_byte : source_byte + count]
        except _BadChunks as error:
            raise self._damaged_frames_error(error) from error.__cause__
        self._reads_to_announce = _READS_TO_ANNOUNCE if _num_disk_waits() > disk_waits else self._reads_to_announce - 1
        return out

    def check_shard(self, number: int) -> Iterator[FrameDamage]:
        """Reads all committed chunks of a shard, in ``0..num_shards - 1``; yields what is wrong with them."""
        recording = self._recording_of_shard(number)
        begin = number * self._chunks_per_shard
        num_chunks = -(-self._recordings[recording].num_frames // self._chunk_frames)
        end = min(
            begin + self._chunks_per_shard, int(self._first_shard[recording]) * self._chunks_per_shard + num_chunks
        )
        try:
            index = self._load_shard(number).index
        except _BadChunks as error:
            yield self._describe(error)[1]
            return
        # Not through the mapping: where a disk cannot read, that would end the process instead of raising an error.
        with self._shard_path(number).open("rb") as file:
            for local in range(end - begin):
                offset, size = index[2 * local], index[2 * local + 1]
                try:
                    reason = _NEVER_WRITTEN
                    if offset != _MISSING:
                        file.seek(offset)
                        chunk = file.read(size)
                        intact = google_crc32c.value(chunk) == _CRC32C_RESIDUE
                        reason = self._wrong_content(chunk[:-4]) if intact else _WRONG_CRC32C
                except OSError as error:
                    reason = str(error)
                if reason:
                    yield self._describe(_BadChunks(begin + local, begin + local + 1, reason))[1]

    def _find(self, chunk: int) -> tuple[int, Shard, int, int]:
        """Number, shard, offset and size of a chunk."""
        number, local = divmod(chunk, self._chunks_per_shard)
        shard = self._shards.get(number) or self._load_shard(number)
        offset = shard.index[2 * local]
        if offset == _MISSING:
            raise _BadChunks(chunk, chunk + 1, _NEVER_WRITTEN)
        return chunk, shard, offset, shard.index[2 * local + 1]

    def _announce(self, chunks: list[int]) -> None:
        """Has the disk fetch what is not in memory, all at once."""
        for _, shard, offset, size in map(self._find, chunks):
            page = offset & -mmap.PAGESIZE
            shard.file.advise(mmap.MADV_WILLNEED, page, offset + size - page)

    def _decode(self, chunks: list[tuple[int, Shard, int, int]]) -> list[memoryview]:
        """Bytes of the frames of each chunk."""
        decompressor = getattr(self._thread, "decompressor", None)
        if decompressor is None:
            decompressor = self._thread.decompressor = zstandard.ZstdDecompressor()
        source: list[bytes | bytearray | memoryview] = [
            shard.view[offset : offset + size - 4] for _, shard, offset, size in chunks
        ]
        sizes = np.full(len(chunks), self._chunk_frames * _FRAME_BYTES, np.uint64)
        failure = None
        try:
            decoded = decompressor.multi_decompress_to_buffer(source, decompressed_sizes=sizes.tobytes())
        except zstandard.ZstdError as error:
            failure = error
        # After decoding, which waits for the disk without the GIL where it has to.
        for chunk, shard, offset, size in chunks:
            if google_crc32c.value(bytes(shard.view[offset : offset + size])) != _CRC32C_RESIDUE:
                raise _BadChunks(chunk, chunk + 1, _WRONG_CRC32C)
            if failure is not None and (reason := self._wrong_content(shard.view[offset : offset + size - 4])):
                raise _BadChunks(chunk, chunk + 1, reason)
        if failure is not None:
            raise failure  # Each chunk can be decoded by itself: not the data's fault.
        # Segments are buffers, which zstandard's annotations can say from Python 3.12 on only.
        return [memoryview(decoded[number]) for number in range(len(chunks))]  # type: ignore[arg-type]

    def _wrong_content(self, chunk: bytes | memoryview) -> str:
        """What is wrong with a chunk whose checksum is right, or ``""``."""
        num_bytes = self._chunk_frames * _FRAME_BYTES
        try:
            found = len(zstandard.ZstdDecompressor().decompress(chunk, max_output_size=num_bytes))
        except zstandard.ZstdError as error:
            return f"it must hold {num_bytes} bytes of zstd-compressed frames: {error}"
        return "" if found == num_bytes else f"it must hold {num_bytes} bytes of frames, got {found}"

    def _load_shard(self, number: int) -> Shard:
        begin = number * self._chunks_per_shard
        try:
            shard = Shard(self._shard_path(number), self._chunks_per_shard)
        except FileNotFoundError as error:
            raise _BadChunks(begin, begin + self._chunks_per_shard, "the file is missing") from error
        except (OSError, ValueError) as error:
            raise _BadChunks(begin, begin + self._chunks_per_shard, str(error)) from error
        while len(self._shards) >= _MAX_SHARDS:
            self._shards.popitem()  # Access is random, so it does not matter which one goes.
        self._shards[number] = shard
        return shard

    def _recording_of_shard(self, number: int) -> int:
        return int(np.searchsorted(self._first_shard, number, side="right")) - 1

    def _shard_path(self, number: int) -> Path:
        recording = self._recording_of_shard(number)
        return shard_path(self._recordings[recording].path / "frames", number - int(self._first_shard[recording]))

    def _describe(self, error: _BadChunks) -> tuple[Recording, FrameDamage]:
        number, local = divmod(error.begin, self._chunks_per_shard)
        index = self._recording_of_shard(number)
        recording = self._recordings[index]
        first = (error.begin - int(self._first_shard[index]) * self._chunks_per_shard) * self._chunk_frames
        stop = min(first + (error.end - error.begin) * self._chunk_frames, recording.num_frames)
        reason = f"chunk {local}: {error.reason}" if error.end == error.begin + 1 else error.reason
        return recording, FrameDamage(self._shard_path(number), reason, first, stop)

    def _damaged_frames_error(self, error: _BadChunks) -> DamagedFramesError:
        recording, damage = self._describe(error)
        first, stop = recording.steps_of_frames(damage.first_frame, damage.stop_frame)
        return DamagedFramesError(
            f"{damage.path} is damaged or cannot be read: {damage.reason}. It holds the frames of transitions {first} "
            f"to {stop - 1} of {recording.game}, recording {recording.name!r}"
        )


class _BadChunks(Exception):
    """Chunks ``begin..end - 1`` of one shard, as numbered through, cannot be read."""

    def __init__(self, begin: int, end: int, reason: str) -> None:
        super().__init__(begin, end, reason)
        self.begin, self.end, self.reason = begin, end, reason


def _num_disk_waits() -> int:
    """How often this thread (outside Linux: this process) had to wait for the disk to fill a page."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


def _keep_freed_memory() -> None:
    """Has the C library keep blocks of up to 31 MB that are freed, instead of returning their pages to the kernel.

    At first glibc maps every block over 128 KB on its own and unmaps it when it is freed: each decoded chunk then costs
    35 page faults, and threads wait for each other to change the mappings of the process. The first larger block that
    is freed raises the limit to its size, up to 32 MB (mallopt(3), ``M_MMAP_THRESHOLD``). A batch of moderate size does
    so sooner or later; this does it at once, for any size.
    """
    np.empty(31 << 20, np.uint8)
