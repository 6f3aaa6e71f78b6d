from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.data.catalogue import list_recording
from torchrl_sql.data.damage import Damage, verify
from torchrl_sql.data.frames import shard_path
from torchrl_sql.data.shards import DamagedFramesError, ShardFiles


@pytest.fixture(scope="module")
def intact(tmp_path_factory, lab) -> FrameStore:
    """Two games; 29 and 13 frames in chunks of 4 and shards of 8."""
    store = FrameStore.create(tmp_path_factory.mktemp("intact") / "store", chunk_frames=4, shard_frames=8)
    lab.write(store, "Pong", lab.make_episodes([(5, False, True), (13, True, False), (9, True, True)]))
    lab.write(store, "Breakout", lab.make_episodes([(13, True, False)], 1000), run="a")
    return store


@pytest.fixture
def copy(intact, tmp_path) -> FrameStore:
    shutil.copytree(intact.path, tmp_path / "copy")
    return FrameStore.open(tmp_path / "copy")


def flip(file: Path, position: int, bit: int = 4) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def chunk_offset(file: Path, chunk: int) -> int:
    return int(np.frombuffer(file.read_bytes()[-36:-4], "<u8")[2 * chunk])


def test_intact(intact):
    calls = []
    assert list(verify(intact, progress=lambda done, total: calls.append((done, total)))) == []
    assert calls == [(k, 14) for k in range(1, 15)]  # 2 x 4 flat files, 4 + 2 shards.


def test_each_bad_chunk_is_named(copy):
    frames = copy.recording("Pong").path / "frames"
    first, last = shard_path(frames, 0), shard_path(frames, 3)
    flip(first, chunk_offset(first, 1))
    flip(last, chunk_offset(last, 0) + 40)
    flip(last, chunk_offset(last, 1) + 10)
    shutil.rmtree(shard_path(frames, 2).parent)
    expected = [
        (first, "chunk 1: the CRC32C does not match", (4, 6)),  # Frames 4-7, of which 5 is a final one.
        (shard_path(frames, 2), "the file is missing", (15, 22)),  # Frames 16-18 and 19-23.
        (last, "chunk 0: the CRC32C does not match", (23, 26)),
        (last, "chunk 1: the CRC32C does not match", (26, 26)),
    ]
    found = list(verify(copy))
    assert found == [Damage(game="Pong", recording="0", file=f, reason=r, transitions=t) for f, r, t in expected]
    assert str(found[0]) == f"Pong, recording '0', transitions 4 to 6: {first}: chunk 1: the CRC32C does not match"


def test_a_shard_that_cannot_be_read_any_more_is_named_chunk_by_chunk(copy):
    recording = copy.recording("Pong")
    files, shard = ShardFiles([recording]), shard_path(recording.path / "frames", 1)
    assert list(files.check_shard(1)) == []
    os.truncate(shard, chunk_offset(shard, 1))
    reasons = [error.reason for error in files.check_shard(1)]
    assert reasons == ["chunk 1: the file was cut while it was in use, or the disk cannot read it"]


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize("first", ["Pong/0/frames/c/0/0/0", "Pong/0/frames/c/2/0/0"])
@pytest.mark.parametrize("second", ["Pong/0/frames/c/1/0/0", "Breakout/a/frames/c/0/0/0"])
def test_swapped_shards_are_named_and_not_read(store, first, second):
    """Each is intact. All chunks have the same size, so that the indices of the shards are equal, too."""
    for game, run, value in (("Pong", "0", 10), ("Breakout", "a", 90)):
        with store.writer(game, run=run, source="test") as writer:
            for tag in range(value, value + 24):
                writer.add_episode(np.full((1, 84, 84), tag, np.uint8), [0], [0.0], True)
    swap(store.path / first, store.path / second)
    assert {damage.file for damage in verify(store)} == {store.path / first, store.path / second}
    with pytest.raises(DamagedFramesError, match="not the one that was committed here"):
        AtariFrameStorage(store)[:]


def test_swapped_folders_of_frames_are_named(copy, lab):
    lab.write(copy, "Breakout", lab.make_episodes([(5, False, True), (13, True, False), (9, True, True)], 500), run="b")
    pong, other = copy.path / "Pong" / "0" / "frames", copy.path / "Breakout" / "b" / "frames"
    pong.rename(copy.path / "aside")
    other.rename(pong)
    (copy.path / "aside").rename(other)
    assert {damage.game for damage in verify(copy)} == {"Pong", "Breakout"}


def test_a_copy_made_during_a_commit_is_named(store, lab, tmp_path):
    """The tail's shard is older than the manifest: its later frames would read as black."""
    frames = store.path / "Pong" / "0" / "frames"
    lab.write(store, "Pong", lab.make_episodes([(6, True, False)]))
    shutil.copytree(frames / "c", tmp_path / "c")
    lab.write(store, "Pong", lab.make_episodes([(2, True, False)], 100))
    shutil.rmtree(frames / "c")
    shutil.copytree(tmp_path / "c", frames / "c")
    (damage,) = verify(store)
    assert damage.file == shard_path(frames, 0)
    assert damage.reason == "chunk 1: it is intact, but not the one that was committed here: of another file or state"
    with pytest.raises(DamagedFramesError):
        AtariFrameStorage(store)[:]


