"""From what one device, one reader and one link do, to the days that a run takes on many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The inputs of a plan, measured (:mod:`torchrl_sql.bench.measure`) or assumed."""

    step_seconds: Mapping[int, float]
    """Samples a device gets in a step -> seconds of the step, without communication."""
    read_transitions_per_second: float
    """What one rank's readers deliver."""
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


def format_measurements(measured: Measurements) -> str:
    """The measurements, a line each, with units."""
    lines = [
        f"step of {n} samples a device: {1e3 * seconds:.3g} ms, {n / seconds:,.0f} samples/s"
        for n, seconds in sorted(measured.step_seconds.items())
    ]
    lines.append(
        f"readers of a rank: {measured.read_transitions_per_second:,.0f} transitions/s, "
        f"{measured.read_bytes_per_transition:,.0f} compressed bytes each"
    )
    lines.append(f"gradients: {4 * measured.num_parameters / 1e6:,.4g} MB a step")
    for name, bandwidth in (
        (f"within a node of {measured.gpus_per_node}", measured.node_bytes_per_second),
        ("across nodes", measured.network_bytes_per_second),
    ):
        rate = "not measured: start this on more processes" if bandwidth is None else f"{bandwidth / 1e9:.3g} GB/s"
        lines.append(f"all-reduce {name}: {rate}")
    return "\n".join(lines)


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
            raise ValueError(f"{name} must be known for {num_gpus} GPUs at {measured.gpus_per_node} a node, got None")
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
    above = next(size for size in sizes if size >= samples)
    below = max((size for size in sizes if size <= samples), default=above)
    if above == below:
        return step_seconds[above]
    share = (samples - below) / (above - below)
    return (1 - share) * step_seconds[below] + share * step_seconds[above]


def _format_days(days: float) -> str:
    if days >= 1.5:
        return f"{days:.2g} days"
    return f"{24 * days:.2g} h" if 24 * days >= 1.5 else f"{24 * 60 * days:.2g} min"


def format_plans(plans: Sequence[Plan]) -> str:
    """A Markdown table, one row a plan."""
    header = ["GPUs", "samples/GPU", "compute ms", "gradients ms", "read ms", "step ms", "run"]
    header += ["transitions/s a GPU", "store MB/s a GPU", "store MB/s in all"]
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
