from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrl_sql.cli import main
from torchrl_sql.config import ConfigError, compose_run_config
from torchrl_sql.data import FrameStore, GrowingStore, OfflineAtariReplay
from torchrl_sql.envs.atari import Emulator
from torchrl_sql.envs.lockstep import EmulatorError, Lockstep
from torchrl_sql.envs.slots import Slot
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy
from torchrl_sql.games import GAMES, find_game
from torchrl_sql.training import Interrupted, train
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.checkpoint import checkpoint_step, list_checkpoints, load_checkpoint
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.online import OnlineReplay, Pace
from torchrl_sql.training.policy import POLICY_FILE, load_policy
from torchrl_sql.training.trainer import NonFiniteError, Trainer

TINY = [
    "scale=cpu",
    "online=cpu",
    "data.games=[Breakout,Freeway]",
    "data.batch_size=4",
    "model.encoder=resnet_tiny",
    "online.first_agent_steps=100",
    "online.epsilon_decay_agent_steps=200",
    "online.max_env_frames_per_episode=80",  # 20 agent steps
    "online.commit_interval_gradient_steps=4",
    "online.shard_frames=100",
    "trainer.num_gradient_steps=24",
    "trainer.target_update_interval_gradient_steps=5",
    "trainer.log_interval_gradient_steps=3",
    "trainer.checkpoint_interval_gradient_steps=3",
    "trainer.loggers=[csv]",
    "optim.warmup_gradient_steps=2",
]

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def make_config(tmp_path):
    """Composes a tiny run that plays; each ``name`` has a folder of its own."""

    def make(*overrides, name="run"):
        return compose_run_config([*TINY, f"run_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture(scope="session")
def played(tmp_path_factory):
    """A run that was not disturbed."""
    return train(compose_run_config([*TINY, f"run_dir={tmp_path_factory.mktemp('played') / 'run'}"]))


def weights(folder):
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])["trainer"]["loss"]


def contents(store):
    files = (path for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def assert_same_run(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert contents(folder / "store") == contents(other / "store")
    scalars = [read_scalars(each) for each in (folder, other)]
    for name in ("objective", "agent_steps", "epsilon", "episode_return"):
        assert scalars[0][name] == scalars[1][name], name


KILLED = """
import importlib, os, signal, sys
from torchrl_sql.cli import main
module, kind, name, number, signal_number = sys.argv[1:6]
kind = getattr(importlib.import_module(module), kind)
original, calls = getattr(kind, name), []

def call(*args, **options):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), int(signal_number))
    return original(*args, **options)

setattr(kind, name, call)
sys.exit(main(["train-online", *sys.argv[6:]]))
"""
COMMIT, UPDATE, ADD, SEND = (
    ("torchrl_sql.data.writer", "RecordingWriter", "commit"),
    ("torchrl_sql.training.trainer", "Trainer", "update"),
    ("torchrl_sql.data.growing", "GrowingStore", "add"),
    ("torchrl_sql.envs.slots", "Slot", "send"),
)


def run_signalled(function, number, sent, folder, log):
    """Runs TINY in ``folder``, with a signal before that call of a function; returns the exit code."""
    command = [sys.executable, "-c", KILLED, *function, str(number), str(int(sent)), *TINY, f"run_dir={folder}"]
    with open(log, "a") as file:
        return subprocess.run(command, stdout=file, stderr=file, timeout=300).returncode


@pytest.mark.slow
def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(played, tmp_path):
    folder, log = tmp_path / "killed", tmp_path / "log"
    kills = [
        (COMMIT, 2),  # in the first commit, between two games, before there is a checkpoint
        (UPDATE, 8),  # two checkpoints later, with steps since
        (ADD, 3),  # episodes that are played again are written
        (COMMIT, 4),
        (UPDATE, 10**9),  # not any more
    ]
    for kill in kills:
        code = run_signalled(*kill, signal.SIGKILL, folder, log)
        assert code == (0 if kill == kills[-1] else -signal.SIGKILL), log.read_text()
    assert "continuing" in log.read_text()
    assert_same_run(folder, played)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])])
