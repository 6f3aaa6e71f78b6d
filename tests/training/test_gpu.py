"""What only a CUDA device can show."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import HardUpdate

from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss
from torchrl_sql.training import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_batch(batch_size: int, num_games: int) -> TensorDict:
    def observation() -> torch.Tensor:
        return torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8)

    source = {
        "observation": observation(),
        "game_id": torch.randint(num_games, (batch_size,)),
        "action": torch.randint(18, (batch_size,)),
        "steps_to_next_obs": torch.ones(batch_size, 1, dtype=torch.int64),
        "next": {
            "observation": observation(),
            "reward": torch.randn(batch_size, 1),
            "terminated": torch.rand(batch_size, 1) < 0.1,
        },
    }
    return TensorDict(source, [batch_size]).to("cuda")


# 16 samples of 8 games take one path through the heads, 96 the other.
@pytest.mark.parametrize("batch_size", [16, 96])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("target", "double_q"), [("c51", False), ("c51", True), ("hl_gauss", False), ("mse", True)])
def test_the_update_never_waits_for_the_device(batch_size, precision, target, double_q):
    num_atoms = None if target == "mse" else 51
    actor = make_q_actor(8, encoder="resnet_small", num_atoms=num_atoms, memory_format=torch.channels_last).to("cuda")
    loss = DistributionalCQLLoss(actor, target=target, double_q=double_q)
    optimizer = torch.optim.Adam(loss.parameters(), fused=True)
    updater = HardUpdate(loss, value_network_update_interval=0)
    trainer = Trainer(
        loss,
        None,
        optimizer,
        schedule=lambda step: 1.0,
        max_grad_norm=10.0,
        precision=precision,
    )
    batch = make_batch(batch_size, num_games=8)
    trainer.update(batch)  # optimizer state is made in the first step
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            metrics = trainer.update(batch)
            updater.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics["objective"])
