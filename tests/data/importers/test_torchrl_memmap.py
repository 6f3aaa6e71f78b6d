"""Against folders that TorchRL's own class writes."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, import_dqn_replay, import_torchrl_memmap

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl.collectors 0.14 warns about a class of its own.
    from torchrl.data.datasets import AtariDQNExperienceReplay


@pytest.fixture
def log(dopamine, tmp_path):
    """Rows: A 0-3 (1 step), B 4-13 (7), C 14-18 (2), D 19-30 (9); logged at 9, 19, 29 and, finally, 31."""
    log = dopamine.Log(tmp_path / "dqn" / "Pong" / "1" / "replay_logs", 10, 6)
    for num_steps in (1, 7, 2, 9):
        log.play(num_steps)
    log.log_final()
    for number, files in AtariDQNExperienceReplay._list_runs(log.folder).items():
        target = tmp_path / "torchrl" / "Pong" / "1" / str(number)
        AtariDQNExperienceReplay._preproc_run(target, {number: files}, number)
    (tmp_path / "torchrl" / "Pong" / "1" / "processed.json").write_text(json.dumps({"processed": 4}))
    return log


@pytest.fixture
def store(tmp_path):
    return FrameStore.create(tmp_path / "store", chunk_frames=2, shard_frames=8)


@pytest.mark.filterwarnings("ignore:This dataset is no longer available:DeprecationWarning")
def test_torchrl_reads_what_it_wrote(log, tmp_path):
    """The folders really are a data set of TorchRL's."""
    dataset = AtariDQNExperienceReplay("Pong/1", batch_size=4, root=tmp_path / "torchrl", download=False)
    assert len(dataset) == 40
    np.testing.assert_array_equal(dataset[3]["observation"], log.episodes[0].frames[0])
    assert dataset[3]["next", "terminated"].item()
    loaded = TensorDict.load_memmap(tmp_path / "torchrl" / "Pong" / "1" / "1")
    assert loaded["add_count"].item() == 19
    assert loaded["data", "observation"].shape == torch.Size([11, 84, 84])


def test_same_data_as_through_the_original_files(dopamine, lab, log, tmp_path, store):
    (summary,) = import_torchrl_memmap(tmp_path / "torchrl", store.path, games="Pong")
    expected = dopamine.expected(log, "Pong", range(4))
    dopamine.check_same(dopamine.stored(store, "Pong"), expected)
    dopamine.check_transitions(store, "Pong", expected, lab)
    original = FrameStore.create(tmp_path / "original", chunk_frames=2, shard_frames=8)
    assert import_dqn_replay(tmp_path / "dqn", original.path, games="Pong", checkpoints="0-3") == [summary]
    mine, theirs = (lab.tree(s.path) for s in (store, original))
    assert {name for name in mine if mine[name] != theirs[name]} == {"Pong/1/manifest.json", "recordings.txt"}
    assert store.recording("Pong").manifest.source == "DQN-Replay through TorchRL, Pong run 1, checkpoints 0-3"


def test_some_checkpoints_and_again(dopamine, log, tmp_path, store):
    arguments = {"games": ["Pong"], "checkpoints": "1-2"}
    first = import_torchrl_memmap(tmp_path / "torchrl", store.path, **arguments)
    dopamine.check_same(dopamine.stored(store, "Pong"), dopamine.expected(log, "Pong", [1, 2]))
    assert import_torchrl_memmap(tmp_path / "torchrl", store.path, **arguments) == first
    assert first[0].dropped == {"episode start missing": 5, "padding": 6}


def test_continues_after_a_damaged_folder(dopamine, lab, log, tmp_path, store):
    whole = FrameStore.create(tmp_path / "whole", chunk_frames=2, shard_frames=8)
    import_torchrl_memmap(tmp_path / "torchrl", whole.path, games="Pong")
    rewards = tmp_path / "torchrl" / "Pong" / "1" / "2" / "data" / "next" / "reward.memmap"
    good = rewards.read_bytes()
    rewards.write_bytes(np.full(10, 5, "f4").tobytes())
    with pytest.raises(ImportFailedError, match=r"2/data/next/reward\.memmap: row 9 must be clipped"):
        import_torchrl_memmap(tmp_path / "torchrl", store.path, games="Pong")
    assert store.games == () and (store.path / ".importing" / "Pong" / "1" / "manifest.json").exists()
    rewards.write_bytes(good)
    import_torchrl_memmap(tmp_path / "torchrl", store.path, games="Pong")
    assert lab.tree(store.path) == lab.tree(whole.path)


def edit(path, name, **changes):
    meta = json.loads(path.read_text())
    meta[name] |= changes
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: os.truncate(f / "data" / "observation.memmap", 999),
            r"must have 77616 bytes \(uint8 \[11, 84, 84\]",
        ),
        (lambda f: (f / "data" / "action.memmap").unlink(), r"No such file or directory: .*action\.memmap"),
        (lambda f: (f / "add_count.memmap").unlink(), r"No such file or directory: .*add_count\.memmap"),
        (lambda f: (f / "meta.json").write_text("{"), r"meta\.json does not describe add_count"),
        (lambda f: edit(f / "data" / "meta.json", "action", dtype="torch.complex64"), "does not describe action"),
        (lambda f: edit(f / "data" / "meta.json", "action", shape=[-10]), r"action\.memmap must have"),
        (
            lambda f: edit(f / "data" / "meta.json", "observation", shape=[11, 42, 168]),
            r"observation\.memmap must be uint8 \[11, 84, 84\] .*, got uint8 \[11, 42, 168\]",
        ),
        (
            lambda f: edit(f / "data" / "meta.json", "action", dtype="torch.float32"),
            r"action\.memmap must be int32 \[10\] .*, got float32 \[10\]",
        ),
        (
            lambda f: edit(f / "meta.json", "add_count", shape=[1]),
            r"add_count and invalid_range must be .* int64 \[1\]",
        ),
        (shutil.rmtree, "No such file or directory: .*/1/meta.json"),
    ],
)
def test_damaged_folders_are_named(log, tmp_path, store, damage, message):
    damage(tmp_path / "torchrl" / "Pong" / "1" / "1")
    with pytest.raises(ImportFailedError, match=message):
        import_torchrl_memmap(tmp_path / "torchrl", store.path, games="Pong", checkpoints="0-2")
    assert store.games == ()


def test_missing_games_and_bad_arguments(log, tmp_path):
    with pytest.raises(FileNotFoundError, match="Breakout/1"):
        import_torchrl_memmap(tmp_path / "torchrl", tmp_path / "store", games="Breakout")
    (tmp_path / "torchrl" / "Boxing" / "1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Boxing/1 has no checkpoint folders"):
        import_torchrl_memmap(tmp_path / "torchrl", tmp_path / "store", games="Boxing")
    with pytest.raises(ValueError, match="max_episode_steps"):
        import_torchrl_memmap(tmp_path / "torchrl", tmp_path / "store", games="Pong", max_episode_steps=0)
    assert not (tmp_path / "store").exists()
