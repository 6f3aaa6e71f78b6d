"""How long a run takes on a cluster: measurements of the machines at hand, and the arithmetic from them."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import distributed

from torchrl_sql.config import RunConfig
from torchrl_sql.data import FrameStore, summarise
from torchrl_sql.files import expand_path
from torchrl_sql.games import FRAME_STACK
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.trainer import Trainer

_NUM_WARM_UPS = 4
"""Of a gradient step that is captured, the fourth is."""
_NUM_ROUNDS = 5
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What :func:`time_steps` measured."""

    start_seconds: float
    """Of the first 4 gradient steps together: compiling, capturing, choosing algorithms."""
    step_seconds: float
    """Of a gradient step on a batch that is on the device, the host running ahead as in training."""
    peak_bytes: int | None
    """The most device memory that was in use; None on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The inputs of a plan, measured by :func:`measure` or assumed."""

    step_seconds: Mapping[int, float]
    """Samples a device gets in a step -> seconds of the step, without communication."""
    start_seconds: Mapping[int, float] = field(default_factory=dict)
    """The same -> seconds of the first steps, see :class:`StepTimes`."""
    read_transitions_per_second: float
    """What one rank's readers deliver to its device."""
    read_bytes_per_transition: float
    """Compressed bytes fetched from the store for one transition."""
    num_parameters: int
    """Trained parameters; their gradients are float32."""
    gpus_per_node: int
    node_bytes_per_second: float | None
    """Ring all-reduce bandwidth of a GPU within a node (bus bandwidth, as NCCL's tests report it); None if unknown."""
    network_bytes_per_second: float | None
    """The same when a ring spans nodes; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on ``num_gpus``; times are seconds of one gradient step."""

    num_gpus: int
    samples_per_gpu: int
    compute_seconds: float
    gradient_seconds: float
    """All-reduce of the gradients, as if none of it were hidden behind the backward pass."""
    data_seconds: float
    """Reading a rank's batch; hidden behind the step as long as it is shorter."""
    step_seconds: float
    days: float
    transitions_per_second: float
    """What the readers of one GPU have to deliver."""
    read_bytes_per_second: float
    """What the store has to deliver to one GPU."""


def measure(config: RunConfig, ranks: Ranks, *, samples_per_gpu: Sequence[int], num_repeats: int = 20) -> Measurements:
    """Times gradient steps, the readers and the links; every rank must call it, and gets the slowest rank's figures.

    For each number of samples the trainer is built as a run with that batch would build it, on each rank for itself:
    what is timed is the program that such a run trains with, compiled for that shape alone, in its microbatches.

    Args:
        config (RunConfig): a run that could be trained here.
        ranks (Ranks): the processes taking part; bandwidths are unknown to one alone.

    Keyword Args:
        samples_per_gpu (sequence of int): batches that a device gets, each at most ``data.batch_size``. The readers are
            timed at the largest.
        num_repeats (int): of each measurement, after compiling and warming up; in rounds, whose median is taken.

    Raises:
        ValueError: if a number of samples is not in ``1..data.batch_size``, or more than ``trainer.microbatch_size``
            and no multiple of it.
    """
    if bad := [n for n in samples_per_gpu if not 1 <= n <= config.data.batch_size]:
        raise ValueError(f"samples_per_gpu must be within 1 and data.batch_size={config.data.batch_size}, got {bad[0]}")
    size = config.trainer.microbatch_size
    if size is not None and (bad := [n for n in samples_per_gpu if n > size and n % size]):
        raise ValueError(f"samples_per_gpu must be multiples of trainer.microbatch_size={size}, got {bad[0]}")
    times: dict[int, StepTimes] = {}
    for num_samples in sorted(set(samples_per_gpu)):
        torch.compiler.reset()  # else the second size would be compiled for any size
        trainer = build_trainer(_with_batch(config, num_samples), Ranks(0, 1, ranks.device))
        try:
            times[num_samples] = time_steps(trainer, num_repeats=num_repeats)
            read_seconds = time_reads(trainer, num_ahead=config.data.prefetch, num_repeats=num_repeats)
            num_parameters = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
        finally:
            trainer.replay.shutdown()
        del trainer
        gc.collect()  # its memory is for the next
    gpus_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", max(torch.cuda.device_count(), 1)))
    node = network = None
    if ranks.world_size > 1:
        gradients = torch.zeros(num_parameters, device=ranks.device)
        if gpus_per_node > 1:
            group, _ = distributed.new_subgroups(min(gpus_per_node, ranks.world_size))
            node = _bus_bandwidth(gradients, group, ranks, num_repeats)
        if ranks.world_size > gpus_per_node:
            network = _bus_bandwidth(gradients, None, ranks, num_repeats)
    steps = [each.step_seconds for each in times.values()]
    starts = [each.start_seconds for each in times.values()]
    read_seconds, *slowest = _slowest(ranks, [read_seconds, *steps, *starts])
    return Measurements(
        step_seconds=dict(zip(times, slowest[: len(times)], strict=True)),
        start_seconds=dict(zip(times, slowest[len(times) :], strict=True)),
        read_transitions_per_second=max(times) / read_seconds,
        read_bytes_per_transition=read_bytes_per_transition(
            FrameStore.open(expand_path(config.data.store)), n_steps=config.data.n_steps
        ),
        num_parameters=num_parameters,
        gpus_per_node=gpus_per_node,
        node_bytes_per_second=node,
        network_bytes_per_second=network,
    )


