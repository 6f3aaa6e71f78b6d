import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn import functional as F
from torchrl.data import Categorical
from torchrl.modules import QValueActor

from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DiscreteBCLoss


def test_by_hand():
    actor = QValueActor(nn.Identity(), spec=Categorical(2))
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]).log()
    batch = TensorDict({"observation": logits, "action": torch.tensor([0, 1, 1])}, [3])
    out = DiscreteBCLoss(actor, reduction="none")(batch)
    torch.testing.assert_close(out["loss_bc"], -torch.tensor([0.75, 0.5, 0.1]).log())
    # The second is a tie, which goes to the first action.
    assert out["accuracy"].item() == pytest.approx(1 / 3)
    assert DiscreteBCLoss(actor)(batch)["loss_bc"].item() == pytest.approx(out["loss_bc"].mean().item())
    assert DiscreteBCLoss(actor, reduction="sum")(batch)["loss_bc"].item() == pytest.approx(out["loss_bc"].sum().item())


@pytest.mark.parametrize("one_hot", [False, True])
def test_equals_cross_entropy(make_actor, make_batch, one_hot):
    actor = make_actor(distributional=False, one_hot=one_hot)
    batch = make_batch(one_hot=one_hot)
    out = DiscreteBCLoss(actor)(batch.clone())
    logits = actor(batch.clone())["action_value"]
    action = batch["action"].int().argmax(-1) if one_hot else batch["action"]
    torch.testing.assert_close(out["loss_bc"], F.cross_entropy(logits, action))
    parameters = list(actor.parameters())
    got = torch.autograd.grad(out["loss_bc"], parameters)
    for a, b in zip(got, torch.autograd.grad(F.cross_entropy(logits, action), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_keys_weights_and_dispatch(make_actor, make_batch):
    actor, batch = make_actor(distributional=False), make_batch()
    loss = DiscreteBCLoss(actor, reduction="none")
    plain = loss(batch.clone())["loss_bc"]
    dispatched, accuracy = loss(observation=batch["observation"], action=batch["action"])
    torch.testing.assert_close(dispatched, plain)
    assert accuracy.ndim == 0
    batch["agent", "move"] = batch.pop("action").unsqueeze(-1)
    batch["weight"] = torch.rand(32)
    loss.set_keys(action=("agent", "move"), priority_weight="weight")
    torch.testing.assert_close(loss(batch)["loss_bc"], plain * batch["weight"])


def test_dispatch_guesses_no_batch_size():
    actor = QValueActor(nn.Linear(1, 3), spec=Categorical(3))
    observation, action = torch.randn(5, 1), torch.zeros(5, 1, dtype=torch.int64)  # [5, 1] is no batch size
    loss, _ = DiscreteBCLoss(actor)(observation=observation, action=action)
    torch.testing.assert_close(loss, F.cross_entropy(actor.module[0](observation), action.squeeze(-1)))


# tensordict 0.14 reads a setting that torch 2.13 has retired.
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning")
def test_on_the_multi_game_actor_compiled():
    loss = DiscreteBCLoss(make_q_actor(2, encoder="resnet_small", num_atoms=None))
    batch = TensorDict(
        {
            "observation": torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8),
            "game_id": torch.randint(2, (8,)),
            "action": torch.randint(18, (8,)),
        },
        [8],
    )
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out = compiled(batch.clone())
    torch.testing.assert_close(out["loss_bc"], loss(batch)["loss_bc"])
    out["loss_bc"].backward()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(batch)["loss_bc"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, out["loss_bc"], rtol=0.02, atol=0.02)


def test_refuses(make_actor, make_batch):
    with pytest.raises(TypeError, match=r"actor_network must be .*QValueActor.*got Linear"):
        DiscreteBCLoss(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"actor_network .*scalar values, got DistributionalQValueActor"):
        DiscreteBCLoss(make_actor())
    scalar = make_actor(distributional=False)
    with pytest.raises(ValueError, match="use_prioritized_weights must be one of"):
        DiscreteBCLoss(scalar, use_prioritized_weights="yes")
    with pytest.raises(ValueError, match=r"reduction .*'median'"):
        DiscreteBCLoss(scalar, reduction="median")
    batch = make_batch()
    batch["action"] = torch.zeros(32, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"categorical action must be \[\*B\] or \[\*B, 1\].*got \(32, 2\)"):
        DiscreteBCLoss(scalar)(batch)


def test_an_actors_own_mask_is_honoured():
    network = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action_value"])
    actor = QValueActor(network, spec=Categorical(3), action_mask_key="action_mask")
    batch = TensorDict(
        {
            "observation": torch.tensor([[1.0, 2, 9], [1.0, 2, 9]]),
            "action": torch.tensor([1, 2]),  # the second is illegal, but in the data
            "action_mask": torch.tensor([[True, True, False]]).expand(2, 3),
        },
        [2],
    )
    out = DiscreteBCLoss(actor, reduction="none")(batch)
    expected = [math.log(math.e + math.e**2) - 2, math.log(math.e + math.e**2 + math.e**9) - 9]
    torch.testing.assert_close(out["loss_bc"], torch.tensor(expected))
    assert out["accuracy"].item() == 0.5


def test_accuracy_is_of_what_the_loss_is():
    """Padding does not count, weights do."""
    actor = QValueActor(nn.Identity(), spec=Categorical(2))
    logits = torch.tensor([[[0.0, 1], [1, 0]], [[1, 0], [0, 1]]])
    batch = TensorDict({"observation": logits, "action": torch.tensor([[1, 0], [1, 0]])}, [2, 2])
    batch["collector", "mask"] = torch.tensor([[True, True], [True, False]])
    assert DiscreteBCLoss(actor)(batch)["accuracy"].item() == pytest.approx(2 / 3)
    batch["priority_weight"] = torch.tensor([[1.0, 1], [6, 100]])
    assert DiscreteBCLoss(actor)(batch)["accuracy"].item() == pytest.approx(2 / 8)


def test_features_are_returned_to_whoever_asks(make_batch):
    actor = make_q_actor(1, encoder="resnet_small", num_atoms=None)
    loss = DiscreteBCLoss(actor, keep=["features"], reduction=None)
    frames = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    out = loss(TensorDict({"observation": frames, "action": torch.randint(18, (4,))}, [4]))
    assert loss.out_keys == ["loss_bc", "accuracy", "features"]
    out["features"].mean().backward()
    assert actor.module[0].module.encoder[0].weight.grad.any()
