from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from torchrl_sql.data import run
from torchrl_sql.data.run import write_atomically


def test_the_new_text_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "note.json"
    for text in ("old, and longer", "new"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    replace = os.replace

    def replace_after_another_writer(source: Path, target: Path) -> None:
        monkeypatch.setattr(run.os, "replace", replace)
        write_atomically(path, "the other's")
        replace(source, target)

    monkeypatch.setattr(run.os, "replace", replace_after_another_writer)
    write_atomically(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_text_alone(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    write_atomically(path, "old")

    def failing(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(run.os, "fsync", failing)
    with pytest.raises(OSError, match="no room"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
