"""Time and peak memory of one gradient step: ours beside what a TorchRL user would compose from TorchRL's parts.

    python benchmarks/update_step.py --json update_step.json                               # all that the device can do
    python benchmarks/update_step.py --networks resnet_small --dtypes fp32 --modes eager   # a minute on a CPU

One step is forward, backward, clipping of the gradient's norm, Adam, and the target updater. All sides hold the same
network with the same weights (TorchRL's with torch's own GroupNorm) and see the same batch:

- ``torchrl``: :class:`torchrl.objectives.DistributionalDQNLoss`, which always does double Q (the online network on both
  observations, the target network on the next one), plus the CQL penalty from a further forward of the online network
  on the observation; default memory format, ``torch.optim.Adam`` as it comes. 4 forwards, 2 of them with a backward.
- ``torchrl_hooked``: the same by someone who minds the time: a hook hands the penalty the log-probabilities that the TD
  loss has computed, and Adam is fused. 3 forwards, 1 with a backward, as in ``ours_double_q``: equal mathematics.
- ``ours``: :meth:`torchrl_sql.training.Trainer.update` as ``torchrl-sql train`` sets it up. 2 forwards, 1 with a
  backward. Without double Q, the default of the method: not the same targets as ``torchrl``.
- ``ours_double_q``: the same with double Q, 3 forwards. Its loss equals those of TorchRL's, which is checked first.

All of them run in one process, with the threads and the allocator as training sets them.

The sides of a network take turns, in several rounds; times are medians over rounds, ratios medians of each round's
ratio. Peak memory is what a step allocates on top of what lives between steps (weights, optimizer, batch);
``samples_per_second`` is what a buffer has to deliver; ``share_of_matmul_peak`` are the step's counted FLOP/s over the
measured rate of a large matrix product in the same precision. On the CPU the JSON also has where an eager step's time
goes by kind of operator. On CUDA the table also has the number of calls in a step that wait for the device; a step of
ours that makes one ends the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import DistributionalDQNLoss, HardUpdate

from torchrl_sql.modules import make_q_actor
from torchrl_sql.modules.norm import GroupNorm
from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training import Trainer
from torchrl_sql.training.device import prepare_cpu, tune
from torchrl_sql.training.parallel import SingleProcess

NUM_GAMES = {"resnet_small": 2, "resnet34": 40, "resnet50": 40, "resnet101": 40}
SIDES = ("torchrl", "torchrl_hooked", "ours", "ours_double_q")
GAMMA, CQL_ALPHA, LEARNING_RATE, TARGET_INTERVAL, MAX_GRAD_NORM = 0.99, 0.1, 2e-4, 2000, 10.0
OPERATORS = {
    "convolution": ("mkldnn_convolution",),
    "convolution_backward": ("convolution_backward",),
    "matrix_product": ("mm", "addmm", "bmm", "baddbmm"),
    "group_norm": ("native_group_norm", "native_group_norm_backward"),
}
CLOCK_HELP = "processor time, of one thread, is what to compare on a CPU that is busy with other things"


@dataclass
class Variant:
    """One side in one precision and mode, and what was measured of it."""

    side: str
    dtype: str
    mode: str
    step: Callable[[], torch.Tensor]
    parameters: list[torch.nn.Parameter]
    row: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def make_batch(batch_size: int, num_games: int, device: torch.device) -> TensorDict:
    """Noise: the time of a step does not depend on what the frames show."""
    generator = torch.Generator().manual_seed(0)

    def observation() -> torch.Tensor:
        return torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8, generator=generator)

    terminated = torch.rand(batch_size, 1, generator=generator) < 0.05
    source = {
        "observation": observation(),
        "game_id": torch.randint(num_games, (batch_size,), generator=generator),
        "action": torch.randint(18, (batch_size,), generator=generator),
        "steps_to_next_obs": torch.ones(batch_size, 1, dtype=torch.int64),
        "next": {
            "observation": observation(),
            "reward": torch.randn(batch_size, 1, generator=generator).clamp(-1, 1),
            "terminated": terminated,
            "truncated": torch.zeros_like(terminated),
            "done": terminated,
        },
    }
    return TensorDict(source, [batch_size]).to(device)


def make_actor(network: str, side: str, device: torch.device, memory_format: torch.memory_format) -> Any:
    torch.manual_seed(0)
    actor = make_q_actor(NUM_GAMES[network], encoder=network, memory_format=memory_format).to(device)
    if side.startswith("torchrl"):
        for module in actor.modules():
            if isinstance(module, GroupNorm):
                module.__class__ = torch.nn.GroupNorm  # ours differs on CUDA only
    return actor


def torchrl_step(
    network: str,
    side: str,
    dtype: str,
    mode: str,
    batch: TensorDict,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Variant:
    """What a TorchRL user would write, first as it comes, then minding the time."""
    device = batch.device
    hooked = side == "torchrl_hooked"
    actor = make_actor(network, side, device, memory_format)
    loss = DistributionalDQNLoss(actor, gamma=GAMMA)
    updater = HardUpdate(loss, value_network_update_interval=TARGET_INTERVAL)
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=hooked)
    computed: list[torch.Tensor] = []

    def keep(_: Any, args: tuple[TensorDict], __: Any) -> None:
        if torch.is_grad_enabled():
            computed.append(args[0]["action_value"])

    if hooked:
        actor.module[-1].register_forward_hook(keep)

    def objective(batch: TensorDict) -> torch.Tensor:
        td_loss = loss(batch)["loss"]
        log_probs = computed.pop() if hooked else actor(batch.select("observation", "game_id"))["action_value"]
        q_values = (log_probs.exp() * actor.support.unsqueeze(-1)).sum(-2)
        q_data = q_values.gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        return td_loss + CQL_ALPHA * (q_values.logsumexp(-1) - q_data).mean()

    # As training compiles on the CPU: inductor's choice of channels-last costs there more than it gains.
    options = {"layout_optimization": False} if device.type == "cpu" else None
    run = torch.compile(objective, options=options) if mode == "compiled" else objective

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            value = run(batch.copy())  # losses write into their batch
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        return value.detach()

    return Variant(side, dtype, mode, step, parameters)


def our_step(network: str, side: str, dtype: Literal["fp32", "bf16"], mode: str, batch: TensorDict) -> Variant:
    """The trainer's step."""
    device = batch.device
    suits = device.type == "cuda" and mode == "compiled"  # as training chooses
    actor = make_actor(network, side, device, torch.channels_last if suits else torch.contiguous_format)
    loss = DistributionalCQLLoss(actor, gamma=GAMMA, cql_alpha=CQL_ALPHA, double_q=side == "ours_double_q")
    updater = HardUpdate(loss, value_network_update_interval=TARGET_INTERVAL)
    parameters = list(loss.parameters())
    trainer = Trainer(
        loss,
        TensorDictReplayBuffer(),  # empty: nothing is sampled
        torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True),
        max_grad_norm=MAX_GRAD_NORM,
        call=SingleProcess(loss, compile=mode == "compiled"),
        precision=dtype,
    )

    def step() -> torch.Tensor:
        metrics = trainer.update(batch.copy())
        updater.step()
        return metrics["objective"]

    return Variant(side, dtype, mode, step, parameters)


