"""Episodes with recognisable frames, and the definition of a transition written as plainly as possible."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore


@dataclass
class Episode:
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    behaviour: int = 0
    cut: bool = False


def make_episode(first_tag: int, num_steps: int, *, terminated: bool = True, final: bool = False) -> Episode:
    """Frame k carries the number first_tag + k in its pixels, among noise that lossy storage would not survive."""
    rng = np.random.default_rng(first_tag)
    frames = np.zeros((num_steps + final, 84, 84), np.uint8)
    frames[:, 60:] = np.random.default_rng([first_tag, 1]).integers(0, 256, (num_steps + final, 24, 84))
    frames[:, 0, :4] = (first_tag + np.arange(num_steps + final)).astype("<u4").view(np.uint8).reshape(-1, 4)
    frames[:, 1, 0] = 255
    return Episode(frames, rng.integers(0, 18, num_steps), rng.normal(0, 2, num_steps).astype("f4"), terminated)


def make_episodes(shapes: Sequence[tuple[int, bool, bool]], first_tag: int = 0) -> list[Episode]:
    """Episodes of (num_steps, terminated, final frame stored), with distinct frames throughout."""
    episodes = []
    for num_steps, terminated, final in shapes:
        episodes.append(make_episode(first_tag, num_steps, terminated=terminated, final=final))
        first_tag += num_steps + 1
    return episodes


def add(writer: Any, episodes: Sequence[Episode]) -> None:
    for e in episodes:
        writer.add_episode(e.frames, e.actions, e.rewards, e.terminated, behaviour=e.behaviour, cut=e.cut)


def write(store: FrameStore, game: str, episodes: Sequence[Episode], **kwargs: Any) -> None:
    with store.writer(game, source="test", **kwargs) as writer:
        add(writer, episodes)


def reference(episodes: Sequence[Episode], n_steps: int, gamma: float) -> Iterator[dict[str, Any]]:
    """Every sampleable transition in order, one frame, one step at a time."""
    for e in episodes:
        num_steps = len(e.actions)

        def stack(newest: int, frames: np.ndarray = e.frames) -> np.ndarray:
            blank = np.zeros((84, 84), np.uint8)
            rows = range(newest - 3, newest + 1)
            return np.stack([frames[k] if 0 <= k < len(frames) else blank for k in rows])

        for t in range(num_steps):
            span = min(n_steps, num_steps - t)
            at_end = t + span == num_steps
            if at_end and not e.terminated and len(e.frames) == num_steps:
                continue
            yield {
                "observation": stack(t),
                "action": int(e.actions[t]),
                "steps_to_next_obs": span,
                "next_observation": stack(t + span),
                "reward": sum(gamma**k * min(max(float(e.rewards[t + k]), -1.0), 1.0) for k in range(span)),
                "terminated": at_end and e.terminated,
                "truncated": at_end and not e.terminated,
            }


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of every file of a store."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


shapes = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=4)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers of this file (test folders are not importable)."""
    return SimpleNamespace(
        Episode=Episode,
        make_episode=make_episode,
        make_episodes=make_episodes,
        add=add,
        write=write,
        reference=reference,
        tree=tree,
        shapes=shapes,
    )


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can enter; those of ``tmp_path`` are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """A context in which nothing can be written in a folder, also where the tests run as root."""

    @contextmanager
    def context(folder: Path) -> Iterator[None]:
        mode, user = folder.stat().st_mode, os.geteuid()
        folder.chmod(0o555)
        if user == 0:  # Permissions do not bind root. Its files do not belong to this user, whom they bind.
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)
            folder.chmod(mode)

    return context


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    return FrameStore.create(tmp_path / "store", chunk_frames=4, shard_frames=8)


@pytest.fixture(scope="session")
def two_games(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    """Pong: 3 episodes, 60 steps. Breakout: 2 episodes in 2 runs, 20 steps."""
    store = FrameStore.create(tmp_path_factory.mktemp("two") / "store", chunk_frames=4, shard_frames=16)
    write(store, "Pong", make_episodes([(30, True, False), (20, False, True), (10, True, True)]))
    write(store, "Breakout", make_episodes([(12, True, False)], 1000), run="a")
    write(store, "Breakout", make_episodes([(8, True, False)], 2000), run="b")
    return store
