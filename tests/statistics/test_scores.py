from __future__ import annotations

import numpy as np
import pytest

from torchrl_sql.games import GAMES, HELDOUT_5, TRAIN_40
from torchrl_sql.statistics import scores as S

# Numbers computed by hand


def test_normalised_scores_by_hand():
    assert S.human_normalised(16.1, "Breakout") == pytest.approx((16.1 - 1.7) / (30.5 - 1.7))  # 14.4 / 28.8
    assert S.human_normalised(16.1, "Breakout") == pytest.approx(0.5)
    assert S.normalised_score(48.95, "Breakout", "dqn") == pytest.approx(0.5)
    np.testing.assert_allclose(S.human_normalised(np.array([0.0, 29.6, 59.2]), "Freeway"), [0, 1, 2])
    with pytest.raises(ValueError, match="Carnival has no published human"):
        S.human_normalised(1.0, "Carnival")
    with pytest.raises(ValueError, match="got 'Tetris'"):
        S.human_normalised(1.0, "Tetris")


def test_which_games_are_in_each_aggregate():
    included, excluded = S.split_by_reference(TRAIN_40, "human")
    assert (len(included), excluded) == (38, ("Carnival", "Pooyan"))
    assert S.split_by_reference(TRAIN_40, "dqn") == (TRAIN_40, ())
    assert S.split_by_reference(HELDOUT_5, "human") == (HELDOUT_5, ())
    assert S.split_by_reference(["Bowling", "AirRaid"], "dqn") == ((), ("Bowling", "AirRaid"))
    for game in S.split_by_reference(GAMES, "human")[0]:
        assert S.human_normalised(GAMES[game].human_score, game) == pytest.approx(1)
    with pytest.raises(ValueError, match="'human' or 'dqn', got 'alien'"):
        S.split_by_reference(["Pong"], "alien")


# Contracts


def test_returns_that_are_no_numbers_or_missing_are_refused():
    fields = {"games": ("Pong", "Boxing"), "seeds": (4,)}
    for values, counts in (([[[1.0, np.nan], [1.0, np.nan]]], [[1, 2]]), ([[[1.0], [np.inf]]], [[1, 1]])):
        with pytest.raises(ValueError, match=r"n finite returns, then NaN; seed 4 in Boxing has n = \d and \["):
            S.RunReturns(values=np.array(values), counts=np.array(counts), **fields)
    with pytest.raises(ValueError, match="seed 4 in Pong has n = 0"):
        S.RunReturns(values=np.array([[[np.nan], [1.0]]]), counts=np.array([[0, 1]]), **fields)
    with pytest.raises(ValueError, match=r"got \(1, 2, 1\) and \(2, 1\)"):
        S.RunReturns(values=np.ones((1, 2, 1)), counts=np.ones((2, 1), dtype=int), **fields)
    with pytest.raises(ValueError, match="counts must be at most the 1 values, got 9"):
        S.RunReturns(values=np.ones((1, 2, 1)), counts=np.array([[1, 9]]), **fields)


def test_a_seed_counts_once_and_what_is_not_trained_has_none():
    values, counts = np.ones((2, 1, 1)), np.ones((2, 1), dtype=int)
    with pytest.raises(ValueError, match=r"seeds must be different, got \(0, 0\)"):
        S.RunReturns(games=("Pong",), seeds=(0, 0), values=values, counts=counts)
    with pytest.raises(ValueError, match=r"what is not trained has one row of episodes, got 2"):
        S.RunReturns(games=("Pong",), seeds=(0, 1), values=values, counts=counts, trained=False)


def test_published_scores_are_complete_and_shipped():
    published = {agent.label: agent for agent in S.published_agents()}
    assert len(published) == 9
    assert {len(agent.scores) for agent in published.values()} == {15}
    assert all(game in GAMES for agent in published.values() for game in agent.scores)
    assert published["Scaled QL 80M (JOWA's rerun)"].scores["Assault"] == 2292.0
    assert published["MGDT 200M (JOWA's rerun)"].scores["Atlantis"] == 2565750.0
    assert all("10% of DQN-Replay" in agent.source for agent in published.values())
