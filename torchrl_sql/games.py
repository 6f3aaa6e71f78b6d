"""The 60 Atari games of DQN-Replay and their variations: ROMs, action sets, splits and published reference scores.

A variation is a game in another of ALE's modes or difficulties, and its name says in which: ``Freeway-m1``,
``Freeway-d1``, ``Freeway-m1-d1``. Wherever a game is named, a variation can be.

The facts live in ``reference/games.csv``. Splits: the 40 training and 5 held-out games of Kumar et al. (2023,
arXiv:2211.15144) and Lee et al. (2022, arXiv:2205.15241). ``random_score`` and ``human_score``: Mnih et al. (2015) and
Wang et al. (2016), as commonly tabulated; ``dqn_score``: the DQN agent that wrote DQN-Replay (Agarwal et al., 2020).
Carnival and Pooyan have no published human score. Minimal action sets, modes and difficulties are ALE's own (a test
checks all of them).
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ACTION_NAMES = (
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE", "RIGHTFIRE",
    "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE",
)  # fmt: skip
"""ALE's full action set, in its order: ``action`` 4 is ``"LEFT"`` in every game."""

NUM_ACTIONS = len(ACTION_NAMES)

FRAME_SHAPE = (84, 84)
"""Height and width of a preprocessed frame, uint8 grayscale."""
FRAME_STACK = 4
"""Frames in an observation, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """One game of DQN-Replay, or a variation of it.

    Attributes:
        name (str): name in DQN-Replay, e.g. ``"BeamRider"``; of a variation, e.g. ``"BeamRider-d1"``.
        base (str): the same without mode and difficulty.
        rom (str): ALE ROM name, e.g. ``"beam_rider"``.
        split (str): ``"train40"``, ``"heldout5"`` or ``""``; a variation is in none.
        random_score, human_score, dqn_score (float or None): published unclipped game scores; variations have none.
        minimal_actions (tuple of int): legal actions as indices into :data:`ACTION_NAMES`, ascending. Position ``i``
            of a minimal-set action index (as in DQN-Replay's files) is ``minimal_actions[i]``.
        modes, difficulties (tuple of int): those that ALE offers, its default first.
        mode, difficulty (int): this one's.
        seed_key (tuple of int): what stands for it in seeds, and orders games: its place among the 60 games, of a
            variation also mode and difficulty.
    """

    name: str
    base: str
    rom: str
    split: str
    random_score: float | None
    human_score: float | None
    dqn_score: float | None
    minimal_actions: tuple[int, ...]
    modes: tuple[int, ...]
    difficulties: tuple[int, ...]
    mode: int
    difficulty: int
    seed_key: tuple[int, ...]


def _read_games() -> dict[str, Game]:
    def score(text: str) -> float | None:
        return float(text) if text else None

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split())

    path = resources.files("torchrl_sql") / "reference" / "games.csv"
    with path.open(encoding="utf-8") as file:
        return {
            row["game"]: Game(
                name=row["game"],
                base=row["game"],
                rom=row["rom"],
                split=row["split"],
                random_score=score(row["random_score"]),
                human_score=score(row["human_score"]),
                dqn_score=score(row["dqn_score"]),
                minimal_actions=numbers(row["minimal_action_set_full_indices"]),
                modes=numbers(row["modes"]),
                difficulties=numbers(row["difficulties"]),
                mode=numbers(row["modes"])[0],
                difficulty=numbers(row["difficulties"])[0],
                seed_key=(place,),
            )
            for place, row in enumerate(csv.DictReader(file))
        }


GAMES: dict[str, Game] = _read_games()
"""All 60 games by name, in alphabetical order."""

TRAIN_40 = tuple(game.name for game in GAMES.values() if game.split == "train40")
HELDOUT_5 = tuple(game.name for game in GAMES.values() if game.split == "heldout5")

_GROUPS = {"train40": TRAIN_40, "heldout5": HELDOUT_5, "all": tuple(GAMES)}


_NAME = re.compile(r"(?P<base>.+?)(-m(?P<mode>[0-9]+))?(-d(?P<difficulty>[0-9]+))?", re.DOTALL)


def find_game(name: str) -> Game:
    """The game of a name such as ``"Freeway"``, or the variation of a name such as ``"Freeway-m1-d1"``.

    A name may say what is the default anyway: ``"Freeway-m0"`` is Freeway.

    Raises:
        ValueError: if there is no such game (close matches are suggested), or the game has no such mode or difficulty.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or parts["base"] not in GAMES:
        close = difflib.get_close_matches(name, [*GAMES, *_GROUPS], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            "games must be names of DQN-Replay games (e.g. 'Breakout') or their variations (e.g. 'Breakout-m4-d1'), "
            f"got {name!r}{hint}"
        )
    game = GAMES[parts["base"]]
    mode = game.mode if parts["mode"] is None else int(parts["mode"])
    difficulty = game.difficulty if parts["difficulty"] is None else int(parts["difficulty"])
    for kind, chosen, offered in (("mode", mode, game.modes), ("difficulty", difficulty, game.difficulties)):
        if chosen not in offered:
            raise ValueError(f"{kind} of {game.name} must be one of {', '.join(map(str, offered))}, got {name!r}")
    if (mode, difficulty) == (game.mode, game.difficulty):
        return game
    suffix = f"-m{mode}" * (mode != game.mode) + f"-d{difficulty}" * (difficulty != game.difficulty)
    return replace(
        game,
        name=game.name + suffix,
        split="",
        random_score=None,
        human_score=None,
        dqn_score=None,
        mode=mode,
        difficulty=difficulty,
        seed_key=(*game.seed_key, mode, difficulty),
    )


def resolve_games(games: str | Sequence[str]) -> tuple[str, ...]:
    """Turns a selection of games into their names.

    Args:
        games (str or sequence of str): ``"train40"``, ``"heldout5"``, ``"all"``, one name, names separated by commas,
            or a sequence of them, each name as :func:`find_game` takes it.

    Returns:
        The names in the given order; each game and variation has one.

    Raises:
        ValueError: if a name is unknown, repeated, or none is given.
    """
    if not isinstance(games, Sequence) or not all(isinstance(name, str) for name in games):
        raise ValueError(f"games must be names, got {games!r}")
    names = tuple(name.strip() for name in games.split(",") if name.strip()) if isinstance(games, str) else tuple(games)
    if len(names) == 1:
        names = _GROUPS.get(names[0], names)
    if not names:
        raise ValueError(f"games must name at least one game, got {games!r}")
    if groups := [name for name in names if name in _GROUPS]:
        raise ValueError(f"games must be one group alone or names of games, got {groups[0]!r} among {', '.join(names)}")
    names = tuple(find_game(name).name for name in names)
    if len(set(names)) != len(names):
        raise ValueError(f"games must not repeat, got {names}")
    return names


def place_of(game: str, games: Sequence[str]) -> int | None:
    """Which of a policy's games a game is played as: itself, or else the game that it is a variation of.

    Args:
        game (str): its name.
        games (sequence of str): the policy's, in the order of its ``game_id``.
    """
    return next((games.index(name) for name in (game, find_game(game).base) if name in games), None)


def illegal_actions(game: str, counts: Sequence[int]) -> str:
    """The actions that a game does not know and how often each was taken, such as ``"UP 25, DOWN 3"``.

    Args:
        game (str): its name.
        counts (sequence of int, ``[18]``): how often each of the full actions was taken.
    """
    legal = find_game(game).minimal_actions
    taken = enumerate(zip(ACTION_NAMES, counts, strict=True))
    return ", ".join(f"{name} {count:,}" for action, (name, count) in taken if count and action not in legal)


def legal_action_mask(games: Sequence[str]) -> torch.Tensor:
    """Which of the 18 actions each game knows; the others act as NOOP.

    Args:
        games (sequence of str): ``G`` names.

    Returns:
        ``[G, 18]`` bool.
    """
    import torch  # only here: whoever checks settings does not wait for it

    mask = torch.zeros(len(games), NUM_ACTIONS, dtype=torch.bool)
    for row, name in enumerate(games):
        mask[row, list(find_game(name).minimal_actions)] = True
    return mask