def make_variant(network: str, side: str, dtype: str, mode: str, batch: TensorDict) -> Variant:
    if side.startswith("torchrl"):
        return torchrl_step(network, side, dtype, mode, batch)
    return our_step(network, side, dtype, mode, batch)


def check_same_objective(network: str, batch: TensorDict) -> None:
    """The first step's loss, on fresh copies."""
    ours = make_variant(network, "ours_double_q", "fp32", "eager", batch).step()
    for side in ("torchrl", "torchrl_hooked"):
        theirs = make_variant(network, side, "fp32", "eager", batch).step()
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)  # convolutions may run in TF32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], Any], num_steps: int, device: torch.device, clock: str = "wall") -> float:
    """Seconds a step."""
    now = time.process_time if clock == "processor" else time.perf_counter
    synchronize(device)
    start = now()
    for _ in range(num_steps):
        step()
    synchronize(device)
    return (now() - start) / num_steps


def peak_bytes(variant: Variant, device: torch.device) -> int:
    """The most that a step holds on top of weights, optimizer and batch."""
    for parameter in variant.parameters:
        parameter.grad = None  # where the last step left them
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        variant.step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        variant.step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def operator_milliseconds(variant: Variant, num_steps: int = 10) -> dict[str, float]:
    """Time inside operators by kind, under the profiler; the rest of a step is Python and the allocator."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(num_steps):
            variant.step()
    times = {event.key: event.self_cpu_time_total / 1e3 / num_steps for event in trace.key_averages()}
    result = {kind: sum(times.get(f"aten::{name}", 0) for name in names) for kind, names in OPERATORS.items()}
    result["other"] = sum(times.values()) - sum(result.values())
    return {kind: round(value, 2) for kind, value in result.items()}


def num_synchronising_calls(variant: Variant) -> int:
    """Calls of one step that wait for the GPU; raises at the first one of ours."""
    torch.cuda.set_sync_debug_mode("warn" if variant.side.startswith("torchrl") else "error")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            variant.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def matmul_flops(dtype: str, device: torch.device, size: int | None = None, *, clock: str = "wall") -> float:
    """FLOP/s of a large matrix product; in fp32 with TF32 where convolutions use it."""
    size = size or (8192 if device.type == "cuda" else 2048)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    a, b = (
        torch.randn(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        for _ in "ab"
    )
    timed(lambda: a @ b, 2, device)
    seconds = min(timed(lambda: a @ b, 5, device, clock) for _ in range(5))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / seconds


def measure_network(network: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    batch = make_batch(args.batch_size, NUM_GAMES[network], device)
    check_same_objective(network, batch)
    variants = []
    for dtype, mode, side in itertools.product(args.dtypes, args.modes, args.sides):
        variant = make_variant(network, side, dtype, mode, batch)
        start = time.perf_counter()
        for _ in range(3):
            variant.step()
        synchronize(device)
        variant.row = {"network": network, "device": device.type, "dtype": dtype, "mode": mode, "side": side}
        variant.row |= {"batch_size": args.batch_size, "num_games": NUM_GAMES[network]}
        variant.row["warm_up_seconds"] = round(time.perf_counter() - start, 1)
        variant.row["peak_megabytes"] = round(peak_bytes(variant, device) / 1e6, 1)
        if device.type == "cuda":
            variant.row["synchronising_calls"] = num_synchronising_calls(variant)
        elif mode == "eager":
            variant.row["operator_milliseconds"] = operator_milliseconds(variant)
        variants.append(variant)
        print(f"{network} {dtype} {mode} {side}: warm after {variant.row['warm_up_seconds']} s", flush=True)

    for round_index in range(args.rounds):
        for variant in variants[round_index % len(variants) :] + variants[: round_index % len(variants)]:
            num_steps = max(1, round(args.round_seconds / timed(variant.step, 1, device)))
            variant.seconds.append(timed(variant.step, num_steps, device, args.clock))

    flops = count_flops(network, batch)
    peaks = {dtype: matmul_flops(dtype, device, clock=args.clock) for dtype in args.dtypes}
    baselines = {(v.dtype, v.mode): v.seconds for v in variants if v.side == "torchrl"}
    hooked = {(v.dtype, v.mode): v.seconds for v in variants if v.side == "torchrl_hooked"}
    for variant in variants:
        row, seconds = variant.row, statistics.median(variant.seconds)
        row["milliseconds"] = round(1e3 * seconds, 3)
        row["samples_per_second"] = round(args.batch_size / seconds)
        row["gflop"] = round(flops[variant.side] / 1e9, 2)
        row["matmul_peak_gflops"] = round(peaks[variant.dtype] / 1e9)
        row["share_of_matmul_peak"] = round(flops[variant.side] / seconds / peaks[variant.dtype], 3)
        names = {"ratio_vs_torchrl": (variant.dtype, variant.mode), "ratio_vs_torchrl_eager": (variant.dtype, "eager")}
        for name, key in (names | {"ratio_vs_torchrl_eager_fp32": ("fp32", "eager")}).items():
            if key in baselines:
                ratios = [theirs / ours for theirs, ours in zip(baselines[key], variant.seconds, strict=True)]
                row[name] = round(statistics.median(ratios), 2)
        for name, mode in (("ratio_vs_torchrl_hooked", variant.mode), ("ratio_vs_torchrl_hooked_eager", "eager")):
            if fair := hooked.get((variant.dtype, mode)):
                ratios = [theirs / ours for theirs, ours in zip(fair, variant.seconds, strict=True)]
                row[name] = round(statistics.median(ratios), 2)
    return [variant.row for variant in variants]


def count_flops(network: str, batch: TensorDict) -> dict[str, int]:
    """FLOP of each side's products and convolutions; multiply and add count as two."""
    module = make_actor(network, "ours", batch.device, torch.contiguous_format).module[0].module

    def count(*, backward: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = module(batch["observation"], batch["game_id"])[0]
            if backward:
                output.sum().backward()
        return counter.get_total_flops()

    forward, with_backward = count(backward=False), count(backward=True)
    return {
        "torchrl": 2 * with_backward + 2 * forward,
        "torchrl_hooked": with_backward + 2 * forward,
        "ours": with_backward + forward,
        "ours_double_q": with_backward + 2 * forward,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """All columns that any row has, as a table."""
    hidden = ("device", "warm_up_seconds", "operator_milliseconds")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(column, "")) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NUM_GAMES, help="default: all on CUDA, else resnet_small")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch-size", type=int, help="default: 512 on CUDA, else 32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help=CLOCK_HELP)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=0.5, help="of each side in each round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # with the hook the network is another program
    torch._dynamo.config.recompile_limit = 64  # several compiled variants share the code of tensordict
    torch._logging.set_logs(dynamo=logging.ERROR)  # the graph breaks of TorchRL's loss
    if args.clock == "processor" and (args.threads != 1 or device.type != "cpu"):
        parser.error("--clock processor needs --device cpu and --threads 1")
    prepare_cpu(args.threads)
    tune(device, try_algorithms=True)
    args.batch_size = args.batch_size or (512 if device.type == "cuda" else 32)
    networks = args.networks or (list(NUM_GAMES) if device.type == "cuda" else ["resnet_small"])

    machine = describe_benchmark() | {
        "torch_threads": torch.get_num_threads(),
        "clock": args.clock,
        "load_before": os.getloadavg()[0],
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    rows = []
    for network in networks:
        rows += measure_network(network, args, device)
        torch._dynamo.reset()
        if args.json:  # after each network: a run that is cut short keeps what it has
            args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
