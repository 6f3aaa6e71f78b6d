import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType
from torchrl.modules import DistributionalQValueActor, EGreedyModule, QValueActor

from torchrl_sql.games import GAMES
from torchrl_sql.modules import ENCODERS, POOLINGS, MultiGameQNetwork, make_q_actor

# tensordict 0.14 reads a setting that torch 2.13 has retired.
IGNORE_COMPILE_WARNING = pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning")
GAME_NAMES = ["Breakout", "Freeway", "Pong"]


def states(*batch_shape: int, num_games: int = 3) -> TensorDict:
    observation = torch.randint(256, (*batch_shape, 4, 84, 84), dtype=torch.uint8)
    return TensorDict({"observation": observation, "game_id": torch.randint(num_games, batch_shape)}, batch_shape)


def tiny_network(num_games: int = 3, **kwargs) -> MultiGameQNetwork:
    """One convolution on one 4x4 frame."""
    return MultiGameQNetwork(nn.Conv2d(1, 2, 3), num_games, input_shape=(1, 4, 4), num_actions=3, num_atoms=5, **kwargs)


@pytest.mark.parametrize(("encoder", "millions"), [("resnet34", 31), ("resnet50", 60), ("resnet101", 79)])
def test_sizes_are_the_published_ones(encoder, millions):
    actor = make_q_actor(40, encoder=encoder)
    num_parameters = sum(parameter.numel() for parameter in actor.parameters())
    assert num_parameters == pytest.approx(millions * 1e6, rel=0.05)


def test_forward_by_hand():
    network = tiny_network(num_games=2, pooling="average", logit_scale=10.0)
    network.encoder.weight.data.zero_()
    network.encoder.bias.data.copy_(torch.tensor([3.0, 4]))
    network.heads.weight.data.zero_()
    network.heads.weight.data[1, 0] = torch.tensor([1.0, 2])  # game 1, atom 0, action 0
    network.heads.bias.data[1, 4] = 7  # game 1, atom 1, action 1
    value, norm, features = network(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
    assert value.shape == (2, 5, 3)
    torch.testing.assert_close(norm, torch.full((2, 1), 5.0))
    torch.testing.assert_close(features, torch.tensor([[3.0, 4], [3, 4]]))
    expected = torch.zeros(2, 5, 3)
    expected[1, 0, 0] = 10 * (3 / 5 + 2 * 4 / 5)
    expected[1, 1, 1] = 7
    torch.testing.assert_close(value, expected)


def test_uint8_is_scaled_and_the_games_mean_image_subtracted():
    mean = torch.rand(3, 4, 4)
    network = tiny_network(input_mean=mean)
    frames = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8)
    game_id = torch.tensor([0, 1, 2, 2, 1, 0])
    seen = []
    handle = network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(frames, game_id)
    network(frames / 255, game_id)
    handle.remove()
    expected = torch.stack([frames[i].float() / 255 - mean[game] for i, game in enumerate(game_id)])
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize("encoder", ["resnet_small", "resnet18", "nature", "impala"])
@pytest.mark.parametrize("pooling", ["spatial_embedding", "average"])
def test_actor_contract(encoder, pooling):
    actor = make_q_actor(3, encoder=encoder, pooling=pooling)
    assert isinstance(actor, DistributionalQValueActor)
    assert set(actor.in_keys) == {"observation", "game_id"}
    out = actor(states(2))
    assert out["action_value"].shape == (2, 51, 18)
    assert out["action_value"].dtype == torch.float32
    torch.testing.assert_close(out["action_value"].exp().sum(-2), torch.ones(2, 18))
    assert out["feature_norm"].shape == (2, 1) and not out["feature_norm"].requires_grad
    q = (out["action_value"].exp() * torch.linspace(-10, 10, 51).unsqueeze(-1)).sum(-2)
    assert torch.equal(out["action"], q.argmax(-1))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_scalar_heads_and_leading_dimensions(batch_shape, mask):
    actor = make_q_actor(GAME_NAMES, encoder="resnet_small", num_atoms=None, mask_illegal_actions=mask)
    assert isinstance(actor, QValueActor) and not isinstance(actor, DistributionalQValueActor)
    assert actor(states(*batch_shape))["action_value"].shape == (*batch_shape, 18)
    distributional = make_q_actor(GAME_NAMES, encoder="resnet_small", mask_illegal_actions=mask)
    batch = states(*batch_shape)
    out = distributional(batch.clone())
    assert out["action_value"].shape == (*batch_shape, 51, 18)
    assert out["action"].shape == batch_shape
    flat = distributional(batch.reshape(-1))
    torch.testing.assert_close(out["action_value"].reshape(-1, 51, 18), flat["action_value"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ["resnet_small", "nature"])
def test_a_batch_of_nothing(encoder):
    out = make_q_actor(GAME_NAMES, encoder=encoder, mask_illegal_actions=True)(states(0))
    assert out["action_value"].shape == (0, 51, 18) and out["action"].shape == (0,)


def test_flatten_pooling_is_dqns_network():
    actor = make_q_actor(1, encoder="nature", pooling="flatten", num_atoms=None, feature_norm=False)
    # Mnih et al. 2015 with 18 actions.
    convolutions = 32 * (4 * 64 + 1) + 64 * (32 * 16 + 1) + 64 * (64 * 9 + 1)
    assert sum(p.numel() for p in actor.parameters()) == convolutions + 512 * (3136 + 1) + 18 * (512 + 1)


def test_feature_norm_makes_outputs_invariant_to_the_features_scale():
    x, game_id = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    for feature_norm in (True, False):
        network = tiny_network(feature_norm=feature_norm)
        value, norm, _ = network(x, game_id)
        network.encoder.weight.data *= 10
        network.encoder.bias.data *= 10
        scaled_value, scaled_norm, _ = network(x, game_id)
        torch.testing.assert_close(scaled_norm, 10 * norm)
        assert torch.allclose(scaled_value, value, atol=1e-5) == feature_norm


def test_logit_scale_is_learned():
    network = tiny_network(logit_scale=30.0)
    assert network.log_scale.exp().item() == pytest.approx(30)
    network(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))[0].square().sum().backward()
    assert network.log_scale.grad.abs() > 0
    assert tiny_network(feature_norm=False).log_scale is None


