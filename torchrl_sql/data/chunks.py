"""Batches of frames out of the chunks of many recordings, for training.

The wanted chunks are copied from the mapped shards, compared with their checksums, decoded by zstd, many in one call,
and cut. ``benchmarks/results/buffer.md`` has the comparison with TensorStore. Two things make threads scale:

- The GIL is let go once for many chunks, not at each system call and chunk, 1,800 times a batch: beside a busy training
  thread it must be asked back each time.
- Decoded chunks, 141 KB each, are freed at once, into a heap that keeps its memory: see :func:`_keep_freed_memory`.

Legend: W windows, L frames of a window, K frames of a chunk, P pieces (of windows, each within a chunk).
"""

from __future__ import annotations

import mmap
import resource
import threading
from collections.abc import Sequence
from itertools import pairwise

import google_crc32c
import numpy as np
import zstandard

from torchrl_sql.data.mapping import UnreadableRangeError, advise, read_ranges
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.shards import FRAME_BYTES, ShardFiles
from torchrl_sql.games import FRAME_SHAPE

_WINDOWS_AT_ONCE = 16
"""Windows decoded together: their chunks should stay in the processor's cache, and make up for the cost of a call."""

_WINDOWS_COPIED_AT_ONCE = 512
"""Windows whose chunks are copied together, some 3 MB."""

_READS_TO_ANNOUNCE = 100
"""Reads, after the first and after each that waited for the disk, for which the disk is told beforehand what will be
read. It then fetches all chunks of a batch at a time; where everything is in memory, telling it only costs time."""


class FrameReader:
    """Reads windows of consecutive frames from the frame arrays of several recordings, in batches.

    Several threads may read at a time, also after ``fork``.

    Args:
        recordings (sequence of Recording): ``R`` recordings of one store. Rows beyond their committed frames are never
            read.

    Raises:
        FileNotFoundError, ValueError: see :class:`ShardFiles`.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._files = ShardFiles(recordings)
        self._reads_to_announce = _READS_TO_ANNOUNCE
        self._thread = threading.local()
        _keep_freed_memory()

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
            DamagedFramesError: if a chunk that is needed is not the one that was committed.
        """
        if out is None:
            out = np.empty((len(recording), length, *FRAME_SHAPE), np.uint8)
        disk_waits = _num_disk_waits()
        for begin in range(0, len(recording), _WINDOWS_COPIED_AT_ONCE):
            rows = slice(begin, begin + _WINDOWS_COPIED_AT_ONCE)
            self._read_into(out[rows], recording[rows], start[rows], first[rows], stop[rows])
        self._reads_to_announce = _READS_TO_ANNOUNCE if _num_disk_waits() > disk_waits else self._reads_to_announce - 1
        return out

    def _read_into(
        self, out: np.ndarray, recording: np.ndarray, start: np.ndarray, first: np.ndarray, stop: np.ndarray
    ) -> None:
        length, chunk_frames = out.shape[1], self._files.chunk_frames
        begin, end = np.maximum(start, first), np.minimum(start + length, stop)
        out[end - begin < length] = 0
        target = out.data.cast("B")

        # Pieces: what a window takes from one chunk.
        window, ahead = np.indices((len(recording), (length - 2) // chunk_frames + 2))
        chunk = begin[:, None] // chunk_frames + ahead
        piece_begin = np.maximum(chunk * chunk_frames, begin[:, None])
        piece_end = np.minimum((chunk + 1) * chunk_frames, end[:, None])
        used = piece_begin < piece_end
        from_byte = (piece_begin - chunk * chunk_frames)[used] * FRAME_BYTES
        to_byte = (window * length + piece_begin - start[:, None])[used] * FRAME_BYTES
        num_bytes = (piece_end - piece_begin)[used] * FRAME_BYTES
        chunk += self._files.first_chunk[recording][:, None]

        # Groups of windows are decoded one after the other: `keys` lists their distinct chunks, group by group.
        group, num_chunks = window[used] // _WINDOWS_AT_ONCE, self._files.num_chunks
        keys, position = np.unique(group * num_chunks + chunk[used], return_inverse=True)
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
        chunks = keys % num_chunks
        stored, ends = self._copy(chunks)
        expected = self._files.expected(chunks)
        for (a, b), (c, d) in zip(pairwise(first_key.tolist()), pairwise(first_piece.tolist()), strict=True):
            decoded = self._decode(chunks[a:b].tolist(), stored, ends[a : b + 1], expected[a:b])
            for where, source_byte, target_byte, count in pieces[c:d]:
                target[target_byte : target_byte + count] = decoded[where][source_byte : source_byte + count]

    def _copy(self, chunks: np.ndarray) -> tuple[memoryview, list[int]]:
        """The chunks as stored, one after the other, and where each begins and the last one ends."""
        places = self._files.locate(chunks)
        if self._reads_to_announce > 0:  # The disk fetches what is not in memory, all at once.
            for address, size in places.tolist():
                advise(address, size, mmap.MADV_WILLNEED)
        try:
            stored = read_ranges(places[:, 0], places[:, 1])
        except UnreadableRangeError as error:
            raise self._files.damaged(int(chunks[error.index]), str(error)) from error
        return stored.data, [0, *np.cumsum(places[:, 1]).tolist()]

    def _decode(self, chunks: list[int], stored: memoryview, ends: list[int], expected: list[int]) -> list[memoryview]:
        """Bytes of the frames of each chunk."""
        source: list[bytes | bytearray | memoryview] = []
        for chunk, (begin, end), checksum in zip(chunks, pairwise(ends), expected, strict=True):
            data = bytes(stored[begin : end - 4])
            if google_crc32c.value(data) != checksum and (reason := self._files.check(chunk, bytes(stored[begin:end]))):
                raise self._files.damaged(chunk, reason)
            source.append(data)
        decompressor = getattr(self._thread, "decompressor", None)
        if decompressor is None:
            decompressor = self._thread.decompressor = zstandard.ZstdDecompressor()
        sizes = np.full(len(chunks), self._files.chunk_frames * FRAME_BYTES, np.uint64)
        try:
            decoded = decompressor.multi_decompress_to_buffer(source, decompressed_sizes=sizes.tobytes())
        except zstandard.ZstdError:
            for chunk, (begin, end) in zip(chunks, pairwise(ends), strict=True):
                if reason := self._files.check(chunk, bytes(stored[begin:end])):
                    raise self._files.damaged(chunk, reason) from None
            raise  # Each chunk can be decoded by itself: not the data's fault.
        # Segments are buffers, which zstandard's annotations can say from Python 3.12 on only.
        return [memoryview(decoded[index]) for index in range(len(chunks))]  # type: ignore[arg-type]


class StoredFrames:
    """Frames of recordings taken together, as they were committed: rows int64 ``[B]`` give uint8 ``[B, 84, 84]``.

    Raises:
        DamagedFramesError: when a frame is read that is not what was committed.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._reader = FrameReader(recordings)
        self._ends = np.cumsum([recording.num_frames for recording in recordings])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        recording = np.searchsorted(self._ends, rows, side="right")
        row = rows - np.concatenate([[0], self._ends])[recording]
        return self._reader.read(recording, row, row, row + 1, length=1)[:, 0]


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
