"""Decoding in C and in Python: the same bytes, the same errors, and never a byte beside the output."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import subprocess

import google_crc32c
import lz4.block
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.data import chunks as chunks_module
from torchrl_sql.data import gather as gather_module
from torchrl_sql.data.frames import FRAME_BYTES
from torchrl_sql.data.gather import StoredChunks, decode, fastest_gather, gather_in_python, load_gather_in_c

CODECS = ("zstd", "lz4")
FRAMES = 3
GUARD = 64

needs_c = pytest.mark.skipif(
    shutil.which("cc") is None and not gather_module.LIBRARY.exists(), reason="no C compiler when it was installed"
)


@pytest.fixture(scope="module")
def gather_in_c():
    return load_gather_in_c()


def frames_of(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    frames = np.zeros((FRAMES, 84, 84), np.uint8)
    frames[:, rng.integers(84), :] = rng.integers(0, 256, (FRAMES, 84))
    if seed % 3 == 0:
        frames[:] = rng.integers(0, 256, frames.shape)
    return frames.tobytes()


def encode(data: bytes, codec: str) -> bytes:
    if codec == "zstd":
        return zstandard.ZstdCompressor(write_checksum=False).compress(data)
    block = lz4.block.compress(data, mode="high_compression", store_size=False)
    if len(block) + 8 > len(data):
        return struct.pack("<4B3I", 2, 1, 32 | 2, 1, len(data), len(data), len(data) + 16) + data
    header = struct.pack("<4B5I", 2, 1, 32, 1, len(data), len(data), len(block) + 24, 20, len(block))
    return header + block


def stored_chunks(codec, chunks, pieces=None, *, expected=None) -> StoredChunks:
    """The whole of each chunk, one after the other, if no pieces are given."""
    expected = [google_crc32c.value(chunk) for chunk in chunks] if expected is None else expected
    stored = [chunk + int(crc).to_bytes(4, "little") for chunk, crc in zip(chunks, expected, strict=True)]
    whole = FRAMES * FRAME_BYTES
    pieces = [[(0, k * whole, whole)] for k in range(len(chunks))] if pieces is None else pieces
    return StoredChunks(
        codec=codec,
        chunk_frames=FRAMES,
        stored=np.frombuffer(b"".join(stored), np.uint8),
        ends=np.cumsum([0, *map(len, stored)]),
        expected=np.array(expected, np.uint32),
        first_piece=np.cumsum([0, *map(len, pieces)]),
        pieces=np.array([piece for each in pieces for piece in each], np.int64).reshape(-1, 3),
    )


def run(gather, chunks, num_bytes, begin=0) -> tuple[int, bytes]:
    """Its answer and output; nothing may be written beside it."""
    memory = np.full(num_bytes + 2 * GUARD, 0xA5, np.uint8)
    answer = gather(chunks, memory[GUARD : GUARD + num_bytes], begin)
    assert (memory[:GUARD] == 0xA5).all() and (memory[GUARD + num_bytes :] == 0xA5).all()
    return answer, memory[GUARD : GUARD + num_bytes].tobytes()


def test_it_was_built_where_there_is_a_compiler():
    """Without this, nothing below would say that the slow way is the only one."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert gather_module.LIBRARY.exists(), f"{gather_module.LIBRARY} is missing: pip install -e . builds it"
    assert fastest_gather() is not gather_in_python
    built, source = (
        file.stat().st_mtime for file in (gather_module.LIBRARY, gather_module.LIBRARY.with_name("gather.c"))
    )
    assert built >= source, f"{gather_module.LIBRARY} is older than gather.c: pip install -e . builds it anew"


@needs_c
@pytest.mark.parametrize("codec", CODECS)
def test_pieces_by_hand(gather_in_c, codec):
    """Frames 1 and 2 of the first chunk, frame 0 of the second, in the other order."""
    first, second = frames_of(1), frames_of(2)
    f = FRAME_BYTES
    chunks = stored_chunks(codec, [encode(first, codec), encode(second, codec)], [[(f, f, 2 * f)], [(0, 0, f)]])
    for gather in (gather_in_c, gather_in_python):
        assert run(gather, chunks, 3 * f) == (-1, second[:f] + first[f:])


@needs_c
@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(data=st.data())
def test_both_give_the_same_bytes(gather_in_c, codec, data):
    seeds = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=4))
    piece = st.integers(0, FRAMES * FRAME_BYTES).flatmap(
        lambda start: st.tuples(
            st.just(start), st.integers(0, 2 * FRAME_BYTES), st.integers(0, FRAMES * FRAME_BYTES - start)
        )
    )
    pieces = [data.draw(st.lists(piece, max_size=3)) for _ in seeds]
    chunks = stored_chunks(codec, [encode(frames_of(seed), codec) for seed in seeds], pieces)
    num_bytes, begin = (2 + FRAMES) * FRAME_BYTES, data.draw(st.integers(0, len(seeds)))
    answer, found = run(gather_in_c, chunks, num_bytes, begin)
    assert (answer, found) == run(gather_in_python, chunks, num_bytes, begin) and answer == -1


