"""Appending episodes to a recording, with an atomic commit."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import tensorstore as ts

from torchrl_sql.data.catalogue import ABSENT, list_recording, locked
from torchrl_sql.data.chunks import StoredFrames
from torchrl_sql.data.frames import Encoding, FrameLayout, create_frame_array, open_frame_array, shard_path
from torchrl_sql.data.recording import EPISODE_DTYPE, MEMBERS, Manifest, Recording, Tail, open_recording
from torchrl_sql.data.shards import Shard
from torchrl_sql.files import write_text
from torchrl_sql.games import FRAME_SHAPE, NUM_ACTIONS, illegal_actions

logger = logging.getLogger(__name__)


class RecordingWriter:
    """Appends episodes to one recording. Made by :meth:`FrameStore.writer`; a context manager.

    Readers see what was committed: :meth:`commit` replaces the manifest after everything it counts is on disk. A
    writer killed at any instant therefore leaves the last committed state, and opening a writer again continues from
    there. Equal episodes give equal files, whatever commits and crashes lay between. Leaving the ``with`` block
    commits, unless an exception is passing through.

    One writer a recording at a time (an advisory lock, released if the process dies).

    Raises:
        ValueError: if the recording exists with another source, kind of rewards or behaviours, if its end is damaged,
            or if its manifest was lost.
        BlockingIOError: if another writer has the recording open.
    """

    def __init__(
        self,
        path: Path,
        *,
        source: str,
        rewards: Literal["raw", "clipped"],
        behaviours: tuple[str, ...],
        labels: tuple[str, ...],
        metadata: Mapping[str, Any] | None,
        encoding: Encoding,
    ) -> None:
        if rewards not in ("raw", "clipped"):
            raise ValueError(f"rewards must be 'raw' or 'clipped', got {rewards!r}")
        if not 1 <= len(behaviours) <= 256:
            raise ValueError(f"behaviours must be 1 to 256 names, got {len(behaviours)}")
        self._path = path
        self._chunk_frames = encoding.chunk_frames
        self._shard_frames = shard_frames = encoding.shard_frames
        self._labels = labels
        metadata = None if metadata is None else self._with_labels(metadata)
        self._path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # Closes what is open so far if the recording turns out not to be appendable.
            stack.enter_context(locked(self._path, wait=False))
            file = self._path / "manifest.json"
            recording = open_recording(self._path)
            committed = None if recording is None else recording.manifest
            given = {"source": source, "rewards": rewards, "behaviours": behaviours, "labels": labels}
            for name, value in given.items():
                if committed is not None and getattr(committed, name) != value:
                    raise ValueError(f"{name} of {file} is {getattr(committed, name)!r}, cannot append {value!r}")
            if recording is None:
                self._array = create_frame_array(self._path / "frames", encoding)
                tail = np.zeros((0, *FRAME_SHAPE), np.uint8)
            else:
                layout = FrameLayout.read(self._path / "frames")
                chunking = (encoding.chunk_frames, encoding.shard_frames)
                if (layout.chunking, layout.codec) != (chunking, encoding.codec):
                    raise ValueError(
                        f"{self._path / 'frames'} must have (chunks, shards) of {chunking} frames in {encoding.codec} "
                        f"as store.json says, got {layout.chunking} in {layout.codec}"
                    )
                self._array = open_frame_array(self._path / "frames")
                tail = self._recover_tail(recording)
            members = [key for key in MEMBERS if key != "labels" or labels]
            self._files = {key: stack.enter_context(self._open_member(key, committed)) for key in members}
            self._open = stack.pop_all()
        self._manifest = committed or Manifest(
            game=path.parent.name,
            run=path.name,
            source=source,
            rewards=rewards,
            behaviours=behaviours,
            num_frames=0,
            num_steps=0,
            num_episodes=0,
            num_sealed_chunks=0,
            tail=Tail(),
            crc32=dict.fromkeys(members, 0),
            metadata=self._with_labels({}),
        )
        self._state_on_disk = ABSENT if committed is None else committed.checksum
        if committed is not None:  # A writer may have been killed between the manifest and the list.
            list_recording(self._path, self._state_on_disk)
        if metadata is not None:
            self._manifest = replace(self._manifest, metadata=metadata)
        self._crc32 = dict(self._manifest.crc32)
        self._num_frames = self._manifest.num_frames
        self._num_steps = self._manifest.num_steps
        self._num_episodes = self._manifest.num_episodes
        self._shard = np.zeros((shard_frames, *FRAME_SHAPE), np.uint8)  # Frames from row self._num_flushed on.
        self._shard[: len(tail)] = tail
        self._num_held = len(tail)
        self._num_flushed = self._num_frames - len(tail)
        self._other_shard = np.zeros((shard_frames, *FRAME_SHAPE), np.uint8)  # What self._writing, if any, is writing.
        self._writing: ts.WriteFutures | None = None
        self._state: Literal["open", "failed", "closed"] = "open"
        self._warned = False

    @property
    def num_steps(self) -> int:
        """Steps added so far, committed or not."""
        return self._num_steps

    @property
    def num_episodes(self) -> int:
        """Episodes added so far, committed or not."""
        return self._num_episodes

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the last commit, or as given when the writer was opened."""
        return self._manifest.metadata

    def add_episode(
        self,
        frames: npt.ArrayLike,
        actions: npt.ArrayLike,
        rewards: npt.ArrayLike,
        terminated: bool,
        *,
        behaviour: int = 0,
        cut: bool = False,
        num_later: int = 0,
        labels: Mapping[str, float] | None = None,
    ) -> None:
        """Adds one episode of ``T`` steps. A warning names the first actions that the game does not know.

        Args:
            frames (uint8 ``[T, 84, 84]`` or ``[T + 1, 84, 84]``): the newest frame of each observation; with ``T + 1``
                the last one is the frame after the last step.
            actions (integers ``[T]``): indices into the 18 full actions.
            rewards (floats ``[T]``): as recorded; within [-1, 1] if the recording's rewards are clipped.
            terminated (bool): the game ended. False: a time-out, or the data ends here; its last step can be sampled
                only if the final frame is there.

        Keyword Args:
            behaviour (int): which of the recording's behaviours acted.
            cut (bool): the data does not show how the episode ended; it counts in no return and no number of episodes.
            num_later (int): how many of the episodes added so far, the last ones in the order of play, were played
                after this one.
            labels (mapping): a finite number for each of the recording's labels.

        Raises:
            ValueError: for other shapes, dtypes or values; the episode is not added.
        """
        self._check_open()
        frames, actions, rewards = np.asarray(frames), np.asarray(actions), np.asarray(rewards)
        if actions.ndim != 1 or actions.dtype.kind not in "iu" or not actions.size:
            raise ValueError(f"actions must be integers [T] with T >= 1, got {actions.dtype} {list(actions.shape)}")
        num_steps = len(actions)
        if frames.dtype != np.uint8 or frames.shape[1:] != FRAME_SHAPE or len(frames) - num_steps not in (0, 1):
            raise ValueError(
                f"frames must be uint8 [T, 84, 84] or [T + 1, 84, 84] with T = {num_steps} actions, "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if rewards.shape != (num_steps,) or rewards.dtype.kind not in "fiu":
            raise ValueError(f"rewards must be numbers [{num_steps}], got {rewards.dtype} {list(rewards.shape)}")
        if actions.min() < 0 or actions.max() >= NUM_ACTIONS:
            raise ValueError(f"actions must lie in 0..{NUM_ACTIONS - 1}, got {actions.min()}..{actions.max()}")
        limit = 1.0 if self._manifest.rewards == "clipped" else np.finfo(np.float32).max
        allowed = (-limit <= rewards) & (rewards <= limit)  # of int8, abs(-128) is -128
        if not allowed.all():
            kind = "within [-1, 1] (this recording's rewards are clipped)" if limit == 1.0 else "finite"
            raise ValueError(f"rewards must be {kind}, got {rewards[~allowed][0]}")
        for name, flag in (("terminated", terminated), ("cut", cut)):
            if not isinstance(flag, (bool, np.bool_)):
                raise ValueError(f"{name} must be a bool, got {flag!r}")
        for name, number in (("behaviour", behaviour), ("num_later", num_later)):
            if not isinstance(number, Integral):
                raise ValueError(f"{name} must be an integer, got {number!r}")
        if cut and terminated:
            raise ValueError("an episode that terminated is not cut: got cut=True with terminated=True")
        if not 0 <= behaviour < len(self._manifest.behaviours):
            raise ValueError(f"behaviour must lie in 0..{len(self._manifest.behaviours) - 1}, got {behaviour}")

        if not 0 <= num_later <= self._num_episodes:
            raise ValueError(f"num_later must lie in 0..{self._num_episodes}, got {num_later}")
        labels = {} if labels is None else labels
        if {*labels} != {*self._labels} or not np.isfinite([*labels.values()]).all():
            raise ValueError(f"labels must be finite numbers named {list(self._labels)}, got {dict(labels)}")

        episode = np.zeros(1, EPISODE_DTYPE)
        episode[0] = (self._num_frames, num_steps, terminated, len(frames) > num_steps, behaviour, cut, num_later)
        self._warn_of_illegal(actions)
        with self._failing():
            self._append("actions", actions.astype(np.uint8))
            self._append("rewards", rewards.astype("<f4"))
            self._append("episodes", episode)
            if self._labels:
                self._append("labels", np.array([labels[name] for name in self._labels], "<f8"))
            self._hold(frames)
            self._num_frames += len(frames)
            self._num_steps += num_steps
            self._num_episodes += 1

    def commit(self, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Publishes everything added so far, atomically; all or nothing of it survives a crash.

        Keyword Args:
            metadata (mapping of JSON values, optional): replaces the recording's metadata in the same instant.
        """
        self._check_open()
        if metadata is None and self._num_episodes == self._manifest.num_episodes:
            return
        with self._failing():
            tail = self._write_tail()
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            manifest = replace(
                self._manifest,
                num_frames=self._num_frames,
                num_steps=self._num_steps,
                num_episodes=self._num_episodes,
                num_sealed_chunks=self._num_flushed // self._chunk_frames,
                tail=tail,
                crc32=dict(self._crc32),
                metadata=self._manifest.metadata if metadata is None else self._with_labels(metadata),
            )
            list_recording(self._path, self._state_on_disk, manifest.checksum)
            write_text(self._path / "manifest.json", manifest.to_json())
            list_recording(self._path, manifest.checksum)
            self._manifest, self._state_on_disk = manifest, manifest.checksum

    def close(self, *, commit: bool = True) -> None:
        """Commits (unless told not to) and releases the recording. Closing twice does nothing."""
        if self._state == "closed":
            return
        try:
            if commit and self._state == "open":
                self.commit()
        finally:
            self._state = "closed"
            with suppress(ValueError, OSError):  # Of a writer that failed or does not commit: nobody needs it.
                self._finish_write()
            self._open.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    def _warn_of_illegal(self, actions: np.ndarray) -> None:
        game = self._manifest.game
        illegal = illegal_actions(game, np.bincount(actions, minlength=NUM_ACTIONS).tolist())
        if illegal and not self._warned:
            self._warned = True
            logger.warning(
                "%s, episode %d: not legal in %s, act as NOOP: %s of %d actions. An index into the minimal set "
                "becomes a full action through find_game(%r).minimal_actions",
                *(self._path, self._num_episodes, game, illegal, len(actions), game),
            )

    def _check_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(f"the writer of {self._path} is {self._state}; open a new one")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Marks the writer as failed if the body raises: what is in memory no longer matches the disk."""
        try:
            yield
        except BaseException:
            self._state = "failed"
            raise

    def _with_labels(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return _json_copy({**metadata, "labels": self._labels} if self._labels else metadata)

    def _append(self, key: str, records: np.ndarray) -> None:
        data = records.tobytes()
        self._files[key].write(data)
        self._crc32[key] = zlib.crc32(data, self._crc32[key])

    def _open_member(self, key: str, committed: Manifest | None) -> BinaryIO:
        """Opens a flat file at its committed end; what a killed writer left after it is cut off."""
        name, dtype, count_field = MEMBERS[key]
        size = 0 if committed is None else getattr(committed, count_field) * dtype.itemsize
        path = self._path / name
        if committed is None:
            path.write_bytes(b"")
        elif not path.is_file() or path.stat().st_size < size:
            raise ValueError(f"{path} must hold the {size} committed bytes: it is missing or shorter")
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _recover_tail(self, recording: Recording) -> np.ndarray:
        """Removes shards of a killed writer; returns the committed frames of the last, partly filled shard."""
        full = recording.num_frames - recording.num_frames % self._shard_frames
        tail = StoredFrames([recording])[np.arange(full, recording.num_frames)]
        end = full + self._shard_frames if len(tail) else full
        if self._array.shape[0] > end:
            self._array = self._array.resize(exclusive_max=[end, *FRAME_SHAPE]).result()
        return tail

    def _hold(self, frames: np.ndarray) -> None:
        """Copies frames into the shard in memory; a full one is written while the next one fills."""
        while len(frames):
            part = frames[: self._shard_frames - self._num_held]
            self._shard[self._num_held : self._num_held + len(part)] = part
            self._num_held += len(part)
            frames = frames[len(part) :]
            if self._num_held == self._shard_frames:
                self._finish_write()
                self._writing = self._write_shard()
                self._shard, self._other_shard = self._other_shard, self._shard
                self._num_flushed += self._shard_frames
                self._num_held = 0

    def _write_tail(self) -> Tail:
        """Writes the frames after the last full shard; returns their checksums."""
        self._finish_write()
        tail = Tail()
        if self._num_held:
            self._shard[self._num_held :] = 0
            self._write_shard().result()
            num_chunks, rest = divmod(self._num_held, self._chunk_frames)
            checksums = self._stored_checksums(self._num_flushed, num_chunks)
            rest_frames = self._shard[self._num_held - rest : self._num_held]
            tail = Tail(chunks=checksums.tobytes().hex(), frames=google_crc32c.value(rest_frames.tobytes()))
        self._set_rows(self._num_frames)
        return tail

    def _write_shard(self) -> ts.WriteFutures:
        """Starts to write the whole shard: the file is replaced in one rename and never depends on what was there."""
        end = self._num_flushed + self._shard_frames
        self._set_rows(end)
        # Without a copy: nobody touches this memory before the write is finished, or reads it through TensorStore.
        rows = self._array[self._num_flushed : end]
        return rows.write(self._shard, can_reference_source_data_indefinitely=True)

    def _finish_write(self) -> None:
        """Waits for the full shard that is being written, and notes the checksums of its chunks for good."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
            num_chunks = self._shard_frames // self._chunk_frames
            self._append("chunks", self._stored_checksums(self._num_flushed - self._shard_frames, num_chunks))

    def _stored_checksums(self, first_frame: int, num_chunks: int) -> np.ndarray:
        path = shard_path(self._path / "frames", first_frame // self._shard_frames)
        return Shard(path, self._shard_frames // self._chunk_frames).checksums(num_chunks)

    def _set_rows(self, rows: int) -> None:
        if self._array.shape[0] != rows:
            self._array = self._array.resize(exclusive_max=[rows, *FRAME_SHAPE], resize_metadata_only=True).result()


def _json_copy(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON values: {error}") from error
