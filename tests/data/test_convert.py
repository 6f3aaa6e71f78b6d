from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.cli import main
from torchrl_sql.data import AtariFrameStorage, FrameStore, convert, verify
from torchrl_sql.data.recording import drop_recording


@pytest.fixture
def filled(store, lab):
    """Two games, three recordings; an episode out of the order of play, one that was cut, metadata and behaviours."""
    pong = lab.make_episodes([(5, False, True), (13, True, False), (9, True, True)])
    with store.writer("Pong", source="a", behaviours=["weak", "strong"], metadata={"position": 7}) as writer:
        for index, e in enumerate(pong):
            later = int(index == 2)
            writer.add_episode(e.frames, e.actions, e.rewards, e.terminated, behaviour=index % 2, num_later=later)
    with store.writer("Breakout", run="1", source="b", rewards="clipped") as writer:
        e = lab.make_episode(50, 10, terminated=False)
        writer.add_episode(e.frames, e.actions, np.sign(e.rewards), False, cut=True)
    lab.write(store, "Breakout", lab.make_episodes([(17, True, False)], 100), run="2")
    return store


def assert_same(converted, store):
    assert (AtariFrameStorage(converted)[:] == AtariFrameStorage(store)[:]).all()
    for new, old in zip(converted.recordings, store.recordings, strict=True):
        assert (new.game, new.name) == (old.game, old.name)
        for key in ("source", "rewards", "behaviours", "metadata", "num_frames", "num_steps", "num_episodes"):
            assert getattr(new.manifest, key) == getattr(old.manifest, key)
        np.testing.assert_array_equal(new.open_frames().read().result(), old.open_frames().read().result())
        for name in ("actions.u8", "rewards.f32", "episodes.bin"):
            assert (new.path / name).read_bytes() == (old.path / name).read_bytes()
    assert not list(verify(converted))


