"""What is needed to repeat a job: the state of the code and the versions of what runs it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torchrl_sql

_PACKAGES = ("torchrl_sql", "torch", "torchrl", "tensordict", "ale-py", "numpy", "tensorstore", "submitit")


class GitState(NamedTuple):
    """The checkout that the package runs from."""

    commit: str | None
    """``None`` for an installed package."""
    untracked: list[str]
    diff: str
    """Changes of tracked files since ``commit``, for ``git apply``."""


def git_state() -> GitState:
    """The checkout of ``torchrl_sql``.

    Raises:
        OSError: if a checkout's state cannot be read.
    """
    root = Path(torchrl_sql.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return GitState(None, [], "")

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"git {' '.join(arguments)} in {root}: {done.stderr.strip()}")
        return done.stdout

    untracked = git("ls-files", "--others", "--exclude-standard").splitlines()
    return GitState(git("rev-parse", "HEAD").strip(), untracked, git("diff", "--binary", "HEAD"))


def versions() -> dict[str, str]:
    """Versions of Python, the packages that decide results, and SLURM where there is one."""
    found = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    if shutil.which("sinfo") is not None:
        done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True)
        found["slurm"] = done.stdout.strip().removeprefix("slurm ") or "unknown"
    return found
