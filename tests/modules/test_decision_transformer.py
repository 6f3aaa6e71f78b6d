from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import TransformedEnv

from torchrl_sql.envs import AtariEnv, PolicyInputs
from torchrl_sql.games import NUM_ACTIONS
from torchrl_sql.modules import DecisionTransformerPolicy, make_decision_transformer
from torchrl_sql.modules.decision_transformer import NUM_RETURNS, encode_return, encode_reward
from torchrl_sql.objectives import DecisionTransformerLoss


@pytest.fixture(autouse=True)
def one_core():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def tiny(**kwargs):
    """Two layers, frames of four patches, no dropout."""
    return make_decision_transformer(**{"width": 64, "num_layers": 2, "patch_size": 42, "dropout": 0.0} | kwargs)


def windows(*batch_shape: int, num_steps: int = 4) -> TensorDict:
    shape = (*batch_shape, num_steps)
    return TensorDict(
        {
            "observation": torch.randint(256, (*shape, 84, 84), dtype=torch.uint8),
            "action": torch.randint(NUM_ACTIONS, shape),
            "return_to_go": torch.randint(-20, 101, shape).float(),
            "mask": torch.ones(shape, dtype=torch.bool),
            "next": {
                "reward": torch.randint(-1, 2, (*shape, 1)).float(),
                "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
            },
        },
        batch_shape,
    )


def acting(batch: TensorDict) -> TensorDict:
    """What a policy is given, at the last step of these windows."""
    context = {key: batch[key] for key in ("observation", "action", "mask")} | {"reward": batch["next", "reward"]}
    numbers = {key: torch.rand(len(batch), dtype=torch.float64) for key in ("uniform", "return_uniform")}
    game_id = torch.zeros(len(batch), dtype=torch.int64)
    return TensorDict({"context": context, "game_id": game_id, **numbers}, batch.batch_size)


def test_vocabularies_by_hand():
    returns = torch.tensor([-25.0, -20.0, -0.5, 0.0, 1.9, 99.0, 100.0, 3000.0, 1e20, torch.inf])
    assert encode_return(returns).tolist() == [0, 0, 20, 20, 21, 119, 120, 120, 120, 120]
    reward = torch.tensor([0.0, 0.25, -1.0, 1.0])
    assert encode_reward(reward, torch.tensor([False] * 4)).tolist() == [0, 1, 3, 1]
    assert encode_reward(reward, torch.tensor([True] * 4)).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("width", "num_layers", "millions"), [(512, 4, 12.96), (768, 6, 43.05), (1280, 10, 197.64)], ids=str
)
def test_sizes(width, num_layers, millions):
    """By hand: a block has 12 D^2 + 13 D, tokens and positions (196 + 1 + 36 + 121 + 18 + 4 + 156) D, the last norm
    2 D, the heads 143 (D + 1)."""
    by_hand = num_layers * (12 * width**2 + 13 * width) + (532 + 2) * width + 143 * (width + 1)
    with torch.device("meta"):
        network = make_decision_transformer(width=width, num_layers=num_layers)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert num_parameters == by_hand == pytest.approx(millions * 1e6, rel=0.001)


@pytest.mark.parametrize("return_token", [True, False])
def test_no_token_sees_the_future(return_token):
    """By gradients of the outputs with respect to what was put in, token by token."""
    network = tiny(return_token=return_token).module
    tokens = network.tokens_per_step  # four patches, (return,) action, reward
    x = torch.randn(1, 4 * tokens, 64, requires_grad=True)
    y = network._transform(x, network.attended)[0] @ torch.randn(64)
    influence = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in y])
    seen = influence.abs().sum(-1) > 0
    for i in range(4 * tokens):
        for j in range(4 * tokens):
            same_frame = i // tokens == j // tokens and i % tokens < 4 and j % tokens < 4
            hidden_return = return_token and j % tokens == 4 and j // tokens > 0
            assert bool(seen[i, j]) == (i == j or ((j < i or same_frame) and not hidden_return)), (i, j)


