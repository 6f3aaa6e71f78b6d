"""A store that grows while somebody reads it: episodes are appended, and published at one time for all games."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_sql.data.catalogue import ABSENT, list_recording, locked
from torchrl_sql.data.damage import check_state
from torchrl_sql.data.recording import Manifest, Recording, Tail, as_names, open_recording, restore_recording
from torchrl_sql.data.store import FrameStore, recording_folders
from torchrl_sql.data.writer import RecordingWriter
from torchrl_sql.games import resolve_games

_RECORDING = "0"


class GrowingStore:
    """Recordings of several games, one each, that one process writes and reads.

    The metadata of each is ``about``. Equal episodes give equal files, whatever was committed when, and whatever was
    committed and dropped again meanwhile. What a commit writes does not grow with the store.

    Args:
        path (path): of the store; made by :meth:`open` if absent.
        games (str or sequence of str): what is played, see :func:`torchrl_sql.games.resolve_games`.

    Keyword Args:
        source (str): where the episodes come from, for people.
        about (mapping): JSON values that tell whose recordings these are. Others of these games are refused, and those
            of other games left alone.
        labels (sequence of str): names of the numbers that are noted of each episode.
        shard_frames (int): frames per file, see :meth:`FrameStore.create`. Each commit writes the last file again.

    Attributes:
        store (FrameStore): what is written; from :meth:`open` on.
        games (tuple of str): their names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        games: str | Sequence[str],
        *,
        source: str,
        about: Mapping[str, Any],
        labels: Sequence[str] = ("agent_step", "gradient_step", "epsilon"),
        shard_frames: int = 4000,
    ) -> None:
        self.games = resolve_games(games)
        self._path, self._shard_frames = Path(path).absolute(), shard_frames
        self._source, self._about = source, json.loads(json.dumps(about))  # as it is read
        self._labels = as_names("labels", labels)
        self._writers: dict[str, RecordingWriter] = {}
        self._num_committed: dict[str, int] = {}

    def open(self, manifests: Mapping[str, str] | None = None, *, dropping: Mapping[str, float] | None = None) -> None:
        """Opens the recordings for writing, as they were in an earlier state; what came after it is dropped.

        Args:
            manifests (mapping, optional): the text of each game's manifest at that time
                (:meth:`~torchrl_sql.data.recording.Manifest.to_json`); default: a state without episodes.

        Keyword Args:
            dropping (mapping, optional): without ``manifests``, only episodes whose labels are below these numbers are
                dropped.

        Raises:
            ValueError: if the store holds other recordings of these games, episodes that may not be dropped, or their
                earlier state is lost. Nothing is changed then.
            BlockingIOError: if another process writes them.
        """
        if unknown := {*(dropping or {})} - {*self._labels}:
            raise ValueError(f"dropping must name labels ({', '.join(self._labels)}), got {min(unknown)!r}")
        if manifests is None:
            self.store = FrameStore.create(self._path, shard_frames=self._shard_frames, exist_ok=True)
        else:
            self.store = FrameStore.open(self._path)
        with ExitStack() as stack:
            folders = {game: self.store.path / game / _RECORDING for game in self.games}
            for folder in folders.values():
                if folder.is_dir():
                    stack.enter_context(locked(folder, wait=False))
            found = {game: self._check(folder) for game, folder in folders.items()}  # all, before any is changed
            for game, recording in found.items():
                if manifests is None:
                    _check_droppable(recording, dropping)
                else:
                    _check_there(folders[game], recording, manifests[game])
            for game, folder in folders.items():
                recording = found[game]
                if manifests is not None:
                    restore_recording(folder, manifests[game])
                elif recording is not None:
                    restore_recording(folder, _emptied(recording))
                elif not folder.exists():
                    list_recording(folder, ABSENT)  # somebody may have deleted what an earlier start made
        for game in self.games:
            self._writers[game] = self.store.writer(
                game, source=self._source, behaviours=["agent"], labels=self._labels, metadata=self._about
            )
            self._num_committed.pop(game, None)

    def _check_open(self) -> None:
        if not self._writers:
            raise RuntimeError("the store must be opened first: call open()")

    def _check(self, folder: Path) -> Recording | None:
        """The recording in a folder, which must be this run's, and the only one of its game."""
        others = [path for path in recording_folders(self.store.path, f"{folder.parent.name}/*") if path != folder]
        recording = open_recording(folder) if folder.exists() else None
        unlike = [f"the recording {others[0].name}"] if others else []
        if recording is not None:
            there = {"source": recording.manifest.source, **recording.manifest.metadata}
            here = {"source": self._source, **self._about}
            unlike += _differences({key: there.get(key) for key in here}, here)
        if unlike:
            got = ", ".join(unlike)
            raise ValueError(
                f"{folder.parent} must hold nothing but what this run played, got {got}; choose another folder"
            )
        if recording is not None and recording.manifest.labels != self._labels:
            found = list(recording.manifest.labels) or "none, as an older version of this package wrote it"
            raise ValueError(
                f"{folder} must have labels.f64 with {list(self._labels)} of each episode, got {found}: it can be "
                "trained on, but not be continued; choose another folder"
            )
        return recording

    def add(
        self,
        game: str,
        frames: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        *,
        terminated: bool,
        labels: Mapping[str, float],
    ) -> None:
        """Appends an episode, see :meth:`RecordingWriter.add_episode`; it is not published before :meth:`commit`.

        Raises:
            OSError: if the disk is full.
            RuntimeError: before :meth:`open`.
            ValueError: for a game that is not the store's.
        """
        self._check_open()
        if game not in self._writers:
            raise ValueError(f"game must be one of the store's ({', '.join(self.games)}), got {game!r}")
        with _saying_what_stays(self):
            self._writers[game].add_episode(frames, actions, rewards, terminated, labels=labels)

    @property
    def num_episodes(self) -> int:
        """Of the game that has the fewest, published or not."""
        self._check_open()
        return min(writer.num_episodes for writer in self._writers.values())

    def commit(self) -> list[Recording]:
        """Publishes what was appended, game by game; returns the recordings as they are now.

        Raises:
            OSError: if the disk is full; what was committed before stays.
        """
        self._check_open()
        with _saying_what_stays(self):
            for game, writer in self._writers.items():
                # The first commit also removes what an earlier start left behind the state that was taken back.
                if writer.num_episodes != self._num_committed.get(game):
                    writer.commit(metadata=self._about)
                    self._num_committed[game] = writer.num_episodes
        return [self.store.recording(game) for game in self.games]

    def close(self) -> None:
        """Ends the writers; what was not published is dropped."""
        for writer in self._writers.values():
            writer.close(commit=False)


