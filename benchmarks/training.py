"""What long training runs pay beside their gradient steps.

    python benchmarks/training.py --json training.json

- checkpoint: how long training waits when it saves the state of ResNet-50 on 40 games (parameters, targets, Adam's
  moments), and how much slower its steps are while the file is written, as a share of 1,000 gradient steps.
- resume: from starting ``python`` to the first gradient step of a run of that size that was stopped by SIGTERM, in a
  process of its own: imports, store, network, checksum, loading, first batch.
- data wait: the share of time in which quickstart training on the CPU waits for batches from a store on disk.
- agreement: the call after each step in which ranks agree whether to stop, in two processes with 5 ms steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_sql.collection import collect_data
from torchrl_sql.config import compose_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.games import TRAIN_40
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training import Trainer, train
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.checkpoint import list_checkpoints
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.ranks import process_group
from torchrl_sql.training.writer import CheckpointWriter

NUM_STEPS_BETWEEN = 1_000


def large_run(folder: Path, batch_size: int, device: str) -> list[str]:
    """Settings of ResNet-50 on 40 games with a small store, as fits a CPU."""
    store = FrameStore.create(folder / "store", exist_ok=True)
    for game in TRAIN_40:
        if game not in store.games:
            with store.writer(game, source="zeros, for a benchmark") as writer:
                frames = np.zeros((100, 84, 84), np.uint8)
                writer.add_episode(frames, [0] * 100, [0.0] * 100, terminated=True)
    changes = [f"data.batch_size={batch_size}", f"trainer.device={device}", "trainer.log_interval_gradient_steps=1"]
    if device == "cpu":
        changes += ["trainer.precision=fp32", "trainer.compile=off"]
    return ["scale=paper", "model.encoder=resnet50", f"data.store={store.path}", f"run_dir={folder / 'run'}", *changes]


def timed_updates(trainer: Trainer, batch: Any, while_true: Callable[[], bool]) -> list[float]:
    """Seconds of gradient steps, as long as ``while_true()``."""
    seconds = []
    while while_true():
        started = time.perf_counter()
        trainer.update(batch.clone())
        if batch.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure_checkpoint(folder: Path, batch_size: int, device: str, rounds: int) -> dict[str, Any]:
    trainer = build_trainer(compose_run_config(large_run(folder, batch_size, device)))
    batch = trainer.replay.sample().to(trainer.device)
    trainer.update(batch.clone())
    writer = CheckpointWriter(folder / "checkpoints", num_kept=1, milestone_interval=None)
    stalls, writes, quiet, busy = [], [], [], []
    for step in range(rounds):
        left = iter(range(4))
        quiet += timed_updates(trainer, batch, lambda left=left: next(left, None) is not None)
        before, started = writer.stall_seconds, time.perf_counter()
        state = {"trainer": trainer.state_dict()}
        gathering = time.perf_counter() - started
        writer.save(step, state)
        stalls.append(gathering + writer.stall_seconds - before)
        started = time.perf_counter()
        busy += timed_updates(trainer, batch, lambda step=step: writer.newest_step != step)
        writes.append(time.perf_counter() - started)
    writer.close()
    trainer.replay.shutdown()
    step_seconds, busy_seconds = statistics.median(quiet), statistics.median(busy)
    slower = max(0.0, busy_seconds / step_seconds - 1) * statistics.median(writes)
    cost = statistics.median(stalls) + slower
    return {
        "what": "checkpoint",
        "batch_size": batch_size,
        "num_parameters": sum(p.numel() for p in trainer.loss.parameters()),
        "file_megabytes": round(list_checkpoints(folder / "checkpoints")[-1].stat().st_size / 1e6),
        "step_seconds": round(step_seconds, 3),
        "step_seconds_while_writing": round(busy_seconds, 3),
        "first_stall_seconds": round(stalls[0], 3),
        "stall_seconds": round(statistics.median(stalls[1:]), 3),
        "write_seconds": round(statistics.median(writes), 2),
        "stall_share_per_1000_steps": round(statistics.median(stalls[1:]) / (NUM_STEPS_BETWEEN * step_seconds), 6),
        "share_with_slower_steps": round(cost / (NUM_STEPS_BETWEEN * step_seconds), 6),
    }


RUN = """
import os, sys, time
from torchrl_sql.cli import main
from torchrl_sql.training import Trainer
update = Trainer.update
def first(self, batch):
    print("FIRST", time.time(), flush=True)
    Trainer.update = update
    return update(self, batch)
