from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from torchrl_sql.statistics import intervals as I
from torchrl_sql.statistics.scores import RunReturns

GAMES_6 = ("Amidar", "Assault", "Asterix", "Breakout", "Freeway", "Qbert")


def runs_of(values, counts=None):
    """The runs of ``[S, G, E]`` returns."""
    values = np.asarray(values, dtype=np.float64)
    counts = np.full(values.shape[:2], values.shape[2]) if counts is None else np.asarray(counts)
    return RunReturns(games=GAMES_6[: values.shape[1]], seeds=tuple(range(len(values))), values=values, counts=counts)


# Numbers computed by hand


@pytest.mark.parametrize("name", I.AGGREGATES)
def test_an_aggregate_of_what_is_not_known_is_not_known(name):
    scores = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 2.0, 3.0, 4.0]])
    assert np.isnan(I.AGGREGATES[name](scores)).tolist() == [True, False]


def test_aggregates_are_means_of_per_seed_aggregates_with_students_interval():
    scores = [[[0.0], [1.0], [2.0], [9.0]], [[0.4], [0.8], [1.2], [3.0]]]
    found = I.aggregates(runs_of(scores))
    # Per seed, the middle two: 1.5 and 1.0; medians the same; means 3 and 1.35; gaps (1+0+0+0)/4 and (.6+.2)/4.
    assert {name: interval.point for name, interval in found.items()} == pytest.approx(
        {"IQM": 1.25, "median": 1.25, "mean": 2.175, "optimality gap": 0.225}
    )
    reach = 12.7062 * 0.5 / 2  # t of one degree of freedom, times |1.5 - 1.0| / 2
    assert found["IQM"] == pytest.approx((1.25, 1.25 - reach, 1.25 + reach, "seeds"), abs=1e-4)


def test_game_means_by_hand():
    # Seeds score 1, 2, 6: mean 3, SD sqrt(7), t of two degrees of freedom 4.30265.
    found = I.game_means(runs_of([[[0.0, 2.0]], [[2.0, 2.0]], [[5.0, 7.0]]]))
    reach = 4.30265 * np.sqrt(7 / 3)
    assert found["Amidar"] == pytest.approx((3.0, 3 - reach, 3 + reach, "seeds"), abs=1e-4)


def test_difference_by_hand():
    x, y = runs_of([[[1.0]], [[3.0]], [[5.0]]]), runs_of([[[0.0]], [[1.0]], [[2.0]]])
    # Variances 4 and 1: squared standard error 5/3; Welch's freedom of 1947: (5/3)^2 / ((16 + 1) / 9 / 4) - 2 = 3.882.
    reach = stats.t.ppf(0.975, 25 / 9 / (17 / 36) - 2) * np.sqrt(5 / 3)
    assert I.game_differences(x, y)["Amidar"] == pytest.approx((2.0, 2 - reach, 2 + reach, "seeds"))


def test_ten_common_seeds_are_paired():
    generator = np.random.default_rng(0)
    common = generator.normal(size=(10, 1, 1))
    x = runs_of(common + 0.3 + 0.01 * generator.normal(size=(10, 1, 1)))
    y = runs_of(common + 0.01 * generator.normal(size=(10, 1, 1)))
    difference = I.game_differences(x, y)["Amidar"]
    assert difference.high - difference.low < 0.05 and I.verdict(difference) == "higher"
    assert I.verdict(I.game_differences(y, x)["Amidar"]) == "lower"


def test_common_seeds_are_paired_in_any_order_and_beside_others():
    generator = np.random.default_rng(0)
    x = runs_of(10 * generator.normal(size=(12, 1, 1)))
    shifted = x.values - 0.3 + 0.01 * generator.normal(size=x.values.shape)
    order = [11, *range(2, 10), 10, 1]  # without seed 0
    y = replace(runs_of(shifted[order]), seeds=tuple(order))
    y = replace(y, seeds=(*y.seeds[:-1], 99), values=np.append(y.values[:-1], [[[500.0]]], axis=0))
    expected = I.student((x.values - shifted)[2:, 0, 0])
    assert I.game_differences(x, y)["Amidar"][:3] == pytest.approx([float(value) for value in expected])


