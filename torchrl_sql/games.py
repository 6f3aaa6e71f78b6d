"""The 60 Atari games of DQN-Replay: ROMs, action sets, splits and published reference scores.

The facts live in ``reference/games.csv``. Splits: the 40 training and 5 held-out games of Kumar et al. (2023,
arXiv:2211.15144) and Lee et al. (2022, arXiv:2205.15241). ``random_score`` and ``human_score``: Mnih et al. (2015) and
Wang et al. (2016), as commonly tabulated; ``dqn_score``: the DQN agent that wrote DQN-Replay (Agarwal et al., 2020).
Carnival and Pooyan have no published human score. Minimal action sets equal ALE's ``getMinimalActionSet()`` (a test
checks all of them).
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
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
    """One game of DQN-Replay.

    Attributes:
        name (str): name in DQN-Replay, e.g. ``"BeamRider"``.
        rom (str): ALE ROM name, e.g. ``"beam_rider"``.
        split (str): ``"train40"``, ``"heldout5"`` or ``""``.
        random_score, human_score, dqn_score (float or None): published unclipped game scores.
        minimal_actions (tuple of int): legal actions as indices into :data:`ACTION_NAMES`, ascending. Position ``i``
            of a minimal-set action index (as in DQN-Replay's files) is ``minimal_actions[i]``.
        num_modes, num_difficulties (int): game variants ALE offers.
    """

    name: str
    rom: str
    split: str
    random_score: float | None
    human_score: float | None
    dqn_score: float | None
    minimal_actions: tuple[int, ...]
    num_modes: int
    num_difficulties: int


def _read_games() -> dict[str, Game]:
    def score(text: str) -> float | None:
        return float(text) if text else None

    path = resources.files("torchrl_sql") / "reference" / "games.csv"
    with path.open(encoding="utf-8") as file:
        return {
            row["game"]: Game(
                name=row["game"],
                rom=row["rom"],
                split=row["split"],
                random_score=score(row["random_score"]),
                human_score=score(row["human_score"]),
                dqn_score=score(row["dqn_score"]),
                minimal_actions=tuple(int(a) for a in row["minimal_action_set_full_indices"].split()),
                num_modes=int(row["num_modes"]),
                num_difficulties=int(row["num_difficulties"]),
            )
            for row in csv.DictReader(file)
        }


GAMES: dict[str, Game] = _read_games()
"""All 60 games by name, in alphabetical order."""

TRAIN_40 = tuple(game.name for game in GAMES.values() if game.split == "train40")
HELDOUT_5 = tuple(game.name for game in GAMES.values() if game.split == "heldout5")

_GROUPS = {"train40": TRAIN_40, "heldout5": HELDOUT_5, "all": tuple(GAMES)}


def resolve_games(games: str | Sequence[str]) -> tuple[str, ...]:
    """Turns a selection of games into their names.

    Args:
        games (str or sequence of str): ``"train40"``, ``"heldout5"``, ``"all"``, one name, names separated by commas,
            or a sequence of names.

    Returns:
        The names in the given order.

    Raises:
        ValueError: if a name is unknown (close matches are suggested), repeated, or none is given.
    """
    if isinstance(games, str):
        names = _GROUPS.get(games) or tuple(name.strip() for name in games.split(",") if name.strip())
    else:
        names = tuple(games)
    if not names:
        raise ValueError(f"games must name at least one game, got {games!r}")
    for name in names:
        if name not in GAMES:
            close = difflib.get_close_matches(name, [*GAMES, *_GROUPS], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"games must be names of DQN-Replay games (e.g. 'Breakout'), got {name!r}{hint}")
    if len(set(names)) != len(names):
        raise ValueError(f"games must not repeat, got {names}")
    return names


def illegal_actions(game: str, counts: Sequence[int]) -> str:
    """The actions that a game does not know and how often each was taken, such as ``"UP 25, DOWN 3"``.

    Args:
        game (str): its name.
        counts (sequence of int, ``[18]``): how often each of the full actions was taken.
    """
    legal = GAMES[game].minimal_actions
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
        mask[row, list(GAMES[name].minimal_actions)] = True
    return mask