def test_predictions_follow_from_nothing_later():
    """The network as a whole: what comes later, and later returns-to-go, change no prediction before them."""
    network, batch = tiny(), windows(3)
    before = network(batch.clone())
    for k in range(4):
        changed = batch.clone()
        changed["action"][:, k] = (changed["action"][:, k] + 1) % NUM_ACTIONS
        changed["next", "reward"][:, k] = (changed["next", "reward"][:, k] + 2) % 3 - 1
        changed["return_to_go"][:, 1:] = 7
        changed["observation"][:, k + 1 :] = 0
        after = network(changed)
        assert torch.equal(after["action_logits"][:, : k + 1], before["action_logits"][:, : k + 1])
        assert torch.equal(after["return_logits"], before["return_logits"])
        assert not torch.equal(after["reward_logits"][:, k], before["reward_logits"][:, k])
        if k < 3:
            assert not torch.equal(after["action_logits"][:, k + 1], before["action_logits"][:, k + 1])
    other_return = batch.clone()
    other_return["return_to_go"][:, 0] = 90 - other_return["return_to_go"][:, 0]
    assert not torch.equal(network(other_return)["action_logits"][:, 3], before["action_logits"][:, 3])


def test_the_return_is_predicted_from_the_first_frame():
    network, batch = tiny(), windows(3)
    from_frame = network.module.predict_return(batch["observation"][:, 0])
    torch.testing.assert_close(network(batch)["return_logits"], from_frame)


def test_frames_are_bytes_or_scaled_floats_as_for_q_networks():
    network, batch = tiny(), windows(3)
    from_bytes = network(batch.clone())
    scaled = network(batch.clone().set("observation", batch["observation"] / 255))
    torch.testing.assert_close(scaled["action_logits"], from_bytes["action_logits"])
    with pytest.raises(TypeError, match="frames must be uint8"):
        network(batch.clone().set("observation", batch["observation"].long()))


def test_batch_shapes():
    network, batch = tiny(), windows(2, 3)
    together = network(batch.clone())
    assert together["action_logits"].shape == (2, 3, 4, 18) and together["return_logits"].shape == (2, 3, 121)
    assert together["reward_logits"].shape == (2, 3, 4, 4) and together["reward_token"].shape == (2, 3, 4)
    torch.testing.assert_close(together[1, 2], network(batch[1, 2]))
    assert network(batch[:0])["action_logits"].shape == (0, 3, 4, 18)


@pytest.mark.parametrize("key", ["observation", "action", "return_to_go", ("next", "reward"), ("next", "terminated")])
def test_refuses_windows_of_another_length(key):
    batch = windows(2)
    batch[key] = batch[key][:, :3].clone()
    with pytest.raises(ValueError, match="must be"):
        tiny()(batch)


