"""States of games with what the machine's memory says of them: where things are, lives, the score.

Addresses: those of AtariARI (Anand et al. 2019, arXiv:1906.08226), and of OCAtari (Delfosse et al. 2024,
arXiv:2306.08649) for Assault, Enduro and the height of the space invaders, where AtariARI names none or another byte.
The speed in Enduro is ours. Tests compare them with pictures. Neither package is a dependency: AtariARI is on no index,
and OCAtari 2.2.1 wants NumPy 1, whose rules for bytes it counts on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from ale_py import ALEInterface, LoggerMode

from torchrl_sql.arguments import check_count
from torchrl_sql.envs.atari import Emulator
from torchrl_sql.envs.behaviours import SkillMixture
from torchrl_sql.envs.console import Console, Settings
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK, find_game

Read = Callable[[np.ndarray], np.ndarray]
"""Memory ``[N, 128]`` int64 -> a label of each state, float64 ``[N]``, NaN where there is no such thing."""

_STREAM = 1906_08226
"""Of random numbers: no episode is one that was collected with the same seed."""


def _byte(address: int, there: Callable[[np.ndarray], np.ndarray] | None = None) -> Read:
    """The value of a byte, in states where the thing is ``there``."""

    def read(ram: np.ndarray) -> np.ndarray:
        values = ram[:, address].astype(np.float64)
        return values if there is None else np.where(there(ram), values, np.nan)

    return read


def _signed(value: np.ndarray, bits: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


def _column(address: int, there: int | None = None) -> Read:
    """The column that a byte stands for as the machine draws objects: so many times 15 pixels, less a signed rest."""

    def read(ram: np.ndarray) -> np.ndarray:
        value = ram[:, address]
        column = (15.0 * (value & 15)) - _signed(value >> 4, bits=4)
        return column if there is None else np.where(ram[:, there] > 0, column, np.nan)

    return read


def _breakout_ball(ram: np.ndarray) -> np.ndarray:
    return ram[:, 101] > 0


def _pong_ball(ram: np.ndarray) -> np.ndarray:
    return (ram[:, 54] > 0) & (ram[:, 49] > 49)


LABELS: Mapping[str, Mapping[str, Read]] = {
    "Assault": {"player x": _column(16), "enemy x": _column(33, there=54), "mother ship x": _column(69)},
    "Breakout": {"player x": _byte(72), "ball x": _byte(99, _breakout_ball), "ball y": _byte(101, _breakout_ball)},
    "Enduro": {"player x": lambda ram: -_signed(ram[:, 46], bits=8).astype(np.float64), "speed": _byte(22)},
    # The other five cars are their mirror images.
    "Freeway": {"player y": _byte(14), **{f"car {lane} x": _byte(107 + lane) for lane in range(1, 6)}},
    "Pong": {
        "player y": _byte(51), "enemy y": _byte(50), "ball x": _byte(49, _pong_ball), "ball y": _byte(54, _pong_ball),
    },
    "SpaceInvaders": {
        "player x": _byte(28), "invaders x": _byte(26), "invaders y": _byte(16), "invaders left": _byte(17),
    },
}  # fmt: skip
"""By game: names of labels, and how they are read. All games also have ``lives`` and ``score``, as ALE gives them."""


@dataclass(frozen=True, kw_only=True)
class LabelledStates:
    """States of one game, those of an episode one after the other.

    Attributes:
        game (str): which.
        observation (array): uint8 ``[N, 4, 84, 84]``, oldest frame first.
        episode (array): int64 ``[N]``, from 0.
        labels (mapping): name -> float64 ``[N]``, NaN where there is no such thing.
    """

    game: str
    observation: np.ndarray
    episode: np.ndarray
    labels: Mapping[str, np.ndarray]


def record_labelled_states(
    game: str, *, num_episodes: int, states_per_episode: int, emulator: Emulator, seed: int
) -> LabelledStates:
    """Plays episodes as :func:`torchrl_sql.envs.collect` does with :class:`SkillMixture`, and draws states of each.

    Args:
        game (str): one of :data:`LABELS`, or a variation of one.

    Keyword Args:
        num_episodes (int): to play.
        states_per_episode (int): drawn without replacement among those in which an action was chosen; all of a shorter
            episode.
        emulator (Emulator): how they are played.
        seed (int): of everything; the same gives the same states.

    Raises:
        ValueError: if nothing is known of the game's memory, or a number is not positive.
    """
    known = find_game(game)
    if known.base not in LABELS:
        raise ValueError(f"games must have labels ({', '.join(LABELS)}), got {game!r}")
    check_count("num_episodes", num_episodes)
    check_count("states_per_episode", states_per_episode)
    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = Console(
        Settings(
            rom=known.rom, mode=known.mode, difficulty=known.difficulty, shape=FRAME_SHAPE, colour=False,
            sticky_action_probability=emulator.sticky_action_probability, max_env_frames=emulator.max_env_frames,
        )
    )  # fmt: skip
    policy = SkillMixture(game)
    observations, memories, others, episodes = [], [], [], []
    for episode in range(num_episodes):
        rng = np.random.default_rng([_STREAM, seed, *known.seed_key, episode])
        _, act = policy.start_episode(rng)
        frames = [np.zeros(FRAME_SHAPE, np.uint8)] * (FRAME_STACK - 1)
        inside: list[tuple[np.ndarray, int, int]] = []
        frame, score, over = console.start(int(rng.integers(2**31 - 1))), 0, False
        while not over:
            frames.append(frame)
            inside.append((*console.inside(), score))
            reward, terminated, truncated, frame = console.act(act(frame))
            score, over = score + reward, terminated or truncated
        drawn = np.sort(rng.permutation(len(inside))[:states_per_episode])
        observations += [np.stack(frames[step : step + FRAME_STACK]) for step in drawn]
        memories += [inside[step][0] for step in drawn]
        others += [inside[step][1:] for step in drawn]
        episodes += [episode] * len(drawn)
    ram = np.stack(memories).astype(np.int64)
    lives, score_of = np.array(others, dtype=np.float64).T
    return LabelledStates(
        game=known.name,
        observation=np.stack(observations),
        episode=np.array(episodes),
        labels={name: read(ram) for name, read in LABELS[known.base].items()} | {"lives": lives, "score": score_of},
    )
