"""Normalised scores, the returns of runs as an array, and published agents' scores.

Shape suffixes: S training seeds, G games, E episodes.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.protocol import Decoding
from torchrl_sql.games import GAMES

Reference = Literal["human", "dqn"]
"""Whose published score is 1 on the normalised scale; the published random score is 0."""

Array = NDArray[np.float64]
Score = TypeVar("Score", float, Array)


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
        values (array): ``[S, G, E]`` float64, finite; entries past a run's count are NaN.
        counts (array): ``[S, G]`` int64, episodes of each run, at least 1.

    Raises:
        ValueError: if shapes, counts and values do not fit together, or a run is empty or has a return that is NaN.
    """

    games: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Array
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = (len(self.seeds), len(self.games))
        if self.values.shape[:-1] != shape or self.counts.shape != shape or 0 in shape:
            raise ValueError(
                f"values must be [S, G, E] and counts [S, G] for (S, G) = {shape}, at least one each, "
                f"got {self.values.shape} and {self.counts.shape}"
            )
        used = np.arange(self.values.shape[-1]) < self.counts[..., None]
        if not np.array_equal(np.isfinite(self.values), used) or self.counts.min() < 1:
            s, g = np.argwhere((np.isfinite(self.values) != used).any(-1) | (self.counts < 1))[0]
            raise ValueError(
                f"a run of n >= 1 episodes must have n finite returns, then NaN; seed {self.seeds[s]} in "
                f"{self.games[g]} has n = {self.counts[s, g]} and {self.values[s, g].tolist()}"
            )

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[EpisodeResult],
        *,
        agent: str,
        decoding: Decoding,
        games: Sequence[str] | None = None,
        gradient_step: int | None = None,
    ) -> RunReturns:
        """Collects one agent's episodes at one gradient step, which all its seeds and games must have reached.

        The order of the rows does not matter.

        Args:
            episodes (iterable of EpisodeResult): rows, of any agents.

        Keyword Args:
            agent (str): whose rows to take.
            decoding (str): ``"greedy"`` or ``"sampled"`` rows.
            games (sequence of str, optional): games and their order; by default all the agent has, alphabetically.
            gradient_step (int, optional): of the checkpoints; by default the last one evaluated.

        Raises:
            ValueError: if there are no such rows, a (seed, game) pair has no episode, an episode is listed twice,
                a seed's come from different checkpoints, or epsilon, the sticky probability or the frame limit differ
                among the rows.
        """
        rows = [row for row in episodes if row.agent == agent and row.decoding == decoding]
        if not rows:
            raise ValueError(f"there is no episode of agent {agent!r} with decoding {decoding!r}")
        seeds = sorted({row.seed for row in rows})
        if games is None:
            games = sorted({row.game for row in rows})
        if len(set(games)) != len(games) or not games:
            raise ValueError(f"games must be distinct and at least one, got {tuple(games)}")
        step = max(row.gradient_step for row in rows) if gradient_step is None else gradient_step
        rows = [row for row in rows if row.gradient_step == step and row.game in games]
        protocols = sorted({(row.epsilon, row.sticky, row.max_env_frames) for row in rows})
        if len(protocols) > 1:
            raise ValueError(
                f"episodes of {agent!r} ({decoding}) mix protocols (epsilon, sticky, frame limit): {protocols}"
            )
        weights = {(row.seed, row.checkpoint) for row in rows}
        if len(weights) > len({seed for seed, _ in weights}):
            raise ValueError(
                f"episodes of {agent!r} ({decoding}) at gradient step {step} mix checkpoints of one seed: "
                f"{sorted(weights)}"
            )
        returns: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            run = returns[row.seed, row.game]
            if row.episode in run:
                raise ValueError(
                    f"episode {row.episode} of agent {agent!r} ({decoding}), seed {row.seed}, game {row.game}, "
                    f"gradient step {step} is listed twice"
                )
            run[row.episode] = row.episode_return
        missing = [(seed, game) for seed in seeds for game in games if not returns[seed, game]]
        if missing:
            seed, game = missing[0]
            raise ValueError(
                f"agent {agent!r} ({decoding}) has no episode at gradient step {step} for seed {seed} in {game}"
                + (f", nor for {len(missing) - 1} other (seed, game) pairs" if len(missing) > 1 else "")
                + "; evaluate it there, or choose the games that all have"
            )
        counts = np.array([[len(returns[seed, game]) for game in games] for seed in seeds], dtype=np.int64)
        values = np.full((*counts.shape, int(counts.max())), np.nan)
        for s, seed in enumerate(seeds):
            for g, game in enumerate(games):
                run = returns[seed, game]
                values[s, g, : len(run)] = [run[episode] for episode in sorted(run)]
        return cls(games=tuple(games), seeds=tuple(seeds), values=values, counts=counts)

    def episodes(self, seed_index: int, game_index: int) -> Array:
        """The returns of one run, ``[E]``."""
        return self.values[seed_index, game_index, : self.counts[seed_index, game_index]]

    def select(self, games: Sequence[str]) -> RunReturns:
        """The same runs restricted to ``games``, in that order."""
        columns = [self.games.index(game) for game in games]
        return replace(self, games=tuple(games), values=self.values[:, columns], counts=self.counts[:, columns])

    def normalised(self, reference: Reference) -> RunReturns:
        """The same runs on the normalised scale.

        Raises:
            ValueError: if a game has no such reference score; see :func:`split_by_reference`.
        """
        columns = [normalised_score(self.values[:, g], game, reference) for g, game in enumerate(self.games)]
        return replace(self, values=np.stack(columns, axis=1))

    def run_scores(self) -> Array:
        """Mean over the episodes of each run, ``[S, G]``."""
        return np.nanmean(self.values, axis=-1)


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
