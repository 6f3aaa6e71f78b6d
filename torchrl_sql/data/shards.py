"""The shard files of many recordings: where each chunk lies, and what it must be.

The files are plain Zarr v3 (see ``frames.py``, which writes them through TensorStore). This reader knows the one layout
that the package writes. A chunk's own CRC32C says that it is intact; that it is the chunk which was committed here, not
one of another file or of an earlier state of this one, say the checksums that the recording keeps of all its chunks.

Pages that were read stay mapped. They belong to the page cache, which processes share and the kernel takes back when it
needs to, but programs like ``ps`` count them as the process's. Unmapping them now and then would keep that number small
and make batches of a large store slower.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from torchrl_sql.data.frames import FRAME_BYTES, FrameLayout, shard_path
from torchrl_sql.data.gather import decode
from torchrl_sql.data.mapping import OWN_LIMITS, MappedFile, UnreadableRangeError, advise, read_ranges
from torchrl_sql.data.recording import CHECKSUM_DTYPE, Recording

_CRC32C_RESIDUE = 0x48674BC7
"""CRC32C of any bytes followed by their own CRC32C, little endian."""

_MAX_SHARDS = 30_000
"""Files mapped at a time, and as many that were mapped before them; Linux allows a process 65,530 mappings."""

_MISSING = 2**64 - 1
"""Offset and size of a chunk that was never written."""

_OTHER = "it is intact, but not the one that was committed here: of another file or state"


class DamagedFramesError(ValueError):
    """Frames that were committed are missing, or are not what was written.

    Attributes:
        file (Path): the file they should be in.
        reason (str): what is wrong with it.
        transitions (tuple of int, optional): first and last transition of the recording (rows of its actions and
            rewards) whose frames they are; None if the episode table cannot tell.
    """

    file: Path
    reason: str
    transitions: tuple[int, int] | None


class Shard:
    """One shard file, mapped into memory.

    Args:
        path (Path): the file.
        num_chunks (int): chunks a shard has.

    Attributes:
        places (int64 ``[num_chunks, 2]``): address and size of each chunk, its CRC32C included; size 0 if it was never
            written.

    Raises:
        ValueError: if the index is not intact.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: Path, num_chunks: int) -> None:
        index_bytes = 16 * num_chunks + 4
        self._file = MappedFile(path)
        advise(self._file.address, self._file.num_bytes, mmap.MADV_RANDOM)
        end = self._file.num_bytes - index_bytes  # of the mapping itself: a writer may replace the file meanwhile
        if end < 0:
            raise ValueError(f"its {self._file.num_bytes} bytes cannot end in an index of {index_bytes}")
        index = read_ranges(np.array([self._file.address + end]), np.array([index_bytes])).tobytes()
        if google_crc32c.value(index) != _CRC32C_RESIDUE:
            raise ValueError("the CRC32C of its index does not match")
        offset, size = np.frombuffer(index[:-4], "<u8").reshape(num_chunks, 2).T
        written = offset != _MISSING
        if (written & ((offset > end) | (size > end) | (offset + size > end) | (size < 4))).any():
            raise ValueError(f"its index points beyond byte {end}, where the chunks end")
        self.places = np.zeros((num_chunks, 2), np.int64)
        self.places[written] = np.stack([offset + np.uint64(self._file.address), size], axis=1)[written]

    def checksums(self, count: int) -> np.ndarray:
        """CRC32C of each of its first chunks as stored, uint32 ``[count]``."""
        ends = self.places[:count].sum(axis=1)
        return read_ranges(ends - 4, np.full(count, 4)).view(CHECKSUM_DTYPE).copy()


