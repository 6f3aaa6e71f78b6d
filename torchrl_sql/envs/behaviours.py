"""Sub-optimal behaviour policies: weak scripted skills mixed with noise, drawn anew for each episode.

They stand in for the first 20% of a DQN's training run where that data set is not at hand: the data contains good
decisions, but no good policy to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from torchrl_sql.games import ACTION_NAMES, find_game

NOOP, FIRE, UP, RIGHT, LEFT, DOWN, RIGHTFIRE, LEFTFIRE = (
    ACTION_NAMES.index(name) for name in ("NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "RIGHTFIRE", "LEFTFIRE")
)


class Skill(NamedTuple):
    """A script for one game.

    Attributes:
        description (str): what it does, for the record of a data set; change it whenever the script changes.
        act (callable): newest frame, uint8 ``[84, 84]`` -> action in 0..17.
    """

    description: str
    act: Callable[[np.ndarray], int]


_BREAKOUT_AIR = np.s_[38:75, 5:79]
"""Between bricks, paddle and walls."""
_DEAD_ZONE = 1.5
"""Pixels between an object and its target that are near enough."""


def _toward(target: float, position: float, *, below: int, there: int = NOOP, above: int) -> int:
    if target < position - _DEAD_ZONE:
        return below
    return above if target > position + _DEAD_ZONE else there


def _breakout(frame: np.ndarray) -> int:
    _, ball = np.nonzero(frame[_BREAKOUT_AIR])
    (paddle,) = np.nonzero(frame[76, 5:79])
    if len(ball) == 0 or len(paddle) == 0:
        return NOOP
    return _toward(ball.mean(), paddle.mean(), below=LEFT, above=RIGHT)


def _breakout_serve(frame: np.ndarray) -> int | None:
    return None if frame[_BREAKOUT_AIR].any() else FIRE


def _space_invaders(frame: np.ndarray) -> int:
    rows, columns = np.nonzero(frame[12:60] > 60)
    ship = np.nonzero(frame[75:78] > 60)[1]
    if len(rows) == 0 or len(ship) == 0:
        return FIRE
    lowest = columns[rows >= rows.max() - 2]
    nearest = lowest[np.abs(lowest - ship.mean()).argmin()]
    return _toward(float(nearest), ship.mean(), below=LEFTFIRE, there=FIRE, above=RIGHTFIRE)


def _enduro(frame: np.ndarray) -> int:
    road = frame[44:61, 10:84].astype(int)  # ends with the rows of the player's car
    drawn = np.abs(road - np.median(road)) > 8
    _, car = np.nonzero(road[12:] >= max(road[12:].max() - 30, 150))
    (edges,) = np.nonzero(drawn[6:11].any(0))
    if len(car) == 0 or len(edges) == 0:
        return FIRE
    position, left, right = car.mean(), edges.min() + 5, edges.max() - 4
    target = (edges.min() + edges.max()) / 2
    ahead = np.nonzero(drawn[:12, left:right])[1] + left
    in_the_way = ahead[np.abs(ahead - position) < 8]
    if len(in_the_way):
        target = position + (10 if in_the_way.mean() <= position else -10)
    return _toward(target, position, below=LEFTFIRE, there=FIRE, above=RIGHTFIRE)


def _pong(frame: np.ndarray) -> int:
    field = np.abs(frame[15:77].astype(int) - np.median(frame[15:77])) > 20
    (paddle,) = np.nonzero(field[:, 73:76].any(1))
    (ball,) = np.nonzero(field[:, 12:72].any(1))
    if len(ball) == 0 or len(paddle) == 0:
        return NOOP
    return _toward(ball.mean(), paddle.mean(), below=RIGHT, above=LEFT)  # RIGHT is up


_QBERT_COLUMNS = (9, 15, 21, 28, 34, 42, 49, 55, 62, 68, 75)
_QBERT_CUBES = {
    (row, place): (round(14.4 + 11.6 * row), _QBERT_COLUMNS[5 + 2 * place - row])
    for row in range(6)
    for place in range(row + 1)
}
"""Where in a frame the tops of the cubes are, (row, column), by their row from above and place from the left."""
_QBERT_HOPS = {UP: (-1, 0), RIGHT: (1, 1), LEFT: (-1, -1), DOWN: (1, 0)}
"""Action -> where it leads, in rows and places."""


def _qbert(frame: np.ndarray) -> int:
    taken = [cube for cube, (y, x) in _QBERT_CUBES.items() if frame[y - 6 : y - 1, x].mean() > 30]
    dark = [cube for cube, (y, x) in _QBERT_CUBES.items() if frame[y - 1 : y + 2, x - 2 : x + 3].max() < 115]
    if not taken:
        return NOOP
    row, place = taken[-1]
    reached = {action: (row + down, place + across) for action, (down, across) in _QBERT_HOPS.items()}
    on_the_pyramid = [action for action, cube in reached.items() if cube in _QBERT_CUBES]
    return next((action for action in on_the_pyramid if reached[action] in dark), on_the_pyramid[0])


SKILLS: dict[str, Skill] = {
    "Breakout": Skill("Moves the paddle under the ball.", _breakout),
    "Enduro": Skill("At full speed in the middle of the road, away from cars ahead.", _enduro),
    "Freeway": Skill("Walks up, whatever comes.", lambda frame: UP),
    "Assault": Skill("Fires straight up, whatever comes.", lambda frame: UP),
    "Pong": Skill("Moves the paddle to the ball's height.", _pong),
    "Qbert": Skill(
        "Hops to a neighbouring cube that is dark, as those of the first level are until they are hopped on, else to "
        "any; takes what stands lowest for itself and does not mind enemies.",
        _qbert,
    ),
    "SpaceInvaders": Skill("Fires from under the lowest invader, through the shields if need be.", _space_invaders),
}
"""The games that have a scripted skill."""

REFLEXES: dict[str, tuple[str, Callable[[np.ndarray], int | None]]] = {
    "Breakout": (
        "Fires when no ball is seen below the bricks: the game stands still until the player serves.",
        _breakout_serve,
    )
}
"""What every policy of a game does, however weak: description, and newest frame -> action (None: does not apply)."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """One kind of episode in a mixture.

    Attributes:
        name (str): label kept with each episode.
        skill_probability (tuple of float): range of the probability of following the script at a step; one value is
            drawn uniformly for each episode.
        noise (str): the other actions: ``"uniform"`` over the game's legal actions, or ``"biased"``, a distribution
            drawn for each episode from a Dirichlet(0.5).
        repeat_probability (tuple of float): range of the probability of repeating the last action, drawn likewise.
    """

    name: str
    skill_probability: tuple[float, float]
    noise: Literal["uniform", "biased"]
    repeat_probability: tuple[float, float] = (0.0, 0.6)


def weak_skills(max_repeat_probability: float = 0.6) -> tuple[Behaviour, ...]:
    """A third of the episodes each: some 60% skilled, hardly skilled, not skilled at all.

    Args:
        max_repeat_probability (float): see :class:`Behaviour`; with 0 the most frequent action in a state is the
            script's, wherever the script is followed more often than not.
    """
    repeat = (0.0, max_repeat_probability)
    return (
        Behaviour(name="skilled", skill_probability=(0.4, 0.8), noise="uniform", repeat_probability=repeat),
        Behaviour(name="weak", skill_probability=(0.0, 0.3), noise="uniform", repeat_probability=repeat),
        Behaviour(name="random", skill_probability=(0.0, 0.0), noise="biased", repeat_probability=repeat),
    )


def describe(game: str, behaviours: Sequence[Behaviour]) -> str:
    """A game's script and mixture in words, for the record of a data set."""
    noises = {
        "uniform": "actions uniform over the legal ones",
        "biased": "actions from a distribution over the legal ones drawn for each episode (Dirichlet 0.5)",
    }

    def one(behaviour: Behaviour) -> str:
        low, high = behaviour.skill_probability
        skill = f"follows the script at {low:.0%} to {high:.0%} of the steps, else " if high > 0 else "plays "
        repeat = f"the last action is repeated with a probability of up to {behaviour.repeat_probability[1]:.0%}"
        return f"{1 / len(behaviours):.0%} of episodes ({behaviour.name}): {skill}{noises[behaviour.noise]}; {repeat}."

    base = find_game(game).base
    reflex = [f"Always: {REFLEXES[base][0]}"] if base in REFLEXES else []
    return " ".join([f"The script: {SKILLS[base].description}", *reflex, *map(one, behaviours)])


