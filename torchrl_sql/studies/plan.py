"""From settings to tasks: of a study, of training runs with several values, of any other command."""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from torchrl_sql.config import (
    ConfigError,
    EvaluationConfig,
    InitConfig,
    QNetworkConfig,
    RunConfig,
    check_ranks,
    compose_run_config,
)
from torchrl_sql.config.schema import folder_name as name_bound
from torchrl_sql.config.study import StudyConfig, StudyRun, combined, find_study, load_study, setting_key
from torchrl_sql.files import check_outside_stores
from torchrl_sql.games import place_of
from torchrl_sql.studies.task import Task

RUNS = Path("runs")
"""Where studies and launches make their folders."""

_MAX_NAME_BYTES = 255
"""Of Linux's file systems."""

_DECIDED = ("name", "run_dir", "seed", "data.store")
"""Keys that a study gives to its runs itself."""

_OF_TRAINING = ("checkpoints", "logs", "nonfinite", "config.yaml", "versions.json", "policy.safetensors", ".lock")
_OF_EVALUATION = ("scores.csv", "calibration.csv", "evaluation_versions.json", "clips")


def plan_study(study: StudyConfig, folder: Path, *, num_ranks: int = 1) -> list[Task]:
    """The tasks of a study: data, and for each run and seed training and evaluations; constant actions; the page.

    Args:
        study (StudyConfig): what to compare.
        folder (Path): where everything goes, see :class:`StudyConfig`.

    Keyword Args:
        num_ranks (int): processes that will train each run; those that learn online take one.

    Returns:
        The tasks, each after those that it waits for.

    Raises:
        ConfigError: for settings that cannot be run.
        ValueError: if the folder is a store, or in one.
    """
    check_outside_stores(folder, "the folder of a study")
    tasks: list[Task] = []

    def add(name: str, kind: str, words: Sequence[str], *, reads: bool = True, **more: Any) -> Task:
        # One that does not read what it waits for only leaves the processor to it.
        inputs = {other.name: other.key for other in tasks if other.name in more.get("after", ()) and reads}
        task = Task(name=name, arguments=[kind, *words], folder=str(folder), inputs=inputs, **{"group": name, **more})
        tasks.append(task)
        return task

    for name, run in study.runs.items():
        if run.from_ is not None and (twice := {*map(setting_key, run.set)} & {"init.policy", "init.load"}):
            raise ConfigError(f"runs.{name} must have from and load or {min(twice)}, got both")
    for override in (word for words in (study.common, *(run.set for run in study.runs.values())) for word in words):
        if (key := setting_key(override)) in _DECIDED:
            option = "--seeds" if key == "seed" else "its file" if key == "data.store" else "--out"
            raise ConfigError(f"a study decides {key} itself, see {option}; got {override!r}")
    made, store = _plan_data(study, folder)
    tasks += made
    data = [task.name for task in made]
    lived = [Path(path).name for task in made for path in task.makes if path.startswith("stores/")]
    plays_data = study.data == "play"
    main = study.report.main or next(iter(study.runs))
    ends: list[str] = []
    judged: RunConfig | None = None
    games_played: list[str] = []
    prepared: list[tuple[str, int]] = []
    for name, run in study.runs.items():
        chosen = tuple(f"{setting_key(word)}." for word in run.set if setting_key(word) in ("method", "model"))
        shared = [word for word in study.common if not word.startswith(chosen)]
        plays = any(setting_key(word) == "online" for word in [*shared, *run.set])
        common = combined(shared, run.set, [f"name={name}"], [] if plays else [f"data.store={quoted(store)}"])
        if run.load is not None:
            common = combined(common, [f"init.load={run.load}"])
        if plays_data and not plays:
            raise ConfigError(f"runs.{name} must have the setting online=NAME, for the study's data is play")
        for seed in study.seeds_of(name):
            place = f"{name}/seed{seed}"
            words = [*common, f"run_dir={quoted(folder / place)}", f"seed={seed}"]
            config = _placed(compose_run_config([*common, f"seed={seed}"]), folder / place)
            if lived and not plays and (unknown := [game for game in config.games if game not in lived]):
                raise ConfigError(
                    f"runs.{name} must have games that {study.data} plays ({', '.join(lived)}), got {unknown[0]}"
                )
            if plays_data:
                own_store = folder / "stores" / f"seed{seed}"
                words.append(f"data.store={quoted(own_store)}")
                config.data = replace(config.data, store=str(own_store))
            settings = _deciding(config) | ({} if made or plays else {"data": str(store)})
            before = [] if plays else data
            if run.from_ is not None:
                policy = folder / run.from_ / f"seed{seed}" / "policy.safetensors"
                words.append(f"init.policy={quoted(policy)}")
                config.init = replace(config.init, policy=str(policy))
                before = [*before, f"train-{run.from_}-seed{seed}"]
            if not run.decode and isinstance(config.model, QNetworkConfig):
                prepared.append((name, seed))
            check_ranks(config, 1 if plays else num_ranks)
            games_played += _check_played(name, run, config)
            _check_axis(study.report.x, name, config)
            scored = config.trainer.evaluation_interval_gradient_steps is not None
            if scored:  # training makes these scores, and nothing else could make them again
                settings["trainer.evaluation_interval_gradient_steps"] = (
                    config.trainer.evaluation_interval_gradient_steps
                )
                settings |= {f"evaluation.{key}": value for key, value in asdict(config.evaluation).items()}
            trained = add(
                f"train-{name}-seed{seed}", "train", words, group=f"train-{name}", after=before, run_dir=config.run_dir,
                config=config.to_yaml(), one_process=plays, settings=settings,
                makes=[f"{place}/{made}" for made in (*_OF_TRAINING, *(_OF_EVALUATION if scored else ()))]
                + [f"stores/seed{seed}/{game}" for game in config.games if plays_data]
                + [f"{place}/store"] * (plays and not plays_data),
            )  # fmt: skip
            previous = trained
            for decoding in run.decode:  # one after the other: they share a table
                words = [config.run_dir, "--decoding", decoding, *evaluation_options(config.evaluation)]
                played = {} if run.games is None else {"games": run.games}
                words += ["--games", ",".join(run.games)] if run.games else []
                words += ["--video"] * (name == main and decoding == run.decode[0])
                previous = add(
                    f"evaluate-{name}-seed{seed}-{decoding}", "evaluate", words, group=f"evaluate-{name}-{decoding}",
                    after=[previous.name], settings={"decoding": decoding} | played | asdict(config.evaluation),
                    makes=[f"{place}/{made}" for made in _OF_EVALUATION],
                )  # fmt: skip
                ends.append(previous.name)
            if name == main and seed == study.seeds_of(name)[0]:
                judged = config
    if unplayed := [game for game in study.report.games if game not in games_played]:
        known = ", ".join(dict.fromkeys(games_played))
        raise ConfigError(f"report.games must be among those that its runs play ({known}), got {unplayed[0]!r}")
    if judged is not None and study.report.constant_actions:
        number = min(study.report.constant_actions, judged.evaluation.num_episodes_per_game)
        protocol = replace(judged.evaluation, num_episodes_per_game=number)
        games = study.report.games or study.runs[main].games or list(judged.games)
        words = ["constant", "--games", ",".join(games), *evaluation_options(protocol)]
        constant = add(
            "constant", "evaluate", [*words, "--out", str(folder / "constant")], after=data, reads=False,
            settings={"games": games} | asdict(protocol), makes=["constant"],
        )  # fmt: skip
        ends.append(constant.name)
    if study.report.probes:
        if not prepared:
            raise ConfigError("report.probes needs a run with decode: [] and an encoder of stacked frames, found none")
        words = [str(folder / name / f"seed{seed}") for name, seed in prepared]
        words += ["--games", ",".join(study.report.probes), "--out", str(folder)]
        probed = add(
            "probe", "probe", words, after=[f"train-{name}-seed{seed}" for name, seed in prepared],
            settings={"games": study.report.probes}, makes=["probes.json", "probes.png"],
        )  # fmt: skip
        ends.append(probed.name)
    makers: dict[str, str] = {}
    for task in tasks:
        if task.kind == "train" and (both := [path for path in task.makes if path in makers]):
            raise ConfigError(f"{makers[both[0]]} and {task.name} would both make {folder / both[0]}")
        makers |= dict.fromkeys(task.makes, task.name)
    add("report", "report", [str(folder)], after=ends, tolerant=True, makes=["report.html"])
    return tasks


