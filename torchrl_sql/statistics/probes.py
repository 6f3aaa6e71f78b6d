"""How well a linear model reads labels of states from features, on episodes that it has not seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from torchrl_sql.statistics.scores import Array

PENALTIES = 10.0 ** np.arange(-5, 3)
"""Of ridge regression, in units of the features' mean squared distance from their mean."""

MOST_COMMON = 0.95
"""A label is not read if one value has more than this share of the states that fit, choose or test."""

_FIT, _CHOOSE, _TEST = range(3)
_MIN_EPISODES = 4
_BLOCK = 4096
"""Features of which products are summed at a time."""


class LinearProbe:
    """Ridge regression from features to labels, one label at a time.

    The first half of the episodes fits, the next quarter chooses among :data:`PENALTIES`, then both fit again, and the
    last quarter tests. Features are neither scaled nor selected, so that what a network gives more weight to is easier
    to read. With fewer states than features, products of states take the place of the features.

    Args:
        features (array): ``[N, D]`` of ``N`` states.
        episodes (array): int ``[N]``, the episode of each state.

    Raises:
        ValueError: for fewer than four episodes, or features that are not finite.
    """

    def __init__(self, features: NDArray[np.floating], episodes: NDArray[np.int64]) -> None:
        self._parts = split_episodes(episodes)
        if not np.isfinite(features).all():
            raise ValueError("features must be finite numbers")
        self._products = np.zeros((len(features), len(features)))
        self._least = 0.0  # mean squared distance that is more than rounding
        for start in range(0, features.shape[1], _BLOCK):
            block = features[:, start : start + _BLOCK].astype(np.float64)
            self._least += 1e-12 * np.square(block).sum(1).mean()
            block -= block.mean(0)
            self._products += block @ block.T

    def r2(self, label: Array) -> float:
        """Share of the label's variance in the test states that is read: 1 is perfect, 0 no better than their mean.

        Args:
            label (array): ``[N]``; states in which it is NaN are left out.

        Raises:
            ValueError: if :func:`why_unread` has an answer.
        """
        if (reason := why_unread(label, self._parts)) is not None:
            raise ValueError(f"a label must be one that can be read, but it is {reason}")
        known = np.isfinite(label)
        fit, choose, test = ((self._parts == part) & known for part in (_FIT, _CHOOSE, _TEST))
        penalty = max(PENALTIES, key=lambda penalty: self._score(label, fit, choose, penalty))
        return self._score(label, fit | choose, test, penalty)

    def _score(self, label: Array, fit: NDArray[np.bool_], test: NDArray[np.bool_], penalty: float) -> float:
        """R^2 on ``test`` of the regression, with intercept, that ``fit`` gives."""
        products, across = self._products[np.ix_(fit, fit)], self._products[np.ix_(test, fit)]
        column, mean = products.mean(0), products.mean()
        centred = products - column - column[:, None] + mean
        scale = np.trace(centred) / len(centred)
        if scale <= self._least:  # all states look alike
            predicted = np.full(test.sum(), label[fit].mean())
        else:
            centred[np.diag_indices_from(centred)] += penalty * scale
            weights = linalg.solve(centred, label[fit] - label[fit].mean(), assume_a="pos")
            predicted = label[fit].mean() + (across - column - across.mean(1, keepdims=True) + mean) @ weights
        return float(1 - np.square(label[test] - predicted).sum() / np.square(label[test] - label[test].mean()).sum())


def split_episodes(episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the states of each episode are for, ``[N]``: 0 to fit (half of the episodes), 1 to choose, 2 to test.

    Raises:
        ValueError: for fewer than four episodes.
    """
    numbers, place = np.unique(episodes, return_inverse=True)
    if len(numbers) < _MIN_EPISODES:
        raise ValueError(f"episodes must be at least {_MIN_EPISODES}, got {len(numbers)}")
    quarter = len(numbers) // 4
    ends = np.array([len(numbers) - 2 * quarter, len(numbers) - quarter])
    return np.searchsorted(ends, place, side="right")


def why_unread(label: Array, parts: NDArray[np.int64]) -> str | None:
    """Why a label cannot be read, in words; None if it can.

    Args:
        label (array): ``[N]``, NaN where there is none.
        parts (array): as :func:`split_episodes` gives.
    """
    for part, use in ((_FIT, "fit"), (_CHOOSE, "choose"), (_TEST, "test")):
        values = label[(parts == part) & np.isfinite(label)]
        if not len(values):
            return f"in none of the states that {use}"
        _, counts = np.unique(values, return_counts=True)
        if counts.max() > MOST_COMMON * len(values):
            return f"the same in {counts.max() / len(values):.0%} of the states that {use}"
    return None
