"""Robust aggregates of run scores, and their 95% intervals from a stratified bootstrap over seeds and episodes.

Aggregates follow Agarwal et al. (2021, arXiv:2108.13264) and agree with their library ``rliable``: a *run score* is the
mean return of one training seed in one game, and an aggregate is a function of the matrix of run scores. Added here is
the episode level: intervals resample the seeds of each game and, within every drawn seed, its episodes. A single seed
therefore still has an interval, which covers the noise of its episodes and not that of training.

Like ``rliable``, the bootstrap treats the runs of different games as independent. The games of a multi-game agent share
one network a seed, so with several seeds an aggregate's interval may be too narrow; reports say so.

    runs = RunReturns.from_episodes(read_episodes("scores.csv"), agent="scaled_ql", decoding="greedy")
    print(aggregates(BootstrapScores.from_returns(runs).normalised("human"))["IQM"])

Shape suffixes: R bootstrap resamples, S training seeds, G games, E episodes, T thresholds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from torchrl_sql.statistics.scores import Array, Reference, RunReturns, normalised_score

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """A point estimate and its 95% percentile-bootstrap interval."""

    point: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BootstrapScores:
    """The run scores of one agent, and bootstrap resamples of them: drawn once, used for every statistic.

    Attributes:
        games (tuple of str): ``G`` names.
        seeds (tuple of int): ``S`` training seeds.
        scores (array): ``[S, G]`` float64, the run scores.
        resampled (array): ``[R, S, G]`` float64, their resamples.
    """

    games: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Array
    resampled: Array

    @classmethod
    def from_returns(cls, runs: RunReturns, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> BootstrapScores:
        """Resamples seeds within each game, then episodes within each drawn seed.

        Args:
            runs (RunReturns): episodes of one agent.

        Keyword Args:
            num_resamples (int): ``R``.
            seed (int): of the resampling. The same returns and seed give the same resamples; agents of other returns
                get independent ones.
        """
        if num_resamples < 1:
            raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
        generator = np.random.default_rng([seed, zlib.crc32(runs.values.tobytes())])
        num_seeds, num_games = runs.counts.shape
        resampled = np.empty((num_resamples, num_seeds, num_games))
        for g in range(num_games):
            drawn_RS = generator.integers(num_seeds, size=(num_resamples, num_seeds))
            for s in range(num_seeds):
                chosen_RS = drawn_RS == s
                count = int(runs.counts[s, g])
                index = generator.integers(count, size=(int(chosen_RS.sum()), count), dtype=np.int32)
                resampled[..., g][chosen_RS] = runs.values[s, g, index].mean(-1)
        return cls(games=runs.games, seeds=runs.seeds, scores=runs.run_scores(), resampled=resampled)

    def select(self, games: Sequence[str]) -> BootstrapScores:
        """The same runs restricted to ``games``, in that order."""
        columns = [self.games.index(game) for game in games]
        return replace(self, games=tuple(games), scores=self.scores[:, columns], resampled=self.resampled[..., columns])

    def normalised(self, reference: Reference) -> BootstrapScores:
        """The same runs on the normalised scale.

        Raises:
            ValueError: if a game has no such reference score; see
                :func:`torchrl_sql.statistics.scores.split_by_reference`.
        """

        def scale(scores: Array) -> Array:
            columns = [normalised_score(scores[..., g], game, reference) for g, game in enumerate(self.games)]
            return np.stack(columns, axis=-1)

        return replace(self, scores=scale(self.scores), resampled=scale(self.resampled))


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half of the ``S * G`` run scores, ``[..., S, G] -> [...]``.

    A quarter of the scores, rounded down, is dropped at either end, as in ``rliable``; below four scores none is.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def mean(scores: Array) -> Array:
    """Mean over games of the mean over seeds, ``[..., S, G] -> [...]``."""
    return scores.mean((-2, -1))


def median(scores: Array) -> Array:
    """Median over games of the mean over seeds, ``[..., S, G] -> [...]``."""
    return np.median(scores.mean(-2), axis=-1)


def optimality_gap(scores: Array) -> Array:
    """How far the run scores fall short of 1 on average, scores above 1 counting as 1; ``[..., S, G] -> [...]``."""
    return 1.0 - np.minimum(scores, 1.0).mean((-2, -1))


AGGREGATES: dict[str, Callable[[Array], Array]] = {
    "IQM": interquartile_mean,
    "median": median,
    "mean": mean,
    "optimality gap": optimality_gap,
}


def estimate(statistic: Callable[..., Array], *agents: BootstrapScores) -> tuple[Array, Array, Array]:
    """A statistic of run scores with its 95% percentile interval.

    Args:
        statistic (callable): takes one ``[..., S, G]`` array for each of ``agents``, gives ``[..., *out]``.
        *agents (BootstrapScores): whose scores it takes.

    Returns:
        ``(point, low, high)``, each ``[*out]``.
    """
    resampled = statistic(*(agent.resampled for agent in agents))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return np.asarray(statistic(*(agent.scores for agent in agents))), low, high


def game_means(agent: BootstrapScores) -> dict[str, Interval]:
    """Each game's mean over seeds of the run scores, with 95% intervals."""
    estimates = estimate(lambda scores: scores.mean(-2), agent)
    return {game: Interval(*(float(x[g]) for x in estimates)) for g, game in enumerate(agent.games)}


def aggregates(agent: BootstrapScores) -> dict[str, Interval]:
    """Every entry of :data:`AGGREGATES` over all games of ``agent`` (normalise first), with 95% intervals."""

    def statistic(scores: Array) -> Array:
        return np.stack([function(scores) for function in AGGREGATES.values()], axis=-1)

    estimates = estimate(statistic, agent)
    return {name: Interval(*(float(x[i]) for x in estimates)) for i, name in enumerate(AGGREGATES)}


def performance_profile(agent: BootstrapScores, thresholds: Array) -> tuple[Array, Array, Array]:
    """Fraction of runs whose score exceeds each threshold (score distribution of arXiv:2108.13264, section 4.3).

    Returns:
        ``(fraction, low, high)``, each ``[T]``.
    """

    def statistic(scores: Array) -> Array:
        return np.stack([(scores > threshold).mean((-2, -1)) for threshold in thresholds], axis=-1)

    return estimate(statistic, agent)


def probability_of_improvement(x: BootstrapScores, y: BootstrapScores) -> Interval:
    """Chance that a run of ``x`` beats a run of ``y`` in the same game (a tie counts half), averaged over games.

    Raises:
        ValueError: if the two have different games.
    """
    if x.games != y.games:
        raise ValueError(f"both agents must have the same games in the same order, got {x.games} and {y.games}")

    def statistic(scores_x: Array, scores_y: Array) -> Array:
        difference = scores_x[..., :, None, :] - scores_y[..., None, :, :]
        return (0.5 * (1.0 + np.sign(difference))).mean((-3, -2, -1))

    return Interval(*(float(v) for v in estimate(statistic, x, y)))
