from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore, GrowingStore, convert, summarise, verify
from torchrl_sql.data import writer as writer_module
from torchrl_sql.data.catalogue import list_recording
from torchrl_sql.data.recording import Manifest
from torchrl_sql.data.shards import DamagedFramesError


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
    assert run.episodes.tolist() == [(0, 5, True, False, 0, False, 0), (5, 6, False, True, 1, False, 0)]
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
    assert other.fingerprint() == store.fingerprint() == store.fingerprint(["Pong"]) == store.fingerprint("Pong")


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
        ({"cut": "no", "terminated": False}, r"cut must be a bool, got 'no'"),
        ({"behaviour": 1}, r"behaviour must lie in 0..0, got 1"),
        ({"behaviour": 0.7}, r"behaviour must be an integer, got 0.7"),
        ({"behaviour": "agent"}, r"behaviour must be an integer, got 'agent'"),
        ({"num_later": 0.5}, r"num_later must be an integer, got 0.5"),
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
    with pytest.raises(ValueError, match=r"within \[-1, 1\] .* got -128"):  # whose absolute value is -128, too
        writer.add_episode(**{**GOOD, "rewards": np.array([0, -128, 0], np.int8)})
    writer.add_episode(**{**GOOD, "rewards": np.array([0, -1, 1], np.int8)})
    writer.close()


def test_bad_arguments_are_named(tmp_path, store, lab):
    with pytest.raises(ValueError, match="did you mean Pong"):
        store.writer("Pongg", source="test")
    with pytest.raises(ValueError, match="run must be made of"):
        store.writer("Pong", run="../x", source="test")
    with pytest.raises(ValueError, match="rewards must be 'raw' or 'clipped'"):
        store.writer("Pong", source="test", rewards="scaled")
    for what in ("behaviours", "labels"):
        for names in ("greedy", [1]):
            with pytest.raises(ValueError, match=rf"{what} must be a sequence of names, got \[?'?{names[0]}"):
                store.writer("Pong", source="test", **{what: names})
    assert GrowingStore(tmp_path / "growing", "Pong-m0", source="test", about={}).games == ("Pong",)
    with pytest.raises(ValueError, match="labels must be a sequence of names, got 'lives'"):
        GrowingStore(tmp_path / "growing", "Pong", source="test", about={}, labels="lives")
    with pytest.raises(ValueError, match="metadata must be JSON"):
        store.writer("Pong", source="test", metadata={"x": {1, 2}})
    with pytest.raises(ValueError, match="multiple of chunk_frames, got 20 and 16"):
        FrameStore.create(tmp_path / "a", chunk_frames=16, shard_frames=20)
    with pytest.raises(ValueError, match="zstd_level"):
        FrameStore.create(tmp_path / "a", zstd_level=0)
    with pytest.raises(FileExistsError, match="is a store already"):
        FrameStore.create(store.path)
    assert FrameStore.create(store.path, exist_ok=True).encoding.chunk_frames == 4
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
        ({"version": 3}, "format version 3, this package reads version 2: upgrade the package"),
        ({"version": 1}, "format version 1, this package reads version 2: make the data anew"),
        ({"format": "something"}, "is not a torchrl_sql.run header"),
        ({"game": "Breakout"}, "game must be 'Pong' as its folder is, got 'Breakout'"),
        ({"run": "../../etc"}, "run must be '0' as its folder is"),
        ({"num_steps": "5"}, "num_steps must be a JSON int, got '5'"),
        ({"num_steps": -5}, "num_steps must be >= 0"),
        ({"rewards": "scaled"}, "rewards must be 'raw' or 'clipped'"),
        ({"extra": 1}, "not a recording's manifest.*extra"),
        ({"tail": {"extra": 1}}, "not a recording's manifest.*extra"),
        ({"num_frames": 3}, "is not what was committed: its checksum is another"),
        ({"source": "elsewhere"}, "is not what was committed: its checksum is another"),
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


