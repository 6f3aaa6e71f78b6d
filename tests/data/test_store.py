from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.data import writer as writer_module
from torchrl_sql.data.recording import Manifest


def test_known_episodes_come_back(store, lab):
    first, second = lab.make_episodes([(5, True, False), (6, False, True)])
    second.behaviour = 1
    with store.writer("Pong", source="by hand", behaviours=("good", "lazy"), metadata={"note": [1, 2]}) as writer:
        lab.add(writer, [first, second])
    run = store.recording("Pong")
    assert (run.num_frames, run.num_steps, run.num_episodes) == (12, 11, 2)
    np.testing.assert_array_equal(run.open_frames()[:12].read().result(), np.concatenate([first.frames, second.frames]))
    np.testing.assert_array_equal(run.actions, np.concatenate([first.actions, second.actions]))
    np.testing.assert_array_equal(run.rewards, np.concatenate([first.rewards, second.rewards]))
    assert run.episodes.tolist() == [(0, 5, True, False, 0, False), (5, 6, False, True, 1, False)]
    np.testing.assert_allclose(run.episode_returns(), [first.rewards.sum(), second.rewards.sum()], rtol=1e-6)
    assert run.manifest.behaviours == ("good", "lazy")
    assert run.manifest.metadata == {"note": [1, 2]}
    assert store.games == ("Pong",)


def test_frames_are_a_plain_sharded_zarr_array(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(13, True, False)]))
    frames = store.path / "Pong" / "0" / "frames"
    meta = json.loads((frames / "zarr.json").read_text())
    assert meta["zarr_format"] == 3 and meta["shape"] == [13, 84, 84] and meta["data_type"] == "uint8"
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [8, 84, 84]
    (sharding,) = meta["codecs"]
    assert sharding["configuration"]["chunk_shape"] == [4, 84, 84]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert sorted(f.relative_to(frames).as_posix() for f in (frames / "c").rglob("*") if f.is_file()) == [
        "c/0/0/0",
        "c/1/0/0",
    ]


def test_readers_see_only_commits(store, lab):
    first, second = lab.make_episodes([(5, True, False), (3, True, False)])
    writer = store.writer("Pong", source="test")
    lab.add(writer, [first])
    assert store.games == ()
    writer.commit(metadata={"done": 1})
    before = AtariFrameStorage(store)
    lab.add(writer, [second])
    assert store.recording("Pong").num_steps == 5
    writer.close()
    assert store.recording("Pong").num_steps == 8
    assert store.recording("Pong").manifest.metadata == {"done": 1}
    assert len(before) == 5
    assert before[4]["next", "terminated"].item()
    np.testing.assert_array_equal(before[2]["observation"][-1].numpy(), first.frames[2])


def test_exception_inside_with_does_not_commit(store, lab):
    with pytest.raises(KeyError), store.writer("Pong", source="test") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
        raise KeyError
    assert store.games == ()
    lab.write(store, "Pong", lab.make_episodes([(4, True, False)]))
    assert store.recording("Pong").num_steps == 4


def test_empty_writer_leaves_no_run(store):
    store.writer("Pong", source="test").close()
    assert store.recordings == ()


def test_one_writer_a_run(store, lab):
    with store.writer("Pong", source="test") as writer:
        with pytest.raises(BlockingIOError, match="open in another writer"):
            store.writer("Pong", source="test")
        store.writer("Pong", run="1", source="test").close()
        lab.add(writer, lab.make_episodes([(2, True, False)]))
    store.writer("Pong", source="test").close()


def test_fingerprint_follows_contents_not_place(tmp_path, store, lab):
    episodes = lab.make_episodes([(5, True, False), (4, True, True)])
    lab.write(store, "Pong", episodes)
    other = FrameStore.create(tmp_path / "other", chunk_frames=4, shard_frames=8)
    lab.write(other, "Pong", episodes[:1])
    assert other.fingerprint() != store.fingerprint()
    lab.write(other, "Pong", episodes[1:])
    assert other.fingerprint() == store.fingerprint() == store.fingerprint(["Pong"])


