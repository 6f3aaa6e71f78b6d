"""Gathers what the folders of runs hold into one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from torchrl_sql.config import RunConfig, load_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.data.inspect import GameSummary, summarise
from torchrl_sql.evaluation.clips import find_clip
from torchrl_sql.evaluation.episodes import SCORES, EpisodeResult, read_episodes
from torchrl_sql.evaluation.report import Agent, Clip, Curve, GameData, ReportData, ReturnSummary
from torchrl_sql.evaluation.tables import files_of
from torchrl_sql.stages import CONSTANT_AGENT
from torchrl_sql.training.build import build_actor
from torchrl_sql.training.logs import read_scalars

_METRICS = {
    "loss_qvalue": "TD loss (nats)",
    "loss_cql": "CQL penalty, weighted",
    "loss_bc": "Cloning loss (nats)",
    "q_data": "Q of the data's actions",
    "q_max": "Maximum Q",
    "feature_norm": "Feature norm before normalization",
    "grad_norm": "Gradient norm before clipping",
}
_LABELS = {"cql": "Scaled QL", "bc": "BC"}


def gather(paths: Sequence[Path], *, title: str | None = None, introduction: Sequence[str] = ()) -> ReportData:
    """Reads evaluated runs into the data of a report.

    Args:
        paths (sequence of Path): folders that hold ``scores.csv``, and either a run (``config.yaml``, ``logs/``) or
            folders of runs. Runs of the same name are seeds of one agent.

    Keyword Args:
        title (str, optional): of the page; by default the names of the runs.
        introduction (sequence of str): paragraphs on what was run and why.

    Raises:
        FileNotFoundError: if a folder holds no scores or no run.
        ValueError: if a table is malformed, or the runs do not have the same games.
    """
    episodes: list[EpisodeResult] = []
    runs: list[tuple[Path, RunConfig]] = []
    for path in paths:
        table = path / SCORES
        if not files_of(table):
            raise FileNotFoundError(f"{path} must hold scores.csv (torchrl-sql evaluate writes it), found none")
        episodes += read_episodes(table)
        files = sorted([*path.glob("config.yaml"), *path.glob("*/config.yaml")])
        if not files:
            raise FileNotFoundError(f"{path} must hold config.yaml or folders of runs that do, found none")
        runs += [(file.parent, load_run_config(file)) for file in files]
    games = runs[0][1].games
    for folder, config in runs:
        if config.games != games:
            raise ValueError(f"all runs must have the games {games}, {folder} has {config.games}")
    _check_seeds_alike(runs)
    evaluated = {episode.game for episode in episodes}
    games = tuple(game for game in games if game in evaluated)

    kinds = {config.name: config.objective.name for _, config in runs}
    labels = {name: _LABELS[kind] if list(kinds.values()).count(kind) == 1 else name for name, kind in kinds.items()}
    methods = [name for name, kind in kinds.items() if kind == "cql"] or list(kinds)
    num_parameters = {
        config.name: sum(p.numel() for p in build_actor(config.model, config.games).parameters()) for _, config in runs
    }
    agents = [
        Agent(
            agent=name,
            decoding=decoding,
            label=labels[name] if decoding == "greedy" and kinds[name] == "cql" else f"{labels[name]} {decoding}",
            role="method" if name in methods else "bc_greedy" if decoding == "greedy" else "bc_sampled",
            num_parameters=num_parameters[name],
        )
        for name in sorted(kinds, key=lambda name: name not in methods)
        for decoding in ("greedy", "sampled")
        if any(episode.agent == name and episode.decoding == decoding for episode in episodes)
    ]
    method = next(config for _, config in runs if config.name in methods)
    game_data, caveats = _game_data(runs, games, episodes)
    return ReportData(
        title=title or ", ".join(kinds),
        introduction=introduction,
        games=games,
        agents=agents,
        episodes=[episode for episode in episodes if episode.agent in kinds],
        game_data=game_data,
        caveats=caveats,
        curves=[curve for folder, config in runs for curve in _curves(folder, config, labels[config.name])],
        clips=[clip for path in paths[:1] for clip in _clips(path, games, method, episodes)],
        settings={f"{labels[config.name]}, seed {config.seed}": asdict(config) for _, config in runs},
        versions=_versions(runs),
    )


def _check_seeds_alike(runs: Sequence[tuple[Path, RunConfig]]) -> None:
    """Runs of one name are seeds of one agent only if they differ in nothing else that decides their results."""
    first: dict[str, tuple[Path, RunConfig]] = {}
    for folder, config in runs:
        other_folder, other = first.setdefault(config.name, (folder, config))
        for section in ("model", "objective", "optim", "trainer"):
            if getattr(config, section) != getattr(other, section):
                raise ValueError(
                    f"runs named {config.name!r} must differ in their seeds only, but {folder} has {section} "
                    f"{getattr(config, section)}, {other_folder} has {getattr(other, section)}"
                )
        if folder != other_folder and config.seed == other.seed:
            raise ValueError(
                f"runs named {config.name!r} must have different seeds, got {config.seed} in both "
                f"{other_folder} and {folder}"
            )


def _versions(runs: Sequence[tuple[Path, RunConfig]]) -> dict[str, str]:
    """Versions and machine of the first run's training."""
    file = runs[0][0] / "versions.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _find_store(folder: Path, store: str) -> Path | None:
    """A run's store: where it was trained from, or beside the run if both have moved."""
    places = (Path(store), folder.parent / Path(store).name)
    return next((place for place in places if (place / "store.json").is_file()), None)