@pytest.mark.parametrize(("kwargs", "scale"), [({"logit_scale": None}, 1.0), ({"logit_scale": 5.0}, 5.0)])
def test_a_scale_can_be_left_out_or_fixed(kwargs, scale):
    """``None`` is the plain ``phi / ||phi||``, the paper's; no parameter is left to train."""
    network = tiny_network(learn_logit_scale=False, **kwargs)
    assert "log_scale" not in dict(network.named_parameters())
    value, norm, features = network(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    expected = network.heads(scale * features / norm, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(value.flatten(1), expected)
    assert tiny_network(logit_scale=None).log_scale is None


@pytest.mark.parametrize(("feature_dim", "width"), [(None, 512), (7, 7), (0, 64 * 8)])
def test_width_of_the_hidden_layer(feature_dim, width):
    actor = make_q_actor(2, encoder="nature", feature_dim=feature_dim, num_atoms=3)
    assert actor.module[0].module.heads.weight.shape[-1] == width
    assert isinstance(actor.module[0].module.hidden, nn.Identity) == (feature_dim == 0)


def test_zero_features_are_finite():
    network = tiny_network()
    network.encoder.weight.data.zero_()
    network.encoder.bias.data.zero_()
    value, *_ = network(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    value.sum().backward()
    assert value.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


def test_value_prior_starts_as_the_normal_it_names():
    actor = make_q_actor(2, encoder="resnet_small", value_prior_std=2.0)
    actor.module[0].module.heads.weight.data.zero_()
    probs = actor(states(3, num_games=2))["action_value"].exp()
    support = torch.linspace(-10, 10, 51).unsqueeze(-1)
    mean = (probs * support).sum(-2)
    std = (probs * support**2).sum(-2).sqrt()
    torch.testing.assert_close(mean, torch.zeros(3, 18), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.full((3, 18), 2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_atoms", [51, None])
def test_illegal_actions_are_masked_for_acting_only(num_atoms):
    legal = set(GAMES["Freeway"].minimal_actions)
    actor = make_q_actor(GAME_NAMES, encoder="resnet_small", num_atoms=num_atoms, mask_illegal_actions=True)
    free = make_q_actor(GAME_NAMES, encoder="resnet_small", num_atoms=num_atoms)
    free.load_state_dict(actor.state_dict(), strict=False)
    batch = states(8)
    batch["game_id"][:] = 1
    # Negative values everywhere, the greatest for an illegal action: a mask that meant "value 0" would be chosen.
    illegal = next(action for action in range(18) if action not in legal)
    for network in (actor, free):
        bias = network.module[0].module.heads.bias.data.view(3, -1, 18)
        bias.zero_()
        bias[:, 0] = 50
        bias[:, 0, illegal] = 60 if num_atoms is None else -60
    out, unmasked = actor(batch.clone()), free(batch.clone())
    assert (unmasked["action"] == illegal).all()
    assert set(out["action"].tolist()) <= legal
    assert out["action_mask"].sum(-1).tolist() == [len(legal)] * 8
    torch.testing.assert_close(out["action_value"], unmasked["action_value"])


def test_exploration_is_masked_too():
    actor = make_q_actor(GAME_NAMES, encoder="resnet_small", mask_illegal_actions=True)
    explore = EGreedyModule(Categorical(18), eps_init=1.0, eps_end=1.0, action_mask_key="action_mask")
    batch = states(200)
    with set_exploration_type(ExplorationType.RANDOM):
        out = explore(actor(batch))
    for row in out:
        assert row["action"].item() in GAMES[GAME_NAMES[row["game_id"]]].minimal_actions
    assert len(out["action"].unique()) > 3


def test_channels_last_computes_the_same():
    torch.manual_seed(0)
    plain = make_q_actor(2, encoder="resnet18")
    torch.manual_seed(0)
    actor = make_q_actor(2, encoder="resnet18", memory_format=torch.channels_last)
    encoder = actor.module[0].module.encoder
    assert encoder(torch.rand(2, 4, 84, 84)).is_contiguous(memory_format=torch.channels_last)
    batch = states(2, num_games=2)
    torch.testing.assert_close(
        actor(batch.clone())["action_value"], plain(batch.clone())["action_value"], rtol=1e-3, atol=1e-3
    )


def test_bf16_autocast_gives_float32_log_probabilities():
    actor = make_q_actor(2, encoder="resnet_small")
    batch = states(4, num_games=2)
    exact = actor(batch.clone())["action_value"]
    with torch.autocast("cpu", torch.bfloat16):
        out = actor(batch.clone())
    assert out["action_value"].dtype == out["feature_norm"].dtype == torch.float32
    torch.testing.assert_close(out["action_value"].exp().sum(-2), torch.ones(4, 18))
    torch.testing.assert_close(out["action_value"].exp(), exact.exp(), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder": "resnet35"}, "encoder must be one of .*resnet34.*got 'resnet35'"),
        ({"encoder": nn.Unflatten(-1, (84, 1))}, r"encoder must give .*got \(1, 4, 84, 84, 1\)"),
        ({"pooling": "max"}, "pooling must be one of .*got 'max'"),
        ({"num_atoms": 1}, "num_atoms must be at least 2, got 1"),
        ({"num_atoms": 5.0}, "num_atoms must be an integer, got 5.0"),
        ({"num_actions": 0}, "num_actions must be at least 1, got 0"),
        ({"num_embeddings": 0}, "num_embeddings must be at least 1, got 0"),
        ({"num_groups": True}, "num_groups must be an integer, got True"),
        ({"v_min": 1.0, "v_max": 1.0}, r"v_max must be in \(1, inf\), got 1.0"),
        ({"v_min": -math.inf}, "v_min must be in .*got -inf"),
        ({"v_max": math.nan}, "v_max must be in .*got nan"),
        ({"feature_norm": 1}, "feature_norm must be one of True, False, got 1"),
        ({"mask_illegal_actions": "yes"}, "mask_illegal_actions must be one of True, False, got 'yes'"),
        ({"logit_scale": 0.0}, r"logit_scale must be in \(0, inf\), got 0.0"),
        ({"logit_scale": math.nan}, "logit_scale must be in .*got nan"),
        ({"per_game_heads": None}, "per_game_heads must be one of True, False, got None"),
        ({"learn_logit_scale": 0}, "learn_logit_scale must be one of True, False, got 0"),
        ({"feature_dim": -1}, "feature_dim must be at least 0, got -1"),
        ({"last_norm_scale": -1.0}, r"last_norm_scale must be in \[0, inf\), got -1.0"),
        ({"logit_scale": "30"}, "logit_scale must be a number, got '30'"),
        ({"value_prior_std": 1e-30}, r"value_prior_std must be in \[0.04, inf\), got 1e-30"),
        ({"value_prior_std": math.nan}, "value_prior_std must be in .*got nan"),
        ({"value_prior_std": 1.0, "num_atoms": None}, "value_prior_std needs atoms"),
        ({"mask_illegal_actions": True}, "games given by name"),
        ({"input_mean": torch.zeros(3, 84, 84, dtype=torch.uint8)}, r"input_mean must be floats in \[0, 1\], got"),
        ({"input_mean": torch.zeros(2, 84, 84)}, r"input_mean must have shape \(3, 84, 84\)"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_q_actor(3, **{"encoder": "resnet_small", **kwargs})


def test_refuses_wrong_shapes():
    network = tiny_network()
    with pytest.raises(ValueError, match=r"game_id \[\*B\].*\(2, 1, 4, 4\) and None"):
        network(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"observation must be \[\*B, 1, 4, 4\].*got \(2, 1, 4, 5\)"):
        network(torch.zeros(2, 1, 4, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"game_id \[\*B\].*\(2, 1\)"):
        network(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_refuses_frames_whose_scale_is_not_known(dtype):
    with pytest.raises(TypeError, match=rf"frames must be uint8 in 0..255 or floats in \[0, 1\], got {dtype}"):
        tiny_network()(torch.zeros(2, 1, 4, 4, dtype=dtype), torch.zeros(2, dtype=torch.long))


def test_one_head_serves_all_games():
    actor = make_q_actor(GAME_NAMES, encoder="resnet_small", per_game_heads=False, mask_illegal_actions=True)
    batch = states(3, num_games=len(GAME_NAMES))
    batch["observation"] = batch["observation"][:1].expand(3, 4, 84, 84).clone()
    batch["game_id"] = torch.tensor([0, 1, 2])
    out = actor(batch)
    assert actor.module[0].module.heads.weight.shape[0] == 1
    torch.testing.assert_close(out["action_value"][1:], out["action_value"][:1].expand(2, -1, -1))
    assert not torch.equal(out["action_mask"][0], out["action_mask"][1])  # what is legal still depends on the game


def test_games_by_name():
    assert make_q_actor("Pong,Breakout", encoder="resnet_small").module[0].module.heads.weight.shape[0] == 2
    with pytest.raises(ValueError, match="Brakeout"):
        make_q_actor(["Brakeout"], encoder="resnet_small")


@pytest.mark.parametrize(
    "kwargs", [{}, {"logit_scale": None}, {"logit_scale": 3.0, "learn_logit_scale": False}], ids=str
)
@pytest.mark.parametrize("encoder", ["resnet_small", "nature", "impala", "resnet50"])
def test_logits_start_with_the_same_spread_for_every_width_and_scale(encoder, kwargs):
    actor = make_q_actor(2, encoder=encoder, **kwargs)
    with torch.no_grad():
        logits, *_ = actor.module[0].module(**states(8, num_games=2))
    assert logits.std().item() == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("kwargs", [{}, {"value_prior_std": 1.0}, {"num_atoms": None}, {"logit_scale": None}], ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_fresh_networks_values_hardly_differ_between_actions(encoder, kwargs):
    """Standard deviation over actions of the mean over states; the returns to be learned differ by 0.3 to 0.6."""
    if encoder in ("resnet34", "resnet101", "resnet34_11x11", "resnet50_11x11") and kwargs:
        pytest.skip("slow, and no other heads than those of resnet18 and resnet50")
    actor = make_q_actor(1, encoder=encoder, **kwargs).eval()
    frames = states(8)["observation"]
    with torch.no_grad():
        value = actor(TensorDict({"observation": frames * (frames > 200)}, [8]))["action_value"]
    q = value if value.ndim == 2 else (value.exp() * torch.linspace(-10, 10, 51).unsqueeze(-1)).sum(-2)
    assert q.mean(0).std() < 0.1


class Tokens(nn.Module):
    """``[B, T, C]``, as a vision transformer gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 8, 12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)


OTHER_ENCODERS = {
    "vector": nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "tokens": Tokens(),
    "norm_after_pooling": nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)),
    "batch_norm": nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.BatchNorm2d(8), nn.ReLU()),
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_any_encoder_fits_and_is_left_as_it_was(name, pooling):
    encoder = OTHER_ENCODERS[name]
    encoder[0].eval() if name == "batch_norm" else encoder.train()
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    actor = make_q_actor(2, encoder=encoder, pooling=pooling, num_embeddings=2)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert [module.training for module in encoder.modules()] == modes
    places = {"vector": 1, "tokens": 49, "norm_after_pooling": 1, "batch_norm": 400}[name]
    width = 8 * {"spatial_embedding": 2, "average": 1, "flatten": places}[pooling]
    out = actor(states(3, num_games=2))
    assert out["features"].shape == (3, width) and out["action_value"].shape == (3, 51, 18)


def test_tokens_are_places_of_a_map():
    """The same numbers as tokens and as a map: the same features."""
    as_map = nn.Sequential(OTHER_ENCODERS["tokens"].patches, nn.Flatten(2), nn.Unflatten(2, (49, 1)))
    networks = []
    for encoder in (OTHER_ENCODERS["tokens"], as_map):
        torch.manual_seed(0)
        networks.append(MultiGameQNetwork(encoder, 1, num_embeddings=3))
    x = states(2, num_games=1)["observation"]
    torch.testing.assert_close(networks[0](x)[2], networks[1](x)[2])


def test_one_game_needs_no_game_id():
    actor = make_q_actor(["Pong"], encoder="resnet_small")
    batch = states(3, num_games=1)
    expected = actor.module[0].module(batch["observation"], batch["game_id"])
    assert actor.in_keys == ["observation"]
    torch.testing.assert_close(actor(batch.exclude("game_id"))["features"], expected[2])
    assert make_q_actor(2, encoder="resnet_small").in_keys == ["observation", "game_id"]


@IGNORE_COMPILE_WARNING
@pytest.mark.parametrize("kwargs", [{}, {"mask_illegal_actions": True}, {"num_atoms": None}], ids=str)
def test_the_actor_compiles_and_exports_as_one_graph(kwargs):
    actor = make_q_actor(GAME_NAMES, encoder="resnet_small", **kwargs).eval()
    batch = states(4)
    expected = actor(batch.clone())
    assert expected["action"].dtype == torch.int64
    compiled = torch.compile(actor, fullgraph=True, backend="aot_eager")(batch.clone())

    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = actor

        def forward(self, observation, game_id):
            return self.actor(TensorDict({"observation": observation, "game_id": game_id}, observation.shape[:1]))[
                "action"
            ]

    exported = torch.export.export(Act(), (batch["observation"], batch["game_id"])).module()
    assert torch.equal(compiled["action"], expected["action"])
    assert torch.equal(exported(batch["observation"], batch["game_id"]), expected["action"])


@pytest.mark.parametrize("encoder", ["resnet_small", "resnet50", "nature", "impala"])
def test_reset_parameters_gives_the_initialization_of_a_fresh_actor(encoder):
    kwargs = {"encoder": encoder, "value_prior_std": 2.0}
    actor, fresh = make_q_actor(2, **kwargs), make_q_actor(2, **kwargs)
    for parameter in actor.parameters():
        parameter.data.fill_(7)
    actor.reset_parameters_recursive()
    for (name, got), expected in zip(actor.named_parameters(), fresh.parameters(), strict=True):
        assert not (got == 7).all(), name
        if expected.std(correction=0) == 0 or "heads.bias" in name:  # constants: the same
            torch.testing.assert_close(got, expected, msg=name)
        elif got.numel() > 500:
            assert got.std(correction=0).item() == pytest.approx(expected.std(correction=0).item(), rel=0.35), name
