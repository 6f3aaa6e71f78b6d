"""Online learning of one ALE game: our actor and loss in TorchRL's collector and buffer.

A few thousand steps, minutes on a CPU, are enough to learn what the policy is worth, not to play much better.
"""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import RewardClipping, TransformedEnv
from torchrl.modules import EGreedyModule
from torchrl.objectives import HardUpdate

from torchrl_sql.envs import AtariEnv
from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss, MultiStep


def main(game: str = "Assault", agent_steps: int = 4_000, num_envs: int = 8) -> list[dict[str, float]]:
    torch.manual_seed(0)
    env = TransformedEnv(AtariEnv(game, num_envs), RewardClipping(-1, 1))
    env.set_seed(0)
    actor = make_q_actor([game], encoder="resnet_small", value_prior_std=1.0, mask_illegal_actions=True)
    explore = EGreedyModule(Categorical(18), annealing_num_steps=agent_steps, action_mask_key="action_mask")
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=20 * num_envs,
        total_frames=agent_steps,
        postproc=MultiStep(gamma=0.99, n_steps=5),
        auto_register_policy_transforms=False,
    )
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(agent_steps), batch_size=32)

    loss = DistributionalCQLLoss(actor, cql_alpha=0.0, double_q=True)  # online data needs no conservatism
    target_updater = HardUpdate(loss, value_network_update_interval=50)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    log = []
    for data in collector:
        explore.step(data.numel())
        replay.extend(data.reshape(-1).exclude("action_value", "action_mask", "features", "feature_norm"))
        for _ in range(20):
            losses = loss(replay.sample())
            losses["loss_qvalue"].backward()
            optimizer.step()
            optimizer.zero_grad()
            target_updater.step()
        metrics = {key: losses[key].item() for key in ("td_error", "q_data", "q_max")}
        log.append({"reward": data["next", "original_reward"].mean().item(), "epsilon": explore.eps.item()} | metrics)
    collector.shutdown()
    return log


if __name__ == "__main__":
    for row in main():
        print(", ".join(f"{key} {value:.3f}" for key, value in row.items()))