def _with_batch(config: RunConfig, num_samples: int) -> RunConfig:
    size = config.trainer.microbatch_size
    trainer = replace(config.trainer, microbatch_size=None if size is None else min(size, num_samples))
    return replace(config, data=replace(config.data, batch_size=num_samples), trainer=trainer)


def time_steps(trainer: Trainer, *, num_repeats: int) -> StepTimes:
    """Times a trainer's :meth:`~torchrl_sql.training.Trainer.update` on one batch; its weights move.

    Args:
        trainer (Trainer): that has taken no step yet.

    Keyword Args:
        num_repeats (int): steps, in rounds, whose median is taken.
    """
    batch = trainer.replay.sample()
    # A copy each time, as losses write into their batch.
    return time_calls(lambda: trainer.update(batch.copy()), trainer.device, num_repeats=num_repeats)


def time_calls(step: Callable[[], object], device: torch.device, *, num_repeats: int) -> StepTimes:
    """Times any step on a device; see :func:`time_steps`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(_NUM_WARM_UPS):
        step()
    _synchronize(device)
    start_seconds = time.perf_counter() - started
    step_seconds = _seconds_per_call(step, device, num_repeats)
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepTimes(start_seconds=start_seconds, step_seconds=step_seconds, peak_bytes=peak_bytes)


def time_reads(trainer: Trainer, *, num_ahead: int, num_repeats: int) -> float:
    """Seconds per batch at which a trainer's readers deliver when nothing else is done.

    Args:
        trainer (Trainer): of the readers.

    Keyword Args:
        num_ahead (int): batches that they may have read before: these are dropped, and several times as many timed.
        num_repeats (int): batches to time at least.
    """
    for _ in range(num_ahead + 1):
        trainer.replay.sample()
    num_calls = max(num_repeats, 4 * (num_ahead + 1))
    _synchronize(trainer.device)
    started = time.perf_counter()
    for _ in range(num_calls):
        trainer.replay.sample()
    _synchronize(trainer.device)
    return (time.perf_counter() - started) / num_calls


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
    chunk_frames = store.encoding.chunk_frames
    num_chunks = np.mean([len(np.unique((phase + frames) // chunk_frames)) for phase in range(chunk_frames)])
    return float(frame_bytes * chunk_frames * num_chunks)


def _bus_bandwidth(
    payload: torch.Tensor, group: distributed.ProcessGroup | None, ranks: Ranks, num_repeats: int
) -> float:
    """Bytes/s through the slowest rank's link, as a ring moves them."""
    size = distributed.get_world_size(group)
    seconds = _seconds_per_call(lambda: distributed.all_reduce(payload, group=group), ranks.device, num_repeats)
    (seconds,) = _slowest(ranks, [seconds])
    return 2 * (size - 1) / size * payload.nbytes / seconds


