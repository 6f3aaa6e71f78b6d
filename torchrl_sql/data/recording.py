"""One recording of a store: its manifest and flat files, read-only."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from torchrl_sql.data.catalogue import ABSENT, contradiction, list_recording
from torchrl_sql.data.frames import open_frame_array
from torchrl_sql.files import json_field, read_json, write_text
from torchrl_sql.games import NUM_ACTIONS, find_game

RUN_FORMAT = "torchrl_sql.run"
VERSION = 2
"""Of the store's format: the one that this package reads and writes. Version 1 had no checksums of chunks."""

EPISODE_DTYPE = np.dtype(
    {
        "names": ["first_frame", "num_steps", "terminated", "has_final_frame", "component", "cut", "num_later"],
        "formats": ["<i8", "<i8", "?", "?", "u1", "?", "<u4"],
        "offsets": [0, 8, 16, 17, 18, 19, 20],
        "itemsize": 24,
    }
)
"""``first_frame``: row of the episode's first frame. ``has_final_frame``: the frame after the last step is stored, so
the episode has ``num_steps + 1`` frames. ``component``: which behaviour policy, an index into the manifest's names.
``cut``: the source does not show how it ended, so that it is no whole episode and has no return. ``num_later``: how
many of the episodes before it in the file were played after it."""

CHECKSUM_DTYPE = np.dtype("<u4")
"""CRC32C of one chunk as it is stored."""

MEMBERS: dict[str, tuple[str, np.dtype, str]] = {
    "actions": ("actions.u8", np.dtype("u1"), "num_steps"),
    "rewards": ("rewards.f32", np.dtype("<f4"), "num_steps"),
    "episodes": ("episodes.bin", EPISODE_DTYPE, "num_episodes"),
    "chunks": ("chunks.crc32c", CHECKSUM_DTYPE, "num_sealed_chunks"),
    "labels": ("labels.f64", np.dtype("<f8"), "num_labels"),
}
"""Flat files of a recording: file name, record type, and which count of the manifest gives its length. A recording
without labels has none for them."""


def as_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names of behaviours or labels; a lone string is not taken for its letters.

    Raises:
        ValueError: if they are not a sequence of strings.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a sequence of names, got {names!r}")
    return tuple(names)