def test_the_network_that_acts_has_the_learners_weights_of_the_step_before(make_config, device):
    trainer = build_trainer(make_config(f"trainer.device={device}"))
    before = {}
    for _ in range(4):
        batch = trainer.replay.sample()
        acting, learner = trainer.replay._acting.state_dict(), trainer.replay._policy.state_dict()
        assert {value.device.type for value in acting.values()} == {device}
        assert all(torch.equal(value, learner[name]) for name, value in acting.items())
        assert not before or any(not torch.equal(value, acting[name]) for name, value in before.items())
        before = {name: value.clone() for name, value in acting.items()}
        trainer.update(batch)
    trainer.replay.shutdown()


def test_a_network_that_diverged_stops_the_run_with_files_to_inspect(make_config, monkeypatch):
    config, update = make_config(), Trainer.update

    def diverging(self, batch):
        metrics = update(self, batch)
        if self.step == 10:
            with torch.no_grad():
                next(iter(self.loss.parameters())).fill_(torch.nan)
        return metrics

    monkeypatch.setattr(Trainer, "update", diverging)
    with pytest.raises(NonFiniteError):
        train(config)
    assert (Path(config.run_dir) / "nonfinite" / "state.pt").exists()


@pytest.fixture
def interrupted_at_10(monkeypatch):
    """Trains until ten gradient steps have been taken."""

    def train_until_then(config):
        update = Trainer.update

        def interrupting(self, batch):
            metrics = update(self, batch)
            if self.step == 10:
                signal.raise_signal(signal.SIGINT)
            return metrics

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "update", interrupting)
            with pytest.raises(Interrupted):
                train(config)

    return train_until_then


def test_an_interrupted_run_continues_exactly(played, make_config, interrupted_at_10):
    interrupted_at_10(make_config())
    assert_same_run(train(make_config()), played)


@pytest.mark.gpu
@needs_a_gpu
def test_a_run_on_a_gpu_plays_what_it_owes_and_continues(played, make_config, interrupted_at_10):
    interrupted_at_10(make_config("trainer.device=cuda"))
    folder = train(make_config("trainer.device=cuda"))
    ours, theirs = read_scalars(folder), read_scalars(played)
    assert ours["agent_steps"] == theirs["agent_steps"] and ours["epsilon"] == theirs["epsilon"]
    assert np.isfinite([value for _, value in ours["objective"]]).all()
    assert (folder / POLICY_FILE).exists()


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_while_it_plays_before_learning_stops_there(played, make_config, tmp_path):
    """The first steps are 25 of each of 4 emulators."""
    config, folder, log = make_config(), tmp_path / "run", tmp_path / "log"
    assert run_signalled(SEND, 10, signal.SIGTERM, folder, log) == 130, log.read_text()
    assert "stopped before the first gradient step of this start" in log.read_text()
    assert FrameStore.open(folder / "store").recordings == () and not list_checkpoints(folder / "checkpoints")

    assert run_signalled(UPDATE, 11, signal.SIGINT, folder, log) == 130, log.read_text()
    before = contents(folder / "store")
    saved = list_checkpoints(folder / "checkpoints")[-1]

    log.write_text("")
    assert run_signalled(SEND, 2, signal.SIGUSR2, folder, log) == 130, log.read_text()  # while it plays again
    assert "stopped before the first gradient step of this start" in log.read_text()
    assert contents(folder / "store") == before and list_checkpoints(folder / "checkpoints")[-1] == saved
    assert_same_run(train(config), played)


def test_a_run_that_is_stopped_in_its_evaluations_continues_exactly(played, make_config):
    played_steps = []

    def evaluate(checkpoint, listen):
        played_steps.append(checkpoint_step(checkpoint))
        if len(played_steps) in (1, 3, 5):
            signal.raise_signal(signal.SIGTERM)
        listen()
        return {"score": 1.0}

    config = make_config("trainer.evaluation_interval_gradient_steps=6")
    for step in (0, 6, 12):
        with pytest.raises(Interrupted, match=f"stopped at gradient step {step} of 24"):
            train(config, evaluate=evaluate)
    assert_same_run(train(config, evaluate=evaluate), played)
    assert played_steps == [0, 0, 6, 6, 12, 12, 18, 24]


