"""The import table of CONTRIBUTING.md: every package imports only what stands below it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import torchrl_sql

PACKAGE = Path(torchrl_sql.__file__).parent
LEAVES = {"games", "files", "provenance", "arguments", "errors"}
MAY_IMPORT: dict[str, set[str]] = {
    "games": set(),
    "files": set(),
    "provenance": set(),
    "arguments": set(),
    "errors": set(),
    "config": LEAVES,
    "data": LEAVES,
    "modules": LEAVES,
    "objectives": LEAVES,
    "envs": LEAVES,
    "statistics": LEAVES,
    "methods": LEAVES | {"config", "data", "modules", "objectives"},
    "collection": LEAVES | {"config", "data", "envs"},
    "studies": LEAVES | {"config"},
    "training": LEAVES | {"methods", "config", "data", "envs"},
    "evaluation": LEAVES | {"training", "methods", "modules", "config", "envs", "statistics"},
    "bench": LEAVES | {"training", "methods", "config", "data"},
    "report": LEAVES | {"evaluation", "statistics", "methods", "training", "data", "config"},
    "launch": LEAVES | {"studies", "config"},
}
ENTRANCES = {"cli", "__init__", "__main__"}
"""They may import everything."""


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages() -> set[str]:
    """Names of the package's folders and top-level modules."""
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    return folders | {path.stem for path in PACKAGE.glob("*.py")}


def files_of(package: str) -> list[Path]:
    module = PACKAGE / f"{package}.py"
    return [module] if module.is_file() else sorted((PACKAGE / package).rglob("*.py"))


def forbidden(file: Path, package: str) -> list[str]:
    """What a file imports of ours that its package may not."""
    own = {name.removeprefix("torchrl_sql.") for name in imported_modules(file) if name.startswith("torchrl_sql.")}
    allowed = MAY_IMPORT[package] | {package}
    return sorted(name for name in own if not any(name == a or name.startswith(f"{a}.") for a in allowed))


def test_the_rule_sees_imports(tmp_path):
    file = tmp_path / "m.py"
    file.write_text("import os\ndef f():\n    from torchrl_sql import games\n    from torchrl_sql.data import Subset\n")
    assert imported_modules(file) == {"os", "torchrl_sql.games", "torchrl_sql.data.Subset"}
    assert forbidden(file, "envs") == ["data.Subset"] and forbidden(file, "methods") == []


@pytest.mark.parametrize("package", sorted(packages() - ENTRANCES))
def test_a_package_imports_only_what_stands_below_it(package):
    assert package in MAY_IMPORT, f"{package} needs a row in the import table"
    for file in files_of(package):
        assert not (bad := forbidden(file, package)), f"{file.relative_to(PACKAGE)} imports {bad}"


def test_the_table_has_no_circle():
    remaining = {package: {name.split(".")[0] for name in names} for package, names in MAY_IMPORT.items()}
    while remaining:
        free = {package for package, names in remaining.items() if not names & set(remaining)}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {package: names for package, names in remaining.items() if package not in free}


def test_contributing_shows_the_table():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| (.+?) \| (.+?) \|$", page, re.M)
    shown = {name: row[1] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(shown) == set(MAY_IMPORT) | {"cli"}
    for package, names in MAY_IMPORT.items():
        assert set(re.findall(r"`(\w+)`", shown[package])) == names - LEAVES, package
