"""One process at a time trains in a run's folder."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torchrl_sql.files import write_text

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""In the run's folder, while it is trained."""

HEARTBEAT_SECONDS = 60.0
"""How often an owner touches the file."""
SILENT_SECONDS = 600.0
"""After this time without a touch an owner on another host is taken to be gone."""
_WRITING_SECONDS = 0.5
"""Milliseconds pass between the creation of the file and its content."""


class RunFolderError(ValueError):
    """Another process owns the run's folder."""


@dataclass(frozen=True)
class _Owner:
    """A process, and the attempt at a job's task that it is, if it is one."""

    host: str
    pid: int
    started: str
    """Boot and clock tick: with them a process is not taken for a later one with its number."""
    task: str | None
    """Folder of the task; attempts at the same task are ordered."""
    attempt: tuple[int, ...]

    @classmethod
    def present(cls) -> Self:
        """This process; the launcher says the task and the attempt in the environment."""
        attempt = os.environ.get("TORCHRL_SQL_ATTEMPT", "")
        return cls(
            host=os.uname().nodename,
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            task=os.environ.get("TORCHRL_SQL_TASK"),
            attempt=tuple(int(number) for number in attempt.split(".") if number),
        )

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended: only a process of this host can be asked for."""
        return self.host == os.uname().nodename and _started(self.pid) != self.started

    def precedes(self, other: _Owner) -> bool:
        """Whether the other process is a later attempt at the same task."""
        return self.task is not None and self.task == other.task and self.attempt < other.attempt

    def __str__(self) -> str:
        attempt = f", attempt {'.'.join(map(str, self.attempt))} of {self.task}" if self.task else ""
        return f"process {self.pid} on {self.host}{attempt}"


class RunLock:
    """Ownership of a run's folder, a context manager.

    The owner's name lies in a file of the folder, so that it works on any file system that the hosts share; inside the
    context it touches the file every minute. A new start takes the folder over from an owner that ended on this host,
    from one on another host that was silent for ten minutes, and from an earlier attempt at the same task on any host:
    a node that was lost cannot say that it is gone. If that owner lives on after all, :meth:`check` stops it.

    Args:
        folder (Path): the run's; created if absent.

    Raises:
        RunFolderError: if another process owns it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._owner = _Owner.present()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if self._create():
            return
        owner = self._read()
        if owner is None:
            time.sleep(_WRITING_SECONDS)
            owner = self._read()
        if owner is not None:
            silent = self._silent_seconds()
            is_gone = owner.is_gone or (owner.host != self._owner.host and silent >= SILENT_SECONDS)
            if not is_gone and not owner.precedes(self._owner):
                raise RunFolderError(
                    f"{folder} is being trained by {owner}, which gave a sign of life {silent:.0f} s ago: wait for it, "
                    f"or choose another run_dir; if that process is gone, delete {self.path} or wait for ten minutes"
                )
            logger.info("%s goes over to this process from %s", folder, owner)
        self._take()

    def check(self) -> None:
        """Call before anything is written that another owner would miss or trip over.

        Raises:
            RunFolderError: if another process has taken the folder over.
        """
        owner = self._read()
        if owner is None:  # somebody deleted the file
            self._take()
        elif owner != self._owner:
            raise RunFolderError(f"{self.path.parent} was taken over by {owner}: this process stops")

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._heart.join()
        if self._read() == self._owner:
            self.path.unlink(missing_ok=True)
        if self._is_new:
            with suppress(OSError):  # a run that was refused leaves no folder
                self.path.parent.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # shared file systems have passing troubles
                if self._read() == self._owner:
                    os.utime(self.path)

    def _silent_seconds(self) -> float:
        """Since the owner's last touch, by the clock that dates files in this folder."""
        probe = self.path.with_name(f"{LOCK_FILE}.{self._owner.host}.{self._owner.pid}.tmp")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:  # it has just gone
            return SILENT_SECONDS
        finally:
            probe.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file unless there is one."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _take(self) -> None:
        write_text(self.path, self._text(), concurrent=True)

    def _text(self) -> str:
        return json.dumps(asdict(self._owner), indent=1) + "\n"

    def _read(self) -> _Owner | None:
        """The present owner; ``None`` if there is no file, or only what a crash left of it."""
        try:
            fields: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return _Owner(**fields | {"attempt": tuple(fields["attempt"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def _started(pid: int) -> str | None:
    """When a process of this host was started; ``None`` if there is none, or one that ended and waits to be reaped."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(") ")[2].split()
        if state not in "ZX":
            return f"{boot} {fields[18]}"  # field 22 of proc(5)
    return None
