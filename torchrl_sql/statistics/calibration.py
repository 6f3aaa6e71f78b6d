"""Predicted values against the discounted returns that followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from torchrl_sql.statistics.intervals import CONFIDENCE, Interval, Unit
from torchrl_sql.statistics.scores import Array

NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One agent's predictions in one game, at recorded states of episodes that were played to their end.

    Attributes:
        num_episodes (int): episodes used.
        num_cut (int): episodes left out because they were cut at the frame limit, so that their returns are incomplete.
        predicted (array): ``[N]`` float64, Q of the action taken.
        realised (array): ``[N]`` float64, the discounted sum of clipped rewards that followed.
        bias (Interval): mean of predicted minus realised, over training seeds, or of one seed over its episodes; NaN if
            every episode was cut.
    """

    num_episodes: int
    num_cut: int
    predicted: Array
    realised: Array
    bias: Interval

    @property
    def root_mean_square_error(self) -> float:
        """Of single predictions, the noise of single returns included; NaN without any."""
        return float(np.sqrt(np.mean((self.predicted - self.realised) ** 2))) if self.num_episodes else np.nan

    @property
    def correlation(self) -> float:
        """Pearson's, over states; NaN if one of the two does not vary."""
        if not self.num_episodes or min(np.ptp(self.predicted), np.ptp(self.realised)) == 0:
            return np.nan
        return float(np.corrcoef(self.predicted, self.realised)[0, 1])

    def bins(self) -> tuple[Array, Array]:
        """Means of predicted and realised values in up to 10 groups of states of equal size, by predicted value.

        There are none if every episode was cut.
        """
        if not self.num_episodes:
            return np.empty(0), np.empty(0)
        groups = np.array_split(np.argsort(self.predicted, kind="stable"), min(NUM_BINS, len(self.predicted)))
        return (
            np.array([self.predicted[group].mean() for group in groups]),
            np.array([self.realised[group].mean() for group in groups]),
        )


def calibrate(
    predicted: Array, realised: Array, *, seeds: Sequence[int], episodes: Sequence[int], cut: Sequence[bool]
) -> Calibration:
    """Compares an agent's predictions in one game, at one gradient step, with what followed.

    Args:
        predicted (array): ``[N]``, the value of the action taken at each recorded state.
        realised (array): ``[N]``, the discounted sum of clipped rewards from there.

    Keyword Args:
        seeds (sequence of int): ``[N]``, the training seed of each state.
        episodes (sequence of int): ``[N]``, what tells a seed's episodes apart.
        cut (sequence of bool): ``[N]``, whether its episode was cut at the frame limit.
    """
    keys = list(zip(seeds, episodes, strict=True))
    whole = ~np.asarray(cut, dtype=np.bool_)
    used = {key for key, kept in zip(keys, whole, strict=True) if kept}
    predicted, realised = predicted[whole], realised[whole]
    unit: Unit = "seeds" if len({seed for seed, _ in used}) > 1 else "episodes"
    places = {key: place for place, key in enumerate(sorted({seed for seed, _ in used}) if unit == "seeds" else used)}
    units = [places[key[0] if unit == "seeds" else key] for key, kept in zip(keys, whole, strict=True) if kept]
    return Calibration(
        num_episodes=len(used),
        num_cut=len(set(keys)) - len(used),
        predicted=predicted,
        realised=realised,
        bias=_bias(predicted - realised, np.array(units, dtype=np.int64), unit),
    )


def _bias(errors: Array, units: NDArray[np.int64], unit: Unit) -> Interval:
    """Mean error with Student's interval over units, of which each may have another number of states."""
    if not len(errors):
        return Interval(np.nan, np.nan, np.nan, unit)
    mean = float(errors.mean())
    sums = np.bincount(units, weights=errors - mean)
    count = len(sums)
    if count < 2 or np.allclose(sums, 0):
        return Interval(mean, np.nan, np.nan, unit)
    error = np.sqrt(count / (count - 1) * (sums**2).sum()) / len(errors)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return Interval(mean, mean - reach, mean + reach, unit)