def plan_training(overrides: Sequence[str], root: Path, *, num_ranks: int = 1) -> list[Task]:
    """One training run for each combination of ``overrides``: values separated by commas, as Hydra writes them.

    A single run's folder is ``root`` itself; each of several has its own in it. Runs that differ in more than their
    seed are different agents: what tells them apart beside it becomes part of their name.

    Args:
        overrides (sequence of str): settings, each with one value or several.
        root (Path): folder of the launch.

    Keyword Args:
        num_ranks (int): processes that will train each run; those that learn online take one.

    Raises:
        ConfigError: for settings that cannot be run.
    """
    for override in overrides:
        if setting_key(override) == "run_dir":
            raise ConfigError(f"the launcher makes the run's folder: give --into instead of {override}")
    combinations = expand(overrides)
    tasks: dict[str, Task] = {}
    for label, own in combinations:
        config = compose_run_config(own)
        plays = config.online is not None
        check_ranks(config, 1 if plays else num_ranks)
        config = _placed(config, (root if len(combinations) == 1 else root / folder_name(label)).resolve())
        agent = ",".join(part for part in label.split(",") if part and not part.startswith("seed="))
        if agent and not any(override.startswith("name=") for override in own):
            config.name = f"{config.name}-{folder_name(agent)}"
        if config.run_dir in tasks:
            raise ConfigError(f"{tasks[config.run_dir].name} and {label} would share the folder {config.run_dir}")
        if len(os.fsencode(Path(config.run_dir).name)) > _MAX_NAME_BYTES or not name_bound.holds(config.name):
            raise ConfigError(
                f"{label or config.name} is too long for the name of a run's folder: change fewer settings at a time, "
                "or give --into"
            )
        tasks[config.run_dir] = Task(
            name=label or "train", arguments=["train", *own], group="train", run_dir=config.run_dir,
            config=config.to_yaml(), one_process=plays,
        )  # fmt: skip
    return list(tasks.values())


