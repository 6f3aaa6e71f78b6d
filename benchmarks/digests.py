"""SHA-256 of what collection and training made, to see that a change of the code leaves their numbers alone.

A store has a line per file. A run has one line: over the bytes of all tensors of its newest checkpoint's loss and
optimizer, with their shapes and types, each once, sorted: names do not count, nor a buffer that is held twice.

    python benchmarks/digests.py STORE_OR_RUN...
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)


def digest_of_tensors(state: Any) -> str:
    """Of values, shapes and types, whatever their names and order."""
    parts = {
        f"{value.dtype} {tuple(value.shape)} ".encode()
        + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for value in tensors(state)
    }
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in sorted(parts))).hexdigest()


def digest_of_run(folder: Path) -> tuple[str, str]:
    """The newest checkpoint's name and the digest of its loss and optimizer."""
    newest = sorted((folder / "checkpoints").glob("step_*.pt"))[-1]
    state = torch.load(newest, map_location="cpu", weights_only=True)["trainer"]
    return newest.name, digest_of_tensors([state["loss"], state["optimizer"]])


def digests_of_store(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each file."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        folder = Path(name)
        is_run = (folder / "checkpoints").is_dir()
        for file, digest in [digest_of_run(folder)] if is_run else digests_of_store(folder):
            print(f"{digest}  {folder.name}/{file}")
