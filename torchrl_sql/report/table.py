"""A table as plain data, which the page, a CSV file and the terminal show in their own ways."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import NamedTuple

MAX_TEXT_WIDTH = 110
"""Of a table in the terminal whose headers stay on one line."""

Record = Mapping[str, str | int | float | None]


class Cell(NamedTuple):
    """A table cell: its text, smaller lines below it, and whether it stands out."""

    text: str
    detail: tuple[str, ...] = ()
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as shown (``header``, ``rows``; the first cell of a row heads it) and as data (``records``, for CSV)."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    records: Sequence[Record]

    def to_csv(self) -> str:
        """The records as CSV text; unknown values are empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()})
        return file.getvalue()


def to_text(table: Table, *, details: bool = True) -> str:
    """A table for the terminal: columns aligned, details on lines below their cell; headers of wide ones are broken."""
    rows = [
        [[cell.text + ("*" if cell.strong else ""), *(cell.detail if details else ())] for cell in row]
        for row in table.rows
    ]
    bodies = [
        max((len(line) for row in rows for line in row[column]), default=0) for column in range(len(table.header))
    ]
    header = [[name] for name in table.header]
    if sum(max(len(name), width) + 2 for name, width in zip(table.header, bodies, strict=True)) > MAX_TEXT_WIDTH:
        header = [wrap(name, max(width, 8)) for name, width in zip(table.header, bodies, strict=True)]
    deepest = max(len(lines) for lines in header)
    header = [[""] * (deepest - len(lines)) + lines for lines in header]
    widths = [max(body, *(len(line) for line in lines)) for body, lines in zip(bodies, header, strict=True)]
    lines = []
    for number, row in enumerate([header, *rows]):
        for level in range(max(len(cell) for cell in row)):
            texts = [cell[level] if level < len(cell) else "" for cell in row]
            first, *rest = (
                f"{t:{'<' if i == 0 else '>'}{w}}" for i, (t, w) in enumerate(zip(texts, widths, strict=True))
            )
            lines.append("  ".join([first, *rest]).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
