"""Beyond Atari: two CartPoles learned offline from a random policy's data, with this library's network and loss.

The second pole's motor is wired the wrong way round: the tasks share an encoder but need a head each.
"""

from __future__ import annotations

import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymWrapper, TensorDictPrimer, TransformedEnv
from torchrl.modules import DistributionalQValueActor
from torchrl.objectives import HardUpdate

from torchrl_sql.modules import MultiGameQNetwork
from torchrl_sql.objectives import DistributionalCQLLoss


def make_env(task: int) -> TransformedEnv:
    env = GymWrapper(gym.make("CartPole-v1"), categorical_action_encoding=True)
    env.unwrapped.force_mag *= 1 - 2 * task
    env.set_seed(task)
    return TransformedEnv(env, TensorDictPrimer(game_id=Categorical(2, shape=()), default_value=task))


def main(transitions: int = 5_000, gradient_steps: int = 1_000, episodes: int = 10) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    envs = [make_env(0), make_env(1)]
    data = torch.stack([env.rollout(transitions, break_when_any_done=False) for env in envs])
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(2 * transitions), batch_size=128)
    replay.extend(data.reshape(-1))

    encoder = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Unflatten(1, (64, 1, 1)))
    sizes = {"num_actions": 2, "num_atoms": 21, "input_shape": (4,)}
    network = MultiGameQNetwork(encoder, 2, pooling="flatten", logit_scale=10.0, **sizes)
    keys = {"in_keys": ["observation", "game_id"], "out_keys": ["action_value", "feature_norm", "features"]}
    module = TensorDictModule(network, **keys)
    actor = DistributionalQValueActor(module, spec=Categorical(2), support=torch.linspace(0, 20, 21))

    loss = DistributionalCQLLoss(actor, gamma=0.95, cql_alpha=0.1)
    target_updater = HardUpdate(loss, value_network_update_interval=50)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(gradient_steps):
        losses = loss(replay.sample())
        (losses["loss_qvalue"] + losses["loss_cql"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_updater.step()

    behaviour = (transitions / data["next", "done"].sum((1, 2))).tolist()  # a reward of 1 each step
    returns = [[env.rollout(500, actor)["next", "reward"].sum() for _ in range(episodes)] for env in envs]
    return list(zip(behaviour, torch.tensor(returns).mean(1).tolist(), strict=True))


if __name__ == "__main__":
    for task, (behaviour, learned) in enumerate(main()):
        print(f"CartPole {task}: mean return {behaviour:.1f} in the data, {learned:.1f} learned")
