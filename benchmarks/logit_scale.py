"""Which scale for unit-norm features? Losses after some steps by initial scale, learned or fixed.

    python benchmarks/logit_scale.py --json logit_scale.json     # ten minutes on one CPU core

With feature normalization, logits are ``s * weight @ phi / ||phi||``. All runs of a seed see the same batches of the
same data (the quickstart's two games and behaviour, fewer steps) and start from the same weights; network and optimizer
are the quickstart's. Two objectives:

- ``returns``: the targets are the data's 10-step returns (``gamma=0`` behind them): the same for all runs and steps, so
  that losses compare directly;
- ``bootstrapped``: the method's own, whose targets are each run's own, see ``q_target``.

Losses are means over the last quarter of the steps, then over seeds, with the range over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchrl.objectives import HardUpdate

from torchrl_sql.data import FrameStore, OfflineAtariReplay, mean_frame
from torchrl_sql.envs import Emulator, SkillMixture, collect, weak_skills
from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training import Trainer

GAMES = ("Freeway", "Assault")
GAMMAS = {"returns": 0.0, "bootstrapped": 0.99}


def make_store(path: Path, num_agent_steps: int) -> FrameStore:
    store = FrameStore.create(path)
    for game in GAMES:
        policy = SkillMixture(game, weak_skills())
        with store.writer(game, source="weak scripted play", behaviours=policy.behaviour_names) as writer:
            collect(writer, policy, game, num_agent_steps, Emulator(max_env_frames=10_000))
    return store


def train(
    store: FrameStore, objective: str, scale: float, learned: bool, seed: int, num_steps: int
) -> dict[str, float]:
    """Means over the last quarter of the steps."""
    torch.manual_seed(seed)
    input_mean = torch.stack([torch.from_numpy(mean_frame(store, game)) / 255 for game in GAMES])
    actor = make_q_actor(
        GAMES,
        encoder="resnet_small",
        logit_scale=scale,
        learn_logit_scale=learned,
        value_prior_std=1.0,
        input_mean=input_mean,
    )
    loss = DistributionalCQLLoss(actor, gamma=GAMMAS[objective], cql_alpha=0.3)
    trainer = Trainer(
        loss,
        OfflineAtariReplay(store, batch_size=32, games=GAMES, n_steps=10, gamma=0.99, seed=seed),
        torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-3, fused=True),
        target_updater=HardUpdate(loss, value_network_update_interval=0),
        target_update_interval=200,
        max_grad_norm=10.0,
    )
    *_, last = trainer.train(num_steps // 4 * 4, log_interval=num_steps // 4)
    final_scale = scale
    if learned:
        final_scale = math.exp(float(loss.value_network_params["module", "0", "module", "log_scale"].detach()))
    return {key: last[key] for key in ("objective", "td_error", "cql_gap", "q_target")} | {"final_scale": final_scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 10.0, 30.0, 100.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--gradient-steps", type=int, default=400)
    parser.add_argument("--agent-steps", type=int, default=5_000, help="of each game")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine, rows = describe_benchmark(), []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", args.agent_steps)
        for objective, scale, learned in itertools.product(GAMMAS, args.scales, (True, False)):
            runs = [train(store, objective, scale, learned, seed, args.gradient_steps) for seed in args.seeds]
            row: dict[str, Any] = {"targets": objective, "scale": scale, "learned": learned}
            for key in runs[0]:
                row[key] = round(statistics.mean(run[key] for run in runs), 3)
            row["objective_range"] = [round(pick(run["objective"] for run in runs), 3) for pick in (min, max)]
            rows.append(row)
            if len(rows) == 1:
                print(*(f"| {' | '.join(line)} |" for line in (row, ["---"] * len(row))), sep="\n")
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
