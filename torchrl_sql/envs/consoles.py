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
from contextlib import suppress
from itertools import count

import numpy as np

from torchrl_sql.envs import console
from torchrl_sql.envs.console import ACT, ANSWER, IGNORED_SIGNALS, LENGTH, REQUEST, START, Settings

_EXIT_SECONDS = 60


class _ConsoleProcess:
    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)  # until it ignores them
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", console.__file__],
                    stdin=theirs.fileno(),
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for this process
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def hand_over(self, connection: socket.socket) -> None:
        socket.send_fds(self._control, [b"c"], [connection.fileno()])

    def stop(self) -> int:
        """Ends the process and returns how it ended."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # forks of this process may hold it, too
        self._control.close()
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


_processes: dict[int, list[_ConsoleProcess]] = {}
"""By the process that started them: they are not for its forks."""
_turn = count()
_starting = threading.Lock()


def _forget_lock() -> None:
    """In a fork, which may be made while another thread holds it."""
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


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
        self._settings = settings
        self._process = _next_process(num_processes or len(os.sched_getaffinity(0)))
        self._answer = bytearray(ANSWER.size + math.prod(settings.shape) * (3 if settings.colour else 1))
        self._connect()

    def _connect(self) -> None:
        """Has a copy made that nothing was asked of yet."""
        self._connection, theirs = socket.socketpair()
        self._closing = weakref.finalize(self, self._connection.close)
        self._awaits_answer = False
        text = json.dumps(self._settings._asdict()).encode()
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
        """Begins an episode; its answer has the first frame. An answer that nobody received is dropped."""
        if self._awaits_answer:
            self._closing()
            self._connect()
        self._awaits_answer = True
        self._send(REQUEST.pack(START, seed))

    def act(self, action: int) -> None:
        """Plays a step.

        Raises:
            RuntimeError: if the answer to an earlier request was not received.
        """
        if self._awaits_answer:
            raise RuntimeError(f"a step of {self._settings.rom} is under way: receive it first, or begin anew")
        self._awaits_answer = True
        self._send(REQUEST.pack(ACT, action))

    def receive(self, frame: np.ndarray) -> tuple[int, bool, bool]:
        """Waits for an answer.

        Args:
            frame (array): uint8, where the newest frame is put.

        Returns:
            reward, terminated, truncated.

        Raises:
            RuntimeError: if there is no request without answer.
        """
        if not self._awaits_answer:
            raise RuntimeError(f"nothing was asked of {self._settings.rom}")
        buffer, received = memoryview(self._answer), 0
        while received < len(buffer):
            try:
                size = self._connection.recv_into(buffer[received:], 0, socket.MSG_WAITALL)
            except ConnectionError as error:
                raise self._lost() from error
            if size == 0:
                raise self._lost()
            received += size  # all of it, unless a signal came between
        self._awaits_answer = False
        frame[...] = np.frombuffer(buffer, np.uint8, offset=ANSWER.size).reshape(frame.shape)
        return ANSWER.unpack_from(buffer)

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except ConnectionError as error:
            raise self._lost() from error

    def _lost(self) -> ChildProcessError:
        code = self._process.stop()
        if code == -signal.SIGKILL:
            how = "by SIGKILL: free memory if it was killed for want of it, and start the command again"
        elif code < 0:
            how = f"by {signal.Signals(-code).name}: start the command again"
        else:
            how = f"with exit code {code}: its own message was printed before"
        return ChildProcessError(f"the process that plays {self._settings.rom} ended {how}")
