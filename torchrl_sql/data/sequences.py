"""Stored frames as windows of consecutive steps with returns-to-go, for sequence models.

Legend: B batch, K steps of a window.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_sql.data.index import EpisodeIndex
from torchrl_sql.data.storage import AtariFrameStorage
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import FRAME_SHAPE


class AtariSequenceStorage(AtariFrameStorage):
    """Read-only TorchRL storage over a :class:`FrameStore`: an index gives a window of ``K`` steps of one episode.

    A window begins at the transition of its index, and every step that can be drawn begins one. Where fewer than ``K``
    steps of the episode (or of the part of it that is shown) are left, the rest is padding: zeros, with ``mask`` False.
    Steps of an episode that is cut have no return-to-go and are not sampleable. All else, the samplers included, is as
    with :class:`AtariFrameStorage`, from the same files.

    Args:
        store (FrameStore or path): where the episodes are.
        games (str or sequence of str, optional): see :class:`AtariFrameStorage`.

    Keyword Args:
        num_steps (int): ``K``.
        first_fraction, last_fraction, every_kth_episode, transitions_per_game, newest_steps:
            show only a part of the data, see :class:`Subset`.
            Windows end where it ends; returns-to-go do not.

    Batch of :meth:`get`:
        - ``observation``: uint8 ``[B, K, 84, 84]``, one frame a step, oldest first.
        - ``action``: int64 ``[B, K]``, indices into the 18 full actions.
        - ``return_to_go``: float32 ``[B, K]``, undiscounted sum of the clipped rewards from the step to the episode's
          end.
        - ``mask``: bool ``[B, K]``, False for padding.
        - ``game_id``: int64 ``[B]``, index into :attr:`games`.
        - ``("next", "reward")``: float32 ``[B, K, 1]``, clipped to [-1, 1].
        - ``("next", "terminated" | "truncated" | "done")``: bool ``[B, K, 1]``, true at an episode's last step.

    Raises:
        ValueError: as :class:`AtariFrameStorage` does.
    """

    def __init__(
        self,
        store: FrameStore | str | os.PathLike[str],
        games: str | Sequence[str] | None = None,
        *,
        num_steps: int = 4,
        first_fraction: float = 1.0,
        last_fraction: float = 1.0,
        every_kth_episode: int = 1,
        transitions_per_game: int | None = None,
        newest_steps: int | None = None,
    ) -> None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps must be an integer >= 1, got {num_steps!r}")
        self.num_steps = num_steps
        super().__init__(
            store,
            games,
            first_fraction=first_fraction,
            last_fraction=last_fraction,
            every_kth_episode=every_kth_episode,
            transitions_per_game=transitions_per_game,
            newest_steps=newest_steps,
        )

    def _make_index(self) -> EpisodeIndex:
        return EpisodeIndex(self.games, self._recordings, n_steps=None, subset=self.subset)

    def _read(self, index: np.ndarray) -> TensorDict:
        episodes, ahead = self._episodes, np.arange(self.num_steps)
        episode, step = episodes.locate(index)
        recording = episodes.recording[episode]
        span = np.minimum(self.num_steps, episodes.num_drawable_steps[episode] - step)
        mask = ahead < span[:, None]
        at_end = mask & (step[:, None] + ahead == episodes.num_steps[episode, None] - 1)
        terminated = at_end & episodes.terminated[episode, None]
        action, reward, return_to_go = self._read_scalars_of_windows(episode, step, mask)
        first = episodes.first_frame[episode]
        start = first + step
        if len(index):
            frames = self._read_frames(recording, start, start, start + span, length=self.num_steps)
        else:
            frames = torch.zeros(0, self.num_steps, *FRAME_SHAPE, dtype=torch.uint8)
        next_ = {
            "reward": torch.from_numpy(reward).unsqueeze(-1),
            "terminated": torch.from_numpy(terminated).unsqueeze(-1),
            "truncated": torch.from_numpy(at_end & ~terminated).unsqueeze(-1),
            "done": torch.from_numpy(at_end).unsqueeze(-1),
        }
        source = {
            "observation": frames,
            "action": torch.from_numpy(action),
            "return_to_go": torch.from_numpy(return_to_go),
            "mask": torch.from_numpy(mask),
            "game_id": torch.from_numpy(episodes.recording_game[recording]),
            "next": TensorDict(next_, batch_size=[len(index)]),
        }
        return TensorDict(source, batch_size=[len(index)])

    def _read_scalars_of_windows(
        self, episode: np.ndarray, step: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Actions int64, clipped rewards float32 and returns-to-go float32, each ``[B, K]`` and 0 where padded."""
        action, reward = np.zeros(mask.shape, np.int64), np.zeros(mask.shape)
        recording, first = self._episodes.recording[episode], self._episodes.first_step[episode]
        left = self._episodes.num_steps[episode] - step
        action[mask] = self._actions.read(recording, first + step, mask.sum(1))
        rest = np.clip(self._rewards.read(recording, first + step, left), -1.0, 1.0)
        begin = np.cumsum(left) - left
        reward[mask] = rest[(begin[:, None] + np.arange(self.num_steps))[mask]]
        total = np.add.reduceat(rest, begin, dtype=np.float64) if len(rest) else np.zeros(len(mask))
        before = np.cumsum(reward, axis=1) - reward
        return action, reward.astype(np.float32), np.where(mask, total[:, None] - before, 0.0).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """What identifies the data; the data itself stays in the store."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "num_steps": self.num_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]
        super().__setstate__(state)
