"""What is needed to repeat a job: the state of the code and the versions of what runs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
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
    """Names of files that git neither has nor ignores."""
    diff: str
    """Changes since ``commit``, for ``git apply``: of tracked files, and untracked ones of what runs."""


def git_state() -> GitState:
    """The checkout of ``torchrl_sql``.

    Raises:
        OSError: if a checkout's state cannot be read.
    """
    root = Path(torchrl_sql.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return GitState(None, [], "")

    def git(*arguments: str, ends: Sequence[int] = (0,)) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        if done.returncode not in ends:
            raise OSError(f"git {' '.join(arguments)} in {root}: {done.stderr.strip()}")
        return done.stdout

    others = ("ls-files", "--others", "--exclude-standard", "-z")
    untracked = git(*others).split("\0")[:-1]
    diff = git("diff", "--binary", "HEAD")
    for file in git(*others, "--", "torchrl_sql", "configs").split("\0")[:-1]:
        diff += git("diff", "--binary", "--no-index", "--", os.devnull, file, ends=(0, 1))  # 1: they differ
    return GitState(git("rev-parse", "HEAD").strip(), untracked, diff)


def versions() -> dict[str, str]:
    """Versions of Python, the packages that decide results, and SLURM where there is one."""
    found = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    if shutil.which("sinfo") is not None:
        done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True)
        found["slurm"] = done.stdout.strip().removeprefix("slurm ") or "unknown"
    return found
