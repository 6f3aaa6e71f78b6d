"""Forms of group normalization in the compiled step of a large network, side by side on one GPU.

    python benchmarks/group_norm.py --out benchmarks/results/group_norm_NAME.json

Each form is ``group_norm`` of a training run of ``scale=paper`` (bf16, channels-last, ``trainer.compile=graph``), in
a process of its own. All compile at once; when the last has, each is timed in turn, alone, in several rounds.

- ``var_mean``: moments of each channel by ``torch.var_mean``, of which those of the group are made.
- ``sums``: those of sums and of sums of squares.
- ``pivot``: those of deviations from each map's first pixel, which loses nothing where the mean is large.
- ``pivot in blocks``: runs' own: without kernels that hold a whole map (``triton.persistent_reductions=False``).
- ``pivot, double Q``: with one forward pass more, as TorchRL's parts have in ``update_step.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _gpu_rows import Measurements, make_store, profiled
from torch import Tensor

from torchrl_sql.bench import time_steps
from torchrl_sql.games import TRAIN_40
from torchrl_sql.modules import norm
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training import parallel
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.device import describe_device

NUM_ROUNDS = 3


def by_var_mean(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    values = x.float()
    moments = torch.var_mean(values, (2, 3), correction=0)
    variances, means = (moment.unflatten(1, (num_groups, -1)) for moment in moments)
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    return norm._normalize(values, mean, variance, weight, bias, eps).to(x.dtype)


def by_sums(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    values = x.float()
    size = x[0].numel() // num_groups
    sums, squares = (
        each.sum((2, 3)).unflatten(1, (num_groups, -1)).sum(2, keepdim=True) for each in (values, values.square())
    )
    mean = sums / size
    variance = (squares / size - mean.square()).clamp_min(0)
    return norm._normalize(values, mean, variance, weight, bias, eps).to(x.dtype)


FORMS: dict[str, tuple[Any, bool, bool]] = {
    "var_mean": (by_var_mean, True, False),
    "sums": (by_sums, True, False),
    "pivot": (norm.group_norm, True, False),
    "pivot in blocks": (norm.group_norm, False, False),
    "pivot, double Q": (norm.group_norm, True, True),
}
"""Name -> the function, whether kernels may hold a whole map, and whether the run does double Q."""


def work(connection: Connection, form: str, network: str, batch_size: int, folder: Path) -> None:
    """Compile, tell, then time as often as asked and profile once."""
    norm.group_norm, holds_maps, double_q = FORMS[form]
    parallel.compiler_options = lambda loss: {"triton.persistent_reductions": holds_maps}
    measurements = Measurements("cuda", folder, tiny=False)
    config = measurements.config(
        f"model.encoder={network}", f"data.batch_size={batch_size}", f"run_dir={folder / form.replace(' ', '_')}",
        f"method.double_q={str(double_q).lower()}", "trainer.precision=bf16", "trainer.compile=graph"
    )  # fmt: skip
    trainer = build_trainer(config, memory_format=torch.channels_last)
    try:
        connection.send(time_steps(trainer, num_repeats=5).start_seconds)
        while connection.recv() == "time":
            connection.send(1e3 * time_steps(trainer, num_repeats=20).step_seconds)
        connection.send(profiled(trainer))
    finally:
        trainer.replay.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", games=TRAIN_40, num_steps=200)
        workers = {}
        for form in arguments.forms:
            ours, theirs = context.Pipe()
            settings = (theirs, form, arguments.network, arguments.batch_size, Path(folder))
            process = context.Process(target=work, args=settings, daemon=True)
            process.start()
            theirs.close()
            workers[form] = (process, ours)
        rows: dict[str, dict[str, Any]] = {
            form: {"start_seconds": round(ours.recv(), 1), "milliseconds": []} for form, (_, ours) in workers.items()
        }
        time.sleep(2)
        for _ in range(NUM_ROUNDS):
            for form, (_, ours) in workers.items():
                ours.send("time")
                rows[form]["milliseconds"].append(round(ours.recv(), 2))
        for form, (process, ours) in workers.items():
            ours.send("profile")
            inside, kernels = ours.recv()
            reductions = sum(
                milliseconds for name, milliseconds, _ in kernels if name.startswith(("triton_per", "triton_red"))
            )
            rows[form] |= inside | {"reduction_milliseconds": round(reductions, 2), "kernels": kernels}
            process.join()
    for form, row in rows.items():
        shown = {key: value for key, value in row.items() if key != "kernels"}
        print(f"{form}: median {statistics.median(row['milliseconds'])} ms; {shown}")
    about = describe_benchmark() | {"device": describe_device(torch.device("cuda"))}
    about |= {"network": arguments.network, "batch_size": arguments.batch_size}
    arguments.out.write_text(json.dumps(about | {"forms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
