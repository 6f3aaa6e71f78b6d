"""Storage and sampler, ready made."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey, unravel_key
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers import Sampler, Storage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from torchrl_sql.arguments import check_count
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.sampler import GameMixtureSampler, GameMixtureSamplerWithoutReplacement, check_batch_size
from torchrl_sql.data.sequences import AtariSequenceStorage
from torchrl_sql.data.storage import DEFAULT_GAMMA, AtariFrameStorage
from torchrl_sql.data.store import FrameStore
from torchrl_sql.data.transfer import DeviceCopies


class OfflineAtariReplay(TensorDictReplayBuffer):
    """A read-only TorchRL replay buffer over stored Atari episodes.

    Differs from its parent in prefetching: batches are read side by side in threads, but delivered in the order of the
    sampler's steps, and the state counts delivered batches only. (The parent holds a lock while it reads, and with
    several threads their order is up to the scheduler.) So batch ``t`` is the same for any ``prefetch``, the ranks'
    slices are those of one global batch, and a buffer restored from :meth:`state_dict` continues with the next one.

    Args:
        store (FrameStore or path): where the episodes are.

    Keyword Args:
        batch_size (int): transitions of the *global* batch; this rank gets ``batch_size / world_size`` of them.
        window_steps (int, optional): in place of transitions, windows of so many steps with returns-to-go, see
            :class:`AtariSequenceStorage`.
        games, n_steps, gamma, first_fraction, last_fraction, every_kth_episode, transitions_per_game, newest_steps:
            see :class:`AtariFrameStorage`.
        mixture, temperature, seed, rank, world_size: see :class:`GameMixtureSampler`.
        replacement (bool): False for :class:`GameMixtureSamplerWithoutReplacement`.
        prefetch (int): batches read ahead, each in a thread of its own; 0 reads in the calling thread.
        device (torch.device or str, optional): where batches are delivered. To a CUDA device the reading threads copy
            them, each frame once, in a stream of their own: neither the host nor the present stream's work waits.
        keys (sequence of NestedKey, optional): entries of the storage's batch (or ``index``) to deliver; default all.
        transform (optional): as for TorchRL's buffers; runs in the calling thread, so that random ones reproduce.

    The batch is that of the storage plus ``index`` int64 ``[B]``, the storage indices.

    Examples:
        >>> replay = OfflineAtariReplay("store", batch_size=512)  # doctest: +SKIP
        >>> replay.sample()["observation"].shape  # doctest: +SKIP
        torch.Size([512, 4, 84, 84])
    """

    def __init__(
        self,
        store: FrameStore | str | os.PathLike[str],
        *,
        batch_size: int,
        window_steps: int | None = None,
        games: str | Sequence[str] | None = None,
        n_steps: int = 1,
        gamma: float = DEFAULT_GAMMA,
        first_fraction: float = 1.0,
        last_fraction: float = 1.0,
        every_kth_episode: int = 1,
        transitions_per_game: int | None = None,
        newest_steps: int | None = None,
        mixture: Literal["games", "transitions"] | Sequence[float] = "games",
        temperature: float = 1.0,
        replacement: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
        device: torch.device | str | None = None,
        keys: Sequence[NestedKey] | None = None,
        transform: Any = None,
    ) -> None:
        sampler = (GameMixtureSampler if replacement else GameMixtureSamplerWithoutReplacement)(
            mixture=mixture, temperature=temperature, seed=seed, rank=rank, world_size=world_size
        )
        check_batch_size(batch_size, world_size)
        if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
            raise ValueError(f"prefetch must be an integer >= 0, got {prefetch!r}")
        if window_steps is not None:
            check_count("window_steps", window_steps)
        for name, value, default in (("n_steps", n_steps, 1), ("gamma", gamma, DEFAULT_GAMMA)):
            if window_steps is not None and value != default:
                raise ValueError(
                    f"{name} has no meaning with window_steps, whose returns go to the end and are not discounted, "
                    f"got {value!r}"
                )
        storage: AtariFrameStorage
        subset: dict[str, Any] = {
            "first_fraction": first_fraction,
            "last_fraction": last_fraction,
            "every_kth_episode": every_kth_episode,
            "transitions_per_game": transitions_per_game,
            "newest_steps": newest_steps,
        }
        if window_steps is None:
            storage = AtariFrameStorage(store, games, n_steps=n_steps, gamma=gamma, **subset)
        else:
            storage = AtariSequenceStorage(store, games, num_steps=window_steps, **subset)
        self._depth = prefetch
        self._fresh_until: int | None = None
        self._keys = None if keys is None else list(keys)
        self._copies = None if device is None else DeviceCopies(_with_index(torch.device(device)))
        storage.pin_memory = self._copies is not None and self._copies.device.type == "cuda"
        storage.reads_next = keys is None or not {"next", ("next", "observation")}.isdisjoint(map(unravel_key, keys))
        self._reads: deque[tuple[int, Future[Any]]] = deque()
        self._readers: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        super().__init__(
            storage=storage,
            sampler=sampler,
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
            transform=transform,
        )
        self._sampler.batch_size = batch_size  # So that the sampler refuses states of other batches.

    @property
    def games(self) -> tuple[str, ...]:
        """Names of the games; ``game_id`` indexes them."""
        return self._storage.games

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """The next batch, or this rank's slice of it.

        Args:
            batch_size (int, optional): another global batch size; not together with ``prefetch``.
            return_info (bool): return ``(batch, {"index": ...})`` instead of the batch, with the index on the host.

        Raises:
            RuntimeError: after :meth:`shutdown`.
            TypeError: if :meth:`set_sampler` gave it a sampler that cannot draw a batch by its number.
            ValueError: for a batch size that does not continue the batches before.
            KeyError: for ``keys`` that the batch lacks.
            DamagedFramesError: if frames of the batch are not what was committed.
        """
        if self._service_shutdown:
            raise RuntimeError("a replay buffer cannot be sampled after shutdown()")
        if not isinstance(self._sampler, GameMixtureSampler):
            raise TypeError(
                f"{type(self).__name__} draws with a GameMixtureSampler, got {type(self._sampler).__name__}: use "
                f"TensorDictReplayBuffer(storage={type(self._storage).__name__}(...), sampler=...)"
            )
        if batch_size is None:
            batch_size = self._batch_size
        elif self._depth and batch_size != self._batch_size:
            raise ValueError(f"batch_size must be {self._batch_size} as read ahead, got {batch_size}")
        with self._futures_lock:
            step = self._sampler.step
            index, read = self._read_ahead(step) if self._depth else self._read(batch_size, step)
            self._sampler.advance(self._storage, batch_size)
        batch = read if self._copies is None else self._copies.receive(read)
        if len(self._transform):
            batch = self._transform(batch)
        return (batch, {"index": index}) if return_info else batch

    def _read(self, batch_size: int, step: int) -> tuple[torch.Tensor, Any]:
        """The index of a batch, and the batch or what is under way to the device."""
        index = self._sampler.indices(self._storage, batch_size, step)
        batch = self._storage.get(index)
        batch["index"] = index
        if self._keys is not None:
            known = set(batch.keys(True))
            if absent := [key for key in self._keys if unravel_key(key) not in known]:
                raise KeyError(f"keys must be entries of the batch ({sorted(known, key=str)}), got {absent}")
            batch = batch.select(*self._keys)
        return index, batch if self._copies is None else self._copies.send(batch)

    def _read_ahead(self, step: int) -> tuple[torch.Tensor, Any]:
        moved = self._reads and self._reads[0][0] != step  # or the last read failed
        if moved or self._process != os.getpid():
            self._drop_reads()
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._depth, thread_name_prefix="replay-reader")
        stop = step + self._depth + 1
        if self._fresh_until is not None:
            stop = max(step + 1, min(stop, self._fresh_until))
        for ahead in range(step + len(self._reads), stop):
            self._reads.append((ahead, self._readers.submit(self._read, self._batch_size, ahead)))
        return self._reads.popleft()[1].result()

    def _drop_reads(self) -> None:
        if self._process != os.getpid():  # A forked child has no threads that could end what its parent began.
            self._reads, self._readers, self._process = deque(), None, os.getpid()
        for _, future in self._reads:
            future.cancel()
        wait([future for _, future in self._reads])  # they read from a storage that may be about to change
        self._reads.clear()

    def set_storage(self, storage: AtariFrameStorage, collate_fn: Callable[[Any], Any] | None = None) -> Storage:
        """Draws from another storage from now on; returns the one before.

        Args:
            storage (AtariFrameStorage): what to draw from.
            collate_fn (callable, optional): applied to what ``replay[index]`` reads; default: nothing.
        """
        with self._futures_lock:
            self._drop_reads()
            storage.pin_memory, storage.reads_next = self._storage.pin_memory, self._storage.reads_next
            self._fresh_until = None
            return super().set_storage(storage, storage.collate if collate_fn is None else collate_fn)

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Draws with another sampler from now on, which is at its own step; returns the one before."""
        with self._futures_lock:
            self._drop_reads()
            return super().set_sampler(sampler)

    def seek(self, step: int) -> None:
        """Make the batch of the sampler's ``step``, counted from 0, the next one."""
        with self._futures_lock:
            self._sampler.step = step

    def show(self, recordings: Sequence[Recording], *, until: int) -> None:
        """Draws from other states of the recordings from now on, see :meth:`AtariFrameStorage.show`.

        Args:
            recordings (sequence of Recording): as they are to be shown.

        Keyword Args:
            until (int): the sampler's step at which :meth:`show` will be called again: batches from it on are not read
                ahead.
        """
        with self._futures_lock:
            self._drop_reads()
            self._storage.show(recordings)
            self._fresh_until = until

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the batches that were delivered when the state was taken.

        Raises:
            ValueError: if its batches are others: of other data, n, gamma, mixture, temperature, seed or batch size.
                Nothing is changed then.
        """
        with self._futures_lock:
            self._drop_reads()
            super().load_state_dict(state_dict)

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the reader threads; the buffer cannot be sampled afterwards."""
        self._drop_reads()
        if self._readers is not None:
            self._readers.shutdown()
            self._readers = None
        super().shutdown(timeout)

    def _dump_prefetch_state(self, path: Path, prefetch_state: dict[str, Any]) -> None:
        """Nothing read ahead belongs to the state (and TorchRL would pickle it)."""

    def _load_prefetch_state(self, path: Path) -> None:
        """See :meth:`_dump_prefetch_state`."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reads": deque(), "_readers": None}


def _with_index(device: torch.device) -> torch.device:
    """Reading threads have another current device than the caller."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
