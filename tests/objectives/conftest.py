"""Actors small enough to compare losses on, and random batches for them (fixtures that return functions)."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, OneHot
from torchrl.modules import MLP, DistributionalQValueActor, QValueActor

NUM_OBS, NUM_ACTIONS, NUM_ATOMS = 4, 3, 21


def _spec(one_hot: bool):
    return OneHot(NUM_ACTIONS) if one_hot else Categorical(NUM_ACTIONS)


def _make_actor(*, distributional: bool = True, one_hot: bool = False):
    if distributional:
        network = MLP(in_features=NUM_OBS, out_features=(NUM_ATOMS, NUM_ACTIONS), num_cells=[16])
        support = torch.linspace(-5, 5, NUM_ATOMS)
        actor = DistributionalQValueActor(network, spec=_spec(one_hot), support=support)
    else:
        network = MLP(in_features=NUM_OBS, out_features=NUM_ACTIONS, num_cells=[16])
        actor = QValueActor(network, spec=_spec(one_hot))
    for parameter in actor.parameters():
        # Far from uniform outputs, so that comparisons are not between near-equal numbers.
        parameter.data.normal_()
    return actor


def _make_batch(batch_size: int = 32, *, one_hot: bool = False) -> TensorDict:
    terminated = torch.rand(batch_size, 1) < 0.3
    truncated = ~terminated & (torch.rand(batch_size, 1) < 0.3)
    return TensorDict(
        {
            "observation": torch.randn(batch_size, NUM_OBS),
            "action": _spec(one_hot).rand((batch_size,)),
            "steps_to_next_obs": torch.randint(1, 6, (batch_size, 1)),
            "next": {
                "observation": torch.randn(batch_size, NUM_OBS),
                "reward": 3 * torch.randn(batch_size, 1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch_size=[batch_size],
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_actor():
    """``make_actor(distributional=True, one_hot=False)``: an MLP actor from 4 observations to 3 actions x 21 atoms."""
    return _make_actor


@pytest.fixture(scope="session")
def make_batch():
    """``make_batch(batch_size=32, one_hot=False)``: random n-step transitions with terminal and truncated ones."""
    return _make_batch
