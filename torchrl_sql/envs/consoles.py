"""The processes that play games (:mod:`torchrl_sql.envs.console`), and the copies of games in them.

There is one process per core at most, for all games of this process together. They are started when they are needed,
and end with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
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


@atexit.register
def _stop_processes() -> None:
    for process in _processes.pop(os.getpid(), []):
        process.stop()


def _next_process(num_processes: int) -> _ConsoleProcess:
    """The process whose turn it is, of the first ``num_processes``."""
    processes = _processes.setdefault(os.getpid(), [])
    place = next(_turn) % num_processes
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
        self._header = bytearray(ANSWER.size)
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
            frame (array): contiguous uint8, where the newest frame is put.

        Returns:
            reward, terminated, truncated.
        """
        view = frame.data.cast("B")
        try:
            size, *_ = self._connection.recvmsg_into([self._header, view], 0, socket.MSG_WAITALL)
            received = max(size - len(self._header), 0)
            while size > 0 and received < len(view):  # a signal came between
                received += (part := self._connection.recv_into(view[received:]))
                size = part
        except ConnectionError as error:
            raise self._lost() from error
        if size == 0:
            raise self._lost()
        return ANSWER.unpack(self._header)

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