def test_probability_of_improvement_by_hand():
    x = runs_of([[[1.0], [5.0]], [[3.0], [6.0]]])
    y = runs_of([[[2.0], [5.0]], [[3.0], [0.0]]])
    # game 0: (1<2) (1<3) (3>2) (3=3) -> 1.5/4; game 1: (5=5) (5>0) (6>5) (6>0) -> 3.5/4
    assert I.probability_of_improvement(x, y).point == pytest.approx((1.5 / 4 + 3.5 / 4) / 2)
    assert I.probability_of_improvement(x, x).point == 0.5


def test_a_policy_without_training_is_compared_by_the_methods_seeds_alone():
    x = runs_of([[[4.0]], [[5.0]], [[9.0]]])  # mean 6, SD sqrt(7)
    play = RunReturns(
        games=("Amidar",), seeds=(0,), values=np.array([[[1.0, 1.0]]]), counts=np.array([[2]]), trained=False
    )
    reach = 4.30265 * np.sqrt(7 / 3)  # two degrees of freedom: play has no spread
    assert I.game_differences(x, play)["Amidar"] == pytest.approx((5.0, 5 - reach, 5 + reach, "seeds"), abs=1e-4)
    assert I.game_differences(play, x)["Amidar"] == pytest.approx((-5.0, -5 - reach, -5 + reach, "seeds"), abs=1e-4)
    assert I.aggregate_differences(x, play)["mean"] == pytest.approx((5.0, 5 - reach, 5 + reach, "seeds"), abs=1e-4)
    assert I.verdict(I.game_differences(runs_of([[[4.0, 5.0]]]), play)["Amidar"]) == "unknown"  # one seed of the method
    close = RunReturns(games=("Amidar",), seeds=(0,), values=np.array([[[5.0]]]), counts=np.array([[1]]), trained=False)
    chance = I.probability_of_improvement(x, close)  # 0, 1/2 and 1: mean 1/2, SD 1/2
    assert chance == pytest.approx((0.5, 0.0, 1.0, "seeds"))


