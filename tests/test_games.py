from __future__ import annotations

import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms

from torchrl_sql.games import ACTION_NAMES, GAMES, HELDOUT_5, TRAIN_40, legal_action_mask, resolve_games


def test_action_names_are_those_of_ale():
    assert tuple(action.name for action in Action) == ACTION_NAMES


def test_splits_have_the_published_sizes_and_do_not_overlap():
    assert (len(GAMES), len(TRAIN_40), len(HELDOUT_5)) == (60, 40, 5)
    assert not set(TRAIN_40) & set(HELDOUT_5)
    assert [name for name in TRAIN_40 if GAMES[name].human_score is None] == ["Carnival", "Pooyan"]
    assert all(GAMES[name].dqn_score is not None for name in TRAIN_40)


def test_minimal_actions_equal_ales_own():
    ALEInterface.setLoggerMode(LoggerMode.Error)
    for game in GAMES.values():
        ale = ALEInterface()
        ale.loadROM(roms.get_rom_path(game.rom))
        assert game.minimal_actions == tuple(a.value for a in ale.getMinimalActionSet()), game.name
        assert game.num_modes == len(ale.getAvailableModes()), game.name
        assert game.num_difficulties == len(ale.getAvailableDifficulties()), game.name


def test_resolve_games():
    assert resolve_games("train40") == TRAIN_40
    assert resolve_games("Pong, Breakout") == ("Pong", "Breakout")
    assert resolve_games(["Qbert"]) == ("Qbert",)
    with pytest.raises(ValueError, match=r"got 'BreakOut'; did you mean Breakout"):
        resolve_games("BreakOut")
    with pytest.raises(ValueError, match="must not repeat"):
        resolve_games("Pong,Pong")
    with pytest.raises(ValueError, match="at least one game"):
        resolve_games("")


def test_legal_action_mask():
    mask = legal_action_mask(["Breakout", "Alien"])
    assert mask.shape == (2, 18) and mask.dtype == torch.bool
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert mask[1].all()