@pytest.mark.parametrize(
    "kwargs", [{"width": 96}, {"num_layers": 0}, {"num_steps": 0}, {"patch_size": 10}, {"dropout": 1.0}], ids=str
)
def test_refuses_sizes_that_do_not_fit(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        tiny(**kwargs)


def test_features_are_of_the_last_step_that_is_no_padding():
    network, batch = tiny().eval(), windows(3)
    batch["mask"] = torch.tensor([[True] * 4, [True, True, False, False], [True] + [False] * 3])
    inputs = [batch[key] for key in network.in_keys]
    features = network.module.features(*inputs, mask=batch["mask"])
    logits = network(batch)["action_logits"]
    for row, last in enumerate((3, 1, 0)):
        torch.testing.assert_close(network.module.action_head(features[row]), logits[row, last])


def test_initial_weights_are_the_notebooks():
    network = make_decision_transformer(width=128, num_layers=4).module
    hidden = network.blocks[0].hidden.weight  # variance 2 / layers / fan-in
    assert hidden.std().item() == pytest.approx((2 / 4 / 128) ** 0.5, rel=0.02)
    assert hidden.abs().max() <= 2 * (2 / 4 / 128) ** 0.5 / 0.8796
    assert network.position.abs().max() <= 0.04 and network.actions.weight.abs().max() <= 0.04
    assert network.patches.weight.abs().max() <= 2 / 14
    assert not network.blocks[3].attention_out.bias.any()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    network.reset_parameters()
    assert all(value.shape == start[name].shape for name, value in network.state_dict().items())
    assert not torch.equal(network.position, start["position"])


def policy(decoding, **kwargs):
    return DecisionTransformerPolicy(tiny().eval(), ["Freeway", "Alien"], decoding=decoding, **kwargs)


def test_returns_by_hand():
    """P = (1/2, 1/4, 1/4) for the returns -20, -19 and 100."""
    logits = torch.full((1, NUM_RETURNS), -torch.inf)
    logits[0, [0, 1, 120]] = torch.tensor([0.5, 0.25, 0.25]).log()

    def chosen(decoding, uniform, **kwargs):
        return policy(decoding, **kwargs).choose_return(logits, torch.tensor([uniform], dtype=torch.float64)).item()

    assert policy("greedy").choose_return(logits, None).item() == 0
    assert [chosen("sampled", u) for u in (0.0, 0.49, 0.51, 0.74, 0.76)] == [0, 0, 1, 1, 120]
    # kappa = ln 16: weights 1/2, 1/4 * 16^(1/120), 1/4 * 16 = 0.5, 0.2558, 4; shares 0.1051, 0.0538, 0.8411.
    kappa = torch.tensor(16.0).log().item()
    assert [chosen("expert", u, kappa=kappa) for u in (0.104, 0.106, 0.158, 0.160)] == [0, 1, 1, 120]
    # Of 128 draws none is 100 with probability F^128, F = (0.5^0.75 + 0.25^0.75) / (0.5^0.75 + 2 * 0.25^0.75).
    below = (0.5**0.75 + 0.25**0.75) / (0.5**0.75 + 2 * 0.25**0.75)
    assert [chosen("expert_128", u) for u in (0.99 * below**128, 1.01 * below**128)] == [1, 120]
    assert chosen("expert_128", 1 - 2**-53) == 120  # whose 128th root rounds to 1
    nearly_one = torch.tensor([1 - 2**-24])
    assert policy("expert_128").choose_return(logits, nearly_one).item() == 120


def test_the_largest_of_128_draws_has_their_distribution():
    torch.manual_seed(0)
    logits = torch.randn(NUM_RETURNS) * 3
    uniform = torch.rand(20_000, dtype=torch.float64)
    ours = policy("expert_128").choose_return(logits.expand(20_000, -1), uniform)
    theirs = torch.multinomial((0.75 * logits).softmax(-1).expand(20_000, -1), 128, replacement=True).amax(-1)
    counts = [torch.bincount(x, minlength=NUM_RETURNS) / 20_000 for x in (ours, theirs)]
    assert (counts[0] - counts[1]).abs().max() < 0.02


def test_actions_by_hand():
    """In Freeway NOOP (0), UP (2) and DOWN (5) are known, in Alien all are."""
    logits = torch.full((2, NUM_ACTIONS), -10.0)
    logits[:, [0, 1, 2, 5]] = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    game_id = torch.tensor([0, 1])

    def chosen(decoding, uniform):
        return policy(decoding).choose_action(logits, game_id, torch.full((2,), uniform, dtype=torch.float64)).tolist()

    assert policy("greedy").choose_action(logits, game_id, None).tolist() == [2, 1]
    assert [chosen("expert", u) for u in (0.1, 0.3, 0.7, 0.89)] == [[0, 1], [2, 1], [2, 2], [5, 2]]
    assert chosen("sampled", 0.7) == [2, 2]
    # The median of the 18 logits is that of the actions nobody wants: the four stay.
    assert [chosen("expert_128", u) for u in (0.1, 0.7)] == [[0, 1], [2, 2]]
    logits[:, 5], logits[:, 6:15] = -20.0, torch.linspace(-9, -8, 9)  # above the median: 1, 2, 0 and six of these
    assert chosen("expert_128", 0.9999)[0] == 2
    logits[:, [0, 2]] = -30.0
    assert chosen("expert_128", 0.9)[0] == 0  # no action is left that Freeway knows


def test_the_same_numbers_give_the_same_actions_whatever_is_padded_or_comes_beside():
    play, batch = policy("expert"), acting(windows(6))
    batch["context", "mask"][:, 2:] = False
    expected = play(batch.clone())
    for key in ("observation", "action", "reward"):
        batch["context", key][:, 2:] = 1
    again = play(batch.clone())
    assert torch.equal(again["action"], expected["action"])
    torch.testing.assert_close(again["action_value"], expected["action_value"])
    for row in range(6):
        assert play(batch[row : row + 1].clone())["action"] == expected["action"][row]


@pytest.mark.parametrize("shape", [(2, 3), (6, 1), ()])
def test_any_leading_dimensions_are_played(shape):
    play, batch = policy("expert"), acting(windows(6 if shape else 1))
    expected, found = play(batch.clone()), play(batch.reshape(shape))
    assert torch.equal(found["action"], expected["action"].reshape(shape))
    torch.testing.assert_close(found["action_value"], expected["action_value"].reshape(*shape, 18))


def test_decodings_that_need_what_is_not_there():
    cloning = tiny(return_token=False).eval()
    for decoding in ("expert", "expert_128"):
        with pytest.raises(ValueError, match="sampled, greedy without return tokens"):
            DecisionTransformerPolicy(cloning, ["Pong"], decoding=decoding)
    with pytest.raises(ValueError, match="expert, expert_128, sampled, greedy with return tokens, got 'best'"):
        policy("best")
    for kappa in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match=rf"kappa must be in \[0, inf\), got {kappa}"):
            DecisionTransformerPolicy(tiny().eval(), ["Pong"], kappa=kappa)
    play = DecisionTransformerPolicy(cloning, ["Pong"], decoding="sampled")
    assert "return_uniform" not in play.in_keys
    assert play(acting(windows(5)).exclude("return_uniform"))["action"].shape == (5,)
    for key in ("uniform", "return_uniform"):
        with pytest.raises(KeyError, match=key):
            policy("expert")(acting(windows(5)).exclude(key))
    torch.nn.init.constant_(cloning.module.action_head.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="must be finite"):
        play(acting(windows(5)))


