"""A logging replay buffer that writes what Dopamine's writes, and keeps what really happened."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.games import GAMES

GARBAGE = 173


@dataclass
class Played:
    """One episode as it was played; ``first_row`` counts all rows the buffer ever got, padding included."""

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    first_row: int


@dataclass
class DopamineLog:
    """Logs when the cursor stands one row before the end, looking once a call, as the original does.

    ``looks_at_every_row``: a writer that looks after each row, so that a checkpoint may end inside padding.
    ``is_plain``: no log but Dopamine itself, whose runner calls :meth:`log` now and then.
    """

    folder: Path
    capacity: int
    num_actions: int
    seed: int = 0
    looks_at_every_row: bool = False
    is_plain: bool = False
    add_count: int = 0
    logged: list[tuple[int, int]] = field(default_factory=list)  # Rows of each checkpoint, counted from the start.
    flushed: int | None = None  # Number of the final flush.
    ends: set = field(default_factory=set)  # Rows of the ring that end an episode.
    episodes: list[Played] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rng = np.random.default_rng(self.seed)
        n = self.capacity
        self.rows = {  # Memory that nobody initialised.
            "observation": np.full((n, 84, 84), GARBAGE, np.uint8),
            "action": np.full(n, GARBAGE << 8, np.int32),
            "reward": np.full(n, np.nan, np.float32),
            "terminal": np.full(n, GARBAGE, np.uint8),
        }

    def play(self, num_steps: int, *, black_frames: Sequence[int] = (), is_terminal: bool = True) -> None:
        """Plays one episode; frame k of the log carries k + 1 in its pixels. Newer Dopamine does not mark time-outs."""
        first = self.add_count + 3
        frames = np.zeros((num_steps, 84, 84), np.uint8)
        frames[:, 0, :4] = (first + 1 + np.arange(num_steps)).astype("<u4").view(np.uint8).reshape(-1, 4)
        frames[list(black_frames)] = 0
        actions = self.rng.integers(0, self.num_actions, num_steps)
        rewards = self.rng.integers(-1, 2, num_steps).astype(np.float32)
        self.episodes.append(Played(frames, actions, rewards, first))
        for step in range(num_steps):
            is_last = step == num_steps - 1
            self._add(frames[step], actions[step], rewards[step], is_last and is_terminal, begins=step == 0)
            cursor = (self.add_count - 1) % self.capacity
            self.ends = self.ends | {np.int64(cursor)} if is_last else self.ends - {cursor}

    def _add(self, *row: object, begins: bool) -> None:
        for values in [(0, 0, 0, 0)] * 3 * begins + [row]:
            for name, value in zip(self.rows, values, strict=True):
                self.rows[name][self.add_count % self.capacity] = value
            self.add_count += 1
            if self.looks_at_every_row:
                self._log_if_due()
        if not self.looks_at_every_row:
            self._log_if_due()

    def _log_if_due(self) -> None:
        if self.add_count % self.capacity == self.capacity - 1 and not self.is_plain:
            self.log(self.add_count)

    def log(self, add_count: int) -> None:
        cursor, k = self.add_count % self.capacity, len(self.logged)
        for name, array in self.rows.items():
            self.save(f"$store$_{name}_ckpt.{k}.gz", array)
        self.save(f"add_count_ckpt.{k}.gz", np.array(add_count))
        self.save(f"invalid_range_ckpt.{k}.gz", np.arange(cursor - 1, cursor + 4) % self.capacity)
        self.logged.append((max(self.add_count - self.capacity, 0), self.add_count))

    def log_final(self) -> None:
        self.flushed = len(self.logged)
        self.log(self.add_count % self.capacity)

    def save(self, name: str, array: np.ndarray) -> None:
        with gzip.open(self.folder / name, "wb", compresslevel=1) as file:
            np.save(file, array, allow_pickle=False)


@dataclass
class Expected:
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    behaviour: int = 0


def covered(log: DopamineLog, checkpoints: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of rows [a, b) that the checkpoints hold together."""
    stretches: list[tuple[int, int]] = []
    for k in checkpoints:
        begin, end = log.logged[k]
        if not stretches and k == log.flushed:  # Whether the rows past the cursor were ever written is unknown.
            begin = end - end % log.capacity - (k > 0)
        if stretches and stretches[-1][1] >= begin:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((begin, end))
    return stretches