def test_performance_profile_by_hand():
    share, low, high = I.performance_profile(runs_of([[[0.2], [0.6]], [[0.5], [2.0]]]), np.array([0.0, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(share, [1, 0.5, 0.25, 0])  # strictly above
    assert np.isnan(low[[0, 1, 3]]).all() and (low[2], high[2]) == (0, 1)  # 0 and 1/2, two seeds: anything


# One seed, ties, one episode: no certainty out of nothing


def test_one_seed_has_intervals_of_its_episodes_and_no_verdict():
    x, y = runs_of([[[1.0, 2.0, 6.0]]]), runs_of([[[0.0, 0.5, 0.1]]])
    mean = I.game_means(x)["Amidar"]
    reach = 4.30265 * np.sqrt(7 / 3)
    assert mean == pytest.approx((3.0, 3 - reach, 3 + reach, "episodes"), abs=1e-4)
    paired = stats.ttest_1samp([1.0, 1.5, 5.9], 0).confidence_interval()
    difference = I.game_differences(x, y)["Amidar"]
    assert difference[1:] == pytest.approx((paired.low, paired.high, "episodes"))
    assert I.verdict(difference) == "unknown"
    iqm = I.aggregates(x)["IQM"]
    assert iqm.unit == "episodes" and 1 <= iqm.low < iqm.point < iqm.high <= 6
    assert I.verdict(I.aggregate_differences(x, y)["IQM"]) == "unknown"
    assert I.verdict(I.difference_to(x, "Amidar", np.array([0.0]))) == "unknown"


@pytest.mark.parametrize("values", [[[[0.7]]], [[[0.7, 0.7]]], [[[0.7]], [[0.7]], [[0.7]]]])
def test_equal_returns_have_no_interval_and_no_verdict(values):
    runs, zero = runs_of(values), runs_of(np.zeros_like(np.array(values)))
    for interval in (*I.game_means(runs).values(), *I.aggregates(runs).values()):
        assert np.isnan(interval.low) and np.isnan(interval.high)
    for interval in (*I.game_differences(runs, zero).values(), *I.aggregate_differences(runs, zero).values()):
        assert I.verdict(interval) == "unknown"
    assert I.verdict(I.difference_to(runs, "Amidar", np.array([0.1, 0.1]))) == "unknown"
    improvement = I.probability_of_improvement(runs, zero)
    assert improvement.point == 1 and np.isnan(improvement.low)


def test_a_fixed_policy_is_compared_by_its_episodes_and_a_published_score_is_exact():
    runs = runs_of([[[3.0]], [[5.0]], [[7.0]]])
    against_policy = I.difference_to(runs, "Amidar", np.array([0.0, 1.0, 2.0, 1.0]))
    assert against_policy[:3] == pytest.approx(tuple(float(v) for v in I.welch([3.0, 5.0, 7.0], [0.0, 1.0, 2.0, 1.0])))
    against_score = I.difference_to(runs, "Amidar", np.array([4.0]))
    assert against_score[:3] == pytest.approx(tuple(float(v) for v in I.student([-1.0, 1.0, 3.0])))


def test_agents_of_other_games_are_refused():
    x, y = runs_of(np.zeros((2, 2, 1))), runs_of(np.zeros((2, 1, 1)))
    for function in (I.game_differences, I.aggregate_differences, I.probability_of_improvement):
        with pytest.raises(ValueError, match="same games in the same order"):
            function(x, y)


# Agreement with rliable


def rliable_table(num_runs, num_games, shift):
    index = np.arange(num_runs * num_games, dtype=np.float64).reshape(num_runs, num_games)
    return np.round(np.abs(np.sin(12.9898 * index + shift)) * 2.5 - 0.3, 3)


def test_rliable_by_name_agrees_with_rliable():
    """Same inputs, same estimates; intervals agree within the noise of resampling.

    Recorded with rliable 1.2.0, pandas 2.3.3 (with pandas 3 it does not import), arch 7.2.0, numpy 2.4.6, scipy 1.17.1,
    Python 3.11 after ``numpy.random.seed(0)``: ``library.get_interval_estimates({"x": x}, aggregates, reps=50000)``
    with ``metrics.aggregate_{iqm,median,mean,optimality_gap}``, ``x = rliable_table(5, 6, 0.5)``.
    """
    expected = {
        "IQM": (1.4020625, 0.98143438, 1.7471875),
        "median": (1.2728, 0.9703975, 1.6072),
        "mean": (1.28596667, 1.005665, 1.55253417),
        "optimality gap": (0.219, 0.09619917, 0.35866667),
    }
    ours = I.rliable_aggregates(runs_of(rliable_table(5, 6, 0.5)[..., None]), num_resamples=50_000)
    for name, (point, low, high) in expected.items():
        assert ours[name].point == pytest.approx(point, abs=1e-8)
        assert ours[name][1:3] == pytest.approx((low, high), abs=0.015)


def test_one_seed_has_no_interval_by_rliable_either():
    for interval in I.rliable_aggregates(runs_of([[[0.2], [0.7]]])).values():
        assert np.isnan(interval.low) and np.isnan(interval.high) and I.verdict(interval) == "unknown"


def test_point_of_improvement_agrees_with_rliable():
    x, y = (runs_of(rliable_table(n, 6, shift)[..., None]) for n, shift in ((5, 0.5), (4, 2.0)))
    assert I.probability_of_improvement(x, y).point == pytest.approx(0.48333333)  # recorded as above


# Coverage: a small version of benchmarks/coverage.py


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_intervals_cover_and_verdicts_err_as_seldom_as_they_should(shared):
    """Three seeds, eight games, 600 pairs of equal agents: a rate of 5% is measured as at most 7.5% (three SDs)."""
    generator = np.random.default_rng(0)
    num_trials, missed, wrong = 600, np.zeros(3), np.zeros(2)
    means = np.linspace(0.2, 1.2, 6)
    truth = [means[0], 0.7, 0.7]  # of a symmetric distribution, IQM and mean are the middle
    for _ in range(num_trials):
        effects = shared * generator.normal(size=(2, 3, 1)) + (1 - shared) * generator.normal(size=(2, 3, 6))
        x, y = (runs_of((means + effect)[..., None] + generator.normal(size=(3, 6, 4))) for effect in effects)
        intervals = [I.game_means(x)["Amidar"], I.aggregates(x)["IQM"], I.aggregates(x)["mean"]]
        missed += [not interval.low <= value <= interval.high for interval, value in zip(intervals, truth, strict=True)]
        differences = [I.game_differences(x, y)["Amidar"], I.aggregate_differences(x, y)["IQM"]]
        wrong += [I.verdict(difference) != "not distinguishable" for difference in differences]
    assert (missed / num_trials <= 0.075).all() and (missed / num_trials >= 0.025).all(), missed / num_trials
    assert (wrong / num_trials <= 0.075).all(), wrong / num_trials


# Properties

values = st.floats(-100, 100)
returns = hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=values)


@settings(deadline=None)
@given(returns)
def test_every_estimate_lies_inside_its_interval(values):
    runs = runs_of(values)
    for interval in (*I.game_means(runs).values(), *I.aggregates(runs).values()):
        assert np.isnan(interval.low) or interval.low <= interval.point <= interval.high
    thresholds = np.linspace(values.min() - 1, values.max() + 1, 7)
    share, low, high = I.performance_profile(runs, thresholds)
    assert (share[0], share[-1]) == (1, 0) and np.all(np.diff(share) <= 0)
    assert np.all(np.isnan(low) | ((low >= 0) & (low <= share) & (share <= high) & (high <= 1)))


@settings(deadline=None)
@given(returns, st.data())
def test_swapping_agents_turns_every_difference_round(x, data):
    y = data.draw(hnp.arrays(np.float64, x.shape, elements=values))
    x, y = runs_of(x), runs_of(y)
    pairs = [
        (I.game_differences(x, y), I.game_differences(y, x)),
        (I.aggregate_differences(x, y), I.aggregate_differences(y, x)),
    ]
    for forward, backward in pairs:
        for name in forward:
            assert forward[name].point == pytest.approx(-backward[name].point, abs=1e-9)
            assert forward[name].low == pytest.approx(-backward[name].high, abs=1e-9, nan_ok=True)
    improvement, other = I.probability_of_improvement(x, y), I.probability_of_improvement(y, x)
    assert improvement.point + other.point == pytest.approx(1)
    assert np.isnan(improvement.low) or 0 <= improvement.low <= improvement.point <= improvement.high <= 1


@settings(deadline=None)
@given(returns, st.floats(0.01, 10), st.floats(-10, 10))
def test_shift_and_scale_go_through(values, scale, shift):
    before, after = I.aggregates(runs_of(values)), I.aggregates(runs_of(scale * values + shift))
    for name in ("IQM", "median", "mean"):
        assert after[name].point == pytest.approx(scale * before[name].point + shift, abs=1e-6)


def test_selection_and_normalisation():
    runs = runs_of(np.arange(12.0).reshape(2, 3, 2))
    chosen = runs.select(["Asterix", "Amidar"])
    np.testing.assert_array_equal(chosen.run_scores(), runs.run_scores()[:, [2, 0]])
    human = runs_of([[[5.8]], [[1719.5]]]).normalised("human")  # Amidar's random and human scores
    np.testing.assert_allclose(human.run_scores(), [[0], [1]], atol=1e-12)
