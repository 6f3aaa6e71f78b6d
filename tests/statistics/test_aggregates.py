from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchrl_sql.statistics import aggregates as S
from torchrl_sql.statistics.scores import RunReturns

GAMES_6 = ("Amidar", "Assault", "Asterix", "Breakout", "Freeway", "Qbert")


def runs_of(values, counts=None, **options):
    """The scores of runs of ``[S, G, E]`` returns, with resamples."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.full(values.shape[:2], values.shape[2]) if counts is None else np.asarray(counts)
    runs = RunReturns(games=GAMES_6[: values.shape[1]], seeds=tuple(range(len(values))), values=values, counts=counts)
    return S.BootstrapScores.from_returns(runs, **options)


# Numbers computed by hand


def test_aggregates_by_hand():
    run_scores = np.array([[0.0, 1.0, 2.0, 9.0], [0.4, 0.8, 1.2, 3.0]])  # sorted: 0 .4 | .8 1 1.2 2 | 3 9
    assert S.interquartile_mean(run_scores) == pytest.approx((0.8 + 1 + 1.2 + 2) / 4)
    assert S.mean(run_scores) == pytest.approx(17.4 / 8)
    assert S.median(run_scores) == pytest.approx((0.9 + 1.6) / 2)  # game means .2 .9 1.6 6
    assert S.optimality_gap(run_scores) == pytest.approx((1 + 0.6 + 0.2) / 8)
    assert S.interquartile_mean(np.array([[1.0, 2.0, 6.0]])) == pytest.approx(3)  # fewer than 4 scores: their mean


def test_probability_of_improvement_by_hand():
    x = runs_of([[[1.0], [5.0]], [[3.0], [6.0]]])
    y = runs_of([[[2.0], [5.0]], [[3.0], [0.0]]])
    # game 0: (1<2) (1<3) (3>2) (3=3) -> 1.5/4; game 1: (5=5) (5>0) (6>5) (6>0) -> 3.5/4
    assert S.probability_of_improvement(x, y).point == pytest.approx((1.5 / 4 + 3.5 / 4) / 2)
    assert S.probability_of_improvement(x, x).point == 0.5
    with pytest.raises(ValueError, match="same games"):
        S.probability_of_improvement(x, y.select(["Amidar"]))


def test_performance_profile_by_hand():
    fraction, low, high = S.performance_profile(
        runs_of([[[0.2], [0.6]], [[0.5], [2.0]]], num_resamples=500), np.array([0.0, 0.5, 1.0, 2.0])
    )
    np.testing.assert_allclose(fraction, [1, 0.5, 0.25, 0])  # strictly above
    assert (low[0], high[0], low[3], high[3]) == (1, 1, 0, 0)
    np.testing.assert_array_equal([low[2], high[2]], [0, 0.5])  # game 1 draws 2.0 never .. twice of two


def test_two_episodes_give_the_exact_bootstrap_distribution():
    """Two episodes 0 and 1: resampled means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    resampled = runs_of([[[0.0, 1.0]]], num_resamples=40_000).resampled.ravel()
    chances = [(resampled == value).mean() for value in (0, 0.5, 1)]
    np.testing.assert_allclose(chances, [0.25, 0.5, 0.25], atol=0.01)


def test_bootstrap_variance_has_both_levels_and_respects_unequal_counts():
    """Var of the mean = (variance of seed means + mean over seeds of episode variance / n_s) / S."""
    values = np.array([[[0.0, 2.0, np.nan]], [[6.0, 9.0, 12.0]]])  # means 1 and 9; variances 1 and 6
    resampled = runs_of(values, [[2], [3]], num_resamples=60_000, seed=1).resampled
    expected = (16 + (1 / 2 + 6 / 3) / 2) / 2
    np.testing.assert_allclose(resampled.mean((1, 2)).var(), expected, rtol=0.03)
    np.testing.assert_allclose(resampled.mean(), 5, rtol=0.01)


# Agreement with rliable

RLIABLE_POINT = {"IQM": 1.4020625, "median": 1.2728, "mean": 1.28596667, "optimality gap": 0.219}
RLIABLE_INTERVAL = {
    "IQM": (0.98143438, 1.7471875),
    "median": (0.9703975, 1.6072),
    "mean": (1.005665, 1.55253417),
    "optimality gap": (0.09619917, 0.35866667),
}


def rliable_table(num_runs, num_games, shift):
    index = np.arange(num_runs * num_games, dtype=np.float64).reshape(num_runs, num_games)
    return np.round(np.abs(np.sin(12.9898 * index + shift)) * 2.5 - 0.3, 3)


