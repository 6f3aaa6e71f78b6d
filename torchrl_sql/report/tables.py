"""All tables of a report."""

from __future__ import annotations

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.context_tables import (
    calibration_table,
    curve_table,
    data_table,
    protocol_table,
    settings_tables,
)
from torchrl_sql.report.probes import probe_table
from torchrl_sql.report.score_tables import (
    aggregate_table,
    area_table,
    comparison_table,
    published_table,
    score_table,
    seed_table,
)
from torchrl_sql.report.table import Table


def all_tables(analysis: Analysis) -> dict[str, Table]:
    """Those that have something to show, by their names."""
    tables = [
        score_table(analysis),
        aggregate_table(analysis, "human"),
        aggregate_table(analysis, "dqn"),
        comparison_table(analysis),
        seed_table(analysis),
        curve_table(analysis, analysis.lines, name="scores_along_axis", axis=analysis.data.x or ""),
        curve_table(analysis, analysis.learning_curves, name="learning_curves", axis=analysis.learning.axis),
        area_table(analysis),
        calibration_table(analysis),
        published_table(analysis),
        *([] if analysis.data.probes is None else [probe_table(analysis.data.probes)]),
        data_table(analysis),
        protocol_table(analysis),
        *settings_tables(analysis),
    ]
    return {table.name: table for table in tables if table.records}
