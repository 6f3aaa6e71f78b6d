"""Random orders that take no memory, for drawing without replacement.

Legend: B batch, G games.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_NUM_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, made odd."""

PATTERN_LENGTH = 2**16
"""Draws after which the order of games repeats."""


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Images of ``position`` under pseudo-random permutations of ``0..size - 1``, one for each ``(size, key)``.

    A Feistel network on pairs ``(high, low)`` from a rectangle that holds ``size``; what falls outside is permuted
    again until it falls inside (cycle walking), which takes 1 + O(1/sqrt(size)) passes on average.

    Args:
        position (uint64 ``[B]``): in ``0..size - 1``.
        size (uint64 ``[B]``): 1 to 2^52.
        key (uint64 ``[B]``): chooses the permutation; well mixed, see :func:`mix`.

    Returns:
        uint64 ``[B]`` in ``0..size - 1``: different for different positions under the same size and key.
    """
    height = np.ceil(np.sqrt(size)).astype(np.uint64)
    width = (size + height - np.uint64(1)) // height
    out = position.copy()
    left = np.arange(len(position))
    while left.size:
        out[left] = _rounds(out[left], height[left], width[left], key[left])
        left = left[out[left] >= size[left]]
    return out


def _rounds(value: np.ndarray, height: np.ndarray, width: np.ndarray, key: np.ndarray) -> np.ndarray:
    high, low = np.divmod(value, width)
    for index in range(0, _NUM_ROUNDS, 2):
        high = (high + mix(low ^ mix(key + np.uint64(index))) % height) % height
        low = (low + mix(high ^ mix(key + np.uint64(index + 1))) % width) % width
    return high * width + low


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over all (the output function of splitmix64)."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=4)
def game_pattern(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fixed order of games in which every stretch has nearly the shares of the whole.

    Position ``p`` takes the game in whose part of [0, 1) the fractional part of ``p`` times the golden ratio lies, the
    most evenly spread of such sequences.

    Args:
        weights (tuple of float): ``G`` shares, not normalised.

    Returns:
        - uint64 ``[PATTERN_LENGTH]``: game at each position;
        - uint64 ``[PATTERN_LENGTH]``: how often it came before;
        - uint64 ``[G]``: how often each game comes in all.
    """
    edges = np.cumsum(weights) / np.sum(weights)
    # From the integers 0..2^64 - 1, so that the pattern is the same on every machine.
    uniform = (np.arange(PATTERN_LENGTH, dtype=np.uint64) * np.uint64(_GOLDEN) >> np.uint64(11)) * 2.0**-53
    game = np.searchsorted(edges, uniform, side="right")
    count = np.bincount(game, minlength=len(weights))
    order = np.argsort(game, kind="stable")
    before = np.empty(PATTERN_LENGTH, np.int64)
    before[order] = np.arange(PATTERN_LENGTH) - (np.cumsum(count) - count)[game[order]]
    return game.astype(np.uint64), before.astype(np.uint64), count.astype(np.uint64)
