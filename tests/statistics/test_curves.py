from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.statistics.curves import area_under_curve
from torchrl_sql.statistics.intervals import game_means
from torchrl_sql.statistics.scores import RunReturns


def runs(values, games=("Breakout",)):
    """Returns ``[S, G, E]``; NaN where a run has no such episode."""
    values = np.array(values, dtype=np.float64)
    return RunReturns(
        games=games, seeds=tuple(range(len(values))), values=values, counts=np.isfinite(values).sum(-1, dtype=np.int64)
    )


def test_room_for_more_episodes_changes_nothing():
    narrow, wide = runs([[[1.0, 2.0]]]), runs([[[3.0, 5.0, np.nan]]])
    np.testing.assert_allclose(area_under_curve({0: narrow, 10: wide}).values, [[[2.0, 3.5]]])


def test_the_area_is_the_mean_over_the_span_by_hand():
    """Steps 100, 200 and 400: weights 1/6, 1/2 and 1/3. Two seeds with two episodes each."""
    curve = {
        400: runs([[[12.0, 24.0]], [[6.0, 6.0]]]),
        100: runs([[[0.0, 6.0]], [[0.0, 0.0]]]),
        200: runs([[[4.0, 8.0]], [[2.0, 4.0]]]),
    }
    area = area_under_curve(curve)
    np.testing.assert_allclose(area.values, [[[6.0, 13.0]], [[3.0, 4.0]]])  # 0 + 2 + 4, 1 + 4 + 8; 1 + 2, 2 + 2
    np.testing.assert_allclose(area.run_scores(), [[9.5], [3.5]])
    mean = game_means(area)["Breakout"]
    assert mean.point == pytest.approx(6.5)
    assert mean.high == pytest.approx(6.5 + 12.7062 * 3, abs=1e-3)  # standard error: 6 / sqrt(2) / sqrt(2)


def test_unequal_numbers_of_episodes_count_by_their_means():
    """Means 2 and 10, then 6 and 30: areas 4 and 20, whatever was played more often."""
    curve = {
        0: runs([[[1.0, 3.0]], [[10.0, np.nan]]]),
        10: runs([[[6.0, 6.0]], [[20.0, 40.0]]]),
    }
    area = area_under_curve(curve)
    np.testing.assert_allclose(area.values, [[[4.0]], [[20.0]]])
    one_seed = area_under_curve({step: runs(each.values[1:]) for step, each in curve.items()})
    mean = game_means(one_seed)["Breakout"]
    assert (mean.point, mean.unit) == (20.0, "episodes") and np.isnan(mean.low)


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(-1e6, 1e6)), min_size=2, max_size=8, unique_by=lambda p: p[0])
)
def test_the_area_lies_within_the_curve_and_joining_two_halves_changes_nothing(points):
    points = sorted(points)
    curve = {step: runs([[[value]]]) for step, value in points}
    area = area_under_curve(curve).values.item()
    values = [value for _, value in points]
    assert min(values) - 1e-3 <= area <= max(values) + 1e-3
    (x0, y0), (x1, y1) = points[:2]
    if (x0 + x1) % 2 == 0 and x1 - x0 > 1:  # a point on the line between two others
        refined = area_under_curve(curve | {(x0 + x1) // 2: runs([[[(y0 + y1) / 2]]])}).values.item()
        assert refined == pytest.approx(area, abs=1e-3)


def test_curves_of_one_step_or_of_other_games_are_refused():
    one, other = runs([[[1.0]]]), runs([[[1.0]]], games=("Pong",))
    for curve in ({5: one}, {5: one, 6: other}):
        with pytest.raises(ValueError, match=r"the same seeds and games at two steps or more, got \{5: "):
            area_under_curve(curve)
