"""Files in the address space of the process: without a descriptor each, and read without the danger of SIGBUS.

Python's ``mmap`` holds a descriptor for each mapping (before 3.13, with ``trackfd=False``), and Linux lets a process
have 1,024 of those by default. A store of 400 million transitions has 26,000 shard files.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.pwritev.restype = ctypes.c_ssize_t
_libc.pwritev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long]

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAX_RANGES = 1024
"""Of one system call, ``IOV_MAX``."""

OWN_LIMITS = frozenset({errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})
"""Errors of a process or host that has too little of something. They say nothing of the file that was to be read."""


class MappedFile:
    """A file of at least one byte, mapped for reading with :func:`read_ranges`; unmapped with this object.

    Args:
        path (Path): the file.

    Attributes:
        address (int): of its first byte.
        num_bytes (int): its size when it was mapped.

    Raises:
        OSError: if it cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            address = _libc.mmap(None, self.num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        self.address = address
        weakref.finalize(self, _libc.munmap, address, self.num_bytes).atexit = False  # Threads may still be reading.


def advise(address: int, size: int, advice: int) -> None:
    """Tells the kernel how bytes of a mapped file will be used: see madvise(2)."""
    start = address & -mmap.PAGESIZE
    _libc.madvise(start, address + size - start, advice)


class UnreadableRangeError(OSError):
    """Number ``index`` of the ranges lies where a file was cut, or where the disk or the server cannot read."""

    def __init__(self, index: int) -> None:
        super().__init__("the file was cut while it was in use, or the disk cannot read it")
        self.index = index


def read_ranges(address: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Copies ranges of mapped files, one after the other.

    A page of a mapping that is gone, because its file was cut, or cannot be read ends a process that touches it with
    SIGBUS. So the kernel does the copying: it writes the ranges into a file in memory, and there such a page is an
    error. One system call for 1,024 ranges, without the GIL.

    Args:
        address (int64 ``[N]``): where they begin.
        size (int64 ``[N]``): their bytes.

    Returns:
        uint8 ``[sum of size]``; valid until the next call in this thread.

    Raises:
        UnreadableRangeError: if a range cannot be read.
        OSError: if there is no room to copy them to.
    """
    ranges = np.stack([address, size], axis=1).astype(np.uint64)
    ends = np.cumsum(size)
    num_bytes = int(ends[-1]) if len(ends) else 0
    memory, done = _memory(num_bytes), 0
    while done < num_bytes:
        first = int(np.searchsorted(ends, done, side="right"))  # the range of the next byte; a write may be short
        ranges[first] = address[first] + size[first] - (ends[first] - done), ends[first] - done
        count = min(_MAX_RANGES, len(ranges) - first)
        written = _libc.pwritev(memory.descriptor, ranges[first:].ctypes.data, count, done)
        if written <= 0:
            code = ctypes.get_errno() if written else errno.EIO
            if code == errno.EFAULT:
                raise UnreadableRangeError(first)
            raise OSError(code, f"cannot copy ranges of mapped files into memory: {os.strerror(code)}")
        done += written
    return memory.array[:num_bytes]


class _MemoryFile:
    """A file in memory and its bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.process = os.getpid()
        self.descriptor = os.memfd_create("torchrl_sql")
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        os.ftruncate(self.descriptor, num_bytes)
        self.array = np.frombuffer(mmap.mmap(self.descriptor, num_bytes, access=mmap.ACCESS_READ), np.uint8)


_of_this_thread = threading.local()


def _memory(num_bytes: int) -> _MemoryFile:
    """This thread's file, of at least so many bytes; not that of the process it was forked from."""
    memory = getattr(_of_this_thread, "memory", None)
    if memory is None or memory.process != os.getpid() or len(memory.array) < num_bytes:
        memory = _of_this_thread.memory = _MemoryFile(max(1 << 20, 2 * num_bytes))
    return memory
