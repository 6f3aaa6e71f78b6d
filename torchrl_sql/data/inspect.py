"""What a store holds, game by game."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from torchrl_sql.data.frames import FRAME_SHAPE
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import NUM_ACTIONS


@dataclass(frozen=True, kw_only=True)
class GameSummary:
    """Statistics of one game, all its runs taken together.

    Attributes:
        game (str): name of the game.
        num_transitions (int): stored agent steps.
        num_unsampleable (int): those that one-step targets cannot use, because the frame that follows was never stored.
        num_bytes (int): on disk, indices and manifests included.
        returns (array): float64 ``[episodes]``, sums of the stored rewards.
        lengths (array): int64 ``[episodes]``, agent steps.
        components (array): int64 ``[episodes]``, which of ``component_names`` played.
        component_names (tuple of str): the behaviour policies.
        action_counts (array): int64 ``[18]``.
        rewards ("raw", "clipped" or "mixed"): what the returns are sums of.
        sources (tuple of str): where the runs came from.
    """

    game: str
    num_transitions: int
    num_unsampleable: int
    num_bytes: int
    returns: np.ndarray
    lengths: np.ndarray
    components: np.ndarray
    component_names: tuple[str, ...]
    action_counts: np.ndarray
    rewards: str
    sources: tuple[str, ...]

    @property
    def bytes_per_transition(self) -> float:
        """Bytes on disk for each stored transition."""
        return self.num_bytes / max(self.num_transitions, 1)

    @property
    def ratio_to_raw(self) -> float:
        """How many times smaller than one raw frame (7,056 bytes) a transition is."""
        return prod(FRAME_SHAPE) / self.bytes_per_transition


def summarise(store: FrameStore) -> Iterator[GameSummary]:
    """Yields the summary of each game of a store, in its order.

    Raises:
        ValueError, FileNotFoundError: if a manifest or a member is damaged or missing.
    """
    for game in store.games:
        runs = store.runs_of(game)
        names: list[str] = []
        components = []
        for run in runs:
            for name in run.manifest.components:
                if name not in names:
                    names.append(name)
            position = np.array([names.index(name) for name in run.manifest.components])
            components.append(position[run.episodes["component"]])
        episodes = np.concatenate([run.episodes for run in runs])
        rewards = {run.manifest.rewards for run in runs}
        yield GameSummary(
            game=game,
            num_transitions=sum(run.num_steps for run in runs),
            num_unsampleable=int((~episodes["terminated"].astype(bool) & ~episodes["has_final_frame"].astype(bool)).sum()),
            num_bytes=sum(_folder_bytes(run.path) for run in runs),
            returns=np.concatenate([run.episode_returns() for run in runs]),
            lengths=episodes["num_steps"].astype(np.int64),
            components=np.concatenate(components),
            component_names=tuple(names),
            action_counts=sum(
                (np.bincount(run.actions, minlength=NUM_ACTIONS) for run in runs), np.zeros(NUM_ACTIONS, np.int64)
            ),
            rewards=rewards.pop() if len(rewards) == 1 else "mixed",
            sources=tuple(dict.fromkeys(run.manifest.source for run in runs)),
        )


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