def test_agreement_with_rliable():
    """Same inputs, same estimates; intervals agree within the noise of resampling.

    Recorded with rliable 1.2.0, pandas 2.3.3 (with pandas 3 it does not import), arch 7.2.0, numpy 2.4.6, scipy 1.17.1,
    Python 3.11 after ``numpy.random.seed(0)``: ``library.get_interval_estimates({"x": x}, aggregates, reps=50000)``
    with ``metrics.aggregate_{iqm,median,mean,optimality_gap}``, ``x = rliable_table(5, 6, 0.5)``; then
    ``get_interval_estimates({"xy": (x, y)}, ..., reps=20000)`` with ``metrics.probability_of_improvement``,
    ``y = rliable_table(4, 6, 2.0)``; then ``create_performance_profile({"x": x}, [0, .5, 1, 1.5, 2], reps=20000)``.
    With one episode a run, the episode level of our bootstrap has nothing to resample and the two are the same method.
    """
    tables = [rliable_table(n, 6, shift)[..., None] for n, shift in ((5, 0.5), (4, 2.0))]
    ours = S.aggregates(runs_of(tables[0], num_resamples=50_000))
    assert {name: v.point for name, v in ours.items()} == pytest.approx(RLIABLE_POINT, abs=1e-8)
    for name, expected in RLIABLE_INTERVAL.items():
        assert (ours[name].low, ours[name].high) == pytest.approx(expected, abs=0.015)
    x, y = (runs_of(table, num_resamples=20_000) for table in tables)
    improvement = S.probability_of_improvement(x, y)
    assert improvement.point == pytest.approx(0.48333333)
    assert (improvement.low, improvement.high) == pytest.approx((0.31666667, 0.65), abs=0.01)
    fraction, low, high = S.performance_profile(x, np.array([0, 0.5, 1, 1.5, 2]))
    np.testing.assert_allclose(fraction, [0.93333333, 0.76666667, 0.63333333, 0.5, 0.26666667])
    # A profile moves in steps of 1/30 here; the recorded quantiles fall on whole steps.
    np.testing.assert_allclose(low, [0.83333333, 0.6, 0.46666667, 0.33333333, 0.13333333], atol=0.034)
    np.testing.assert_allclose(high, [1.0, 0.9, 0.8, 0.66666667, 0.43333333], atol=0.034)


# Contracts


def test_bootstrap_is_reproducible_and_seeded():
    values = np.arange(24.0).reshape(2, 3, 4) ** 2
    assert S.aggregates(runs_of(values, seed=4)) == S.aggregates(runs_of(values, seed=4))
    assert S.aggregates(runs_of(values, seed=4)) != S.aggregates(runs_of(values, seed=5))
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        runs_of(values, num_resamples=0)


def test_agents_are_resampled_independently():
    """With the same draws for both, resampled differences of two alike agents would hardly vary."""
    values = np.random.default_rng(0).normal(size=(1, 1, 50))
    x, y = (runs_of(values + shift, num_resamples=20_000).resampled.ravel() for shift in (0, 1e-9))
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.03


def test_selection_and_normalisation_keep_the_resamples():
    runs = runs_of(np.arange(12.0).reshape(2, 3, 2))
    chosen = runs.select(["Asterix", "Amidar"])
    np.testing.assert_array_equal(chosen.resampled, runs.resampled[..., [2, 0]])
    assert (chosen.games, chosen.seeds) == (("Asterix", "Amidar"), (0, 1))
    human = runs_of([[[5.8]], [[1719.5]]]).normalised("human")  # Amidar's random and human scores
    np.testing.assert_allclose(human.scores, [[0], [1]], atol=1e-12)
    assert set(human.resampled.round(12).ravel()) == {0, 1}


def test_one_episode_gives_a_point():
    runs = runs_of([[[0.7]]])
    for name, interval in S.aggregates(runs).items():
        value = 0.3 if name == "optimality gap" else 0.7
        assert interval == pytest.approx((value, value, value))
    assert S.game_means(runs) == {"Amidar": pytest.approx((0.7, 0.7, 0.7))}


# Properties

values = st.floats(-100, 100)
matrices = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=values)
returns = hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=values)


@given(matrices, st.randoms(use_true_random=False))
def test_aggregates_stay_inside_the_scores_and_ignore_their_order(scores, random):
    shuffled = scores[random.sample(range(len(scores)), len(scores))]
    shuffled = shuffled[:, random.sample(range(scores.shape[1]), scores.shape[1])]
    for name, function in S.AGGREGATES.items():
        assert function(shuffled) == pytest.approx(function(scores), abs=1e-9)
        if name != "optimality gap":
            assert scores.min() - 1e-9 <= function(scores) <= scores.max() + 1e-9
    assert S.optimality_gap(scores) >= -1e-12


@given(matrices, st.floats(0.01, 10), st.floats(-10, 10))
def test_shift_and_scale(scores, scale, shift):
    for name in ("IQM", "median", "mean"):
        function = S.AGGREGATES[name]
        assert function(scale * scores + shift) == pytest.approx(scale * function(scores) + shift, abs=1e-6)


@given(matrices)
def test_stacked_matrices_are_aggregated_one_by_one(scores):
    for function in S.AGGREGATES.values():
        stacked = function(np.stack([scores, scores + 1, 2 * scores]))
        np.testing.assert_allclose(stacked, [function(scores), function(scores + 1), function(2 * scores)], atol=1e-9)


@settings(deadline=None)
@given(returns)
def test_intervals_are_ordered_within_the_data_and_the_means_holds_its_point(values):
    for name, interval in S.aggregates(runs_of(values, num_resamples=200)).items():
        assert interval.low <= interval.high
        if name != "optimality gap":
            assert values.min() - 1e-9 <= interval.low <= interval.high <= values.max() + 1e-9
        if name == "mean":
            assert interval.low - 1e-9 <= interval.point <= interval.high + 1e-9


@settings(deadline=None)
@given(returns, st.data())
def test_probability_of_improvement_is_a_probability_and_antisymmetric(x, data):
    y = data.draw(hnp.arrays(np.float64, x.shape, elements=values))
    x, y = (runs_of(scores, num_resamples=20) for scores in (x, y))
    forward = S.probability_of_improvement(x, y)
    backward = S.probability_of_improvement(y, x)
    assert 0 <= forward.low <= forward.high <= 1
    assert forward.point + backward.point == pytest.approx(1)


@settings(deadline=None)
@given(returns)
def test_performance_profile_falls_from_one_to_zero(values):
    thresholds = np.linspace(values.min() - 1, values.max() + 1, 7)
    for curve in S.performance_profile(runs_of(values, num_resamples=20), thresholds):
        assert (curve[0], curve[-1]) == (1, 0)
        assert np.all(np.diff(curve) <= 0)
