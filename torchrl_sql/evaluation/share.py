"""How parallel evaluations share the episodes: each plays every N-th and writes its own part of the tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads ``"K/N"``, K from 1 to N.

        Raises:
            ValueError: if it is anything else.
        """
        try:
            part, count = (int(number) for number in text.split("/"))
        except ValueError:
            raise ValueError(f"a shard must be K/N, e.g. 1/8, got {text!r}") from None
        if not 1 <= part <= count:
            raise ValueError(f"a shard must be K/N with K from 1 to N, got {text!r}")
        return cls(part - 1, count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """Rank ``RANK`` of ``WORLD_SIZE``, as torchrun sets them; everything where they are not set.

        Raises:
            ValueError: if they are not a rank and a number of ranks.
        """
        if "WORLD_SIZE" not in environment:
            return cls()
        rank, world_size = environment.get("RANK", ""), environment["WORLD_SIZE"]
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise ValueError(f"RANK must be a number below WORLD_SIZE, got {rank!r} and {world_size!r}")
        return cls(int(rank), int(world_size))

    def has(self, game_number: int, episode: int) -> bool:
        """Whether an episode is this shard's: those of one game go to different shards, and those of one number too."""
        return (game_number + episode) % self.count == self.index


WHOLE = Shard()
"""All of the work."""