class ShardFiles:
    """The shards of several recordings, numbered through, and so their chunks.

    Args:
        recordings (sequence of Recording): ``R`` recordings of one store.

    Attributes:
        codec (str): how chunks are compressed.
        chunk_frames (int): frames per chunk.
        chunks_per_shard (int): chunks a shard.
        first_chunk (int64 ``[R]``): number of each recording's first chunk.

    Raises:
        FileNotFoundError, ValueError: if a frame array is missing, malformed, shorter than its manifest says, or
            encoded in another way than the others.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        layouts = [FrameLayout.read(recording.path / "frames") for recording in recordings]
        self._recordings = list(recordings)
        self.codec, (self.chunk_frames, shard_frames) = layouts[0].codec, layouts[0].chunking
        self.chunks_per_shard = shard_frames // self.chunk_frames
        num_shards = [-(-recording.num_frames // shard_frames) for recording in recordings]
        self._first_shard = np.cumsum([0, *num_shards])
        self.first_chunk = self._first_shard[:-1] * self.chunks_per_shard
        self._checksums = np.zeros(self.num_shards * self.chunks_per_shard, np.uint32)
        self._partial: dict[int, tuple[int, int]] = {}
        for recording, layout, first_chunk in zip(recordings, layouts, self.first_chunk.tolist(), strict=True):
            path, num_frames = recording.path / "frames", recording.num_frames
            if layout.num_frames < num_frames:
                raise ValueError(f"{path} must hold the {num_frames} committed frames, got {layout.num_frames}")
            if (layout.chunking, layout.codec) != (layouts[0].chunking, self.codec):
                raise ValueError(
                    f"{path} must have (chunks, shards) of {layouts[0].chunking} frames in {self.codec} as the other "
                    f"recordings, got {layout.chunking} in {layout.codec}"
                )
            num_chunks, rest = divmod(num_frames, self.chunk_frames)
            checksums = recording.chunk_checksums()
            if len(checksums) != num_chunks:
                raise ValueError(
                    f"{path} must have {len(checksums)} full chunks as its manifest says, got {num_chunks} "
                    f"of {self.chunk_frames} frames"
                )
            self._checksums[first_chunk : first_chunk + num_chunks] = checksums
            if rest:
                self._partial[first_chunk + num_chunks] = rest, recording.manifest.tail.frames
        self._shards: dict[int, Shard] = {}
        self._retired = self._shards
        self._places = np.zeros((self.num_chunks, 2), np.int64)  # of the chunks of mapped shards; memory comes with use

    @property
    def num_shards(self) -> int:
        """Shard files of all recordings."""
        return int(self._first_shard[-1])

    @property
    def num_chunks(self) -> int:
        """Chunks of all shards."""
        return len(self._checksums)

    def locate(self, chunks: np.ndarray) -> np.ndarray:
        """Address and size in memory, CRC32C included, of chunks int64 ``[P]``: int64 ``[P, 2]``.

        Raises:
            DamagedFramesError: if a shard is damaged, or does not have a chunk.
        """
        places = self._places[chunks]
        if not places[:, 1].all():
            numbers, which = np.unique(chunks // self.chunks_per_shard, return_inverse=True)
            # Of the shards themselves: another thread may have cleared the table again.
            shards = self._map(numbers.tolist())
            places = np.stack([shard.places for shard in shards])[which, chunks % self.chunks_per_shard]
            if not places[:, 1].all():
                raise self.damaged(int(chunks[places[:, 1].argmin()]), "it was never written")
        return places

    def expected(self, chunks: np.ndarray) -> np.ndarray:
        """CRC32C (uint32 ``[P]``) that each of ``chunks`` (int64 ``[P]``) was committed with; of one not full, any."""
        return self._checksums[chunks]

    def check(self, chunk: int, stored: bytes) -> str:
        """What is wrong with a chunk as it is stored, its CRC32C included, or ``""``."""
        if google_crc32c.value(stored) != _CRC32C_RESIDUE:
            return "the CRC32C does not match"
        try:
            frames = decode(stored[:-4], self.codec, self.chunk_frames)
        except ValueError as error:
            return str(error)
        checksum = int.from_bytes(stored[-4:], "little")
        if chunk in self._partial:
            num_frames, expected = self._partial[chunk]
            if google_crc32c.value(frames[: num_frames * FRAME_BYTES]) != expected:
                return _OTHER
            self._checksums[chunk] = checksum  # What this mapping holds does not change any more.
        return "" if checksum == self._checksums[chunk] else _OTHER

    def check_shard(self, number: int) -> Iterator[DamagedFramesError]:
        """Reads all committed chunks of a shard, in ``0..num_shards - 1``; yields what is wrong with them."""
        recording = self._recording_of_shard(number)
        begin = number * self.chunks_per_shard
        num_chunks = -(-self._recordings[recording].num_frames // self.chunk_frames)
        end = min(begin + self.chunks_per_shard, int(self.first_chunk[recording]) + num_chunks)
        try:
            self._map([number])
        except DamagedFramesError as error:
            yield error
            return
        for chunk in range(begin, end):
            try:
                address, size = self.locate(np.array([chunk])).T
                if reason := self.check(chunk, read_ranges(address, size).tobytes()):
                    yield self.damaged(chunk, reason)
            except DamagedFramesError as error:
                yield error
            except UnreadableRangeError as error:
                yield self.damaged(chunk, str(error))

    def damaged(self, chunk: int, reason: str, *, whole_shard: bool = False) -> DamagedFramesError:
        """An error that names the file and the transitions of a chunk, or of all chunks of its shard."""
        number, local = divmod(chunk, self.chunks_per_shard)
        index = self._recording_of_shard(number)
        recording = self._recordings[index]
        first = (chunk - int(self.first_chunk[index])) * self.chunk_frames
        stop = min(first + (self.chunks_per_shard if whole_shard else 1) * self.chunk_frames, recording.num_frames)
        file, reason = self._path(number), reason if whole_shard else f"chunk {local}: {reason}"
        try:
            first_step, stop_step = recording.steps_of_frames(first, stop)
            transitions, text = (first_step, stop_step - 1), f"transitions {first_step} to {stop_step - 1}"
        except (OSError, ValueError) as error:
            transitions, text = None, f"any transitions ({error})"
        damage = DamagedFramesError(
            f"{file} is damaged or cannot be read: {reason}. It holds the frames of {text} of {recording.game}, "
            f"recording {recording.name!r}"
        )
        damage.file, damage.reason, damage.transitions = file, reason, transitions
        return damage

    def _map(self, numbers: list[int]) -> list[Shard]:
        if len(self._shards) + len(numbers) > _MAX_SHARDS:
            # Access is random, so it does not matter which ones go. Other threads may be reading from these.
            self._retired, self._shards = self._shards, {}
            self._places[:] = 0
        mapped = []
        for number in numbers:
            begin = number * self.chunks_per_shard
            try:
                # Where another thread was faster, its shard is the one that stays mapped.
                shard = self._shards.get(number) or Shard(self._path(number), self.chunks_per_shard)
            except FileNotFoundError as error:
                raise self.damaged(begin, "the file is missing", whole_shard=True) from error
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in OWN_LIMITS:
                    raise
                raise self.damaged(begin, str(error), whole_shard=True) from error
            mapped.append(self._shards.setdefault(number, shard))
            self._places[begin : begin + self.chunks_per_shard] = mapped[-1].places
        return mapped

    def _recording_of_shard(self, number: int) -> int:
        return int(np.searchsorted(self._first_shard, number, side="right")) - 1

    def _path(self, number: int) -> Path:
        index = self._recording_of_shard(number)
        return shard_path(self._recordings[index].path / "frames", number - int(self._first_shard[index]))
