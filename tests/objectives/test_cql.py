import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import MLP, DistributionalQValueActor, QValueActor
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from torchrl_sql.modules import GreedyDistributionalQValueModule, NetworkPolicy, make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss

# tensordict 0.14 reads a setting that torch 2.13 has retired.
IGNORE_COMPILE_WARNING = pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning")
SUPPORT = torch.linspace(-5, 5, 21)


class Table(nn.Module):
    """Logits read from the observation, times one parameter: outputs under the test's full control."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.scale * observation


def table_actor(num_actions: int, support: torch.Tensor | None = None):
    spec = Categorical(num_actions)
    if support is None:
        return QValueActor(Table(), spec=spec)
    return DistributionalQValueActor(Table(), spec=spec, support=support)


def with_updater(loss: DistributionalCQLLoss) -> DistributionalCQLLoss:
    HardUpdate(loss, value_network_update_interval=1000)
    return loss


def make_loss(actor, **kwargs) -> DistributionalCQLLoss:
    return with_updater(DistributionalCQLLoss(actor, **kwargs))


def total(out: TensorDict) -> torch.Tensor:
    return out["loss_qvalue"] + out["loss_cql"]


def transition(values, next_values, *, action=0, reward=0.0, terminated=False, steps=None) -> TensorDict:
    batch = {
        "observation": torch.tensor([values]),
        "action": torch.tensor([action]),
        "next": {
            "observation": torch.tensor([next_values]),
            "reward": torch.tensor([[reward]]),
            "terminated": torch.tensor([[terminated]]),
        },
    }
    if steps is not None:
        batch["steps_to_next_obs"] = torch.tensor([[steps]])
    return TensorDict(batch, [1])


# Numbers by hand -----------------------------------------------------------------------------------------------------


def test_c51_by_hand():
    """Two atoms at 0 and 1, two actions. Next: Q = (0.2, 0.6), so the second; reward 0.1 and gamma 0.5."""
    log_probs = torch.tensor([[0.75, 0.5], [0.25, 0.5]]).log().tolist()
    next_log_probs = torch.tensor([[0.8, 0.4], [0.2, 0.6]]).log().tolist()
    loss = make_loss(table_actor(2, torch.tensor([0.0, 1.0])), gamma=0.5, cql_alpha=2.0)
    batch = transition(log_probs, next_log_probs, action=0, reward=0.1)
    out = loss(batch)
    # Atoms move to 0.1 and 0.6: mass 0.4 * 0.1 + 0.6 * 0.6 = 0.4 arrives at the upper one.
    td = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25))
    gap = math.log(math.exp(0.25) + math.exp(0.5)) - 0.25
    assert out["loss_qvalue"].item() == pytest.approx(td, abs=1e-6)
    assert out["loss_cql"].item() == pytest.approx(2 * gap, abs=1e-6)
    assert out["td_error"].item() == pytest.approx(td, abs=1e-6)
    assert out["cql_gap"].item() == pytest.approx(gap, abs=1e-6)
    assert out["q_data"].item() == pytest.approx(0.25, abs=1e-6)
    assert out["q_max"].item() == pytest.approx(0.5, abs=1e-6)
    assert out["q_target"].item() == pytest.approx(0.1 + 0.5 * 0.6, abs=1e-6)
    assert out["clipped_mass"].item() == 0
    torch.testing.assert_close(batch["td_error"], torch.tensor([[td]]))


@pytest.mark.parametrize(
    ("target", "reward", "terminated", "clipped"),
    [
        ("c51", 0.6, False, 0.6),  # the upper atom of the second action moves to 1.1
        ("c51", 1.5, True, 1.0),
        ("c51", -0.1, False, 0.4),
        ("hl_gauss", 0.6, False, 0.0),  # the target is 0.6 + 0.5 * 0.6
        ("hl_gauss", 0.8, False, 1.0),
        ("hl_gauss", -0.4, False, 1.0),
    ],
)
def test_the_share_of_targets_that_is_clipped_by_hand(target, reward, terminated, clipped):
    log_probs = torch.tensor([[0.8, 0.4], [0.2, 0.6]]).log().tolist()
    loss = make_loss(table_actor(2, torch.tensor([0.0, 1.0])), gamma=0.5, target=target)
    out = loss(transition(log_probs, log_probs, reward=reward, terminated=terminated))
    assert out["clipped_mass"].item() == pytest.approx(clipped)


@pytest.mark.parametrize(
    ("terminated", "steps", "target"),
    [(False, None, 1 + 0.5 * 4), (True, None, 1.0), (False, 1, 1 + 0.5 * 4), (False, 3, 1 + 0.125 * 4), (True, 3, 1.0)],
)
def test_mse_by_hand(terminated, steps, target):
    loss = make_loss(table_actor(3), gamma=0.5, cql_alpha=1.0, target="mse")
    out = loss(transition([1.0, 2, 0], [3.0, 4, -1], action=1, reward=1.0, terminated=terminated, steps=steps))
    assert out["q_target"].item() == pytest.approx(target)
    assert out["loss_qvalue"].item() == pytest.approx((target - 2) ** 2)
    assert out["td_error"].item() == pytest.approx((target - 2) ** 2)
    assert out["loss_cql"].item() == pytest.approx(math.log(math.e + math.e**2 + 1) - 2, abs=1e-6)


def test_double_q_evaluates_the_online_networks_action():
    actor = table_actor(2)
    loss = make_loss(actor, gamma=1.0, target="mse", double_q=True)
    loss.value_network_params.data["module", "0", "module", "scale"].fill_(-1.0)
    # Online (-3, -4) prefers the first action, target (3, 4) the second.
    batch = transition([0.0, 0.0], [3.0, 4.0])
    assert loss(batch)["q_target"].item() == pytest.approx(3)
    loss.double_q = False
    assert loss(batch)["q_target"].item() == pytest.approx(4)


def test_truncation_bootstraps(make_actor, make_batch):
    loss, batch = make_loss(make_actor()), make_batch()
    expected = loss(batch.clone())["loss_qvalue"]
    batch["next", "truncated"].fill_(True)
    batch["next", "done"].fill_(True)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected, rtol=0, atol=0)


def test_hl_gauss_prefers_the_target_value():
    """The loss is least for the network whose distribution is the target's own."""
    loss = make_loss(table_actor(1, SUPPORT), target="hl_gauss", cql_alpha=0.0)
    losses = {}
    for value in (0.0, 1.0, 2.0):
        logits = (-(((SUPPORT - value) / (0.75 * 0.5)) ** 2) / 2).unsqueeze(-1).tolist()
        out = loss(transition(logits, logits, reward=1.0, terminated=True))
        losses[value] = out["loss_qvalue"].item()
        assert out["q_target"].item() == pytest.approx(1.0, abs=1e-4)
    assert losses[1.0] < losses[0.0] and losses[1.0] < losses[2.0]


