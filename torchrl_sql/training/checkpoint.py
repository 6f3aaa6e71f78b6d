"""Checkpoint files: written atomically, read without running code."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = "torchrl_sql checkpoint 1"

_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint; the message names it and says why."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a gradient step lies."""
    return folder / f"step_{step:09d}.pt"


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], *, num_kept: int) -> Path:
    """Writes ``folder/step_<step>.pt`` in one move, then deletes all but the newest ``num_kept``.

    Args:
        folder (Path): created if absent.
        step (int): gradient step, part of the name.
        content (dict): tensors, numbers, strings, lists and dicts only.

    Keyword Args:
        num_kept (int): how many checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in list_checkpoints(folder)[:-num_kept]:
        old.unlink()
    return path


def load_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint (tensors and plain values only: ``weights_only=True``).

    Raises:
        CheckpointError: if the file is damaged or of another format.
        FileNotFoundError: if there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch.load does not compare the members' checksums
            raise CheckpointError(f"{path} is damaged: a checksum does not match")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} must be a checkpoint of torchrl_sql, got a file that fails to load: {error}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} must be of format {FORMAT!r}, got {found!r}")
    return content


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def load_latest_checkpoint(folder: Path, *, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Reads the newest usable checkpoint; a damaged one is passed over with a warning.

    Returns:
        Its path and content, or ``None`` if the folder holds none.

    Raises:
        CheckpointError: if there are checkpoints but none is usable.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; using the one before")
    if checkpoints:
        raise CheckpointError(f"none of the {len(checkpoints)} checkpoints in {folder} can be read")
    return None
