"""The returns of an agent, from rows of the table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.builders import episode, episodes
from torchrl_sql.evaluation import returns_of

GAMES_6 = ("Amidar", "Assault", "Asterix", "Breakout", "Freeway", "Qbert")


def test_run_scores_are_means_over_each_runs_own_episodes():
    rows = [
        episode("ours", "Freeway", seed=3, episode=0, value=20.0),
        episode("ours", "Breakout", seed=3, episode=0, value=4.0),
        episode("ours", "Breakout", seed=3, episode=1, value=8.0),
        episode("ours", "Breakout", seed=1, episode=0, value=5.0),
        episode("ours", "Freeway", seed=1, episode=0, value=22.0),
        episode("ours", "Freeway", seed=1, episode=0, value=1.0, gradient_step=50),  # an earlier checkpoint
        episode("other", "Freeway", seed=1, episode=0, value=2.0),
        episode("ours", "Freeway", seed=1, episode=0, value=3.0, decoding="sampled"),
    ]
    runs = returns_of(rows, agent="ours", decoding="greedy")
    assert (runs.games, runs.seeds) == (("Breakout", "Freeway"), (1, 3))
    np.testing.assert_array_equal(runs.run_scores(), [[5, 22], [6, 20]])
    np.testing.assert_array_equal(runs.counts, [[1, 1], [2, 1]])
    only = returns_of(rows, agent="ours", decoding="greedy", games=["Freeway"])
    assert only.run_scores().tolist() == [[22], [20]]
    with pytest.raises(ValueError, match="at gradient step 50 has no episode of seed 1 in Breakout, nor for 2 other"):
        returns_of(rows, agent="ours", decoding="greedy", gradient_step=50)


# Contracts


def table():
    """Two games, two seeds, three episodes each."""
    return [
        row
        for g, game in enumerate(("Breakout", "Freeway"))
        for seed in (0, 1)
        for row in episodes("ours", game, [7 * g + 3 * seed + index**2 for index in range(3)], seed=seed)
    ]


def without(rows, **match):
    return [row for row in rows if any(getattr(row, key) != value for key, value in match.items())]


def test_incomplete_or_ambiguous_tables_are_refused():
    rows = table()

    def collect(rows, **changes):
        return returns_of(rows, **{"agent": "ours", "decoding": "greedy", **changes})

    with pytest.raises(ValueError, match=r"no episode of agent 'ours'"):
        collect([])
    with pytest.raises(ValueError, match=r"no episode of agent 'ours' with decoding 'sampled'"):
        collect(rows, decoding="sampled")
    with pytest.raises(ValueError, match=r"at gradient step 100 has no episode of seed 1 in Freeway; evaluate it"):
        collect(without(rows, game="Freeway", seed=1))
    with pytest.raises(ValueError, match=r"of seed 0 in Pong, nor for 1 other"):
        collect(rows, games=["Pong", "Breakout"])
    with pytest.raises(
        ValueError, match=r"episode 0 of 'ours' \(greedy\) at gradient step 100, seed 0, game Breakout, is listed twice"
    ):
        collect([*rows, rows[0]])
    with pytest.raises(ValueError, match=r"mix protocols .* \[\(0.001, 0.0, 108000\), \(0.001, 0.25, 108000\)\]"):
        collect([*rows[:-1], replace(rows[-1], sticky=0.0)])
    with pytest.raises(ValueError, match="distinct"):
        collect(rows, games=["Breakout", "Breakout"])
    with pytest.raises(
        ValueError, match="at gradient step 200 has no episode of seed 0 in Breakout"
    ):  # one seed ran on
        collect([*rows, episode("ours", "Breakout", seed=1, gradient_step=200)])


# Properties

values = st.floats(-100, 100)
arrays = hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=values)


@settings(deadline=None)
@given(arrays, st.randoms(use_true_random=False))
def test_row_order_of_the_episode_table_does_not_matter(values, random):
    rows = [
        episode("ours", game, seed=seed, episode=number, value=float(values[seed, g, number]))
        for seed in range(values.shape[0])
        for g, game in enumerate(GAMES_6[: values.shape[1]])
        for number in range(values.shape[2])
    ]
    sorted_runs = returns_of(rows, agent="ours", decoding="greedy")
    shuffled = returns_of(random.sample(rows, len(rows)), agent="ours", decoding="greedy")
    np.testing.assert_array_equal(sorted_runs.values, values)
    np.testing.assert_array_equal(shuffled.values, values)
