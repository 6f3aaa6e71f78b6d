"""What an evaluation is of and how it is played: agent, protocol, and the share of it that one process plays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torchrl_sql.arguments import check_count
from torchrl_sql.config import EvaluationConfig
from torchrl_sql.config.schema import MAX_EPISODES, MAX_SEED
from torchrl_sql.envs import Emulator
from torchrl_sql.envs.atari import DEFAULT_EMULATOR

Decoding = Literal["greedy", "sampled", "expert", "expert_128"]
"""How an action is taken from a network's output: its argmax, a draw from its softmax, or in the two ways of
:class:`torchrl_sql.modules.DecisionTransformerPolicy` that ask for a high return."""
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)
"""All of them."""


@dataclass(frozen=True, kw_only=True)
class AgentId:
    """Who plays: columns of the tables.

    Attributes:
        name (str): e.g. ``"scaled_ql"``; a run's name.
        training_seed (int): column ``seed``.
        gradient_step (int): gradient steps it was trained for.
        decoding (str): of :data:`Decoding`, how it takes its actions.
        checkpoint (str): which weights: the first 16 digits of their SHA-256, ``"sha256:1f0c..."``; empty for an agent
            without.
    """

    name: str
    training_seed: int = 0
    gradient_step: int = 0
    decoding: Decoding = "greedy"
    checkpoint: str = ""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """All but the weights, which a table has one of per key."""
        return (self.name, self.decoding, self.gradient_step, self.training_seed)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How agents are evaluated.

    Attributes:
        emulator (Emulator): sticky actions and the frame limit, columns ``sticky`` and ``max_env_frames``.
        epsilon (float): probability of a uniformly random legal action in place of the agent's.
        num_episodes (int): episodes per game.
        seed (int): of emulator and exploration, column ``evaluation_seed``.

    Raises:
        TypeError, ValueError: for a number of episodes, a seed or a probability that is none or out of range.
    """

    emulator: Emulator = DEFAULT_EMULATOR
    epsilon: float = 0.001
    num_episodes: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("num_episodes", self.num_episodes, 1, MAX_EPISODES),
            ("seed", self.seed, 0, MAX_SEED),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be in [{least:,}, {most:,}], got {value}")
            check_count(name, value, least)
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"epsilon must be in [0, 1], got {self.epsilon}")

    @classmethod
    def from_config(cls, config: EvaluationConfig) -> Protocol:
        """The protocol that a configuration describes."""
        return cls(
            emulator=Emulator(
                sticky_action_probability=config.sticky_action_probability,
                max_env_frames=config.max_env_frames_per_episode,
            ),
            epsilon=config.epsilon,
            num_episodes=config.num_episodes_per_game,
            seed=config.seed,
        )


@dataclass(frozen=True)
class Share:
    """Part ``index`` (from 0) of ``count``: parallel evaluations play one each and write files of their own."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Reads ``"K/N"``, K from 1 to N.

        Raises:
            ValueError: if it is anything else.
        """
        try:
            part, count = (int(number) for number in text.split("/"))
        except ValueError:
            raise ValueError(f"a share must be K/N, e.g. 1/8, got {text!r}") from None
        if not 1 <= part <= count:
            raise ValueError(f"a share must be K/N with K from 1 to N, got {text!r}")
        return cls(part - 1, count)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
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

    def has(self, game_index: int, episode: int) -> bool:
        """Whether an episode is in this share: those of one game go to different shares, those of one number too."""
        return (game_index + episode) % self.count == self.index


WHOLE = Share()
"""All of the work."""
