"""The on-disk store of Atari episodes: open, create, read.

Layout::

    STORE/store.json                    format, version, encoding: fixed when the store is created
    STORE/recordings.txt                one line per recording: what must be there, in which state
    STORE/<Game>/<run>/manifest.json    committed counts, source, checksums: the commit point
    STORE/<Game>/<run>/frames/          Zarr v3 array, uint8 [num_frames, 84, 84]: each frame once
    STORE/<Game>/<run>/actions.u8       one byte a step: index into the 18 full actions
    STORE/<Game>/<run>/rewards.f32      four bytes per step, little endian: as the source recorded them
    STORE/<Game>/<run>/episodes.bin     one EPISODE_DTYPE record an episode
    STORE/<Game>/<run>/chunks.crc32c    four bytes per chunk in full shards: what each chunk of frames must be
    STORE/<Game>/<run>/labels.f64       eight bytes per label of an episode, little endian; only where there are labels

Readers see exactly what the manifest counts; bytes beyond it are the remains of a writer that was killed.
File names are fixed by the format, so a manifest cannot point outside its folder.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torchrl_sql.data.catalogue import LOCK_FILE, RECORDINGS_FILE, locked, read_list
from torchrl_sql.data.frames import Codec, Encoding
from torchrl_sql.data.recording import VERSION, Recording, as_names, fingerprint, open_recording
from torchrl_sql.data.writer import RecordingWriter
from torchrl_sql.files import check_outside_stores, json_field, read_json, write_text
from torchrl_sql.games import resolve_games

STORE_FORMAT = "torchrl_sql.frame_store"
_RECORDING_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class FrameStore:
    """Episodes of many games on disk; frames are stored once and compressed.

    Use :meth:`create` and :meth:`open`. Properties read the folder anew, so they show the last commit.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = FrameStore.create(folder.name + "/store")
        >>> with store.writer("Pong", source="zeros, for the example") as writer:
        ...     frames = np.zeros((3, 84, 84), np.uint8)
        ...     writer.add_episode(frames, actions=[0, 2], rewards=[0.0, 1.0], terminated=True)
        >>> store.recording("Pong").episode_returns()
        array([1.])
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, encoding: Encoding) -> None:
        self.path = path.absolute()  # The process may go to another folder.
        self.encoding = encoding

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        codec: Codec = "zstd",
        chunk_frames: int = 20,
        shard_frames: int = 15360,
        zstd_level: int = 8,
        exist_ok: bool = False,
    ) -> FrameStore:
        """Creates an empty store.

        Args:
            path (path): its folder; made if absent.

        Keyword Args:
            codec ("zstd" or "lz4"): zstd is smaller, lz4 faster to read; docs/data.md compares them.
            chunk_frames (int): frames compressed together, at most 37 with lz4. More: smaller files, slower random
                reads.
            shard_frames (int): frames per file, a multiple of ``chunk_frames``; a writer holds twice that many.
            zstd_level (int): 1 (fast) to 22 (small).
            exist_ok (bool): open the store if there is one already; its own settings stay.

        Raises:
            FileExistsError: if there is a store already and ``exist_ok`` is false, or other files are in the way.
            ValueError: for an unknown codec, chunk and shard sizes that do not fit together, or a folder in a store.
        """
        folder = Path(path)
        encoding = Encoding(codec=codec, chunk_frames=chunk_frames, shard_frames=shard_frames, zstd_level=zstd_level)
        text = json.dumps({"format": STORE_FORMAT, "version": VERSION, **asdict(encoding)}, indent=1, sort_keys=True)
        check_outside_stores(folder.resolve().parent, "a store")
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")}
        if "store.json" not in there and not there <= {RECORDINGS_FILE, LOCK_FILE}:
            raise FileExistsError(f"{folder} must be an empty or new folder to create a store in")
        if "store.json" not in there:
            with locked(folder):
                if not (folder / "store.json").exists():
                    write_text(folder / RECORDINGS_FILE, "")
                    write_text(folder / "store.json", text + "\n")
                    return cls(folder, encoding)
        if not exist_ok:
            raise FileExistsError(f"{folder} is a store already; open it, or choose another path")
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FrameStore:
        """Opens an existing store.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if ``store.json`` is damaged or of another version, or the list of recordings is missing.
        """
        file = Path(path) / "store.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} is not a store: {file} is missing")
        fields = read_json(file, STORE_FORMAT, version=VERSION)
        counts = {key: json_field(fields, key, int, file) for key in ("chunk_frames", "shard_frames", "zstd_level")}
        try:
            # Stores made before there was a choice do not name the codec.
            encoding = Encoding(codec=json_field({"codec": "zstd"} | fields, "codec", str, file), **counts)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        read_list(file.parent)
        return cls(file.parent, encoding)

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """All committed recordings, by game and name.

        Raises:
            ValueError: if one is damaged, or is not there any more.
        """
        return self._read("*/*")

    @property
    def games(self) -> tuple[str, ...]:
        """Games with at least one committed recording, in alphabetical order."""
        return tuple(dict.fromkeys(recording.game for recording in self.recordings))

    def recordings_of(self, game: str) -> tuple[Recording, ...]:
        """The committed recordings of one game.

        Raises:
            ValueError: if the game is unknown or the store holds none of it, or if a recording of it is damaged or is
                not there any more.
        """
        (game,) = resolve_games([game])
        recordings = self._read(f"{game}/*")
        if not recordings:
            held = ", ".join(self.games) or "no games"
            raise ValueError(f"game {game!r} is not in the store {self.path}, which holds {held}: choose among these")
        return recordings

    def recording(self, game: str, name: str | None = None) -> Recording:
        """One recording; ``name`` may be left out where the game has only one.

        Raises:
            ValueError: if there is no such recording, or several and no name.
        """
        recordings = self.recordings_of(game)
        names = [recording.name for recording in recordings]
        if name is None and len(recordings) > 1:
            raise ValueError(f"game {game!r} has the recordings {names}: name one")
        if name is not None and name not in names:
            raise ValueError(f"recording must be one of {names} for game {game!r}, got {name!r}")
        return recordings[0 if name is None else names.index(name)]

    def writer(
        self,
        game: str,
        *,
        run: str = "0",
        source: str,
        rewards: Literal["raw", "clipped"] = "raw",
        behaviours: Sequence[str] = ("behaviour",),
        labels: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> RecordingWriter:
        """Opens the recording named ``run`` for writing: a new one, or an existing one to append to, see
        :class:`RecordingWriter`.
        """
        (game,) = resolve_games([game])
        if not _RECORDING_NAME.fullmatch(run):
            raise ValueError(f"run must be made of letters, digits, '.', '_' and '-', got {run!r}")
        return RecordingWriter(
            self.path / game / run,
            source=source,
            rewards=rewards,
            behaviours=as_names("behaviours", behaviours),
            labels=as_names("labels", labels),
            metadata=metadata,
            encoding=self.encoding,
        )

    def _read(self, pattern: str) -> tuple[Recording, ...]:
        recordings = (open_recording(folder) for folder in recording_folders(self.path, pattern))
        return tuple(recording for recording in recordings if recording is not None)

    def fingerprint(self, games: str | Sequence[str] | None = None) -> str:
        """SHA-256 over the manifests: equal for equal contents wherever the store lies, for checkpoints."""
        if games is None:
            return fingerprint(self.recordings)
        return fingerprint([recording for game in resolve_games(games) for recording in self.recordings_of(game)])

    def __repr__(self) -> str:
        return f"FrameStore({str(self.path)!r}, games={list(self.games)})"


def recording_folders(store: Path, pattern: str = "*/*") -> list[Path]:
    """Folders of the recordings that are listed or have a manifest, by game and name."""
    listed = {store / name for name in fnmatch.filter(read_list(store), pattern)}
    return sorted(listed | {file.parent for file in store.glob(f"{pattern}/manifest.json")})
