"""Reading transitions: this package's buffer against TorchRL's storages and a plain gather, same frames, one run.

    python benchmarks/buffer.py --json buffer.json
    python benchmarks/buffer.py --cold-gigabytes 27 --json buffer.json    # and from disk, with that much raw data

Every contender delivers batches of 512 transitions, five frames each (the four of the observation and the next one), at
random places of the same frames, with everything in memory. ``T`` threads: pinned to ``T`` cores, ``T`` Python threads,
PyTorch's own set to one. Rounds of all contenders alternate; medians are shown. Rates are of one thread, per second of
processor time, so that other programs on the machine do not count; two threads are compared with one by the clock, in
the same round.

- ours, in zstd and in lz4: ``OfflineAtariReplay.sample``: stacks with zeros before an episode's start, actions, clipped
  rewards, flags; files in the page cache. Two threads: ``prefetch=2``. And the same where no C compiler was there.
- TensorStore: 512 windows of five frames of the same files through ``tensorstore.stack``, its threads limited to ``T``;
  nothing but frames.
- TorchRL memmap: ``TensorDictReplayBuffer(LazyMemmapStorage, SliceSampler(slice_len=5, cache_values=True))``: slices of
  five raw frames with action, reward and flags. A buffer a thread, as a buffer locks while it samples.
- TorchRL compressed: the same sampler over ``CompressedListStorage``.
- raw gather: ``frames[index[:, None] + torch.arange(5)]`` and the action, reward and flag, from tensors in memory, as
  TorchRL's in-memory storages read.
- raw copy: ``numpy.take`` of the frames alone, a memory copy of 7 KB each: the limit of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
import torch
from _episodes import EIGHT_GAMES, Episode, play
from tensordict import TensorDict
from torchrl.data import (
    CompressedListStorage,
    LazyMemmapStorage,
    SliceSampler,
    Storage,
    TensorDictReplayBuffer,
    TensorStorage,
)

from torchrl_sql.data import FrameStore, OfflineAtariReplay, summarise
from torchrl_sql.data.frames import Codec
from torchrl_sql.data.gather import gather_in_python
from torchrl_sql.provenance import describe_benchmark

BATCH_SIZE = 512
NUM_FRAMES = 5


def collect(num_transitions: int) -> dict[str, list[Episode]]:
    """At least so many transitions of each game."""
    games: dict[str, list[Episode]] = {}
    for game in EIGHT_GAMES:
        games[game], left = [], num_transitions
        for episode in play(game):
            games[game].append(episode)
            left -= len(episode.actions)
            if left <= 0:
                break
        print(f"{game}: {sum(len(e.actions) for e in games[game]):,} transitions", file=sys.stderr)
    return games


def write_ours(games: dict[str, list[Episode]], folder: Path, codec: Codec = "zstd") -> FrameStore:
    store = FrameStore.create(folder, codec=codec)
    for game, episodes in games.items():
        with store.writer(game, source="random policy with repeated actions") as writer:
            for e in episodes:
                writer.add_episode(e.frames, e.actions, e.rewards, e.terminated)
    return store


def bytes_per_transition(store: FrameStore) -> float:
    """Mean over games of everything on disk."""
    return statistics.mean(summary.bytes_per_transition for summary in summarise(store))


def torchrl_items(frames: torch.Tensor) -> TensorDict:
    """One element a frame."""
    num_frames = len(frames)
    next_ = {
        "reward": torch.zeros(num_frames, 1),
        "done": torch.zeros(num_frames, 1, dtype=torch.bool),
        "terminated": torch.zeros(num_frames, 1, dtype=torch.bool),
    }
    action = torch.zeros(num_frames, dtype=torch.int64)
    return TensorDict({"observation": frames, "action": action, "next": TensorDict(next_, [num_frames])}, [num_frames])


def torchrl_buffers(storage: Storage, trajectories: torch.Tensor, num_threads: int) -> list[TensorDictReplayBuffer]:
    return [
        TensorDictReplayBuffer(
            storage=storage,
            # truncated_key: its default fails with CompressedListStorage, and costs time elsewhere.
            sampler=SliceSampler(
                slice_len=NUM_FRAMES, trajectories=trajectories, cache_values=True, truncated_key=None
            ),
            batch_size=BATCH_SIZE * NUM_FRAMES,
        )
        for _ in range(num_threads)
    ]


# With everything in memory


class Rate(NamedTuple):
    """Transitions per second."""

    by_clock: float
    of_processor_time: float


def rate(samples: Sequence[Callable[[], object]], seconds: float) -> Rate:
    """Of threads that each repeat one of ``samples``."""
    counts, start, processor_start = [0] * len(samples), time.perf_counter(), time.process_time()

    def work(number: int) -> None:
        while time.perf_counter() < start + seconds:
            samples[number]()
            counts[number] += 1

    with ThreadPoolExecutor(len(samples)) as threads:
        list(threads.map(work, range(len(samples))))
    num_transitions = sum(counts) * BATCH_SIZE
    return Rate(
        num_transitions / (time.perf_counter() - start), num_transitions / (time.process_time() - processor_start)
    )


def rate_ours(store: FrameStore, num_threads: int, seconds: float, *, in_python: bool = False) -> Rate:
    prefetch = num_threads if num_threads > 1 else 0
    replay = OfflineAtariReplay(store, batch_size=BATCH_SIZE, mixture="transitions", prefetch=prefetch)
    if in_python:
        replay._storage._reader._gather = gather_in_python
    for _ in range(20):  # The first ones announce to the disk what they will read.
        replay.sample()
    found = rate([replay.sample], seconds)
    replay.shutdown()
    return found


def tensorstore_reader(store: FrameStore, num_threads: int) -> Callable[[], np.ndarray]:
    limit = {"limit": num_threads}
    cache = {"total_bytes_limit": 1 << 20}  # Shard indices, and no more than a few chunks.
    context = ts.Context({"cache_pool": cache, "data_copy_concurrency": limit, "file_io_concurrency": limit})
    spec = {"driver": "zarr3", "recheck_cached_metadata": "open", "recheck_cached_data": "open"}
    arrays = [
        ts.open({**spec, "kvstore": {"driver": "file", "path": f"{run.path}/frames/"}}, context=context).result()
        for run in store.recordings
    ]
    ends = np.cumsum([run.num_frames - NUM_FRAMES for run in store.recordings])

    def sample() -> np.ndarray:
        start = np.random.default_rng().integers(0, ends[-1], BATCH_SIZE)
        run = np.searchsorted(ends, start, side="right")
        row = start - np.concatenate([[0], ends])[run]
        windows = [
            arrays[r][i : i + NUM_FRAMES].translate_to[0, 0, 0] for r, i in zip(run.tolist(), row.tolist(), strict=True)
        ]
        return ts.stack(windows).read().result()

    return sample


def in_memory(games: dict[str, list[Episode]], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rates by contender and number of threads, and bytes per transition."""
    started = time.process_time()
    store, zstd_done = write_ours(games, folder / "store"), time.process_time()
    lz4_store, lz4_done = write_ours(games, folder / "lz4", "lz4"), time.process_time()
    frames = torch.from_numpy(np.concatenate([e.frames for episodes in games.values() for e in episodes]))
    lengths = torch.tensor([len(e.frames) for episodes in games.values() for e in episodes])
    trajectories = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first = torch.cumsum(lengths, 0) - lengths
    num_starts = lengths - NUM_FRAMES + 1

    memmap = LazyMemmapStorage(len(frames), scratch_dir=str(folder / "memmap"))
    compressed = CompressedListStorage(len(frames))
    for storage in (memmap, compressed):
        writer = TensorDictReplayBuffer(storage=storage, batch_size=1)
        for some in torch.split(torch.arange(len(frames)), 4096):
            writer.extend(torchrl_items(frames[some]))

    def index() -> torch.Tensor:
        """First frames of windows within episodes."""
        episode = torch.multinomial(num_starts.double(), BATCH_SIZE, replacement=True)
        start = first[episode] + (torch.rand(BATCH_SIZE) * num_starts[episode]).long()
        return start[:, None] + torch.arange(NUM_FRAMES)

    scalars = torchrl_items(frames[:1]).expand(len(frames)).exclude("observation").contiguous()

    def gather() -> TensorDict:
        rows = index()
        return scalars[rows[:, -2]].set("observation", frames[rows])

    def copy() -> np.ndarray:
        return frames.numpy().take(index().numpy().ravel(), 0)

    contenders: dict[str, Callable[[int, float], Rate]] = {
        "ours": lambda threads, seconds: rate_ours(store, threads, seconds),
        "ours_lz4": lambda threads, seconds: rate_ours(lz4_store, threads, seconds),
        "ours_in_python": lambda threads, seconds: rate_ours(store, threads, seconds, in_python=True),
        "ours_lz4_in_python": lambda threads, seconds: rate_ours(lz4_store, threads, seconds, in_python=True),
        "tensorstore": lambda threads, seconds: rate([tensorstore_reader(store, threads)] * threads, seconds),
        "torchrl_memmap": lambda threads, seconds: rate(
            [buffer.sample for buffer in torchrl_buffers(memmap, trajectories, threads)], seconds
        ),
        "torchrl_compressed": lambda threads, seconds: rate(
            [
                lambda b=buffer: b.sample()["observation"]
                for buffer in torchrl_buffers(compressed, trajectories, threads)
            ],
            seconds,
        ),
        "raw_gather": lambda threads, seconds: rate([gather] * threads, seconds),
        "raw_copy": lambda threads, seconds: rate([copy] * threads, seconds),
    }
    found: dict[tuple[str, int], list[Rate]] = {(name, t): [] for name in contenders for t in (1, 2)}
    for number in range(args.rounds + 1):
        for (name, threads), rates in found.items():
            with cores(threads):
                rates.append(contenders[name](threads, args.seconds))
        print(f"round {number} of {args.rounds} (round 0 does not count)", file=sys.stderr)
    size_compressed = sum(num_bytes(item) for item in compressed._storage)
    return {
        "rates": {
            f"{name}_1": statistics.median(rate.of_processor_time for rate in found[name, 1][1:]) for name in contenders
        },
        "two_threads": {
            name: statistics.median(
                two.by_clock / one.by_clock for one, two in zip(found[name, 1][1:], found[name, 2][1:], strict=True)
            )
            for name in contenders
        },
        "frames_written_per_processor_second": {
            "zstd": len(frames) / (zstd_done - started),
            "lz4": len(frames) / (lz4_done - zstd_done),
        },
        "bytes": {
            "ours": bytes_per_transition(store),
            "ours_lz4": bytes_per_transition(lz4_store),
            "ours_in_python": bytes_per_transition(store),
            "ours_lz4_in_python": bytes_per_transition(lz4_store),
            "tensorstore": bytes_per_transition(store),
            "torchrl_memmap": sum(f.stat().st_size for f in (folder / "memmap").rglob("*")) / len(frames),
            "torchrl_compressed": size_compressed / len(frames),
            "raw_gather": float(frames[0].numel()),
            "raw_copy": float(frames[0].numel()),
        },
        "num_transitions": int(sum(len(e.actions) for episodes in games.values() for e in episodes)),
    }


