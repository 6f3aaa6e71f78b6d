"""Durable small files: a crash leaves the old content or the new one, never a part."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KERNELS_VARIABLE = "TORCHRL_SQL_KERNELS"
"""In the environment: a folder for compiled kernels in place of each run's own, for runs that share theirs."""


@contextmanager
def replacing(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside ``path`` and move it there, on disk, if the block succeeds.

    Args:
        path (Path): the file to create or replace; its folder exists.

    Keyword Args:
        concurrent (bool): processes may write ``path`` at the same time, on several hosts: the temporary name is this
            process's own. Otherwise there is one temporary name, so the next write removes what a killed one left.

    Yields:
        The temporary path, which ends in ``.tmp``.

    Raises:
        OSError: if it cannot be written; ``path`` is untouched then and nothing is left beside it.
    """
    writer = f".{os.uname().nodename}.{os.getpid()}" if concurrent else ""
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def expand_path(text: str | Path) -> Path:
    """A path with ``~`` and environment variables (``$NAME``, ``${NAME}``) replaced, for where it is used.

    Raises:
        ValueError: if a variable is not set, or there is no such user.
    """
    home = os.path.expanduser(text)
    if home.startswith("~"):
        raise ValueError(f"{text}: there is no user {home[1:].split('/')[0]!r} on {os.uname().nodename}")
    path = os.path.expandvars(home)
    if unset := re.search(r"\$([A-Za-z_]\w*|\{\w+\})", path):
        raise ValueError(f"{text}: the environment variable {unset[0]} is not set on {os.uname().nodename}")
    return Path(path)


def check_outside_stores(path: Path, name: str) -> None:
    """Checks that a folder that is to be filled is no store and lies in none; ``name`` is its option, for the message.

    Raises:
        ValueError: if it does.
    """
    place = path.resolve()
    for folder in (place, *place.parents):
        if (folder / "store.json").exists() and (folder / "recordings.txt").exists():
            raise ValueError(f"{name} must be outside of stores, but {folder} is one, got {path}")


def check_exists(path: Path) -> None:
    """Checks that something is there; commands do so before they import torch, so that a mistake is named at once.

    Raises:
        FileNotFoundError: if not.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")


def write_text(path: Path, text: str, *, concurrent: bool = False) -> None:
    """Replace a small file's text in one move, see :func:`replacing`."""
    with replacing(path, concurrent=concurrent) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk: a rename survives a power cut only after it."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_tree(path: Path) -> None:
    """Put a folder on disk, with all that is in it."""
    for each in (*path.rglob("*"), path):
        sync_folder(each)  # files, too


def read_json(path: Path, expected_format: str, *, version: int, text: str | None = None) -> dict[str, Any]:
    """Read a JSON object with a format and version; return its other fields.

    Args:
        path (Path): the file.
        expected_format (str): value of its key ``"format"``.

    Keyword Args:
        version (int): value of its key ``"version"``.
        text (str, optional): what the file held once, to be read in place of what it holds now.

    Raises:
        ValueError: if the file is not JSON, or not of the expected format and version.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8") if text is None else text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != expected_format:
        raise ValueError(f"{path} is not a {expected_format} header")
    written = fields.pop("version", None)
    if written != version or isinstance(written, bool):
        older = isinstance(written, int) and written < version
        advice = "make the data anew, or read it with an older package" if older else "upgrade the package"
        raise ValueError(f"{path} has format version {written!r}, this package reads version {version}: {advice}")
    return fields


def json_field(fields: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """One field of a JSON object; ``ValueError`` if it is missing or not of ``kind``."""
    value = fields.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{path}: {key} must be a JSON {kind.__name__}, got {value!r}")
    return value
