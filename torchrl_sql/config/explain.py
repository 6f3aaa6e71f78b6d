"""What settings mean and where their values are, for ``torchrl-sql config``: read from the schema and ``configs/``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from torchrl_sql.config import schema
from torchrl_sql.config.load import configs_dir, did_you_mean
from torchrl_sql.config.schema import METHOD_SETTINGS, MODEL_SETTINGS, ConfigError, RunConfig


class Setting(NamedTuple):
    """One key of a run's configuration."""

    key: str
    kind: str
    """Its type as the schema has it."""
    bound: str
    """What its value must be; empty if any of its type will do."""
    meaning: str


def settings() -> list[Setting]:
    """Every setting of a run, those of all methods included."""
    return list(_settings(RunConfig, ""))


def _settings(section: type, prefix: str) -> Iterator[Setting]:
    meanings = _attribute_docstrings()
    for each in fields(section):
        kind = getattr(schema, str(each.type).removesuffix(" | None"), None)
        if is_dataclass(kind):
            kinds = {"method": METHOD_SETTINGS.values(), "model": MODEL_SETTINGS.values()}.get(each.name, ())
            for section_of in dict.fromkeys([kind, *kinds]):
                assert isinstance(section_of, type)
                yield from _settings(section_of, f"{prefix}{each.name}.")
            continue
        bound = each.metadata["bound"].text if "bound" in each.metadata else ""
        owner = next(c for c in section.__mro__ if each.name in inspect.get_annotations(c))
        yield Setting(prefix + each.name, str(each.type), bound, meanings.get((owner.__name__, each.name), ""))


def _attribute_docstrings() -> dict[tuple[str, str], str]:
    """The strings below fields of the schema, ``{(class, field): text}``."""
    texts = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for line, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                    text = ast.literal_eval(below.value)
                    texts[node.name, ast.unparse(line.target)] = " ".join(text.replace("``", "").split())
    return texts


def values_of(key: str) -> Iterator[tuple[Path, str]]:
    """The files of ``configs/`` that set a key of a run, and the line of each with its source."""
    section, _, _ = key.partition(".")
    for file in sorted(configs_dir().rglob("*.yaml")):
        group = file.parent.relative_to(configs_dir()).as_posix()
        if group in ("study", "cluster"):
            continue
        prefix = "" if group in (".", "scale", "online") else f"{group}."
        text = file.read_text(encoding="utf-8")
        if prefix in ("", f"{section}."):
            for found, line in _lines(yaml.compose(text), prefix):
                if found == key:
                    yield file.relative_to(configs_dir()), text.splitlines()[line].strip()


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield f"{prefix}{key.value}", key.start_mark.line
        yield from _lines(value, f"{prefix}{key.value}.")


def explain(key: str) -> str:
    """A setting, or all settings of a section: type, bound, meaning, values with their sources.

    Raises:
        ConfigError: if there is none of this name.
    """
    known = settings()
    chosen = [setting for setting in known if setting.key == key or setting.key.startswith(f"{key}.")]
    if not chosen:
        names = [setting.key for setting in known]
        raise ConfigError(f"there is no setting or section {key!r}{did_you_mean(key, names)}")
    return "\n\n".join(map(_paragraph, dict.fromkeys(chosen)))


def _paragraph(setting: Setting) -> str:
    must = f", {setting.bound}" if setting.bound else ""
    lines = [f"{setting.key}  ({setting.kind}{must})", *([f"  {setting.meaning}"] if setting.meaning else [])]
    return "\n".join([*lines, *(f"  {file}: {line}" for file, line in values_of(setting.key))])


def overview() -> str:
    """The groups of ``configs/`` with their choices."""
    lines = []
    for folder in sorted(path for path in configs_dir().iterdir() if path.is_dir()):
        names = ", ".join(path.stem for path in sorted(folder.glob("*.yaml")))
        lines.append(f"  {folder.name + '=':<12} {names}")
    return "\n".join(lines)
