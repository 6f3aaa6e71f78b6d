"""Read-only mappings of files into memory that keep no file open.

Python's ``mmap`` holds a descriptor for each mapping (before 3.13, with ``trackfd=False``), and Linux lets a process
have 1,024 of those by default. A store of 400 million transitions has 26,000 shard files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """A file of at least one byte, mapped for reading; unmapped when this object and all slices of ``view`` are gone.

    Args:
        path (Path): the file.

    Attributes:
        view (memoryview of bytes): its bytes, read-only.

    Raises:
        OSError: if it cannot be opened or mapped.
    """

    __slots__ = ("_address", "view")

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        memory = (ctypes.c_ubyte * num_bytes).from_address(address)
        weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False  # Threads may still be reading.
        self._address = address
        self.view = memoryview(memory).cast("B").toreadonly()

    def advise(self, advice: int, start: int = 0, length: int | None = None) -> None:
        """Tells the kernel how bytes from ``start`` (on a page's border) on will be used: see madvise(2)."""
        _libc.madvise(self._address + start, len(self.view) if length is None else length, advice)
