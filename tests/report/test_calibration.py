"""Predicted values against what followed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.evaluation.episodes import CalibrationPoint
from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.context_tables import calibration_table
from torchrl_sql.report.findings import notes
from torchrl_sql.statistics.calibration import calibrate


def point(predicted, realised, *, game="Pong", episode=0, step=0, cut=False, seed=0):
    return CalibrationPoint(
        agent="ours", gradient_step=100, seed=seed, game=game, episode_seed=episode, agent_step=step,
        predicted_value=predicted, discounted_return=realised, truncated=cut,
    )  # fmt: skip


def calibrated(points, games=("Pong",)):
    return calibrate(points, games, num_resamples=2000, seed=0)


# Numbers computed by hand


def test_calibration_by_hand():
    points = [point(3, 1), point(2, 2, step=50), point(1, 0, episode=1), point(9, 0, episode=2, cut=True)]
    found = calibrated(points)["Pong"]
    assert (found.num_episodes, found.num_cut) == (2, 1)
    assert found.bias.point == pytest.approx((2 + 0 + 1) / 3)
    assert found.root_mean_square_error == pytest.approx(math.sqrt(5 / 3))
    assert found.correlation == pytest.approx(np.corrcoef([3, 2, 1], [1, 2, 0])[0, 1])
    # Resamples of two episodes with error sums 2 and 1 over 2 and 1 states: 2/2, 3/3 and 2/2. Every mean is 1.
    assert (found.bias.low, found.bias.high) == (1, 1)


def test_bias_resamples_episodes_and_not_states():
    """Two episodes of many equal errors 0 and 1: their means can be 0, 1/2, 1, whatever the number of states."""
    points = [point(e, 0, episode=e, step=t) for e in (0, 1) for t in range(100)]
    bias = calibrated(points)["Pong"].bias
    assert bias == (0.5, 0, 1)


def test_bins_by_hand():
    points = [point(float(k), float(k % 2), step=k) for k in range(20)]
    predicted, realised = calibrated(points)["Pong"].bins()
    np.testing.assert_array_equal(predicted, np.arange(10) * 2 + 0.5)
    np.testing.assert_array_equal(realised, np.full(10, 0.5))
    assert len(calibrated(points[:3])["Pong"].bins()[0]) == 3


# Contracts


def test_episodes_of_two_seeds_are_two_episodes():
    assert calibrated([point(1, 1, seed=0), point(1, 1, seed=1)])["Pong"].num_episodes == 2


def test_games_without_points_are_left_out_and_cut_games_kept():
    found = calibrated([point(1, 1, cut=True), point(1, 1, game="Zaxxon")], ("Zaxxon", "Pong", "Boxing"))
    assert list(found) == ["Zaxxon", "Pong"]
    assert (found["Pong"].num_cut, found["Pong"].num_episodes, len(found["Pong"].predicted)) == (1, 0, 0)
    assert all(math.isnan(x) for x in (*found["Pong"].bias, found["Pong"].root_mean_square_error))
    assert math.isnan(found["Zaxxon"].correlation)  # a single state


def test_table_and_notes_of_a_report(paper_scale_report):
    analysis = Analysis(paper_scale_report)
    table = calibration_table(analysis)
    assert [row[0].text for row in table.rows] == list(paper_scale_report.games[:-1])  # the largest agent, 39 games
    freeway = next(row for row in table.rows if row[0].text == "Freeway")
    assert freeway[2] == ("4", ("2 cut, left out",), False)
    assert len(table.records) == 3 * 39
    found = notes(analysis)
    sizes = "Scaled QL 79M, Scaled QL 60M, Scaled QL 31M"
    assert f"{sizes}: no predicted values were recorded in Zaxxon." in found
    assert any(note.startswith(f"{sizes}: value calibration leaves out 2 of 234 episodes") for note in found)


def test_values_of_another_checkpoint_do_not_count(paper_scale_report):
    points = [dataclasses.replace(p, gradient_step=7) for p in paper_scale_report.calibration]
    assert Analysis(dataclasses.replace(paper_scale_report, calibration=points)).calibration == {}


# Properties


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=20))
def test_interval_is_ordered_and_within_the_errors(rows):
    found = calibrated([point(p, r, episode=e, step=t) for t, (e, p, r) in enumerate(rows)])["Pong"]
    errors = [p - r for _, p, r in rows]
    assert min(errors) - 1e-9 <= found.bias.low <= found.bias.high <= max(errors) + 1e-9
    assert found.bias.point == pytest.approx(np.mean(errors), abs=1e-9)
    predicted, realised = found.bins()
    assert np.all(np.diff(predicted) >= -1e-12) and len(predicted) == len(realised)
