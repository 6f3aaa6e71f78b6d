"""Checkpoints are played while training waits: the same training, each checkpoint once, whatever stops it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from torchrl_sql.config import ConfigError
from torchrl_sql.evaluation.agents import evaluate_checkpoint
from torchrl_sql.evaluation.episodes import EpisodeResult, read_episodes
from torchrl_sql.evaluation.tables import TableWriter
from torchrl_sql.training import Trainer, train
from torchrl_sql.training.checkpoint import best_step, checkpoint_step, list_checkpoints, load_checkpoint
from torchrl_sql.training.policy import find_checkpoint
from torchrl_sql.training.signals import Interrupted

PLAYED = [
    "trainer.evaluation_interval_gradient_steps=4",
    "evaluation.num_episodes_per_game=2",
    "evaluation.max_env_frames_per_episode=80",
]


def logged(config, name):
    path = Path(config.run_dir, "logs", "csv", "scalars", f"{name}.csv")
    return [(int(step), float(value)) for step, value in (line.split(",") for line in path.read_text().splitlines())]


def final_weights(config):
    return load_checkpoint(list_checkpoints(Path(config.run_dir, "checkpoints"))[-1])["trainer"]


def assert_same_training(one, other):
    left, right = final_weights(one), final_weights(other)
    assert left["step"] == right["step"] == 12
    assert all(torch.equal(value, right["loss"][name]) for name, value in left["loss"].items())
    assert torch.equal(left["rng"][0], right["rng"][0])
    assert logged(one, "train/objective") == logged(other, "train/objective")


def scores(config):
    return read_episodes(Path(config.run_dir, "scores.csv"))


class Stopped:
    """An evaluation in which a signal comes at the third decision, of a certain checkpoint."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number, self.num_decisions = step, number, 0

    def __call__(self, checkpoint, on_decision):
        def counting():
            self.num_decisions += checkpoint_step(checkpoint) == self.step
            if self.num_decisions == 3:
                signal.raise_signal(self.number)
            on_decision()

        return evaluate_checkpoint(checkpoint, counting)


@pytest.fixture
def whole(make_config):
    config = make_config(*PLAYED, name="whole")
    train(config, evaluate=evaluate_checkpoint)
    return config


def test_training_is_the_same_with_evaluation_and_logs_its_scores(make_config, whole):
    without = make_config(name="without")
    train(without)
    assert_same_training(whole, without)
    rows = scores(whole)
    assert [(row.gradient_step, row.game, row.episode) for row in rows] == [
        (step, game, episode) for step in (4, 8, 12) for game in ("Breakout", "Freeway") for episode in (0, 1)
    ]
    for game in ("Breakout", "Freeway"):
        means = {
            step: [row.episode_return for row in rows if (row.game, row.gradient_step) == (game, step)]
            for step in (4, 8, 12)
        }
        assert logged(whole, f"evaluation/return_{game}") == [(step, sum(means[step]) / 2) for step in means]
    assert [step for step, _ in logged(whole, "evaluation/human_normalised_mean")] == [4, 8, 12]
    assert not Path(without.run_dir, "scores.csv").exists()


def test_an_evaluation_leaves_the_choice_of_algorithms_to_training(whole, monkeypatch):
    def on_a_gpu(device, *, try_algorithms):
        torch.backends.cudnn.benchmark = try_algorithms

    monkeypatch.setattr("torchrl_sql.evaluation.agents.tune", on_a_gpu)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    evaluate_checkpoint(find_checkpoint(Path(whole.run_dir)))
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize("step", [4, 12])
def test_a_signal_during_an_evaluation_stops_there_and_it_is_continued_first(make_config, whole, step):
    parts = make_config(*PLAYED, name="parts")
    with pytest.raises(Interrupted, match=f"stopped at gradient step {step} of 12"):
        train(parts, evaluate=Stopped(step))
    before = scores(parts)
    assert len(before) < step
    with pytest.raises(Interrupted, match=rf"step {step} of|the evaluation of .*{step}.pt was stopped") as again:
        train(parts, evaluate=Stopped(step, signal.SIGUSR2))
    assert scores(parts) == before and again.value.requeue
    train(parts, evaluate=evaluate_checkpoint)
    assert_same_training(parts, whole)
    assert scores(parts) == scores(whole)
    for name in ("return_Breakout", "return_Freeway", "human_normalised_mean"):
        assert logged(parts, f"evaluation/{name}") == logged(whole, f"evaluation/{name}")


def test_a_signal_before_the_last_evaluation_leaves_it_to_the_next_start(make_config, whole, monkeypatch):
    parts = make_config(*PLAYED, name="parts")
    update = Trainer.update

    def interrupting(self, batch):
        metrics = update(self, batch)
        if self.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped at gradient step 12 of 12"):
        patch.setattr(Trainer, "update", interrupting)
        train(parts, evaluate=evaluate_checkpoint)
    assert {row.gradient_step for row in scores(parts)} == {4, 8}
    train(parts, evaluate=evaluate_checkpoint)
    assert scores(parts) == scores(whole)


def test_a_trained_run_plays_nothing_again(whole):
    before = scores(whole), logged(whole, "evaluation/return_Freeway")
    evaluation = Stopped(12)
    train(whole, evaluate=evaluation)
    assert evaluation.num_decisions == 0 and (scores(whole), logged(whole, "evaluation/return_Freeway")) == before


def test_the_best_checkpoint_stays_beside_the_newest(make_config):
    config = make_config(*PLAYED, "trainer.num_checkpoints_kept=1")

    def first_is_best(checkpoint, on_decision):
        found = evaluate_checkpoint(checkpoint, on_decision)
        best = Path(config.run_dir, "checkpoints", "best.json")
        if best_step(best.parent) == 4:
            best.write_text(json.dumps({"step": 4, "score": 1e9}))
        return found

    train(config, evaluate=first_is_best)
    kept = [path.name for path in list_checkpoints(Path(config.run_dir, "checkpoints"))]
    assert kept == ["step_000000004.pt", "step_000000012.pt"]


def test_an_evaluation_that_fails_costs_its_scores_only(make_config, caplog):
    config = make_config(*PLAYED)
    Path(config.run_dir).mkdir(parents=True)
    with TableWriter(Path(config.run_dir, "scores.csv"), EpisodeResult):  # somebody else evaluates
        train(config, evaluate=evaluate_checkpoint)
    failures = [
        record.message for record in caplog.records if "could not be evaluated, training goes on" in record.message
    ]
    assert len(failures) == 3 and "is being written by another evaluation" in failures[0]
    assert final_weights(config)["step"] == 12


def test_neither_does_one_that_finds_no_memory(make_config, caplog):
    def played(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = make_config(*PLAYED)
    train(config, evaluate=played)
    assert "could not be evaluated, training goes on: CUDA out of memory" in caplog.text
    assert final_weights(config)["step"] == 12


def test_settings_that_cannot_be_are_refused(make_config):
    with pytest.raises(
        ConfigError, match=r"evaluation_interval_gradient_steps must be null or a multiple of .*=4, got 6"
    ):
        make_config("trainer.evaluation_interval_gradient_steps=6")
    with pytest.raises(ConfigError, match=r"evaluation_interval_gradient_steps=4 needs an evaluation"):
        train(make_config(*PLAYED))
