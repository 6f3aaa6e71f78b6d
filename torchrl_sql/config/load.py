"""From words on a command line, or a file, to a checked configuration: Hydra in, YAML out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from torchrl_sql.config.schema import (
    CONFIG_FORMAT,
    METHOD_SETTINGS,
    MODEL_SETTINGS,
    ConfigError,
    MethodConfig,
    RunConfig,
)


def configs_dir() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_choices(group: str) -> list[str]:
    """Names usable as ``group=NAME``."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


def compose_run_config(overrides: Sequence[str]) -> RunConfig:
    """Composes and checks a run's configuration.

    Args:
        overrides (sequence of str): choices and values, e.g. ``["scale=cpu", "method=bc", "seed=1"]``. They beat what
            the files hold, also those of a scale.

    Raises:
        ConfigError: for unknown choices and keys, values of a wrong type and combinations that cannot run.
    """
    words = [_split(word) for word in overrides]
    groups = {"scale": list_choices("scale")}
    groups |= {each.name: choices for each in fields(RunConfig) if (choices := list_choices(each.name))}
    for key, text in words:
        if key in groups and text not in groups[key]:
            raise ConfigError(
                f"{key} must be one of {', '.join(groups[key])}, got {text!r}{did_you_mean(text, groups[key])}"
            )
    if "scale" not in dict(words):
        raise ConfigError(f"scale must be given: scale=NAME with one of {', '.join(groups['scale'])}")
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for name, settings in {"method": MethodConfig, **METHOD_SETTINGS}.items():
        store.store(group="method", name=f"{name}_schema", node=settings)
    for name, model in MODEL_SETTINGS.items():
        store.store(group="model", name=f"{name}_schema", node=model)
    try:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            config = compose("run", overrides=[f"{key}={text}" for key, text in words if key in groups])
        for key, text in words:
            if key not in groups:
                _set(config, key, text, groups)
        return _checked(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from None


def _split(word: str) -> tuple[str, str]:
    """``key=value`` as its two parts."""
    key, equals, text = word.partition("=")
    if not equals or re.fullmatch(r"[+~]*[A-Za-z_][\w.]*", key) is None:
        raise ConfigError(f"settings must be key=value, got {word!r}")
    return key, text


def _set(config: DictConfig, key: str, text: str, groups: Iterable[str]) -> None:
    """Sets a value; text that is meant as text stays as it was written."""
    known = dict(_leaves(config))
    plain = key.lstrip("+~")  # Hydra's ways to add and to delete keys
    if plain not in known:
        raise ConfigError(f"there is no setting {key!r} here{did_you_mean(plain, [*known, *groups])}")
    if plain != key:
        raise ConfigError(f"settings must be key=value, every one has a value already: {plain}={text}, got {key!r}")
    value: Any = text
    if not isinstance(known[key], StringNode) or text[:1] in ("'", '"'):
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={text}")
        except HydraException as error:
            raise ConfigError(f"{key} cannot be read, got {text!r}: {_first_line(error)}") from None
        if parsed.is_sweep_override():
            raise ConfigError(f"{key} must be one value, got {text!r}; a list is written {key}=[A,B]")
        value = parsed.value()
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        if isinstance(known[key], ListConfig):
            raise ConfigError(f"{key} must be a list, written {key}=[A,B], got {text!r}") from None
        raise ConfigError(f"{key}: {_first_line(error)}") from None


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and nodes of all values, not of sections."""
    for name in map(str, config):
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_missing():
            yield from _leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint at names like this one, or in another section; empty if there are none."""
    same = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = same or difflib.get_close_matches(word, known)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def load_run_config(path: Path) -> RunConfig:
    """Reads the YAML that :meth:`RunConfig.to_yaml` wrote.

    Raises:
        ConfigError: if the file is not such a configuration.
        OSError: if it cannot be read.
    """
    return run_config_from_yaml(path.read_text(encoding="utf-8"), source=str(path))


def run_config_from_yaml(text: str, *, source: str) -> RunConfig:
    """As :func:`load_run_config`, from the text itself; ``source`` names it in errors."""
    try:
        content = yaml.safe_load(text)
        written = content.pop("format", 1) if isinstance(content, dict) else None
        if isinstance(written, int) and "name" in content and written != CONFIG_FORMAT:
            age = "an earlier" if written < CONFIG_FORMAT else "a later"
            raise ConfigError(
                f"{source} was written by {age} version of torchrl_sql (format {written}, this version reads "
                f"{CONFIG_FORMAT}); train it again or use that version"
            )
        base = OmegaConf.structured(RunConfig)
        method = METHOD_SETTINGS.get(content["method"]["name"], MethodConfig)
        base.method, base.model = OmegaConf.structured(method), OmegaConf.structured(method.model)
        return _checked(OmegaConf.merge(base, content))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{source} must hold a run's configuration: {_first_line(error)}") from None


def _checked(config: Any) -> RunConfig:
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} must be given, e.g. {key}=...")
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    return run_config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
