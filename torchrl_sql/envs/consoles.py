"""The processes that play games (:mod:`torchrl_sql.envs.console`), and the copies of games in them.

There is one process per core at most, for all games of this process together. They are started when they are needed,
and end with this one.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from itertools import count

import numpy as np

from torchrl_sql.envs import console
from torchrl_sql.envs.console import ACT, ANSWER, LENGTH, REQUEST, START, Settings

_EXIT_SECONDS = 60


class _ConsoleProcess:
    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", console.__file__],
                stdin=theirs.fileno(),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for this process
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def hand_over(self, connection: socket.socket) -> None:
        socket.send_fds(self._control, [b"c"], [connection.fileno()])

    def stop(self) -> int:
        """Ends the process and returns how it ended."""
        self._control.close()
        return self._process.wait(_EXIT_SECONDS)


_processes: dict[int, list[_ConsoleProcess]] = {}
"""By the process that started them: they are not for its forks."""
_turn = count()
_starting = threading.Lock()


@atexit.register
def _stop_processes() -> None:
    for process in _processes.pop(os.getpid(), []):
        process.stop()


def _next_process(num_processes: int) -> _ConsoleProcess:
    """The process whose turn it is, of the first ``num_processes``."""
    place = next(_turn) % num_processes
    with _starting:
        processes = _processes.setdefault(os.getpid(), [])
        while len(processes) <= place:
            processes.append(_ConsoleProcess())
        if not processes[place].runs:
            processes[place].stop()
            processes[place] = _ConsoleProcess()
        return processes[place]


class RemoteConsole:
    """A :class:`torchrl_sql.envs.console.Console` in another process. Each request has one answer, received later.

    Args:
        settings (Settings): of the copy.

    Keyword Args:
        num_processes (int): how many to take turns with; 0 for one per core.

    Raises:
        ChildProcessError: by all methods, if the other process has ended.
    """

    def __init__(self, settings: Settings, *, num_processes: int = 0) -> None:
        self._rom = settings.rom
        self._process = _next_process(num_processes or len(os.sched_getaffinity(0)))
        self._connection, theirs = socket.socketpair()
        weakref.finalize(self, self._connection.close)
        self._answer = bytearray(ANSWER.size + math.prod(settings.shape) * (3 if settings.colour else 1))
        text = json.dumps(settings._asdict()).encode()
        with theirs:
            try:
                self._process.hand_over(theirs)
            except ConnectionError as error:
                raise self._lost() from error
        self._send(LENGTH.pack(len(text)) + text)

    @property
    def runs(self) -> bool:
        """Whether the other process does."""
        return self._process.runs

    def start(self, seed: int) -> None:
        """Begins an episode; its answer has the first frame."""
        self._send(REQUEST.pack(START, seed))

    def act(self, action: int) -> None:
        """Plays a step."""
        self._send(REQUEST.pack(ACT, action))

    def receive(self, frame: np.ndarray) -> tuple[int, bool, bool]:
        """Waits for an answer.

        Args:
            frame (array): uint8, where the newest frame is put.

        Returns:
            reward, terminated, truncated.
        """
        buffer, received = memoryview(self._answer), 0
        while received < len(buffer):
            try:
                size = self._connection.recv_into(buffer[received:], 0, socket.MSG_WAITALL)
            except ConnectionError as error:
                raise self._lost() from error
            if size == 0:
                raise self._lost()
            received += size  # all of it, unless a signal came between
        frame[...] = np.frombuffer(buffer, np.uint8, offset=ANSWER.size).reshape(frame.shape)
        return ANSWER.unpack_from(buffer)

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except ConnectionError as error:
            raise self._lost() from error

    def _lost(self) -> ChildProcessError:
        code = self._process.stop()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return ChildProcessError(
            f"the process that plays {self._rom} ended {how}: free memory if it was killed for want of it, and start "
            "the command again"
        )