def _game_data(
    runs: Sequence[tuple[Path, RunConfig]], games: Sequence[str], episodes: Sequence[EpisodeResult]
) -> tuple[list[GameData], list[str]]:
    """Statistics of the data of each game, and what could not be read."""
    found = {(folder, config.data.store): _find_store(folder, config.data.store) for folder, config in runs}
    missing = sorted({store for (_, store), path in found.items() if path is None})
    caveats = [f"The store {store} was not found: the data's returns and statistics are missing." for store in missing]
    stores = sorted({path.resolve() for path in found.values() if path is not None})
    present = [FrameStore.open(store) for store in stores]
    summaries: dict[str, list[GameSummary]] = {game: [] for game in games}
    for store in present:
        for summary in summarise(store):
            if summary.game in summaries:
                summaries[summary.game].append(summary)
    result = []
    for game, parts in summaries.items():
        if not parts:
            continue
        names = parts[0].component_names
        if any(part.component_names != names for part in parts):
            raise ValueError(f"the stores {stores} must have the same behaviour components of {game}")
        returns = np.concatenate([part.returns for part in parts])
        components = np.concatenate([part.components for part in parts])
        constants: dict[str, dict[int, float]] = {}  # by emulator seed: the same episode counts once
        for episode in episodes:
            if episode.game == game and episode.agent.startswith(CONSTANT_AGENT):
                action = episode.agent.removeprefix(CONSTANT_AGENT)
                constants.setdefault(action, {})[episode.episode_seed] = episode.episode_return
        num_transitions = sum(part.num_transitions for part in parts)
        result.append(
            GameData(
                game=game,
                behaviour_text=" / ".join(dict.fromkeys(source for part in parts for source in part.sources)),
                num_transitions=num_transitions,
                num_episodes=len(returns),
                bytes_per_transition=sum(part.num_bytes for part in parts) / num_transitions,
                behaviour=_summary(returns),
                components={
                    name: _summary(returns[components == index])
                    for index, name in enumerate(names)
                    if (components == index).any()
                },
                action_counts=np.sum([part.action_counts for part in parts], axis=0).tolist(),
                constant_actions={
                    action: _summary(np.array([*returns_by_seed.values()]))
                    for action, returns_by_seed in constants.items()
                },
                rewards="raw" if all(part.rewards == "raw" for part in parts) else "clipped",
            )
        )
    return result, caveats


def _summary(returns: np.ndarray) -> ReturnSummary:
    std = float(returns.std(ddof=1)) if len(returns) > 1 else 0.0
    return ReturnSummary(mean=float(returns.mean()), std=std, num_episodes=len(returns))


def _curves(folder: Path, config: RunConfig, label: str) -> list[Curve]:
    scalars = read_scalars(folder)
    return [
        Curve(
            agent=config.name,
            label=label,
            metric=title,
            seed=config.seed,
            gradient_steps=[step for step, _ in scalars[name]],
            values=[value for _, value in scalars[name]],
        )
        for name, title in _METRICS.items()
        if name in scalars
    ]


def _clips(path: Path, games: Sequence[str], method: RunConfig, episodes: Sequence[EpisodeResult]) -> list[Clip]:
    clips = []
    for game in games:
        file = find_clip(path / "clips", game, method.name)
        first = [
            episode.episode_return
            for episode in episodes
            if (episode.agent, episode.seed, episode.game, episode.episode, episode.decoding)
            == (method.name, method.seed, game, 0, "greedy")
        ]
        if file is not None and first:
            caption = f"First evaluation episode of seed {method.seed} (final score {first[0]:g}), not selected"
            clips.append(
                Clip(
                    game=game,
                    caption=caption,
                    data=file.read_bytes(),
                    mime="video/mp4" if file.suffix == ".mp4" else "image/gif",
                )
            )
    return clips
