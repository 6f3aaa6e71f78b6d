"""Predicted values against the discounted returns that followed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from torchrl_sql.evaluation.episodes import CalibrationPoint
from torchrl_sql.statistics.aggregates import CONFIDENCE, Interval
from torchrl_sql.statistics.scores import Array

NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One agent's predictions in one game, at recorded states of episodes that were played to their end.

    Attributes:
        num_episodes, num_cut (int): episodes used, and episodes left out because they were cut at the frame limit, so
            that their returns are incomplete.
        predicted, realised (array): ``[N]`` float64, Q of the action taken, and the discounted sum of clipped rewards.
        bias (Interval): mean of predicted minus realised, with a 95% interval that resamples episodes; NaN if every
            episode was cut.
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
        """Means of predicted and realised values in up to 10 groups of states of equal size, by predicted value."""
        groups = np.array_split(np.argsort(self.predicted, kind="stable"), min(NUM_BINS, len(self.predicted)))
        return (
            np.array([self.predicted[group].mean() for group in groups]),
            np.array([self.realised[group].mean() for group in groups]),
        )


def calibrate(
    points: Iterable[CalibrationPoint], games: Sequence[str], *, num_resamples: int, seed: int
) -> dict[str, Calibration]:
    """Groups one agent's points (of one gradient step, any seeds) by game.

    Args:
        points (iterable of CalibrationPoint): of one agent.
        games (sequence of str): games wanted, in their order; those without points are left out.

    Keyword Args:
        num_resamples (int): of the bootstrap over episodes.
        seed (int): of the bootstrap.
    """
    by_game: dict[str, dict[tuple[int, int], list[CalibrationPoint]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        by_game[point.game][point.seed, point.episode_seed].append(point)
    generator = np.random.default_rng(seed)
    found = {}
    for game in games:
        if game not in by_game:
            continue
        whole = [rows for rows in by_game[game].values() if not rows[0].truncated]
        predicted = np.array([row.predicted_value for rows in whole for row in rows])
        realised = np.array([row.discounted_return for rows in whole for row in rows])
        found[game] = Calibration(
            num_episodes=len(whole),
            num_cut=len(by_game[game]) - len(whole),
            predicted=predicted,
            realised=realised,
            bias=_bias(predicted - realised, np.array([len(rows) for rows in whole]), num_resamples, generator),
        )
    return found


def _bias(errors: Array, sizes: np.ndarray, num_resamples: int, generator: np.random.Generator) -> Interval:
    """Mean error with its interval; ``errors`` are grouped by episode, ``sizes`` states each."""
    if not len(sizes):
        return Interval(np.nan, np.nan, np.nan)
    sums = np.add.reduceat(errors, np.concatenate([[0], np.cumsum(sizes)[:-1]]))
    drawn = generator.integers(len(sizes), size=(num_resamples, len(sizes)), dtype=np.int32)
    resampled = sums[drawn].sum(-1) / sizes[drawn].sum(-1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(errors.mean()), float(low), float(high))
