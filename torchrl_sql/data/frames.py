"""The frame array of one recording: Zarr v3, sharded, compressed chunks of a few frames with CRC32C, by TensorStore.

Everything about the encoding is decided here; ``shards.py`` reads the same files faster, for training.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import tensorstore as ts

from torchrl_sql.games import FRAME_SHAPE

FRAME_BYTES = prod(FRAME_SHAPE)

Codec = Literal["zstd", "lz4"]

CODECS: dict[Codec, str] = {"zstd": "zstd", "lz4": "blosc/lz4hc/noshuffle"}
"""What each codec is in Zarr's metadata. LZ4 comes in Blosc's frame, which is the one that Zarr v3 has for it."""

_MAX_BLOSC_BLOCK_BYTES = 262_144
"""c-blosc cuts larger chunks into several blocks, whatever block size it is given."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the frames of a store are compressed and cut into files.

    Attributes:
        codec, chunk_frames, shard_frames, zstd_level: see :meth:`FrameStore.create`. Higher levels decode no slower;
            LZ4 always has its highest.

    Raises:
        ValueError: for other values.
    """

    codec: Codec
    chunk_frames: int
    shard_frames: int
    zstd_level: int

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.chunk_frames < 1 or self.shard_frames < self.chunk_frames or self.shard_frames % self.chunk_frames:
            raise ValueError(
                "shard_frames must be a positive multiple of chunk_frames, "
                f"got {self.shard_frames} and {self.chunk_frames}"
            )
        if not 1 <= self.zstd_level <= 22:
            raise ValueError(f"zstd_level must lie in 1..22, got {self.zstd_level}")
        max_chunk_frames = _MAX_BLOSC_BLOCK_BYTES // FRAME_BYTES
        if self.codec == "lz4" and self.chunk_frames > max_chunk_frames:
            raise ValueError(
                f"chunk_frames must be at most {max_chunk_frames} with lz4, whose blocks hold "
                f"{_MAX_BLOSC_BLOCK_BYTES:,} bytes, got {self.chunk_frames}: choose fewer, or zstd"
            )

    def zarr_codec(self) -> dict[str, Any]:
        """The codec in Zarr's metadata."""
        if self.codec == "lz4":
            # One block: a reader then decodes a chunk in one call, and stops at the last byte that it needs.
            block = {"typesize": 1, "blocksize": self.chunk_frames * FRAME_BYTES}
            return {
                "name": "blosc",
                "configuration": {"cname": "lz4hc", "clevel": 9, "shuffle": "noshuffle", **block},
            }
        # zstd's own checksum is over the decoded bytes, 47 times as many, and would cost 30% of the reading speed.
        return {"name": "zstd", "configuration": {"level": self.zstd_level, "checksum": False}}


def create_frame_array(path: Path, encoding: Encoding) -> ts.TensorStore:
    """Creates an empty frame array at ``path``, replacing what is there.

    Args:
        path (Path): folder of the Zarr array.
        encoding (Encoding): its chunks.

    Returns:
        A writable ``uint8 [0, 84, 84]`` array, to be resized.
    """
    if path.exists():
        shutil.rmtree(path)
    inner = {
        "chunk_shape": [encoding.chunk_frames, *FRAME_SHAPE],
        "codecs": [{"name": "bytes"}, encoding.zarr_codec(), {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [0, *FRAME_SHAPE],
            "data_type": "uint8",
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [encoding.shard_frames, *FRAME_SHAPE]}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        },
    }
    return ts.open(spec, create=True).result()


def open_frame_array(path: Path) -> ts.TensorStore:
    """Opens an existing frame array for reading and writing.

    Raises:
        FileNotFoundError, ValueError: see :meth:`FrameLayout.read`.
    """
    FrameLayout.read(path)
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "store_data_equal_to_fill_value": True,  # Otherwise a lost file would read as black frames.
    }
    return ts.open(spec, open=True).result()


@dataclass(frozen=True)
class FrameLayout:
    """How a frame array lies on disk.

    Attributes:
        num_frames (int): rows of the array.
        chunking (tuple of int): frames per chunk, frames per shard.
        codec (str): how its chunks are compressed.
    """

    num_frames: int
    chunking: tuple[int, int]
    codec: Codec

    @classmethod
    def read(cls, path: Path) -> FrameLayout:
        """Reads ``zarr.json`` of the array at ``path``.

        Raises:
            FileNotFoundError: if there is no array.
            ValueError: if it is not encoded as :func:`create_frame_array` does it.
        """
        file = path / "zarr.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the frames of this recording are not there")
        try:
            layout = json.loads(file.read_text(encoding="utf-8"))
            (num_frames, *frame_shape), (codec,) = layout["shape"], layout["codecs"]
            shard_frames, *shard_shape = layout["chunk_grid"]["configuration"]["chunk_shape"]
            inner = codec["configuration"]
            chunk_frames, *chunk_shape = inner["chunk_shape"]
            shapes = [frame_shape, shard_shape, chunk_shape]
            names = [layout["data_type"], codec["name"], *map(_describe, inner["codecs"] + inner["index_codecs"])]
            place = inner.get("index_location", "end")
            counts = [num_frames, chunk_frames, shard_frames]
            if (
                any(type(count) is not int for count in counts)
                or num_frames < 0
                or not 1 <= chunk_frames <= shard_frames
            ):
                raise ValueError(f"counts of frames {counts}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} does not describe an array of frames: {error!r}") from error
        found = [codec for codec in CODECS if names == _names(codec)]
        if shapes != [[*FRAME_SHAPE]] * 3 or not found or place != "end" or shard_frames % chunk_frames:
            raise ValueError(
                f"{file} must describe uint8 [N, 84, 84] with the codecs {_names('zstd')[1:]}, or {CODECS['lz4']!r} "
                f"instead of 'zstd', and the index at the end, got {names[0]} {layout['shape']} with {names[1:]}, "
                f"chunks of {inner['chunk_shape']} and the index at the {place}"
            )
        return cls(num_frames, (chunk_frames, shard_frames), found[0])


def _names(codec: Codec) -> list[str]:
    """Data type, codec of the shards, of the chunks in them, and of their index."""
    return ["uint8", "sharding_indexed", "bytes", CODECS[codec], "crc32c", "bytes", "crc32c"]


def _describe(codec: dict[str, Any]) -> str:
    if codec["name"] != "blosc":
        return codec["name"]
    return "/".join((codec["name"], codec["configuration"]["cname"], codec["configuration"]["shuffle"]))


def shard_path(path: Path, index: int) -> Path:
    """File of one shard of the frame array at ``path``."""
    return path / "c" / str(index) / "0" / "0"


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}