def num_bytes(item: Any) -> int:
    """Bytes of the tensors of one element of the compressed storage, a dict of dicts."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    return sum(num_bytes(value) for value in item.values())


def many_recordings(games: dict[str, list[Episode]], folder: Path, num_rounds: int) -> dict[int, float]:
    """Milliseconds of processor time per batch by number of recordings, of the same frames in lz4."""
    frames = np.concatenate([episode.frames for episode in games["Breakout"]])[:18_000]
    samples: dict[int, Callable[[], object]] = {}
    for number in (2, 300):
        store = FrameStore.create(folder / str(number), codec="lz4", chunk_frames=20, shard_frames=60)
        for index, part in enumerate(np.split(frames, number)):
            with store.writer("Breakout", run=str(index), source="a part of random play") as writer:
                writer.add_episode(part, np.zeros(len(part), int), np.zeros(len(part)), True)
        samples[number] = OfflineAtariReplay(store, batch_size=BATCH_SIZE).sample
    found: dict[int, list[float]] = {number: [] for number in samples}
    for _ in range(50 * (num_rounds + 1)):
        for number, sample in samples.items():
            start = time.thread_time()
            sample()
            found[number].append(1e3 * (time.thread_time() - start))
    return {number: statistics.median(times[50:]) for number, times in found.items()}


@contextmanager
def cores(num_cores: int) -> Iterator[None]:
    """Pins this thread, and those it starts, to so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:num_cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# From disk