def expected_episodes(
    log: DopamineLog, game: str, checkpoints: Sequence[int], *, limit: int = 27_000
) -> list[Expected]:
    """What an import must find, in time order.

    An episode whose start is not covered is lost (that it starts shows only in the row before); one whose end is not
    is cut.
    """
    full = np.array(GAMES[game].minimal_actions)
    found = []
    for e in log.episodes:
        for begin, end in covered(log, checkpoints):
            first_padding = e.first_row - 3
            if (begin < first_padding or begin == first_padding == 0) and e.first_row < end:
                n = min(len(e.frames), end - e.first_row)
                ended = n == len(e.frames) and n != limit
                found.append(Expected(e.frames[:n], full[e.actions[:n]], e.rewards[:n], ended))
    return found


def stored_episodes(store: FrameStore, game: str, run: str = "1", *, final: bool = False) -> list[Expected]:
    """Episodes of the store, in the order in which it says that they were played, without their final frames, which
    time-outs have if ``final``.
    """
    data = store.recording(game, run)
    frames = data.open_frames()[: data.num_frames].read().result()
    episodes = []
    first_steps = data.first_steps()
    for record, step in zip(data.episodes, first_steps, strict=True):
        first, n = int(record["first_frame"]), int(record["num_steps"])
        assert record["has_final_frame"] == (final and not record["terminated"])
        episodes.append(
            Expected(
                frames[first : first + n],
                data.actions[step : step + n],
                data.rewards[step : step + n],
                bool(record["terminated"]),
            )
        )
    return episodes


def number(episode: Expected) -> int:
    return int(episode.frames[0, 0, :4].copy().view("<u4")[0])


def check_same(found: Sequence[Expected], expected: Sequence[Expected]) -> None:
    assert [(number(e), len(e.actions), e.terminated) for e in found] == [
        (number(e), len(e.actions), e.terminated) for e in expected
    ]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def check_transitions(store: FrameStore, game: str, expected: Sequence[Expected], lab: SimpleNamespace) -> None:
    """Every transition that can be sampled, one by one, against the plainest definition."""
    batch = AtariFrameStorage(store, game)[:]
    order = np.argsort(batch["observation"][:, -1, 0, :4].contiguous().numpy().view("<u4")[:, 0], kind="stable")
    naive = list(lab.reference(expected, 1, 0.99))
    assert len(naive) == len(batch)
    if not naive:
        return
    found = batch[order]
    goes_on = np.array([not t["terminated"] for t in naive])
    for key, name in (("observation", "observation"), (("next", "observation"), "next_observation")):
        rows = slice(None) if name == "observation" else goes_on
        np.testing.assert_array_equal(found[key].numpy()[rows], np.stack([t[name] for t in naive])[rows])
    np.testing.assert_array_equal(found["action"].numpy(), [t["action"] for t in naive])
    np.testing.assert_array_equal(found["next", "reward"].numpy()[:, 0], [t["reward"] for t in naive])
    np.testing.assert_array_equal(found["next", "terminated"].numpy()[:, 0], [t["terminated"] for t in naive])


def new_log(
    root: Path, *, game: str = "Pong", run: int = 1, capacity: int = 10, seed: int = 0, **kwargs
) -> DopamineLog:
    folder = root / game / str(run) / "replay_logs"
    return DopamineLog(folder, capacity, len(GAMES[game].minimal_actions), seed=seed, **kwargs)


@pytest.fixture
def log(tmp_path):
    """Rows: A 0-3 (1 step), B 4-13 (7), C 14-18 (2), D 19-30 (9); logged at 9, 19, 29 and, finally, 31."""
    log = new_log(tmp_path / "dqn")
    for num_steps in (1, 7, 2, 9):
        log.play(num_steps)
    log.log_final()
    assert log.logged == [(0, 9), (9, 19), (19, 29), (21, 31)]
    return log


@pytest.fixture
def small_store(tmp_path):
    return FrameStore.create(tmp_path / "store", chunk_frames=2, shard_frames=8)


@pytest.fixture(scope="session")
def dopamine() -> SimpleNamespace:
    """The helpers of this file (test folders are not importable)."""
    return SimpleNamespace(
        Log=DopamineLog,
        new_log=new_log,
        expected=expected_episodes,
        stored=stored_episodes,
        check_same=check_same,
        check_transitions=check_transitions,
        number=number,
    )
