"""A study: runs that are compared on one page. The schema of ``configs/study/*.yaml``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from torchrl_sql.config import ConfigError, configs_dir, list_choices

STUDY_FILE = "study.yaml"
"""In a study's folder: its resolved :class:`StudyConfig`, and the mark that the folder is a study's."""

_DATA_WORDS = ("collect", "import", "play", "study")
"""That begin a study's ``data`` where it is no path."""

_OTHER_FOLDERS = ("constant", "launch", "store", "stores", "tasks")
"""Of a study, beside those of its runs."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One agent of a study, trained once per seed."""

    set: list[str] = field(default_factory=list)
    """Overrides, after those in ``common``. A run that chooses a method leaves out the ``method.KEY=...`` of there, one
    that chooses a model the ``model.KEY=...``."""
    from_: str | None = None
    """In YAML ``from``: an earlier run of the study, whose policy of the same seed this one starts from."""
    load: str | None = None
    """What it takes from that policy: ``encoder`` or ``all``."""
    decode: list[str] = field(default_factory=lambda: ["greedy"])
    """Decodings to evaluate, of ``torchrl-sql evaluate``; none for a run that only prepares others."""
    games: list[str] | None = None
    """What is evaluated: some of its games, or variations of them; ``None`` for all its games."""
    seeds: list[int] | None = None
    """``None`` for the study's."""


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """What the page compares."""

    main: str | None = None
    """The run it is about; ``None`` for the first."""
    against: list[str] = field(default_factory=list)
    """Runs that the main one is compared with; none for all others."""
    pairs: list[list[str]] = field(default_factory=list)
    """Further runs to compare, the first of two with the second."""
    games: list[str] = field(default_factory=list)
    """Those of the page; by default the main run's."""
    constant_actions: int = 0
    """Episodes to play of every game's each legal action, always the same one; 0 for none."""
    x: str | None = None
    """What runs differ in along an axis: ``parameters``, or a key of their settings."""
    probes: list[str] = field(default_factory=list)
    """Games whose state is read from the encoders of runs that only prepare others, see ``torchrl-sql probe``; not from
    transformers, which have none."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study. Its folder holds ``store/``, ``RUN/seedS/`` with the scores of each run, ``constant/`` with those of
    constant actions, ``report.html`` and ``study.yaml``.
    """

    title: str
    introduction: list[str] = field(default_factory=list)
    """Paragraphs."""
    common: list[str] = field(default_factory=list)
    """Overrides of every run."""
    seeds: list[int] = field(default_factory=lambda: [0])
    data: str
    """``collect``, ``import`` with the arguments of that command but ``--out``, the path of a store, or ``play``: all
    runs are online, and what those of one seed play goes to one store, ``stores/seedS``. ``study NAME`` is what the
    agents of such a study play, with its first seed and settings, at this one's scale. In a study with other data than
    ``play``, a run with ``online=NAME`` plays into a store of its own."""
    runs: dict[str, StudyRun]
    report: StudyReport = field(default_factory=StudyReport)

    def seeds_of(self, run: str) -> list[int]:
        """The training seeds of a run."""
        seeds = self.runs[run].seeds
        return self.seeds if seeds is None else seeds

    def score_folders(self, folder: Path) -> list[Path]:
        """Where the tables of scores of a study in ``folder`` are; those of failed tasks are missing."""
        played = [name for name, run in self.runs.items() if run.decode]
        runs = [folder / run / f"seed{seed}" for run in played for seed in self.seeds_of(run)]
        return runs + [folder / "constant"] * bool(self.report.constant_actions)

    def to_yaml(self) -> str:
        """The study as :func:`load_study` reads it."""
        return yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True, width=120)


