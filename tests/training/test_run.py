from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from torchrl_sql.config import ConfigError
from torchrl_sql.data import GameMixtureSamplerWithoutReplacement
from torchrl_sql.training import Interrupted, load_actor, train
from torchrl_sql.training.build import build_trainer, learning_rate_factor
from torchrl_sql.training.checkpoint import list_checkpoints, load_checkpoint
from torchrl_sql.training.run import read_scalars
from torchrl_sql.training.trainer import Trainer


def final_state(config):
    return load_checkpoint(list_checkpoints(Path(config.run_dir) / "checkpoints")[-1])["trainer"]


def assert_same(left, right):
    """Equality, bit for bit, of nested states."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def interrupt_after(monkeypatch, step):
    update = Trainer.update

    def interrupting(self, batch):
        metrics = update(self, batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(Trainer, "update", interrupting)


def test_data_settings_reach_the_replay_buffer(make_config):
    part = {"first_fraction": 0.9, "every_kth_episode": 2, "transitions_per_game": 50}
    mixture = {"mixture": [1, 3], "temperature": 2.0, "replacement": False}
    config = make_config(*(f"data.{key}={value}" for key, value in (part | mixture).items()))
    replay = build_trainer(config).replay
    assert vars(replay._storage.part) == part
    sampler = replay._sampler
    assert type(sampler) is GameMixtureSamplerWithoutReplacement
    assert (sampler.mixture, sampler.temperature, sampler.seed) == ((1.0, 3.0), 2.0, config.seed)


@pytest.mark.parametrize("objective", ["cql_c51", "cql_hl_gauss", "cql_mse", "bc"])
def test_an_interrupted_run_continues_exactly(make_config, monkeypatch, objective):
    changes = [f"objective={objective}"]
    if objective in ("cql_mse", "bc"):
        changes += ["model.num_atoms=null", "model.value_prior_std=null"]
    whole, parts = make_config(*changes, name="whole"), make_config(*changes, name="parts")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted, match="stopped at gradient step 5 of 12"):
            train(parts)
    train(parts)
    assert_same(final_state(parts), final_state(whole))
    ours, theirs = (read_scalars(Path(c.run_dir)) for c in (parts, whole))
    deterministic = ours.keys() - {"samples_per_second", "data_wait_fraction"}
    assert {"objective", "grad_norm", "learning_rate"} <= deterministic
    for name in deterministic:
        assert ours[name] == theirs[name], name
        assert [step for step, _ in ours[name]] == [2, 4, 6, 8, 10, 12]


def test_a_killed_run_continues_from_its_last_checkpoint(make_config, monkeypatch):
    whole, killed = make_config(name="whole"), make_config(name="killed")
    train(whole)
    update = Trainer.update

    def dying(self, batch):
        if self.step == 7:
            raise RuntimeError("killed")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(killed)
    train(killed)
    assert_same(final_state(killed), final_state(whole))
    steps = [step for step, _ in read_scalars(Path(killed.run_dir))["objective"]]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(make_config):
    config = make_config()
    folder = train(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ConfigError, match=r"other settings \(objective.cql_alpha: 0.1 there, 0.5 now\)"):
        train(make_config("objective.cql_alpha=0.5"))


def test_a_loaded_actor_is_the_trained_one(make_config):
    config = make_config()
    folder = train(config)
    trainer = build_trainer(config)
    trainer.load_state_dict(final_state(config))
    batch = trainer.replay.sample()
    actor, loaded_config, step = load_actor(folder)
    assert (step, loaded_config) == (12, config)
    with torch.no_grad():
        loaded = actor(batch.clone())["action_value"]
        trained = trainer.loss.get_stateful_net("value_network")(batch.clone())["action_value"]
    torch.testing.assert_close(loaded, trained, rtol=0, atol=0)
    assert actor.module[0].module.input_mean.abs().sum() > 0


def test_metrics_that_matter_are_logged(make_config):
    folder = train(make_config("trainer.loggers=[csv,tensorboard]"))
    wanted = {
        "loss_qvalue",
        "loss_cql",
        "q_data",
        "q_max",
        "feature_norm",
        "grad_norm",
        "samples_per_second",
        "learning_rate",
    }
    assert wanted <= read_scalars(folder).keys()
    assert list((folder / "logs" / "tensorboard").glob("events*"))


def test_learning_rate_warms_up_then_falls_to_its_fraction(make_config):
    optim = make_config("optim.warmup_gradient_steps=4", "optim.final_learning_rate_fraction=0.1").optim
    factor = learning_rate_factor(optim, 100)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.2, rel=0.01)
    assert values[4] == pytest.approx(1.0, abs=0.01)
    assert all(later <= earlier for earlier, later in pairwise(values[4:]))
    assert values[50] == pytest.approx(0.1 + 0.9 / 2)
    assert values[100] == pytest.approx(0.1)


def test_missing_store_is_named(make_config):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(make_config("data.store=/nowhere"))
