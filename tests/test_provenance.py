"""The state of the code that a launch records."""

from __future__ import annotations

import subprocess

from torchrl_sql import provenance
from torchrl_sql.provenance import git_state


def test_diff_brings_back_new_and_changed_files(tmp_path, monkeypatch):
    def git(*arguments):
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *own, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout

    package = tmp_path / "torchrl_sql"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert git_state() == (git("rev-parse", "HEAD").strip(), [], "")
    (package / "__init__.py").write_text("a = 2\n")
    (package / "a b.py").write_text("b = 3\n")
    (tmp_path / "notes").write_text("not part of what runs\n")
    state = git_state()
    assert state.untracked == ["notes", "torchrl_sql/a b.py"]
    git("stash", "--include-untracked")
    (tmp_path / "x.diff").write_text(state.diff)
    git("apply", "x.diff")
    assert (package / "__init__.py").read_text() == "a = 2\n"
    assert (package / "a b.py").read_text() == "b = 3\n"
    assert not (tmp_path / "notes").exists()