def _seconds_per_call(work: Callable[[], object], device: torch.device, num_repeats: int) -> float:
    """Median over rounds of calls back to back, after warming up; the same number of calls on every rank, so that they
    may communicate.
    """
    for _ in range(_NUM_WARM_UPS):
        work()
    num_calls = -(-num_repeats // _NUM_ROUNDS)
    durations = []
    for _ in range(_NUM_ROUNDS):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(num_calls):
            work()
        _synchronize(device)
        durations.append((time.perf_counter() - started) / num_calls)
    return statistics.median(durations)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(ranks: Ranks, seconds: Sequence[float]) -> list[float]:
    return torch.stack(ranks.gather(torch.tensor(seconds, dtype=torch.float64))).amax(0).tolist()


def plan(measured: Measurements, *, num_gpus: int, batch_size: int = 512, num_gradient_steps: int = 6_250_000) -> Plan:
    """Predicts a run.

    The step is ``max(compute + gradient, data)``: gradients are counted in full, since how much of them hides behind
    the backward pass is not known beforehand. Compute between two measured batch sizes is interpolated linearly; below
    the least it is that of the least, since a device does not get faster on batches too small to fill it.

    Args:
        measured (Measurements): of the cluster.

    Keyword Args:
        num_gpus (int): ranks, a divisor of ``batch_size``.
        batch_size (int): transitions of the global batch.
        num_gradient_steps (int): of the run.

    Raises:
        ValueError: if the batch cannot be shared out, was measured at smaller sizes only, or a bandwidth is missing.
    """
    if num_gpus < 1 or batch_size % num_gpus:
        raise ValueError(f"num_gpus must divide batch_size {batch_size}, got {num_gpus}")
    samples = batch_size // num_gpus
    compute = _interpolate(measured.step_seconds, samples)
    gradient = 0.0
    if num_gpus > 1:
        within_node = num_gpus <= measured.gpus_per_node
        name = "node_bytes_per_second" if within_node else "network_bytes_per_second"
        bandwidth = getattr(measured, name)
        if bandwidth is None:
            raise ValueError(f"{name} must be known for {num_gpus} GPUs at {measured.gpus_per_node} per node, got None")
        # A ring moves 2 (N - 1) / N of the payload through each GPU's link.
        gradient = 2 * (num_gpus - 1) / num_gpus * 4 * measured.num_parameters / bandwidth
    data = samples / measured.read_transitions_per_second
    step = max(compute + gradient, data)
    return Plan(
        num_gpus=num_gpus,
        samples_per_gpu=samples,
        compute_seconds=compute,
        gradient_seconds=gradient,
        data_seconds=data,
        step_seconds=step,
        days=num_gradient_steps * step / _SECONDS_PER_DAY,
        transitions_per_second=samples / step,
        read_bytes_per_second=samples / step * measured.read_bytes_per_transition,
    )


def _interpolate(step_seconds: Mapping[int, float], samples: int) -> float:
    sizes = sorted(step_seconds)
    if samples > sizes[-1]:
        raise ValueError(f"step_seconds must be known for {samples} samples or more, got up to {sizes[-1]}")
    return float(np.interp(samples, sizes, [step_seconds[size] for size in sizes]))


def format_measurements(measured: Measurements) -> str:
    """The measurements with their units, one per line."""
    lines = [
        f"step of {n} samples per device: {1e3 * seconds:.3g} ms, {n / seconds:,.0f} samples/s; "
        f"the first {_NUM_WARM_UPS} took {measured.start_seconds[n]:.3g} s"
        for n, seconds in sorted(measured.step_seconds.items())
    ]
    lines.append(
        f"readers of a rank: {measured.read_transitions_per_second:,.0f} transitions/s, "
        f"{measured.read_bytes_per_transition:,.0f} compressed bytes each"
    )
    lines.append(f"gradients: {4 * measured.num_parameters / 1e6:,.4g} MB per step")
    for name, bandwidth in (
        (f"within a node of {measured.gpus_per_node}", measured.node_bytes_per_second),
        ("across nodes", measured.network_bytes_per_second),
    ):
        rate = "not measured: start this on more processes" if bandwidth is None else f"{bandwidth / 1e9:.3g} GB/s"
        lines.append(f"all-reduce {name}: {rate}")
    return "\n".join(lines)


def _format_days(days: float) -> str:
    if days >= 1.5:
        return f"{days:.2g} days"
    return f"{24 * days:.2g} h" if 24 * days >= 1.5 else f"{24 * 60 * days:.2g} min"


def format_plans(plans: Sequence[Plan]) -> str:
    """A Markdown table, one row per plan."""
    header = ["GPUs", "samples/GPU", "compute ms", "gradients ms", "read ms", "step ms", "run"]
    header += ["transitions/s per GPU", "store MB/s per GPU", "store MB/s in all"]
    rows = [
        [
            f"{p.num_gpus}",
            f"{p.samples_per_gpu}",
            *(f"{1e3 * s:.3g}" for s in (p.compute_seconds, p.gradient_seconds, p.data_seconds, p.step_seconds)),
            _format_days(p.days),
            f"{p.transitions_per_second:,.0f}",
            f"{p.read_bytes_per_second / 1e6:.3g}",
            f"{p.read_bytes_per_second * p.num_gpus / 1e6:.3g}",
        ]
        for p in plans
    ]
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
