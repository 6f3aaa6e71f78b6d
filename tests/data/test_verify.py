from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore
from torchrl_sql.data.damage import Damage, verify
from torchrl_sql.data.frames import shard_path
from torchrl_sql.data.shards import Shard


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
    return Shard(file, 2).index[2 * chunk]


def test_intact(intact):
    calls = []
    assert list(verify(intact, progress=lambda done, total: calls.append((done, total)))) == []
    assert calls == [(k, 12) for k in range(1, 13)]  # 2 x 3 flat files, 4 + 2 shards.


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


def test_disk_that_cannot_read_is_named(copy, monkeypatch):
    bad = shard_path(copy.recording("Pong").path / "frames", 1)

    class Disk(io.FileIO):
        def read(self, size=-1):
            if self.name == str(bad) and self.tell() == chunk_offset_of_bad:
                raise OSError(5, "Input/output error")
            return super().read(size)

    chunk_offset_of_bad = chunk_offset(bad, 1)
    open_path = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode, **kw: Disk(str(self)) if mode == "rb" else open_path(self, mode, **kw)
    )
    (found,) = verify(copy)
    assert (found.file, found.reason) == (bad, "chunk 1: [Errno 5] Input/output error")


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
    """In any file but the manifests, wherever committed data lies; and nothing else is blamed."""
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore.open(shutil.copytree(intact.path, Path(folder) / "store"))
        run = data.draw(st.sampled_from(store.recordings))
        shards = [shard_path(run.path / "frames", number) for number in range(-(-run.num_frames // 8))]
        file = data.draw(
            st.sampled_from([run.path / name for name in ("actions.u8", "rewards.f32", "episodes.bin")] + shards)
        )
        end = file.stat().st_size
        padded = file == shards[-1] and run.num_frames % 8 <= 4  # Its second chunk is padding.
        unused = range(chunk_offset(file, 1), end - 36) if padded else range(0)
        position = data.draw(st.integers(0, end - 1).filter(lambda p: p not in unused))
        flip(file, position, data.draw(st.integers(0, 7)))
        assert {damage.file for damage in verify(store)} == {file}
