"""Bounds of single settings and rules between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.config import ConfigError, check_ranks, compose_run_config, list_choices, run_config_from_yaml
from torchrl_sql.config.schema import at_least, check_bounds, positive, probability, setting
from torchrl_sql.games import TRAIN_40

RUN = ["scale=cpu", "data.store=store", "data.games=[Freeway,Assault]"]


@dataclass
class Inner:
    share: float = setting(probability)


@dataclass
class Outer:
    count: int | None = setting(at_least(2))
    size: float = setting(positive)
    inner: Inner = None


@given(st.none() | st.integers(-5, 5), st.floats(), st.floats())
def test_the_walker_refuses_what_is_out_of_bounds_or_not_finite_and_nothing_else(count, size, share):
    settings = Outer(count, size, Inner(share))
    if (count is None or count >= 2) and 0 < size < math.inf and 0 <= share <= 1:
        check_bounds(settings)
    else:
        with pytest.raises(ConfigError, match=r"^a\.(count|size|inner\.share) must be .*, got "):
            check_bounds(settings, "a.")


def test_the_message_names_key_bound_and_value():
    with pytest.raises(ConfigError, match=r"^a\.count must be at least 2, or null, got 1$"):
        check_bounds(Outer(1, 1.0, Inner(0.0)), "a.")
    with pytest.raises(ConfigError, match=r"^inner\.share must be in \[0, 1\], got 1\.5$"):
        check_bounds(Outer(None, 1.0, Inner(1.5)))


def sections(config):
    return [("", config)] + [
        (f"{each.name}.", section) for each in fields(config) if is_dataclass(section := getattr(config, each.name))
    ]


@pytest.mark.parametrize(
    "key",
    [
        f"{prefix}{each.name}"
        for prefix, section in sections(compose_run_config(RUN))
        for each in fields(section)
        if str(each.type).startswith("float")
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_setting_takes_a_number_that_is_not_finite(key, value):
    with pytest.raises(ConfigError, match=key):
        compose_run_config([*RUN, f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.games=[Breakuot]", "data.games: .*got 'Breakuot'; did you mean Breakout"),
        ("method=cql_mse method.num_atoms=51", "method.num_atoms must be null .*target=mse, got 51"),
        ("method.num_atoms=null", "method.num_atoms must be at least 2 .*c51, got None"),
        ("method=cql_mse method.value_prior_std=1", "method.value_prior_std must be null with scalar heads, got 1.0"),
        ("method.v_min=10", "method.v_min must be less than method.v_max=10.0, got 10.0"),
        ("method.name=bc", "method.name comes with the choice method=NAME, got 'bc'"),
        ("trainer.num_gradient_steps=100", "warmup_gradient_steps must be less than .*=100"),
        (
            "trainer.milestone_interval_gradient_steps=1500",
            "milestone_interval_gradient_steps must be null or a multiple of .*=1000, got 1500",
        ),
        ("trainer.microbatch_size=5", "trainer.microbatch_size must be null or a divisor"),
        ("optim.name=sgd", "optim.name must be one of adam, adamw, lamb, got 'sgd'"),
        ("trainer.loggers=[tensorboard]", "trainer.loggers must be a list of csv"),
        ("trainer.device=tpu", "trainer.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("data.mixture=all", "data.mixture must be games, transitions or .*, got 'all'"),
        ("data.mixture=[1]", r"data.mixture must be .* a list of 2 weights.*, got \(1,\)"),
        ("data.mixture=[1,-1]", r"data.mixture must be .* weights >= 0.*, got \(1, -1\)"),
        ("data.first_fraction=0", r"data.first_fraction must be in \(0, 1\], got 0.0"),
        ("data.transitions_per_game=0", "data.transitions_per_game must be at least 1, or null, got 0"),
    ],
)
def test_bad_values_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_run_config([*RUN, *override.split()])


@pytest.mark.parametrize("encoder", ["resnet34", "resnet50", "resnet101"])
def test_the_papers_scale_holds_the_papers_values(encoder):
    config = compose_run_config(["scale=paper", f"model.encoder={encoder}", "data.store=store"])
    assert config.games == TRAIN_40
    assert config.model.feature_norm and config.model.pooling == "spatial_embedding" and not config.model.center_input
    assert (config.data.batch_size, config.data.n_steps) == (512, 1)
    assert (config.optim.learning_rate, config.optim.eps) == (2e-4, 3.125e-4)
    assert config.trainer.target_update_interval_gradient_steps == 2000
    assert config.trainer.num_gradient_steps == 6_250_000
    assert (config.method.gamma, config.method.cql_alpha, config.method.target) == (0.99, 0.1, "c51")
    assert (config.method.num_atoms, config.method.v_min, config.method.v_max) == (51, -10.0, 10.0)
    assert (config.evaluation.epsilon, config.evaluation.sticky_action_probability) == (0.001, 0.0)


@pytest.mark.parametrize("scale", list_choices("scale"))
@pytest.mark.parametrize("method", list_choices("method"))
def test_every_scale_model_and_method_compose_and_round_trip_through_yaml(scale, method):
    fitting = 0
    for model in list_choices("model"):
        words = [f"scale={scale}", f"model={model}", f"method={method}", "data.store=store", "data.n_steps=4"]
        if model.startswith("mgdt") != (method in ("mgdt", "bc_transformer")):
            with pytest.raises(ConfigError, match=r"model must be one of .* with method\.name="):
                compose_run_config(words)
            continue
        config = compose_run_config(words)
        assert run_config_from_yaml(config.to_yaml(), source="here") == config
        assert model in type(config.model).choices.split(", ")
        fitting += 1
    assert fitting == len(type(config.model).choices.split(", "))


@pytest.mark.parametrize("scale", list_choices("scale"))
def test_only_the_scale_of_a_method_chooses_it_and_all_yield_to_the_command_line(scale):
    words, model = [f"scale={scale}", "data.store=store"], ["method=cql_c51", "model=q_network"]
    plain, chosen = compose_run_config(words), compose_run_config([*words, *model, "data.batch_size=7"])
    assert plain.method.name == ("mgdt" if scale == "paper_mgdt" else "cql")
    assert chosen == compose_run_config([*words, "data.batch_size=7", *model])
    paper = compose_run_config(["scale=paper", "data.store=store"])
    assert (chosen.method, chosen.model, chosen.data.batch_size) == (paper.method, paper.model, 7)


def test_the_scale_of_mgdt_is_its_authors_largest():
    config = compose_run_config(["scale=paper_mgdt", "data.store=store"])
    assert (config.model, config.optim.name) == (
        compose_run_config(["scale=paper", "method=mgdt", "model=mgdt_200m", "data.store=store"]).model, "lamb"
    )  # fmt: skip


def test_who_learns_online_does_so_in_one_process():
    config = compose_run_config(["scale=cpu", "online=cpu", "data.games=Pong"])
    check_ranks(config, 1)
    with pytest.raises(ConfigError, match=r"must be of one process, .*, got 8"):
        check_ranks(config, 8)