def test_a_run_s_folder_cannot_be_its_store(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.store must be another folder than run_dir, got .*/run for both"):
        train(make_config(f"data.store={tmp_path / 'run' / '..' / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_reading_ahead_changes_nothing(played, make_config):
    assert_same_run(train(make_config("data.prefetch=0")), played)


def test_what_was_played_is_a_store_in_time_order_with_labels(played):
    store = FrameStore.open(played / "store")
    num_agent_steps = int(read_scalars(played)["agent_steps"][-1][1])
    num_first = num_agent_steps - 24 * 8  # as set; each emulator has ended an episode of 20 steps
    assert num_first == 100
    for game in ("Breakout", "Freeway"):
        recording = store.recording(game)
        labels = recording.labels
        steps = labels["agent_step"]
        assert recording.num_episodes == len(steps) == len(labels["gradient_step"]) == len(labels["epsilon"])
        ends = steps + 4 * recording.episodes["num_steps"]  # of all four emulators together
        assert (np.diff(ends) >= 0).all()
        pace = Pace(
            agent_steps_per_gradient_step=8,
            first_agent_steps=100,
            final_epsilon=0.02,
            epsilon_decay_agent_steps=200,
            commit_interval_gradient_steps=4,
        )
        assert labels["epsilon"].tolist() == [pace.epsilon(max(0, step - 100)) for step in steps]
        # Steps 100 to 107 are owed at gradient step 1 and played with the weights of before it; and so on.
        assert labels["gradient_step"].tolist() == [max(0, -(-(step - 100) // 8) - 1) for step in steps]
        assert set(recording.actions) <= set(GAMES[game].minimal_actions)
    assert recording.manifest.metadata["played_by"]["seed"] == 0


def test_a_run_trains_offline_on_what_was_played(played, tmp_path):
    overrides = [word for word in TINY if not word.startswith("online")]
    config = compose_run_config(
        [*overrides, f"data.store={played / 'store'}", f"run_dir={tmp_path / 'offline'}", "data.first_fraction=0.5"]
    )
    assert list_checkpoints(train(config) / "checkpoints")


def test_nothing_can_be_drawn_before_anything_was_played(tmp_path):
    policy = RandomPolicy(["Pong"])
    growing = GrowingStore(tmp_path / "store", ["Pong"], source="test", about={})
    pace = Pace(
        agent_steps_per_gradient_step=1,
        first_agent_steps=1,
        final_epsilon=0.05,
        epsilon_decay_agent_steps=1,
        commit_interval_gradient_steps=1,
    )
    replay = OnlineReplay(growing, Lockstep(["Pong"], num_emulators=1, seed=0), policy, OfflineAtariReplay, pace)
    with pytest.raises(RuntimeError, match=r"call begin\(\) or load_state_dict\(\) before sample\(\)"):
        replay.sample()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"agent_steps_per_gradient_step": 0}, r"agent_steps_per_gradient_step must be in \(0, inf\), got 0"),
        ({"first_agent_steps": 0}, "first_agent_steps must be at least 1, got 0"),
        ({"initial_epsilon": np.nan}, r"initial_epsilon must be in \[0, 1\], got nan"),
        ({"final_epsilon": 2}, r"final_epsilon must be in \[0, 1\], got 2"),
        ({"epsilon_decay_agent_steps": 0}, "epsilon_decay_agent_steps must be at least 1, got 0"),
        ({"commit_interval_gradient_steps": 0}, "commit_interval_gradient_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_paces_that_cannot_be_kept_are_refused(setting, message):
    kept = {"agent_steps_per_gradient_step": 4, "first_agent_steps": 100, "final_epsilon": 0.1}
    with pytest.raises(ValueError, match=message):
        Pace(**kept | {"epsilon_decay_agent_steps": 100, "commit_interval_gradient_steps": 1} | setting)


def short_online(tmp_path, games, policy, make_replay):
    growing = GrowingStore(tmp_path / "store", games, source="test", about={})
    pace = Pace(
        agent_steps_per_gradient_step=4,
        first_agent_steps=8,
        final_epsilon=0.0,
        epsilon_decay_agent_steps=1,
        commit_interval_gradient_steps=1,
    )
    players = Lockstep(games, len(games), Emulator(max_env_frames=16), seed=0)
    return OnlineReplay(growing, players, policy, make_replay, pace)


@pytest.mark.parametrize("games", [["Pong"], ["Freeway", "Pong"]])
def test_a_policy_of_other_games_or_in_another_order_is_refused(tmp_path, games):
    with pytest.raises(ValueError, match=r"the policy must have the players' games in their order, .*, got"):
        short_online(tmp_path, games[::-1] if len(games) > 1 else ["Freeway"], RandomPolicy(games), OfflineAtariReplay)


def test_games_keep_the_order_that_they_are_given(tmp_path):
    """A store lists its games by name, and a replay of it takes that order unless it is given another."""
    games = ["Pong", "Freeway"]
    replay = short_online(tmp_path, games, ConstantPolicy(0), partial(OfflineAtariReplay, batch_size=4))
    with pytest.raises(
        ValueError, match=r"make_replay must be given games=\['Pong', 'Freeway'\].*\['Freeway', 'Pong'\]"
    ):
        replay.begin()
    shutil.rmtree(tmp_path / "store")
    make_replay = partial(OfflineAtariReplay, games=games, batch_size=4)
    replay = short_online(tmp_path, games, ConstantPolicy(0), make_replay)
    replay.begin()
    batch = torch.cat([replay.sample() for _ in range(8)])
    replay.shutdown()
    for game_id, game in enumerate(games):  # the first steps are random legal actions
        actions = batch["action"][batch["game_id"] == game_id]
        assert len(actions) and set(actions.tolist()) <= {*find_game(game).minimal_actions}


def test_epsilon_falls_from_one_as_the_agent_learns():
    pace = Pace(
        agent_steps_per_gradient_step=4,
        first_agent_steps=100,
        final_epsilon=0.1,
        epsilon_decay_agent_steps=300,
        commit_interval_gradient_steps=1,
    )
    # 1 - 0.9 * step / 300
    assert [pace.epsilon(step) for step in (0, 100, 300, 1000)] == [1.0, 0.7, 0.1, 0.1]


def test_a_policy_that_can_play_makes_the_first_steps_but_for_the_initial_epsilon(tmp_path):
    policy = ConstantPolicy(3)
    policy.weight = torch.nn.Parameter(torch.zeros(1))
    chosen = {}
    for epsilon in (0.0, 0.5):
        growing = GrowingStore(tmp_path / str(epsilon), ["Pong"], source="test", about={})
        pace = Pace(
            agent_steps_per_gradient_step=1,
            first_agent_steps=200,
            initial_epsilon=epsilon,
            final_epsilon=0.1,
            epsilon_decay_agent_steps=100,
            commit_interval_gradient_steps=1,
        )
        players = Lockstep(["Pong"], 1, Emulator(max_env_frames=400), seed=0)
        replay = OnlineReplay(growing, players, policy, partial(OfflineAtariReplay, batch_size=2), pace)
        replay.begin()
        recording = growing.store.recording("Pong")
        assert set(recording.labels["epsilon"]) == {epsilon}
        chosen[epsilon] = np.array(recording.actions)
        replay.shutdown()
    assert (chosen[0.0] == 3).all()
    # Of Pong's 6 actions a random one is another with 5/6: 5/12 of 200, with a standard deviation of 0.035.
    assert abs((chosen[0.5] != 3).mean() - 5 / 12) < 4 * 0.035
    assert pace.epsilon(0) == 0.5 and pace.epsilon(50) == 0.3


def test_a_loaded_policy_acts_at_once_in_games_that_it_can_play(played, make_config):
    """Its mean frames, which come with it, are subtracted from the first step on."""
    words = ["model.center_input=true", "online.initial_epsilon=0.0", "online.final_epsilon=0.0"]
    words += ["init.load=all", f"init.policy={played / POLICY_FILE}"]
    trainer = build_trainer(make_config(*words, "data.games=[Freeway,Breakout]"))
    store = trainer.replay.growing.store
    policy = load_policy(played / POLICY_FILE)
    for game in ("Breakout", "Freeway"):
        recording = store.recording(game)
        batch = OfflineAtariReplay(store, batch_size=1, games=[game])[: recording.num_steps]
        batch["game_id"] = torch.full_like(batch["game_id"], ("Breakout", "Freeway").index(game))
        assert torch.equal(policy(batch)["action"], torch.from_numpy(np.array(recording.actions)).long())
    trainer.replay.shutdown()
    with pytest.raises(ConfigError, match=r"must be 1 with games that no loaded policy can play, Pong, got 0\.0"):
        build_trainer(make_config(*words, "data.games=[Breakout,Pong]", name="new"))
    with pytest.raises(ConfigError, match="with games that no loaded policy can play, Breakout, Freeway, got"):
        build_trainer(make_config(*words[:-1], name="none"))


def test_offline_transitions_are_mixed_in(played, make_config):
    mixed = make_config(f"online.offline_store={played / 'store'}", "online.offline_fraction=0.5", "data.prefetch=0")
    trainer = build_trainer(mixed)
    batch = trainer.replay.sample()
    trainer.replay.shutdown()
    data = replace(mixed.data, batch_size=2)
    other = OfflineAtariReplay(
        played / "store", batch_size=2, games=data.games, n_steps=data.n_steps, seed=mixed.seed + 1
    )
    assert batch.shape == (4,)
    assert torch.equal(batch["observation"][2:], other.sample()["observation"])


def test_the_learner_sees_no_more_than_the_capacity(make_config):
    trainer = build_trainer(make_config("online.capacity_transitions_per_game=50"))
    for _ in range(9):
        trainer.replay.sample()
    sizes = np.diff(trainer.replay._replay._storage.game_offsets)
    held = [recording.num_steps for recording in trainer.replay.growing.store.recordings]
    trainer.replay.shutdown()
    assert (sizes <= 50).all() and min(held) > 50


def test_an_emulator_that_dies_leaves_what_was_committed(make_config, monkeypatch):
    config, receive, calls = make_config(), Slot.receive, []

    def dying(slot):
        receive(slot)
        calls.append(slot)
        if len(calls) == 240:
            raise RuntimeError("the emulator is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "receive", dying)
        with pytest.raises(EmulatorError, match=r"emulator 3 of Freeway failed at step .*: the emulator is gone"):
            train(config)
    assert FrameStore.open(Path(config.run_dir) / "store").recording("Freeway").num_steps > 0
    train(config)


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_while_acting_stops_the_run_and_room_continues_it(played, small_disk, make_config):
    config = make_config(f"data.store={small_disk / 'store'}")
    with pytest.raises(OSError, match="DISK FULL: what was committed stays"):
        train(config)
    store = FrameStore.open(small_disk / "store")
    assert sum(recording.num_steps for recording in store.recordings) > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(config)
    assert contents(small_disk / "store") == contents(played / "store")


def test_a_disk_without_room_for_any_checkpoint_stops_the_run_and_room_continues_it(played, small_disk, make_config):
    """The store lies elsewhere: it holds what was played until the third checkpoint failed."""
    config = make_config(f"data.store={small_disk.parent / 'store'}", f"run_dir={small_disk / 'run'}")
    with pytest.raises(OSError, match="3 checkpoints in a row could not be written"):
        train(config)
    assert FrameStore.open(small_disk.parent / "store").recording("Breakout").num_steps > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(config)
    assert contents(small_disk.parent / "store") == contents(played / "store")


def test_a_run_continues_where_its_offline_store_was_moved(played, make_config, tmp_path):
    shutil.copytree(played / "store", tmp_path / "before")
    words = ["online.offline_fraction=0.5", "trainer.num_gradient_steps=9"]
    first = make_config(f"online.offline_store={tmp_path / 'before'}", *words)
    through = weights(train(first))
    for checkpoint in list_checkpoints(Path(first.run_dir) / "checkpoints")[1:]:
        checkpoint.unlink()
    (tmp_path / "before").rename(tmp_path / "after")
    again = weights(train(make_config(f"online.offline_store={tmp_path / 'after'}", *words)))
    assert all(torch.equal(value, again[key]) for key, value in through.items())


def test_the_store_of_another_run_is_not_touched(played, make_config):
    before = contents(played / "store")
    with pytest.raises(ValueError, match=r"what this run played, got source .*, played_by\.seed 0, not 1; choose"):
        train(make_config("seed=1", f"data.store={played / 'store'}"))
    assert contents(played / "store") == before


def test_a_run_does_not_continue_with_other_online_settings_or_without_its_store(played, tmp_path, make_config):
    with pytest.raises(ConfigError, match=r"online.final_epsilon: 0.02 there, 0.5 now"):
        train(replace_run_dir(make_config("online.final_epsilon=0.5"), played))


def replace_run_dir(config, folder):
    return replace(config, run_dir=str(folder), data=replace(config.data, store=str(folder / "store")))


def test_a_run_whose_store_is_gone_does_not_continue(make_config, monkeypatch):
    config, update = make_config(), Trainer.update

    def dying(self, batch):
        if self.step == 8:
            raise KeyboardInterrupt
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    (Path(config.run_dir) / "store").rename(Path(config.run_dir) / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is not a store"):
        train(config)
    assert not (Path(config.run_dir) / "store").exists()


def test_a_run_whose_checkpoints_are_gone_does_not_wipe_what_it_played(make_config):
    """Its last whole episodes began at step 7; a start that never saved would have ended at the fourth checkpoint."""
    config = make_config("trainer.checkpoint_interval_gradient_steps=1")
    train(config)
    before = contents(Path(config.run_dir) / "store")
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    with pytest.raises(ValueError, match="of a run whose checkpoints are gone"):
        train(config)
    assert contents(Path(config.run_dir) / "store") == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.first_fraction=0.5"], "data.first_fraction must be 1.0 online"),
        (["online.num_emulators=3"], "online.num_emulators must be a multiple of the number of games, 2, got 3"),
        (["online.offline_fraction=0.5"], "online.offline_fraction must be 0 without online.offline_store"),
        (
            ["online.offline_store=x", "online.offline_fraction=0.1"],
            "such that a batch of data.batch_size=4 has a",
        ),
        (["online.commit_interval_gradient_steps=2"], "must be at least trainer.log_interval_gradient_steps=3"),
        (["online.shard_frames=30"], "online.shard_frames must be a multiple of 20"),
        (["online.final_epsilon=2"], r"online.final_epsilon must be in \[0, 1\]"),
        (["online.initial_epsilon=0.1"], "online.initial_epsilon must be 1 without init.load=all, as"),
        (
            ["online.initial_epsilon=0.1", "init.load=all", "online.final_epsilon=0.2"],
            "must be at most online.initial_",
        ),
        (["online.initial_epsilon=0.1", "init.policy=x"], "online.initial_epsilon must be 1 without init.load=all"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_a_method_without_values_does_not_act(make_config):
    with pytest.raises(ConfigError, match=r"method\.name must be one that learns values to act by"):
        train(make_config("method=bc"))


def test_the_command_takes_the_online_settings_of_its_scale(capsys):
    assert main(["train-online", "scale=cpu", "data.games=Breakout", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "store: runs/online/store" in printed and "num_emulators: 4" in printed and "cql_alpha: 0.0" in printed
    assert main(["train", "scale=cpu", "data.store=x", "--print-config"]) == 0
    assert "online: null" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_every_scale_has_online_settings(scale):
    config = compose_run_config([f"scale={scale}", f"online={scale}", "data.games=Pong"])
    assert config.online is not None and (config.method.cql_alpha, config.method.double_q) == (0.0, True)
