"""How well a linear model reads labels of states from features, on episodes that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from torchrl_sql.statistics.scores import Array

PENALTIES = 10.0 ** np.arange(-4, 2)
"""Of ridge regression, in units of the features' mean squared distance from their mean."""

MOST_COMMON = 0.95
"""A label is not read if one value has more than this share of the states."""

_QUARTERS = 4
_BLOCK = 4096
"""Features of which products are summed at a time."""
_ROUNDING = 1e-12
"""Share of the features' mean square that differences between states must exceed to be any."""


class LinearProbe:
    """Ridge regression from features to labels.

    Each quarter of the episodes tests in its turn: two others fit, the next one chooses among :data:`PENALTIES` for
    each label, and these three fit again. Features are neither scaled nor selected, so that what a network gives more
    weight to is easier to read. With fewer states than features, products of states take the place of the features.

    Args:
        features (array): ``[N, D]`` of ``N`` states.
        episodes (array): int ``[N]``, the episode of each state.

    Raises:
        ValueError: for fewer than four episodes, or features that are not finite.
    """

    def __init__(self, features: NDArray[np.floating], episodes: NDArray[np.int64]) -> None:
        self._quarters = quarters_of(episodes)
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
        """Share of each label's variance that is read in states of unseen episodes: 1 is perfect, 0 their mean.

        Args:
            labels (mapping): name -> ``[N]``; states in which a label is NaN are left out.

        Raises:
            ValueError: if :func:`why_unread` has an answer for one.
        """
        together: dict[bytes, list[str]] = {}  # those of the same states
        for name, label in labels.items():
            if (reason := why_unread(label, self._quarters)) is not None:
                raise ValueError(f"labels must be such as can be read, but {name} is {reason}")
            together.setdefault(np.isfinite(label).tobytes(), []).append(name)
        scores: dict[str, float] = {}
        for names in together.values():
            values = np.stack([labels[name] for name in names], axis=1)
            known = np.isfinite(values[:, 0])
            missed = sum(self._missed_in(turn, values, known) for turn in range(_QUARTERS))
            spread = np.square(values[known] - values[known].mean(0)).sum(0)
            scores |= dict(zip(names, (1 - missed / spread).tolist(), strict=True))
        return {name: scores[name] for name in labels}

    def _missed_in(self, turn: int, values: Array, known: NDArray[np.bool_]) -> Array:
        """Summed squared errors of each of the values ``[N, L]`` in the quarter that tests."""
        test, choose = (known & (self._quarters == each % _QUARTERS) for each in (turn, turn + 1))
        fit = known & ~test & ~choose
        chosen = np.stack([self._missed(values, fit, choose, penalty) for penalty in PENALTIES]).argmin(0)
        finals = {place: self._missed(values, fit | choose, test, PENALTIES[place]) for place in {*chosen.tolist()}}
        return np.array([finals[place][index] for index, place in enumerate(chosen.tolist())])

    def _missed(self, values: Array, fit: NDArray[np.bool_], test: NDArray[np.bool_], penalty: float) -> Array:
        """The same in states to ``test``, of the regression with intercept that ``fit`` gives."""
        products, across = self._products[np.ix_(fit, fit)], self._products[np.ix_(test, fit)]
        column, mean = products.mean(0), products.mean()
        centred = products - column - column[:, None] + mean
        scale = np.trace(centred) / len(centred)
        predicted = values[fit].mean(0)
        if scale > self._least:
            centred[np.diag_indices_from(centred)] += penalty * scale
            weights = linalg.cho_solve(linalg.cho_factor(centred), values[fit] - predicted)
            predicted = predicted + (across - column - across.mean(1, keepdims=True) + mean) @ weights
        missed: Array = np.square(values[test] - predicted).sum(0)
        return missed


def quarters_of(episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which quarter of the episodes, in their order, each state is of: ``[N]``, 0 to 3.

    Raises:
        ValueError: for fewer than four episodes.
    """
    numbers, place = np.unique(episodes, return_inverse=True)
    if len(numbers) < _QUARTERS:
        raise ValueError(f"episodes must be at least {_QUARTERS}, got {len(numbers)}")
    return place * _QUARTERS // len(numbers)


def why_unread(label: Array, quarters: NDArray[np.int64]) -> str | None:
    """Why a label cannot be read, in words; None if it can.

    Args:
        label (array): ``[N]``, NaN where there is none.
        quarters (array): as :func:`quarters_of` gives.
    """
    known = np.isfinite(label)
    if len(np.unique(quarters[known])) < _QUARTERS:
        return "in no state of some quarter of the episodes"
    _, counts = np.unique(label[known], return_counts=True)
    share = counts.max() / counts.sum()
    return f"the same in {share:.0%} of the states" if share > MOST_COMMON else None
