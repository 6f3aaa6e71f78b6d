from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_sql.modules import make_decision_transformer
from torchrl_sql.objectives import DecisionTransformerLoss


class Table(nn.Module):
    """Puts out what it is given, as logits of 2 actions, 3 rewards and 4 returns over 2 steps."""

    def forward(self, action_logits, reward_logits, reward_token, return_logits, return_token):
        return action_logits, reward_logits, reward_token, return_logits, return_token


def table(num_outputs: int = 5) -> TensorDictModule:
    keys = ["action_logits", "reward_logits", "reward_token", "return_logits", "return_token"][:num_outputs]
    return TensorDictModule(lambda *args: args, in_keys=["given_" + key for key in keys], out_keys=keys)


def batch(**entries) -> TensorDict:
    """Two windows of two steps, the second padded: P(action) = 1/2, 1/4 | 1/8; P(reward) = 1/3; P(return) = 1/4."""
    log = {p: [torch.tensor(p).log().item(), torch.tensor(1 - p).log().item()] for p in (0.5, 0.25, 0.125)}
    data = {
        "given_action_logits": torch.tensor([[log[0.5], log[0.25]], [log[0.125], [9.0, -9.0]]]),
        "given_reward_logits": torch.zeros(2, 2, 3),
        "given_reward_token": torch.tensor([[0, 1], [2, 0]]),
        "given_return_logits": torch.zeros(2, 4),
        "given_return_token": torch.tensor([3, 0]),
        "action": torch.tensor([[0, 0], [0, 1]]),
        "mask": torch.tensor([[True, True], [True, False]]),
    }
    return TensorDict(data | entries, [2])


def test_by_hand():
    log2, log3 = torch.tensor([2.0, 3.0]).log()
    out = DecisionTransformerLoss(table(), reduction="none")(batch())
    torch.testing.assert_close(out["loss_action"], torch.stack([log2 * (1 + 2) / 2, log2 * 3 / 2]) / 3)
    torch.testing.assert_close(out["loss_reward"], torch.stack([log3, log3 / 2]) / 3)
    torch.testing.assert_close(out["loss_return"], torch.stack([2 * log2, 2 * log2]) / 3)
    # 1/2 is a tie, which goes to the first action; 1/4 and 1/8 are wrong; the padded step does not count.
    assert out["accuracy"].item() == pytest.approx(1 / 3)
    mean = DecisionTransformerLoss(table())(batch())
    assert mean["loss_action"].item() == pytest.approx(out["loss_action"].mean().item())
    assert DecisionTransformerLoss(table(), reduction="sum")(batch())["loss_return"].item() == pytest.approx(
        out["loss_return"].sum().item()
    )


def test_keys_that_the_network_does_not_write_are_refused():
    loss = DecisionTransformerLoss(table())
    with pytest.raises(ValueError, match=r"return_logits must be a key that the network writes \(.*\), got 'typo'"):
        loss.set_keys(return_logits="typo")
    loss = DecisionTransformerLoss(table(3))
    loss.set_keys(mask="known")
    assert "loss_return" not in loss.out_keys


def test_a_key_may_be_a_tuple_of_one():
    loss = DecisionTransformerLoss(table())
    loss.set_keys(return_logits=("return_logits",), mask=("mask",))
    assert loss.out_keys == ["loss_action", "loss_reward", "loss_return", "accuracy"]
    assert loss.in_keys == DecisionTransformerLoss(table()).in_keys
    torch.testing.assert_close(loss(batch()), DecisionTransformerLoss(table())(batch()))


def test_windows_that_the_batch_masks_count_nowhere():
    loss = DecisionTransformerLoss(table())
    expected = loss(batch()[:1])
    assert expected["accuracy"] == 0.5 and loss(batch())["accuracy"] != 0.5
    masked = batch()
    masked["collector", "mask"] = torch.tensor([True, False])
    torch.testing.assert_close(loss(masked), expected)


def test_its_mode_is_that_of_the_network():
    network = make_decision_transformer(width=64, num_layers=1, dropout=0.5)
    loss = DecisionTransformerLoss(network)
    assert not loss.eval().training and not network.module.blocks[0].dropout.training
    assert loss.train().training and network.module.blocks[0].dropout.training


