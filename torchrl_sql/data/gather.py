"""From chunks as they are stored to the frames of a batch: in C, or in Python where that was not built.

``gather.c`` is built at installation, if there is a compiler (``hatch_build.py``). It decodes a batch in one call,
without Python's global lock, lz4 only as far as it is needed, straight to where the frames belong. Both use the
packages lz4, zstandard and google-crc32c: the C code by the addresses of their functions.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import google_crc32c
import lz4.block
import numpy as np
import zstandard

from torchrl_sql.data.frames import CODECS, FRAME_BYTES, Codec

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("_gather.so")
"""What is built from ``gather.c``."""


@dataclass(frozen=True, kw_only=True)
class StoredChunks:
    """``n`` chunks as they are stored, and what is wanted of them.

    Attributes:
        codec (str): how they are compressed.
        chunk_frames (int): frames of each, decoded.
        stored (uint8 ``[ends[n]]``): chunk ``k`` is ``stored[ends[k]:ends[k + 1]]``, with its CRC32C at the end.
        ends (int64 ``[n + 1]``): where they begin, and the last one ends.
        expected (uint32 ``[n]``): what the CRC32C of each must be.
        first_piece (int64 ``[n + 1]``): the pieces of chunk ``k`` are ``first_piece[k]`` to ``first_piece[k + 1] - 1``.
        pieces (int64 ``[P, 3]``): first byte within the chunk, first byte in the output, and bytes.
    """

    codec: Codec
    chunk_frames: int
    stored: np.ndarray
    ends: np.ndarray
    expected: np.ndarray
    first_piece: np.ndarray
    pieces: np.ndarray


def gather_in_python(chunks: StoredChunks, out: np.ndarray, begin: int) -> int:
    """Decodes chunks, and copies their pieces to where they belong.

    Args:
        chunks (StoredChunks): the chunks and pieces.
        out (uint8, contiguous): where the pieces go.
        begin (int): first chunk to look at.

    Returns:
        Number of the first chunk that is not the expected one; -1 if there is none.
    """
    target, stored = out.data.cast("B"), chunks.stored.data
    bounds, pieces = list(pairwise(chunks.ends.tolist())), chunks.pieces.tolist()
    expected, first_piece = chunks.expected.tolist(), chunks.first_piece.tolist()
    for chunk in range(begin, len(bounds)):
        start, stop = bounds[chunk]
        data = bytes(stored[start : stop - 4])
        if google_crc32c.value(data) != expected[chunk]:
            return chunk
        try:
            frames = memoryview(decode(data, chunks.codec, chunks.chunk_frames))
        except ValueError:
            return chunk
        for source_byte, target_byte, count in pieces[first_piece[chunk] : first_piece[chunk + 1]]:
            target[target_byte : target_byte + count] = frames[source_byte : source_byte + count]
    return -1


Gather = Callable[[StoredChunks, np.ndarray, int], int]
"""A function like :func:`gather_in_python`."""


def load_gather_in_c() -> Gather:
    """The same in C.

    Raises:
        OSError, AttributeError: if it was not built, or a package does not show its functions.
    """
    native, functions = ctypes.CDLL(str(LIBRARY)), _functions()
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    native.gather.argtypes = [pointer, ctypes.c_int, integer, *[pointer] * 5, integer, pointer, integer]
    native.gather.restype = integer

    def gather_in_c(chunks: StoredChunks, out: np.ndarray, begin: int) -> int:
        number = native.gather(
            functions,
            list(CODECS).index(chunks.codec),
            len(chunks.expected) - begin,
            chunks.stored.ctypes.data,
            chunks.ends[begin:].ctypes.data,
            chunks.expected[begin:].ctypes.data,
            chunks.first_piece[begin:].ctypes.data,
            chunks.pieces.ctypes.data,
            chunks.chunk_frames * FRAME_BYTES,
            out.ctypes.data,
            out.nbytes,
        )
        if number == -2:
            raise MemoryError("no memory to decode frames")
        return number if number < 0 else begin + number

    return gather_in_c


@cache
def fastest_gather() -> Gather:
    """The one in C where it was built; otherwise that in Python, and a warning in the log."""
    try:
        return load_gather_in_c()
    except (OSError, AttributeError) as error:
        logger.warning(
            "frames are decoded in Python, more slowly: install torchrl-sql where there is a C compiler (%s)",
            error,
        )
        return gather_in_python


def decode(data: bytes, codec: Codec, num_frames: int) -> bytes:
    """The bytes of a chunk's frames.

    Raises:
        ValueError: if ``data`` is not ``num_frames`` frames in that codec.
    """
    num_bytes = num_frames * FRAME_BYTES
    try:
        frames = (_decode_blosc if codec == "lz4" else _decode_zstd)(data, num_bytes)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError, struct.error) as error:
        raise ValueError(f"it must hold {num_bytes} bytes of {codec}-compressed frames: {error}") from error
    if len(frames) != num_bytes:
        raise ValueError(f"it must hold {num_bytes} bytes of frames, got {len(frames)}")
    return frames


def _decode_zstd(data: bytes, num_bytes: int) -> bytes:
    # Otherwise memory for what a damaged header says would be taken.
    if (size := zstandard.frame_content_size(data)) not in (-1, num_bytes):
        raise zstandard.ZstdError(f"its header says {size}")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=num_bytes, allow_extra_data=False)


def _decode_blosc(data: bytes, num_bytes: int) -> bytes:
    """A Blosc chunk as ``frames.py`` has it written: one block of LZ4, not shuffled; or stored, if nothing is gained.

    Its header: version, version of the codec's format, flags, bytes of an item; bytes decoded, of a block, and stored.
    """
    _, _, flags, _, decoded_bytes, block_bytes, stored_bytes = struct.unpack_from("<4B3I", data)
    if decoded_bytes == num_bytes and stored_bytes == len(data):
        if flags & 2:
            return data[16:]
        place, lz4_bytes = struct.unpack_from("<2I", data, 16)
        if flags | 16 == 32 | 16 and block_bytes == num_bytes and place == 20 and lz4_bytes == len(data) - 24:
            return lz4.block.decompress(data[24:], uncompressed_size=num_bytes)
    raise lz4.block.LZ4BlockError(f"its header is {data[:24].hex()}")


def _library(module: str) -> ctypes.CDLL:
    spec = find_spec(module)
    if spec is None:
        raise OSError(f"there is no {module}")
    return ctypes.CDLL(spec.origin)


def _functions() -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of the functions that do the work, in the order in which ``gather.c`` lists them."""
    crc32c, zstd, lz4_block = map(_library, ("google_crc32c._crc32c", "zstandard._cffi", "lz4.block._block"))
    functions = (
        crc32c.crc32c_value,
        zstd.ZSTD_createDCtx,
        zstd.ZSTD_freeDCtx,
        zstd.ZSTD_decompressDCtx,
        lz4_block.LZ4_decompress_safe,
        lz4_block.LZ4_decompress_safe_partial,
    )
    return (ctypes.c_void_p * len(functions))(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
