"""Our losses and actors beside TorchRL's own, on the same numbers and in the same machinery."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    PrioritizedSampler,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import EnvBase
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import DiscreteCQLLoss, DistributionalDQNLoss, DQNLoss, HardUpdate

from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DistributionalCQLLoss, MultiStep, expected_value

seeds = st.integers(0, 2**31)


def with_updater(loss, scale: float = 0.8):
    """Target parameters unlike the online ones, so that a mix-up of the two would show."""
    HardUpdate(loss, value_network_update_interval=1000)
    if scale != 1:
        loss.target_value_network_params.data["module", "0"].mul_(scale)
    return loss


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, module: nn.Module) -> None:
    parameters = list(module.parameters())
    got, expected = torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans(), st.floats(0.5, 1))
def test_without_penalty_it_is_distributional_dqn(make_actor, make_batch, seed, one_hot, gamma):
    torch.manual_seed(seed)
    actor, batch = make_actor(one_hot=one_hot), make_batch(one_hot=one_hot)
    ours = with_updater(DistributionalCQLLoss(actor, gamma=gamma, cql_alpha=0.0, double_q=True))
    theirs = with_updater(DistributionalDQNLoss(actor, gamma=gamma))
    our_batch, their_batch = batch.clone(), batch.clone()
    out, expected = ours(our_batch), theirs(their_batch)["loss"]
    torch.testing.assert_close(out["loss_qvalue"] + out["loss_cql"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_batch["td_error"], their_batch["td_error"], rtol=1e-5, atol=1e-5)
    assert_same_gradients(out["loss_qvalue"] + out["loss_cql"], expected, actor)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans(), st.booleans())
def test_mse_without_penalty_is_dqn(make_actor, make_batch, seed, one_hot, double_q):
    torch.manual_seed(seed)
    actor, batch = make_actor(distributional=False, one_hot=one_hot), make_batch(one_hot=one_hot)
    batch["steps_to_next_obs"].fill_(1)
    ours = with_updater(DistributionalCQLLoss(actor, gamma=0.9, double_q=double_q, target="mse"))
    theirs = with_updater(DQNLoss(actor, double_dqn=double_q, action_space=actor.action_space))
    theirs.make_value_estimator(gamma=0.9)
    our_batch, their_batch = batch.clone(), batch.clone()
    out, expected = ours(our_batch)["loss_qvalue"], theirs(their_batch)["loss"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_batch["td_error"], their_batch["td_error"], rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, actor)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_mse_is_discrete_cql(make_actor, make_batch, seed, one_hot):
    torch.manual_seed(seed)
    actor, batch = make_actor(distributional=False, one_hot=one_hot), make_batch(one_hot=one_hot)
    del batch["steps_to_next_obs"]
    # With one set of parameters: torchrl 0.14.1 hands its target parameters to an argument that its estimator drops.
    ours = with_updater(DistributionalCQLLoss(actor, gamma=0.9, cql_alpha=1.0, target="mse"), scale=1)
    theirs = with_updater(DiscreteCQLLoss(actor, action_space=actor.action_space), scale=1)
    theirs.make_value_estimator(gamma=0.9)
    for key, factor in (("loss_qvalue", 2), ("loss_cql", 1)):  # TorchRL's squared error has a half
        out, expected = ours(batch.clone())[key], factor * theirs(batch.clone())[key]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(out, expected, actor)


class Expectation(nn.Module):
    def __init__(self, network: nn.Module, support: torch.Tensor) -> None:
        super().__init__()
        self.network, self.support = network, support

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return expected_value(self.network(observation).log_softmax(-2), self.support)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_distributional_penalty_is_discrete_cqls_on_the_same_q_values(make_actor, make_batch, seed):
    torch.manual_seed(seed)
    actor, batch = make_actor(), make_batch()
    scalar = QValueActor(Expectation(actor.module[0].module, actor.support), spec=Categorical(3))
    theirs = DiscreteCQLLoss(scalar, action_space="categorical")
    HardUpdate(theirs, value_network_update_interval=1000)
    theirs.make_value_estimator(gamma=0.99)
    ours = with_updater(DistributionalCQLLoss(actor, cql_alpha=1.0))
    out, expected = ours(batch.clone())["loss_cql"], theirs(batch.clone())["loss_cql"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, actor.module[0])


def atari_batch(batch_size: int = 6, num_games: int = 2) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8),
            "game_id": torch.randint(num_games, (batch_size,)),
            "action": torch.randint(18, (batch_size,)),
            "steps_to_next_obs": torch.randint(1, 4, (batch_size, 1)),
            "next": {
                "observation": torch.randint(256, (batch_size, 4, 84, 84), dtype=torch.uint8),
                "reward": torch.randn(batch_size, 1),
                "terminated": torch.rand(batch_size, 1) < 0.3,
                "done": torch.zeros(batch_size, 1, dtype=torch.bool),
            },
        },
        [batch_size],
    )


@pytest.mark.parametrize("mask", [False, True])
def test_our_actor_in_distributional_dqn(mask):
    """`game_id` is only at the root of a batch; with a mask both losses choose the best legal next action."""
    torch.manual_seed(0)
    actor = make_q_actor(["Breakout", "Freeway"], encoder="resnet_small", mask_illegal_actions=mask)
    batch = atari_batch()
    ours = with_updater(DistributionalCQLLoss(actor, cql_alpha=0.0, double_q=True), scale=1)
    theirs = with_updater(DistributionalDQNLoss(actor, gamma=0.99), scale=1)
    out, expected = ours(batch.clone())["loss_qvalue"], theirs(batch.clone())["loss"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, actor)
    free = make_q_actor(["Breakout", "Freeway"], encoder="resnet_small")
    free.load_state_dict(actor.state_dict(), strict=False)
    unmasked = with_updater(DistributionalCQLLoss(free, cql_alpha=0.0, double_q=True), scale=1)
    assert (unmasked(batch)["loss_qvalue"] == out) == (not mask)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_an_actors_own_mask_is_dqns_and_discrete_cqls(seed, double_q):
    """Legal actions in the data: target and penalty are those of TorchRL's losses."""
    torch.manual_seed(seed)
    network = TensorDictModule(nn.Linear(4, 3), in_keys=["observation"], out_keys=["action_value"])
    actor = QValueActor(network, spec=Categorical(3), action_mask_key="action_mask")
    action = torch.randint(3, (16,))
    legal, end = torch.rand(2, 16, 3) < 0.5, torch.rand(16, 1) < 0.3
    legal[:, torch.arange(16), action] = True
    batch = TensorDict(
        {
            "observation": torch.randn(16, 4),
            "action_mask": legal[0],
            "action": action,
            "next": {
                "observation": torch.randn(16, 4),
                "action_mask": legal[1],
                "reward": torch.randn(16, 1),
                "terminated": end,
                "done": end,
            },
        },
        [16],
    )
    ours = with_updater(DistributionalCQLLoss(actor, gamma=0.9, cql_alpha=1.0, double_q=double_q, target="mse"))
    theirs = with_updater(DQNLoss(actor, double_dqn=double_q, action_space="categorical"))
    theirs.make_value_estimator(gamma=0.9)
    penalty = with_updater(DiscreteCQLLoss(actor, action_space="categorical"))
    penalty.make_value_estimator(gamma=0.9)
    our_batch, their_batch = batch.clone(), batch.clone()
    out, _ = ours(our_batch), theirs(their_batch)
    torch.testing.assert_close(our_batch["td_error"], their_batch["td_error"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss_cql"], penalty(batch)["loss_cql"], rtol=1e-5, atol=1e-5)


def test_the_head_of_an_absent_game_gets_no_gradient():
    actor = make_q_actor(3, encoder="resnet_small")
    batch = atari_batch()  # games 0 and 1
    batch["game_id"][:2] = torch.tensor([0, 1])
    loss = with_updater(DistributionalCQLLoss(actor), scale=1)
    out = loss(batch)
    assert "feature_norm" in out
    (out["loss_qvalue"] + out["loss_cql"]).backward()
    heads = actor.module[0].module.heads
    assert not heads.weight.grad[2].any() and not heads.bias.grad[2].any()
    assert heads.weight.grad[0].any() and heads.weight.grad[1].any()
    # Zeros, not None: ranks whose batches hold different games still exchange the same gradients.
    assert all(parameter.grad is not None for parameter in loss.parameters())


class Corridor(EnvBase):
    """An Atari-shaped toy: any action lights a pixel, every fifth step ends the episode."""

    def __init__(self) -> None:
        super().__init__(batch_size=[])
        self.observation_spec = Composite(
            observation=Bounded(0, 255, shape=(4, 84, 84), dtype=torch.uint8), game_id=Categorical(2, shape=())
        )
        self.action_spec = Categorical(18)
        self.reward_spec = Unbounded(shape=(1,))
        self.time = 0

    def _observe(self) -> dict[str, torch.Tensor]:
        observation = torch.zeros(4, 84, 84, dtype=torch.uint8)
        observation[:, self.time] = 255
        return {"observation": observation, "game_id": torch.tensor(1)}

    def _reset(self, tensordict=None):
        self.time = 0
        return TensorDict(self._observe(), [])

    def _step(self, tensordict):
        self.time += 1
        over = torch.tensor([self.time == 5])
        return TensorDict(
            {**self._observe(), "reward": tensordict["action"].float().unsqueeze(-1), "done": over, "terminated": over},
            [],
        )

    def _set_seed(self, seed):
        torch.manual_seed(seed)


# Importing TorchRL's collectors warns about TorchRL's own classes; it has to happen where that is ignored.
@pytest.mark.filterwarnings("ignore:Creating .* inherits from WeightUpdaterBase:DeprecationWarning")
def test_actor_explores_in_a_collector_and_learns_from_a_buffer():
    from torchrl.collectors import Collector

    torch.manual_seed(0)
    actor = make_q_actor(["Pong", "Breakout"], encoder="resnet_small", mask_illegal_actions=True)
    explore = EGreedyModule(Categorical(18), eps_init=0.5, eps_end=0.5, action_mask_key="action_mask")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=8)
    loss = DistributionalCQLLoss(actor, double_q=True)
    updater = HardUpdate(loss, value_network_update_interval=1)
    optimizer = torch.optim.Adam(loss.parameters())
    collector = Collector(
        Corridor(),
        TensorDictSequential(actor, explore),
        frames_per_batch=16,
        total_frames=32,
        auto_register_policy_transforms=False,
        postproc=MultiStep(gamma=0.99, n_steps=3),
    )
    for data in collector:
        assert set(data["action"].tolist()) <= {0, 1, 3, 4}  # Breakout's legal actions
        buffer.extend(data.reshape(-1).exclude("action_value", "action_mask", "features", "feature_norm"))
        for _ in range(2):
            batch = buffer.sample()
            out = loss(batch)
            (out["loss_qvalue"] + out["loss_cql"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            updater.step()
    collector.shutdown()
    assert batch["td_error"].shape == (8, 1) and torch.isfinite(batch["td_error"]).all()


def test_actor_of_one_hot_mlps(make_actor, make_batch):
    """A plain buffer of a one-hot policy's transitions."""
    actor = make_actor(one_hot=True)
    buffer = ReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
    buffer.extend(actor(make_batch(64, one_hot=True).exclude("action_value")).exclude("action_value"))
    loss = with_updater(DistributionalCQLLoss(actor))
    assert torch.isfinite(loss(buffer.sample())["loss_qvalue"])
    assert isinstance(actor.spec["action"], OneHot)


def has_prioritized_samplers() -> bool:
    try:
        PrioritizedSampler(4, alpha=0.7, beta=0.9)
    except RuntimeError:  # torchrl 0.14.1's extension does not load beside torch 2.13; beside 2.14 it does
        return False
    return True


@pytest.mark.skipif(not has_prioritized_samplers(), reason="torchrl's extension needs torch 2.14")
def test_prioritized_replay(make_actor, make_batch):
    """The loss's errors become priorities, and the weights that come back make its mean the weighted one."""
    loss = with_updater(DistributionalCQLLoss(make_actor(), use_prioritized_weights=True), scale=1)
    each = with_updater(DistributionalCQLLoss(loss.value_network, reduction="none"), scale=1)
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=0.7, beta=0.9, storage=LazyTensorStorage(64), batch_size=32, priority_key="td_error"
    )
    buffer.extend(make_batch(64))
    batch = buffer.sample()
    assert batch["priority_weight"].std() < 1e-6
    loss(batch)
    buffer.update_tensordict_priority(batch)
    batch = buffer.sample()
    weight = batch["priority_weight"]
    assert weight.std() > 1e-3
    errors = each(batch.exclude("priority_weight"))["loss_qvalue"]
    torch.testing.assert_close(loss(batch)["loss_qvalue"], (errors * weight).sum() / weight.sum())
