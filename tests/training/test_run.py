from __future__ import annotations

import errno
import functools
import io
import json
import operator
import os
import pty
import re
import shutil
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrl.record.loggers import CSVLogger

from torchrl_sql.cli import main
from torchrl_sql.config import ConfigError, compose_run_config
from torchrl_sql.data import GameMixtureSamplerWithoutReplacement, OfflineAtariReplay
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.statistics.scores import human_normalised
from torchrl_sql.training import Interrupted, load_agent, train
from torchrl_sql.training.build import build_trainer, learning_rate_factor
from torchrl_sql.training.checkpoint import (
    CheckpointError,
    best_step,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    wrong_content,
)
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.policy import POLICY_FILE
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


def interrupt_after(monkeypatch, step, number=signal.SIGINT):
    update = Trainer.update

    def interrupting(self, batch):
        metrics = update(self, batch)
        if self.step == step:
            signal.raise_signal(number)
        return metrics

    monkeypatch.setattr(Trainer, "update", interrupting)


def test_data_settings_reach_the_replay_buffer(make_config):
    part = {"first_fraction": 0.9, "last_fraction": 0.95, "every_kth_episode": 2, "transitions_per_game": 50}
    mixture = {"mixture": [1, 3], "temperature": 2.0, "replacement": False}
    config = make_config(*(f"data.{key}={value}" for key, value in (part | mixture).items()))
    replay = build_trainer(config).replay
    assert vars(replay._storage.subset) == part | {"newest_steps": None}
    sampler = replay._sampler
    assert type(sampler) is GameMixtureSamplerWithoutReplacement
    assert (sampler.mixture, sampler.temperature, sampler.seed) == ((1.0, 3.0), 2.0, config.seed)


@pytest.mark.parametrize("method", ["cql_c51", "cql_hl_gauss", "cql_mse", "bc"])
def test_an_interrupted_run_continues_exactly(make_config, monkeypatch, method):
    changes = [f"method={method}"]
    whole, parts = make_config(*changes, name="whole"), make_config(*changes, name="parts")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted, match="stopped at gradient step 5 of 12"):
            train(parts)
    train(parts)
    assert_same(final_state(parts), final_state(whole))
    ours, theirs = (read_scalars(Path(c.run_dir)) for c in (parts, whole))
    deterministic = ours.keys() - {"samples_per_second", "data_wait_fraction", "eta_seconds"}
    assert {"objective", "grad_norm", "learning_rate"} <= deterministic
    for name in deterministic:
        assert ours[name] == theirs[name], name
        assert [step for step, _ in ours[name]] == [2, 4, 6, 8, 10, 12]


def dying_at(step):
    """An update that fails after ``step - 1`` gradient steps."""
    update = Trainer.update

    def dying(self, batch):
        if self.step == step - 1:
            raise RuntimeError("killed")
        return update(self, batch)

    return dying


def test_a_killed_run_continues_from_its_last_checkpoint(make_config, monkeypatch):
    whole, killed = make_config(name="whole"), make_config(name="killed")
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", dying_at(8))
        with pytest.raises(RuntimeError, match="killed"):
            train(killed)
    train(killed)
    assert_same(final_state(killed), final_state(whole))
    steps = [step for step, _ in read_scalars(Path(killed.run_dir))["objective"]]
    assert steps == [2, 4, 6, 8, 10, 12]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.sets(st.integers(1, 11), max_size=3), number=st.sampled_from([signal.SIGINT, signal.SIGTERM]))
def test_any_interruptions_leave_no_trace(make_config, stops, number):
    whole, parts = make_config(name="whole"), make_config(name="parts")
    train(whole)  # once: a finished run returns at once
    shutil.rmtree(parts.run_dir, ignore_errors=True)
    for step in sorted(stops):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, step, number)
            with pytest.raises(Interrupted, match=f"stopped at gradient step {step} of 12"):
                train(parts)
    train(parts)
    assert_same(final_state(parts), final_state(whole))


TRAIN = """
import pathlib, sys
from torchrl_sql.config import load_run_config
from torchrl_sql.training import train
train(load_run_config(pathlib.Path(sys.argv[1])))
"""


def test_a_lost_terminal_saves(make_config, tmp_path):
    config = make_config("trainer.num_gradient_steps=100_000", "trainer.checkpoint_interval_gradient_steps=100_000")
    settings_file, folder = tmp_path / "settings.yaml", Path(config.run_dir)
    settings_file.write_text(config.to_yaml())
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
        os.execv(sys.executable, [sys.executable, "-c", TRAIN, str(settings_file)])
    while not read_scalars(folder).get("objective"):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), os.read(terminal, 10_000)
        time.sleep(0.1)
    os.close(terminal)  # as a dropped connection does
    os.waitpid(pid, 0)
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert load_checkpoint(checkpoint)["trainer"]["step"] == checkpoint_step(checkpoint) > 0


def test_nothing_is_trained_into_a_store(make_config):
    config = make_config()
    config.run_dir = config.data.store
    with pytest.raises(ValueError, match=r"run_dir must be outside of stores, but .* is one"):
        train(config)


