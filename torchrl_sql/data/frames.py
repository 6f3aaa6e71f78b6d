"""The frame array of one recording: Zarr v3, sharded, zstd chunks of a few frames with CRC32C, through TensorStore.

Everything about the encoding is decided here; ``shards.py`` reads the same files faster, for training.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tensorstore as ts

from torchrl_sql.games import FRAME_SHAPE


def create_frame_array(path: Path, *, chunk_frames: int, shard_frames: int, zstd_level: int) -> ts.TensorStore:
    """Creates an empty frame array at ``path``, replacing what is there.

    Args:
        path (Path): folder of the Zarr array.

    Keyword Args:
        chunk_frames (int): frames decoded together; random reads decode whole chunks.
        shard_frames (int): frames a file, a multiple of ``chunk_frames``.
        zstd_level (int): compression level; higher ones decode no slower.

    Returns:
        A writable ``uint8 [0, 84, 84]`` array, to be resized.
    """
    if path.exists():
        shutil.rmtree(path)
    inner = {
        "chunk_shape": [chunk_frames, *FRAME_SHAPE],
        "codecs": [
            {"name": "bytes"},
            # zstd's own checksum is over the decoded bytes, 47 times as many, and would cost 30% of the reading speed.
            {"name": "zstd", "configuration": {"level": zstd_level, "checksum": False}},
            {"name": "crc32c"},
        ],
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
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_frames, *FRAME_SHAPE]}},
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
        chunking (tuple of int): frames a chunk, frames a shard.
    """

    num_frames: int
    chunking: tuple[int, int]

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
            names = [layout["data_type"], codec["name"], *(c["name"] for c in inner["codecs"] + inner["index_codecs"])]
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
        if shapes != [[*FRAME_SHAPE]] * 3 or names != _CODEC_NAMES or place != "end" or shard_frames % chunk_frames:
            raise ValueError(
                f"{file} must describe uint8 [N, 84, 84] with the codecs {_CODEC_NAMES[1:]} and the index at the end, "
                f"got {names[0]} {layout['shape']} with {names[1:]}, chunks of {inner['chunk_shape']} and the index at "
                f"the {place}"
            )
        return cls(num_frames, (chunk_frames, shard_frames))


_CODEC_NAMES = ["uint8", "sharding_indexed", "bytes", "zstd", "crc32c", "bytes", "crc32c"]
"""Data type, codec of the shards, of the chunks in them, and of their index."""


def shard_path(path: Path, index: int) -> Path:
    """File of one shard of the frame array at ``path``."""
    return path / "c" / str(index) / "0" / "0"


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}
