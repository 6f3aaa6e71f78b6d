"""A process that plays Atari games for another: :mod:`torchrl_sql.envs.consoles` starts it and talks to it.

ALE's own vector emulator offers neither modes nor difficulties, and its single one holds Python's lock while it
emulates, hence processes. This file is run as a script and imports nothing of the package, so that a process starts in
a third of a second.

Its standard input is a socket on which sockets arrive, one per copy of a game. On each of those it gets the copy's
settings, then requests, and answers each with what :class:`Console` gives. It ends when its standard input does.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import struct
from typing import Any, NamedTuple

import numpy as np
from ale_py import ALEInterface, ALEState, LoggerMode, roms

FRAME_SKIP = 4
LENGTH = struct.Struct("<I")
"""Bytes of a copy's settings, before them."""
REQUEST = struct.Struct("<cI")
"""``START`` with a seed or ``ACT`` with an action."""
ANSWER = struct.Struct("<i??")
"""Reward, terminated, truncated; the newest frame follows."""
START, ACT = b"s", b"a"

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Are for the process that started this one, which ends it; they are blocked when it starts."""

_STATE_HEAD = struct.Struct("<6iI")
"""Of a serialized ``ALEState``: paddles, frame numbers, mode and difficulty, and the size of the machine's state."""


class Settings(NamedTuple):
    """What decides an episode beside its seed and actions, and how its frames are shown.

    Attributes:
        rom (str): ALE's name of the game.
        mode, difficulty (int): the variation of it.
        sticky_action_probability (float): that an emulator frame repeats the previous action.
        max_env_frames (int): emulator frames after which an episode is truncated.
        shape (sequence of int): height and width of frames.
        colour (bool): frames in colour, in place of grayscale.
    """

    rom: str
    mode: int
    difficulty: int
    sticky_action_probability: float
    max_env_frames: int
    shape: tuple[int, int]
    colour: bool


class Console:
    """One copy of a game: four frames per action, the maximum of the last two, scaled down by area.

    Bit for bit what :class:`ale_py.vector_env.AtariVectorEnv` gives in the modes that it has, but for the time that it
    takes to start an episode: that loads the ROM anew for each seed, which takes as long as hundreds of steps. The seed
    decides sticky actions, no more, so that here the state just after loading serves all seeds. In the few games that
    take actions while they are loaded (Berzerk, Double Dunk) they are sticky, too: those are loaded anew.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._num_env_frames = 0
        self._ale = ale = ALEInterface()
        ale.setFloat("repeat_action_probability", settings.sticky_action_probability)
        self._load(0)
        state = ale.cloneState(include_rng=True).serialize()
        loaded = _Loaded(state)
        self._loaded = loaded if loaded.with_seed(0) == state else None
        height, width = ale.getScreenDims()
        channels = (3,) if settings.colour else ()
        self._get_screen = ale.getScreenRGB if settings.colour else ale.getScreenGrayscale
        self._screens = [np.zeros((height, width, *channels), np.uint8) for _ in range(2)]
        self._resize = AreaResize((height, width), settings.shape)

    def start(self, seed: int) -> np.ndarray:
        """Begins an episode and returns its first frame."""
        if self._loaded is None:
            self._load(seed)
        else:
            self._ale.restoreState(ALEState(self._loaded.with_seed(seed)))
        self._ale.reset_game()
        self._num_env_frames = 0
        self._get_screen(self._screens[0])
        self._screens[1][:] = 0
        return self._frame()

    def act(self, action: int) -> tuple[int, bool, bool, np.ndarray]:
        """Plays four emulator frames; returns reward, terminated, truncated and the newest frame."""
        reward, terminated, truncated = 0, False, False
        for remaining in range(FRAME_SKIP, 0, -1):
            reward += self._ale.act(action)
            self._num_env_frames += 1
            terminated = self._ale.game_over()
            truncated = not terminated and self._num_env_frames >= self._settings.max_env_frames
            if terminated or truncated:
                break  # as ALE does: this frame is not seen, the maximum is over earlier ones
            if remaining <= 2:
                self._get_screen(self._screens[remaining - 1])
        return reward, terminated, truncated, self._frame()

    def inside(self) -> tuple[np.ndarray, int]:
        """The machine's memory, uint8 ``[128]``, and the lives that are left."""
        return self._ale.getRAM(), self._ale.lives()

    def _load(self, seed: int) -> None:
        rom = roms.get_rom_path(self._settings.rom)
        assert rom is not None
        self._ale.setInt("random_seed", seed)
        self._ale.loadROM(rom)
        self._ale.setMode(self._settings.mode)
        self._ale.setDifficulty(self._settings.difficulty)

    def _frame(self) -> np.ndarray:
        np.maximum(self._screens[0], self._screens[1], out=self._screens[0])
        return self._resize(self._screens[0])


