"""How group normalization is best written for a compiler: forward and backward with the ReLU behind it, on a GPU.

    python benchmarks/group_norm.py --json group_norm.json     # minutes, of which most is compiling
    python benchmarks/group_norm.py --device cpu --batch-size 2 --rounds 1     # the same path, in little

Each variant normalizes the maps of a ResNet-50 (84 x 84 frames, bf16, channels-last) as often as that network does,
in one compiled function; the median of several rounds is shown beside the least time that moving the bytes takes:
forward two readings and a result, backward two readings of input and gradient and a result, at the rate of a copy.

- ``groups``: moments of each group at once;
- ``channels``: moments of each channel first, :func:`torchrl_sql.modules.norm.group_norm`;
- ``looped``: the same, compiled without persistent reductions, which hold a whole map and read few channels at a time;
- ``sums``: sums of each channel's values and squares instead of its moments;
- ``torch``: ``torch.nn.functional.group_norm``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_sql.modules.norm import group_norm
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training.device import describe_device, resolve_device

MAPS = (
    (64, 42, 1), (64, 21, 6), (256, 21, 4), (128, 21, 1), (128, 11, 7), (512, 11, 5), (256, 11, 1), (256, 6, 11),
    (1024, 6, 7), (512, 6, 1), (512, 3, 5), (2048, 3, 4),
)  # fmt: skip
"""Channels, height and width, and how many normalizations of ResNet-50 have such a map."""
NUM_GROUPS, EPS = 32, 1e-5


def of_groups(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    groups = x.unflatten(1, (num_groups, -1)).float()
    variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    scale, shift = (value.float().view(num_groups, -1, 1, 1) for value in (weight, bias))
    return ((groups - mean) * ((variance + eps).rsqrt() * scale) + shift).flatten(1, 2).to(x.dtype)


def of_sums(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    values = x.float()
    means, squares = (
        sums.unflatten(1, (num_groups, -1)).mean(2, keepdim=True)
        for sums in (values.mean((2, 3)), values.square().mean((2, 3)))
    )
    scale = ((squares - means.square()).clamp(min=0) + eps).rsqrt() * weight.float().view(num_groups, -1)
    shift = bias.float().view(num_groups, -1) - means * scale
    scale, shift = (value.flatten(1)[:, :, None, None] for value in (scale, shift))
    return torch.addcmul(shift, values, scale).to(x.dtype)


def of_torch(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "channels": group_norm, "looped": group_norm, "sums": of_sums, "groups": of_groups, "torch": of_torch,
}  # fmt: skip


def activated(normalize: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(normalize(x, NUM_GROUPS, weight, bias, EPS))


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch._functorch.config.donated_buffer = False  # a backward pass is timed several times
    torch._dynamo.config.recompile_limit = 2 * len(MAPS) * len(VARIANTS)
    torch.manual_seed(0)

    def random_map(channels: int, size: int) -> Tensor:
        x = torch.randn(arguments.batch_size, channels, size, size, device=device, dtype=torch.bfloat16)
        return x.to(memory_format=torch.channels_last)

    maps = [random_map(channels, size).requires_grad_() for channels, size, _ in MAPS]
    gradients = [random_map(channels, size) for channels, size, _ in MAPS]
    weights = [torch.ones(channels, device=device).requires_grad_() for channels, _, _ in MAPS]
    biases = [torch.zeros(channels, device=device).requires_grad_() for channels, _, _ in MAPS]
    source, target = torch.empty(2**28, dtype=torch.uint8, device=device), torch.empty(2**28, dtype=torch.uint8)
    target = target.to(device)
    copied = 2 * 2**28 / seconds_of(lambda: target.copy_(source), device, arguments.rounds)
    elements = [x.numel() * count for x, (_, _, count) in zip(maps, MAPS, strict=True)]
    rows = {}
    for name in arguments.variants:
        torch._dynamo.reset()
        options = {"triton.persistent_reductions": name != "looped"}
        compiled = torch.compile(partial(activated, VARIANTS[name]), fullgraph=True, dynamic=False, options=options)
        start = time.perf_counter()
        works = []
        for x, gradient, weight, bias, (_, _, count) in zip(maps, gradients, weights, biases, MAPS, strict=True):
            given = (x, weight, bias)
            result = compiled(*given)
            forward = partial(torch.no_grad()(compiled), *given)
            backward = partial(torch.autograd.grad, result, given, gradient, retain_graph=True)
            expected = torch.relu(F.group_norm(x.detach().float(), NUM_GROUPS, weight, bias, EPS))
            error = (result.detach().float() - expected).norm() / expected.norm()
            assert error < 1e-2, f"{name} differs from torch's group_norm by {error:.2g}"
            forward(), backward()
            works.append((count, (forward, backward)))
        compiling = time.perf_counter() - start
        by_map = [[count * seconds_of(work, device, arguments.rounds) for work in both] for count, both in works]
        total = [1e3 * sum(column) for column in zip(*by_map, strict=True)]
        rows[name] = {
            "forward_milliseconds": round(total[0], 2),
            "backward_milliseconds": round(total[1], 2),
            "by_map": {
                f"{channels}x{size}x{size}": [round(1e3 * value / count, 3) for value in values]
                for (channels, size, count), values in zip(MAPS, by_map, strict=True)
            },
            "compiling_seconds": round(compiling, 1),
        }
        print(name, {key: value for key, value in rows[name].items() if key != "by_map"}, flush=True)
    floor = {"forward_milliseconds": 6, "backward_milliseconds": 10}
    rows["bytes alone"] = {key: round(1e3 * sum(elements) * value / copied, 2) for key, value in floor.items()}
    print("bytes alone", rows["bytes alone"], f"at {copied / 1e12:.2f} TB/s")
    if arguments.json:
        machine = describe_benchmark() | {"device": describe_device(device)}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
