"""How parallel evaluations share the episodes: each plays every N-th and writes its own part of the tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Shard(NamedTuple):
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
        """This process's shard: rank ``RANK`` of ``WORLD_SIZE``, task of a SLURM array, or both; else all of it.

        Raises:
            ValueError: if a variable is missing or not as its writer would set it.
        """
        shard = cls()
        if "SLURM_ARRAY_TASK_ID" in environment:
            task, first, count, step = (
                _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT", "STEP")
            )
            shard = cls((task - first) // step, count)
        if "RANK" in environment:
            rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
            shard = cls(shard.index * world_size + rank, shard.count * world_size)
        if not 0 <= shard.index < shard.count:
            raise ValueError(f"the environment's array task and rank must be below their counts, got {shard}")
        return shard

    def has(self, game_number: int, episode: int) -> bool:
        """Whether an episode is this shard's: those of one game go to different shards, and those of one number too."""
        return (game_number + episode) % self.count == self.index


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return int(text)