def never_written(key: str, values: np.ndarray) -> np.ndarray:
    """Positions of actions, rewards or labels that no writer accepts: their file is damaged."""
    if key == "actions":
        return np.flatnonzero(values >= NUM_ACTIONS)
    return np.flatnonzero(~np.isfinite(values)) if key in ("rewards", "labels") else np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What the frames after the last full shard are. Their shard is written again at each commit.

    Attributes:
        chunks (str): CRC32C of each full chunk as stored, little endian, in hexadecimal digits.
        frames (int): CRC32C of the frames after the last full chunk, decoded: their chunk changes with the next commit.
    """

    chunks: str = ""
    frames: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a recording holds; written to ``manifest.json`` with a checksum of its own.

    Attributes:
        game, run (str): names of game and recording, equal to the folders'.
        source (str): where the data came from, for people.
        rewards (str): ``"raw"`` as the game scored them, or ``"clipped"`` to [-1, 1] by the source.
        behaviours (tuple of str): names of the behaviour policies.
        num_frames, num_steps, num_episodes (int): committed counts.
        num_sealed_chunks (int): chunks in full shards, which are never written again.
        tail (Tail): checksums of the frames after them.
        crc32 (mapping): CRC32 of the committed part of each flat file.
        metadata (mapping): JSON values of the writer's own, for example where an import stopped; and ``"labels"``, the
            names of the numbers that ``labels.f64`` has of each episode.
    """

    game: str
    run: str
    source: str
    rewards: Literal["raw", "clipped"]
    behaviours: tuple[str, ...]
    num_frames: int
    num_steps: int
    num_episodes: int
    num_sealed_chunks: int
    tail: Tail
    crc32: Mapping[str, int]
    metadata: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers that were noted of each episode; of most recordings none."""
        return tuple(self.metadata["labels"]) if "labels" in self.crc32 else ()

    @property
    def num_labels(self) -> int:
        """Of all episodes together."""
        return len(self.labels) * self.num_episodes

    @property
    def members(self) -> list[str]:
        """Which of :data:`MEMBERS` the recording has."""
        return [key for key in MEMBERS if key != "labels" or self.labels]

    @property
    def checksum(self) -> str:
        """CRC32 of all fields, eight hexadecimal digits."""
        return f"{zlib.crc32(json.dumps(self._fields(), sort_keys=True).encode()):08x}"

    def to_json(self) -> str:
        """The text of ``manifest.json``: the same bytes for the same contents."""
        return json.dumps({**self._fields(), "checksum": self.checksum}, indent=1, sort_keys=True) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = {"format": RUN_FORMAT, "version": VERSION, **vars(self), "tail": vars(self.tail)}
        fields["components"] = fields.pop("behaviours")  # the key on disk
        return fields

    @classmethod
    def read(cls, path: Path, text: str | None = None) -> Manifest:
        """Reads and checks ``manifest.json``; with ``text``, what it held once, that.

        Raises:
            ValueError: if it is not a manifest, is of another version, was changed, or contradicts its folder.
        """
        written = path.read_bytes() if text is None else text.encode()
        fields = read_json(path, RUN_FORMAT, version=VERSION, text=text)
        fields["behaviours"] = tuple(json_field(fields, "components", list, path))
        del fields["components"]
        for key, kind in (("source", str), ("crc32", dict), ("metadata", dict), ("checksum", str)):
            json_field(fields, key, kind, path)
        if "labels" in fields["crc32"]:
            json_field(fields["metadata"], "labels", list, path)
        for key in ("num_frames", "num_steps", "num_episodes", "num_sealed_chunks"):
            if json_field(fields, key, int, path) < 0:
                raise ValueError(f"{path}: {key} must be >= 0, got {fields[key]}")
        if fields.get("rewards") not in ("raw", "clipped"):
            raise ValueError(f"{path}: rewards must be 'raw' or 'clipped', got {fields.get('rewards')!r}")
        for key, expected in (("game", path.parent.parent.name), ("run", path.parent.name)):
            if json_field(fields, key, str, path) != expected:
                raise ValueError(f"{path}: {key} must be {expected!r} as its folder is, got {fields[key]!r}")
        del fields["checksum"]
        try:
            manifest = cls(**{**fields, "tail": Tail(**json_field(fields, "tail", dict, path))})
        except TypeError as error:
            raise ValueError(f"{path} is not a recording's manifest: {error}") from error
        if manifest.to_json().encode() != written:
            raise ValueError(f"{path} is not what was committed: its checksum is another")
        return manifest


class Recording:
    """The committed part of one recording, as it was when this object was made.

    Args:
        path (Path): the recording's folder.
        manifest (Manifest, optional): an earlier state of the recording to read; default is the newest committed one.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = manifest if manifest is not None else Manifest.read(path / "manifest.json")
        try:
            find_game(self.game)
        except ValueError as error:
            raise ValueError(f"{path / 'manifest.json'}: {error}") from error

    @property
    def game(self) -> str:
        """Name of the game."""
        return self.manifest.game

    @property
    def name(self) -> str:
        """Name of the recording within its game."""
        return self.manifest.run

    @property
    def num_frames(self) -> int:
        """Committed frames."""
        return self.manifest.num_frames

    @property
    def num_steps(self) -> int:
        """Committed agent steps (transitions)."""
        return self.manifest.num_steps

    @property
    def num_episodes(self) -> int:
        """Committed episodes."""
        return self.manifest.num_episodes

    @cached_property
    def actions(self) -> np.ndarray:
        """uint8 ``[num_steps]``, read into memory: indices into the 18 full actions."""
        return self._read_member("actions")

    @cached_property
    def rewards(self) -> np.ndarray:
        """float32 ``[num_steps]``, read into memory: as the source recorded them."""
        return self._read_member("rewards")

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """float64 ``[num_episodes]`` by name: what was noted of each episode, in the order in which they were played.

        Raises:
            ValueError: if they are damaged.
        """
        return dict(zip(self.manifest.labels, self.stored_labels[self._time_order].T, strict=True))

    @cached_property
    def episodes(self) -> np.ndarray:
        """:data:`EPISODE_DTYPE` ``[num_episodes]``, in the order in which they were played.

        Raises:
            ValueError: if the table is damaged, or is not that of the manifest.
        """
        return self.stored_episodes[self._time_order]

    def first_steps(self) -> np.ndarray:
        """int64 ``[num_episodes]``: row of each episode's first step in ``actions`` and ``rewards``."""
        num_steps = self.stored_episodes["num_steps"]
        return (np.cumsum(num_steps) - num_steps)[self._time_order]

    def chunk_checksums(self) -> np.ndarray:
        """uint32 ``[num_frames // chunk_frames]``: CRC32C of each full committed chunk as it is stored.

        Raises:
            ValueError: if they are missing.
        """
        tail = np.frombuffer(bytes.fromhex(self.manifest.tail.chunks), CHECKSUM_DTYPE)
        return np.concatenate([self._read_member("chunks"), tail])

    def member_file(self, key: str) -> Path:
        """The flat file of that key in :data:`MEMBERS`, which holds at least what was committed.

        Raises:
            ValueError: if it does not.
        """
        name, dtype, count_field = MEMBERS[key]
        path, count = self.path / name, getattr(self.manifest, count_field)
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes is None or num_bytes < count * dtype.itemsize:
            state = "is missing" if num_bytes is None else f"has {num_bytes} bytes"
            raise ValueError(f"{path} {state}: {count} committed records need {count * dtype.itemsize} bytes")
        return path

    def open_frames(self) -> ts.TensorStore:
        """Opens the frame array; only its first ``num_frames`` rows are committed.

        Raises:
            FileNotFoundError, ValueError: if the array is missing, malformed or shorter than the manifest says.
        """
        array = open_frame_array(self.path / "frames")
        if array.shape[0] < self.num_frames:
            raise ValueError(
                f"{self.path / 'frames'} must hold the {self.num_frames} committed frames, got {array.shape[0]}"
            )
        return array

    def steps_of_frames(self, first: int, stop: int) -> tuple[int, int]:
        """First step, and one past the last, whose newest frame is among the frames ``first..stop - 1``.

        The frame after an episode's last step counts as that step's.
        """
        first_frame, num_steps = self.stored_episodes["first_frame"], self.stored_episodes["num_steps"]
        first_step = np.cumsum(num_steps) - num_steps

        def step(frame: int) -> int:
            episode = np.searchsorted(first_frame, frame, side="right") - 1
            return int(first_step[episode] + min(frame - first_frame[episode], num_steps[episode] - 1))

        return step(first), step(stop - 1) + 1

    def episode_returns(self) -> np.ndarray:
        """float64 ``[num_episodes]``: undiscounted sums of the stored rewards (clipped ones if the source clipped)."""
        if not self.num_episodes:
            return np.zeros(0)
        num_steps = self.stored_episodes["num_steps"]
        return np.add.reduceat(self.rewards, np.cumsum(num_steps) - num_steps, dtype=np.float64)[self._time_order]

    @cached_property
    def stored_episodes(self) -> np.ndarray:
        """:data:`EPISODE_DTYPE` ``[num_episodes]`` as stored; frames and steps follow each other without a gap.

        Raises:
            ValueError: as :attr:`episodes`.
        """
        table, path = self._read_member("episodes"), self.path / MEMBERS["episodes"][0]
        if zlib.crc32(table.tobytes()) != self.manifest.crc32.get("episodes"):
            raise ValueError(f"{path} is damaged: its CRC32 does not match the manifest")
        num_steps = table["num_steps"]
        ends = np.cumsum(num_steps + table["has_final_frame"])
        counts = {"num_steps": int(num_steps.sum()), "num_frames": int(ends[-1]) if len(ends) else 0}
        for key, count in counts.items():
            if count != getattr(self.manifest, key):
                raise ValueError(f"{path} has {key} {count}, its manifest says {getattr(self.manifest, key)}")
        if (num_steps < 1).any() or (table["first_frame"] != np.concatenate([[0], ends])[:-1]).any():
            raise ValueError(f"{path} must list episodes of at least one step, each where the one before ends")
        if (table["num_later"] > np.arange(len(table))).any():
            raise ValueError(f"{path} puts an episode before the first")
        return table

    @cached_property
    def stored_labels(self) -> np.ndarray:
        """float64 ``[num_episodes, num labels]`` as stored.

        Raises:
            ValueError: as :attr:`labels`.
        """
        if not self.manifest.labels:
            return np.zeros((self.num_episodes, 0))
        values, path = self._read_member("labels"), self.path / MEMBERS["labels"][0]
        if zlib.crc32(values.tobytes()) != self.manifest.crc32["labels"]:
            raise ValueError(f"{path} is damaged: its CRC32 does not match the manifest")
        return values.reshape(self.num_episodes, len(self.manifest.labels))

    @cached_property
    def _time_order(self) -> np.ndarray:
        """int64 ``[num_episodes]``: rows of the table in the order in which the episodes were played."""
        num_later = self.stored_episodes["num_later"]
        order = np.arange(len(num_later))
        for row in np.flatnonzero(num_later):
            order[row - num_later[row] : row + 1] = np.roll(order[row - num_later[row] : row + 1], 1)
        return order

    def _read_member(self, key: str) -> np.ndarray:
        _, dtype, count_field = MEMBERS[key]
        count = getattr(self.manifest, count_field)
        records = np.fromfile(self.member_file(key), dtype, count)
        if len(records) < count:
            raise ValueError(f"{self.path / MEMBERS[key][0]} was cut while it was read")
        if len(rows := never_written(key, records)):
            raise ValueError(f"{self.path / MEMBERS[key][0]} is damaged: row {rows[0]} is {records[rows[0]]}")
        return records


