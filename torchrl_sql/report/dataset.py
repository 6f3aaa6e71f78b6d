"""Statistics of the data that runs were trained on, for their report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from torchrl_sql.config import DataConfig, RunConfig
from torchrl_sql.data import FrameStore, Subset, summarise
from torchrl_sql.data.summary import GameSummary
from torchrl_sql.evaluation.agents import ConstantAgent
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.games import ACTION_NAMES
from torchrl_sql.report.model import GameData, Returns


def game_data(runs: Sequence[tuple[Path, RunConfig]], games: Sequence[str]) -> tuple[list[GameData], list[str]]:
    """Statistics of the data of each game, and what could not be read.

    Args:
        runs (sequence of (Path, RunConfig)): folder and settings of each run of one agent, whose data differ in the
            stores at most: only the part of the stores that was trained on is summarised.
        games (sequence of str): whose data.

    Raises:
        ValueError: if the stores do not have the same behaviours.
    """
    found = [(config.data.store, find_store(folder, config)) for folder, config in runs]
    missing = sorted({store for store, path in found if path is None})
    caveats = [f"The store {store} was not found: the data's returns and statistics are missing." for store in missing]
    stores = sorted({path.resolve() for _, path in found if path is not None})
    present = [FrameStore.open(store) for store in stores]
    summaries: dict[str, list[GameSummary]] = {game: [] for game in games}
    for store in present:
        for summary in summarise(store, games, subset=_subset(runs[0][1].data)):
            summaries[summary.game].append(summary)
    result = []
    for game, parts in summaries.items():
        if not parts:
            continue
        names = parts[0].behaviour_names
        if any(part.behaviour_names != names for part in parts):
            raise ValueError(f"the stores {stores} must have the same behaviours of {game}")
        returns = np.concatenate([part.returns for part in parts])
        behaviours = np.concatenate([part.behaviours for part in parts])
        num_transitions = sum(part.num_transitions for part in parts)
        result.append(
            GameData(
                game=game,
                behaviour_text=" / ".join(dict.fromkeys(source for part in parts for source in part.sources)),
                num_transitions=num_transitions,
                num_episodes=len(returns),
                bytes_per_transition=sum(part.num_bytes for part in parts) / max(num_transitions, 1),
                behaviour=Returns(returns) if len(returns) else None,
                behaviours={
                    name: Returns(returns[behaviours == index])
                    for index, name in enumerate(names)
                    if (behaviours == index).any()
                },
                action_counts=np.sum([part.action_counts for part in parts], axis=0).tolist(),
                rewards="raw" if all(part.rewards == "raw" for part in parts) else "clipped",
            )
        )
    return result, caveats


def constant_actions(episodes: Sequence[EpisodeResult]) -> dict[str, dict[str, Returns]]:
    """What constant actions returned, by game and action; an emulator seed's episode counts once."""
    returns: dict[str, dict[str, dict[int, float]]] = {}
    for episode in episodes:
        if (action := ConstantAgent.action_of(episode.agent)) is not None:
            by_seed = returns.setdefault(episode.game, {}).setdefault(ACTION_NAMES[action], {})
            by_seed[episode.episode_seed] = episode.episode_return
    return {
        game: {name: Returns(np.array([*by_seed.values()])) for name, by_seed in actions.items()}
        for game, actions in returns.items()
    }


def _subset(data: DataConfig) -> Subset:
    return Subset(
        first_fraction=data.first_fraction,
        last_fraction=data.last_fraction,
        every_kth_episode=data.every_kth_episode,
        transitions_per_game=data.transitions_per_game,
    )


def other_data(label: str, own: RunConfig, others: Mapping[str, RunConfig]) -> list[str]:
    """What is to be said of the data shown, an agent's ``own``: that it played it, or was trained on a part of it, or
    that others were trained on other data.
    """
    if own.online is not None:
        mixed = f", without what it took from {own.online.offline_store}" if own.online.offline_fraction else ""
        caveats = [f"The data's returns and statistics are of what {label} played while it learned{mixed}."]
        if others:
            caveats.append("Each other agent that learned online has data of its own, the rest had other data.")
        return caveats
    subset = _subset(own.data)
    part = asdict(subset).items() - asdict(Subset()).items()
    settings = ", ".join(f"{name}={value}" for name, value in sorted(part))
    caveats = [f"The data's statistics are those of the part that was trained on: {settings}."] if part else []
    unlike = [
        other
        for other, config in others.items()
        if (config.data.store, _subset(config.data)) != (own.data.store, subset)
    ]
    if unlike:
        listed = ", ".join(unlike)
        caveats.append(f"The data's returns and statistics are of {label}'s training data; {listed} had other data.")
    return caveats


def find_store(folder: Path, config: RunConfig) -> Path | None:
    """A run's store: where it was trained from, or if both have moved, as far from the run's folder as it was then."""
    store, run = (os.path.expandvars(os.path.expanduser(path)) for path in (config.data.store, config.run_dir))
    places = Path(store), folder / os.path.relpath(store, run)
    return next((place for place in places if (place / "store.json").is_file()), None)
