"""A part of a store as the memory-mapped transitions of plain TorchRL."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torchrl_sql.data.storage import AtariFrameStorage

GAMES_FILE = "games.json"
"""Names of the games in the exported folder: ``game_id`` indexes them."""

_NUM_TRANSITIONS_AT_ONCE = 512


def export_memmap(
    storage: AtariFrameStorage,
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes all transitions of a storage, decoded, as a memory-mapped TensorDict ``[N]``.

    They come in the order of the storage's indices, with its keys, and need nothing of this package any more:
    ``TensorStorage(TensorDict.load_memmap(path))`` goes into any TorchRL replay buffer. Every transition holds both its
    stacks, 56 KB: meant for a part of a store, chosen by the storage's arguments. The folder appears when it is whole.

    Args:
        storage (AtariFrameStorage): the transitions.
        path (path): the new folder.

    Keyword Args:
        progress (callable): is given the number of transitions done and of all.

    Returns:
        Bytes written.

    Raises:
        FileExistsError: if ``path`` is there already.
        OSError: if the disk has not enough space, or cannot be written.
        ValueError: if there is no transition.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another path, or delete it")
    if not len(storage):
        raise ValueError(f"{storage} has no transition to export")
    one = storage[:1]
    num_bytes = len(storage) * sum(leaf.numel() * leaf.element_size() for leaf in one.values(True, True))
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if num_bytes > free:
        raise OSError(
            f"{target} needs {num_bytes:,} bytes for {len(storage):,} transitions, the disk has {free:,} free"
        )
    unfinished = target.with_name(f".{target.name}.unfinished-export")
    if unfinished.exists():  # Of an export that was killed.
        shutil.rmtree(unfinished)
    out = one.expand(len(storage)).memmap_like(str(unfinished))
    for first in range(0, len(storage), _NUM_TRANSITIONS_AT_ONCE):
        last = min(first + _NUM_TRANSITIONS_AT_ONCE, len(storage))
        out[first:last] = storage[first:last]
        progress(last, len(storage))
    (unfinished / GAMES_FILE).write_text(json.dumps(list(storage.games)) + "\n", encoding="utf-8")
    os.replace(unfinished, target)
    return num_bytes
