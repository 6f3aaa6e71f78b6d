"""Reports: one self-contained HTML page, with every plot as PNG and SVG and every table as CSV and LaTeX beside it.

The composition layer fills a :class:`ReportData`; its :class:`Analysis` computes every statistic from the episodes,
once for page, terminal and JSON.
"""

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.html import write_report
from torchrl_sql.report.model import Agent, Clip, Curve, GameData, ReportData, Returns
from torchrl_sql.report.terminal import summary_data, summary_text

__all__ = [
    "Agent",
    "Analysis",
    "Clip",
    "Curve",
    "GameData",
    "ReportData",
    "Returns",
    "summary_data",
    "summary_text",
    "write_report",
]