Trainer.update = first
sys.exit(main(["train", *sys.argv[1:]]))
"""


def measure_resume(folder: Path, batch_size: int, device: str, rounds: int) -> dict[str, Any]:
    settings = large_run(folder, batch_size, device)

    def start() -> float:
        """Runs until the first gradient step has begun, then stops with a checkpoint; seconds to that step."""
        started = time.time()
        command = [sys.executable, "-c", RUN, *settings]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            process.wait(300)
        if not line.startswith("FIRST") or process.returncode != 130:
            raise RuntimeError(f"the run ended with {process.returncode} after saying {line!r}")
        return float(line.split()[1]) - started

    fresh = start()
    resumed = [start() for _ in range(rounds)]
    return {
        "what": "resume",
        "batch_size": batch_size,
        "fresh_start_seconds": round(fresh, 1),
        "resume_seconds": round(statistics.median(resumed), 1),
        "slowest_resume_seconds": round(max(resumed), 1),
    }


def measure_data_wait(folder: Path, num_steps: int) -> dict[str, Any]:
    config = compose_run_config(
        [
            "scale=cpu",
            "data.store=store",
            f"data.store={folder / 'real_store'}",
            f"run_dir={folder / 'quickstart'}",
            "collection.num_agent_steps_per_game=5000",
            f"trainer.num_gradient_steps={num_steps}",
        ]
    )
    collect_data(config)
    scalars = read_scalars(train(config))
    shares = [value for _, value in scalars["data_wait_fraction"][1:]]  # the first interval holds the start
    return {
        "what": "data wait",
        "num_gradient_steps": num_steps,
        "samples_per_second": round(statistics.median(value for _, value in scalars["samples_per_second"][1:])),
        "data_wait_share": round(statistics.mean(shares), 4),
        "greatest_share_of_50_steps": round(max(shares), 4),
    }


def agree(num_steps: int) -> None:
    """One of the processes of :func:`measure_agreement`."""
    with process_group(torch.device("cpu")) as ranks:
        agreement = ranks.agreement()
        seconds = []
        for _ in range(num_steps):
            time.sleep(0.005)
            started = time.perf_counter()
            agreement(0)
            seconds.append(time.perf_counter() - started)
        agreement.finish()
        if ranks.is_main:
            print(json.dumps({"median": statistics.median(seconds), "mean": statistics.mean(seconds)}), flush=True)


def measure_agreement(num_steps: int) -> dict[str, Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--agree", str(num_steps)]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output, *_ = [process.communicate(timeout=120)[0] for process in processes]
    seconds = json.loads(output)
    return {
        "what": "agreement",
        "num_ranks": 2,
        "median_microseconds": round(1e6 * seconds["median"], 1),
        "mean_microseconds": round(1e6 * seconds["mean"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4, help="of the ResNet-50 runs (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="of the quickstart training (default: 600)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--agree", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agree:
        agree(args.agree)
        return
    os.environ.setdefault("RL_WARNINGS", "False")
    machine = describe_benchmark() | {"torch_threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measurements: list[Callable[[], dict[str, Any]]] = [
            lambda: measure_agreement(1_000),
            lambda: measure_data_wait(folder, args.steps),
            lambda: measure_checkpoint(folder, args.batch_size, args.device, args.rounds),
            lambda: measure_resume(folder, args.batch_size, args.device, args.rounds - 1),
        ]
        rows = []
        for measure in measurements:
            rows.append(measure())
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if args.json:  # after each: a run that is cut short keeps what it has
                args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
