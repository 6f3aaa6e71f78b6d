from __future__ import annotations

import re

import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms

from torchrl_sql.games import (
    ACTION_NAMES,
    GAMES,
    HELDOUT_5,
    TRAIN_40,
    find_game,
    legal_action_mask,
    place_of,
    resolve_games,
)


def test_action_names_are_those_of_ale():
    assert tuple(action.name for action in Action) == ACTION_NAMES


def test_splits_have_the_published_sizes_and_do_not_overlap():
    assert (len(GAMES), len(TRAIN_40), len(HELDOUT_5)) == (60, 40, 5)
    assert not set(TRAIN_40) & set(HELDOUT_5)
    assert [name for name in TRAIN_40 if GAMES[name].human_score is None] == ["Carnival", "Pooyan"]
    assert all(GAMES[name].dqn_score is not None for name in TRAIN_40)


def test_minimal_actions_modes_and_difficulties_are_ales_own():
    ALEInterface.setLoggerMode(LoggerMode.Error)
    for game in GAMES.values():
        ale = ALEInterface()
        ale.loadROM(roms.get_rom_path(game.rom))
        assert game.minimal_actions == tuple(a.value for a in ale.getMinimalActionSet()), game.name
        assert game.modes == tuple(ale.getAvailableModes()), game.name
        assert game.difficulties == tuple(ale.getAvailableDifficulties()), game.name
        state = ale.cloneState()
        assert (game.mode, game.difficulty) == (state.getCurrentMode(), state.getDifficulty()), game.name


def test_resolve_games():
    assert resolve_games("train40") == TRAIN_40
    assert resolve_games("Pong, Breakout") == ("Pong", "Breakout")
    assert resolve_games(["Qbert"]) == ("Qbert",)
    assert resolve_games(["train40"]) == TRAIN_40
    with pytest.raises(ValueError, match=r"got 'BreakOut'; did you mean Breakout"):
        resolve_games("BreakOut")
    with pytest.raises(ValueError, match="must not repeat"):
        resolve_games("Pong,Pong")
    with pytest.raises(ValueError, match="at least one game"):
        resolve_games("")


def test_a_group_among_names_is_refused():
    for games in ("train40,Freeway-m1", ["Freeway-m1", "train40"]):
        with pytest.raises(ValueError, match="games must be one group alone or names of games, got 'train40' among"):
            resolve_games(games)


def test_a_variation_by_hand():
    game = find_game("Freeway-m1-d1")
    assert (game.name, game.base, game.rom, game.mode, game.difficulty) == ("Freeway-m1-d1", "Freeway", "freeway", 1, 1)
    assert game.minimal_actions == (0, 2, 5) and game.seed_key == (*GAMES["Freeway"].seed_key, 1, 1)
    assert GAMES["Freeway"].random_score == 0.0 and GAMES["Freeway"].split == "train40"
    assert (game.random_score, game.human_score, game.dqn_score, game.split) == (None, None, None, "")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Freeway-m0", "Freeway"),
        ("Freeway-m0-d0", "Freeway"),
        ("Freeway-m00-d01", "Freeway-d1"),
        ("Freeway-m2-d0", "Freeway-m2"),
        ("DemonAttack-m1", "DemonAttack"),  # its default is not 0
        ("DemonAttack-m3", "DemonAttack-m3"),
    ],
)
def test_each_variation_has_one_name(said, name):
    assert resolve_games(said) == (name,)
    assert find_game(said) == find_game(name)


def test_all_variations_have_names_of_their_own_that_need_no_quotes():
    names = [
        find_game(f"{game.name}-m{mode}-d{difficulty}").name
        for game in GAMES.values()
        for mode in game.modes
        for difficulty in game.difficulties
    ]
    assert len(set(names)) == len(names) == 406 and set(GAMES) <= set(names)
    assert all(re.fullmatch("[A-Za-z0-9-]+", name) and find_game(name).name == name for name in names)
    assert len({find_game(name).seed_key for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Freeway-m9", r"mode of Freeway must be one of 0, 1, 2, 3, 4, 5, 6, 7, got 'Freeway-m9'"),
        ("Freeway-m1-d2", r"difficulty of Freeway must be one of 0, 1, got 'Freeway-m1-d2'"),
        ("Freeway-d1-m1", "got 'Freeway-d1-m1'; did you mean Freeway"),
        ("Freeway-m", "got 'Freeway-m'; did you mean Freeway"),
        ("Freeway-m-1", "got 'Freeway-m-1'; did you mean Freeway"),
        ("freeway-m1", "got 'freeway-m1'; did you mean Freeway"),
        ("-m1", "got '-m1'"),
        ("Freeway-m1\n", "got 'Freeway-m1"),
    ],
)
def test_variations_that_do_not_exist_are_refused_with_those_that_do(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_games([name])
    with pytest.raises(ValueError, match="must not repeat"):
        resolve_games("Freeway,Freeway-m0")


def test_a_policy_plays_a_variation_as_its_game_unless_it_knows_the_variation():
    games = ("Pong", "Freeway", "Freeway-m1")
    assert [place_of(game, games) for game in ("Freeway", "Freeway-m1", "Freeway-m2", "Pong-d1", "Breakout-m4")] == [
        1, 2, 1, 0, None,
    ]  # fmt: skip
    assert place_of("Freeway", ("Freeway-m1",)) is None


def test_legal_action_mask():
    mask = legal_action_mask(["Breakout", "Alien"])
    assert mask.shape == (2, 18) and mask.dtype == torch.bool
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert mask[1].all()
