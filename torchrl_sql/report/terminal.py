"""A report without its page: for a terminal, and for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill
from typing import Any

from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.findings import findings
from torchrl_sql.report.tables import all_tables

WIDTH = 110
"""Where sentences are broken."""
MARKS = {"for": "+", "equal": "=", "against": "-", "open": "?", "note": "."}


def summary_text(analysis: Analysis) -> str:
    """The tables of scores, what limits them, and the findings."""
    tables = all_tables(analysis)

    def lines() -> Iterator[str]:
        for name in ("score_table", "seeds", "aggregate_human_normalised", "learning_areas"):
            if table := tables.get(name):
                yield fill(table.caption, WIDTH) + "\n"
                yield table.to_text(details=name != "score_table" or not analysis.many_games) + "\n"
        for text in caveats(analysis):
            yield fill(f"! {text}", WIDTH, subsequent_indent="  ")
        for kind, text in findings(analysis):
            yield fill(f"{MARKS[kind]} {text}", WIDTH, subsequent_indent="  ")

    return "\n".join(lines())


def summary_data(analysis: Analysis) -> dict[str, Any]:
    """All tables, caveats and findings as JSON values: ``title``, ``made``, ``games``, ``agents`` (labels, the main one
    first), ``caveats``, ``findings`` (``kind``, ``text``) and ``tables`` (name -> records; unknown values are null).
    """
    labels = [agent.label for agent in analysis.agents]
    return {
        "title": analysis.data.title,
        "made": dict(analysis.data.made),
        "games": list(analysis.data.games),
        "agents": sorted(labels, key=lambda label: label != analysis.main.label),
        "caveats": caveats(analysis),
        "findings": [finding._asdict() for finding in findings(analysis)],
        "tables": {name: table.data() for name, table in all_tables(analysis).items()},
    }
