"""Intervals and verdicts about methods: the training seed is the unit.

All games of a seed share one network, and two runs of a method differ by much more than the episodes that measured
them. So every statistic is computed once per seed, over all games, and its 95% interval is Student's over the seeds.
The noise of episodes is part of the spread between seeds and is counted there, once. An aggregate's estimate is the
mean of the per-seed aggregates: for the interquartile mean that is not the IQM of all runs pooled, which rliable
computes.

A verdict about two agents comes from the interval of their *difference* (Welch's). With one seed there is none: its
intervals are of the evaluation's episodes only, and say so in ``unit``. Where all units agree exactly (one episode,
ties, deterministic play) nothing is known of the spread, and an interval's ends are NaN. A policy without training has
no seeds: its difference to a method varies with the method's seeds. ``benchmarks/coverage.py`` measures coverage, false
verdicts and power; docs/evaluation.md says why this differs from rliable.

    runs = returns_of(read_episodes("scores.csv"), agent="scaled_ql", decoding="greedy")
    print(aggregates(runs.normalised("human"))["IQM"])

Shape suffixes: U units (seeds or episodes), S training seeds, G games, E episodes, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from torchrl_sql.statistics.scores import Array, RunReturns

CONFIDENCE = 0.95
NUM_SEEDS_TO_PAIR = 10
"""From so many common seeds on, a difference is paired by seed. With fewer, pairing costs more degrees of freedom than
common data and evaluation seeds give back (``benchmarks/results/coverage.md``)."""

Unit = Literal["seeds", "episodes"]
Verdict = Literal["higher", "lower", "not distinguishable", "unknown"]


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    point: float
    low: float
    high: float
    """NaN, like ``low``, if nothing is known of the spread."""
    unit: Unit = "seeds"
    """What the interval is over: ``"episodes"`` do not cover the variation between training runs."""


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half of each row, ``[..., G] -> [...]``: a quarter, rounded down, is dropped at either end.

    NaN for a row with a NaN.
    """
    ordered = np.sort(scores, axis=-1)  # NaN last
    cut = ordered.shape[-1] // 4
    middle = ordered[..., cut : ordered.shape[-1] - cut].mean(-1)
    return np.where(np.isnan(ordered[..., -1]), np.nan, middle)


AGGREGATES: dict[str, Callable[[Array], Array]] = {
    "IQM": interquartile_mean,
    "median": lambda scores: np.median(scores, axis=-1),
    "mean": lambda scores: scores.mean(-1),
    "optimality gap": lambda scores: 1.0 - np.minimum(scores, 1.0).mean(-1),
}
"""Functions of one seed's normalised scores, ``[..., G] -> [...]`` (Agarwal et al. 2021, arXiv:2108.13264)."""


def student(values: Array) -> tuple[Array, Array, Array]:
    """Mean over units and its interval, ``[U, ...] -> (point, low, high)``, each ``[...]``.

    The ends are NaN where all values are equal, one value included.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < 2:
        return values.mean(0), *np.full((2, *values.shape[1:]), np.nan)
    return _ends(values.mean(0), values.var(0, ddof=1) / count, count - 1)


def welch(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Mean of ``x`` minus mean of ``y`` and its interval, ``[U, ...], [V, ...] -> (point, low, high)``.

    The two may have different spreads. Degrees of freedom are Welch's of 1947, between the smaller sample's and those
    of equal spreads; Satterthwaite's, which libraries have, find less of the true differences between three seeds. The
    ends are NaN unless both have two units and one has a spread.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    point = x.mean(0) - y.mean(0)
    if min(len(x), len(y)) < 2:
        return point, *np.full((2, *point.shape), np.nan)
    of_x, of_y = x.var(0, ddof=1) / len(x), y.var(0, ddof=1) / len(y)
    with np.errstate(invalid="ignore"):  # 0 / 0 where neither has a spread
        freedom = (of_x + of_y) ** 2 / (of_x**2 / (len(x) + 1) + of_y**2 / (len(y) + 1)) - 2
    return _ends(point, of_x + of_y, np.clip(freedom, min(len(x), len(y)) - 1, len(x) + len(y) - 2))


def _ends(point: Array, variance: Array, freedom: Array | int) -> tuple[Array, Array, Array]:
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)
    reach = np.where(variance > np.spacing(np.abs(point)) ** 2, reach, np.nan)  # rounding is no spread
    return np.asarray(point), point - reach, point + reach


def verdict(difference: Interval) -> Verdict:
    """What the interval of a difference supports; ``"unknown"`` if it is not over seeds, or not known."""
    if difference.unit != "seeds" or np.isnan(difference.low):
        return "unknown"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not distinguishable"


def game_means(runs: RunReturns) -> dict[str, Interval]:
    """Each game's expected return, ``{game: interval}``; of one seed, over its episodes."""
    if len(runs.seeds) == 1:
        return {game: _interval(student(runs.episodes(0, g)), "episodes") for g, game in enumerate(runs.games)}
    return dict(zip(runs.games, _intervals(student(runs.run_scores())), strict=True))


