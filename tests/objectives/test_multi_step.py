"""n-step windows: the flags are those of the window's end, whatever makes the windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import QValueActor
from torchrl.objectives import HardUpdate

from torchrl_sql.objectives import DistributionalCQLLoss, MultiStep, MultiStepTransform

GAMMA = 0.9


def rollouts(ends: list[list[str]]) -> TensorDict:
    """``[B, T]`` steps that end as said (``"terminated"``, ``"truncated"`` or ``""``); observations count the steps."""
    batch, time = len(ends), len(ends[0])
    steps = torch.arange(batch * time).reshape(batch, time)
    flags = {key: torch.tensor([[[end == key] for end in row] for row in ends]) for key in ("terminated", "truncated")}
    next_step = {
        "observation": (steps + 1).float().unsqueeze(-1),
        "reward": (steps * 7 % 5).float().unsqueeze(-1),
        **flags,
        "done": flags["terminated"] | flags["truncated"],
    }
    root = {"observation": steps.float().unsqueeze(-1), "action": torch.zeros_like(steps)}
    return TensorDict({**root, "next": next_step}, [batch, time])


def value(observation: torch.Tensor) -> torch.Tensor:
    return 10 + 0.5 * observation


def targets(batch: TensorDict) -> list[float]:
    """What the loss takes for each transition's target, the network's value being ``value``."""
    network = nn.Linear(1, 1)
    network.weight.data.fill_(0.5)
    network.bias.data.fill_(10)
    loss = DistributionalCQLLoss(QValueActor(network, spec=Categorical(1)), target="mse", gamma=GAMMA, cql_alpha=0.0)
    HardUpdate(loss, value_network_update_interval=1)
    return [loss(row.unsqueeze(0).clone())["q_target"].item() for row in batch.reshape(-1)]


def by_hand(data: TensorDict, n_steps: int) -> list[float]:
    """Each target from single steps: rewards up to n steps or an end, then the value unless that is terminal."""
    out = []
    for row in data:
        for start in range(len(row)):
            total, discount = 0.0, 1.0
            for step in row[start : start + n_steps]:
                total += discount * step["next", "reward"].item()
                discount *= GAMMA
                if step["next", "done"]:
                    break
            if not step["next", "terminated"]:
                total += discount * value(step["next", "observation"]).item()
            out.append(total)
    return out


def test_by_hand():
    """Three rewards of 1, terminal at the third; TorchRL's alone would give 75.61, 82.9 and 1 with a value of 100."""
    data = rollouts([["", "", "terminated"]])
    data["next", "reward"].fill_(1)
    batch = MultiStep(GAMMA, 3)(data)
    assert targets(batch) == pytest.approx([2.71, 1.9, 1.0])
    assert batch["steps_to_next_obs"].tolist() == [[[3], [2], [1]]]
    assert batch["next", "terminated"].all()


ends = st.lists(st.sampled_from(["", "", "terminated", "truncated"]), min_size=7, max_size=7)


@settings(max_examples=40, deadline=None)
@given(st.lists(ends, min_size=1, max_size=3), st.integers(1, 5))
def test_post_processed_windows_have_the_targets_of_their_steps(rows, n_steps):
    data = rollouts(rows)
    assert targets(MultiStep(GAMMA, n_steps)(data.clone())) == pytest.approx(by_hand(data, n_steps), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(ends, ends, st.integers(1, 5))
def test_windows_written_to_a_buffer_have_the_targets_of_their_steps(first, second, n_steps):
    """Two writes: windows reach from one into the other, and the last steps wait for the next write."""
    data = rollouts([[*first, *second]])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(14, ndim=1), batch_size=1)
    buffer.append_transform(MultiStepTransform(n_steps, GAMMA))
    for part in (data[0, :7], data[0, 7:]):
        buffer.extend(part)
    stored = buffer[:].select(*data.keys(), "steps_to_next_obs")
    assert stored["steps_to_next_obs"].shape == (14 - n_steps, 1)
    assert targets(stored) == pytest.approx(by_hand(data, n_steps)[: 14 - n_steps], rel=1e-4)