# Contracts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(make_actor, make_batch, target, reduction):
    actor, batch = make_actor(distributional=target != "mse"), make_batch()
    each = make_loss(actor, target=target, reduction="none")(batch)
    assert each["loss_qvalue"].shape == each["loss_cql"].shape == (32,)
    torch.testing.assert_close(batch["td_error"], each["loss_qvalue"].detach().unsqueeze(-1))
    loss = make_loss(actor, target=target, reduction=reduction)
    out = loss(batch)
    for key in ("loss_qvalue", "loss_cql"):
        expected = each[key] if reduction == "none" else getattr(each[key], reduction)()
        torch.testing.assert_close(out[key], expected)
    assert all(out[key].shape == () and not out[key].requires_grad for key in loss.out_keys[2:])


def test_priority_weights(make_actor, make_batch):
    actor, batch = make_actor(), make_batch()
    each = make_loss(actor, reduction="none")(batch)
    weight = torch.rand(32)
    for shape in ((32,), (32, 1)):
        batch["priority_weight"] = weight.view(shape)
        out = make_loss(actor)(batch)
        for key in ("loss_qvalue", "loss_cql"):
            torch.testing.assert_close(out[key], (each[key] * weight).sum() / weight.sum())
    ignored = make_loss(actor, use_prioritized_weights=False)(batch)
    torch.testing.assert_close(ignored["loss_qvalue"], each["loss_qvalue"].mean())