def from_disk(games: dict[str, list[Episode]], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """First batches after emptying the page cache, in a process of their own; the episodes repeat to fill the disk."""
    frames = torch.from_numpy(np.concatenate([e.frames for episodes in games.values() for e in episodes]))
    repeats = math.ceil(args.cold_gigabytes * 1e9 / frames.numel())
    items = torchrl_items(frames)
    raw = items[:1].expand(repeats * len(items)).memmap_like(str(folder / "cold_raw"))
    for number in range(repeats):
        raw[number * len(items) : (number + 1) * len(items)] = items
        print(f"wrote {number + 1} of {repeats} parts of the raw frames", file=sys.stderr)
    del raw
    write_ours({game: episodes * repeats for game, episodes in games.items()}, folder / "cold_store")
    found: dict[str, list[float]] = {"ours": [], "torchrl_memmap": []}
    for _ in range(args.rounds):
        for name, path in (("torchrl_memmap", "cold_raw"), ("ours", "cold_store")):
            empty_page_cache(folder)
            command = [sys.executable, __file__, "--measure-cold", name, str(folder / path)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[name].append(float(out))
            print(f"from disk, {name}: {found[name][-1]:,.0f} transitions/s", file=sys.stderr)
    return {
        "raw_gigabytes": repeats * frames.numel() / 1e9,
        "rates": {name: statistics.median(rates) for name, rates in found.items()},
    }


def empty_page_cache(folder: Path) -> None:
    """Works without privileges, for files that no process has mapped."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure_cold(name: str, path: Path, num_batches: int = 20) -> float:
    torch.set_num_threads(1)
    if name == "ours":
        sample = OfflineAtariReplay(path, batch_size=BATCH_SIZE, mixture="transitions").sample
    else:
        raw = TensorDict.load_memmap(path)
        trajectories = torch.arange(len(raw)) // 1000
        (buffer,) = torchrl_buffers(TensorStorage(raw), trajectories, 1)
        sample = buffer.sample
    sample()  # What happens once in a run does not count.
    start = time.perf_counter()
    for _ in range(num_batches):
        sample()
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def table(found: dict[str, Any]) -> str:
    titles = {
        "ours": "ours, zstd",
        "ours_lz4": "ours, lz4",
        "ours_in_python": "ours, zstd, without a C compiler",
        "ours_lz4_in_python": "ours, lz4, without a C compiler",
        "tensorstore": "TensorStore, our files",
        "torchrl_memmap": "TorchRL memmap",
        "torchrl_compressed": "TorchRL compressed",
        "raw_gather": "raw gather (torch)",
        "raw_copy": "raw copy (numpy.take)",
    }
    lines = [
        "| | transitions/s | of TorchRL memmap | two threads / one | bytes per transition |",
        "|---|---|---|---|---|",
    ]
    rates = found["rates"]
    for name, title in titles.items():
        rate = rates[f"{name}_1"]
        lines.append(
            f"| {title} | {rate:,.0f} | {rate / rates['torchrl_memmap_1']:.2f} | {found['two_threads'][name]:.2f} | "
            f"{found['bytes'][name]:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=20_000, help="of each of the eight games (default: 20000)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender in each round (default: 2)")
    parser.add_argument("--cold-gigabytes", type=float, help="also read from disk, with so much raw data")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--measure-cold", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_cold:
        print(measure_cold(args.measure_cold[0], Path(args.measure_cold[1])))
        return
    torch.set_num_threads(1)
    machine = describe_benchmark()
    games = collect(args.transitions)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = in_memory(games, Path(folder), args)
        recordings = many_recordings(games, Path(folder), args.rounds)
        cold = from_disk(games, Path(folder), args) if args.cold_gigabytes else None
    rates = found["rates"]
    figures = {
        "bytes_per_transition": found["bytes"]["ours"],
        "ratio_vs_torchrl_memmap": rates["ours_1"] / rates["torchrl_memmap_1"],
        "ratio_vs_torchrl_compressed": rates["ours_1"] / rates["torchrl_compressed_1"],
        "ratio_vs_raw_gather": rates["ours_1"] / rates["raw_gather_1"],
        "ratio_vs_raw_copy": rates["ours_1"] / rates["raw_copy_1"],
        "ratio_two_threads": found["two_threads"]["ours"],
        "lz4": {
            "bytes_per_transition": found["bytes"]["ours_lz4"],
            "ratio_vs_torchrl_memmap": rates["ours_lz4_1"] / rates["torchrl_memmap_1"],
            "ratio_two_threads": found["two_threads"]["ours_lz4"],
        },
        "batch_milliseconds_by_recordings": recordings,
        "in_memory": found,
        "machine": machine,
    }
    print(table(found))
    print("\nA batch of 2 and of 300 recordings: " + ", ".join(f"{ms:.2f} ms" for ms in recordings.values()))
    if cold is not None:
        figures["ratio_cold_vs_torchrl_memmap"] = cold["rates"]["ours"] / cold["rates"]["torchrl_memmap"]
        figures["cold"] = cold
        ours, torchrl = cold["rates"]["ours"], cold["rates"]["torchrl_memmap"]
        print(
            f"\nFrom disk, {cold['raw_gigabytes']:.1f} GB of raw frames: ours {ours:,.0f}, TorchRL memmap "
            f"{torchrl:,.0f} transitions/s ({ours / torchrl:.1f}x)"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
