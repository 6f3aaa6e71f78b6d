"""CSV tables of dataclass rows: appended as results come, read back bit for bit, parts of parallel writers merged.

A table ``scores.csv`` may have parts beside it, ``scores.part-2-of-8.csv``, one per writer. Readers see the union:
sorted, each row once.
"""

from __future__ import annotations

import csv
import fcntl
import io
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

_logger = logging.getLogger(__name__)

Row = TypeVar("Row")


def part_of(table: Path, part: int, num_parts: int) -> Path:
    """The file that writer ``part`` (from 0) of ``num_parts`` appends to; a lone writer appends to the table itself."""
    if num_parts == 1:
        return table
    return table.with_name(f"{table.stem}.part-{part + 1}-of-{num_parts}{table.suffix}")


def files_of(table: Path) -> list[Path]:
    """The table's file and its parts, as far as they exist."""
    return [path for path in (table, *sorted(table.parent.glob(f"{table.stem}.part-*{table.suffix}"))) if path.exists()]


def read_table(table: Path, kind: type[Row], key: Callable[[Row], Any]) -> list[Row]:
    """Reads a table with its parts; a half-written last line is left out, with a warning.

    Args:
        table (Path): e.g. ``runs/NAME/scores.csv``; it or its parts must exist.
        kind (type): dataclass of a row, with fields of type int, float, bool and str.
        key (callable): what must be unique, and sorts the rows.

    Raises:
        FileNotFoundError: if neither the table nor a part of it exists.
        ValueError: if a file's header is not exactly the dataclass's fields, a row has a missing, malformed or
            out-of-range value (the message names file, line and column), or two rows of one key differ.
    """
    files = files_of(table)
    if not files:
        raise FileNotFoundError(f"{table} must be a table of evaluation, found neither it nor parts of it")
    rows: dict[Any, tuple[Row, Path]] = {}
    for file in files:
        for row in _read_file(file, kind):
            other, where = rows.setdefault(key(row), (row, file))
            if other != row:
                raise ValueError(f"{file} and {where} hold different results of one thing: {row} and {other}")
    return [rows[k][0] for k in sorted(rows)]


class TableWriter(Generic[Row]):
    """Appends rows to one file, each batch of rows with one write.

    A last line that a killed writer left unfinished is dropped, with a warning: its result is not in the table.

    Args:
        path (Path): created with its folder if absent.
        kind (type): dataclass of a row.

    Raises:
        BlockingIOError: if another process is writing to it.
        ValueError: if the file has another header.
    """

    def __init__(self, path: Path, kind: type[Row]):
        self._columns = columns(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{path} is being written by another evaluation") from error
            self._file.seek(0)
            lines = _finished_lines(path, self._file.read())
            self._file.truncate(len(lines.encode()))
            if lines:
                _read_header(path, csv.reader(io.StringIO(lines, newline="")), self._columns)
            else:
                self._write([self._columns])
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows; they are on the disk when this returns."""
        self._write([[_to_text(getattr(row, name)) for name in self._columns] for row in rows])

    def _write(self, lines: Iterable[Iterable[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        data = text.getvalue().encode()
        while data:  # one write, unless the system takes less at once
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets other processes write."""
        self._file.close()

    def __enter__(self) -> TableWriter[Row]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def columns(kind: type) -> tuple[str, ...]:
    """The header of a table of such rows."""
    return tuple(field.name for field in fields(kind))


def _read_file(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of one file; an empty one has none, its writer being about to write the header."""
    lines = _finished_lines(path, path.read_bytes())
    if not lines:
        return []
    reader = csv.reader(io.StringIO(lines, newline=""))
    names = columns(kind)
    _read_header(path, reader, names)
    rows = []
    for values in reader:
        where = f"{path}, line {reader.line_num}"
        if len(values) != len(names):
            raise ValueError(f"{where}: expected {len(names)} values, got {len(values)}")
        converted = {name: _from_text(kind, name, value, where) for name, value in zip(names, values, strict=True)}
        try:
            rows.append(kind(**converted))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return rows


def _finished_lines(path: Path, content: bytes) -> str:
    """Without a last line that its writer has not finished: it is at work, or was killed."""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        _logger.warning("%s ends in a half-written line, which is left out: %r", path, content[len(whole) :])
    try:
        return whole.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a CSV table in UTF-8, got other bytes: {error}") from error


def _read_header(path: Path, reader: Any, expected: tuple[str, ...]) -> None:
    header: list[str] = next(reader, [])
    if tuple(header) != expected:
        raise ValueError(f"{path}: header must be {','.join(expected)}, got {','.join(header) or 'an empty line'}")


def _to_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_text(kind: type, name: str, text: str, where: str) -> Any:
    annotation = kind.__annotations__[name]
    try:
        if annotation == "bool":
            return {"true": True, "false": False}[text]
        return {"int": int, "float": float}.get(annotation, str)(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {name} must be {annotation}, got {text!r}") from error