def test_dispatch_without_tensordict(make_actor, make_batch):
    loss, batch = make_loss(make_actor()), make_batch()
    expected = loss(batch.clone())
    out = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_reward=batch["next", "reward"],
        next_terminated=batch["next", "terminated"],
        next_observation=batch["next", "observation"],
        steps_to_next_obs=batch["steps_to_next_obs"],
    )
    assert len(out) == len(loss.out_keys)
    for key, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[key])
    positional = loss(*(batch[key] for key in loss.in_keys))
    torch.testing.assert_close(positional[0], expected["loss_qvalue"])
    batch["steps_to_next_obs"].fill_(1)
    one_step = loss(**{"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys[:-2]})
    torch.testing.assert_close(one_step[0], loss(batch)["loss_qvalue"])


def test_keys_can_be_renamed_and_nested(make_actor, make_batch):
    plain, batch = make_actor(), make_batch()
    expected = make_loss(plain)(batch.clone())
    network = TensorDictModule(plain.module[0].module, in_keys=[("agent", "obs")], out_keys=[("agent", "value")])
    actor = DistributionalQValueActor(
        network, spec=Categorical(3), support=SUPPORT, action_value_key=("agent", "value")
    )
    loss = make_loss(actor)
    loss.set_keys(
        action_value=("agent", "value"),
        action=("agent", "move"),
        reward=("agent", "gain"),
        terminated=("agent", "over"),
        steps_to_next_obs=("agent", "steps"),
        priority=("agent", "priority"),
    )
    nested = TensorDict(
        {
            "agent": {
                "obs": batch["observation"],
                "move": batch["action"].unsqueeze(-1),
                "steps": batch["steps_to_next_obs"],
            },
            "next": {
                "agent": {
                    "obs": batch["next", "observation"],
                    "gain": batch["next", "reward"],
                    "over": batch["next", "terminated"],
                }
            },
        },
        [32],
    )
    assert ("next", "agent", "gain") in loss.in_keys
    out = loss(nested)
    torch.testing.assert_close(total(out), total(expected))
    assert nested["agent", "priority"].shape == (32, 1)


def test_leading_dimensions(make_actor, make_batch):
    loss, batch = make_loss(make_actor(), reduction="none"), make_batch(12)
    flat = loss(batch.clone())
    shaped = loss(batch.reshape(3, 4))
    torch.testing.assert_close(shaped["loss_qvalue"].flatten(), flat["loss_qvalue"])
    torch.testing.assert_close(loss(batch[0].clone())["loss_cql"], flat["loss_cql"][0])


@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
def test_target_network_gets_no_gradient_and_moves_by_its_updater(make_actor, make_batch, target):
    loss = DistributionalCQLLoss(make_actor(distributional=target != "mse"), target=target, double_q=True)
    updater = SoftUpdate(loss, eps=0.5)
    before = loss.target_value_network_params.data.clone()
    total(loss(make_batch())).backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    targets = list(loss.target_value_network_params.values(True, True))
    assert targets and all(not p.requires_grad and p.grad is None for p in targets)
    torch.optim.SGD(loss.parameters(), 0.1).step()
    assert (loss.target_value_network_params.data == before).all()
    updater.step()
    key = ("module", "0", "module", "0", "weight")
    middle = (loss.value_network_params.data[key] + before[key]) / 2
    torch.testing.assert_close(loss.target_value_network_params.data[key], middle)
    assert (middle != before[key]).any()


def test_hard_update_copies_at_its_interval(make_actor):
    loss = DistributionalCQLLoss(make_actor())
    updater = HardUpdate(loss, value_network_update_interval=0)
    online, target = (
        params.data["module", "0"] for params in (loss.value_network_params, loss.target_value_network_params)
    )
    online.mul_(2)
    assert (target != online).any()
    updater.step()
    assert (target == online).all()


def test_without_delayed_value_the_online_network_gives_detached_targets(make_actor, make_batch):
    actor, batch = make_actor(), make_batch()
    loss = DistributionalCQLLoss(actor, delay_value=False)
    got = torch.autograd.grad(total(loss(batch)), list(actor.parameters()))
    expected = torch.autograd.grad(total(make_loss(actor)(batch)), list(actor.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_state_dict_round_trip(make_actor, make_batch):
    loss, other = make_loss(make_actor(), gamma=0.9, cql_alpha=0.3), make_loss(make_actor())
    batch = make_batch()
    loss.target_value_network_params.data.mul_(1.5)
    assert total(loss(batch)) != total(other(batch))
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(total(other(batch)), total(loss(batch)), rtol=0, atol=0)
    assert other.gamma.item() == pytest.approx(0.9)
    other.cql_alpha = 0.0
    assert other(batch)["loss_cql"].item() == 0


def test_number_of_network_passes(make_actor, make_batch):
    """One online pass on the observation, one target pass on the next one, one more online pass with double Q."""
    for double_q, expected in ((False, 2), (True, 3)):
        actor, calls = make_actor(), []
        actor.module[0].register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        make_loss(actor, double_q=double_q)(make_batch())
        assert len(calls) == expected and sum(calls) == 1


@IGNORE_COMPILE_WARNING
@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
@pytest.mark.parametrize("double_q", [False, True])
def test_compiles_without_graph_breaks(make_actor, make_batch, target, double_q):
    loss = make_loss(make_actor(distributional=target != "mse"), target=target, double_q=double_q)
    batch = make_batch()
    expected = loss(batch.clone())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled_batch = batch.clone()
    out = compiled(compiled_batch)
    for key in loss.out_keys:
        torch.testing.assert_close(out[key], expected[key])
    assert compiled_batch["td_error"].shape == (32, 1)
    parameters = list(loss.parameters())
    for a, b in zip(
        torch.autograd.grad(total(out), parameters), torch.autograd.grad(total(expected), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
def test_bf16_autocast(make_actor, make_batch, target):
    """A third-party network gives bfloat16 log-probabilities; everything after them is in float32."""
    loss, batch = make_loss(make_actor(distributional=target != "mse"), target=target), make_batch()
    exact = loss(batch.clone())
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(batch)
    assert {value.dtype for value in out.values()} == {torch.float32}
    for key in loss.out_keys:
        torch.testing.assert_close(out[key], exact[key], rtol=0.05, atol=0.05)
    total(out).backward()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"gamma": math.nan}, "gamma must be in .*got nan"),
        ({"gamma": "0.9"}, "gamma must be a number, got '0.9'"),
        ({"gamma": True}, "gamma must be a number, got True"),
        ({"cql_alpha": -0.1}, r"cql_alpha must be in \[0, inf\), got -0.1"),
        ({"cql_alpha": math.nan}, "cql_alpha must be in .*got nan"),
        ({"cql_alpha": math.inf}, "cql_alpha must be in .*got inf"),
        ({"cql_alpha": None}, "cql_alpha must be a number, got None"),
        ({"target": "qr"}, "target must be .*'qr'"),
        ({"target": "mse"}, "'mse' needs a scalar QValueActor, got DistributionalQValueActor"),
        ({"sigma_ratio": 0.0}, r"sigma_ratio must be in \(0, inf\), got 0.0"),
        ({"sigma_ratio": math.nan}, "sigma_ratio must be in .*got nan"),
        ({"sigma_ratio": math.inf}, "sigma_ratio must be in .*got inf"),
        ({"double_q": "no"}, "double_q must be one of True, False, got 'no'"),
        ({"delay_value": 1}, "delay_value must be one of True, False, got 1"),
        ({"reduction": "max"}, "reduction must be .*'max'"),
        ({"use_prioritized_weights": "yes"}, "use_prioritized_weights must be one of True, False, 'auto', got 'yes'"),
        ({"keep": "action_value"}, r"keep must be a sequence of keys, such as \['action_value'\]"),
        ({"keep": ["feature"]}, "each key of keep must be one of 'action_value', got 'feature'"),
        ({"double_q": True, "delay_value": False}, "double_q=True needs delay_value=True"),
    ],
)
def test_refuses_arguments(make_actor, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DistributionalCQLLoss(make_actor(), **kwargs)


def test_refuses_actors(make_actor):
    with pytest.raises(TypeError, match=r"value_network must be .*got Linear"):
        DistributionalCQLLoss(nn.Linear(4, 3))
    policy = NetworkPolicy(make_q_actor(1, encoder="resnet_tiny"), ["Pong"])
    with pytest.raises(TypeError, match=r"got NetworkPolicy: give its \.actor"):
        DistributionalCQLLoss(policy)
    with pytest.raises(ValueError, match="'c51' needs a DistributionalQValueActor, got QValueActor"):
        DistributionalCQLLoss(make_actor(distributional=False))
    with pytest.raises(ValueError, match="strictly increasing"):
        DistributionalCQLLoss(table_actor(2, torch.ones(5)))
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        make_loss(make_actor()).set_keys(observation="pixels")
    with pytest.raises(ValueError, match="feature_norm must be a key that the network writes"):
        make_loss(make_actor()).set_keys(feature_norm="typo")


def test_refuses_batches(make_actor, make_batch):
    loss = make_loss(make_actor())
    for key in ("observation", "action", ("next", "reward"), ("next", "observation")):
        batch = make_batch()
        batch["next", "other"] = torch.zeros(32)
        del batch[key]
        with pytest.raises(KeyError, match=key if isinstance(key, str) else key[-1]):
            loss(batch)
    with pytest.raises(KeyError, match=r"neither \('next', 'terminated'\) nor \('next', 'done'\)"):
        loss(make_batch().exclude(("next", "terminated"), ("next", "done")))
    # Shapes that would broadcast into losses between samples.
    for key in (("next", "reward"), ("next", "terminated"), "steps_to_next_obs"):
        batch = make_batch()
        batch[key] = batch[key].expand(32, 2) if key == "steps_to_next_obs" else batch[key].squeeze(-1)
        with pytest.raises(ValueError, match=rf"{key if isinstance(key, str) else key[-1]}.* must be .*got \(32,"):
            loss(batch)
    batch = make_batch()
    batch["action"] = batch["action"].float()
    with pytest.raises(ValueError, match=r"action must be .*of integers, got \(32,\) of torch.float32"):
        loss(batch)


@pytest.mark.parametrize("name", ["terminated", "steps_to_next_obs", "action_value"])
def test_a_renamed_key_that_is_not_there_is_named(make_actor, make_batch, name):
    loss = make_loss(make_actor())
    loss.set_keys(**{name: "typo"})
    with pytest.raises(KeyError, match=rf"'typo'.*set_keys\({name}=\.\.\.\)"):
        loss(make_batch())


def test_only_static_keys_are_taken_from_the_root():
    """``game_id`` does not change within a game; any other input of the network must be there under "next"."""
    inputs = {"observation": torch.randn(6, 4), "game_id": torch.zeros(6, dtype=torch.long), "goal": torch.randn(6, 4)}

    class Sum(nn.Linear):
        def forward(self, observation, game_id, goal):
            return super().forward(observation + goal)

    network = TensorDictModule(Sum(4, 3), in_keys=[*inputs], out_keys=["action_value"])
    actor = QValueActor(network, spec=Categorical(3))
    end = torch.zeros(6, 1, dtype=torch.bool)
    batch = TensorDict(
        {**inputs, "action": torch.randint(3, (6,)), "next": {**inputs, "reward": end.float(), "terminated": end}}, [6]
    )
    loss = make_loss(actor, target="mse")
    expected = loss(batch.clone())["q_target"]
    torch.testing.assert_close(loss(batch.exclude(("next", "game_id")))["q_target"], expected)
    with pytest.raises(KeyError, match=r"\('next', 'goal'\) is not in the batch"):
        loss(batch.exclude(("next", "goal")))
    static = make_loss(actor, target="mse", static_keys=["goal", "game_id"])
    torch.testing.assert_close(static(batch.exclude(("next", "goal")))["q_target"], expected)


def masked_actor(num_actions: int, support: torch.Tensor | None = None):
    """As :func:`table_actor`, with an action mask read from the state."""
    spec = Categorical(num_actions)
    if support is None:
        network = TensorDictModule(Table(), in_keys=["observation"], out_keys=["action_value"])
        return QValueActor(network, spec=spec, action_mask_key="action_mask")

    class MaskedTable(Table):
        def forward(self, observation, action_mask):
            return super().forward(observation), action_mask

    # The mask passes through the network: TorchRL's actor with a mask key takes the softmax of the mask.
    keys = ["action_value", "action_mask"]
    network = TensorDictModule(MaskedTable(), in_keys=["observation", "action_mask"], out_keys=keys)
    actor = DistributionalQValueActor(network, spec=spec, support=support)
    actor.module[-1] = GreedyDistributionalQValueModule(None, support, action_mask_key="action_mask", spec=spec)
    return actor


def with_masks(batch: TensorDict, mask: list[bool], next_mask: list[bool]) -> TensorDict:
    batch["action_mask"], batch["next", "action_mask"] = torch.tensor([mask]), torch.tensor([next_mask])
    return batch


@pytest.mark.parametrize("double_q", [False, True])
def test_an_actors_own_mask_is_honoured_in_target_and_penalty(double_q):
    loss = make_loss(masked_actor(3), target="mse", gamma=1.0, cql_alpha=1.0, double_q=double_q)
    batch = transition([1.0, 2, 9], [3.0, 4, 9])
    out = loss(with_masks(batch, [True, True, False], [True, True, False]))
    assert out["q_target"].item() == pytest.approx(4) and out["td_error"].item() == pytest.approx((4 - 1) ** 2)
    assert out["loss_cql"].item() == pytest.approx(math.log(math.e + math.e**2) - 1)
    assert out["q_max"].item() == pytest.approx(2)
    # An action of the data is in the penalty's sum whatever the mask says: the penalty stays bounded below.
    out = loss(with_masks(transition([1.0, 2, 9], [3.0, 4, 9], action=2), [True, True, False], [True, False, False]))
    assert out["loss_cql"].item() == pytest.approx(math.log(math.e + math.e**2 + math.e**9) - 9, abs=1e-5)
    assert out["q_max"].item() == pytest.approx(2) and out["q_data"].item() == pytest.approx(9)
    assert out["q_target"].item() == pytest.approx(3)
    # A terminal state may have no legal action at all.
    out = loss(with_masks(transition([1.0, 2, 9], [3.0, 4, 9], terminated=True, reward=1.0), [True] * 3, [False] * 3))
    assert out["q_target"].item() == pytest.approx(1)


@pytest.mark.parametrize("target", ["c51", "hl_gauss"])
def test_an_actors_own_mask_is_honoured_with_distributions(target):
    """The second action is better and illegal: the target is the first one's, here of value 0."""
    logits = torch.stack([-(SUPPORT**2), -((SUPPORT - 3) ** 2)], -1).tolist()
    loss = make_loss(masked_actor(2, SUPPORT), target=target, gamma=1.0, cql_alpha=1.0)
    out = loss(with_masks(transition(logits, logits), [True, False], [True, False]))
    assert out["q_target"].item() == pytest.approx(0, abs=1e-4)
    assert out["loss_cql"].item() == pytest.approx(0, abs=1e-5)
    out = loss(with_masks(transition(logits, logits), [True, True], [True, True]))
    assert out["q_target"].item() == pytest.approx(3, abs=1e-2) and out["loss_cql"].item() > 2.5


@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
def test_metrics_are_of_what_the_losses_are(make_actor, make_batch, target):
    """A padding mask and priority weights hold for losses and metrics alike."""
    loss = make_loss(make_actor(distributional=target != "mse"), target=target)
    batch = make_batch(8).reshape(2, 4)
    expected = loss(batch[:, :3].clone())
    batch["next", "reward"][:, 3] = 1e3
    batch["next", "reward"][0, 3] = torch.nan
    batch["collector", "mask"] = torch.ones(2, 4, 1, dtype=torch.bool)
    batch["collector", "mask"][:, 3] = False
    out = loss(batch.clone())
    for key in loss.out_keys:
        torch.testing.assert_close(out[key], expected[key], msg=key)
    batch["priority_weight"] = torch.rand(2, 4)
    weighted = loss(batch.clone())
    each = [
        loss(batch[index : index + 1].exclude("priority_weight", "collector")[:, t : t + 1].clone())
        for index in range(2)
        for t in range(3)
    ]
    weight = batch["priority_weight"][:, :3].flatten()
    for key in loss.out_keys:
        value = (torch.stack([out[key] for out in each]) * weight).sum() / weight.sum()
        torch.testing.assert_close(weighted[key], value, msg=key)


def test_weights_of_slices(make_actor, make_batch):
    """One weight per slice is one per step; other shapes are refused by name, and True asks for weights."""
    loss, batch = make_loss(make_actor()), make_batch(8).reshape(2, 4)
    batch["priority_weight"] = torch.tensor([[1.0], [3]]).expand(2, 4)
    expected = loss(batch.clone())["loss_qvalue"]
    for shape in ((2,), (2, 1), (2, 1, 1)):
        flat = batch.exclude("priority_weight")
        flat.batch_size = [2]
        flat["priority_weight"] = torch.tensor([1.0, 3]).reshape(shape)
        if shape != (2, 1, 1):
            torch.testing.assert_close(loss(flat)["loss_qvalue"], expected)
    batch.batch_size = [2]
    batch["priority_weight"] = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'priority_weight' must be \[\*B\] with \*B=\(2, 4\), got \(2, 3\)"):
        loss(batch)
    with pytest.raises(KeyError, match="use_prioritized_weights=True needs 'priority_weight'"):
        make_loss(make_actor(), use_prioritized_weights=True)(make_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", ["c51", "hl_gauss", "mse"])
def test_casting_the_networks_leaves_the_problem_as_it_is(dtype, target):
    support = None if target == "mse" else torch.linspace(-10, 10, 51)
    loss = make_loss(table_actor(1, support), gamma=0.99, cql_alpha=0.3, target=target).to(dtype)
    assert loss.gamma.item() == pytest.approx(0.99, abs=1e-7) and loss.cql_alpha.item() == pytest.approx(0.3, abs=1e-7)
    # All mass on the atom at 2 (and scalar 2), exact in any precision.
    value = [2.0] if support is None else torch.where(torch.arange(51) == 30, 0.0, -1e4).unsqueeze(-1).tolist()
    batch = transition(value, value, reward=1.0, steps=3)
    for key in ("observation", ("next", "observation")):
        batch[key] = batch[key].to(dtype)
    out = loss(batch)
    assert out["q_target"].item() == pytest.approx(1 + 0.99**3 * 2, abs=1e-4)
    if support is not None:
        torch.testing.assert_close(loss.support, support, rtol=0, atol=0)


# TorchRL's contracts: what its own tests of DQNLoss and DiscreteCQLLoss ask ------------------------------------------


def test_whole_numbers_can_be_scheduled_too(make_actor):
    """They would be buffers of integers, in which 0.5 becomes 0."""
    loss = make_loss(make_actor(), gamma=1, cql_alpha=0)
    loss.gamma, loss.cql_alpha = 0.5, 0.25
    assert (loss.gamma.item(), loss.cql_alpha.item()) == (0.5, 0.25)
    loss.make_value_estimator(gamma=0.75)
    assert loss.gamma.item() == 0.75
    other = make_loss(make_actor(), gamma=1, cql_alpha=1)
    other.load_state_dict(loss.state_dict())
    assert (other.gamma.item(), other.cql_alpha.item()) == (0.75, 0.25)


def test_value_estimator_sets_gamma_and_others_are_refused_by_name(make_actor):
    loss = make_loss(make_actor())
    assert loss.default_value_estimator is ValueEstimators.TD0
    loss.make_value_estimator()
    assert loss.gamma.item() == pytest.approx(0.99)
    for value_type in (None, ValueEstimators.TD0, "td0"):
        loss.make_value_estimator(value_type, gamma=0.9)
        assert loss.gamma.item() == pytest.approx(0.9)
        loss.gamma = 0.5
    for value_type in set(ValueEstimators) - {ValueEstimators.TD0}:
        with pytest.raises(NotImplementedError, match=rf"value_type must be None or TD0.*{value_type.name}"):
            loss.make_value_estimator(value_type)
    with pytest.raises(TypeError, match=r"takes gamma and device, got \['lmbda'\]"):
        loss.make_value_estimator(lmbda=0.9)
    with pytest.raises(ValueError, match="gamma must be in"):
        loss.make_value_estimator(gamma=1.5)


def test_done_stands_in_for_terminated_and_only_then_counts(make_actor, make_batch):
    loss, batch = make_loss(make_actor()), make_batch()
    expected = loss(batch.clone())["loss_qvalue"]
    only_done = batch.clone()
    only_done["next", "done"] = only_done["next"].pop("terminated")
    torch.testing.assert_close(loss(only_done)["loss_qvalue"], expected)
    loss.set_keys(done="over")
    only_done["next", "over"] = only_done["next"].pop("done")
    torch.testing.assert_close(loss(only_done)["loss_qvalue"], expected)
    dispatched = loss(
        observation=batch["observation"],
        action=batch["action"],
        steps_to_next_obs=batch["steps_to_next_obs"],
        next_reward=batch["next", "reward"],
        next_over=batch["next", "terminated"],
        next_observation=batch["next", "observation"],
    )
    torch.testing.assert_close(dispatched[0], expected)


def test_reduction_none_is_the_mean(make_actor, make_batch):
    actor, batch = make_actor(), make_batch()
    torch.testing.assert_close(
        make_loss(actor, reduction=None)(batch.clone())["loss_qvalue"], make_loss(actor)(batch)["loss_qvalue"]
    )


def test_a_locked_batch_takes_its_priorities_in_place(make_actor, make_batch):
    loss, batch = make_loss(make_actor()), make_batch()
    expected = batch.clone()
    loss(expected)
    batch["td_error"] = torch.zeros(32, 1)
    entry = batch["td_error"]
    loss(batch.lock_())
    torch.testing.assert_close(entry, expected["td_error"])


@pytest.mark.parametrize("delay_value", [False, True])
def test_reset_parameters_recursive_starts_everything_anew(make_actor, delay_value):
    loss = DistributionalCQLLoss(make_q_actor(2, encoder="resnet_small"), delay_value=delay_value)
    for params in (loss.value_network_params, loss.target_value_network_params):
        params.data.apply_(lambda x: x.fill_(7) if x.is_floating_point() and x.numel() != 51 else x)
    loss.reset_parameters_recursive()
    assert not [name for name, parameter in loss.named_parameters() if (parameter == 7).all()]
    online, target = loss.value_network_params.data, loss.target_value_network_params.data
    assert (online == target).all()


@pytest.mark.parametrize("actor_first", [False, True])
def test_lazy_networks(make_batch, actor_first):
    actor = DistributionalQValueActor(MLP(out_features=(3, 3), depth=2), spec=Categorical(3), support=torch.arange(3))
    loss, batch = DistributionalCQLLoss(actor), make_batch()
    updater = SoftUpdate(loss, eps=0.5)
    if actor_first:
        actor(batch.clone())
        updater.step()
    assert total(loss(batch)).isfinite()
    online, target = loss.value_network_params, loss.target_value_network_params
    assert (online.data == target.data).all()


def test_features_are_returned_to_whoever_asks():
    """An auxiliary loss on ``features`` costs no second pass, and its gradient reaches the encoder."""
    actor = make_q_actor(2, encoder="resnet_small")
    loss = make_loss(actor, keep=["features", "feature_norm"])
    frames = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    end = torch.zeros(4, 1, dtype=torch.bool)
    state = {"observation": frames, "game_id": torch.tensor([0, 1, 1, 0])}
    batch = TensorDict(
        {**state, "action": torch.randint(18, (4,)), "next": {**state, "reward": end.float(), "terminated": end}}, [4]
    )
    calls = []
    actor.module[0].module.encoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    out = loss(batch.clone())
    assert sum(calls) == 1 and loss.out_keys[-2:] == ["features", "feature_norm"]
    torch.testing.assert_close(out["features"], actor(batch.clone())["features"])
    out["features"].square().mean().backward()
    encoder, heads = actor.module[0].module.encoder, actor.module[0].module.heads
    assert all(parameter.grad.any() for parameter in encoder.parameters()) and heads.weight.grad is None
    assert "features" not in make_loss(actor)(batch)


def test_steps_as_multi_step_writes_them(make_actor, make_batch):
    loss, batch = make_loss(make_actor()), make_batch()
    expected = loss(batch.clone())["loss_qvalue"]
    batch["steps_to_next_obs"] = batch["steps_to_next_obs"].squeeze(-1)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected)


# Properties ----------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(["c51", "hl_gauss", "mse"]))
def test_invariant_to_batch_order(make_actor, make_batch, seed, target):
    torch.manual_seed(seed)
    loss = make_loss(make_actor(distributional=target != "mse"), target=target, reduction="none")
    batch, order = make_batch(10), torch.randperm(10)
    out, shuffled = loss(batch.clone()), loss(batch[order].clone())
    for key in ("loss_qvalue", "loss_cql"):
        torch.testing.assert_close(shuffled[key], out[key][order])


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 8), st.sampled_from(["c51", "hl_gauss", "mse"]))
def test_duplicated_samples_weigh_twice(make_actor, make_batch, seed, num_duplicates, target):
    torch.manual_seed(seed)
    actor, batch = make_actor(distributional=target != "mse"), make_batch(8)
    doubled = torch.cat([batch, batch[:num_duplicates]])
    weighted = batch.clone()
    weighted["priority_weight"] = 1 + (torch.arange(8) < num_duplicates).float()
    loss = make_loss(actor, target=target)
    torch.testing.assert_close(total(loss(doubled)), total(loss(weighted)))
    summed = make_loss(actor, target=target, reduction="sum")
    expected = total(summed(batch)) + total(summed(batch[:num_duplicates].clone()))
    torch.testing.assert_close(total(summed(doubled)), expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.integers(0, 3), st.floats(-50, 50))
def test_cql_gap_is_a_shift_invariant_distance_to_the_softmax(values, action, shift):
    loss = make_loss(table_actor(4), target="mse", cql_alpha=1.0)

    def gap(q: list[float]) -> float:
        return loss(transition(q, q, action=action))["loss_cql"].item()

    # -log softmax: never negative, at least log 4 unless the data's action is above the average in exponentials.
    assert gap(values) == pytest.approx(-torch.tensor(values).double().log_softmax(0)[action].item(), abs=1e-4)
    assert gap(values) >= 0
    assert gap([value + shift for value in values]) == pytest.approx(gap(values), abs=1e-3)
    dominated = [value if index != action else max(values) + 40 for index, value in enumerate(values)]
    assert gap(dominated) == pytest.approx(0, abs=1e-6)
    others = [value for index, value in enumerate(values) if index != action]
    if max(others) >= values[action]:
        assert gap(values) >= math.log(2) - 1e-6


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 3), st.booleans())
def test_float64_reference(make_actor, make_batch, seed, cql_alpha, double_q):
    """The loss in float64, and in float32, equal a direct transcription in float64 of the formulas."""
    torch.manual_seed(seed)
    actor, batch = make_actor(), make_batch(8)
    loss = make_loss(actor, cql_alpha=cql_alpha, double_q=double_q, gamma=0.9)
    loss.target_value_network_params.data.mul_(0.7)
    target_net = copy.deepcopy(actor.module[0]).double()
    loss.target_value_network_params.data["module", "0"].to_module(target_net)
    target_net.double()
    online_net = copy.deepcopy(actor.module[0]).double()
    z = SUPPORT.double()
    log_p = online_net.module(batch["observation"].double()).log_softmax(-2)
    next_p = target_net.module(batch["next", "observation"].double()).softmax(-2)
    chooser = online_net.module(batch["next", "observation"].double()).softmax(-2) if double_q else next_p
    expected = 0.0
    for i in range(8):
        best = (chooser[i] * z[:, None]).sum(0).argmax()
        discount = 0.9 ** batch["steps_to_next_obs"][i].item() * (not batch["next", "terminated"][i].item())
        for j in range(21):
            tz = (batch["next", "reward"][i].double() + discount * z[j]).clamp(-5, 5)
            shares = (1 - (z - tz).abs() / 0.5).clamp_min(0)
            expected -= next_p[i, j, best] * (shares * log_p[i, :, batch["action"][i]]).sum() / 8
        q = (log_p[i].exp() * z[:, None]).sum(0)
        expected += cql_alpha * (q.logsumexp(0) - q[batch["action"][i]]) / 8
    torch.testing.assert_close(total(loss(batch.clone())).double(), expected, rtol=1e-4, atol=1e-4)
    doubled = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(total(loss.double()(doubled)), expected, rtol=1e-6, atol=1e-6)
