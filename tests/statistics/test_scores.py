from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.games import GAMES, HELDOUT_5, TRAIN_40
from torchrl_sql.statistics import scores as S

GAMES_6 = ("Amidar", "Assault", "Asterix", "Breakout", "Freeway", "Qbert")


def episode(game="Breakout", seed=0, episode=0, value=0.0, **changes):
    fields = {
        "agent": "ours", "episode_seed": 0, "length_agent_steps": 10, "terminated": True, "truncated": False,
        "gradient_step": 100, "epsilon": 0.001, "sticky": 0.25, "max_env_frames": 108_000, "decoding": "greedy",
    }  # fmt: skip
    return EpisodeResult(game=game, seed=seed, episode=episode, episode_return=value, **(fields | changes))


# Numbers computed by hand


def test_normalised_scores_by_hand():
    assert S.human_normalised(16.1, "Breakout") == pytest.approx((16.1 - 1.7) / (30.5 - 1.7))  # 14.4 / 28.8
    assert S.human_normalised(16.1, "Breakout") == pytest.approx(0.5)
    assert S.dqn_normalised(48.95, "Breakout") == pytest.approx(0.5)
    np.testing.assert_allclose(S.human_normalised(np.array([0.0, 29.6, 59.2]), "Freeway"), [0, 1, 2])
    with pytest.raises(ValueError, match="Carnival has no published human"):
        S.human_normalised(1.0, "Carnival")
    with pytest.raises(ValueError, match="got 'Tetris'"):
        S.dqn_normalised(1.0, "Tetris")


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


def test_run_scores_are_means_over_each_runs_own_episodes():
    rows = [
        episode("Freeway", seed=3, episode=0, value=20.0),
        episode("Breakout", seed=3, episode=0, value=4.0),
        episode("Breakout", seed=3, episode=1, value=8.0),
        episode("Breakout", seed=1, episode=0, value=5.0),
        episode("Freeway", seed=1, episode=0, value=22.0),
        episode("Freeway", seed=1, episode=0, value=1.0, gradient_step=50),  # an earlier checkpoint
        episode("Freeway", seed=1, episode=0, value=2.0, agent="other"),
        episode("Freeway", seed=1, episode=0, value=3.0, decoding="sampled"),
    ]
    runs = S.RunReturns.from_episodes(rows, agent="ours", decoding="greedy")
    assert (runs.games, runs.seeds) == (("Breakout", "Freeway"), (1, 3))
    np.testing.assert_array_equal(runs.run_scores(), [[5, 22], [6, 20]])
    np.testing.assert_array_equal(runs.counts, [[1, 1], [2, 1]])
    only = S.RunReturns.from_episodes(rows, agent="ours", decoding="greedy", games=["Freeway"])
    assert only.run_scores().tolist() == [[22], [20]]
    with pytest.raises(ValueError, match="no episode at gradient step 50 for seed 1 in Breakout, nor for 2 other"):
        S.RunReturns.from_episodes(rows, agent="ours", decoding="greedy", gradient_step=50)


# Contracts


def table(games=("Breakout", "Freeway"), seeds=(0, 1), episodes=3, **changes):
    return [
        episode(game, seed, number, value=float(7 * g + 3 * seed + number**2), **changes)
        for g, game in enumerate(games)
        for seed in seeds
        for number in range(episodes)
    ]


def without(rows, **match):
    return [row for row in rows if any(getattr(row, key) != value for key, value in match.items())]


def test_incomplete_or_ambiguous_tables_are_refused():
    rows = table()

    def collect(rows, **changes):
        return S.RunReturns.from_episodes(rows, **{"agent": "ours", "decoding": "greedy", **changes})

    with pytest.raises(ValueError, match=r"no episode of agent 'ours'"):
        collect([])
    with pytest.raises(ValueError, match=r"no episode of agent 'ours' with decoding 'sampled'"):
        collect(rows, decoding="sampled")
    with pytest.raises(ValueError, match=r"no episode at gradient step 100 for seed 1 in Freeway; evaluate it"):
        collect(without(rows, game="Freeway", seed=1))
    with pytest.raises(ValueError, match=r"for seed 0 in Pong, nor for 1 other"):
        collect(rows, games=["Pong", "Breakout"])
    with pytest.raises(ValueError, match=r"episode 0 .* seed 0, game Breakout, gradient step 100 is listed twice"):
        collect([*rows, rows[0]])
    with pytest.raises(ValueError, match=r"mix protocols .* \[\(0.001, 0.0, 108000\), \(0.001, 0.25, 108000\)\]"):
        collect([*rows[:-1], dataclasses.replace(rows[-1], sticky=0.0)])
    with pytest.raises(ValueError, match="distinct"):
        collect(rows, games=["Breakout", "Breakout"])
    with pytest.raises(ValueError, match="no episode at gradient step 200 for seed 0 in Breakout"):  # one seed ran on
        collect([*rows, episode("Breakout", seed=1, gradient_step=200)])


def test_returns_that_are_no_numbers_or_missing_are_refused():
    fields = {"games": ("Pong", "Boxing"), "seeds": (4,)}
    for values, counts in (([[[1.0, np.nan], [1.0, np.nan]]], [[1, 2]]), ([[[1.0], [np.inf]]], [[1, 1]])):
        with pytest.raises(ValueError, match=r"n finite returns, then NaN; seed 4 in Boxing has n = \d and \["):
            S.RunReturns(values=np.array(values), counts=np.array(counts), **fields)
    with pytest.raises(ValueError, match="seed 4 in Pong has n = 0"):
        S.RunReturns(values=np.array([[[np.nan], [1.0]]]), counts=np.array([[0, 1]]), **fields)
    with pytest.raises(ValueError, match=r"got \(1, 2, 1\) and \(2, 1\)"):
        S.RunReturns(values=np.ones((1, 2, 1)), counts=np.ones((2, 1), dtype=int), **fields)


def test_published_scores_are_complete_and_shipped():
    published = S.published_scores()
    assert len(published) == 9
    assert {len(games) for games in published.values()} == {15}
    assert all(game in GAMES for games in published.values() for game in games)
    assert published["Scaled_QL_80M"]["Assault"] == 2292.0


# Properties

values = st.floats(-100, 100)
returns = hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=values)


@settings(deadline=None)
@given(returns, st.randoms(use_true_random=False))
def test_row_order_of_the_episode_table_does_not_matter(values, random):
    rows = [
        episode(game, seed, number, value=float(values[seed, g, number]))
        for seed in range(values.shape[0])
        for g, game in enumerate(GAMES_6[: values.shape[1]])
        for number in range(values.shape[2])
    ]
    sorted_runs = S.RunReturns.from_episodes(rows, agent="ours", decoding="greedy")
    shuffled = S.RunReturns.from_episodes(random.sample(rows, len(rows)), agent="ours", decoding="greedy")
    np.testing.assert_array_equal(sorted_runs.values, values)
    np.testing.assert_array_equal(shuffled.values, values)
