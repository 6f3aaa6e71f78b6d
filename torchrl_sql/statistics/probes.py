"""How well a linear model reads labels of states from features, on episodes that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping

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
_ROUNDING = 1e-12
"""Share of the features' mean square that differences between states must exceed to be any."""


class LinearProbe:
    """Ridge regression from features to labels.

    The first half of the episodes fits, the next quarter chooses among :data:`PENALTIES` for each label, then both fit
    again, and the last quarter tests. Features are neither scaled nor selected, so that what a network gives more
    weight to is easier to read. With fewer states than features, products of states take the place of the features.

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
        self._least = 0.0
        for start in range(0, features.shape[1], _BLOCK):
            block = features[:, start : start + _BLOCK].astype(
                np.float64
            )  # in float32 rounding would exceed the least penalty
            self._least += _ROUNDING * float(np.square(block).sum(1).mean())
            block -= block.mean(0)
            self._products += block @ block.T

    def r2(self, labels: Mapping[str, Array]) -> dict[str, float]:
        """Share of each label's variance in the test states that is read: 1 is perfect, 0 no better than their mean.

        Args:
            labels (mapping): name -> ``[N]``; states in which a label is NaN are left out.

        Raises:
            ValueError: if :func:`why_unread` has an answer for one.
        """
        together: dict[bytes, list[str]] = {}  # those of the same states
        for name, label in labels.items():
            if (reason := why_unread(label, self._parts)) is not None:
                raise ValueError(f"labels must be such as can be read, but {name} is {reason}")
            together.setdefault(np.isfinite(label).tobytes(), []).append(name)
        scores: dict[str, float] = {}
        for names in together.values():
            values = np.stack([labels[name] for name in names], axis=1)
            fit, choose, test = ((self._parts == part) & np.isfinite(values[:, 0]) for part in (_FIT, _CHOOSE, _TEST))
            chosen = np.stack([self._score(values, fit, choose, penalty) for penalty in PENALTIES]).argmax(0)
            finals = {place: self._score(values, fit | choose, test, PENALTIES[place]) for place in {*chosen.tolist()}}
            scores |= {
                name: float(finals[place][index])
                for index, (name, place) in enumerate(zip(names, chosen.tolist(), strict=True))
            }
        return {name: scores[name] for name in labels}

    def _score(self, values: Array, fit: NDArray[np.bool_], test: NDArray[np.bool_], penalty: float) -> Array:
        """R^2 of each of the values ``[N, L]`` on ``test``, of the regression with intercept that ``fit`` gives."""
        products, across = self._products[np.ix_(fit, fit)], self._products[np.ix_(test, fit)]
        column, mean = products.mean(0), products.mean()
        centred = products - column - column[:, None] + mean
        scale = np.trace(centred) / len(centred)
        predicted = values[fit].mean(0)
        if scale > self._least:
            centred[np.diag_indices_from(centred)] += penalty * scale
            weights = linalg.cho_solve(linalg.cho_factor(centred), values[fit] - predicted)
            predicted = predicted + (across - column - across.mean(1, keepdims=True) + mean) @ weights
        missed = np.square(values[test] - predicted).sum(0)
        return 1 - missed / np.square(values[test] - values[test].mean(0)).sum(0)


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