@needs_c
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_both_refuse_the_same_damage(gather_in_c, codec, data):
    """Also where the checksum is right, as if the damaged bytes had been committed."""
    chunk = bytearray(encode(frames_of(data.draw(st.integers(0, 5))), codec))
    right = google_crc32c.value(bytes(chunk))
    kind = data.draw(st.sampled_from(["flip", "cut", "random", "longer", "header"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            chunk[data.draw(st.integers(0, len(chunk) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "header":
        chunk[data.draw(st.integers(0, 31))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del chunk[data.draw(st.integers(0, len(chunk) - 1)) :]
    elif kind == "longer":
        chunk += data.draw(st.binary(min_size=1, max_size=40))
    else:
        chunk = bytearray(data.draw(st.binary(max_size=200)))
    good, damaged = encode(frames_of(7), codec), bytes(chunk)
    num_bytes = 2 * FRAMES * FRAME_BYTES
    for crc in (right, google_crc32c.value(damaged)):
        chunks = stored_chunks(codec, [good, damaged], expected=[google_crc32c.value(good), crc])
        answers = [run(gather, chunks, num_bytes) for gather in (gather_in_c, gather_in_python)]
        assert answers[0][0] == answers[1][0]
        if answers[0][0] == -1:
            assert answers[0][1] == answers[1][1]
        if crc == right and damaged != bytes(encode(frames_of(0), codec)):
            assert answers[0][0] == 1 or google_crc32c.value(damaged) == right


@needs_c
@pytest.mark.parametrize("piece", [(-1, 0, 5), (0, -1, 5), (0, 0, -1), (FRAMES * FRAME_BYTES, 0, 1), (0, 96, 5)])
def test_pieces_outside_are_refused(gather_in_c, piece):
    chunks = stored_chunks("lz4", [encode(frames_of(1), "lz4")], [[piece]])
    assert run(gather_in_c, chunks, 100)[0] == 0


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_chunk_must_hold_is_said(codec):
    with pytest.raises(ValueError, match=rf"must hold 21168 bytes of {codec}-compressed frames: "):
        decode(b"nothing", codec, FRAMES)
    with pytest.raises(ValueError, match="must hold 14112 bytes of"):
        decode(encode(frames_of(1), codec), codec, 2)


def test_without_the_library_frames_are_decoded_in_python_and_the_log_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(gather_module, "LIBRARY", tmp_path / "_gather.so")
    with caplog.at_level(logging.WARNING):
        assert fastest_gather.__wrapped__() is gather_in_python
    assert "decoded in Python" in caplog.text and "_gather.so" in caplog.text


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("in_python", [False, True])
def test_a_store_gives_the_same_batches_in_both_ways_and_to_tensorstore(tmp_path, lab, monkeypatch, codec, in_python):
    """With frames of noise, which LZ4 stores as they are."""
    if in_python:
        monkeypatch.setattr(chunks_module, "fastest_gather", lambda: gather_in_python)
    store = FrameStore.create(tmp_path / "store", codec=codec, chunk_frames=4, shard_frames=8)
    episodes = lab.make_episodes([(9, True, True), (13, False, True)])
    episodes[1].frames[4:9] = np.random.default_rng(0).integers(0, 256, (5, 84, 84))
    lab.write(store, "Pong", episodes)
    storage = AtariFrameStorage(FrameStore.open(store.path), n_steps=2)
    order = np.random.default_rng(1).permutation(len(storage))
    expected = list(lab.reference(episodes, 2, 0.99))
    for index, observation in zip(order, storage.get(order)["observation"].numpy(), strict=True):
        np.testing.assert_array_equal(observation, expected[index]["observation"])
    frames = store.path / "Pong" / "0" / "frames"
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{frames}/"}}).result()
    np.testing.assert_array_equal(array.read().result(), np.concatenate([e.frames for e in episodes]))
    names = [
        codec["name"]
        for codec in json.loads((frames / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    ]
    assert names == ["bytes", {"zstd": "zstd", "lz4": "blosc"}[codec], "crc32c"]


@pytest.mark.parametrize("codec", CODECS)
def test_an_intact_chunk_that_a_decoder_refuses_is_no_damage(tmp_path, lab, monkeypatch, codec):
    monkeypatch.setattr(chunks_module, "fastest_gather", lambda: lambda chunks, out, begin: begin)
    store = FrameStore.create(tmp_path / "store", codec=codec, chunk_frames=4, shard_frames=8)
    lab.write(store, "Pong", lab.make_episodes([(9, True, False)]))
    with pytest.raises(RuntimeError, match="refuses an intact chunk"):
        AtariFrameStorage(store)[0]


@needs_c
def test_it_compiles_without_warnings(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source = gather_module.LIBRARY.with_name("gather.c")
    command = [
        "cc",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(tmp_path / "g.so"),
        str(source),
    ]
    subprocess.run(command, check=True)