def test_a_lost_manifest_is_an_error_and_nothing_is_erased(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(30, True, False)]))
    lab.write(store, "Breakout", lab.make_episodes([(5, True, False)], 1000))
    (store.path / "Pong" / "0" / "manifest.json").unlink()
    before = lab.tree(store.path)
    message = f"{store.path / 'Pong' / '0'}: manifest.json is missing, but recordings.txt lists it: put it back"
    for use in (
        lambda: AtariFrameStorage(store),
        lambda: store.games,
        lambda: store.recording("Pong"),
        lambda: store.writer("Pong", source="test"),
        lambda: list(summarise(store)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert lab.tree(store.path) == before
    assert len(AtariFrameStorage(store, "Breakout")) == 5  # The other game is as good as before.
    shutil.rmtree(store.path / "Pong")
    with pytest.raises(ValueError, match=message):
        AtariFrameStorage(store)
    listed = (store.path / "recordings.txt").read_text().splitlines()
    (store.path / "recordings.txt").write_text(listed[0] + "\n")  # The user does not want it any more.
    assert store.games == ("Breakout",)
    lab.write(store, "Pong", lab.make_episodes([(7, True, False)]))
    assert len(AtariFrameStorage(store)) == 12
    lines = [f"{recording.game}/0 {recording.manifest.checksum}" for recording in store.recordings]
    assert (store.path / "recordings.txt").read_text().splitlines() == lines


def test_an_earlier_or_another_recording_is_not_taken_for_the_last_one(store, lab, tmp_path):
    """Each is whole in itself: nothing but the list can tell."""
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    shutil.copytree(store.path / "Pong" / "0", tmp_path / "earlier")
    lab.write(store, "Pong", lab.make_episodes([(30, True, False)], 100))
    other = FrameStore.create(tmp_path / "other", chunk_frames=4, shard_frames=8)
    lab.write(other, "Pong", lab.make_episodes([(5, True, False)], 500))
    message = "manifest.json is not the one that recordings.txt lists"
    for folder in (tmp_path / "earlier", other.path / "Pong" / "0"):
        shutil.rmtree(store.path / "Pong" / "0")
        shutil.copytree(folder, store.path / "Pong" / "0")
        assert [message in damage.reason for damage in verify(store)] == [True]
        for use in (lambda: AtariFrameStorage(store), lambda: store.writer("Pong", source="test")):
            with pytest.raises(ValueError, match=f"{store.path / 'Pong' / '0'}: {message}"):
                use()
    (store.path / "recordings.txt").write_text("")  # The user wants this one.
    assert len(AtariFrameStorage(store)) == 5 and not list(verify(store))


def test_remains_of_a_writer_that_never_committed_make_way(store, lab):
    writer = store.writer("Pong", source="test")
    lab.add(writer, lab.make_episodes([(60, True, False)]))
    writer.close(commit=False)
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    assert len(AtariFrameStorage(store)) == 5


def test_the_list_is_locked_by_what_hosts_share(store, lab, monkeypatch):
    """A lock of a folder stays on its host with NFS: two writers could lose each other's line."""
    flock, locked = fcntl.flock, []

    def watched(file, operation):
        locked.append(stat.S_IFMT(os.fstat(file).st_mode))
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", watched)
    lab.write(store, "Pong", lab.make_episodes([(3, True, False)]))
    assert len(locked) > 1 and set(locked) == {stat.S_IFREG}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recordings.txt is missing: put it back"),
        ("Pong/0\n", "must have lines <Game>/<run> <checksum>, got 'Pong/0'"),
        ("Pong/0/1 00000000\n", "got 'Pong/0/1 00000000'"),
        ("\n", "got ''"),
    ],
)
def test_a_damaged_list_of_recordings_is_named(store, lab, text, message):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    file = store.path / "recordings.txt"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ValueError, match=f"{file.parent}/.*{message}"):
        FrameStore.open(store.path)


def rewrite_manifest(recording, **changes: object) -> None:
    """A manifest that is consistent in itself."""
    manifest = dataclasses.replace(recording.manifest, **changes)
    (recording.path / "manifest.json").write_text(manifest.to_json())
    list_recording(recording.path, manifest.checksum)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 9}, "episodes.bin has num_frames 11, its manifest says 9"),
        ({"num_steps": 10}, "episodes.bin has num_steps 11, its manifest says 10"),
        ({"num_episodes": 1}, "CRC32 does not match the manifest"),
        ({"num_sealed_chunks": 0}, "frames must have 0 full chunks as its manifest says, got 2 of 4 frames"),
    ],
)
def test_a_manifest_that_is_not_that_of_the_episodes_is_refused(store, lab, changes, message):
    """Frames of another recording would be read."""
    lab.write(store, "Pong", lab.make_episodes([(5, True, False), (6, False, False)]))
    rewrite_manifest(store.recording("Pong"), **changes)
    with pytest.raises(ValueError, match=message):
        AtariFrameStorage(store)
    assert any(message in str(damage) for damage in verify(store))


