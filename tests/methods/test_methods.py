"""What every method must do for the rest of the package."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_sql.config import ConfigError, MethodConfig, compose_run_config, list_choices
from torchrl_sql.methods import METHODS, make_method

GAMES = ("Breakout", "Freeway")


MODELS = {"mgdt": "mgdt_small", "bc_transformer": "mgdt_small"}
"""Of methods that cannot use their scale's."""


def make(choice):
    model = [f"model={MODELS[choice]}"] if choice in MODELS else []
    words = ["scale=cpu", f"method={choice}", "data.store=x", f"data.games=[{','.join(GAMES)}]", "data.n_steps=4"]
    config = compose_run_config(words + model)
    method = make_method(config.method)
    return method, method.network(config.model, config.games)


def batch(choice):
    return windows() if choice in MODELS else transitions()


def windows():
    following = {"reward": torch.ones(6, 4, 1), "terminated": torch.zeros(6, 4, 1, dtype=torch.bool)}
    return TensorDict(
        observation=torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        action=torch.arange(24).reshape(6, 4) % 18,
        return_to_go=torch.arange(24.0).reshape(6, 4),
        mask=torch.ones(6, 4, dtype=torch.bool),
        game_id=torch.arange(6) % 2,
        next=TensorDict(following, [6]),
        batch_size=[6],
    )


def transitions():
    generator = torch.Generator().manual_seed(0)

    def state():
        return {
            "observation": torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8, generator=generator),
            "game_id": torch.arange(6) % 2,
        }

    following = {**state(), "reward": torch.ones(6, 1), "terminated": torch.zeros(6, 1, dtype=torch.bool)}
    return TensorDict(
        **state(),
        action=torch.arange(6),
        next=TensorDict(following, [6]),
        steps_to_next_obs=torch.ones(6, 1, dtype=torch.int64),
        batch_size=[6],
    )


def test_each_method_has_a_choice_and_each_choice_a_method():
    assert {make(choice)[0].settings.name for choice in list_choices("method")} == set(METHODS)


@pytest.mark.parametrize("choice", list_choices("method"))
def test_the_loss_trains_the_network_and_reports_the_metrics_that_pages_draw(choice):
    method, network = make(choice)
    loss = method.loss(network)
    result = loss(batch(choice))
    assert method.metrics and set(method.metrics) <= set(result.keys())
    sum(value for key, value in result.items() if key.startswith("loss_")).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_curve_of_a_squared_error_says_what_is_drawn():
    method, network = make("cql_mse")
    result = method.loss(network)(transitions()[:1])
    assert method.metrics["loss_qvalue"] == "TD loss (squared error)"
    torch.testing.assert_close(result["loss_qvalue"], (result["q_data"] - result["q_target"]).square())


@pytest.mark.parametrize("choice", list_choices("method"))
def test_the_losss_state_holds_the_networks_weights(choice):
    (method, network), (_, other) = make(choice), make(choice)
    method.loss(other).load_state_dict(method.loss(network).state_dict())
    ours, theirs = network.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt:FutureWarning")
@pytest.mark.parametrize("choice", ["mae", "cpc"])
def test_losses_that_prepare_an_encoder_are_one_graph_and_finite_in_lower_precision(choice):
    method, network = make(choice)
    loss = method.loss(network)
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)):
        torch.manual_seed(0)
        results.append(call(batch(choice)))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        rounded = loss(batch(choice))
    for key, value in rounded.items():
        assert value.dtype == torch.float32
        if key.startswith("loss_"):
            torch.testing.assert_close(value, results[0][key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("choice", ["cql_c51", "cql_hl_gauss", "cql_mse"])
def test_q_learnings_target_network_follows_when_it_is_told_to(choice):
    method, network = make(choice)
    loss = method.loss(network)
    updater = method.target_updater(loss)
    before = loss.target_value_network_params.clone()
    for parameter in loss.parameters():
        parameter.data.add_(1.0)
    assert (loss.target_value_network_params == before).all()
    updater.step()
    trained = [key for key, value in loss.value_network_params.items(True, True) if isinstance(value, nn.Parameter)]
    assert trained and all(
        torch.equal(loss.target_value_network_params[key], loss.value_network_params[key]) for key in trained
    )


@pytest.mark.parametrize(
    ("choice", "decoding"),
    [(choice, each) for choice in list_choices("method") for each in make(choice)[0].settings.decodings],
)
def test_the_policy_knows_the_games_actions(choice, decoding):
    method, network = make(choice)
    states = batch(choice).select("observation", "game_id")
    states["uniform"], states["return_uniform"] = torch.rand(2, 6, dtype=torch.float64)
    if choice in MODELS:
        data = windows()
        states["context"] = data.select("action", "mask", "observation").set("reward", data["next", "reward"])
    actions = method.policy(network.eval(), GAMES, decoding=decoding)(states)["action"]
    legal = {0: {0, 1, 3, 4}, 1: {0, 2, 5}}
    assert all(action in legal[game] for action, game in zip(actions.tolist(), states["game_id"].tolist(), strict=True))


def test_an_unknown_method_is_named():
    with pytest.raises(
        ConfigError, match=r"method\.name must be one of cql, bc, mgdt, bc_transformer, mae, cpc, got 'x'"
    ):
        make_method(MethodConfig(name="x"))


@pytest.mark.parametrize(("choice", "counts"), [("dqn_c51", False), ("cql_c51", True)])
def test_actions_that_nobody_plays_count_only_where_a_penalty_corrects_them(choice, counts):
    """Breakout has NOOP, FIRE, RIGHT and LEFT, Freeway NOOP, UP and DOWN."""
    method, network = make(choice)
    data = transitions()
    data["action"] = torch.tensor([0, 2, 1, 5, 3, 0])

    def objective():
        loss = method.loss(network)
        method.target_updater(loss).step()  # the target network is a copy
        return loss(data)["loss_qvalue"]

    before = objective()
    with torch.no_grad():
        heads = next(module for name, module in network.named_modules() if name.endswith("heads"))
        bias = heads.bias.view(2, -1, 18)  # the last atoms of UPFIRE: the greatest return
        bias[:, -5:, 10] += 20
    assert (objective() != before) == counts
