"""What a result was computed with: package versions, the machine, git state. One for runs, evaluations, launches and
benchmarks.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = ("torchrl_sql", "torch", "torchrl", "tensordict", "ale-py", "numpy", "tensorstore")
_BENCHMARK_PACKAGES = (*_PACKAGES[1:], "zstandard", "lz4", "google-crc32c", "zlib-ng")
_ROOT = Path(__file__).resolve().parent.parent


def software_versions() -> dict[str, str]:
    """The machine, and the versions of Python and the packages that decide results."""
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return machine | {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def cluster_versions() -> dict[str, str]:
    """:func:`software_versions`, and those of submitit and of SLURM where it is installed."""
    versions = software_versions() | {"submitit": metadata.version("submitit")}
    if shutil.which("sinfo") is not None:
        answer = subprocess.run(["sinfo", "--version"], capture_output=True, text=True)
        versions["slurm"] = answer.stdout.strip().removeprefix("slurm ") or "unknown"
    return versions


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
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return GitState(None, [], "")

    def git(*arguments: str, exit_codes: Sequence[int] = (0,)) -> str:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True)
        if done.returncode not in exit_codes:
            raise OSError(f"git {' '.join(arguments)} in {_ROOT}: {done.stderr.strip()}")
        return done.stdout

    others = ("ls-files", "--others", "--exclude-standard", "-z")
    untracked = git(*others).split("\0")[:-1]
    diff = git("diff", "--binary", "HEAD")
    for file in git(*others, "--", "torchrl_sql", "configs").split("\0")[:-1]:
        diff += git("diff", "--binary", "--no-index", "--", os.devnull, file, exit_codes=(0, 1))  # 1: they differ
    return GitState(git("rev-parse", "HEAD").strip(), untracked, diff)


def describe_benchmark() -> dict[str, Any]:
    """Command, date, commit (with a plus sign if files differ from it), versions, processor and memory of this
    process, as JSON values to keep beside a benchmark's figures.
    """
    state = git_state()
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": "unknown" if state.commit is None else state.commit[:7] + ("+" if state.diff else ""),
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gigabytes": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _BENCHMARK_PACKAGES}},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