# Importing TorchRL's collectors warns about TorchRL's own classes; it has to happen where that is ignored.
@pytest.mark.filterwarnings("ignore:Creating .* inherits from WeightUpdaterBase:DeprecationWarning")
def test_plays_in_a_collector():
    from torchrl.collectors import Collector

    env = TransformedEnv(AtariEnv("Pong", 2), PolicyInputs(4))
    play = DecisionTransformerPolicy(tiny().eval(), ["Pong"])
    collector = Collector(env, play, frames_per_batch=20, total_frames=20, auto_register_policy_transforms=False)
    (data,) = list(collector)
    collector.shutdown()
    assert data["action"].shape == (2, 10) and data["context", "observation"].shape == (2, 10, 4, 84, 84)


def test_learns_a_toy_game():
    """One of two frames and one of two returns decide the action: four rules, learnt to the letter."""
    torch.manual_seed(0)
    network = tiny(num_layers=1, num_steps=2)
    loss = DecisionTransformerLoss(network)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    batch = windows(16, num_steps=2)
    bright, high = torch.randint(2, (16,)), torch.randint(2, (16,))
    batch["observation"][:] = (255 * bright).reshape(16, 1, 1, 1)
    batch["return_to_go"][:] = (120.0 * high - 20).unsqueeze(-1)
    batch["action"][:] = torch.tensor([[2, 5], [0, 2]])[bright, high].unsqueeze(-1)
    batch["next", "reward"][:] = 0
    for _ in range(80):
        losses = loss(batch.clone())
        sum(losses[key] for key in ("loss_action", "loss_reward", "loss_return")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["accuracy"] == 1 and losses["loss_action"] < 0.05
    play = DecisionTransformerPolicy(network.eval(), ["Freeway"], decoding="expert")
    states = acting(batch)
    states["context", "mask"][:, 1:] = False  # later actions could be copied from the first
    states["uniform"][:] = states["return_uniform"][:] = 0.5
    action = play(states)["action"]
    assert action.tolist() == torch.tensor([5, 2])[bright].tolist()  # it asks for the high return