def test_an_earlier_commit_is_still_read_after_later_ones(store, lab):
    """Its last chunk was written again, with more frames in it."""
    first, second = lab.make_episodes([(6, True, False), (30, True, False)])
    manifest = store.path / "Pong" / "0" / "manifest.json"
    lab.write(store, "Pong", [first])
    before, text = AtariFrameStorage(store), manifest.read_bytes()
    lab.write(store, "Pong", [second])
    last_state = store.recording("Pong").manifest.checksum
    assert (before[:]["observation"][:, -1].numpy() == first.frames).all()
    manifest.write_bytes(text)  # As a writer that is killed during its commit leaves it.
    list_recording(manifest.parent, before._recordings[0].manifest.checksum, last_state)
    assert list(verify(store)) == []
    assert (AtariFrameStorage(store)[:]["observation"][:, -1].numpy() == first.frames).all()


@pytest.mark.parametrize("lost", ["Pong", "Pong/0", "Pong/0/manifest.json"])
def test_a_lost_recording_is_named(copy, lost):
    path = copy.path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (damage,) = verify(copy)
    assert (damage.game, damage.recording) == ("Pong", "0")
    assert "manifest.json is missing, but recordings.txt lists it" in damage.reason


@pytest.mark.parametrize("text", ["{}", "[]", '{"shape": "x"}', "\xff"])
@pytest.mark.parametrize("file", ["frames/zarr.json", "manifest.json"])
def test_garbled_json_does_not_end_the_check(copy, file, text):
    (copy.path / "Breakout" / "a" / file).write_text(text)
    flip(copy.recording("Pong").path / "rewards.f32", 3)
    assert [damage.game for damage in verify(copy)] == ["Breakout", "Pong"]


def test_another_encoding_than_the_store_s_is_named(copy):
    file = copy.path / "store.json"
    file.write_text(file.read_text().replace('"zstd"', '"lz4"'))
    first, second = verify(FrameStore.open(copy.path))
    assert [damage.game for damage in (first, second)] == ["Breakout", "Pong"]
    assert first.reason.endswith("('lz4', 4, 8) as store.json has them, got ('zstd', 4, 8)")


def test_damage_to_flat_files(copy):
    run = copy.recording("Pong").path
    flip(run / "rewards.f32", 3)
    (run / "actions.u8").unlink()
    (run / "episodes.bin").write_bytes((run / "episodes.bin").read_bytes()[:-24])
    flip(shard_path(run / "frames", 0), 5)
    (copy.path / "Breakout" / "a" / "frames" / "zarr.json").write_text("{}")
    found = list(verify(copy))
    assert [(d.game, d.file.name) for d in found] == [
        ("Breakout", "a"),
        ("Pong", "actions.u8"),
        ("Pong", "rewards.f32"),
        ("Pong", "episodes.bin"),
        ("Pong", "0"),
    ]
    assert "zarr.json does not describe" in found[0].reason
    assert "No such file" in found[1].reason
    assert found[2].reason == "the CRC32 does not match the manifest"
    assert found[3].reason == "must hold 72 committed bytes, got 48"
    assert found[4].transitions is None and "all transitions" in str(found[4])  # The episode table is needed to tell.


def test_bad_manifest_does_not_end_the_check(copy):
    (copy.path / "Breakout" / "a" / "manifest.json").write_text("{")
    flip(copy.recording("Pong").path / "rewards.f32", 3)
    found = list(verify(copy))
    assert [(d.game, d.recording) for d in found] == [("Breakout", "a"), ("Pong", "0")]
    assert "not valid JSON" in found[0].reason


def test_remains_of_a_killed_writer_are_not_looked_at(copy, lab):
    writer = copy.writer("Pong", source="test")
    lab.add(writer, lab.make_episodes([(30, True, False)], 5000))
    writer.close(commit=False)
    assert list(verify(copy)) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(intact, data):
    """Wherever committed data lies; and nothing else is blamed."""
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore.open(shutil.copytree(intact.path, Path(folder) / "store"))
        recording = data.draw(st.sampled_from(store.recordings))
        shards = [shard_path(recording.path / "frames", index) for index in range(-(-recording.num_frames // 8))]
        names = ("actions.u8", "rewards.f32", "episodes.bin", "chunks.crc32c", "manifest.json")
        file = data.draw(st.sampled_from([recording.path / name for name in names] + shards))
        end = file.stat().st_size
        padded = file == shards[-1] and recording.num_frames % 8 <= 4  # Its second chunk is padding.
        unused = range(chunk_offset(file, 1), end - 36) if padded else range(0)
        position = data.draw(st.integers(0, end - 1).filter(lambda p: p not in unused))
        flip(file, position, data.draw(st.integers(0, 7)))
        named = {damage.file for damage in verify(store)}
        if file.name == "chunks.crc32c":
            assert file in named and named <= {file, *shards}
        else:
            assert named == {recording.path if file.name == "manifest.json" else file}
