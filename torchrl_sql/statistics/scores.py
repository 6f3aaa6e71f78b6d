"""Normalised scores, the returns of runs as an array, and published agents' scores.

Shape suffixes: S training seeds, G games, E episodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from torchrl_sql.games import find_game

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
    known = find_game(game)
    one = known.human_score if reference == "human" else known.dqn_score
    zero = known.random_score
    return None if one is None or zero is None else (zero, one)


@dataclass(frozen=True, kw_only=True)
class RunReturns:
    """The episode returns of one agent: S seeds on G games, with possibly different numbers of episodes.

    Attributes:
        games (tuple of str): ``G`` names.
        seeds (tuple of int): ``S`` different training seeds.
        values (array): ``[S, G, E]`` float64, finite; entries past a run's count are NaN.
        counts (array): ``[S, G]`` int64, episodes of each run, at least 1.
        trained (bool): whether there are training seeds. Random play, say, has none: its one row is no seed.

    Raises:
        ValueError: if shapes, counts and values do not fit together, a run is empty or has a return that is NaN, a seed
            comes twice, or there are several of what is not trained.
    """

    games: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Array
    counts: NDArray[np.int64]
    trained: bool = True

    def __post_init__(self) -> None:
        shape = (len(self.seeds), len(self.games))
        if self.values.shape[:-1] != shape or self.counts.shape != shape or 0 in shape:
            raise ValueError(
                f"values must be [S, G, E] and counts [S, G] for (S, G) = {shape}, at least one each, "
                f"got {self.values.shape} and {self.counts.shape}"
            )
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        if not self.trained and len(self.seeds) > 1:
            raise ValueError(f"what is not trained has one row of episodes, got {len(self.seeds)}: {self.seeds}")
        if self.counts.max() > self.values.shape[-1]:
            raise ValueError(f"counts must be at most the {self.values.shape[-1]} values, got {self.counts.max()}")
        used = np.arange(self.values.shape[-1]) < self.counts[..., None]
        if not np.array_equal(np.isfinite(self.values), used) or self.counts.min() < 1:
            s, g = np.argwhere((np.isfinite(self.values) != used).any(-1) | (self.counts < 1))[0]
            raise ValueError(
                f"a run of n >= 1 episodes must have n finite returns, then NaN; seed {self.seeds[s]} in "
                f"{self.games[g]} has n = {self.counts[s, g]} and {self.values[s, g].tolist()}"
            )

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


class PublishedAgent(NamedTuple):
    """An agent of the literature: a landmark, for data, sticky actions and protocol differ from ours."""

    label: str
    source: str
    """Who trained and evaluated it, on what."""
    scores: dict[str, float]
    """Raw, by game."""
    mark: str | None = None
    """matplotlib's marker where plots of games show it."""


@cache
def published_agents() -> tuple[PublishedAgent, ...]:
    """Those of ``reference/published_agents.yaml``."""
    path = resources.files("torchrl_sql") / "reference" / "published_agents.yaml"
    return tuple(PublishedAgent(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8")))
