"""Gathers what the folders of runs and tables of scores hold into one report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torchrl_sql.config import RunConfig, load_run_config
from torchrl_sql.config.study import STUDY_FILE, StudyConfig, load_study
from torchrl_sql.evaluation.clips import find_clip
from torchrl_sql.evaluation.episodes import (
    CALIBRATION,
    EVALUATION_VERSIONS,
    SCORES,
    CalibrationPoint,
    EpisodeResult,
    read_calibration,
    read_episodes,
)
from torchrl_sql.evaluation.probing import PROBES, read_probes
from torchrl_sql.evaluation.protocol import AgentId
from torchrl_sql.evaluation.tables import files_of
from torchrl_sql.games import find_game
from torchrl_sql.methods import make_method
from torchrl_sql.report.agents import Compared, arrange, compared_by, deciding_settings, find_agents, named
from torchrl_sql.report.dataset import constant_actions, game_data, other_data
from torchrl_sql.report.model import Agent, Clip, Curve, ReportData
from torchrl_sql.report.reconstructions import reconstructions
from torchrl_sql.report.text import name_games
from torchrl_sql.training.features import FEATURE_METRICS
from torchrl_sql.training.logs import read_scalars

Row = TypeVar("Row", EpisodeResult, CalibrationPoint)


class _Run(NamedTuple):
    folder: Path
    config: RunConfig


def gather(
    paths: Sequence[Path],
    *,
    games: Sequence[str] | None = None,
    agents: Sequence[str] = (),
    main: str | None = None,
    against: Sequence[str] | None = None,
    x: str | None = None,
    step: int | None = None,
    aggregate: bool = False,
    title: str | None = None,
) -> ReportData:
    """Reads evaluated runs into the data of a report.

    Args:
        paths (sequence of Path): tables of scores (``scores.csv``), or folders that hold one. A run (``config.yaml``,
            ``logs/``) in the same folder, or folders of runs in it, tell what the agents of the table are; runs of the
            same name are seeds of one agent. Without, the page has the scores alone. The folder of a study stands for
            those of its runs, and gives introduction, and title, main, against and x unless they are given here.

    Keyword Args:
        games (sequence of str, optional): those to report; by default those that its study names, or the games of the
            main agent's run; all, where there are no scores of it or in none of them.
        agents (sequence of str): those to report, by name or label; by default all.
        main (str, optional): the agent that the page is about; by default the first run. That of a study may have no
            scores yet: then the page says so and compares nothing.
        against (sequence of str): agents that it is compared with; by default all others.
        x (str, optional): what runs differ in along an axis, see :func:`find_agents`.
        step (int, optional): gradient steps at which trained agents are compared, see :class:`ReportData`.
        aggregate (bool): whether there are aggregates of few games too.
        title (str, optional): of the page; by default the names of the agents.

    Raises:
        FileNotFoundError: if a path is or holds no table of scores.
        ValueError: if a table is empty or malformed, two hold different results of one episode, runs of one name
            differ in more than their seeds, or no agent has a name given.
    """
    studies = {path: load_study(path / STUDY_FILE) for path in paths if (path / STUDY_FILE).is_file()}
    tables, caveats = _find_tables(paths, studies)
    episodes, calibration = _read_tables(tables)
    episodes, unnamed = _named_decodings(episodes, studies)
    runs = _find_runs(tables)
    _check_seeds_alike(runs)
    caveats += [*unnamed, *_unevaluated(runs, episodes)]
    evaluated = {row.agent for row in episodes}
    runs = [run for run in runs if run.config.name in evaluated]
    study = next(iter(studies.values())) if len(paths) == len(studies) == 1 else None
    x = x or (study.report.x if study else None)
    found = find_agents([run.config for run in runs], episodes, x)
    chosen = [agent for name in agents for agent in named(found, name, "--agents")]
    kept = [agent for agent in found if agent in chosen] or found
    whom = Compared(main, against) if study is None else compared_by(study, found, chosen, main, against)
    ordered, compared = arrange(kept, whom.main, whom.against)
    if against and not compared and whom.absent is None:
        raise ValueError(f"--against must name others than the main agent, got {', '.join(against)}")
    labels: dict[str, str] = {}
    for agent in ordered:
        labels.setdefault(agent.agent, agent.label.removesuffix(f" {agent.decoding}"))
    runs = [run for run in runs if run.config.name in labels]
    main_runs = [run for run in runs if run.config.name == ordered[0].agent]
    expected = _expected_games(study, whom.absent, main_runs)
    shown, of_games = _choose_games(expected, episodes, games)
    caveats += of_games
    unknown = [name for name in labels if name not in {run.config.name for run in runs}]
    if unknown:
        caveats.append(
            f"No run was found of {', '.join(unknown)}: what it is, its settings, parameters, data and training curves "
            "are unknown here."
        )
    statistics, missing = game_data(main_runs, shown)
    if main_runs:
        others = {labels[run.config.name]: run.config for run in runs if run not in main_runs}
        caveats += other_data(labels[ordered[0].agent], main_runs[0].config, others)
    return ReportData(
        title=title or (study.title if study else ", ".join(labels)),
        introduction=study.introduction if study else (),
        games=shown,
        agents=ordered,
        episodes=[row for row in episodes if row.agent in labels],
        main=ordered[0].label if whom.main else "",
        absent=whom.absent,
        against=compared,
        pairs=whom.pairs,
        x=x,
        step=step,
        aggregate=aggregate,
        calibration=calibration,
        game_data=statistics,
        constant_actions=constant_actions(episodes),
        caveats=[*caveats, *missing],
        curves=[curve for run in runs for curve in _curves(run, labels[run.config.name])]
        + [curve for run in _preparing(studies) for curve in _curves(run, run.config.name)],
        clips=[] if whom.absent else _clips(main_runs, shown, ordered[0], episodes, step),
        probes=read_probes(paths[0] / PROBES) if study is not None and (paths[0] / PROBES).is_file() else None,
        reconstructions=reconstructions([*_preparing(studies), *runs]),
        settings=_settings(runs, labels),
        versions=_versions(runs, [*dict.fromkeys(table.parent for table in tables)]),
        sources=[path.parent if path.name == SCORES else path for path in paths],
    )


def _find_tables(paths: Sequence[Path], studies: Mapping[Path, StudyConfig]) -> tuple[list[Path], list[str]]:
    """The tables of scores, and what is to be said of runs of a study that have none."""
    tables, missing = [], []
    for path in paths:
        if path not in studies:
            tables.append(_find_table(path))
            continue
        folders = studies[path].score_folders(path)
        there = [folder for folder in folders if files_of(folder / SCORES)]
        if not there:
            raise FileNotFoundError(f"{path} must hold scores of a run of its study, found none in {folders[0]}, ...")
        tables += [folder / SCORES for folder in there]
        missing += [str(folder.relative_to(path)) for folder in folders if folder not in there]
    return tables, [f"Not evaluated yet: {', '.join(missing)}."] if missing else []


def _read_tables(tables: Sequence[Path]) -> tuple[list[EpisodeResult], list[CalibrationPoint]]:
    episodes = _read(tables, read_episodes)
    if not episodes:
        raise ValueError(f"the tables of scores must hold episodes, found none in {', '.join(map(str, tables))}")
    scores, calibration = Path(SCORES).stem, Path(CALIBRATION).stem
    beside = [table.with_name(table.name.replace(scores, calibration, 1)) for table in tables if scores in table.name]
    return episodes, _read(beside, read_calibration)


def _named_decodings(
    episodes: Sequence[EpisodeResult], studies: Mapping[Path, StudyConfig]
) -> tuple[list[EpisodeResult], list[str]]:
    """The episodes but those of decodings that their study no longer names, and what is to be said of these."""
    named: dict[str, set[str]] = {}
    for study in studies.values():
        for name, run in study.runs.items():
            if run.decode:
                named.setdefault(name, set()).update(run.decode)
    kept = [row for row in episodes if row.agent not in named or row.decoding in named[row.agent]]
    pairs = dict.fromkeys((row.agent, row.decoding) for row in episodes)
    others = [f"{agent} {decoding}" for agent, decoding in pairs if decoding not in named.get(agent, (decoding,))]
    text = f"Not shown, for the study names no such decoding, though episodes are in the tables: {', '.join(others)}."
    return kept, [text] if others else []


def _find_runs(tables: Sequence[Path]) -> list[_Run]:
    """The runs in the folders of the tables, or one floor below."""
    files = [
        file
        for folder in dict.fromkeys(table.parent for table in tables)
        for file in sorted([*folder.glob("config.yaml"), *folder.glob("*/config.yaml")])
    ]
    return [_Run(file.parent, load_run_config(file)) for file in files]


def _preparing(studies: Mapping[Path, StudyConfig]) -> list[_Run]:
    """Runs of studies that are not played, as others start from them: their curves are all there is to show."""
    folders = [
        path / name / f"seed{seed}"
        for path, study in studies.items()
        for name, run in study.runs.items()
        for seed in study.seeds_of(name)
        if not run.decode
    ]
    return [_Run(folder, load_run_config(folder / "config.yaml")) for folder in folders if (folder / "logs").is_dir()]


def _find_table(path: Path) -> Path:
    table = path if path.suffix == ".csv" else path / SCORES
    if not files_of(table):
        raise FileNotFoundError(f"{path} must hold {SCORES} (torchrl-sql evaluate writes it), found none")
    return table


def _read(tables: Sequence[Path], read: Callable[[Path], list[Row]]) -> list[Row]:
    """The rows of all tables that exist, each once."""
    rows: dict[Any, tuple[Row, Path]] = {}
    for table in tables:
        for row in read(table) if files_of(table) else ():
            other, where = rows.setdefault(row.key, (row, table))
            if other != row:
                raise ValueError(f"{table} and {where} hold conflicting rows for the same episode: {row} and {other}")
    return [row for row, _ in rows.values()]


def _expected_games(study: StudyConfig | None, absent: str | None, main_runs: Sequence[_Run]) -> Sequence[str]:
    """The games of the study's page, or those in which the main agent is evaluated; none if no run tells."""
    if study and study.report.games:
        return study.report.games
    if absent or not main_runs:
        return ()
    config = main_runs[0].config
    played = study.runs[config.name].games if study and config.name in study.runs else None
    return played or config.games


