"""Statistics over evaluation episodes: normalised scores, robust aggregates and bootstrap intervals.

Aggregates follow Agarwal et al. (2021, arXiv:2108.13264) and agree with their library ``rliable``: a *run score* is the
mean return of one training seed in one game, and an aggregate is a function of the matrix of run scores. Added here is
the episode level: intervals resample the seeds of each game and, within every drawn seed, its episodes. A single seed
therefore still has an interval, which covers the noise of its episodes and not that of training.

Like ``rliable``, the bootstrap treats the runs of different games as independent. The games of a multi-game agent share
one network a seed, so with several seeds an aggregate's interval may be too narrow; reports say so.

Shape suffixes: R bootstrap resamples, S training seeds, G games, E episodes, T thresholds.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchrl_sql.evaluation.episodes import Decoding, EpisodeResult
from torchrl_sql.games import GAMES

Reference = Literal["human", "dqn"]
"""Whose published score is 1 on the normalised scale; the published random score is 0."""

Array = NDArray[np.float64]
Score = TypeVar("Score", float, Array)

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """A point estimate and its 95% percentile-bootstrap interval."""

    point: float
    low: float
    high: float


def normalised_score(score: Score, game: str, reference: Reference) -> Score:
    """``(score - random) / (reference - random)`` with the game's published scores (method.md section 5).

    Raises:
        ValueError: if the game is unknown or has no such published score.
    """
    scores = _reference_scores(game, reference)
    if scores is None:
        raise ValueError(f"{game} has no published {reference} and random score, so it cannot be normalised by them")
    zero, one = scores
    return (score - zero) / (one - zero)


def human_normalised(score: Score, game: str) -> Score:
    """:func:`normalised_score` by the published human score."""
    return normalised_score(score, game, "human")


def dqn_normalised(score: Score, game: str) -> Score:
    """:func:`normalised_score` by the score of DQN, the agent that wrote DQN-Replay."""
    return normalised_score(score, game, "dqn")


def split_by_reference(games: Iterable[str], reference: Reference) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of ``games`` can be normalised by ``reference``, and which cannot.

    Returns:
        ``(included, excluded)``, each in the given order. Of the 40 training games 38 have a human score (Carnival and
        Pooyan do not) and 40 a DQN score.
    """
    included: list[str] = []
    excluded: list[str] = []
    for game in games:
        (excluded if _reference_scores(game, reference) is None else included).append(game)
    return tuple(included), tuple(excluded)


def _reference_scores(game: str, reference: Reference) -> tuple[float, float] | None:
    if reference not in ("human", "dqn"):
        raise ValueError(f"reference must be 'human' or 'dqn', got {reference!r}")
    if game not in GAMES:
        raise ValueError(f"game must be one of the 60 games of DQN-Replay, got {game!r}")
    one = GAMES[game].human_score if reference == "human" else GAMES[game].dqn_score
    zero = GAMES[game].random_score
    return None if one is None or zero is None else (zero, one)


@dataclass(frozen=True, kw_only=True)
class RunReturns:
    """The episode returns of one agent: S seeds on G games, with possibly different numbers of episodes.

    Attributes:
        games (tuple of str): ``G`` names.
        seeds (tuple of int): ``S`` training seeds, ascending.
        values (array): ``[S, G, E]`` float64; entries past a run's count are NaN.
        counts (array): ``[S, G]`` int64, episodes of each run, at least 1.
    """

    games: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Array
    counts: NDArray[np.int64]

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[EpisodeResult],
        *,
        agent: str,
        decoding: Decoding,
        games: Sequence[str] | None = None,
    ) -> RunReturns:
        """Collects one agent's episodes at its last gradient step, which all its seeds and games must have reached.

        The order of the rows does not matter.

        Args:
            episodes (iterable of EpisodeResult): rows, of any agents.

        Keyword Args:
            agent (str): whose rows to take.
            decoding (str): ``"greedy"`` or ``"sampled"`` rows.
            games (sequence of str, optional): games and their order; by default all the agent has, alphabetically.

        Raises:
            ValueError: if there are no such rows, a (seed, game) pair has no episode, an episode is listed twice, or
                epsilon, the sticky probability or the frame limit differ among the rows.
        """
        rows = [row for row in episodes if row.agent == agent and row.decoding == decoding]
        if not rows:
            raise ValueError(f"there is no episode of agent {agent!r} with decoding {decoding!r}")
        seeds = sorted({row.seed for row in rows})
        if games is None:
            games = sorted({row.game for row in rows})
        if len(set(games)) != len(games) or not games:
            raise ValueError(f"games must be distinct and at least one, got {tuple(games)}")
        last_step = max(row.gradient_step for row in rows)
        rows = [row for row in rows if row.gradient_step == last_step and row.game in games]
        protocols = sorted({(row.epsilon, row.sticky, row.max_env_frames) for row in rows})
        if len(protocols) > 1:
            raise ValueError(
                f"episodes of {agent!r} ({decoding}) mix protocols (epsilon, sticky, frame limit): {protocols}"
            )
        returns: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            run = returns[row.seed, row.game]
            if row.episode in run:
                raise ValueError(
                    f"episode {row.episode} of agent {agent!r} ({decoding}), seed {row.seed}, game {row.game}, "
                    f"gradient step {last_step} is listed twice"
                )
            run[row.episode] = row.episode_return
        missing = [(seed, game) for seed in seeds for game in games if not returns[seed, game]]
        if missing:
            seed, game = missing[0]
            raise ValueError(
                f"agent {agent!r} ({decoding}) has no episode at gradient step {last_step} for seed {seed} in {game}"
                + (f", nor for {len(missing) - 1} other (seed, game) pairs" if len(missing) > 1 else "")
            )
        counts = np.array([[len(returns[seed, game]) for game in games] for seed in seeds], dtype=np.int64)
        values = np.full((*counts.shape, int(counts.max())), np.nan)
        for s, seed in enumerate(seeds):
            for g, game in enumerate(games):
                run = returns[seed, game]
                values[s, g, : len(run)] = [run[episode] for episode in sorted(run)]
        return cls(games=tuple(games), seeds=tuple(seeds), values=values, counts=counts)

    def select(self, games: Sequence[str]) -> RunReturns:
        """The same runs restricted to ``games``, in that order."""
        columns = [self.games.index(game) for game in games]
        return RunReturns(
            games=tuple(games), seeds=self.seeds, values=self.values[:, columns], counts=self.counts[:, columns]
        )

    def normalised(self, reference: Reference) -> RunReturns:
        """The same runs on the normalised scale.

        Raises:
            ValueError: if a game has no such reference score; see :func:`split_by_reference`.
        """
        values = np.stack(
            [normalised_score(self.values[:, g], game, reference) for g, game in enumerate(self.games)], axis=1
        )
        return RunReturns(games=self.games, seeds=self.seeds, values=values, counts=self.counts)

    def run_scores(self) -> Array:
        """Mean over the episodes of each run, ``[S, G]``."""
        return np.nanmean(self.values, axis=-1)

    def resampled_run_scores(self, num_resamples: int, generator: np.random.Generator) -> Array:
        """Run scores of bootstrap resamples, ``[R, S, G]``: seeds within each game, then episodes within each seed."""
        num_seeds, num_games, num_episodes = self.values.shape
        resampled = np.empty((num_resamples, num_seeds, num_games))
        for g in range(num_games):
            seed_RS = generator.integers(num_seeds, size=(num_resamples, num_seeds))
            count_RS = self.counts[seed_RS, g]
            episode_RSE = generator.integers(count_RS[..., None], size=(num_resamples, num_seeds, num_episodes))
            drawn_RSE = self.values[seed_RS[..., None], g, episode_RSE]
            used_RSE = np.arange(num_episodes) < count_RS[..., None]
            resampled[:, :, g] = np.where(used_RSE, drawn_RSE, 0.0).sum(-1) / count_RS
        return resampled


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