class _Loaded:
    """The state of a game that was just loaded, as ALE serializes it, for any seed.

    Its machine's state ends with the random numbers of sticky actions: a Mersenne Twister in decimals, and its size
    before it.
    """

    def __init__(self, state: bytes) -> None:
        *self._head, size = _STATE_HEAD.unpack_from(state)
        end = _STATE_HEAD.size + size
        machine, self._rest = state[_STATE_HEAD.size : end], state[end:]
        self._machine = machine.rstrip(b"0123456789 ")[: -LENGTH.size]

    def with_seed(self, seed: int) -> bytes:
        """The state with the random numbers of a seed, none of them drawn."""
        twister = np.random.RandomState(seed).get_state(legacy=False)["state"]
        numbers = " ".join(map(str, [*twister["key"].tolist(), twister["pos"]])).encode()
        machine = self._machine + LENGTH.pack(len(numbers)) + numbers
        return _STATE_HEAD.pack(*self._head, len(machine)) + machine + self._rest


class AreaResize:
    """Scales pictures down as OpenCV does with ``INTER_AREA``, bit for bit: float32 sums, along rows first.

    Args:
        size (tuple of int): height and width of pictures.
        new (tuple of int): what they become.
    """

    def __init__(self, size: tuple[int, int], new: tuple[int, int]) -> None:
        self._same = size == new
        self._rows, self._columns = (_weights(*lengths) for lengths in zip(size, new, strict=True))

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 ``[height, width]`` or ``[height, width, channels]``, in and out."""
        if self._same:
            return picture
        sums = _weighted_sums(np.ascontiguousarray(picture.swapaxes(0, 1)), *self._columns)
        sums = _weighted_sums(np.ascontiguousarray(sums.swapaxes(0, 1)), *self._rows)
        return np.rint(sums, out=sums).astype(np.uint8)


def _weighted_sums(rows: np.ndarray, sources: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """New rows, float32: sums of the old ones, ``[n, new]`` of them with their weights."""
    terms = rows.take(sources.ravel(), 0, mode="clip").reshape(*sources.shape, *rows.shape[1:])
    terms = terms * weights.reshape(*weights.shape, *[1] * (rows.ndim - 1))
    total = terms[0]
    for term in terms[1:]:
        total += term
    return total


def _weights(length: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels become each new one, and their shares: int ``[n, new]`` and float32 ``[n, new]``, padded with 0."""
    scale = length / new
    columns = []
    for index in range(new):
        begin, end = index * scale, (index + 1) * scale
        cell = min(scale, length - begin)
        first, last = int(np.ceil(begin)), min(int(np.floor(end)), length - 1)
        first = min(first, last)
        column = [(pixel, 1 / cell) for pixel in range(first, last)]
        if first - begin > 1e-3:
            column.insert(0, (first - 1, (first - begin) / cell))
        if end - last > 1e-3:
            column.append((last, min(end - last, 1.0, cell) / cell))
        columns.append(column)
    sources = np.zeros((max(map(len, columns)), new), np.intp)
    weights = np.zeros(sources.shape, np.float32)
    for index, column in enumerate(columns):
        for place, (pixel, weight) in enumerate(column):
            sources[place, index], weights[place, index] = pixel, weight
    return sources, weights


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _serve(selector: selectors.BaseSelector, connection: socket.socket, console: Console | None) -> None:
    """Makes a copy by the settings, which come first, or answers a request."""
    if console is None:
        (size,) = LENGTH.unpack(_receive(connection, LENGTH.size))
        settings: dict[str, Any] = json.loads(_receive(connection, size))
        console = Console(Settings(**settings | {"shape": tuple(settings["shape"])}))
        selector.modify(connection, selectors.EVENT_READ, console)
        return
    kind, value = REQUEST.unpack(_receive(connection, REQUEST.size))
    answer = (0, False, False, console.start(value)) if kind == START else console.act(value)
    header, frame = ANSWER.pack(*answer[:3]), np.ascontiguousarray(answer[3])
    sent = connection.sendmsg([header, frame.data])
    if sent < len(header) + frame.nbytes:
        connection.sendall((header + frame.tobytes())[sent:])


def main() -> None:
    """Serves until the standard input ends."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    ALEInterface.setLoggerMode(LoggerMode.Error)
    control = socket.socket(fileno=0)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is control:
                    data, descriptors, *_ = socket.recv_fds(control, 1, 1)
                    if not descriptors and not data:
                        return
                    selector.register(socket.socket(fileno=descriptors[0]), selectors.EVENT_READ)
                    continue
                try:
                    _serve(selector, connection, key.data)
                except (EOFError, ConnectionError):  # that copy is no longer needed
                    selector.unregister(connection)
                    connection.close()


if __name__ == "__main__":
    main()
