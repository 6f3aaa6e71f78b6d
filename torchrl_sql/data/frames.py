"""The frame array of one run: Zarr v3, sharded, zstd chunks of a few frames with CRC32C, through TensorStore.

Everything that knows how frames are encoded is here. Legend: W windows, L frames of a window, H/W pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

FRAME_SHAPE = (84, 84)
"""Height and width of a frame in pixels; every source this package reads uses it."""

_CACHE_BYTES = 64 << 20
"""Decoded chunks and shard indices kept by a reader. Without a pool TensorStore re-reads the shard index for each
chunk, which costs a factor of two."""


def create_frame_array(path: Path, *, chunk_frames: int, shard_frames: int, zstd_level: int) -> ts.TensorStore:
    """Creates an empty frame array at ``path``, replacing what is there.

    Args:
        path (Path): folder of the Zarr array.

    Keyword Args:
        chunk_frames (int): frames decoded together; random reads decode whole chunks.
        shard_frames (int): frames a file, a multiple of ``chunk_frames``.
        zstd_level (int): compression level; decompression speed does not depend on it.

    Returns:
        A writable ``uint8 [0, 84, 84]`` array, to be resized.
    """
    if path.exists():
        shutil.rmtree(path)
    inner = {
        "chunk_shape": [chunk_frames, *FRAME_SHAPE],
        "codecs": [
            {"name": "bytes"},
            # The content checksum inside the zstd frame protects readers that do not compute CRC32C.
            {"name": "zstd", "configuration": {"level": zstd_level, "checksum": True}},
            {"name": "crc32c"},
        ],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
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


def open_frame_array(path: Path, *, context: ts.Context | None = None) -> ts.TensorStore:
    """Opens an existing frame array for reading and writing.

    Metadata and shard indices are read once: committed rows never change, so they need no revalidation.

    Raises:
        FileNotFoundError: if there is no array.
        ValueError: if the array is not ``uint8 [N, 84, 84]``.
    """
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(f"{path / 'zarr.json'} is missing: the frames of this run are not there")
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",
    }
    array = ts.open(spec, open=True, context=context or ts.Context()).result()
    if array.rank != 3 or array.shape[1:] != FRAME_SHAPE or array.dtype.name != "uint8":
        raise ValueError(f"{path} must be uint8 [N, 84, 84], got {array.dtype.name} {list(array.shape)}")
    return array


def reader_context() -> ts.Context:
    """A TensorStore context whose cache holds shard indices and recently decoded chunks."""
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


class WindowReader:
    """Reads windows of consecutive frames from several frame arrays, in one batch.

    Args:
        arrays (sequence of TensorStore): ``R`` frame arrays.
        num_frames (sequence of int): committed frames of each; later rows are never read.
        window (int): ``L``, the longest window that will be asked for.
    """

    def __init__(self, arrays: Sequence[ts.TensorStore], num_frames: Sequence[int], *, window: int) -> None:
        self._arrays: list[ts.TensorStore] = []
        sizes = []
        for array, size in zip(arrays, num_frames, strict=True):
            if size < window:  # Shorter than one window: pad in memory, so that every window can be cut whole.
                padded = np.zeros((window, *FRAME_SHAPE), np.uint8)
                padded[:size] = array[:size].read().result()
                array, size = ts.array(padded), window
            self._arrays.append(array)
            sizes.append(size)
        self._sizes = np.asarray(sizes, np.int64)

    def read(
        self, array: np.ndarray, start: np.ndarray, first: np.ndarray, stop: np.ndarray, *, length: int
    ) -> np.ndarray:
        """Reads ``W`` windows.

        Args:
            array (int64 ``[W]``): which frame array.
            start (int64 ``[W]``): first frame of the window; may lie before ``first``.
            first (int64 ``[W]``): first frame of the episode; earlier ones are returned as zeros.
            stop (int64 ``[W]``): one past its last frame; later ones are returned as zeros.

        Keyword Args:
            length (int): ``L``, frames of each window, at most ``window``.

        Returns:
            uint8 ``[W, L, 84, 84]``.
        """
        begin = np.clip(start, 0, self._sizes[array] - length)
        arrays = self._arrays
        windows = [
            arrays[a][b : b + length].translate_to[0, 0, 0] for a, b in zip(array.tolist(), begin.tolist(), strict=True)
        ]
        out: np.ndarray = ts.stack(windows).read().result()
        steps = np.arange(length)
        shifted = np.flatnonzero(begin != start)  # Windows that stick out of the array: move frames to their place.
        if shifted.size:
            source = np.clip(start[shifted, None] - begin[shifted, None] + steps, 0, length - 1)
            out[shifted] = out[shifted[:, None], source]
        frame = start[:, None] + steps
        outside = (frame < first[:, None]) | (frame >= stop[:, None])
        out[outside] = 0
        return out


def _kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}
