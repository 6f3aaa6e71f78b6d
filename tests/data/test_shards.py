from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import google_crc32c
import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore, OfflineAtariReplay
from torchrl_sql.data import chunks as chunks_module
from torchrl_sql.data import mapping as mapping_module
from torchrl_sql.data import shards as shards_module
from torchrl_sql.data.chunks import FrameReader
from torchrl_sql.data.damage import verify
from torchrl_sql.data.frames import shard_path
from torchrl_sql.data.mapping import MappedFile, UnreadableRangeError, read_ranges
from torchrl_sql.data.shards import DamagedFramesError, ShardFiles


@pytest.fixture(params=["zstd", "lz4"])
def store(request, tmp_path):
    return FrameStore.create(tmp_path / "store", codec=request.param, chunk_frames=4, shard_frames=8)


@pytest.fixture
def pong(store, lab):
    """Episodes of 5, 13 and 9 steps; frames 0-5, 6-18 and 19-28; chunks of 4 and shards of 8 frames."""
    lab.write(store, "Pong", lab.make_episodes([(5, False, True), (13, True, False), (9, True, True)]))
    return store.recording("Pong")


@given(st.binary(max_size=100))
def test_residue(data):
    crc = google_crc32c.value(data)
    assert google_crc32c.value(data + crc.to_bytes(4, "little")) == shards_module._CRC32C_RESIDUE


def test_windows_by_hand(pong):
    """Two windows of an episode that starts at frame 6 and ends before 19, one sticking out on either side."""
    run, start = np.array([0, 0]), np.array([4, 16])
    frames = FrameReader([pong]).read(run, start, np.array([6, 6]), np.array([19, 19]), length=4)
    stored = pong.open_frames().read().result()
    expected = np.zeros((2, 4, 84, 84), np.uint8)
    expected[0, 2:], expected[1, :3] = stored[6:8], stored[16:19]
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("out", [np.zeros((1, 4, 84, 84), np.uint8)[:, ::2], np.zeros((1, 2, 84, 84), np.int8)])
def test_where_frames_cannot_be_written_is_refused(pong, out):
    with pytest.raises(ValueError, match=r"out must be contiguous uint8 \[1, 2, 84, 84\], got"):
        FrameReader([pong]).read(*np.array([[0], [4], [0], [6]]), length=2, out=out)


def test_steps_of_frames_by_hand(pong):
    assert pong.steps_of_frames(0, 4) == (0, 4)
    assert pong.steps_of_frames(4, 8) == (4, 7)  # Frame 5 is the final one of the first episode.
    assert pong.steps_of_frames(5, 6) == (4, 5)
    assert pong.steps_of_frames(28, 29) == (26, 27)


def test_limit_of_mappings(pong, monkeypatch):
    """Files are unmapped and mapped again without harm."""
    monkeypatch.setattr(shards_module, "_MAX_SHARDS", 1)
    reader = FrameReader([pong])
    stored = pong.open_frames().read().result()
    for some in np.random.default_rng(0).integers(0, 29, (6, 10)):
        frames = reader.read(np.zeros_like(some), some, some, some + 1, length=1)
        np.testing.assert_array_equal(frames[:, 0], stored[some])
        assert len(reader._files._shards) <= 4  # Of one batch.


