"""Which transitions, in which mixture of games, on which rank."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchrl.data.replay_buffers import Sampler, Storage
from torchrl.data.replay_buffers.samplers.base import _REPLACEMENT_DISPATCH

from torchrl_sql.data.permutation import PATTERN_LENGTH, game_pattern, mix, permute


class GameMixtureSampler(Sampler):
    """Draws each transition's game from a mixture, then a transition of that game uniformly, with replacement.

    The global batch of step ``t`` is a pure function of ``(seed, t)``, the storage and the batch size, whatever the
    number of ranks, reader threads or earlier calls: a counter-based generator (Philox) is keyed by the seed and
    placed by the step. Its raw bits are turned into indices here, not by ``numpy.random.Generator``, whose streams may
    change between releases. Rank ``r`` of ``R`` reads the ``r``-th of ``R`` equal slices of the global batch.
    Drawing costs ``O(B log G)``, however many transitions are stored. The buffer's torch generator is not used.

    Keyword Args:
        mixture ("games", "transitions" or sequence of float): equal probability for each game, for each transition,
            or ``G`` given weights in the order of the storage's games (normalised to sum 1).
        temperature (float): > 0; shares are raised to the power ``1 / temperature``. With ``"transitions"``, 1 keeps
            them, larger values favour games with few transitions, and ``inf`` makes all games equal.
        seed (int): 0 to 2^64 - 1.
        rank (int): which slice of the global batch this process reads.
        world_size (int): number of slices.

    ``GameMixtureSampler(replacement=False, ...)`` makes a :class:`GameMixtureSamplerWithoutReplacement`.

    Raises:
        ValueError: for values out of range.
    """

    _one_batch_size = False
    """Whether all batches must have the same size."""

    def __init__(
        self,
        *,
        mixture: Literal["games", "transitions"] | Sequence[float] = "games",
        temperature: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("seed", seed), ("rank", rank), ("world_size", world_size)):
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0..2^64-1, got {seed}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size-1, got rank {rank} of world_size {world_size}")
        if isinstance(mixture, str):
            if mixture not in ("games", "transitions"):
                raise ValueError(f"mixture must be 'games', 'transitions' or weights, got {mixture!r}")
        else:
            weights = np.asarray(mixture, np.float64)
            if weights.ndim != 1 or not np.all(np.isfinite(weights)) or (weights < 0).any() or not weights.sum() > 0:
                raise ValueError(f"mixture weights must be finite, >= 0 and not all 0, got {mixture!r}")
            mixture = tuple(weights.tolist())
        if not temperature > 0.0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}")
        self.mixture = mixture
        self.temperature = float(temperature)
        self.seed = int(seed)
        self.rank = int(rank)
        self.world_size = int(world_size)
        self.step = 0
        """Number of batches drawn so far."""
        self.batch_size: int | None = None
        """Of the first batch drawn, or of the state that was loaded; None before."""
        self._continues_a_state = False

    def sample(self, storage: Storage, batch_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Indices of the next batch, int64 ``[batch_size / world_size]``; ``batch_size`` is the global one.

        Raises:
            ValueError: see :meth:`indices` and :meth:`advance`.
        """
        index = self.indices(storage, batch_size, self.step)
        self.advance(storage, batch_size)
        return index, {}

    def advance(self, storage: Storage, batch_size: int) -> None:
        """Counts the batch of :attr:`step`, whose indices were drawn with :meth:`indices`, as sampled.

        Raises:
            ValueError: if it does not continue the batches before it, or those of the loaded state that gave the batch
                size.
        """
        if (self._one_batch_size or self._continues_a_state) and self.batch_size not in (None, batch_size):
            raise ValueError(f"batch_size must be {self.batch_size}, as in the batches before, got {batch_size}")
        self.batch_size, self._continues_a_state = self.batch_size or batch_size, False
        self.step += 1

    def indices(self, storage: Storage, batch_size: int, step: int) -> torch.Tensor:
        """This rank's slice of the global batch of ``step``, int64 ``[batch_size / world_size]``.

        Raises:
            ValueError: if the batch cannot be divided evenly among the ranks, or a game of positive weight has no
                sampleable transition.
            TypeError: if the storage does not say where its games begin (``game_offsets``).
        """
        check_batch_size(batch_size, self.world_size)
        share = batch_size // self.world_size
        if getattr(storage, "game_offsets", None) is None:
            raise TypeError(f"{type(self).__name__} needs a storage with game_offsets, got {type(storage).__name__}")
        index = self._global_indices(storage, batch_size, step)
        return torch.from_numpy(index[self.rank * share : (self.rank + 1) * share].copy())

    def _global_indices(self, storage: Storage, batch_size: int, step: int) -> np.ndarray:
        offsets: np.ndarray = storage.game_offsets
        sizes = np.diff(offsets)
        key, counter = np.array([self.seed, 0], np.uint64), np.array([0, 0, step, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter).random_raw(2 * batch_size)
        game = _choose(bits[:batch_size], self._weights(storage))
        return offsets[game] + _scale_bits(bits[batch_size:], sizes[game])

    def _weights(self, storage: Storage) -> np.ndarray:
        sizes = np.diff(storage.game_offsets)
        if self.mixture == "transitions":
            weights = sizes.astype(np.float64)
        elif self.mixture == "games":
            weights = np.ones(len(sizes))
        else:
            weights = np.asarray(self.mixture)
            if len(weights) != len(sizes):
                raise ValueError(f"mixture must have one weight for each of the {len(sizes)} games, got {len(weights)}")
        empty = (weights > 0) & (sizes == 0)
        if empty.any() or not weights.any():
            raise ValueError(
                f"{_name_of(empty.argmax(), storage)} has no sampleable transition: none is stored, or the part that "
                "is shown has none (first_fraction, last_fraction, every_kth_episode, newest_steps), or its episodes "
                "are cut before what n_steps or windows need. Leave the game out, or give it no weight in the mixture"
            )
        if self.temperature != 1.0:
            # Relative to the largest, so that no power overflows. 0 stays 0.
            weights = np.where(weights > 0, (weights / weights.max()) ** (1.0 / self.temperature), 0.0)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The number of batches drawn, and what the batches follow from."""
        mixture = self.mixture if isinstance(self.mixture, str) else list(self.mixture)
        settings = {"mixture": mixture, "temperature": self.temperature, "seed": self.seed}
        return {"sampler": type(self).__name__, **settings, "batch_size": self.batch_size, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the batch after the last one drawn, on any rank of any number.

        Raises:
            ValueError: if the state is that of other batches: of another kind of sampler, mixture, temperature, seed or
                batch size. A sampler that has not drawn yet takes the state's batch size.
        """
        for key, value in self.state_dict().items():
            other = state_dict.get(key)
            unknown = key == "batch_size" and None in (value, other)
            if key != "step" and value != other and not unknown:
                raise ValueError(f"{key} must be {other!r} as in the state to continue from, got {value!r}")
        self.step = int(state_dict["step"])
        self._continues_a_state = self.batch_size is None
        self.batch_size = self.batch_size or state_dict["batch_size"]

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` as JSON into the folder ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "game_mixture_sampler.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Counterpart of :meth:`dumps`."""
        self.load_state_dict(json.loads((Path(path) / "game_mixture_sampler.json").read_text()))

    def _empty(self) -> None:
        self.step, self.batch_size = 0, None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(mixture={self.mixture!r}, temperature={self.temperature}, seed={self.seed}, "
            f"rank={self.rank}, world_size={self.world_size}, step={self.step})"
        )


class GameMixtureSamplerWithoutReplacement(GameMixtureSampler):
    """Goes through each game in random orders: none of its transitions comes twice before all have come once.

    With ``mixture="transitions"`` and temperature 1 that holds for the storage as a whole. Takes the arguments of
    :class:`GameMixtureSampler` and keeps its promises: the batch of step ``t`` follows from ``(seed, t)`` alone, and no
    order is held in memory. Games take turns by a fixed pattern, so every batch has nearly the shares of the mixture,
    and the long run has them to one part in 65,536. All batches must have the same size.

    ``ran_out`` is true after the batch that ends an epoch: as many draws as there are transitions to draw. A loop over
    the buffer ends there; the next one goes on with the next batch.
    """

    _one_batch_size = True
    _ran_out = False

    @property
    def ran_out(self) -> bool:
        """Whether the last batch ended an epoch."""
        return self._ran_out

    @ran_out.setter
    def ran_out(self, value: bool) -> None:
        self._ran_out = value

    def advance(self, storage: Storage, batch_size: int) -> None:
        """See :meth:`GameMixtureSampler.advance`."""
        super().advance(storage, batch_size)
        sizes = np.diff(storage.game_offsets)
        epoch = int(sizes[self._weights(storage) > 0].sum())
        num_drawn = self.step * batch_size
        self._ran_out = num_drawn // epoch > (num_drawn - batch_size) // epoch
        # TorchRL's own buffers read no more batches ahead than this, and none while ran_out is true: set it last.
        self._remaining_batches = -((num_drawn % epoch - epoch) // batch_size)

    def _global_indices(self, storage: Storage, batch_size: int, step: int) -> np.ndarray:
        offsets, weights = storage.game_offsets, self._weights(storage)
        if self.mixture == "transitions" and self.temperature == 1.0:
            offsets, weights = offsets[[0, -1]], np.ones(1)
        game_at, before, count = game_pattern(tuple(weights.tolist()))
        never_drawn = (weights > 0) & (count == 0)
        if never_drawn.any():
            share = weights[never_drawn][0] / weights.sum()
            raise ValueError(
                f"{_name_of(never_drawn.argmax(), storage)} has a share of {share:.1e} in the mixture, too small "
                "without replacement"
            )
        draw = np.uint64(step * batch_size) + np.arange(batch_size, dtype=np.uint64)
        block, position = np.divmod(draw, np.uint64(PATTERN_LENGTH))
        game = game_at[position]
        # This is draw number `block * count + before` of its game.
        size = np.diff(offsets).astype(np.uint64)[game]
        epoch, position = np.divmod(block * count[game] + before[position], size)
        key = mix(mix(mix(np.array([self.seed], np.uint64)) + game) + epoch)
        return offsets[game] + permute(position, size, key).astype(np.int64)


_REPLACEMENT_DISPATCH[GameMixtureSampler] = GameMixtureSamplerWithoutReplacement  # TorchRL's own way to register it


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Checks that a global batch divides evenly among the ranks.

    Raises:
        ValueError: if not.
    """
    is_integer = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
    if not is_integer or batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size must be a positive multiple of world_size {world_size}, got {batch_size!r}")


def _name_of(game: np.integer, storage: Storage) -> str:
    return storage.games[game] if hasattr(storage, "games") else f"game {game} of the storage"


def _choose(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Positions in ``weights`` with probabilities proportional to them, int64, from uniform uint64 bits."""
    cumulative = np.cumsum(weights)
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(cumulative / cumulative[-1], uniform, side="right")


def _scale_bits(bits: np.ndarray, size: np.ndarray) -> np.ndarray:
    """``floor(bits * size / 2^64)`` exactly, for uint64 bits and sizes below 2^32: a uniform int64 in ``0..size-1``."""
    size = size.astype(np.uint64)
    half = np.uint64(32)
    low = ((bits & np.uint64(0xFFFFFFFF)) * size) >> half
    return (((bits >> half) * size + low) >> half).astype(np.int64)