def plan_evaluation(agents: Sequence[str], options: Sequence[str], *, num_shares: int) -> list[Task]:
    """Evaluations of agents, each split into shares of its episodes, all of which write parts of one table.

    Args:
        agents (sequence of str): runs, checkpoints, ...
        options (sequence of str): further arguments of ``torchrl-sql evaluate``.

    Keyword Args:
        num_shares (int): shares of each.

    Raises:
        ConfigError: if ``num_shares`` is less than 1.
    """
    if num_shares < 1:
        raise ConfigError(f"--shares must be at least 1, got {num_shares}")
    shares = [[]] if num_shares == 1 else [["--share", f"{number}/{num_shares}"] for number in range(1, num_shares + 1)]
    return [
        Task(name=" ".join([agent, *share[1:]]), arguments=["evaluate", agent, *options, *share], group="evaluate")
        for agent in agents
        for share in shares
    ]


def expand(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every combination of values separated by commas: ``seed=0,1 model=resnet34,resnet50``.

    Returns:
        For each combination its label (``seed=0,model=resnet34``; empty if nothing has several values) and its
        overrides.

    Raises:
        ConfigError: for overrides that Hydra cannot read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(f"settings must be key=value, got {error.override!r}") from None
    fixed = [text for override, text in zip(parsed, overrides, strict=True) if not override.is_sweep_override()]
    several = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        for override in parsed
        if override.is_sweep_override()
    ]
    return [(",".join(values), [*fixed, *values]) for values in product(*several)]


def choose_root(name: str, *, out: Path | None = None) -> Path:
    """A folder for a launch that does not exist yet: ``runs/NAME-DATE-TIME-RANDOM``, or ``out``.

    Raises:
        ConfigError: if ``out`` exists.
    """
    if out is None:
        return RUNS / f"{folder_name(name) or 'launch'}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if out.exists():
        raise ConfigError(f"--into must be a new folder, but {out} exists; torchrl-sql resume continues a launch")
    return out


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_")


