"""The dependency rule: data, modules, objectives and envs meet only through TensorDict keys."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchrl_sql

PACKAGE = Path(torchrl_sql.__file__).parent
COMPONENTS = ("data", "modules", "objectives", "envs")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_rule_sees_imports(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("import os\ndef f():\n    from torchrl_sql import games\n")
    assert imported_modules(file) == {"os", "torchrl_sql", "torchrl_sql.games"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_import_only_themselves_and_games(component):
    files = sorted((PACKAGE / component).rglob("*.py"))
    assert files
    for file in files:
        own = {name for name in imported_modules(file) if name.startswith("torchrl_sql.")}
        bad = {name for name in own if name.split(".")[1] not in (component, "games")}
        assert not bad, f"{file.relative_to(PACKAGE)} imports {sorted(bad)}"


@pytest.mark.parametrize("leaf", ["games.py", "config.py"])
def test_leaves_import_nothing_but_games(leaf):
    own = {name for name in imported_modules(PACKAGE / leaf) if name.startswith("torchrl_sql.")}
    assert all(name.startswith("torchrl_sql.games") for name in own)