def test_averaged_over_classes_too():
    plain, averaged = (DecisionTransformerLoss(table(), class_averaged=flag)(batch()) for flag in (False, True))
    for name, num_classes in (("action", 2), ("reward", 3), ("return", 4)):
        assert averaged["loss_" + name].item() == pytest.approx(plain["loss_" + name].item() / num_classes)


def test_without_returns_the_other_two_are_averaged():
    with_returns, without = DecisionTransformerLoss(table())(batch()), DecisionTransformerLoss(table(3))(batch())
    assert "loss_return" not in without
    for name in ("loss_action", "loss_reward"):
        assert without[name].item() == pytest.approx(with_returns[name].item() * 3 / 2)


def test_keys_weights_and_dispatch():
    loss = DecisionTransformerLoss(table(), reduction="none")
    plain = loss(batch())
    data = batch()
    dispatched = loss(**{str(key): data[key] for key in loss.in_keys})
    assert len(dispatched) == len(loss.out_keys) == 4
    torch.testing.assert_close(dispatched[0], plain["loss_action"])
    data["weight"], data["known"] = torch.tensor([0.5, 2.0]), data.pop("mask")
    loss.set_keys(mask="known", priority_weight="weight")
    weighted = loss(data)
    torch.testing.assert_close(weighted["loss_return"], plain["loss_return"] * data["weight"])
    assert weighted["accuracy"].item() == pytest.approx(0.5 / (0.5 + 0.5 + 2.0))


def network_batch(num_windows: int) -> TensorDict:
    shape = (num_windows, 4)
    return TensorDict(
        {
            "observation": torch.randint(256, (*shape, 84, 84), dtype=torch.uint8),
            "action": torch.randint(18, shape),
            "return_to_go": torch.randint(-20, 101, shape).float(),
            "mask": torch.arange(4) < torch.randint(1, 5, (num_windows, 1)),
            "next": {"reward": torch.zeros(*shape, 1), "terminated": torch.zeros(*shape, 1, dtype=torch.bool)},
        },
        [num_windows],
    )


def gradient(loss, data):
    out = loss(data.clone())
    objective = sum(value for key, value in out.items() if key.startswith("loss_"))
    return torch.autograd.grad(objective, [p for p in loss.parameters() if p.requires_grad])


def test_padding_teaches_nothing_and_microbatches_add_up():
    loss = DecisionTransformerLoss(make_decision_transformer(width=64, num_layers=1, patch_size=42, dropout=0.0))
    data = network_batch(6)
    whole = gradient(loss, data)
    garbage = data.clone()
    garbage["action"] = torch.where(data["mask"], data["action"], (data["action"] + 5) % 18)
    garbage["observation"][~data["mask"]] = 200
    garbage["next", "reward"][~data["mask"]] = -1.0
    for a, b in zip(whole, gradient(loss, garbage), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    halves = [gradient(loss, half) for half in data.split(3)]
    for a, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(a, sum(parts) / 2, atol=1e-7, rtol=1e-4)


# tensordict 0.14 reads a setting that torch 2.13 has retired.
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on the way to a CPU's kernels
def test_compiles_as_one_graph():
    loss = DecisionTransformerLoss(make_decision_transformer(width=64, num_layers=1, patch_size=42, dropout=0.0))
    data = network_batch(3)
    compiled = torch.compile(loss, fullgraph=True)(data.clone())
    torch.testing.assert_close(compiled.to_dict(), loss(data.clone()).to_dict(), atol=1e-5, rtol=1e-4)


def test_refusals():
    with pytest.raises(TypeError, match="must be a TensorDictModule, got Linear"):
        DecisionTransformerLoss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reduction must be"):
        DecisionTransformerLoss(table(), reduction="max")
    with pytest.raises(ValueError, match=r"action and mask must be \[\*B, K\]"):
        DecisionTransformerLoss(table())(batch(mask=torch.ones(2, dtype=torch.bool)))