def test_data_that_is_missing_leaves_no_folder(make_config, tmp_path):
    config = make_config(f"data.store={tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match="is not a store"):
        train(config)
    assert not Path(config.run_dir).exists()


def poison_batch(monkeypatch, step):
    sample = OfflineAtariReplay.sample

    def poisoned(self):
        batch = sample(self)
        if self._sampler.step == step:
            batch["next", "reward"] *= float("nan")
        return batch

    monkeypatch.setattr(OfflineAtariReplay, "sample", poisoned)


def test_a_non_finite_loss_leaves_state_and_batch_for_inspection(make_config, monkeypatch):
    config, stopped = make_config(name="diverged"), make_config(name="stopped")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Interrupted):
            train(stopped)
    poison_batch(monkeypatch, 7)
    with pytest.raises(FloatingPointError, match=r"gradient of step 7 is not finite.*nonfinite holds state.pt"):
        train(config)
    folder = Path(config.run_dir) / "nonfinite"
    state, batch = (load_checkpoint(folder / name) for name in ("state.pt", "batch_rank0.pt"))
    assert (state["trainer"]["step"], batch["step"]) == (6, 7)
    assert batch["batch"]["next"]["reward"].isnan().all() and batch["batch"]["observation"].shape == (8, 4, 84, 84)
    assert_same(state["trainer"], final_state(stopped))


