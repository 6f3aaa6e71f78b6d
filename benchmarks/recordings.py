"""What a batch costs when the same transitions lie in 2 or in 300 recordings.

    python benchmarks/recordings.py --json recordings.json

Both stores hold the same 60,000 steps of black frames, so that decoding costs the same. Batches of 512, one thread,
files in the page cache. "scalars" is the part that reads actions and rewards. Rounds of both alternate; medians are
shown, in milliseconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.data.scalars import ScalarReader
from torchrl_sql.provenance import describe_benchmark

NUM_STEPS = 60_000
BATCH_SIZE = 512


def write(folder: Path, num_recordings: int) -> FrameStore:
    store = FrameStore.create(folder, chunk_frames=20, shard_frames=200)
    length = NUM_STEPS // num_recordings
    for index in range(num_recordings):
        with store.writer("Pong", run=str(index), source="black frames") as writer:
            for begin in range(0, length, 200):
                steps = min(200, length - begin)
                frames = np.zeros((steps, 84, 84), np.uint8)
                writer.add_episode(frames, np.zeros(steps, int), np.zeros(steps), True)
    return store


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        work()
    return (time.thread_time() - start) / repeats * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_benchmark()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = {number: write(Path(folder) / str(number), number) for number in (2, 300)}
        storages = {number: AtariFrameStorage(store) for number, store in stores.items()}
        readers = {
            number: [ScalarReader(store.recordings, key) for key in ("actions", "rewards")]
            for number, store in stores.items()
        }
        rng = np.random.default_rng(0)
        for round_ in range(args.rounds + 1):
            index = rng.integers(0, NUM_STEPS, (20, BATCH_SIZE))
            for number, storage in storages.items():
                recording, row = np.divmod(index, NUM_STEPS // number)
                span, batches = np.ones(BATCH_SIZE, np.int64), iter(range(20))

                def scalars(readers: list[ScalarReader] = readers[number]) -> None:
                    batch = next(batches)  # noqa: B023 - called at once, within the loop
                    for reader in readers:
                        reader.read(recording[batch], row[batch], span)  # noqa: B023 - called at once, within the loop

                figures = {f"scalars_{number}": milliseconds(scalars, 20)}
                batches = iter(range(20))
                figures[f"batch_{number}"] = milliseconds(lambda: storage.get(index[next(batches)]), 20)  # noqa: B023 - called at once, within the loop
                for name, value in figures.items():
                    if round_:  # The first round warms up.
                        times.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| | 2 recordings | 300 recordings | 300 / 2 |\n|---|---|---|---|")
    for part in ("scalars", "batch"):
        few, many = medians[f"{part}_2"], medians[f"{part}_300"]
        print(f"| {part} | {few:.3f} | {many:.3f} | {many / few:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"milliseconds": medians, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