def aggregates(runs: RunReturns) -> dict[str, Interval]:
    """Every entry of :data:`AGGREGATES` over the games of ``runs`` (normalise first), ``{name: interval}``."""
    return {name: _over_seeds(runs, statistic) for name, statistic in AGGREGATES.items()}


def performance_profile(runs: RunReturns, thresholds: Array) -> tuple[Array, Array, Array]:
    """Share of games whose score exceeds each threshold (arXiv:2108.13264, section 4.3): ``(share, low, high)``, each
    ``[T]``, the ends within [0, 1], NaN where every seed has the same share.
    """
    per_seed = (runs.run_scores()[..., None] > thresholds).mean(1)
    point, low, high = student(per_seed)
    return point, np.maximum(low, 0.0), np.minimum(high, 1.0)


def game_differences(x: RunReturns, y: RunReturns) -> dict[str, Interval]:
    """Expected return of ``x`` minus that of ``y`` in each game, ``{game: interval}``.

    With one seed each, over episodes, paired where both played the same number. Of a policy that is not trained, see
    :func:`difference_to`.

    Raises:
        ValueError: if the two have different games.
    """
    _check_same_games(x, y)
    if y.trained < x.trained:
        return {game: difference_to(x, game, y.episodes(0, g)) for g, game in enumerate(y.games)}
    if x.trained < y.trained:
        return {game: Interval(-i.point, -i.high, -i.low, i.unit) for game, i in game_differences(y, x).items()}
    if len(x.seeds) == len(y.seeds) == 1:
        episodes = [(x.episodes(0, g), y.episodes(0, g)) for g in range(len(x.games))]
        ends = [student(a - b) if len(a) == len(b) else welch(a, b) for a, b in episodes]
        return {game: _interval(values, "episodes") for game, values in zip(x.games, ends, strict=True)}
    return dict(zip(x.games, _intervals(_difference(x, y, x.run_scores(), y.run_scores())), strict=True))


def aggregate_differences(x: RunReturns, y: RunReturns) -> dict[str, Interval]:
    """Each of :data:`AGGREGATES` of ``x`` minus that of ``y`` (normalise first), ``{name: interval}``.

    Raises:
        ValueError: if the two have different games.
    """
    _check_same_games(x, y)
    scores_x, scores_y = x.run_scores(), y.run_scores()
    return {
        name: _interval(_difference(x, y, statistic(scores_x), statistic(scores_y)), "seeds")
        for name, statistic in AGGREGATES.items()
    }


def difference_to(runs: RunReturns, game: str, units: Array) -> Interval:
    """Expected return in a game minus the mean of something that is not trained: the episodes of a fixed policy or of
    the data ``[U]``, or one published score ``[1]``, which is taken as exact.
    """
    ours = runs.run_scores()[:, runs.games.index(game)]
    if len(ours) == 1:
        values = welch(runs.episodes(0, runs.games.index(game)), units)
        return _interval(values, "episodes")
    return _interval(welch(ours, units) if len(units) > 1 else student(ours - units[0]), "seeds")