def test_a_full_disk_does_not_hide_why_training_stopped(make_config, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    poison_batch(monkeypatch, 7)
    monkeypatch.setattr("torchrl_sql.training.run.write_content", full)
    message = r"gradient of step 7 is not finite.*could not be saved in .*nonfinite: .*No space left"
    with pytest.raises(FloatingPointError, match=message):
        train(make_config())


def all_places(content, *above):
    """The keys of every entry of a nested checkpoint, outer ones too."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*above, key)
        yield from all_places(value, *above, key)


@pytest.fixture(scope="module")
def trainer(stopped):
    trainer = build_trainer(stopped[0])
    yield trainer
    trainer.replay.shutdown()


@pytest.fixture(scope="module")
def stopped(tiny_overrides, tmp_path_factory):
    """The configuration of a run that was stopped within a log interval, and the bytes of its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = compose_run_config([*tiny_overrides(folder), "trainer.log_interval_gradient_steps=5"])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            train(config)
    return config, checkpoint_path(folder / "checkpoints", 7).read_bytes()


MISSING = object()


def changed(checkpoint, place, value):
    """A checkpoint's content with another value at a place, or nothing there."""
    content = torch.load(io.BytesIO(checkpoint), weights_only=True)
    *above, key = place
    holder = functools.reduce(operator.getitem, above, content)
    del holder[key]
    if value is not MISSING:
        holder[key] = value
    return content


@pytest.mark.parametrize("value", [MISSING, None, "text", {}])
@pytest.mark.parametrize("place", [("config",), ("data_fingerprint",), ("trainer",), ("trainer", "step")])
def test_wrong_content_of_an_intact_checkpoint_is_named(stopped, make_config, place, value):
    config = make_config("trainer.log_interval_gradient_steps=5")
    path = save_checkpoint(Path(config.run_dir) / "checkpoints", 7, changed(stopped[1], place, value))
    other_data = place == ("data_fingerprint",) and value is not MISSING
    with pytest.raises(ValueError, match="was trained on other data" if other_data else re.escape(str(path))):
        train(config)
    if place != ("data_fingerprint",):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_agent(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_wrong_state_of_a_trainer_is_taken_for_a_right_one(stopped, trainer, data):
    places = all_places(torch.load(io.BytesIO(stopped[1]), weights_only=True)["trainer"])
    read = [place for place in places if place[0] in ("loss", "optimizer") or place == ("interval", "num_steps")]
    place = data.draw(st.sampled_from(read))
    value = data.draw(st.sampled_from([MISSING, None, "text", {}, torch.zeros(7, 7)]))
    state = changed(stopped[1], ("trainer", *place), value)["trainer"]
    path = Path("step_000000007.pt")
    if place[:2] == ("optimizer", "state") and (value is MISSING or value == {}) and len(place) in (2, 3):
        return  # as where parameters had no gradient yet
    with pytest.raises(CheckpointError, match=r"step_000000007.pt is intact, but does not hold"), wrong_content(path):
        trainer.load_state_dict(state)


def test_the_first_line_of_the_log_names_device_build_ranks_and_parameters(make_config, caplog):
    with caplog.at_level("INFO"):
        folder = train(make_config())
    first, build = caplog.messages[0], re.escape(f"torch {torch.__version__} (")
    assert re.match(rf"training \d+,\d{{3}} parameters on 1 x cpu \(\d+ threads\), {build}", first)
    assert json.loads((folder / "versions.json").read_text())["device"] in first


def test_a_broken_state_is_never_saved_as_a_checkpoint(make_config, monkeypatch):
    config = make_config("trainer.log_interval_gradient_steps=12")
    poison_batch(monkeypatch, 7)
    with pytest.raises(FloatingPointError, match="gradient of step 7 is not finite"):
        train(config)
    assert [checkpoint_step(path) for path in list_checkpoints(Path(config.run_dir) / "checkpoints")] == [4]


def test_the_summary_says_what_was_done_and_where_it_is(make_config, caplog):
    with caplog.at_level("INFO"):
        folder = train(make_config())
    for line in (
        "step 12 of 12: objective ",
        "trained at gradient step 12 of 12",
        r"this time    12 gradient steps in \d+:\d\d:\d\d\n",
        r"checkpoints  3 written, training waited \d+\.\d\d s for them",
        f"folder       {folder}: checkpoints/, logs/",
    ):
        assert re.search(line, caplog.text), line


def test_greedy_play_of_all_games_marks_the_best_checkpoint(make_config):
    folder = train(make_config("evaluation.max_env_frames_per_episode=200", "evaluation.num_episodes_per_game=2"))
    older = list_checkpoints(folder / "checkpoints")[0]
    evaluate = ["evaluate", str(older), "--device", "cpu"]
    less = (["--decoding", "sampled"], ["--games", "Freeway"], ["--sticky", "0.5"], ["--share", "1/2"])
    for elsewhere in (*less, ["--episodes", "1"]):
        assert main([*evaluate, "--out", str(folder / "elsewhere" / elsewhere[0]), *elsewhere]) == 0
        assert best_step(folder / "checkpoints") is None, elsewhere
    assert main(evaluate) == 0
    assert best_step(folder / "checkpoints") == 4
    scores = [human_normalised(row.episode_return, row.game) for row in read_episodes(folder / "scores.csv")]
    assert len(scores) == 4
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["score"] == pytest.approx(sum(scores) / 4)


def test_tensorboard_forgets_what_a_continued_run_logs_again(make_config, monkeypatch):
    config = make_config("trainer.loggers=[csv,tensorboard]")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", dying_at(9))
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    train(config)
    events = EventAccumulator(str(Path(config.run_dir) / "logs" / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("train/objective")] == [2, 4, 6, 8, 10, 12]


def test_a_continued_run_stays_the_same_wandb_run(make_config, monkeypatch):
    ids = []

    class FakeWandb(CSVLogger):
        def __init__(self, exp_name, save_dir, id):
            super().__init__(exp_name, log_dir=save_dir)
            ids.append(id)

    monkeypatch.setattr("torchrl_sql.training.logs.WandbLogger", FakeWandb)
    monkeypatch.setattr("torchrl_sql.training.build.find_spec", lambda name: "installed")
    config = make_config("trainer.loggers=[csv,wandb]")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            train(config)
    train(config)
    assert len(ids) == 2 and ids[0] == ids[1] and len(ids[0]) == 8


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(make_config):
    config = make_config()
    folder = train(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ConfigError, match=r"other settings \(method.cql_alpha: 0.1 there, 0.5 now\)"):
        train(make_config("method.cql_alpha=0.5"))
    with pytest.raises(
        ConfigError, match=r"other settings \(method.name: cql there, bc now; .*cql_alpha: 0.1 there, None"
    ):
        train(make_config("method=bc"))
    for changes, named in (
        (["data.temperature=2"], "temperature"),
        (["data.replacement=false"], "replacement"),
        (["data.first_fraction=0.5"], "first_fraction"),
        (["data.every_kth_episode=2"], "every_kth_episode"),
        (["data.transitions_per_game=50"], "transitions_per_game"),
        (["data.games=[Breakout]"], "games"),
    ):
        with pytest.raises(ConfigError, match=rf"other settings \(data.{named}: [^;]* there, [^;]* now\)"):
            train(make_config(*changes))
    train(make_config("data.prefetch=1"))


def test_a_loaded_actor_is_the_trained_one(make_config):
    config = make_config()
    folder = train(config)
    trainer = build_trainer(config)
    trainer.load_state_dict(final_state(config))
    batch = trainer.replay.sample()
    actor, loaded_config, step = load_agent(folder)
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
        "clipped_mass",
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


def test_variables_in_paths_are_replaced_up_to_the_policy(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    config = make_config("run_dir=$RUNS/run")
    for _ in range(2):  # to its end, and again when it is trained already
        folder = train(config)
        assert folder == tmp_path / "elsewhere" / "run" and (folder / POLICY_FILE).is_file()
        (folder / POLICY_FILE).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_missing_store_is_named(make_config):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(make_config("data.store=/nowhere"))


def test_batch_that_ranks_cannot_share_is_refused_before_the_store_is_opened(make_config):
    config = make_config("trainer.microbatch_size=3", "data.batch_size=9", "data.store=nowhere")
    config.trainer.microbatch_size = 4
    with pytest.raises(
        ConfigError, match="microbatch_size must be null or a divisor of each process's batch of 9, got 4"
    ):
        train(config)