def bootstrap(
    statistic: Callable[..., Array], *runs: RunReturns, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[Array, Array, Array]:
    """A statistic of run scores with its 95% percentile interval from a stratified bootstrap.

    Args:
        statistic (callable): takes one ``[..., S, G]`` array for each of ``runs``, gives ``[..., *out]``.
        *runs (RunReturns): the agents, resampled independently of each other.

    Keyword Args:
        num_resamples (int): bootstrap resamples.
        seed (int): of the resampling; the same input and seed give the same interval.

    Returns:
        ``(point, low, high)``, each ``[*out]``.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    generator = np.random.default_rng(seed)
    resampled = statistic(*(run.resampled_run_scores(num_resamples, generator) for run in runs))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return np.asarray(statistic(*(run.run_scores() for run in runs))), low, high


def game_means(runs: RunReturns, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Each game's mean over seeds of the run scores, with 95% intervals."""
    estimates = bootstrap(lambda scores: scores.mean(-2), runs, num_resamples=num_resamples, seed=seed)
    return {game: Interval(*(float(x[g]) for x in estimates)) for g, game in enumerate(runs.games)}


def aggregates(runs: RunReturns, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Every entry of :data:`AGGREGATES` over all games of ``runs`` (normalise first), with 95% intervals."""

    def statistic(scores: Array) -> Array:
        return np.stack([function(scores) for function in AGGREGATES.values()], axis=-1)

    estimates = bootstrap(statistic, runs, num_resamples=num_resamples, seed=seed)
    return {name: Interval(*(float(x[i]) for x in estimates)) for i, name in enumerate(AGGREGATES)}


def performance_profile(
    runs: RunReturns, thresholds: Array, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Fraction of runs whose score exceeds each threshold (score distribution of arXiv:2108.13264, section 4.3).

    Returns:
        ``(fraction, low, high)``, each ``[T]``.
    """

    def statistic(scores: Array) -> Array:
        return np.stack([(scores > threshold).mean((-2, -1)) for threshold in thresholds], axis=-1)

    return bootstrap(statistic, runs, num_resamples=num_resamples, seed=seed)


def probability_of_improvement(
    x: RunReturns, y: RunReturns, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Chance that a run of ``x`` beats a run of ``y`` in the same game (a tie counts half), averaged over games.

    Raises:
        ValueError: if the two have different games.
    """
    if x.games != y.games:
        raise ValueError(f"both agents must have the same games in the same order, got {x.games} and {y.games}")

    def statistic(scores_x: Array, scores_y: Array) -> Array:
        difference = scores_x[..., :, None, :] - scores_y[..., None, :, :]
        return (0.5 * (1.0 + np.sign(difference))).mean((-3, -2, -1))

    return Interval(*(float(v) for v in bootstrap(statistic, x, y, num_resamples=num_resamples, seed=seed)))


@cache
def published_scores() -> dict[str, dict[str, float]]:
    """Published multi-game agents' raw scores, ``{agent: {game: score}}`` (``reference/published_scores.csv``).

    They are a landmark and no like-for-like baseline: data, sticky actions and protocol differ from ours.
    """
    table: dict[str, dict[str, float]] = defaultdict(dict)
    path = resources.files("torchrl_sql") / "reference" / "published_scores.csv"
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        table[row["agent"]][row["game"]] = float(row["score"])
    return dict(table)
