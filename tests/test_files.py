from __future__ import annotations

import errno
from pathlib import Path

import pytest

from torchrl_sql import files
from torchrl_sql.files import check_outside_stores, expand_path, write_text


def test_the_new_text_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "note.json"
    for text in ("old, and longer", "new"):
        write_text(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_gone_after_the_next_write(tmp_path):
    path = tmp_path / "note.json"
    (tmp_path / "note.json.tmp").write_text("half a")
    write_text(path, "whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_text_alone(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    write_text(path, "old")

    def failing(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match="no room"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_home_and_variables_in_paths_are_replaced_and_unknown_ones_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TMPDIR", "/scratch/7")
    paths = [str(expand_path(text)) for text in ("~/a", "$TMPDIR/a b", "${TMPDIR}x", "a~/$5=,#(1)", "/a")]
    assert paths == ["/home/me/a", "/scratch/7/a b", "/scratch/7x", "a~/$5=,#(1)", "/a"]
    with pytest.raises(ValueError, match=r"^\$NOT_SET/a: the environment variable \$NOT_SET is not set on "):
        expand_path("$NOT_SET/a")
    with pytest.raises(ValueError, match=r"^~nobody-here/a: there is no user 'nobody-here' on "):
        expand_path("~nobody-here/a")
    monkeypatch.setenv("TMPDIR", "~/data")
    assert str(expand_path("$TMPDIR/a")) == "~/data/a"  # as a shell would have it


def test_what_is_filled_lies_outside_of_stores(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").touch()
    check_outside_stores(tmp_path / "store", "run_dir")  # somebody else's file of that name
    (tmp_path / "store" / "recordings.txt").touch()
    (tmp_path / "store" / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "sub")
    check_outside_stores(tmp_path / "store" / ".." / "other", "run_dir")
    check_outside_stores(tmp_path / "other", "run_dir")
    monkeypatch.chdir(tmp_path / "store")
    for inside in (tmp_path / "store", tmp_path / "store" / "a" / "b", tmp_path / "link" / "a", Path("a"), Path()):
        with pytest.raises(ValueError, match=r"run_dir must be outside of stores, but .*/store is one, got "):
            check_outside_stores(inside, "run_dir")