class SkillMixture:
    """A behaviour policy of one game: each episode draws a behaviour of the mixture and its noise.

    Args:
        game (str): a game of :data:`SKILLS`, or a variation of one, for which its script serves, too.
        behaviours (sequence of Behaviour): kinds of episodes, equally likely.

    Raises:
        ValueError: if the game has no scripted skill.
    """

    def __init__(self, game: str, behaviours: Sequence[Behaviour] = weak_skills()):
        known = find_game(game)
        if known.base not in SKILLS:
            raise ValueError(f"game must have a scripted skill ({', '.join(SKILLS)}), got {game!r}")
        self._skill = SKILLS[known.base].act
        self._reflex = REFLEXES[known.base][1] if known.base in REFLEXES else lambda frame: None
        self._legal = np.array(known.minimal_actions)
        self._behaviours = tuple(behaviours)
        self.behaviour_names = tuple(behaviour.name for behaviour in behaviours)

    def start_episode(self, rng: np.random.Generator) -> tuple[int, Callable[[np.ndarray], int]]:
        """Draws an episode's behaviour and noise.

        Args:
            rng (numpy.random.Generator): the only source of randomness of the episode.

        Returns:
            The behaviour's index, and the episode's policy: newest frame uint8 ``[84, 84]`` -> action in 0..17.
        """
        index = int(rng.integers(len(self._behaviours)))
        behaviour = self._behaviours[index]
        skill_probability = rng.uniform(*behaviour.skill_probability)
        repeat_probability = rng.uniform(*behaviour.repeat_probability)
        num_actions = len(self._legal)
        if behaviour.noise == "biased":
            noise = rng.dirichlet(np.full(num_actions, 0.5))
        else:
            noise = np.full(num_actions, 1.0 / num_actions)
        thresholds = noise.cumsum()
        last_action = NOOP

        def act(frame: np.ndarray) -> int:
            nonlocal last_action
            repeat, follow, draw = rng.random(3)
            forced = self._reflex(frame)
            if forced is not None:
                return forced
            if repeat >= repeat_probability:
                if follow < skill_probability:
                    last_action = self._skill(frame)
                else:
                    position = min(int(np.searchsorted(thresholds, draw, side="right")), num_actions - 1)
                    last_action = int(self._legal[position])
            return last_action

        return index, act