def find_study(name: str) -> Path:
    """The file of a study: ``configs/study/NAME.yaml``, or the path of a file of one's own.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else configs_dir() / "study" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"a study must be FILE.yaml or one of {', '.join(list_choices('study'))}, got {name!r}")
    return path


def load_study(path: Path, *, scale: str | None = None, store: str | None = None) -> StudyConfig:
    """Reads and checks a study.

    A file may have the key ``scales``: for each scale (``configs/scale/``) values that replace those above. Only its
    ``common``, and the ``set`` of its runs, are added to those above. One without has the scale that its ``common``
    names.

    Args:
        path (Path): the file.

    Keyword Args:
        scale (str, optional): of ``scales``; the first by default. Where neither ``scales`` nor ``common`` name one, a
            choice like any other.
        store (str, optional): path of a store, in place of the study's data.

    Raises:
        ConfigError: naming the file, the key, what it must be and what it is.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} must hold a study: {' '.join(str(error).split())}") from None
    try:
        if isinstance(content, dict):
            content = _at_scale(content, scale)
            if store is not None and content.get("data") == "play":
                raise ConfigError(f"its runs play their own data, so that none can be given, got data.store={store}")
            if store is not None:  # a path, whatever it is called
                content["data"] = f"./{store}" if store.partition(" ")[0] in _DATA_WORDS else store
            if "data" not in content:
                raise ConfigError("data must be given: data.store=STORE")
        study: StudyConfig = _build(StudyConfig, content)
        check_study(study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return study


def check_study(study: StudyConfig) -> None:
    """Checks what depends on more than one value.

    Raises:
        ConfigError: naming the key, what it must be and what it is.
    """
    if not study.runs:
        raise ConfigError("runs must name at least one run")
    earlier: list[str] = []
    for name, run in study.runs.items():
        if re.fullmatch(r"\w[\w.+-]*", name) is None or name in _OTHER_FOLDERS:
            raise ConfigError(
                f"runs must have names of letters, digits, _ . + -, other than {_list(_OTHER_FOLDERS)}, got {name!r}"
            )
        for key, seeds in ((f"runs.{name}.seeds", run.seeds), ("seeds", study.seeds)):
            if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
                raise ConfigError(f"{key} must be different numbers from 0, got {seeds}")
        if run.from_ is not None and run.from_ not in earlier:
            raise ConfigError(f"runs.{name}.from must be an earlier run ({_list(earlier)}), got {run.from_!r}")
        if run.from_ is not None and (missing := {*study.seeds_of(name)} - {*study.seeds_of(run.from_)}):
            raise ConfigError(f"runs.{name}.seeds must be among those of {run.from_}, got also {sorted(missing)}")
        if (run.from_ is None) != (run.load is None) or run.load not in (None, "encoder", "all"):
            raise ConfigError(f"runs.{name}.load must be encoder or all with from, else absent, got {run.load!r}")
        earlier.append(name)
    pairs = study.report.pairs
    if alone := [pair for pair in pairs if len({*pair}) < 2 or len(pair) > 2]:
        raise ConfigError(f"report.pairs must each be two runs, got {alone[0]}")
    main = study.report.main or earlier[0]
    for key, names in (("main", [main]), ("against", study.report.against), ("pairs", [*chain(*pairs)])):
        if unknown := [name for name in names if name not in study.runs]:
            raise ConfigError(f"report.{key} must be among the runs ({_list(study.runs)}), got {unknown[0]!r}")
        if unplayed := [name for name in names if not study.runs[name].decode]:
            where = f"runs.{unplayed[0]}.decode"
            raise ConfigError(f"{where} must name a decoding, for the page needs its scores (report.{key}), got none")
    if study.report.constant_actions < 0:
        raise ConfigError(f"report.constant_actions must be at least 0, got {study.report.constant_actions}")


def combined(*overrides: Iterable[str]) -> list[str]:
    """Settings of which a later one replaces an earlier one of the same key."""
    return list({setting_key(override): override for override in chain(*overrides)}.values())


def setting_key(override: str) -> str:
    """The key of ``key=value``."""
    return override.split("=")[0].lstrip("+~")


def _at_scale(content: dict[str, Any], scale: str | None) -> dict[str, Any]:
    """A study's values at one of its ``scales``, see :func:`load_study`."""
    above = {key: value for key, value in content.items() if key != "scales"}
    if "scales" not in content:
        if scale is None:
            return above
        own = [word for word in _joined(above, {}, "common") if setting_key(word) == "scale"]
        if own and own != [f"scale={scale}"]:
            raise ConfigError(f"scale must be {own[0].partition('=')[2]}, this study has no other, got {scale!r}")
        return above | {"common": _joined(above, {"common": [f"scale={scale}"]}, "common")}
    scales = _mapping(content["scales"], "scales")
    name = next(iter(scales), "") if scale is None else scale
    if name not in scales:
        raise ConfigError(f"scale must be one of {_list(scales)}, got {name!r}")
    chosen = _mapping(scales[name], f"scales.{name}")
    common = combined([f"scale={name}"], _joined(above, chosen, "common"))
    runs = dict(_mapping(above.get("runs", {}), "runs"))
    for each, changed in _mapping(chosen.get("runs", {}), f"scales.{name}.runs").items():
        base, changed = _mapping(runs.get(each, {}), each), _mapping(changed, each)
        runs[each] = base | changed | {"set": _joined(base, changed, "set")}
    return above | chosen | {"common": common, "runs": runs}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where} must be keys with values, got {value!r}")
    return value or {}


def _joined(above: dict[str, Any], below: dict[str, Any], key: str) -> list[str]:
    lists = [each.get(key, []) for each in (above, below)]
    for each in lists:
        if not _fits(each, list[str]):
            raise ConfigError(f"{key} must be a list of text, got {each!r}")
    return combined(*lists)


def _build(kind: type, content: Any, where: str = "") -> Any:
    """A dataclass of these values; ``where`` is the prefix of its keys in messages."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where.rstrip('.') or 'a study'} must be keys with values, got {content!r}")
    known = {each.name.rstrip("_"): each for each in fields(kind)}
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{where}{key} is not known; {'is it ' if close else 'known are '}{_list(close or known)}"
            )
    hints, values = get_type_hints(kind), {}
    for key, each in known.items():
        hint = hints[each.name]
        if key not in content:
            if each.default is each.default_factory is MISSING:
                raise ConfigError(f"{where}{key} must be given")
            continue
        value = content[key]
        if is_dataclass(hint):
            value = _build(StudyReport, value, f"{where}{key}.")
        elif get_origin(hint) is dict and isinstance(value, dict):
            value = {str(name): _build(StudyRun, run or {}, f"{where}{key}.{name}.") for name, run in value.items()}
        elif not _fits(value, hint):
            raise ConfigError(f"{where}{key} must be {_NAMES[hint]}, got {value!r}")
        values[each.name] = value
    return kind(**values)


_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    str | None: "text",
    list[str]: "a list of text",
    list[list[str]]: "a list of pairs",
    list[int]: "a list of whole numbers",
    list[int] | None: "a list of whole numbers",
    dict[str, StudyRun]: "names with settings",
}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    return isinstance(value, hint) and not isinstance(value, (bool, dict))


def _plain(value: Any) -> Any:
    """Dataclasses as mappings with YAML's keys."""
    if is_dataclass(value):
        return {each.name.rstrip("_"): _plain(getattr(value, each.name)) for each in fields(value)}
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"