def test_a_thread_that_reaches_the_limit_does_not_make_anothers_chunks_missing(pong, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_SHARDS", 1)
    reader, some = FrameReader([pong]), np.array([0, 9])
    map_shards = ShardFiles._map

    def map_while_another_thread_does(self, numbers):
        mapped = map_shards(self, numbers)
        other = threading.Thread(target=map_shards, args=(self, [3]))
        other.start()
        other.join()
        return mapped

    monkeypatch.setattr(ShardFiles, "_map", map_while_another_thread_does)
    frames = reader.read(np.zeros_like(some), some, some, some + 1, length=1)
    np.testing.assert_array_equal(frames[:, 0], pong.open_frames().read().result()[some])


def test_mapped_files_are_not_kept_open(pong):
    """A store of 400 million transitions has more shard files than a process may have open."""
    before = len(os.listdir("/proc/self/fd"))
    reader, some = FrameReader([pong]), np.arange(29)
    reader.read(np.zeros_like(some), some, some, some + 1, length=1)
    assert len(reader._files._shards) == 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_ranges_of_mapped_files_by_hand(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    file = MappedFile(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert num_mappings(tmp_path) == 1 and file.num_bytes == 16384
    data = read_ranges(file.address + np.array([4096, 10, 300]), np.array([3, 0, 2]))
    assert data.tolist() == [0, 1, 2, 44, 45]
    assert read_ranges(np.zeros(0, int), np.zeros(0, int)).size == 0
    many = read_ranges(file.address + np.arange(5000), np.ones(5000, int))  # Several system calls.
    assert (many == np.arange(5000) % 256).all()
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1
    del file
    assert num_mappings(tmp_path) == 0


@pytest.mark.parametrize("bad", [0, 7, 1023, 1024, 2999])
def test_the_first_range_behind_the_end_of_a_cut_file_is_named(tmp_path, bad):
    """Not SIGBUS."""
    (tmp_path / "file").write_bytes(bytes(2 * mmap.PAGESIZE))
    file = MappedFile(tmp_path / "file")
    address = np.full(3000, file.address)
    address[bad:] += mmap.PAGESIZE
    os.truncate(tmp_path / "file", 10)
    with pytest.raises(UnreadableRangeError, match="was cut") as error:
        read_ranges(address, np.full(3000, 3))
    assert error.value.index == bad


@pytest.mark.parametrize("bad", [None, 2])
def test_a_short_write_goes_on_where_it_ended(tmp_path, monkeypatch, bad):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 32)
    file, pwritev = MappedFile(tmp_path / "file"), mapping_module._libc.pwritev

    def three_bytes(descriptor: int, ranges: int, count: int, offset: int) -> int:
        address, size = (ctypes.c_uint64 * 2).from_address(ranges)
        return pwritev(descriptor, (ctypes.c_uint64 * 2)(address, min(size, 3)), 1, offset)

    monkeypatch.setattr(mapping_module, "_libc", SimpleNamespace(pwritev=three_bytes))
    address, size = file.address + np.array([10, 0, 4096, 30]), np.array([7, 0, 4, 2])
    if bad is None:
        assert read_ranges(address, size).tolist() == [10, 11, 12, 13, 14, 15, 16, 0, 1, 2, 3, 30, 31]
    else:
        os.truncate(tmp_path / "file", 100)
        with pytest.raises(UnreadableRangeError) as error:
            read_ranges(address, size)
        assert error.value.index == bad


@pytest.mark.parametrize(("file_bytes", "part"), [(20, slice(20, 21)), (10_000, slice(None))])
def test_a_limit_of_the_process_is_not_called_damage(pong, file_bytes, part):
    """It is met by the index of a shard, 36 bytes, or by chunks."""
    storage = AtariFrameStorage(pong.path.parent.parent)
    storage[:1]  # to the memory of this thread, which it keeps
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        with pytest.raises(OSError, match="cannot copy ranges of mapped files into memory: File too large") as error:
            storage[part]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert len(storage[:]) == 27


def test_a_forked_child_reads_into_memory_of_its_own(tmp_path):
    (tmp_path / "file").write_bytes(bytes([1, 2]))
    file = MappedFile(tmp_path / "file")
    mine = read_ranges(np.array([file.address]), np.array([1]))
    child = os.fork()
    if not child:
        os._exit(int(read_ranges(np.array([file.address + 1]), np.array([1]))[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert mine.tolist() == [1]


def num_mappings(folder):
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_files_that_cannot_be_mapped(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        MappedFile(tmp_path / "missing")
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match=r"Invalid argument: .*empty"):
        MappedFile(tmp_path / "empty")


def test_disk_is_told_beforehand_after_a_wait(pong, monkeypatch):
    waits = iter([0, 0, 0, 0, 0, 3, 3, 3])
    monkeypatch.setattr(chunks_module, "_num_disk_waits", lambda: next(waits))
    monkeypatch.setattr(chunks_module, "_READS_TO_ANNOUNCE", 2)
    reader, row = FrameReader([pong]), np.array([5])
    counts = []
    for _ in range(4):
        counts.append(reader._reads_to_announce)
        reader.read(np.array([0]), row, row, row + 1, length=1)
    assert counts == [2, 1, 0, 2]


def test_threads_side_by_side(two_games):
    storage = AtariFrameStorage(two_games)
    whole = storage[:]["observation"]
    order = np.random.default_rng(0).integers(0, len(storage), (40, 50))
    with ThreadPoolExecutor(4) as threads:
        for index, batch in zip(order, threads.map(storage.get, order), strict=True):
            assert (batch["observation"] == whole[index]).all()


# Damage


def break_byte(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0x10]))


def damage_index(path):
    break_byte(path, os.path.getsize(path) - 30)


def damage_second_chunk(path):
    break_byte(path, np.frombuffer(path.read_bytes()[-36:-4], "<u8")[2] + 20)


@pytest.mark.parametrize(
    ("damage", "message", "transitions"),
    [
        (damage_second_chunk, "chunk 1: the CRC32C does not match", "11 to 14"),
        (damage_index, "the CRC32C of its index does not match", "7 to 14"),
        (os.unlink, "the file is missing", "7 to 14"),
        (lambda path: os.truncate(path, 12), "its 12 bytes cannot end in an index of 36", "7 to 14"),
        (lambda path: os.truncate(path, 200), "the CRC32C of its index does not match", "7 to 14"),
    ],
)
def test_damage_met_in_training_is_named(pong, damage, message, transitions):
    """The second shard: frames 8-15, of which 8-15 are steps 2-9 of the second episode, transitions 7-14."""
    path = shard_path(pong.path / "frames", 1)
    damage(path)
    storage = AtariFrameStorage(pong.path.parent.parent)
    assert (storage[:3]["action"].numpy() == pong.actions[:3]).all()
    expected = (
        rf"{path} is damaged or cannot be read: {message}\. "
        rf"It holds the frames of transitions {transitions} of Pong, recording '0'"
    )
    for _ in range(2):  # Also when asked again.
        with pytest.raises(DamagedFramesError, match=expected):
            storage.get([0, 13, 2])
    replay = OfflineAtariReplay(storage.path, batch_size=64, prefetch=2)
    with pytest.raises(DamagedFramesError, match=expected):
        replay.sample()
    replay.shutdown()


def test_chunk_that_was_never_written(pong):
    """As other writers leave out chunks of zeros, and as a lost one would look."""
    path = shard_path(pong.path / "frames", 0)
    data = bytearray(path.read_bytes())
    index = np.frombuffer(data, "<u8", 4, len(data) - 36)
    index[:2] = 2**64 - 1
    data[-4:] = google_crc32c.value(bytes(data[-36:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedFramesError, match=r"chunk 0: it was never written\. It holds the .* transitions 0 to 3"):
        AtariFrameStorage(pong.path.parent.parent)[2]


def test_index_that_points_outside(pong):
    path = shard_path(pong.path / "frames", 0)
    data = bytearray(path.read_bytes())
    np.frombuffer(data, "<u8", 4, len(data) - 36)[3] = 10**6
    data[-4:] = google_crc32c.value(bytes(data[-36:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedFramesError, match="its index points beyond byte"):
        AtariFrameStorage(pong.path.parent.parent)[2]


def test_shard_that_cannot_be_opened(pong):
    path = shard_path(pong.path / "frames", 0)
    path.unlink()
    path.mkdir()
    with pytest.raises(
        DamagedFramesError,
        match=r"c/0/0/0 is damaged or cannot be read: \[Errno 21\] Is a directory.* transitions 0 to 6 of",
    ):
        AtariFrameStorage(pong.path.parent.parent)[0]


def test_chunk_of_another_kind(pong):
    """Intact, but not what the reader expects: half a chunk."""
    path = shard_path(pong.path / "frames", 0)
    data = bytearray(path.read_bytes())
    index = np.frombuffer(data, "<u8", 4, len(data) - 36)
    codec = FrameStore.open(pong.path.parent.parent).encoding.codec
    if codec == "zstd":
        chunk = zstandard.compress(bytes(2 * 84 * 84))
    else:
        block = lz4.block.compress(bytes(2 * 84 * 84), store_size=False)
        chunk = struct.pack("<4B5I", 2, 1, 32, 1, 14112, 14112, len(block) + 24, 20, len(block)) + block
    chunk += google_crc32c.value(chunk).to_bytes(4, "little")
    assert len(chunk) <= index[1]
    data[index[0] : index[0] + len(chunk)] = chunk
    index[1] = len(chunk)
    data[-4:] = google_crc32c.value(bytes(data[-36:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    reason = {
        "zstd": "zstd-compressed frames: its header says 14112",
        "lz4": f"lz4-compressed frames: its header is {chunk[:24].hex()}",
    }[codec]
    message = rf"chunk 0: it must hold 28224 bytes of {reason}. It holds the frames of transitions 0 to 3 of Pong"
    with pytest.raises(DamagedFramesError, match=message):
        AtariFrameStorage(pong.path.parent.parent)[0]
    (damage,) = verify(FrameStore.open(pong.path.parent.parent))
    assert f"28224 bytes of {reason}" in damage.reason


def test_chunks_of_black_frames_are_stored(store):
    """So that a lost file cannot pass for them."""
    with store.writer("Pong", source="test") as writer:
        writer.add_episode(np.zeros((20, 84, 84), np.uint8), [0] * 20, [0.0] * 20, True)
    assert not AtariFrameStorage(store)[:]["observation"].any()
    shutil.rmtree(store.recording("Pong").path / "frames" / "c" / "1")
    with pytest.raises(DamagedFramesError, match="the file is missing"):
        AtariFrameStorage(store)[10]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data_type",), "uint16", "must describe uint8 .* got uint16"),
        (("shape",), [29, 84, 80], r"got uint8 \[29, 84, 80\]"),
        (("codecs", 0, "configuration", "codecs", 1, "name"), "gzip", "'gzip'"),
        (
            ("codecs", 0, "configuration", "codecs", 1),
            {"name": "blosc", "configuration": {"cname": "zstd", "shuffle": "shuffle"}},
            "'blosc/zstd/shuffle'",
        ),
        (("codecs", 0, "configuration", "index_location"), "start", "the index at the start"),
        (("codecs", 0, "configuration"), {}, "does not describe an array of frames: KeyError"),
        (("codecs",), [], "does not describe an array of frames"),
    ],
)
def test_other_layouts_are_refused(pong, path, value, message):
    file = pong.path / "frames" / "zarr.json"
    found = json.loads(file.read_text())
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as error:
        FrameReader([pong])
    assert str(file) in str(error.value)


def test_runs_of_other_chunking_are_refused(tmp_path, pong, lab):
    codec = FrameStore.open(pong.path.parent.parent).encoding.codec
    for name, size, other_codec in (("a", 2, codec), ("b", 4, {"zstd": "lz4", "lz4": "zstd"}[codec])):
        other = FrameStore.create(tmp_path / name, codec=other_codec, chunk_frames=size, shard_frames=8)
        lab.write(other, "Pong", lab.make_episodes([(5, True, False)]))
        message = rf"of \(4, 8\) frames in {codec} as the other .* got \({size}, 8\) in {other_codec}"
        with pytest.raises(ValueError, match=message):
            FrameReader([pong, other.recording("Pong")])
