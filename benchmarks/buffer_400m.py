"""A store of 400 million transitions: disk, time to open, memory, latency of a batch, reads from a cold disk.

    python benchmarks/buffer_400m.py --json buffer_400m.json

40 games with 10 million transitions each. The emulator plays one shard of each of eight games (15,360 frames), random
policy with repeated actions; their files fill the store: copied as long as ``--distinct-gigabytes`` lasts (frames that
share no byte on disk and no page in memory), then hard-linked. To the reader each is a file of its own.

- open: ``FrameStore.open`` and ``AtariFrameStorage`` in a process that has done neither, files in the page cache.
- memory: of that process after all batches. "own" is what it alone holds; mapped files (actions, rewards, episodes)
  belong to the page cache, which processes share and the kernel takes back when it needs to.
- latency: median time of ``OfflineAtariReplay.sample`` (drawing and reading 512 transitions, one thread), of the first
  25,000 transitions of each game (1M) and of all (400M). The same batches are read once before, so that both are warm.
- cold: the first batches, one thread and four, after the page cache was emptied (``posix_fadvise`` on every file).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _episodes import EIGHT_GAMES, play
from buffer import empty_page_cache

from torchrl_sql.data import AtariFrameStorage, FrameStore, OfflineAtariReplay, Recording
from torchrl_sql.data.frames import shard_path
from torchrl_sql.data.recording import MEMBERS
from torchrl_sql.games import TRAIN_40
from torchrl_sql.provenance import describe_benchmark

BATCH_SIZE = 512


def write_shard(store: FrameStore, game: str) -> Recording:
    """A run of exactly one full shard; its last episode is cut."""
    left = store.shard_frames
    with store.writer(game, source="random policy with repeated actions") as writer:
        for e in play(game):
            length = min(left, len(e.actions))
            ended = e.terminated and length == len(e.actions)
            writer.add_episode(e.frames[:length], e.actions[:length], e.rewards[:length], ended)
            left -= length
            if not left:
                break
    return store.recording(game)


def fill_run(store: FrameStore, game: str, shard: Recording, num_shards: int, distinct_bytes: int) -> int:
    """A run of ``num_shards`` times the same shard; returns the bytes of frames that were copied."""
    folder = store.path / game / "0"
    source = shard_path(shard.path / "frames", 0)
    size, copied = source.stat().st_size, 0
    for number in range(num_shards):
        target = shard_path(folder / "frames", number)
        target.parent.mkdir(parents=True)
        if copied + size <= distinct_bytes:
            shutil.copyfile(source, target)
            copied += size
        elif copied:
            os.link(shard_path(folder / "frames", number % (copied // size)), target)
        else:
            os.link(source, target)
    layout = json.loads((shard.path / "frames" / "zarr.json").read_text())
    layout["shape"][0] = num_shards * store.shard_frames
    (folder / "frames" / "zarr.json").write_text(json.dumps(layout))
    episodes = np.tile(shard.episodes, num_shards)
    episodes["first_frame"] += np.repeat(np.arange(num_shards) * store.shard_frames, shard.num_episodes)
    flat = {
        "actions": np.tile(shard.actions, num_shards),
        "rewards": np.tile(shard.rewards, num_shards),
        "episodes": episodes,
        "chunks": np.tile(shard.chunk_checksums(), num_shards),
    }
    for key, array in flat.items():
        (folder / MEMBERS[key][0]).write_bytes(array.tobytes())
    manifest = replace(
        shard.manifest,
        game=game,
        num_frames=num_shards * shard.num_frames,
        num_steps=num_shards * shard.num_steps,
        num_episodes=num_shards * shard.num_episodes,
        num_sealed_chunks=num_shards * shard.manifest.num_sealed_chunks,
        crc32={key: zlib.crc32(array.tobytes()) for key, array in flat.items()},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return copied


def build(folder: Path, transitions_per_game: int, distinct_bytes: int) -> dict[str, Any]:
    shards = FrameStore.create(folder / "shards")
    store = FrameStore.create(folder / "store")
    num_shards = -(-transitions_per_game // store.shard_frames)
    copied, start = 0, time.perf_counter()
    for number, game in enumerate(TRAIN_40):
        source = EIGHT_GAMES[number % len(EIGHT_GAMES)]
        shard = shards.recording(source) if source in shards.games else write_shard(shards, source)
        share = (distinct_bytes - copied) // (len(TRAIN_40) - number)
        copied += fill_run(store, game, shard, num_shards, share)
        print(f"{game}: {copied / 1e9:.1f} GB, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    files = [path.stat() for path in store.path.rglob("*") if path.is_file()]
    return {
        "num_shards": num_shards * len(TRAIN_40),
        "disk_bytes_as_if_all_distinct": sum(file.st_size for file in files),
        "disk_bytes": sum({file.st_ino: file.st_size for file in files}.values()),
        "distinct_frame_bytes": copied,
    }


# Each of these runs in a process of its own.


def measure_warm(path: Path, num_batches: int, rounds: int) -> dict[str, Any]:
    start = time.perf_counter()
    storage = AtariFrameStorage(FrameStore.open(path))
    open_seconds = time.perf_counter() - start
    num_transitions = len(storage)
    del storage
    replays = {
        "1m": OfflineAtariReplay(path, batch_size=BATCH_SIZE, transitions_per_game=25_000),
        "400m": OfflineAtariReplay(path, batch_size=BATCH_SIZE),
    }
    times: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(rounds + 1):
        for name, replay in replays.items():
            state = replay.state_dict()
            for _ in range(num_batches):
                start = time.perf_counter()
                replay.sample()
                if number:  # The first round warms up the same batches.
                    times[name].append(time.perf_counter() - start)
            replay.load_state_dict(state)
    latency = {name: statistics.median(found) for name, found in times.items()}
    return {
        "num_transitions": num_transitions,
        "open_seconds": open_seconds,
        "resident_bytes": memory("RssAnon"),
        "resident_mapped_file_bytes": memory("RssFile"),
        "latency_seconds": latency,
        "ratio_latency_vs_1m": latency["400m"] / latency["1m"],
    }


def measure_cold(path: Path, prefetch: int, num_batches: int) -> float:
    replay = OfflineAtariReplay(path, batch_size=BATCH_SIZE, prefetch=prefetch)
    start = time.perf_counter()
    for _ in range(num_batches):
        replay.sample()
    rate = num_batches * BATCH_SIZE / (time.perf_counter() - start)
    replay.shutdown()
    return rate


def memory(field: str) -> int:
    """Bytes, from ``/proc/self/status``."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def in_new_process(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions-per-game", type=int, default=10_000_000, help="default: 10,000,000")
    memory_gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    parser.add_argument(
        "--distinct-gigabytes",
        type=float,
        default=1.05 * memory_gigabytes,
        help="copied rather than linked (default: 5%% more than the machine's memory)",
    )
    parser.add_argument("--batches", type=int, default=100, help="of each measurement (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="of warm measurements (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, path, first, second = args.measure
        function = {"warm": measure_warm, "cold": measure_cold}[kind]
        print(json.dumps(function(Path(path), int(first), int(second))))
        return
    machine = describe_benchmark()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "store"
        figures = build(Path(folder), args.transitions_per_game, int(args.distinct_gigabytes * 1e9))
        figures |= in_new_process("warm", path, args.batches, args.rounds)
        figures["cold_transitions_per_second"] = {}
        for prefetch in (0, 4):
            empty_page_cache(path)
            rate = in_new_process("cold", path, prefetch, args.batches)
            figures["cold_transitions_per_second"][f"prefetch_{prefetch}"] = rate
    figures["machine"] = machine
    latency, cold = figures["latency_seconds"], figures["cold_transitions_per_second"]
    rows = {
        "transitions": f"{figures['num_transitions']:,}",
        "disk, if no file were a link": f"{figures['disk_bytes_as_if_all_distinct'] / 1e9:.1f} GB",
        "disk, files that are not links": f"{figures['disk_bytes'] / 1e9:.1f} GB",
        "time to open": f"{figures['open_seconds']:.2f} s",
        "process memory, own": f"{figures['resident_bytes'] / 1e9:.2f} GB",
        "process memory, mapped files": f"{figures['resident_mapped_file_bytes'] / 1e9:.2f} GB",
        "batch of 512 from 1M, warm": f"{latency['1m'] * 1e3:.1f} ms",
        "batch of 512 from 400M, warm": f"{latency['400m'] * 1e3:.1f} ms ({figures['ratio_latency_vs_1m']:.2f}x)",
        "cold, one thread": f"{cold['prefetch_0']:,.0f} transitions/s",
        "cold, four threads": f"{cold['prefetch_4']:,.0f} transitions/s",
    }
    print("| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