def probability_of_improvement(x: RunReturns, y: RunReturns) -> Interval:
    """Chance that a run of ``x`` beats a run of ``y`` in the same game (a tie counts half), averaged over games.

    The interval is that of a two-sample U statistic (Hoeffding's projections on the seeds of either side), within
    [0, 1]; NaN with fewer than two seeds on a side. Against a policy that is not trained: Student's, over the seeds.

    Raises:
        ValueError: if the two have different games.
    """
    _check_same_games(x, y)
    beats = np.sign(x.run_scores()[:, None] - y.run_scores()[None])  # [S of x, S of y, G]
    chances = (0.5 * (1.0 + beats)).mean(-1)
    half = chances.mean() / 2  # the two projections then differ by the mean: half + half
    ends = welch(chances.mean(1) - half, half - chances.mean(0)) if x.trained == y.trained else student(chances.ravel())
    point, low, high = (float(value) for value in ends)
    return Interval(point, max(low, 0.0), min(high, 1.0))


_RLIABLE: dict[str, Callable[[Array], Array]] = {
    "IQM": lambda scores: interquartile_mean(scores.reshape(*scores.shape[:-2], -1)),
    "median": lambda scores: np.median(scores.mean(-2), axis=-1),
    "mean": lambda scores: scores.mean((-2, -1)),
    "optimality gap": lambda scores: 1.0 - np.minimum(scores, 1.0).mean((-2, -1)),
}
"""Of all run scores pooled, ``[..., S, G] -> [...]``."""


def rliable_aggregates(runs: RunReturns, *, num_resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """:data:`AGGREGATES` as rliable computes them, for comparison with the literature.

    All runs are pooled, and a percentile bootstrap draws the seeds of each game on their own. That fits agents that
    have one network per game; where the games of a seed share one, the intervals are too narrow. Where all draws are
    the same, one seed included, the ends are NaN.
    """
    scores = runs.run_scores()
    drawn = np.random.default_rng(seed).integers(len(scores), size=(num_resamples, *scores.shape))
    resampled = np.take_along_axis(scores[None], drawn, axis=1)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    intervals = {}
    for name, statistic in _RLIABLE.items():
        low, high = np.quantile(statistic(resampled), ends)
        if low == high:
            low = high = np.nan
        intervals[name] = Interval(float(statistic(scores)), float(low), float(high))
    return intervals


def _over_seeds(runs: RunReturns, statistic: Callable[[Array], Array]) -> Interval:
    """A per-seed statistic with Student's interval; of one seed, resampled over the episodes of each game."""
    scores = runs.run_scores()
    if len(scores) > 1:
        return _interval(student(statistic(scores)), "seeds")
    generator = np.random.default_rng(0)
    columns = []
    for g in range(len(runs.games)):
        episodes = runs.episodes(0, g)
        columns.append(episodes[generator.integers(len(episodes), size=(2000, len(episodes)))].mean(-1))
    resampled = statistic(np.stack(columns, axis=-1))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    point = float(statistic(scores)[0])
    if low == high:
        return Interval(point, np.nan, np.nan, "episodes")
    return Interval(point, min(low, point), max(high, point), "episodes")


def _difference(x: RunReturns, y: RunReturns, of_x: Array, of_y: Array) -> tuple[Array, Array, Array]:
    """Of per-seed values ``[S, ...]``; those of a policy that is not trained are exact.

    Paired, the estimate is that of the common seeds alone.
    """
    if x.trained != y.trained:
        return student(of_x - of_y)
    common = sorted({*x.seeds} & {*y.seeds})
    if len(common) < NUM_SEEDS_TO_PAIR:
        return welch(of_x, of_y)
    return student(of_x[[x.seeds.index(s) for s in common]] - of_y[[y.seeds.index(s) for s in common]])


def _check_same_games(x: RunReturns, y: RunReturns) -> None:
    if x.games != y.games:
        raise ValueError(f"both agents must have the same games in the same order, got {x.games} and {y.games}")


def _interval(values: tuple[Array, Array, Array], unit: Unit) -> Interval:
    point, low, high = (float(value) for value in values)
    return Interval(point, low, high, unit)


def _intervals(values: tuple[Array, Array, Array]) -> list[Interval]:
    return [_interval(each, "seeds") for each in zip(*values, strict=True)]
