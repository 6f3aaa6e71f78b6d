"""Ways to apply one linear head per game to a mixed batch: the measurement behind ``PerGameLinear``.

    python benchmarks/per_game_heads.py --json per_game_heads.json

Forward and backward of 918 outputs (18 actions x 51 atoms) for shapes of batch, number of games and features:

- ``all_heads``: one product with every head, then pick each sample's rows;
- ``tiles``: each game's samples in tiles of 32 rows, one batched product of tiles with their game's head;
- ``gather``: a copy of its head for each sample, one batched product.

The ways take turns; figures are medians of several rounds, the time of ``all_heads`` being 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchrl_sql.modules import PerGameLinear
from torchrl_sql.provenance import describe_benchmark

NUM_OUTPUTS = 918


def gather(heads: PerGameLinear, features: Tensor, game_id: Tensor) -> Tensor:
    return torch.bmm(heads.weight[game_id], features.unsqueeze(-1)).squeeze(-1)


WAYS: dict[str, Callable[[PerGameLinear, Tensor, Tensor], Tensor]] = {
    "all_heads": PerGameLinear._all_heads,
    "tiles": PerGameLinear._tiles,
    "gather": gather,
}


def measure(
    batch_size: int, num_games: int, num_features: int, device: torch.device, clock: str, rounds: int
) -> dict[str, float]:
    """Milliseconds of each way, and their ratios to the first."""
    torch.manual_seed(0)
    heads = PerGameLinear(num_games, num_features, NUM_OUTPUTS).to(device)
    features = torch.randn(batch_size, num_features, device=device, requires_grad=True)
    game_id = torch.randint(num_games, (batch_size,), device=device)
    now = time.process_time if clock == "processor" else time.perf_counter

    def seconds(way: Callable[[PerGameLinear, Tensor, Tensor], Tensor], num_calls: int) -> float:
        start = now()
        for _ in range(num_calls):
            heads.weight.grad = None
            way(heads, features, game_id).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (now() - start) / num_calls

    outputs = [way(heads, features, game_id) for way in WAYS.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-2, atol=1e-2)  # in TF32 on CUDA, if allowed
    del outputs
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            times[name].append(seconds(way, max(1, round(0.1 / max(seconds(way, 1), 1e-6)))))
    row = {f"{name}_milliseconds": round(1e3 * statistics.median(values), 3) for name, values in times.items()}
    for name in list(WAYS)[1:]:
        ratios = [way / all_heads for way, all_heads in zip(times[name], times["all_heads"], strict=True)]
        row[f"{name}_ratio"] = round(statistics.median(ratios), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--games", nargs="+", type=int, default=[2, 8, 16, 40])
    parser.add_argument("--features", nargs="+", type=int, default=[256, 960])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: with one thread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.clock == "processor" and (args.threads != 1 or device.type != "cpu"):
        parser.error("--clock processor needs --device cpu and --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe_benchmark() | {"torch_threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
    rows = []
    for num_features in args.features:
        for num_games in args.games:
            for batch_size in args.batch_sizes:
                row = {"features": num_features, "games": num_games, "batch_size": batch_size}
                rows.append(row | measure(batch_size, num_games, num_features, device, args.clock, args.rounds))
                header, values = rows[-1].keys(), rows[-1].values()
                if len(rows) == 1:
                    print(*(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(rows[0]))), sep="\n")
                print(f"| {' | '.join(map(str, values))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
