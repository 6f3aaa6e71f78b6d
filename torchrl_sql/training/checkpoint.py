"""Checkpoint files: written atomically, read without running code, deleted when newer ones make them superfluous."""

from __future__ import annotations

import errno
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

from torchrl_sql.config import ConfigError
from torchrl_sql.errors import is_out_of_memory
from torchrl_sql.files import replacing, write_text

FORMAT = "torchrl_sql checkpoint 3"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk that is full."""

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint; the message names it and says why."""


class OtherVersionError(CheckpointError):
    """An intact file of another version of this package."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a gradient step lies."""
    return folder / f"step_{step:09d}.pt"


def save_checkpoint(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Writes ``folder/step_<step>.pt`` in one move; on disk when it returns.

    Args:
        folder (Path): created if absent.
        step (int): gradient step, part of the name.
        content (dict): tensors, numbers, strings, lists and dicts only.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    write_content(path, content)
    return path


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Writes what :func:`load_checkpoint` reads, see :func:`save_checkpoint`."""
    with replacing(path, concurrent=True) as temporary, temporary.open("wb") as raw:
        file = _KeepsError(raw)
        try:
            torch.save({"format": FORMAT, **content}, cast(IO[bytes], file))
        except RuntimeError:
            if file.error is not None:  # torch reports a failed write without saying why it failed
                raise file.error from None
            raise


class _KeepsError:
    """A file that remembers why a write to it failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def delete_superfluous(folder: Path, *, num_kept: int, milestone_interval: int | None) -> None:
    """Delete all but the newest ``num_kept`` checkpoints, the milestones and the best (see :func:`mark_best`)."""
    for path in _superfluous(folder, num_kept=num_kept, milestone_interval=milestone_interval):
        path.unlink(missing_ok=True)


def make_room(write: Callable[[], None], folder: Path, *, milestone_interval: int | None) -> None:
    """Call ``write``; as long as the disk is full, delete the oldest checkpoint of ``folder`` and call it again.

    The newest checkpoint, the milestones and the best stay.

    Raises:
        OSError: if the disk is still full without the others, or for another reason of ``write``'s.
    """
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            others = _superfluous(folder, num_kept=1, milestone_interval=milestone_interval)
            if not others:
                raise
            logger.warning("DISK FULL: %s is deleted to make room for what is newer", others[0])
            others[0].unlink(missing_ok=True)


def _superfluous(folder: Path, *, num_kept: int, milestone_interval: int | None) -> list[Path]:
    """Oldest first."""
    best = best_step(folder)

    def is_superfluous(step: int) -> bool:
        return step != best and (milestone_interval is None or step % milestone_interval != 0)

    return [path for path in list_checkpoints(folder)[:-num_kept] if is_superfluous(checkpoint_step(path))]


def best_step(folder: Path) -> int | None:
    """The gradient step of the best checkpoint of a ``checkpoints`` folder, ``None`` if none was marked.

    Raises:
        CheckpointError: if ``best.json`` is not what :func:`mark_best` writes.
    """
    best = _read_best(folder)
    return None if best is None else best[0]


def mark_best(run_dir: Path, step: int, score: float) -> bool:
    """Marks a checkpoint as the best of its run if its score is the highest so far. The best is never deleted.

    ``checkpoints/best.json`` holds the two numbers. ``torchrl-sql evaluate`` calls it after usual play of all games
    in one process, under the run's own protocol.

    Args:
        run_dir (Path): folder of the run.
        step (int): gradient step of the checkpoint; scores of one that is no longer there are passed over.
        score (float): higher is better.

    Returns:
        Whether it is the best now.
    """
    folder = run_dir / "checkpoints"
    best = _read_best(folder)
    better = best is None or score > best[1] or not checkpoint_path(folder, best[0]).is_file()
    if not better or not checkpoint_path(folder, step).is_file():
        return False
    write_text(folder / "best.json", json.dumps({"step": step, "score": score}) + "\n", concurrent=True)
    return True


def _read_best(folder: Path) -> tuple[int, float] | None:
    path = folder / "best.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["step"]), float(content["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must hold a step and a score: {error!r}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU (tensors and plain values only: ``weights_only=True``).

    Raises:
        CheckpointError: if the file is damaged or of another format.
        FileNotFoundError: if there is none.
        OSError, MemoryError: if it cannot be read at present.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            if zipfile.ZipFile(file).testzip() is not None:  # torch.load does not compare the members' checksums
                raise CheckpointError(f"{path} is damaged: a checksum does not match")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: seeking where a damaged file says
            raise
        if is_out_of_memory(error):
            raise MemoryError(f"{path} does not fit into memory: {error}") from error
        raise CheckpointError(
            f"{path} must be a checkpoint of torchrl_sql, got a file that fails to load: {error}"
        ) from error
    check_format(path, content.get("format") if isinstance(content, dict) else type(content).__name__, FORMAT)
    return content


def check_format(path: Path, actual: object, expected: str) -> None:
    """Raise :class:`CheckpointError` unless a file is of the expected format, a name and a number."""
    if actual == expected:
        return
    name, number = expected.rsplit(" ", 1)
    if isinstance(actual, str) and (match := re.fullmatch(rf"{name} (\d+)", actual)):
        when = "an earlier" if int(match[1]) < int(number) else "a later"
        raise OtherVersionError(
            f"{path} was written by {when} version of torchrl_sql ({actual!r}, this one reads {expected!r}): use that "
            "version, or train anew in another run_dir"
        )
    raise CheckpointError(f"{path} must be of format {expected!r}, got {actual!r}")


@contextmanager
def wrong_content(path: Path) -> Iterator[None]:
    """Name the file where the block finds that it is intact, but holds something else than it should."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except ConfigError as error:  # it names the file
        raise CheckpointError(str(error)) from error
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        # What torch and tensordict raise for states of other names, types and shapes.
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{path} is intact, but does not hold what such a run writes: {type(error).__name__}: {first_line}"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def checkpoint_step(path: Path) -> int:
    """The gradient step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def load_latest_checkpoint(folder: Path, *, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Reads the newest usable checkpoint.

    Damaged ones that are newer are passed over with a warning and renamed to ``*.pt.damaged``: as checkpoints they
    would count as the newest, and good ones would be deleted for them.

    Returns:
        Its path and content, or ``None`` if the folder holds none.

    Raises:
        OtherVersionError: if the newest that is intact was written by another version of this package.
        CheckpointError: if there are checkpoints but none is usable. In both cases all keep their names.
        OSError: if one cannot be read at present.
    """
    checkpoints = list_checkpoints(folder)
    damaged: list[Path] = []
    for path in reversed(checkpoints):
        try:
            content = load_checkpoint(path)
        except OtherVersionError:  # to go on from an older one would be to lose what that version trained
            raise
        except CheckpointError as error:
            damaged.append(path)
            warn(f"{error}; it becomes {path.name}.damaged if one before it is good")
            continue
        for bad in damaged:
            bad.rename(bad.with_name(f"{bad.name}.damaged"))
        return path, content
    if checkpoints:
        raise CheckpointError(f"none of the {len(checkpoints)} checkpoints in {folder} can be read")
    return None
