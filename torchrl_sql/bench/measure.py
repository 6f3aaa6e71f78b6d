"""Measures on the machines at hand what a plan needs to know of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import distributed

from torchrl_sql.bench.plan import Measurements
from torchrl_sql.config import RunConfig
from torchrl_sql.data import FrameStore, summarise
from torchrl_sql.games import FRAME_STACK
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.trainer import Trainer

_NUM_WARM_UPS = 3


def measure(config: RunConfig, ranks: Ranks, *, samples_per_gpu: Sequence[int], num_repeats: int = 20) -> Measurements:
    """Times gradient steps, the readers and the links; every rank must call it, and gets the slowest rank's figures.

    Args:
        config (RunConfig): a run that could be trained here.
        ranks (Ranks): the processes taking part; bandwidths are unknown to one alone.

    Keyword Args:
        samples_per_gpu (sequence of int): batches that a device gets, each at most ``data.batch_size``.
        num_repeats (int): of each measurement, after compiling and warming up; medians are taken.

    Raises:
        ValueError: if a number of samples is not in ``1..data.batch_size``.
    """
    if bad := [n for n in samples_per_gpu if not 1 <= n <= config.data.batch_size]:
        raise ValueError(f"samples_per_gpu must be within 1 and data.batch_size={config.data.batch_size}, got {bad[0]}")
    trainer = build_trainer(config, Ranks(0, 1, ranks.device))  # on its own: communication is timed by itself
    try:
        read_seconds = _median_seconds(trainer.replay.sample, ranks.device, num_repeats)
        step_seconds = {n: _step_seconds(trainer, n, num_repeats) for n in sorted(set(samples_per_gpu))}
    finally:
        trainer.replay.shutdown()
    num_parameters = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    gpus_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", max(torch.cuda.device_count(), 1)))
    node = network = None
    if ranks.world_size > 1:
        gradients = torch.zeros(num_parameters, device=ranks.device)
        if gpus_per_node > 1:
            group, _ = distributed.new_subgroups(min(gpus_per_node, ranks.world_size))
            node = _bus_bandwidth(gradients, group, ranks, num_repeats)
        if ranks.world_size > gpus_per_node:
            network = _bus_bandwidth(gradients, None, ranks, num_repeats)
    read_seconds, *slowest_steps = _slowest(ranks, [read_seconds, *step_seconds.values()])
    return Measurements(
        step_seconds=dict(zip(step_seconds, slowest_steps, strict=True)),
        read_transitions_per_second=config.data.batch_size / read_seconds,
        read_bytes_per_transition=read_bytes_per_transition(
            FrameStore.open(config.data.store), n_steps=config.data.n_steps
        ),
        num_parameters=num_parameters,
        gpus_per_node=gpus_per_node,
        node_bytes_per_second=node,
        network_bytes_per_second=network,
    )


def read_bytes_per_transition(store: FrameStore, *, n_steps: int) -> float:
    """Compressed bytes that a transition at a random place fetches: whole chunks, each once.

    Args:
        store (FrameStore): its mean over stored frames is taken; smaller files beside the frames count too.

    Keyword Args:
        n_steps (int): agent steps between observation and next observation.
    """
    summaries = list(summarise(store))
    frame_bytes = sum(s.num_bytes for s in summaries) / sum(s.num_transitions for s in summaries)
    stack = np.arange(FRAME_STACK)
    frames = np.union1d(stack, stack + n_steps)
    phases = np.arange(store.chunk_frames)
    num_chunks = np.mean([len(np.unique((phase + frames) // store.chunk_frames)) for phase in phases])
    return float(frame_bytes * store.chunk_frames * num_chunks)


def _step_seconds(trainer: Trainer, num_samples: int, num_repeats: int) -> float:
    device = trainer.ranks.device
    batch = trainer.replay.sample()[:num_samples].to(device)
    return _median_seconds(lambda: trainer.update(batch.copy()), device, num_repeats)


def _bus_bandwidth(
    payload: torch.Tensor, group: distributed.ProcessGroup | None, ranks: Ranks, num_repeats: int
) -> float:
    """Bytes/s through the slowest rank's link, as a ring moves them."""
    size = distributed.get_world_size(group)
    seconds = _median_seconds(lambda: distributed.all_reduce(payload, group=group), ranks.device, num_repeats)
    (seconds,) = _slowest(ranks, [seconds])
    return 2 * (size - 1) / size * payload.nbytes / seconds


def _median_seconds(work: Callable[[], object], device: torch.device, num_repeats: int) -> float:
    """Median duration after warming up; the same number of calls on every rank, so that they may communicate."""
    durations = []
    for _ in range(_NUM_WARM_UPS + num_repeats):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[_NUM_WARM_UPS:])


def _slowest(ranks: Ranks, seconds: Sequence[float]) -> list[float]:
    return torch.stack(ranks.gather(torch.tensor(seconds, dtype=torch.float64))).amax(0).tolist()
