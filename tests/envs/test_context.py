from __future__ import annotations

import pytest
import torch
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_sql.envs import AtariEnv
from torchrl_sql.envs.context import PolicyInputs, first_context, next_context


def frame(value: int) -> torch.Tensor:
    return torch.full((84, 84), value, dtype=torch.uint8)


def test_a_window_fills_and_then_slides():
    context = first_context(frame(1), 3)
    assert context["mask"].tolist() == [True, False, False]
    seen = []
    for step in range(1, 5):
        context = next_context(context, torch.tensor(step), torch.tensor([step / 10]), frame(step + 1))
        rewards = [round(r, 1) for r in context["reward"][:, 0].tolist()]
        seen.append((context["observation"][:, 0, 0].tolist(), context["action"].tolist(), rewards))
    assert seen == [
        ([1, 2, 0], [1, 0, 0], [0.1, 0, 0]),
        ([1, 2, 3], [1, 2, 0], [0.1, 0.2, 0]),
        ([2, 3, 4], [2, 3, 0], [0.2, 0.3, 0]),
        ([3, 4, 5], [3, 4, 0], [0.3, 0.4, 0]),
    ]
    assert context["mask"].all()


def test_rows_of_a_batch_do_not_touch_each_other():
    young, old = first_context(frame(9), 2), first_context(frame(1), 2)
    for step in range(3):
        old = next_context(old, torch.tensor(step), torch.ones(1), frame(step))
    both = {key: torch.stack([young[key], old[key]]) for key in young}
    move = torch.tensor([5, 6]), torch.tensor([[1.0], [-1.0]]), torch.stack([frame(7), frame(8)])
    together = next_context(both, *move)
    for row, context in enumerate((young, old)):
        alone = next_context(context, *(entry[row] for entry in move))
        assert all(torch.equal(together[key][row], alone[key]) for key in alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_contexts_are_where_the_environment_is():
    env = TransformedEnv(AtariEnv("Pong", 2, device="cuda"), PolicyInputs(4))
    check_env_specs(env)
    assert env.rollout(3)["context", "observation"].device.type == "cuda"


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_torchrl_environment_gives_contexts(num_steps):
    env = TransformedEnv(AtariEnv("Pong", 2), PolicyInputs(num_steps))
    check_env_specs(env)
    env.set_seed(0)
    played = env.rollout(6)
    context, frames = played["context"], played["observation"][..., -1, :, :]
    for t in range(6):
        first = max(0, t + 1 - num_steps)
        known = t + 1 - first
        assert torch.equal(context["mask"][:, t].sum(-1), torch.full((2,), known))
        assert torch.equal(context["observation"][:, t, :known], frames[:, first : t + 1])
        assert torch.equal(context["action"][:, t, : known - 1], played["action"][:, first:t])
        assert torch.equal(context["reward"][:, t, : known - 1], played["next", "reward"][:, first:t])
    assert (played["uniform"][:, 1:] != played["return_uniform"][:, :-1]).all()


def test_a_reset_of_some_environments_leaves_the_others():
    env = TransformedEnv(AtariEnv("Pong", 3), PolicyInputs(4))
    env.set_seed(0)
    state = env.rollout(3)[:, -1]["next"]
    state["_reset"] = torch.tensor([[False], [True], [False]])
    again = env.reset(state.clone())
    assert again["context", "mask"].sum(-1).tolist() == [4, 1, 4]
    assert torch.equal(again["context", "action"][0], state["context", "action"][0])
    assert torch.equal(again["context", "observation"][1, 0], again["observation"][1, -1])