def _check_droppable(recording: Recording | None, limits: Mapping[str, float] | None) -> None:
    if recording is None or not recording.num_episodes:
        return
    for label, limit in (limits or {}).items():
        greatest = max(recording.labels[label])
        if greatest >= limit:
            raise ValueError(
                f"{recording.path.parent} holds {recording.num_steps:,} transitions, to {label} {greatest:,.0f}, of a "
                "run whose checkpoints are gone: choose another folder, or delete it to begin anew"
            )


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where JSON values differ, by the keys that lead there."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**here, **there} if there.get(key) != here.get(key)]
        return [
            text for key in keys for text in _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if there == here else [f"{name} {there!r}, not {here!r}"]


def _check_there(folder: Path, recording: Recording | None, manifest: str) -> None:
    """A manifest that is put back must be of what the files hold: the store may be a copy of other times."""
    file = folder / "manifest.json"
    if recording is None:
        raise ValueError(f"{file} is missing: the recording that is to be continued was there")
    if recording.manifest.to_json() == manifest:
        return
    state = Recording(folder, Manifest.read(file, manifest))
    try:
        reasons = [damage.reason for damage in check_state(state)]
    except (OSError, ValueError) as error:
        reasons = [str(error)]
    if reasons:
        raise ValueError(
            f"{folder.parent} must begin with the {state.num_steps:,} transitions that are to be continued, got "
            f"{recording.num_steps:,} of an earlier time or in another encoding ({reasons[0]}): put its own back"
        )


def _emptied(recording: Recording) -> str:
    """The manifest of a recording before its first episode."""
    counts = dict.fromkeys(("num_frames", "num_steps", "num_episodes", "num_sealed_chunks"), 0)
    none: dict[str, Any] = {**counts, "tail": Tail(), "crc32": dict.fromkeys(recording.manifest.members, 0)}
    return replace(recording.manifest, **none).to_json()


@contextmanager
def _saying_what_stays(growing: GrowingStore) -> Iterator[None]:
    """Turns what a full disk makes of a write into an error that says so."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "No space left" not in str(error) and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        held = ", ".join(f"{recording.num_steps:,} of {recording.game}" for recording in growing.store.recordings)
        raise OSError(
            errno.ENOSPC,
            f"DISK FULL: what was committed stays ({held or 'no'} transitions): {error}",
            str(growing.store.path),
        ) from error