def restore_recording(path: Path, manifest: str) -> None:
    """Makes an earlier state of a recording the present one; what was committed after it is lost.

    No writer may have it open. The next one cuts off the files at the end of this state.

    Args:
        path (Path): the recording's folder.
        manifest (str): the text of its ``manifest.json`` at the time, see :meth:`Manifest.to_json`. Whether the files
            hold that state is not checked here (:func:`~torchrl_sql.data.damage.check_state`).

    Raises:
        ValueError: if the recording is damaged, or the text is not a manifest of it.
    """
    file = path / "manifest.json"
    present = Manifest.read(file)
    if present.to_json() == manifest:
        return
    list_recording(path, present.checksum, Manifest.read(file, manifest).checksum)
    write_text(file, manifest)
    list_recording(path, Manifest.read(file).checksum)


def drop_recording(recording: Recording) -> None:
    """Takes back all that was committed of a recording, so that the next writer begins anew.

    No writer may have it open.
    """
    list_recording(recording.path, ABSENT, recording.manifest.checksum)
    (recording.path / "manifest.json").unlink()


def open_recording(path: Path) -> Recording | None:
    """The recording in a folder as the store's list has it; None if it has not been committed.

    Raises:
        ValueError: if it is damaged, lost, or not the one that the list is of.
    """
    file, before = path / "manifest.json", None
    while True:
        manifest = Manifest.read(file) if file.exists() else None
        state = ABSENT if manifest is None else manifest.checksum
        reason = contradiction(path, state)
        if not reason:
            return None if manifest is None else Recording(path, manifest)
        if state == before:
            raise ValueError(f"{path}: {reason}")
        before = state  # A writer may have committed in between.


def fingerprint(recordings: Sequence[Recording]) -> str:
    """SHA-256 over the manifests of ``recordings``, in order: over all that was committed, frames included."""
    digest = hashlib.sha256()
    for recording in recordings:
        digest.update(recording.manifest.to_json().encode())
    return digest.hexdigest()
