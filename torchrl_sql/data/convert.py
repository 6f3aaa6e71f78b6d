"""A store with another codec."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from torchrl_sql.data.catalogue import locked
from torchrl_sql.data.chunks import StoredFrames
from torchrl_sql.data.damage import check_state
from torchrl_sql.data.export import check_free
from torchrl_sql.data.frames import CODECS, Codec
from torchrl_sql.data.recording import Recording, drop_recording
from torchrl_sql.data.store import FrameStore
from torchrl_sql.files import sync_folder


def convert(
    store: FrameStore,
    path: str | os.PathLike[str],
    *,
    codec: Codec,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FrameStore:
    """Writes all that is committed in a store into a new one with another codec: the same transitions, in their order.

    The store appears when it is whole and was read back. The same call continues a conversion that was stopped, reads
    back anew what was written before, and ends in the same files. Metadata goes along, so that a collection can be
    continued there. The fingerprint is another: checkpoints belong to the store that they were trained on.

    Args:
        store (FrameStore): what to convert; it stays as it is.
        path (path): the new folder.

    Keyword Args:
        codec (str): see :class:`~torchrl_sql.data.frames.Encoding`; chunks and shards keep their sizes.
        progress (callable): is given the number of frames done and of all.

    Raises:
        FileExistsError: if ``path`` is there already.
        ValueError: if the store has this codec, its chunks are too large for it, or a part of it is not what was
            committed; or if what was written of a recording is not that, or cannot be read. That recording begins anew
            with the next call.
    """
    target = Path(path)
    check_free(target)
    if codec == store.encoding.codec:
        raise ValueError(f"{store.path} is in {codec} already")
    recordings, encoding = store.recordings, asdict(replace(store.encoding, codec=codec))
    # Of this state of this store: what is left of another conversion is never taken for it.
    unfinished = target.with_name(f".{target.name}.{codec}-{store.fingerprint()[:16]}.unfinished-conversion")
    _remove_others(target, unfinished)
    new = FrameStore.create(unfinished, **encoding, exist_ok=True)
    total, done = sum(recording.num_frames for recording in recordings), 0
    for recording in recordings:
        for num_frames in _convert_recording(recording, new):
            progress(done + num_frames, total)
        done += recording.num_frames
    os.replace(unfinished, target)
    sync_folder(target.parent)
    return FrameStore.open(target)


def _remove_others(target: Path, unfinished: Path) -> None:
    """Removes what other conversions of that name left, such as of an earlier state, unless one is being written."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.({'|'.join(CODECS)})-[0-9a-f]{{16}}\.unfinished-conversion")
    for other in target.parent.glob(".*.unfinished-conversion"):
        if other != unfinished and pattern.fullmatch(other.name):
            with ExitStack() as stack, suppress(BlockingIOError):
                for recording in other.glob("*/*/"):
                    stack.enter_context(locked(recording, wait=False))
                shutil.rmtree(other)


def _convert_recording(recording: Recording, new: FrameStore) -> Iterator[int]:
    """Yields the number of its frames done, after each episode."""
    manifest, frames = recording.manifest, StoredFrames([recording])
    with new.writer(
        recording.game,
        run=recording.name,
        source=manifest.source,
        rewards=manifest.rewards,
        behaviours=manifest.behaviours,
        labels=manifest.labels,
    ) as writer:
        # Rows of actions and rewards have no checksum each: they are compared as a whole, before any is copied.
        for damage in check_state(recording):
            raise ValueError(damage)
        actions, rewards, labels = recording.actions, recording.rewards, recording.stored_labels
        step, uncommitted = writer.num_steps, 0
        for number, episode in enumerate(recording.stored_episodes[writer.num_episodes :], writer.num_episodes):
            first_frame, num_steps = int(episode["first_frame"]), int(episode["num_steps"])
            num_frames = num_steps + int(episode["has_final_frame"])
            steps = slice(step, step + num_steps)
            writer.add_episode(
                frames[np.arange(first_frame, first_frame + num_frames)],
                actions[steps],
                rewards[steps],
                bool(episode["terminated"]),
                behaviour=int(episode["component"]),
                cut=bool(episode["cut"]),
                num_later=int(episode["num_later"]),
                labels=dict(zip(manifest.labels, labels[number].tolist(), strict=True)),
            )
            step, uncommitted = step + num_steps, uncommitted + num_frames
            if uncommitted >= new.encoding.shard_frames:
                writer.commit()
                uncommitted = 0
            yield first_frame + num_frames
        writer.commit(metadata=manifest.metadata)
    converted = new.recording(recording.game, recording.name)
    with locked(converted.path, wait=False):  # so that nobody removes it meanwhile
        if reason := _difference(converted, recording):
            drop_recording(converted)
            raise ValueError(f"what was written is not what is to be converted, and was dropped: {reason}. Start again")


def _difference(converted: Recording, recording: Recording) -> str:
    """What is wrong with the copy of a recording, read back as a whole, or ``""``."""
    for key in recording.manifest.members:
        if key != "chunks" and converted.manifest.crc32[key] != recording.manifest.crc32[key]:
            return f"{key} are not those of {recording.path}"
    return next((str(damage) for damage in check_state(converted, every_shard=True)), "")
