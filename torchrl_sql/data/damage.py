"""Every checksum of a store."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchrl_sql.data.recording import MEMBERS, Recording, open_recording
from torchrl_sql.data.shards import ShardFiles
from torchrl_sql.data.store import FrameStore, recording_folders

_READ_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something in a store that is not what was written.

    Attributes:
        game, recording (str): names of the folders.
        file (Path): the damaged or missing file.
        reason (str): what is wrong with it; for frames, which chunk.
        transitions (tuple of int, optional): first and last transition of the recording (rows of its actions and
            rewards) whose frames are affected; None: any may be.
    """

    game: str
    recording: str
    file: Path
    reason: str
    transitions: tuple[int, int] | None = None

    def __str__(self) -> str:
        span = "all transitions" if self.transitions is None else "transitions {} to {}".format(*self.transitions)
        return f"{self.game}, recording {self.recording!r}, {span}: {self.file}: {self.reason}"


def verify(store: FrameStore, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Damage]:
    """Reads a whole store once and compares every checksum; goes on after each damage.

    Checked is what is committed: that every recording which was is there and in its last state, CRC32 of the flat
    files, that the episode table is that of the manifest, that frames are encoded as the store says, shard indices, and
    that every chunk of frames is the one that was committed there. What a killed writer left behind the committed rows
    is not looked at.

    Args:
        store (FrameStore): what to check.

    Keyword Args:
        progress (callable): is given the number of files done and of all files, after each one.

    Yields:
        Damage, recording by recording; nothing if the store is intact.
    """
    checks: list[Callable[[], Iterator[Damage]]] = []
    for folder in recording_folders(store.path):
        try:
            recording = open_recording(folder)
            if recording is None:
                continue
            checks += [partial(_check_member, recording, key) for key in recording.manifest.members]
            files = ShardFiles([recording])
            found = (files.codec, files.chunk_frames, files.chunk_frames * files.chunks_per_shard)
            wanted = (store.encoding.codec, store.encoding.chunk_frames, store.encoding.shard_frames)
            if found != wanted:
                reason = f"codec and frames per chunk and shard must be {wanted} as store.json has them, got {found}"
                file = folder / "frames" / "zarr.json"
                yield Damage(game=recording.game, recording=recording.name, file=file, reason=reason)
            checks += [partial(_check_shard, recording, files, shard) for shard in range(files.num_shards)]
        except (OSError, ValueError) as error:
            yield Damage(game=folder.parent.name, recording=folder.name, file=folder, reason=str(error))
    for index, check in enumerate(checks):
        yield from check()
        progress(index + 1, len(checks))


def check_state(recording: Recording, *, every_shard: bool = False) -> Iterator[Damage]:
    """Compares the flat files and the last shard of a recording, or of an earlier state of one, with its manifest.

    What is intact so far is of that state: the files have the checksums of all earlier shards.

    Args:
        recording (Recording): what to check.

    Keyword Args:
        every_shard (bool): check the earlier shards, too.

    Yields:
        As :func:`verify`.
    """
    for key in recording.manifest.members:
        yield from _check_member(recording, key)
    files = ShardFiles([recording])
    for shard in range(0 if every_shard else max(files.num_shards - 1, 0), files.num_shards):
        yield from _check_shard(recording, files, shard)


def _check_member(recording: Recording, key: str) -> Iterator[Damage]:
    name, dtype, count_field = MEMBERS[key]
    file, size = recording.path / name, getattr(recording.manifest, count_field) * dtype.itemsize

    def reason() -> str:
        crc32, left = 0, size
        try:
            with file.open("rb") as stream:
                while left and (data := stream.read(min(left, _READ_BYTES))):
                    crc32 = zlib.crc32(data, crc32)
                    left -= len(data)
            if left:
                return f"must hold {size} committed bytes, got {size - left}"
            if crc32 != recording.manifest.crc32.get(key):
                return "the CRC32 does not match the manifest"
            if key == "episodes":
                _ = recording.episodes
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    if text := reason():
        yield Damage(game=recording.game, recording=recording.name, file=file, reason=text)


def _check_shard(recording: Recording, files: ShardFiles, shard: int) -> Iterator[Damage]:
    for error in files.check_shard(shard):
        yield Damage(
            game=recording.game,
            recording=recording.name,
            file=error.file,
            reason=error.reason,
            transitions=error.transitions,
        )
