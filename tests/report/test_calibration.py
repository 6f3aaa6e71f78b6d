"""Predicted values against what followed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import calibration_point
from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.context_tables import calibration_table
from torchrl_sql.statistics.calibration import calibrate


def point(predicted, realised, *, game="Pong", episode=0, step=0, cut=False, seed=0):
    return calibration_point(
        game=game, seed=seed, episode_seed=episode, agent_step=step, predicted_value=predicted,
        discounted_return=realised, truncated=cut,
    )  # fmt: skip


def calibrated(points):
    return calibrate(
        np.array([p.predicted_value for p in points]),
        np.array([p.discounted_return for p in points]),
        seeds=[p.seed for p in points],
        episodes=[p.episode_seed for p in points],
        cut=[p.truncated for p in points],
    )


# Numbers computed by hand


def test_calibration_by_hand():
    points = [point(3, 1), point(2, 2, step=50), point(1, 0, episode=1), point(9, 0, episode=2, cut=True)]
    found = calibrated(points)
    assert (found.num_episodes, found.num_cut) == (2, 1)
    assert found.bias.point == pytest.approx((2 + 0 + 1) / 3)
    assert found.root_mean_square_error == pytest.approx(math.sqrt(5 / 3))
    assert found.correlation == pytest.approx(np.corrcoef([3, 2, 1], [1, 2, 0])[0, 1])
    # The mean of either episode is 1: nothing is known of the spread.
    assert math.isnan(found.bias.low) and found.bias.unit == "episodes"


def test_the_unit_of_the_bias_is_the_episode_and_with_several_seeds_the_seed():
    """Two units of many equal errors, 0 and 1: 0.5 +- 12.706 * 0.5, whatever the number of states."""
    for unit in ("episode", "seed"):
        bias = calibrated([point(e, 0, **{unit: e}, step=t) for e in (0, 1) for t in range(100)]).bias
        assert bias[:3] == pytest.approx((0.5, 0.5 - 6.3531, 0.5 + 6.3531), abs=1e-4) and bias.unit == f"{unit}s"


def test_bins_by_hand():
    points = [point(float(k), float(k % 2), step=k) for k in range(20)]
    predicted, realised = calibrated(points).bins()
    np.testing.assert_array_equal(predicted, np.arange(10) * 2 + 0.5)
    np.testing.assert_array_equal(realised, np.full(10, 0.5))
    assert len(calibrated(points[:3]).bins()[0]) == 3


# Contracts


def test_episodes_of_two_seeds_are_two_episodes():
    assert calibrated([point(1, 1, seed=0), point(1, 1, seed=1)]).num_episodes == 2


def test_episodes_that_were_cut_are_counted_and_left_out():
    found = calibrated([point(1, 1, cut=True)])
    assert (found.num_cut, found.num_episodes, len(found.predicted)) == (1, 0, 0)
    assert all(math.isnan(x) for x in (*found.bias[:3], found.root_mean_square_error))
    assert math.isnan(calibrated([point(1, 1)]).correlation)  # a single state


def test_table_and_notes_of_a_report(paper_scale_report):
    analysis = Analysis(paper_scale_report)
    table = calibration_table(analysis)
    assert [row[1].text for row in table.rows] == list(paper_scale_report.games[:-1]) * 3
    freeway = next(row for row in table.rows if row[1].text == "Freeway")
    assert [cell.text for cell in freeway[:5]] == ["Scaled QL 79M", "Freeway", "48", "4", "2"]
    found = caveats(analysis)
    sizes = "Scaled QL 79M, Scaled QL 60M, Scaled QL 31M"
    assert f"{sizes}: no predicted values were recorded in Zaxxon." in found
    assert any(note.startswith(f"{sizes}: value calibration leaves out 2 of 234 episodes") for note in found)


def test_values_of_another_checkpoint_do_not_count(paper_scale_report):
    points = [dataclasses.replace(p, gradient_step=7) for p in paper_scale_report.calibration]
    assert Analysis(dataclasses.replace(paper_scale_report, calibration=points)).calibration == {}


# Properties


def test_episodes_that_were_all_cut_have_no_bins():
    assert [len(means) for means in calibrated([point(1.0, 2.0, cut=True)]).bins()] == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=20))
def test_the_bias_is_the_mean_error_within_its_interval(rows):
    found = calibrated([point(p, r, episode=e, step=t) for t, (e, p, r) in enumerate(rows)])
    assert found.bias.point == pytest.approx(np.mean([p - r for _, p, r in rows]), abs=1e-9)
    assert math.isnan(found.bias.low) or found.bias.low <= found.bias.point <= found.bias.high
    predicted, realised = found.bins()
    assert np.all(np.diff(predicted) >= -1e-12) and len(predicted) == len(realised)
