"""Stored frames as TorchRL transitions.

Legend: B batch, R recordings, G games.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data.replay_buffers import Storage

from torchrl_sql.data.chunks import FrameReader
from torchrl_sql.data.index import EpisodeIndex, Subset
from torchrl_sql.data.recording import Manifest, Recording, fingerprint
from torchrl_sql.data.scalars import ScalarReader
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK, resolve_games

DEFAULT_GAMMA = 0.99
"""Per agent step."""


class AtariFrameStorage(Storage):
    """Read-only TorchRL storage over a :class:`FrameStore`: an index gives a transition with stacked frames.

    Index ``i`` counts the sampleable transitions of all games, game by game in the order of :attr:`games` and in time
    order within a recording. A transition starts at step ``t`` of an episode of ``T`` steps and spans
    ``m = min(n_steps, T - t)`` steps; stacks are cut from the stored frames when read, so each frame is stored once.
    Frames before an episode's start are zeros. So is the frame after the last step where it is not stored: with
    ``terminated`` nothing bootstraps from it, and transitions of episodes cut without it that would need it are not
    sampleable (:attr:`num_unsampleable`).

    The storage shows the recordings as they were committed when it was made, also after pickling; :meth:`show` is how
    it learns of more. Several threads
    may read at a time, and so may processes that inherited it.

    Args:
        store (FrameStore or path): where the episodes are.
        games (str or sequence of str, optional): see :func:`torchrl_sql.games.resolve_games`; their order defines
            ``game_id``. Default: every game of the store, in alphabetical order.

    Keyword Args:
        n_steps (int): steps of the return, >= 1.
        gamma (float): discount per agent step in [0, 1].
        first_fraction, last_fraction, every_kth_episode, transitions_per_game, newest_steps:
            show only a part of the data, see :class:`Subset`.

    Batch of :meth:`get`:
        - ``observation``, ``("next", "observation")``: uint8 ``[B, 4, 84, 84]``, oldest frame first. With
          ``n_steps=1`` the two share memory (three frames of four are the same): do not write into them.
        - ``action``: int64 ``[B]``, index into the 18 full actions.
        - ``game_id``, also under ``next``: int64 ``[B]``, index into :attr:`games`.
        - ``("next", "reward")``: float32 ``[B, 1]``, sum over ``k < m`` of ``gamma^k clip(r_{t+k}, -1, 1)``.
        - ``("next", "terminated" | "truncated" | "done")``: bool ``[B, 1]``; true if the last step of the episode is
          among the ``m`` steps, by how it ended. ``done`` is either.
        - ``steps_to_next_obs``: int64 ``[B, 1]``, ``m``.

    Raises:
        ValueError: for unknown or absent games, options out of range, or a damaged store. Reading a damaged chunk of
            frames raises :class:`~torchrl_sql.data.shards.DamagedFramesError`, which names game, file and transitions.

    Examples:
        >>> storage = AtariFrameStorage("store", games=["Breakout", "Freeway"], n_steps=3)  # doctest: +SKIP
        >>> TensorDictReplayBuffer(storage=storage, sampler=GameMixtureSampler(), batch_size=32)  # doctest: +SKIP
    """

    def __init__(
        self,
        store: FrameStore | str | os.PathLike[str],
        games: str | Sequence[str] | None = None,
        *,
        n_steps: int = 1,
        gamma: float = DEFAULT_GAMMA,
        first_fraction: float = 1.0,
        last_fraction: float = 1.0,
        every_kth_episode: int = 1,
        transitions_per_game: int | None = None,
        newest_steps: int | None = None,
    ) -> None:
        subset = Subset(
            first_fraction=first_fraction,
            last_fraction=last_fraction,
            every_kth_episode=every_kth_episode,
            transitions_per_game=transitions_per_game,
            newest_steps=newest_steps,
        )
        if not isinstance(store, FrameStore):
            store = FrameStore.open(store)
        if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
            raise ValueError(f"n_steps must be an integer >= 1, got {n_steps!r}")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
        names = resolve_games(games) if games is not None else store.games
        if not names:
            raise ValueError(f"the store {store.path} holds no games yet")
        recordings = [recording for name in names for recording in store.recordings_of(name)]
        self._init_from_recordings(store.path, names, recordings, n_steps=n_steps, gamma=float(gamma), subset=subset)

    def _init_from_recordings(
        self,
        path: Path,
        games: tuple[str, ...],
        recordings: list[Recording],
        *,
        n_steps: int,
        gamma: float,
        subset: Subset,
    ) -> None:
        self._path = path
        self.games = games
        """Names of the games; ``game_id`` indexes them."""
        self.n_steps = n_steps
        self.gamma = gamma
        self.pin_memory = False
        """Whether frames are read to page-locked memory; torch uses its blocks again and again."""
        self.reads_next = True
        """Whether ``("next", "observation")`` is there; replay buffers whose ``keys`` leave it out do without."""
        self.subset = subset
        """Which transitions of the recordings this storage shows."""
        self._take(recordings)
        super().__init__(max_size=len(self._episodes))

    def _take(self, recordings: list[Recording]) -> None:
        self._recordings = recordings
        self._episodes = self._make_index()
        self._reader = FrameReader(recordings)
        self._actions = ScalarReader(recordings, "actions")
        self._rewards = ScalarReader(recordings, "rewards")

    def show(self, recordings: Sequence[Recording]) -> None:
        """Shows other states of the same recordings from now on, such as what was committed since.

        Indices mean other transitions then; nobody may be reading.

        Args:
            recordings (sequence of Recording): as many of the same games, in the same order.

        Raises:
            ValueError: if they are of other games, or cannot be read.
        """
        games = [recording.game for recording in recordings]
        if games != (now := [recording.game for recording in self._recordings]):
            raise ValueError(f"recordings must be of {now} as now, got {games}")
        self._take(list(recordings))
        self.max_size = len(self._episodes)

    def _make_index(self) -> EpisodeIndex:
        return EpisodeIndex(self.games, self._recordings, n_steps=self.n_steps, subset=self.subset)

    @property
    def game_offsets(self) -> np.ndarray:
        """int64 ``[G + 1]``: game ``g`` has the indices ``game_offsets[g]`` to ``game_offsets[g + 1] - 1``."""
        return self._episodes.game_offsets

    @property
    def num_unsampleable(self) -> int:
        """Stored steps that cannot be sampled because the frame they would bootstrap from was never recorded."""
        return self._episodes.num_unsampleable

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def trajectories(self) -> torch.Tensor:
        """int64 ``[len]``: a number for the episode of each transition, for TorchRL's ``SliceSampler(trajectories=)``.

        Episodes that were cut do not end with ``done``, so their ends cannot be told from it.
        """
        counts = torch.from_numpy(self._episodes.num_drawable_steps)
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self._path

    def get(self, index: Any) -> TensorDict:
        """Reads transitions.

        Args:
            index: storage indices, as TorchRL's ``TensorStorage`` takes them: an int, a slice, integers of any shape
                (which becomes the batch size; ``[]`` for a single one), a boolean mask ``[len]``, ``...``, or a tuple
                of one of these. Negative ones count from the end.

        Raises:
            IndexError: if an index lies outside ``-len..len - 1``, or a mask has another length.
            TypeError: if it is none of these.
        """
        if isinstance(index, tuple):
            index = tuple(part for part in index if part is not Ellipsis) or (...,)
            if len(index) > 1:
                raise IndexError(f"a transition has one index, got {len(index)}: {index}")
            (index,) = index
        if index is Ellipsis:
            index = slice(None)
        if isinstance(index, slice):
            return self._read(np.arange(*index.indices(len(self))))
        array = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
        if array.dtype == np.bool_:
            if array.shape != (len(self),):
                raise IndexError(f"a mask must be bool [{len(self)}], got bool {list(array.shape)}")
            array = np.flatnonzero(array)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"index must be integers, a slice or a mask, got {array.dtype} {list(array.shape)}")
        flat = array.astype(np.int64).ravel()
        if flat.size and not (flat.min() >= -len(self) and flat.max() < len(self)):
            wrong = flat[(flat < -len(self)) | (flat >= len(self))][0]
            raise IndexError(f"index must lie in {-len(self)}..{len(self) - 1}, got {wrong}")
        batch = self._read(np.where(flat < 0, flat + len(self), flat))
        return batch if array.ndim == 1 else batch.reshape(array.shape)

    def _read(self, index: np.ndarray) -> TensorDict:
        episodes = self._episodes
        episode, step = episodes.locate(index)
        recording = episodes.recording[episode]
        left = episodes.num_steps[episode] - step
        span = np.minimum(self.n_steps, left)
        at_end = left <= self.n_steps
        terminated = at_end & episodes.terminated[episode]
        row, ahead = episodes.first_step[episode] + step, np.arange(self.n_steps)
        action = self._actions.read(recording, row, np.ones_like(row)).astype(np.int64)
        rewards = np.zeros((len(index), self.n_steps), np.float32)
        rewards[ahead < span[:, None]] = np.clip(self._rewards.read(recording, row, span), -1.0, 1.0)
        reward = (rewards @ self.gamma**ahead).astype(np.float32)
        stacks = self._read_stacks(episode, step, span)
        game_id = torch.from_numpy(episodes.recording_game[recording])
        next_ = {
            **({"observation": stacks[1]} if self.reads_next else {}),
            "game_id": game_id,
            "reward": torch.from_numpy(reward).unsqueeze(-1),
            "terminated": torch.from_numpy(terminated).unsqueeze(-1),
            "truncated": torch.from_numpy(at_end & ~terminated).unsqueeze(-1),
            "done": torch.from_numpy(at_end).unsqueeze(-1),
        }
        source = {
            "observation": stacks[0],
            "action": torch.from_numpy(action),
            "game_id": game_id,
            "steps_to_next_obs": torch.from_numpy(span).unsqueeze(-1),
            "next": TensorDict(next_, batch_size=[len(index)]),
        }
        return TensorDict(source, batch_size=[len(index)])

    def _read_stacks(self, episode: np.ndarray, step: np.ndarray, span: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Observations and, if they are read, the next ones."""
        if not len(step):
            empty = torch.zeros(0, FRAME_STACK, *FRAME_SHAPE, dtype=torch.uint8)
            return empty, empty
        recording, first = self._episodes.recording[episode], self._episodes.first_frame[episode]
        stop = self._episodes.stop_frame[episode]
        start = first + step - (FRAME_STACK - 1)
        if not self.reads_next:
            return (self._read_frames(recording, start, first, stop, length=FRAME_STACK),)
        if self.n_steps == 1:
            frames = self._read_frames(recording, start, first, stop, length=FRAME_STACK + 1)
            return frames[:, :FRAME_STACK], frames[:, 1:]
        # Both stacks of a transition side by side: they often lie in the same chunk, which is then decoded once.
        recording, first, stop = (np.repeat(array, 2) for array in (recording, first, stop))
        starts = np.stack([start, start + span], axis=1).ravel()
        frames = self._read_frames(recording, starts, first, stop, length=FRAME_STACK)
        return frames[::2], frames[1::2]

    def _read_frames(
        self, recording: np.ndarray, start: np.ndarray, first: np.ndarray, stop: np.ndarray, *, length: int
    ) -> torch.Tensor:
        """Windows of frames, uint8 ``[W, length, 84, 84]``, read to where a device can fetch them from."""
        frames = torch.empty(len(start), length, *FRAME_SHAPE, dtype=torch.uint8, pin_memory=self.pin_memory)
        self._reader.read(recording, start, first, stop, length=length, out=frames.numpy())
        return frames

    def fingerprint(self) -> str:
        """SHA-256 of the manifests behind this storage: the same transitions at the same indices."""
        return fingerprint(self._recordings)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Always raises ``RuntimeError``: write with :meth:`FrameStore.writer`."""
        raise RuntimeError("AtariFrameStorage is read-only; write episodes with FrameStore.writer")

    def _empty(self) -> None:
        raise RuntimeError("AtariFrameStorage is read-only and cannot be emptied")

    def contains(self, item: Any) -> Any:
        """Whether the index (int, or integers elementwise) is one of this storage."""
        if isinstance(item, torch.Tensor):
            return (item >= 0) & (item < len(self))
        return 0 <= item < len(self)

    def state_dict(self) -> dict[str, Any]:
        """What identifies the transitions; the data itself stays in the store."""
        transitions = {"n_steps": self.n_steps, "gamma": self.gamma, **asdict(self.subset)}
        return {"fingerprint": self.fingerprint(), "num_transitions": len(self), **transitions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Checks that this storage holds the same transitions.

        Raises:
            ValueError: if it does not, so that a resumed run would see other batches.
        """
        for key, value in self.state_dict().items():
            if state_dict.get(key) != value:
                raise ValueError(
                    f"{self._path} is not the data of the checkpoint: {key} {value} != {state_dict.get(key)}"
                )

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` as JSON into the folder ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "atari_frame_storage.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Counterpart of :meth:`dumps`; see :meth:`load_state_dict`."""
        self.load_state_dict(json.loads((Path(path) / "atari_frame_storage.json").read_text()))

    def attach(self, buffer: Any) -> None:
        """Called by a replay buffer that takes this storage."""
        super().attach(buffer)
        # Batches come out whole, but TorchRL's default collate function knows only its own storage classes and raises
        # for others (_get_default_collate); the buffer attaches before it looks for one.
        if getattr(buffer, "_init_collate_fn", None) is None:
            buffer._init_collate_fn = self.collate

    @staticmethod
    def collate(batch: TensorDict) -> TensorDict:
        """The batch, which comes out whole: the ``collate_fn`` that TorchRL's ``set_storage`` must be given."""
        return batch

    def __getstate__(self) -> dict[str, Any]:
        manifests = [recording.manifest for recording in self._recordings]
        return {
            "path": self._path,
            "games": self.games,
            "manifests": manifests,
            "options": {"n_steps": self.n_steps, "gamma": self.gamma, "subset": self.subset},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        manifests: list[Manifest] = state["manifests"]
        recordings = [Recording(state["path"] / manifest.game / manifest.run, manifest) for manifest in manifests]
        self._init_from_recordings(state["path"], state["games"], recordings, **state["options"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path)!r}, games={list(self.games)}, num_transitions={len(self)})"
