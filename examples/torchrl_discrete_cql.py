"""Our offline Atari buffer under TorchRL's own network parts and `DiscreteCQLLoss`, on data collected here.

In torchrl 0.14.1 that loss bootstraps from its online parameters whether or not it keeps target ones (the value
estimator drops them), so it is used here without: `delay_value=False` and no target updater.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torchrl.data import Categorical
from torchrl.envs import UnaryTransform
from torchrl.modules import MLP, ConvNet, QValueActor
from torchrl.objectives import DiscreteCQLLoss

from torchrl_sql.data import FrameStore, OfflineAtariReplay
from torchrl_sql.envs import SkillMixture, collect, weak_skills


def collect_store(path: Path, game: str, steps: int) -> FrameStore:
    policy, store = SkillMixture(game, weak_skills()), FrameStore.create(path)
    with store.writer(game, source="scripted play with noise", behaviours=policy.behaviour_names) as writer:
        collect(writer, policy, game, steps)
    return store


def main(path: Path, game: str = "Assault", steps: int = 10_000, gradient_steps: int = 500) -> dict[str, list[float]]:
    torch.manual_seed(0)
    frames = ["observation", ("next", "observation")]
    replay = OfflineAtariReplay(
        collect_store(path, game, steps),
        batch_size=32,
        n_steps=5,
        transform=UnaryTransform(in_keys=frames, out_keys=frames, fn=lambda x: x.float() / 255),
    )

    convolutions = ConvNet(in_features=4, num_cells=[16, 32], kernel_sizes=[8, 4], strides=[4, 2])
    network = nn.Sequential(convolutions, MLP(in_features=32 * 9 * 9, out_features=18, num_cells=[128]))
    actor = QValueActor(network, spec=Categorical(18))
    loss = DiscreteCQLLoss(actor, action_space="categorical", delay_value=False)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    history = {"loss_qvalue": [], "loss_cql": []}
    for _ in range(gradient_steps):
        losses = loss(replay.sample())
        (losses["loss_qvalue"] + losses["loss_cql"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, values in history.items():
            values.append(losses[key].item())
    return history


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for key, values in main(Path(folder) / "store").items():
            print(f"{key}: first {values[0]:.3f}, last {values[-1]:.3f}")
