"""A part of a store as the memory-mapped transitions of plain TorchRL."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_sql.data.catalogue import LOCK_FILE, locked
from torchrl_sql.data.storage import AtariFrameStorage
from torchrl_sql.files import check_outside_stores, sync_folder, sync_tree

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
    check_free(target)
    if not len(storage):
        raise ValueError(f"{storage} has no transition to export")
    one = storage[:1]
    num_bytes = len(storage) * sum(leaf.numel() * leaf.element_size() for leaf in one.values(True, True))
    with new_folder(target) as unfinished:  # which removes what an attempt that was killed left on the disk
        free = shutil.disk_usage(unfinished).free
        if num_bytes > free:
            raise OSError(
                f"{target} needs {num_bytes:,} bytes for {len(storage):,} transitions, the disk has {free:,} free"
            )
        out = one.expand(len(storage)).memmap_like(str(unfinished))
        for first in range(0, len(storage), _NUM_TRANSITIONS_AT_ONCE):
            last = min(first + _NUM_TRANSITIONS_AT_ONCE, len(storage))
            out[first:last] = storage[first:last]
            progress(last, len(storage))
        (unfinished / GAMES_FILE).write_text(json.dumps(list(storage.games)) + "\n", encoding="utf-8")
    return num_bytes


def check_free(target: Path) -> None:
    """Checks that nothing has the name of a folder that is to be made, and that it lies in no store.

    Raises:
        FileExistsError: if something has.
        ValueError: if it does.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another path, or delete it")
    check_outside_stores(target, "the new folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under a hidden name beside ``target`` and move it there, on disk, if the block succeeds.

    Args:
        target (Path): the new folder.

    Yields:
        The hidden folder, empty. It is removed if the block raises, or by the next attempt if the process was killed.

    Raises:
        FileExistsError: if ``target`` is there already.
        BlockingIOError: if another process is filling it.
    """
    unfinished = target.with_name(f".{target.name}.unfinished-export")
    unfinished.mkdir(parents=True, exist_ok=True)
    with locked(unfinished, wait=False):
        try:
            check_free(target)  # Another process may have ended meanwhile.
            for left in unfinished.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK_FILE:
                    left.unlink()
            yield unfinished
            (unfinished / LOCK_FILE).unlink()
            sync_tree(unfinished)
            os.replace(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    sync_folder(target.parent)
