"""The list of a store's recordings, and of what state each of them is.

A recording that is lost as a whole, or taken from an older copy of the store, leaves nothing in its own folder that
could say so. ``STORE/recordings.txt`` has a line ``<Game>/<run> <state>`` for each recording that was ever committed,
where the state is the checksum of its manifest. During a commit the line has the old state and the new one, so that
a writer which is killed then leaves no contradiction. Recordings that are not listed, folders that somebody copied into
the store, are taken as they are.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_sql.files import write_text

RECORDINGS_FILE = "recordings.txt"

ABSENT = "-"
"""State of a recording before its first commit."""

LOCK_FILE = ".lock"

_LINE = re.compile(r"([\w.-]+/[\w.-]+) (-|[0-9a-f]{8})( [0-9a-f]{8})?")


def read_list(store: Path) -> dict[str, tuple[str, ...]]:
    """The states in which each recording, by its name ``<Game>/<run>``, may be.

    Raises:
        ValueError: if the list is missing, or is not one.
    """
    file = store / RECORDINGS_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"{file} is missing: put it back, or an empty file if no recording was lost (`verify` shows the rest)"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    states: dict[str, tuple[str, ...]] = {}
    for line in lines:
        if not _LINE.fullmatch(line):
            raise ValueError(f"{file} must have lines <Game>/<run> <checksum>, got {line!r}")
        name, *listed = line.split(" ")
        states[name] = tuple(listed)
    return states


def contradiction(recording: Path, state: str) -> str:
    """What is wrong with the state of a recording, given by its folder, or ``""``. A store without a list has none."""
    store = recording.parent.parent
    listed = read_list(store).get(_name(recording)) if (store / RECORDINGS_FILE).exists() else None
    if listed is None or state in listed:
        return ""
    if state == ABSENT:
        return (
            f"manifest.json is missing, but {RECORDINGS_FILE} lists it: put it back, or delete the folder and the line"
        )
    return (
        f"manifest.json is not the one that {RECORDINGS_FILE} lists, but of an older or another recording: "
        "put the right files back, or delete the line to take these"
    )


def list_recording(recording: Path, *states: str) -> None:
    """Notes in which states a recording, given by its folder, may be from now on. A store without a list gets none."""
    store = recording.parent.parent
    if not (store / RECORDINGS_FILE).exists():
        return
    with locked(store):
        before = read_list(store)
        if before.get(_name(recording)) != states:
            lines = sorted((before | {_name(recording): states}).items())
            write_text(store / RECORDINGS_FILE, "".join(f"{' '.join((name, *listed))}\n" for name, listed in lines))


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps others, on other hosts too, from changing a store's own files, or a recording; waits until they let go.

    Raises:
        BlockingIOError: in place of waiting.
    """
    # NFS passes on locks of files, not of folders.
    lock = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is open in another writer") from error
        yield
    finally:
        os.close(lock)


def _name(recording: Path) -> str:
    return f"{recording.parent.name}/{recording.name}"