def test_there_and_back_the_files_are_the_same(filled, tmp_path, lab):
    before = lab.tree(filled.path)
    lz4 = convert(filled, tmp_path / "lz4", codec="lz4")
    assert (lz4.encoding.codec, lz4.encoding.chunk_frames, lz4.encoding.shard_frames) == ("lz4", 4, 8)
    assert_same(lz4, filled)
    again = convert(lz4, tmp_path / "zstd", codec="zstd")
    assert lab.tree(again.path) == lab.tree(filled.path) == before
    assert lz4.fingerprint() != filled.fingerprint() == again.fingerprint()


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_conversion_that_was_stopped_continues_to_the_same_files(data, tmp_path_factory, lab):
    folder = tmp_path_factory.mktemp("stopped")
    store = FrameStore.create(folder / "store", chunk_frames=2, shard_frames=4)
    for game in ("Pong", "Breakout"):
        lab.write(store, game, lab.make_episodes(data.draw(lab.shapes)))
    whole = convert(store, folder / "whole", codec="lz4")

    def stop(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    for _ in range(3):
        left = data.draw(st.integers(0, 5))
        try:
            convert(store, folder / "part", codec="lz4", progress=stop)
            break
        except KeyboardInterrupt:
            assert not (folder / "part").exists()
    else:
        convert(store, folder / "part", codec="lz4")
    assert lab.tree(folder / "part") == lab.tree(whole.path)
    assert {path.name for path in folder.iterdir()} == {"store", "whole", "part"}


@pytest.mark.slow
def test_a_killed_conversion_continues_to_the_same_files(tmp_path, lab):
    store = FrameStore.create(tmp_path / "store", chunk_frames=4, shard_frames=64)
    lab.write(store, "Pong", lab.make_episodes([(40, True, False)] * 30))
    whole = convert(store, tmp_path / "whole", codec="lz4")
    command = [sys.executable, "-m", "torchrl_sql", "convert", store.path, "--codec", "lz4", "--out", tmp_path / "part"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".part.*/Pong/0/manifest.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "part").exists()
    assert main([*map(str, command[3:])]) == 0
    assert lab.tree(tmp_path / "part") == lab.tree(whole.path)


def flip(file):
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


def test_damage_is_not_carried_over_and_once_it_is_mended_the_conversion_goes_on(filled, tmp_path):
    rewards = filled.path / "Pong" / "0" / "rewards.f32"
    flip(rewards)
    with pytest.raises(ValueError, match=rf"{rewards}: the CRC32 does not match the manifest"):
        convert(filled, tmp_path / "new", codec="lz4")
    assert not (tmp_path / "new").exists()
    flip(rewards)
    assert_same(convert(filled, tmp_path / "new", codec="lz4"), filled)


@pytest.mark.parametrize(
    ("member", "message"),
    [("rewards.f32", "the CRC32 does not match"), ("frames/c/0/0/0", "chunk 0: the CRC32C does not match")],
)
def test_what_was_written_is_read_back(filled, tmp_path, member, message):
    def damage(done: int, total: int) -> None:
        if done == total:
            (written,) = tmp_path.glob(f".new.*/Pong/0/{member}")
            flip(written)

    with pytest.raises(ValueError, match=rf"and was dropped: .*{message}.*\. Start again"):
        convert(filled, tmp_path / "new", codec="lz4", progress=damage)
    assert not (tmp_path / "new").exists()
    assert_same(convert(filled, tmp_path / "new", codec="lz4"), filled)


def test_a_half_made_recording_of_other_rewards_is_dropped(filled, tmp_path, lab):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(filled, tmp_path / "new", codec="lz4", progress=stop)
    (unfinished,) = tmp_path.glob(".new.*")
    half = FrameStore.open(unfinished)
    drop_recording(half.recording("Breakout"))
    e = lab.make_episode(50, 10, terminated=False)
    with half.writer("Breakout", run="1", source="b", rewards="clipped") as writer:
        writer.add_episode(e.frames, e.actions, np.zeros(10), False, cut=True)
    with pytest.raises(ValueError, match=f"dropped: rewards are not those of {filled.path}/Breakout/1. Start again"):
        convert(filled, tmp_path / "new", codec="lz4")
    assert_same(convert(filled, tmp_path / "new", codec="lz4"), filled)


def test_what_is_left_of_another_state_is_not_taken(filled, tmp_path, lab):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(filled, tmp_path / "new", codec="lz4", progress=stop)
    lab.write(filled, "Pong", lab.make_episodes([(6, True, False)], 900), run="1")
    (tmp_path / ".new.v2.lz4-0123456789abcdef.unfinished-conversion").mkdir()  # of another name
    (being_written,) = tmp_path.glob(".new.lz4-*")
    with FrameStore.open(being_written).writer("Pong", run="9", source="test"):
        assert_same(convert(filled, tmp_path / "new", codec="lz4"), filled)
    assert being_written.exists()
    shutil.rmtree(tmp_path / "new")
    assert_same(convert(filled, tmp_path / "new", codec="lz4"), filled)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"store", "new", ".new.v2.lz4-0123456789abcdef.unfinished-conversion"}


def test_what_is_in_the_way_and_what_is_there_already(filled, tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="new is there already"):
        convert(filled, tmp_path / "new", codec="lz4")
    with pytest.raises(ValueError, match="is in zstd already"):
        convert(filled, tmp_path / "other", codec="zstd")
    with pytest.raises(ValueError, match="codec must be one of zstd, lz4, got 'gzip'"):
        convert(filled, tmp_path / "other", codec="gzip")
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["new"]


def test_on_the_command_line(filled, tmp_path, capsys):
    assert main(["convert", str(filled.path), "--codec", "lz4", "--out", str(tmp_path / "new")]) == 0
    assert " MB in lz4, " in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(filled.path)]) == 0
    assert " MB in zstd, " in capsys.readouterr().out


def test_the_store_of_before_is_zstd_and_an_unknown_codec_is_named(filled):
    file = filled.path / "store.json"
    fields = json.loads(file.read_text())
    assert fields.pop("codec") == "zstd"
    file.write_text(json.dumps(fields))
    assert FrameStore.open(filled.path).encoding == filled.encoding
    for value, message in (
        ("gzip", "codec must be one of zstd, lz4, got 'gzip'"),
        (["zstd"], "codec must be a JSON str"),
    ):
        file.write_text(json.dumps(fields | {"codec": value}))
        with pytest.raises(ValueError, match=f"{file}: {message}"):
            FrameStore.open(filled.path)
    file.write_text(json.dumps(fields | {"codec": "lz4"}))
    with pytest.raises(ValueError, match=r"\(4, 8\) frames in lz4 as store.json says, got \(4, 8\) in zstd"):
        FrameStore.open(filled.path).writer("Pong", source="a", behaviours=["weak", "strong"])
