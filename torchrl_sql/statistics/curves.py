"""Learning curves as one score per run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from torchrl_sql.statistics.scores import RunReturns


def area_under_curve(curve: Mapping[int, RunReturns]) -> RunReturns:
    """The area under each run's learning curve over its span of steps: the mean return by the trapezoidal rule.

    The result is treated as any other returns are: normalised, aggregated, compared, with the seed as the unit. Where
    all runs have equally many episodes at all steps, its episode ``e`` is the area under those of number ``e``.
    Otherwise each run has one entry, its area, so that nothing is known of the spread of one seed.

    Args:
        curve (mapping): gradient step -> one agent's returns there, at two steps or more.

    Raises:
        ValueError: if there are fewer steps, or seeds or games differ between them.
    """
    steps = sorted(curve)
    runs = [curve[step] for step in steps]
    if len(runs) < 2 or any((each.seeds, each.games) != (runs[0].seeds, runs[0].games) for each in runs):
        have = {step: (each.seeds, each.games) for step, each in curve.items()}
        raise ValueError(f"a curve must have the same seeds and games at two steps or more, got {have}")
    widths = np.diff(np.array(steps, dtype=np.float64)) / (steps[-1] - steps[0])
    weights = (np.append(widths, 0.0) + np.insert(widths, 0, 0.0)) / 2
    count = runs[0].counts.flat[0]
    if all((each.counts == count).all() for each in runs):
        values = np.tensordot(weights, np.stack([each.values[..., :count] for each in runs]), 1)
    else:
        values = np.tensordot(weights, np.stack([each.run_scores() for each in runs]), 1)[..., None]
    return replace(runs[-1], values=values, counts=np.full(values.shape[:2], values.shape[-1]))