def _choose_games(
    expected: Sequence[str], episodes: Sequence[EpisodeResult], games: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """The games of the page, and what is to be said of others: those asked for, or as many as there are of those that
    are expected, or all if there are none of these.
    """
    evaluated = {episode.game for episode in episodes}
    in_order = sorted(evaluated, key=lambda game: find_game(game).seed_key)
    wanted = tuple(games or expected or in_order)
    shown = tuple(game for game in wanted if game in evaluated) or (() if games else tuple(in_order))
    if games and shown != wanted:
        raise ValueError(f"games must have been evaluated, got {wanted}, and episodes of {tuple(sorted(evaluated))}")
    caveats = []
    unplayed = [game for game in wanted if game not in evaluated]
    if unplayed:
        caveats.append(f"Not shown, for no agent was evaluated there: {name_games(unplayed, len(wanted))}.")
    others = sorted(evaluated.difference(shown))
    if others:
        caveats.append(f"Not shown, though episodes are in the tables: {name_games(others, len(evaluated))}.")
    return shown, caveats


def _unevaluated(runs: Sequence[_Run], episodes: Sequence[EpisodeResult]) -> list[str]:
    """Runs that the page cannot show."""
    evaluated = {(episode.agent, episode.seed) for episode in episodes}
    return [
        f"The run {run.folder} ({run.config.name}, seed {run.config.seed}) has not been evaluated and is not included."
        for run in runs
        if (run.config.name, run.config.seed) not in evaluated
    ]


def _check_seeds_alike(runs: Sequence[_Run]) -> None:
    """Runs of one name are seeds of one agent only if they differ in nothing else that decides their results."""
    first: dict[str, _Run] = {}
    folders: dict[tuple[str, int], Path] = {}
    for run in runs:
        folder, config = run
        other_folder, other = first.setdefault(config.name, run)
        there = deciding_settings(other)
        for key, value in deciding_settings(config).items():
            if value != there.get(key):
                raise ValueError(
                    f"runs named {config.name!r} must differ in their seeds only, but {folder} has {key} {value}, "
                    f"{other_folder} has {there.get(key)}"
                )
        same_seed = folders.setdefault((config.name, config.seed), folder)
        if folder != same_seed:
            raise ValueError(
                f"runs named {config.name!r} must have different seeds, got {config.seed} in both "
                f"{same_seed} and {folder}"
            )


def _settings(runs: Sequence[_Run], labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The resolved settings of each agent; where its seeds differ, the values of all."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault(labels[run.config.name], []).append(asdict(run.config))
    return {label: _merge(values) for label, values in settings.items()}


def _versions(runs: Sequence[_Run], folders: Sequence[Path]) -> dict[str, str]:
    """Versions and machines of the runs' training and of evaluation; where they differ, those of all."""
    files = [run.folder / "versions.json" for run in runs]
    trained = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    tables = [file for folder in folders for file in files_of(folder / EVALUATION_VERSIONS)]
    played = [versions for file in tables for versions in json.loads(file.read_text(encoding="utf-8"))]
    return _side_by_side(trained) | {f"evaluation: {name}": text for name, text in _side_by_side(played).items()}


def _side_by_side(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for each in versions for name in each)
    return _merge([{name: each.get(name, "unknown") for name in names} for each in versions]) if versions else {}


def _merge(values: Sequence[Any]) -> Any:
    """Nested mappings of the same keys as one, with different values side by side."""
    if all(isinstance(value, Mapping) for value in values):
        return {key: _merge([value[key] for value in values]) for key in values[0]}
    distinct = list(dict.fromkeys(str(value) for value in values))
    return values[0] if len(distinct) == 1 else " / ".join(distinct)


def _curves(run: _Run, label: str) -> list[Curve]:
    scalars = read_scalars(run.folder)
    metrics = {
        **make_method(run.config.method).metrics,
        **FEATURE_METRICS,
        "grad_norm": "Gradient norm before clipping",
        "episode_return": "Return of the episodes that it learned from, all games",
    }
    return [
        Curve(
            agent=run.config.name,
            label=label,
            metric=title,
            seed=run.config.seed,
            gradient_steps=[step for step, _ in scalars[name]],
            values=[value for _, value in scalars[name]],
        )
        for name, title in metrics.items()
        if name in scalars
    ]


def _clips(
    main_runs: Sequence[_Run], games: Sequence[str], main: Agent, episodes: Sequence[EpisodeResult], step: int | None
) -> list[Clip]:
    """The main agent's first episode in each game at ``step`` (default: its last), in the first folder with a clip."""
    first = [row for row in episodes if (row.agent, row.decoding, row.episode) == (main.agent, main.decoding, 0)]
    last_step = max((row.gradient_step for row in first), default=0) if step is None else step
    returns = {(row.seed, row.game): row.episode_return for row in first if row.gradient_step == last_step}
    clips = []
    for game in games:
        for folder, config in main_runs:
            agent = AgentId(name=main.agent, training_seed=config.seed, gradient_step=last_step, decoding=main.decoding)
            places = (folder, folder.parent)  # a run's clips lie in its folder or beside it
            files = [file for place in places if (file := find_clip(place / "clips", game, agent))]
            if files:
                caption = f"First evaluation episode of seed {config.seed}"
                if (config.seed, game) in returns:
                    caption += f" (final score {returns[config.seed, game]:g})"
                mime: Literal["video/mp4", "image/gif"] = "video/mp4" if files[0].suffix == ".mp4" else "image/gif"
                caption += ", not selected"
                clips.append(Clip(game=game, caption=caption, data=files[0].read_bytes(), mime=mime))
                break
    return clips