def test_a_manifest_with_labels_names_them(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    recording = store.recording("Pong")
    rewrite_manifest(recording, crc32={**recording.manifest.crc32, "labels": 0})
    with pytest.raises(ValueError, match=r"manifest\.json: labels must be a JSON list, got None"):
        store.recording("Pong")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["first_frame"].__setitem__(1, 6), "each where the one before ends"),
        (lambda table: table["num_steps"].__setitem__(slice(None), [11, 0]), "at least one step"),
        (lambda table: table["num_later"].__setitem__(0, 1), "puts an episode before the first"),
    ],
)
def test_an_episode_table_with_gaps_is_refused(store, lab, change, message):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False), (6, True, False)]))
    recording = store.recording("Pong")
    table = recording.episodes.copy()
    change(table)
    (recording.path / "episodes.bin").write_bytes(table.tobytes())
    rewrite_manifest(recording, crc32={**recording.manifest.crc32, "episodes": zlib.crc32(table.tobytes())})
    with pytest.raises(ValueError, match=message):
        AtariFrameStorage(store)


def test_a_writer_does_not_go_on_from_damaged_frames(store, lab):
    """It would write them anew, under a checksum that is right."""
    lab.write(store, "Pong", lab.make_episodes([(13, True, False)]))
    shard = store.path / "Pong" / "0" / "frames" / "c" / "1" / "0" / "0"
    older = shard.read_bytes()
    lab.write(store, "Pong", lab.make_episodes([(2, True, False)], 100))
    shard.write_bytes(older)
    with pytest.raises(DamagedFramesError, match=f"{shard} .* not the one that was committed here"):
        store.writer("Pong", source="test")


def test_a_writer_refuses_other_chunks_than_those_of_the_recording(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(13, True, False)]))
    edit_json(store.path / "store.json", chunk_frames=2)
    message = r"must have \(chunks, shards\) of \(2, 8\) frames in zstd as store.json says, got \(4, 8\) in zstd"
    with pytest.raises(ValueError, match=message):
        FrameStore.open(store.path).writer("Pong", source="test")


@pytest.mark.parametrize(
    "changes", [{"shard_frames": 0}, {"shard_frames": -16}, {"chunk_frames": 0}, {"zstd_level": 40}]
)
def test_settings_of_a_store_are_checked_when_it_is_opened(store, changes):
    edit_json(store.path / "store.json", **changes)
    with pytest.raises(ValueError, match=f"{store.path / 'store.json'}: (shard_frames|zstd_level) must"):
        FrameStore.open(store.path)


def test_a_relative_path_is_that_of_when_the_store_was_opened(tmp_path, monkeypatch, lab):
    monkeypatch.chdir(tmp_path)
    stores = [FrameStore.create("store", chunk_frames=4, shard_frames=8)]
    lab.write(stores[0], "Pong", lab.make_episodes([(5, True, False)]))
    stores.append(FrameStore.open("store"))
    growing = GrowingStore("growing", ["Pong"], source="test", about={})
    storage = AtariFrameStorage(stores[1])
    copy = pickle.dumps(storage)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert all(store.path == tmp_path / "store" and store.games == ("Pong",) for store in stores)
    assert not list(verify(stores[0]))
    assert (storage[:] == pickle.loads(copy)[:]).all()
    growing.open()
    growing.close()
    assert growing.store.path == tmp_path / "growing"


def test_lz4_takes_as_many_frames_a_chunk_as_one_block_holds(tmp_path):
    frames = np.repeat(np.arange(2, dtype=np.uint8), 37)[:, None, None] * np.ones((84, 84), np.uint8)
    store = FrameStore.create(tmp_path / "37", codec="lz4", chunk_frames=37, shard_frames=37)
    with store.writer("Pong", source="test") as writer:
        writer.add_episode(frames, np.zeros(74, int), np.zeros(74), True)
    np.testing.assert_array_equal(AtariFrameStorage(store)[:]["observation"][:, -1].numpy(), frames)
    assert not list(verify(store))
    message = "chunk_frames must be at most 37 with lz4, whose blocks hold 262,144 bytes, got 38: choose fewer, or zstd"
    with pytest.raises(ValueError, match=message):
        FrameStore.create(tmp_path / "38", codec="lz4", chunk_frames=38, shard_frames=38)
    zstd = FrameStore.create(tmp_path / "zstd", chunk_frames=38, shard_frames=38)
    with pytest.raises(ValueError, match=message):
        convert(zstd, tmp_path / "38", codec="lz4")
    assert {path.name for path in tmp_path.iterdir()} == {"37", "zstd"}
    file = zstd.path / "store.json"
    file.write_text(file.read_text().replace('"zstd"', '"lz4"'))
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        FrameStore.open(zstd.path)


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


CREATES = """
import sys
from torchrl_sql.data import FrameStore
for path in sys.stdin:
    FrameStore.create(path.strip(), exist_ok=True)
"""


def test_processes_may_create_one_store_at_the_same_time(tmp_path):
    command = [sys.executable, "-c", CREATES]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for number in range(50):
        for process in processes:
            process.stdin.write(f"{tmp_path / str(number)}\n")
            process.stdin.flush()
    assert [process.communicate(timeout=300)[1] for process in processes] == [""] * 3
