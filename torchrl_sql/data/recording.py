"""One recording of a store: its manifest and flat files, read-only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from torchrl_sql.data.frames import open_frame_array
from torchrl_sql.files import json_field, read_json
from torchrl_sql.games import GAMES

RUN_FORMAT = "torchrl_sql.run"
VERSION = 1
"""Newest format version this package reads, and the one it writes."""

EPISODE_DTYPE = np.dtype(
    {
        "names": ["first_frame", "num_steps", "terminated", "has_final_frame", "component", "cut"],
        "formats": ["<i8", "<i8", "?", "?", "u1", "?"],
        "offsets": [0, 8, 16, 17, 18, 19],
        "itemsize": 24,
    }
)
"""``first_frame``: row of the episode's first frame. ``has_final_frame``: the frame after the last step is stored, so
the episode has ``num_steps + 1`` frames. ``component``: which behaviour policy, an index into the manifest's names.
``cut``: the source does not show how it ended, so that it is no whole episode and has no return."""

MEMBERS: dict[str, tuple[str, np.dtype, str]] = {
    "actions": ("actions.u8", np.dtype("u1"), "num_steps"),
    "rewards": ("rewards.f32", np.dtype("<f4"), "num_steps"),
    "episodes": ("episodes.bin", EPISODE_DTYPE, "num_episodes"),
}
"""Flat files of a recording: file name, record type, and which count of the manifest gives its length."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a recording holds; written to ``manifest.json``.

    Attributes:
        game, run (str): names of game and recording, equal to the folders'.
        source (str): where the data came from, for people.
        rewards (str): ``"raw"`` as the game scored them, or ``"clipped"`` to [-1, 1] by the source.
        behaviours (tuple of str): names of the behaviour policies.
        num_frames, num_steps, num_episodes (int): committed counts.
        crc32 (mapping): CRC32 of the committed part of each flat file.
        metadata (mapping): JSON values of the writer's own, for example where an import stopped.
    """

    game: str
    run: str
    source: str
    rewards: Literal["raw", "clipped"]
    behaviours: tuple[str, ...]
    num_frames: int
    num_steps: int
    num_episodes: int
    crc32: Mapping[str, int]
    metadata: Mapping[str, Any]

    def to_json(self) -> str:
        """The text of ``manifest.json``: the same bytes for the same contents."""
        fields = {"format": RUN_FORMAT, "version": VERSION, **vars(self)}
        fields["components"] = fields.pop("behaviours")  # the key on disk
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads and checks ``manifest.json``.

        Raises:
            ValueError: if it is not a manifest, is newer than this package, or contradicts its folder.
        """
        fields = read_json(path, RUN_FORMAT, newest_version=VERSION)
        fields["behaviours"] = tuple(json_field(fields, "components", list, path))
        del fields["components"]
        for key, kind in (("source", str), ("crc32", dict), ("metadata", dict)):
            json_field(fields, key, kind, path)
        for key in ("num_frames", "num_steps", "num_episodes"):
            if json_field(fields, key, int, path) < 0:
                raise ValueError(f"{path}: {key} must be >= 0, got {fields[key]}")
        if fields.get("rewards") not in ("raw", "clipped"):
            raise ValueError(f"{path}: rewards must be 'raw' or 'clipped', got {fields.get('rewards')!r}")
        for key, expected in (("game", path.parent.parent.name), ("run", path.parent.name)):
            if json_field(fields, key, str, path) != expected:
                raise ValueError(f"{path}: {key} must be {expected!r} as its folder is, got {fields[key]!r}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"{path} is not a recording's manifest: {error}") from error


class Recording:
    """The committed part of one recording, as it was when this object was made.

    Args:
        path (Path): the recording's folder.
        manifest (Manifest, optional): an earlier state of the recording to read; default is the newest committed one.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = manifest if manifest is not None else Manifest.read(path / "manifest.json")
        if self.game not in GAMES:
            raise ValueError(f"{path / 'manifest.json'}: unknown game {self.game!r}")

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
        """uint8 ``[num_steps]``, memory-mapped: indices into the 18 full actions."""
        return self._member("actions")

    @cached_property
    def rewards(self) -> np.ndarray:
        """float32 ``[num_steps]``, memory-mapped: as the source recorded them."""
        return self._member("rewards")

    @cached_property
    def episodes(self) -> np.ndarray:
        """:data:`EPISODE_DTYPE` ``[num_episodes]``, memory-mapped."""
        return self._member("episodes")

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

    def first_steps(self) -> np.ndarray:
        """int64 ``[num_episodes]``: row of each episode's first step in ``actions`` and ``rewards``."""
        num_steps = self.episodes["num_steps"]
        return np.cumsum(num_steps) - num_steps

    def steps_of_frames(self, first: int, stop: int) -> tuple[int, int]:
        """First step, and one past the last, whose newest frame is among the frames ``first..stop - 1``.

        The frame after an episode's last step counts as that step's.
        """
        first_frame, num_steps = self.episodes["first_frame"], self.episodes["num_steps"]
        first_step = self.first_steps()

        def step(frame: int) -> int:
            episode = np.searchsorted(first_frame, frame, side="right") - 1
            return int(first_step[episode] + min(frame - first_frame[episode], num_steps[episode] - 1))

        return step(first), step(stop - 1) + 1

    def episode_returns(self) -> np.ndarray:
        """float64 ``[num_episodes]``: undiscounted sums of the stored rewards (clipped ones if the source clipped)."""
        if not self.num_episodes:
            return np.zeros(0)
        return np.add.reduceat(self.rewards, self.first_steps(), dtype=np.float64)

    def _member(self, key: str) -> np.ndarray:
        name, dtype, count_field = MEMBERS[key]
        path, count = self.path / name, getattr(self.manifest, count_field)
        num_bytes = path.stat().st_size if path.is_file() else None
        if num_bytes is None or num_bytes < count * dtype.itemsize:
            state = "is missing" if num_bytes is None else f"has {num_bytes} bytes"
            raise ValueError(f"{path} {state}: {count} committed records need {count * dtype.itemsize} bytes")
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)  # Plain arrays index faster.


def fingerprint(recordings: Sequence[Recording]) -> str:
    """SHA-256 over the manifests of ``recordings``, in order."""
    digest = hashlib.sha256()
    for recording in recordings:
        digest.update(recording.manifest.to_json().encode())
    return digest.hexdigest()
