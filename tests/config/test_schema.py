from __future__ import annotations

import pytest

from torchrl_sql.config import (
    ConfigError,
    compose_run_config,
    run_config_from_yaml,
)
from torchrl_sql.config.schema import list_experiments, override_run_config
from torchrl_sql.games import TRAIN_40
from torchrl_sql.modules import make_q_actor


def test_the_experiments_are_the_published_ones_and_the_quickstart():
    assert list_experiments() == ["quickstart", "scaled_ql_resnet101", "scaled_ql_resnet34", "scaled_ql_resnet50"]


@pytest.mark.parametrize("size", [34, 50, 101])
def test_paper_presets_hold_the_papers_values(size):
    config = compose_run_config([f"experiment=scaled_ql_resnet{size}", "data.store=store"])
    assert config.games == TRAIN_40
    assert config.model.encoder == f"resnet{size}"
    assert config.model.feature_norm and config.model.pooling == "spatial_embedding" and not config.model.center_input
    assert (config.data.batch_size, config.data.n_steps) == (512, 1)
    assert (config.optim.learning_rate, config.optim.eps) == (2e-4, 3.125e-4)
    assert config.trainer.target_update_interval_gradient_steps == 2000
    assert config.trainer.num_gradient_steps == 6_250_000
    assert (config.objective.gamma, config.objective.cql_alpha, config.objective.target) == (0.99, 0.1, "c51")
    assert (config.model.num_atoms, config.model.v_min, config.model.v_max) == (51, -10.0, 10.0)
    assert (config.evaluation.epsilon, config.evaluation.sticky_action_probability) == (0.001, 0.0)


@pytest.mark.parametrize("experiment", list_experiments())
def test_every_experiment_round_trips_through_yaml(experiment):
    config = compose_run_config([f"experiment={experiment}", "data.store=store"])
    assert run_config_from_yaml(config.to_yaml(), source="here") == config


@pytest.mark.parametrize("objective", ["cql_c51", "cql_hl_gauss", "cql_mse", "bc"])
def test_every_objective_composes(objective):
    atoms = ["model.num_atoms=null", "model.value_prior_std=null"] if objective in ("cql_mse", "bc") else []
    config = compose_run_config(["experiment=quickstart", f"objective={objective}", *atoms])
    make_q_actor(config.games, encoder="resnet_small", num_atoms=config.model.num_atoms)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=quickstart", "objective.alhpa=1"], "Key 'alhpa' not in 'ObjectiveConfig'"),
        (["experiment=quickstart", "trainer.num_steps=1"], "Key 'num_steps' not in 'TrainerConfig'"),
        (["experiment=quickstrat"], "Could not find 'experiment/quickstrat'"),
        ([], "You must specify 'experiment'"),
        (["experiment=scaled_ql_resnet50"], r"data.store must be given, e.g. data.store=\.\.\."),
        (["experiment=quickstart", "data.batch_size=many"], "'many' of type 'str' could not be converted to Integer"),
        (["experiment=quickstart", "data.games=[Breakuot]"], "data.games: .*got 'Breakuot'; did you mean Breakout"),
        (["experiment=quickstart", "objective=bc"], "model.num_atoms must be null .*objective.name=bc, got 51"),
        (["experiment=quickstart", "objective=cql_mse"], "model.num_atoms must be null .*target=mse, got 51"),
        (["experiment=quickstart", "model.num_atoms=null"], "model.num_atoms must be at least 2 .*c51, got None"),
        (["experiment=quickstart", "model.v_min=10"], "model.v_min must be less than model.v_max=10.0, got 10.0"),
        (["experiment=quickstart", "objective.cql_alpha=-1"], "objective.cql_alpha must be at least 0, got -1.0"),
        (["experiment=quickstart", "trainer.num_gradient_steps=100"], "warmup_gradient_steps must be less than .*=100"),
        (
            ["experiment=quickstart", "trainer.milestone_interval_gradient_steps=1500"],
            "milestone_interval_gradient_steps must be null or a multiple of .*=1000, got 1500",
        ),
        (["experiment=quickstart", "trainer.microbatch_size=5"], "trainer.microbatch_size must be null or a divisor"),
        (["experiment=quickstart", "trainer.stall_warning_seconds=0"], "stall_warning_seconds must be greater than 0"),
        (["experiment=quickstart", "optim.name=sgd"], "optim.name must be adam or adamw, got 'sgd'"),
        (["experiment=quickstart", "optim.weight_decay=-1"], "optim.weight_decay must be at least 0, got -1"),
        (["experiment=quickstart", "trainer.loggers=[tensorboard]"], "trainer.loggers must be a list of csv"),
        (["experiment=quickstart", "evaluation.epsilon=2"], r"evaluation.epsilon must be in \[0, 1\], got 2.0"),
        (["experiment=quickstart", "seed=-1"], "seed must be at least 0, got -1"),
        (["experiment=quickstart", "trainer.device=tpu"], "trainer.device must be auto, cpu or cuda, got 'tpu'"),
        (["experiment=quickstart", "optim.max_grad_norm=-1"], "optim.max_grad_norm must be greater than 0, or null"),
        (["experiment=quickstart", "data.games=[Breakout"], r"settings must be key=value, got .data.games=\[Breakout"),
        (["experiment=quickstart", "data.mixture=all"], "data.mixture must be games, transitions or .*, got 'all'"),
        (["experiment=quickstart", "data.mixture=[1]"], r"data.mixture must be .* a list of 2 weights.*, got \[1\]"),
        (["experiment=quickstart", "data.mixture=[1,-1]"], r"data.mixture must be .* weights >= 0.*, got \[1, -1\]"),
        (["experiment=quickstart", "data.temperature=0"], "data.temperature must be greater than 0, got 0.0"),
        (["experiment=quickstart", "data.first_fraction=1.2"], r"data.first_fraction must be in \(0, 1\], got 1.2"),
        (["experiment=quickstart", "data.every_kth_episode=0"], "data.every_kth_episode must be at least 1, got 0"),
        (["experiment=quickstart", "data.transitions_per_game=0"], "data.transitions_per_game must be at least 1, or"),
    ],
)
def test_bad_configurations_name_the_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_run_config(overrides)


def test_overrides_of_a_stored_configuration_stay_in_their_section():
    config = compose_run_config(["experiment=quickstart"])
    changed = override_run_config(config, ["evaluation.epsilon=0.05"], section="evaluation")
    assert (changed.evaluation.epsilon, config.evaluation.epsilon) == (0.05, 0.001)
    paper = compose_run_config(["experiment=quickstart", "evaluation=paper", "seed=3"])
    changed = override_run_config(
        paper, ["evaluation=sticky", "evaluation.epsilon=0.0"], section="evaluation"
    ).evaluation
    assert (changed.sticky_action_probability, changed.epsilon, changed.seed) == (0.25, 0.0, 3)
    with pytest.raises(ConfigError, match="sticki"):
        override_run_config(config, ["evaluation=sticki"], section="evaluation")
    with pytest.raises(ConfigError, match=r"evaluation.KEY=VALUE, got 'model.encoder=nature'"):
        override_run_config(config, ["model.encoder=nature"], section="evaluation")
    with pytest.raises(ConfigError, match="epsilom"):
        override_run_config(config, ["evaluation.epsilom=0.05"], section="evaluation")


def test_damaged_yaml_is_refused():
    with pytest.raises(ConfigError, match="here must hold a run's configuration"):
        run_config_from_yaml("a: [", source="here")
    with pytest.raises(ConfigError, match="must be given"):
        run_config_from_yaml("name: x", source="here")
