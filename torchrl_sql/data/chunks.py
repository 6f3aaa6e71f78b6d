"""Batches of frames out of the chunks of many recordings, for training.

The wanted chunks are copied from the mapped shards; ``gather.py`` compares them with their checksums, decodes and cuts
them. ``benchmarks/results/buffer.md`` has the comparison with TensorStore. Two things make threads scale:

- The GIL is let go once for many chunks, not at each system call and chunk, 1,800 times per batch: beside a busy
  training thread it must be asked back each time.
- Batches that are freed go into a heap that keeps its memory: see :func:`_keep_freed_memory`.

Legend: W windows, L frames of a window, K frames of a chunk, P pieces (of windows, each within a chunk).
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Sequence

import numpy as np

from torchrl_sql.data.frames import FRAME_BYTES
from torchrl_sql.data.gather import StoredChunks, fastest_gather
from torchrl_sql.data.mapping import UnreadableRangeError, advise, read_ranges
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.shards import ShardFiles
from torchrl_sql.games import FRAME_SHAPE

_WINDOWS_COPIED_AT_ONCE = 512
"""Windows whose chunks are copied together, some 3 MB."""

_READS_TO_ANNOUNCE = 10
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
        self._gather = fastest_gather()
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
            ValueError: for another ``out``.
        """
        shape = (len(recording), length, *FRAME_SHAPE)
        if out is None:
            out = np.empty(shape, np.uint8)
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")
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

        # Pieces: what a window takes from one chunk, in the order of chunks.
        window, ahead = np.indices((len(recording), (length - 2) // chunk_frames + 2))
        chunk = begin[:, None] // chunk_frames + ahead
        piece_begin = np.maximum(chunk * chunk_frames, begin[:, None])
        piece_end = np.minimum((chunk + 1) * chunk_frames, end[:, None])
        used = piece_begin < piece_end
        numbers = (chunk + self._files.first_chunk[recording][:, None])[used]
        order = np.argsort(numbers, kind="stable")
        from_frame, to_frame = piece_begin - chunk * chunk_frames, window * length + piece_begin - start[:, None]
        pieces = np.stack([from_frame[used], to_frame[used], (piece_end - piece_begin)[used]], axis=1)[order]
        numbers, first_piece = np.unique(numbers[order], return_index=True)
        stored, ends = self._copy(numbers)
        chunks = StoredChunks(
            codec=self._files.codec,
            chunk_frames=chunk_frames,
            stored=stored,
            ends=ends,
            expected=self._files.expected(numbers),
            first_piece=np.append(first_piece, len(pieces)),
            pieces=pieces * FRAME_BYTES,
        )
        bad = self._gather(chunks, out, 0)
        while bad >= 0:
            self._check(int(numbers[bad]), chunks, bad)
            bad = self._gather(chunks, out, bad)

    def _copy(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chunks as stored, one after the other, and where each begins and the last one ends."""
        places = self._files.locate(numbers)
        if self._reads_to_announce > 0:  # The disk fetches what is not in memory, all at once.
            for address, size in places.tolist():
                advise(address, size, mmap.MADV_WILLNEED)
        try:
            stored = read_ranges(places[:, 0], places[:, 1])
        except UnreadableRangeError as error:
            raise self._files.damaged(int(numbers[error.index]), str(error)) from error
        return stored, np.concatenate([[0], np.cumsum(places[:, 1])])

    def _check(self, number: int, chunks: StoredChunks, index: int) -> None:
        """Says what is wrong with a chunk. One that is not full may be right: which it must be is learned here."""
        stored = chunks.stored[chunks.ends[index] : chunks.ends[index + 1]].tobytes()
        if reason := self._files.check(number, stored):
            raise self._files.damaged(number, reason)
        expected = self._files.expected(np.array([number]))[0]
        if expected == chunks.expected[index]:
            raise RuntimeError(f"{self._gather.__name__} refuses an intact chunk, {number} of {self._files.num_chunks}")
        chunks.expected[index] = expected


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

    At first glibc maps every block over 128 KB on its own and unmaps it when it is freed: the frames of each batch of
    512 then cost 4,400 page faults, and threads wait for each other to change the mappings of the process. The first
    larger block that is freed raises the limit to its size, up to 32 MB (mallopt(3), ``M_MMAP_THRESHOLD``). A batch of
    moderate size does so sooner or later; this does it at once, for any size.
    """
    np.empty(31 << 20, np.uint8)
