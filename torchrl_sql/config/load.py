"""From words on a command line, or a file, to a checked configuration: Hydra in, YAML out."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import AnyNode, BooleanNode, DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

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
    try:
        config = deepcopy(_compose(*(f"{key}={text}" for key, text in words if key in groups)))
        for key, text in words:
            if key not in groups:
                _set(config, key, text, groups)
        return _checked(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from None


@cache
def _compose(*choices: str) -> DictConfig:
    """The files of these choices as one; it takes a while, and studies ask for the same ones often."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for name, settings in {"method": MethodConfig, **METHOD_SETTINGS}.items():
        store.store(group="method", name=f"{name}_schema", node=settings)
    for name, model in MODEL_SETTINGS.items():
        store.store(group="model", name=f"{name}_schema", node=model)
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return compose("run", overrides=[*choices])


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
    node, value = known[key], cast(Any, text)
    if not isinstance(node, StringNode) or text[:1] in ("'", '"'):
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={text}")
        except HydraException as error:
            how = "a game is written Breakout, a variation Breakout-m4-d1, several [A,B]"
            reason = how if key == "data.games" else _first_line(error)
            raise ConfigError(f"{key} cannot be read, got {text!r}: {reason}") from None
        if parsed.is_sweep_override():
            hint = f"; a list is written {key}=[A,B]" if isinstance(node, (AnyNode, ListConfig)) else ""
            raise ConfigError(f"{key} must be one value, got {text!r}{hint}")
        value = parsed.value()
        if isinstance(node, BooleanNode) and not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {text!r}")
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        if isinstance(node, ListConfig):
            raise ConfigError(f"{key} must be a list, written {key}=[A,B], got {text!r}") from None
        raise ConfigError(unfit(key, error)) from None


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and nodes of all values, not of sections."""
    for name in map(str, config):
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_missing() or node._is_none()):
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
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must hold a run's configuration: {error}") from None
    return run_config_from_yaml(text, source=str(path))


def run_config_from_yaml(text: str, *, source: str) -> RunConfig:
    """As :func:`load_run_config`, from the text itself; ``source`` names it in errors."""
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)  # nothing but texts
        if not isinstance(content, dict):
            raise ConfigError(f"{source} must hold a run's configuration, keys with values, got {content!r}")
        written = content.pop("format", "1")
        if "name" in content and written != str(CONFIG_FORMAT):
            age = "a later" if written.isdecimal() and int(written) > CONFIG_FORMAT else "an earlier"
            raise ConfigError(
                f"{source} was written by {age} version of torchrl_sql (format {written}, this version reads "
                f"{CONFIG_FORMAT}); train it again or use that version"
            )
        base = OmegaConf.structured(RunConfig)
        if "method" not in content:
            raise ConfigError(f"{source} must hold a run's configuration, but it has no method")
        method = METHOD_SETTINGS.get(content["method"]["name"], MethodConfig)
        base.method, base.model = OmegaConf.structured(method), OmegaConf.structured(method.model)
        return _checked(OmegaConf.merge(base, as_written(content, base)))
    except ConfigKeyError as error:
        raise ConfigError(f"{source} must hold a run's configuration: there is no setting {error.full_key!r}") from None
    except ValidationError as error:
        raise ConfigError(f"{source} must hold a run's configuration: {unfit(str(error.full_key), error)}") from None
    except (AttributeError, OmegaConfBaseException, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{source} must hold a run's configuration: {_first_line(error)}") from None


def as_written(content: Any, schema: Any) -> Any:
    """Values of YAML that was read as texts only (:class:`yaml.BaseLoader`), as a schema's types want them.

    Texts stay as they were written, where YAML 1.1 makes numbers of ``24:00:00``, ``00123`` and ``0755``; numbers, null
    and booleans are JSON's.

    Args:
        content: nested mappings, lists and texts.
        schema: the node of a structured configuration; None where the type is open.

    Raises:
        ConfigError: for a boolean that is neither true nor false.
    """
    if isinstance(content, dict):
        values = schema if isinstance(schema, DictConfig) and not (schema._is_missing() or schema._is_none()) else None
        kind = schema._metadata.element_type if isinstance(schema, DictConfig) else None
        return {
            key: as_written(value, StringNode() if kind is str else None if values is None else values._get_node(key))
            for key, value in content.items()
        }
    if isinstance(content, list):
        kind = schema._metadata.element_type if isinstance(schema, ListConfig) else None
        return [as_written(value, StringNode() if kind is str else None) for value in content]
    if content in ("null", "~", "") and (schema is None or schema._is_optional()):
        return None
    if isinstance(schema, StringNode):
        return content
    if isinstance(schema, BooleanNode) and content not in ("true", "false"):
        raise ConfigError(f"{schema._get_full_key(None)} must be true or false, got {content!r}")
    try:
        return json.loads(content)
    except ValueError:
        return content


def _checked(config: Any) -> RunConfig:
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} must be given, e.g. {key}=...")
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    return run_config


def unfit(key: str, error: OmegaConfBaseException) -> str:
    """Why OmegaConf would not take a setting's value, in this package's words where it has some."""
    reason = _first_line(error)
    if "is not Optional" in reason:
        return f"{key} must have a value, got null"
    if number := re.fullmatch(r"Value '(.*)' of type '\w+' could not be converted to (Integer|Float)", reason):
        return f"{key} must be a {'whole ' * (number[2] == 'Integer')}number, got {number[1]!r}"
    return f"{key}: {reason}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