def quoted(path: Path) -> str:
    """A path as the value of a setting."""
    if re.fullmatch(r"[\w./+-]+", str(path)):
        return str(path)
    text = re.sub(r"(\\*)(?:(')|$)", lambda found: found[1] * 2 + r"\'" * bool(found[2]), str(path))
    return f"'{text}'"


def evaluation_options(evaluation: EvaluationConfig) -> list[str]:
    """A protocol as options of ``torchrl-sql evaluate``."""
    return [
        f"--episodes={evaluation.num_episodes_per_game}",
        f"--sticky={evaluation.sticky_action_probability}",
        f"--epsilon={evaluation.epsilon}",
        f"--seed={evaluation.seed}",
        f"--max-env-frames={evaluation.max_env_frames_per_episode}",
    ]


def _plan_data(study: StudyConfig, folder: Path) -> tuple[list[Task], Path]:
    """The tasks that make a study's data, none where it is there or its own runs play it, and the store."""
    kind, _, rest = study.data.partition(" ")
    store = folder / "store"
    if study.data == "collect":
        words = [*study.common, f"data.store={quoted(store)}", f"seed={study.seeds[0]}"]
        config = compose_run_config(words)
        settings = {"games": list(config.games)} | asdict(config.collection)
    elif kind == "import":
        try:
            words = [*shlex.split(rest), "--out", str(store)]
        except ValueError as error:
            raise ConfigError(f"data must be a command line, got {study.data!r}: {error}") from None
        settings = {"data": re.sub(r"\s--workers[\s=]\S+", "", study.data)}  # how fast, not what
    elif kind == "study":
        scale = next((word.partition("=")[2] for word in study.common if setting_key(word) == "scale"), None)
        lives = load_study(find_study(rest.strip()), scale=scale)
        if lives.data != "play":
            raise ConfigError(
                f"data must be study NAME, one whose data is play, got {study.data!r}, with {lives.data!r}"
            )
        if both := [name for name in study.runs if name in lives.runs]:
            raise ConfigError(f"runs.{both[0]} must have another name: the data's, {study.data}, has such a run, too")
        seed = f"seed{lives.seeds[0]}"
        tasks = [task for task in plan_study(lives, folder) if task.kind == "train"]
        if not (tasks := [task for task in tasks if task.name.endswith(f"-{seed}")]):
            raise ConfigError(f"data must be a study with runs of its first seed, {lives.seeds[0]}, got {study.data!r}")
        return tasks, folder / "stores" / seed
    else:
        return [], Path(study.data)
    task = Task(name=kind, group=kind, arguments=[kind, *words], folder=str(folder), settings=settings, makes=["store"])
    return [task], store


def _placed(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of a run in another folder, with the store that an online run keeps there."""
    inside = config.data.store == f"{config.run_dir}/store"
    data = replace(config.data, store=f"{folder}/store") if inside else config.data
    return replace(config, run_dir=str(folder), data=data)


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Settings that decide what a run learns, by key."""
    settings = {"seed": config.seed} | config.deciding_settings()
    if config.init == InitConfig():  # as in the records of before there was it
        settings = {key: value for key, value in settings.items() if not key.startswith("init.")}
    return settings


def _check_played(name: str, run: StudyRun, config: RunConfig) -> Sequence[str]:
    """Before anything is trained, checks that a run can be evaluated as the study says; returns the games that it is
    evaluated in: none if it only prepares others.
    """
    known = config.method.decodings
    if unknown := [decoding for decoding in run.decode if decoding not in known]:
        may = f"among {', '.join(known)}" if known else "empty"
        raise ConfigError(f"runs.{name}.decode must be {may} with method {config.method.name}, got {unknown[0]!r}")
    for game in run.games or ():
        if place_of(game, config.games) is None:
            raise ConfigError(
                f"runs.{name}.games must be its games ({', '.join(config.games)}) or variations of them, got {game!r}"
            )
    return (run.games or config.games) if run.decode else ()


def _check_axis(x: str | None, run: str, config: RunConfig) -> None:
    """Before anything is trained, checks that the page can place a run on its axis."""
    value = 0 if x in (None, "parameters") else _deciding(config).get(str(x))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"report.x must be parameters or a setting that is a number, got {x!r}, {value} in {run}")
