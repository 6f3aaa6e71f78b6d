"""A table is made once, of records; the page, CSV, LaTeX, JSON and the terminal each show it in their own way."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from tabulate import tabulate

Record = Mapping[str, Any]

MAX_HEADING = 10
"""Characters of a heading in the terminal, where longer ones are broken."""


class Cell(NamedTuple):
    """A table cell: its text, a smaller addition, and whether it stands out."""

    text: str
    detail: str = ""
    strong: bool = False

    def __str__(self) -> str:
        return f"{self.text}{'*' * self.strong} {self.detail}".rstrip()


NOTHING = Cell("–")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Records, and how they are shown: ``header`` and ``rows``, the first cell of which heads it."""

    name: str
    caption: str
    records: Sequence[Record]
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @classmethod
    def wide(cls, name: str, caption: str, records: Sequence[Record], columns: Mapping[str, Callable[[Any], Any]]):
        """One row per record; ``columns``: heading -> its cell, or text."""
        rows = [[_cell(make(record)) for make in columns.values()] for record in records]
        return cls(name=name, caption=caption, records=records, header=[*columns], rows=rows)

    @classmethod
    def crossed(
        cls,
        name: str,
        caption: str,
        records: Sequence[Record],
        cell: Callable[[Any], Any],
        *,
        by: str | Callable[[Any], Any],
        across: str,
        heading: str,
        order: Sequence[str] = (),
        shown: Callable[[Any], Any] = lambda record: True,
    ):
        """One row per value of ``by`` (a field, or made of a record) and one column per value of ``across``, of records
        that are ``shown``; both as in ``order``, and then in that of the records.
        """
        row_of = itemgetter(by) if isinstance(by, str) else by
        cells = {(row_of(record), record[across]): _cell(cell(record)) for record in records if shown(record)}
        rank = {value: place for place, value in enumerate(order)}
        rows, columns = (
            sorted(dict.fromkeys(key[place] for key in cells), key=lambda value: rank.get(value, len(rank)))
            for place in (0, 1)
        )
        return cls(
            name=name, caption=caption, records=records, header=[heading, *columns],
            rows=[[Cell(str(row)), *(cells.get((row, column), NOTHING) for column in columns)] for row in rows],
        )  # fmt: skip

    def data(self) -> list[dict[str, Any]]:
        """The records, unknown values as None."""
        return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in self.records]

    def to_csv(self) -> str:
        """The records as CSV; unknown values are empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data())
        return file.getvalue()

    def to_latex(self) -> str:
        """What is shown as a ``tabular`` for the package booktabs, its caption as a comment."""
        body = tabulate(self._texts(), self.header, tablefmt="latex_booktabs", disable_numparse=True)
        return f"% {self.caption}\n{body}\n"

    def to_text(self, *, details: bool = True) -> str:
        """What is shown, for a terminal."""
        return tabulate(
            self._texts(details), self.header, tablefmt="simple", disable_numparse=True,
            colalign=["left", *["right"] * (len(self.header) - 1)], maxheadercolwidths=MAX_HEADING,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    def _texts(self, details: bool = True) -> list[list[str]]:
        return [[str(cell if details else cell._replace(detail="")) for cell in row] for row in self.rows]


def _cell(value: Any) -> Cell:
    """A cell of a cell, a text or a count; unknown is a dash."""
    if value is None or value == "":
        return NOTHING
    return value if isinstance(value, Cell) else Cell(f"{value:,}" if isinstance(value, int) else str(value))