GOOD = {"frames": np.zeros((3, 84, 84), np.uint8), "actions": [0, 1, 2], "rewards": [0.0, 1.0, 0.5], "terminated": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((3, 84, 84), np.float32)}, r"frames must be uint8 .* got float32 \[3, 84, 84\]"),
        ({"frames": np.zeros((3, 84, 80), np.uint8)}, r"got uint8 \[3, 84, 80\]"),
        ({"frames": np.zeros((5, 84, 84), np.uint8)}, r"with T = 3 actions, got uint8 \[5, 84, 84\]"),
        ({"frames": np.zeros((2, 84, 84), np.uint8)}, r"got uint8 \[2, 84, 84\]"),
        ({"actions": [0, 1, 18]}, r"actions must lie in 0..17, got 0..18"),
        ({"actions": [0, -1, 2]}, r"actions must lie in 0..17, got -1..2"),
        ({"actions": [0.0, 1.0, 2.0]}, r"actions must be integers .* got float64 \[3\]"),
        ({"actions": []}, r"T >= 1"),
        ({"rewards": [0.0, 1.0]}, r"rewards must be numbers \[3\], got float64 \[2\]"),
        ({"rewards": [0.0, np.nan, 0.0]}, r"rewards must be finite, got nan"),
        ({"rewards": [0.0, np.inf, 0.0]}, r"rewards must be finite, got inf"),
        ({"terminated": 1}, r"terminated must be a bool, got 1"),
        ({"behaviour": 1}, r"behaviour must lie in 0..0, got 1"),
    ],
)
def test_bad_episodes_are_refused_whole(store, change, message):
    with store.writer("Pong", source="test") as writer:
        with pytest.raises(ValueError, match=message):
            writer.add_episode(**{**GOOD, **change})
        writer.add_episode(**GOOD)
    assert store.recording("Pong").num_steps == 3


def test_clipped_runs_take_only_clipped_rewards(store):
    writer = store.writer("Pong", source="test", rewards="clipped")
    with pytest.raises(ValueError, match=r"within \[-1, 1\] .* got 2.0"):
        writer.add_episode(**{**GOOD, "rewards": [0.0, 2.0, 0.0]})
    writer.close()


def test_bad_arguments_are_named(tmp_path, store, lab):
    with pytest.raises(ValueError, match="did you mean Pong"):
        store.writer("Pongg", source="test")
    with pytest.raises(ValueError, match="run must be made of"):
        store.writer("Pong", run="../x", source="test")
    with pytest.raises(ValueError, match="rewards must be 'raw' or 'clipped'"):
        store.writer("Pong", source="test", rewards="scaled")
    with pytest.raises(ValueError, match="metadata must be JSON"):
        store.writer("Pong", source="test", metadata={"x": {1, 2}})
    with pytest.raises(ValueError, match="multiple of chunk_frames, got 20 and 16"):
        FrameStore.create(tmp_path / "a", chunk_frames=16, shard_frames=20)
    with pytest.raises(ValueError, match="zstd_level"):
        FrameStore.create(tmp_path / "a", zstd_level=0)
    with pytest.raises(FileExistsError, match="is a store already"):
        FrameStore.create(store.path)
    assert FrameStore.create(store.path, exist_ok=True).chunk_frames == 4
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="empty or new folder"):
        FrameStore.create(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match=r"store\.json is missing"):
        FrameStore.open(tmp_path / "nowhere")
    lab.write(store, "Pong", lab.make_episodes([(2, True, False)]))
    lab.write(store, "Pong", lab.make_episodes([(2, True, False)]), run="1")
    with pytest.raises(ValueError, match=r"recordings \['0', '1'\]: name one"):
        store.recording("Pong")
    with pytest.raises(ValueError, match=r"recording must be one of \['0', '1'\]"):
        store.recording("Pong", "2")
    with pytest.raises(ValueError, match=r"'Breakout' is not in the store .* which holds Pong"):
        store.recording("Breakout")
    with pytest.raises(ValueError, match=r"rewards of .* is 'raw', cannot append 'clipped'"):
        store.writer("Pong", source="test", rewards="clipped")
    store.writer("Pong", source="test").close()  # The refused writer released its lock.


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2, this package reads up to 1"),
        ({"format": "something"}, "is not a torchrl_sql.run header"),
        ({"game": "Breakout"}, "game must be 'Pong' as its folder is, got 'Breakout'"),
        ({"run": "../../etc"}, "run must be '0' as its folder is"),
        ({"num_steps": "5"}, "num_steps must be a JSON int, got '5'"),
        ({"num_steps": -5}, "num_steps must be >= 0"),
        ({"rewards": "scaled"}, "rewards must be 'raw' or 'clipped'"),
        ({"extra": 1}, "not a recording's manifest.*extra"),
    ],
)
def test_bad_manifests_are_refused(store, lab, changes, message):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    manifest = store.path / "Pong" / "0" / "manifest.json"
    edit_json(manifest, **changes)
    with pytest.raises(ValueError, match=message) as error:
        AtariFrameStorage(store, "Pong")
    assert str(manifest) in str(error.value)


