"""The tables of docs/scaling.md: operations counted, rates assumed.

    python benchmarks/scaling_table.py

Nothing here is timed: ``torchrl-sql bench`` measures a cluster. What is assumed stands below.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode

from torchrl_sql.bench import Measurements, format_plans, plan
from torchrl_sql.games import TRAIN_40
from torchrl_sql.modules import make_q_actor
from torchrl_sql.modules.q_network import Encoder

NETWORKS: tuple[Encoder, ...] = ("resnet34", "resnet50", "resnet101")
NUM_GPUS = (1, 8, 32, 128)

# Assumed where nothing else is said.
SUSTAINED_FLOPS = 75e12  # a tenth of what large bf16 matrix products reach on an H100: the networks move much memory
LEAST_STEP_SECONDS = 0.015  # some 1,500 kernels launched one by one, however small the batch
NODE_BYTES_PER_SECOND = 200e9  # eight GPUs on NVLink
NETWORKS_BYTES_PER_SECOND = {"100 Gb/s per node": 10e9, "8 x 200 Gb/s per node": 150e9}
READ_TRANSITIONS_PER_SECOND = 27_116.0  # measured, one reader thread, zstd: benchmarks/results/buffer.md
READ_BYTES_PER_TRANSITION = 157.6 * 20 * 1.2  # 157.6 bytes per frame, measured there; 1.2 chunks of 20 frames hold 5


def count(network: Encoder, batch_size: int = 512) -> tuple[int, float]:
    """Parameters, and operations of a gradient step for one sample of a batch, on whose size the heads' depend.

    Forward, and backward at twice its price, of the online network; forward of the target network.
    """
    with torch.device("meta"):
        actor = make_q_actor(TRAIN_40, encoder=network)
        observation = torch.zeros(batch_size, 4, 84, 84, dtype=torch.uint8)
        game_id = torch.zeros(batch_size, dtype=torch.long)
    batch = TensorDict(observation=observation, game_id=game_id, batch_size=batch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        actor(batch)
    return sum(p.numel() for p in actor.parameters()), 4 * counter.get_total_flops() / batch_size


def main() -> None:
    """Prints Markdown."""
    counts = {network: count(network) for network in NETWORKS}
    print("| network | parameters | GFLOP per sample | TFLOP per step | gradients per step | whole run |")
    print("|---|---:|---:|---:|---:|---:|")
    for network, (num_parameters, flops) in counts.items():
        print(
            f"| {network} | {num_parameters / 1e6:.1f} M | {flops / 1e9:.1f} | {512 * flops / 1e12:.2f} "
            f"| {4 * num_parameters / 1e6:.0f} MB | {512 * 6.25e6 * flops:.2g} FLOP |"
        )
    for network, (num_parameters, flops) in counts.items():
        for link, network_bytes_per_second in NETWORKS_BYTES_PER_SECOND.items():
            measured = Measurements(
                step_seconds={n: max(n * flops / SUSTAINED_FLOPS, LEAST_STEP_SECONDS) for n in (4, 16, 64, 512)},
                read_transitions_per_second=READ_TRANSITIONS_PER_SECOND,
                read_bytes_per_transition=READ_BYTES_PER_TRANSITION,
                num_parameters=num_parameters,
                gpus_per_node=8,
                node_bytes_per_second=NODE_BYTES_PER_SECOND,
                network_bytes_per_second=network_bytes_per_second,
            )
            print(f"\n{network}, nodes of 8 GPUs joined by {link}:\n")
            print(format_plans([plan(measured, num_gpus=n) for n in NUM_GPUS]))


if __name__ == "__main__":
    main()
