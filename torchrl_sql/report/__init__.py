"""Reports: one self-contained HTML page, with every plot as PNG and SVG and every table as CSV beside it.

The composition layer fills a :class:`ReportData`; :func:`write_report` computes every statistic from its episodes.
"""

from torchrl_sql.report.html import format_score_table, write_report
from torchrl_sql.report.model import Agent, Clip, Curve, GameData, ReportData, Returns

__all__ = [
    "Agent",
    "Clip",
    "Curve",
    "GameData",
    "ReportData",
    "Returns",
    "format_score_table",
    "write_report",
]
