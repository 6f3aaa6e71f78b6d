"""Speed of the DQN-Replay import against decompression alone, on the same files.

Plays a few episodes in the emulator with random, repeated actions, writes them as checkpoints in DQN-Replay's format
(the same episodes again and again: inflate looks back 32 KB, less than five frames, so it cannot tell), then
times (1) ``gunzip`` to nowhere, (2) Python's ``zlib`` in the same way, (3) the import with 1, 2, ... workers.

    python benchmarks/import_dqn_replay.py --json import.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from torchrl_sql.envs.atari import AtariVector
from torchrl_sql.games import GAMES, resolve_games
from torchrl_sql.provenance import describe_benchmark

IMPORT = """
import json, resource, sys, time
from torchrl_sql.data.importers import import_dqn_replay
source, store, games, checkpoints = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
start, cpu_start = time.perf_counter(), time.process_time()
import_dqn_replay(source, store, games=games, checkpoints=checkpoints)
figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
print(json.dumps({**figures, "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def play(game: str, num_steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of whole episodes, padding included, about ``num_steps`` of them."""
    rng = np.random.default_rng(seed)
    vector = AtariVector(game, 1)
    minimal = GAMES[game].minimal_actions
    rows: dict[str, list[np.ndarray]] = {"observation": [], "action": [], "reward": [], "terminal": []}

    def add(frame: np.ndarray, action: int, reward: float, terminal: bool) -> None:
        for name, value in zip(rows, (frame, np.int32(action), np.float32(reward), np.uint8(terminal)), strict=True):
            rows[name].append(np.asarray(value))

    while len(rows["action"]) < num_steps:
        for _ in range(3):
            add(np.zeros((84, 84), np.uint8), 0, 0, False)
        observation, done, action = vector.reset(np.array([rng.integers(2**31)])), False, 0
        while not done:
            action = action if rng.random() < 0.5 else int(rng.integers(len(minimal)))
            frame = observation[0, -1].copy()
            observation, reward, terminated, truncated = vector.step(np.array([minimal[action]]))
            done = bool(terminated[0] | truncated[0])
            add(frame, action, float(np.clip(reward[0], -1, 1)), done)
    return {name: np.stack(values) for name, values in rows.items()}


def write_checkpoint(folder: Path, number: int, block: dict[str, np.ndarray], repeat: int) -> int:
    """One checkpoint of ``repeat`` times the block, a gzip member each; returns the rows.

    Its last row is that of the lap before, and equal to it: every lap ends with the block's last row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_rows = repeat * len(block["action"])
    for name, array in block.items():
        head = gzip.compress(_header(array.dtype, (num_rows, *array.shape[1:])))
        member = gzip.compress(array.tobytes(), 9)
        (folder / f"$store$_{name}_ckpt.{number}.gz").write_bytes(head + member * repeat)
    add_count = (number + 1) * num_rows - 1
    around = np.arange(num_rows - 2, num_rows + 3) % num_rows
    for name, array in (("add_count", np.array(add_count)), ("invalid_range", around)):
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb") as file:
            np.save(file, array)
    return num_rows


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def time_gunzip(files: list[Path]) -> dict[str, float]:
    start, cpu_start = time.perf_counter(), _cpu_seconds_of_children()
    subprocess.run(["gunzip", "-c", *files], stdout=subprocess.DEVNULL, check=True)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds_of_children() - cpu_start}


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def time_zlib(files: list[Path]) -> dict[str, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    for path in files:
        with path.open("rb") as file:
            inflate = zlib.decompressobj(wbits=31)
            data = file.read(1 << 17)
            while data:
                inflate.decompress(data, 1 << 20)
                data = inflate.unconsumed_tail or inflate.unused_data
                if inflate.eof:
                    inflate = zlib.decompressobj(wbits=31)
                data = data or file.read(1 << 17)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def time_import(root: Path, games: Sequence[str], checkpoints: str, workers: int) -> dict[str, float]:
    """Workers that have started already (which takes seconds, an import of real size hours), each with its games."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = []
        for worker in range(workers):
            arguments = [root / "dqn", Path(folder) / str(worker), ",".join(games[worker::workers]), checkpoints]
            command = [sys.executable, "-c", IMPORT, *map(str, arguments)]
            processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes))
        for process in processes:
            process.stdout.readline()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(process.communicate()[0]) for process in processes]
    return {
        "seconds": max(result["seconds"] for result in results),
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "resident_bytes": max(result["resident_bytes"] for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", default="Breakout,Seaquest", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20_000, help="distinct rows per game (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=10, help="times they are in each checkpoint (default: 10)")
    parser.add_argument("--checkpoints", type=int, default=2, help="a game (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        games, num_rows = resolve_games(args.games), 0
        for game in games:
            block = play(game, args.steps)
            for number in range(args.checkpoints):
                folder = root / "dqn" / game / "1" / "replay_logs"
                num_rows += write_checkpoint(folder, number, block, args.repeat)
        files = sorted((root / "dqn").rglob("*.gz"))
        checkpoints = f"0-{args.checkpoints - 1}"
        figures: dict[str, object] = {
            "machine": describe_benchmark(),
            "games": list(games),
            "num_rows": num_rows,
            "raw_bytes": num_rows * (84 * 84 + 9),
            "gzip_bytes": sum(f.stat().st_size for f in files),
        }
        print(f"{num_rows:,} rows of {', '.join(games)}, {figures['gzip_bytes']:,} bytes gzipped")
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "gunzip": lambda: time_gunzip(files),
            "zlib": lambda: time_zlib(files),
        }
        for workers in args.workers:
            ways[f"import_{workers}_workers"] = lambda n=workers: time_import(root, games, checkpoints, n)
        # In turns, so that what else the machine does falls on all alike.
        rounds = [{name: measure() for name, measure in ways.items()} for _ in range(args.rounds)]
        best = {name: min((r[name] for r in rounds), key=lambda r: r["seconds"]) for name in ways}
        print(f"{'':20}{'rows/s':>10}{'vs gunzip':>11}{'vs zlib':>9}{'CPU s':>9}{'vs gunzip':>11}{'resident MB':>13}")
        for name, figure in best.items():
            figure["rows_per_second"] = num_rows / figure["seconds"]
            for other in ("gunzip", "zlib"):
                for key in ("seconds", "cpu_seconds"):
                    figure[f"ratio_{key}_vs_{other}"] = best[other][key] / figure[key]
            print(
                f"{name:20}{figure['rows_per_second']:10,.0f}{figure['ratio_seconds_vs_gunzip']:11.2f}"
                f"{figure['ratio_seconds_vs_zlib']:9.2f}{figure['cpu_seconds']:9.1f}"
                f"{figure['ratio_cpu_seconds_vs_gunzip']:11.2f}{figure.get('resident_bytes', 0) / 1e6:13.0f}"
            )
        figures |= best
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