def test_newer_store_and_garbled_json(store):
    edit_json(store.path / "store.json", version=7)
    with pytest.raises(ValueError, match=r"store\.json has format version 7.*upgrade"):
        FrameStore.open(store.path)
    (store.path / "store.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        FrameStore.open(store.path)


@pytest.mark.parametrize("member", ["actions.u8", "rewards.f32", "episodes.bin", "frames/zarr.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_missing_and_short_members_are_named(store, lab, member, damage):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    file = store.path / "Pong" / "0" / member
    if damage == "missing":
        file.unlink()
    elif file.suffix == ".json":
        edit_json(file, shape=[4, 84, 84])
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises((ValueError, FileNotFoundError), match=str(file if damage == "missing" else file.parent)):
        AtariFrameStorage(store)[0]
    if file.suffix != ".json":
        with pytest.raises(ValueError, match=str(file)):
            store.writer("Pong", source="test")


def test_full_disk_leaves_the_old_store(store, lab):
    episodes = lab.make_episodes([(5, True, False), (30, True, False), (3, True, False)])
    lab.write(store, "Pong", episodes[:1])
    before = store.fingerprint()
    writer = store.writer("Pong", source="test")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises((OSError, ValueError), match=r"(?i)file too large|File size limit"):
            lab.add(writer, episodes[1:2])
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(RuntimeError, match="is failed; open a new one"):
        writer.commit()
    writer.close()
    assert store.fingerprint() == before
    assert (AtariFrameStorage(store)[:]["observation"][:, -1].numpy() == episodes[0].frames).all()
    lab.write(store, "Pong", episodes[2:])
    assert (AtariFrameStorage(store)[5:]["observation"][:, -1].numpy() == episodes[2].frames).all()


def test_no_permission(public_folder, read_only, lab):
    with read_only(public_folder), pytest.raises(PermissionError, match=f"{public_folder}/store"):
        FrameStore.create(public_folder / "store")
    store = FrameStore.create(public_folder / "store", chunk_frames=4, shard_frames=8)
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    before = lab.tree(store.path)
    with read_only(store.path), pytest.raises(PermissionError, match="Breakout"):
        store.writer("Breakout", source="test")
    with read_only(store.path / "Pong" / "0"), pytest.raises(PermissionError, match="Pong/0"):
        lab.write(store, "Pong", lab.make_episodes([(3, True, False)]))
    assert lab.tree(store.path) == before and len(AtariFrameStorage(store)) == 5


# Properties


@settings(max_examples=20, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 4), chunks_per_shard=st.integers(1, 4))
def test_append_and_reopen_equal_one_writing(lab, data, chunk, chunks_per_shard):
    """Round trip; and equal episodes give equal files, whatever commits and reopenings lay between."""
    episodes = lab.make_episodes(data.draw(lab.shapes))
    cuts = data.draw(st.lists(st.sampled_from(["go on", "commit", "reopen"]), min_size=len(episodes)))
    with tempfile.TemporaryDirectory() as folder:
        once, often = (
            FrameStore.create(Path(folder) / name, chunk_frames=chunk, shard_frames=chunk * chunks_per_shard)
            for name in ("once", "often")
        )
        lab.write(once, "Pong", episodes)
        writer = often.writer("Pong", source="test")
        for episode, cut in zip(episodes, cuts, strict=False):
            lab.add(writer, [episode])
            if cut == "commit":
                writer.commit()
            elif cut == "reopen":
                writer.close()
                writer = often.writer("Pong", source="test")
        writer.close()
        assert lab.tree(once.path) == lab.tree(often.path)
        run = often.recording("Pong")
        stored = run.open_frames()[: run.num_frames].read().result()
        np.testing.assert_array_equal(stored, np.concatenate([e.frames for e in episodes]))
        np.testing.assert_array_equal(run.rewards, np.concatenate([e.rewards for e in episodes]))


def check_prefix(store: FrameStore, episodes: list, lab) -> int:
    """The store holds exactly the first so many episodes; returns how many."""
    if not store.games:
        return 0
    run = store.recording("Pong")
    kept = episodes[: run.num_episodes]
    batch = AtariFrameStorage(store)[:]
    expected = list(lab.reference(kept, 1, 0.99))
    assert len(expected) == len(batch)
    np.testing.assert_array_equal(batch["observation"].numpy(), np.stack([x["observation"] for x in expected]))
    np.testing.assert_array_equal(batch["action"].numpy(), [x["action"] for x in expected])
    return run.num_episodes


def test_killed_at_any_write_leaves_a_commit_and_resumes_to_the_same_bytes(tmp_path, lab, monkeypatch):
    """Every state of the disk between two writes of a writer, as SIGKILL would leave it."""
    episodes = lab.make_episodes([(5, True, False), (13, False, True), (2, True, False), (9, True, False)])
    store = FrameStore.create(tmp_path / "store", chunk_frames=2, shard_frames=8)
    snapshots = []

    def snapshot() -> None:
        snapshots.append(tmp_path / f"at{len(snapshots)}")
        shutil.copytree(store.path, snapshots[-1])

    def watched(function):
        def call(*args, **kwargs):
            snapshot()
            return function(*args, **kwargs)

        return call

    for name in ("_write_shard", "_set_rows", "_append", "_open_member"):
        monkeypatch.setattr(writer_module.RecordingWriter, name, watched(getattr(writer_module.RecordingWriter, name)))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    for part in (episodes[:2], episodes[2:]):
        with store.writer("Pong", source="test") as writer:
            for episode in part:
                lab.add(writer, [episode])
                writer.commit()
    monkeypatch.undo()
    snapshot()

    expected = lab.tree(store.path)
    found = []
    for folder in snapshots:
        partial = FrameStore.open(folder)
        found.append(check_prefix(partial, episodes, lab))
        lab.write(partial, "Pong", episodes[found[-1] :])
        assert lab.tree(folder) == expected
        shutil.rmtree(folder)
    assert set(found) == {0, 1, 2, 3, 4} and found == sorted(found)


def test_long_remains_of_a_killed_writer_vanish(tmp_path, store, lab):
    first, short, long = lab.make_episodes([(5, True, False), (2, True, False), (60, True, False)])
    clean = FrameStore.create(tmp_path / "clean", chunk_frames=4, shard_frames=8)
    lab.write(clean, "Pong", [first, short])
    lab.write(store, "Pong", [first])
    killed = store.writer("Pong", source="test")
    lab.add(killed, [long])
    killed.close(commit=False)
    assert lab.tree(store.path) != lab.tree(clean.path)
    lab.write(store, "Pong", [short])
    assert lab.tree(store.path) == lab.tree(clean.path)


KILLED = """
import sys
import numpy as np
from torchrl_sql.data import FrameStore
store = FrameStore.open(sys.argv[1])
writer = store.writer("Pong", source="test")
print("ready", flush=True)
for number in range(writer.num_episodes, 100000):
    steps = number % 7 + 1
    writer.add_episode(np.full((steps, 84, 84), number % 251 + 1, np.uint8), [number % 18] * steps, [0.0] * steps, True)
    if number % 3 == 0:
        writer.commit()
"""


@pytest.mark.slow
def test_sigkill_leaves_a_valid_store(store):
    done = 0
    for delay in (0.0, 0.013):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(store.path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        while not store.games or store.recording("Pong").num_episodes < done + 6:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        run = store.recording("Pong")
        done = run.num_episodes
        numbers = np.repeat(np.arange(done), np.arange(done) % 7 + 1)
        np.testing.assert_array_equal(run.actions, numbers % 18)
        frames = run.open_frames()[: run.num_frames].read().result()
        np.testing.assert_array_equal(
            frames, (numbers % 251 + 1).astype(np.uint8)[:, None, None].repeat(84, 1).repeat(84, 2)
        )
    assert done >= 12


def test_manifest_text_is_stable(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    file = store.path / "Pong" / "0" / "manifest.json"
    assert Manifest.read(file).to_json() == file.read_text()


def test_creation_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json.tmp").write_text("{")
    assert FrameStore.create(tmp_path / "store").games == ()
