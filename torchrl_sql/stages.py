"""The stages of a run beside training: collecting its data, evaluating its checkpoints."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from torchrl_sql.config import ConfigError, EvaluationConfig, RunConfig
from torchrl_sql.data import FrameStore
from torchrl_sql.envs import WEAK_SKILLS, SkillMixture, collect
from torchrl_sql.envs.behaviour import describe
from torchrl_sql.evaluation.clips import to_gif
from torchrl_sql.evaluation.episodes import Decoding
from torchrl_sql.evaluation.evaluate import evaluate
from torchrl_sql.evaluation.rollout import ActorPolicy, constant_policy
from torchrl_sql.games import ACTION_NAMES, GAMES
from torchrl_sql.training.build import Trained, resolve_device, set_num_threads

CONSTANT_AGENT = "constant_"
"""Prefix of the names of agents that always take one action, e.g. ``constant_UP``."""


def collect_data(config: RunConfig) -> FrameStore:
    """Fills ``config.data.store`` as ``config.collection`` says; continues an interrupted collection.

    Raises:
        ConfigError: if the configuration has no ``collection``, or the store was collected in
            another way.
    """
    collection = config.collection
    if collection is None:
        raise ConfigError(f"experiment {config.name!r} has no collection settings: its data comes from elsewhere")
    how = {
        "seed": collection.seed,
        "num_agent_steps_per_game": collection.num_agent_steps_per_game,
        "sticky_action_probability": collection.sticky_action_probability,
        "max_env_frames_per_episode": collection.max_env_frames_per_episode,
    }
    policies = {game: SkillMixture(game) for game in config.games}
    store = FrameStore.create(config.data.store, exist_ok=True)
    for game, policy in policies.items():
        found = dict(store.run(game).manifest.metadata) if game in store.games else how
        if found != how:
            raise ConfigError(
                f"the store {config.data.store} holds {game} collected with {found}, wanted {how}; choose another "
                "data.store or delete it"
            )
        with store.writer(
            game, source=describe(game, WEAK_SKILLS), components=policy.component_names, metadata=how
        ) as writer:
            bar = tqdm(
                total=collection.num_agent_steps_per_game,
                initial=writer.num_steps,
                desc=f"collect {game}",
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                dynamic_ncols=True,
            )
            with bar:
                collect(
                    writer,
                    policy,
                    game,
                    collection.num_agent_steps_per_game,
                    seed=collection.seed,
                    sticky_action_probability=collection.sticky_action_probability,
                    max_env_frames_per_episode=collection.max_env_frames_per_episode,
                    progress=lambda num_steps, bar=bar: bar.update(num_steps - bar.n),  # type: ignore[misc]
                )
    return store


def evaluate_checkpoint(
    trained: Trained,
    evaluation: EvaluationConfig,
    table: Path,
    *,
    games: tuple[str, ...] | None = None,
    decoding: Decoding = "greedy",
    clips: Path | None = None,
) -> None:
    """Evaluates a trained network; the agent's name in the table is its run's.

    Args:
        trained (Trained): what :func:`torchrl_sql.training.load_actor` loaded.
        evaluation (EvaluationConfig): the protocol.
        table (Path): CSV of episodes to add to.

    Keyword Args:
        games (tuple of str, optional): some of the network's games; default all.
        decoding ("greedy" or "sampled"): how actions follow from its outputs.
        clips (Path, optional): folder for a GIF of each game's first episode; existing ones stay.

    Raises:
        ValueError: if the network does not know a game.
    """
    actor, config, gradient_step = trained
    set_num_threads(config)
    actor.to(resolve_device(config.trainer.device))
    games = config.games if games is None else games
    recording = clips is not None and not all((clips / f"{game}.gif").is_file() for game in games)
    recorded = evaluate(
        ActorPolicy(actor),
        config.games,
        evaluation,
        table,
        agent=config.name,
        seed=config.seed,
        gradient_step=gradient_step,
        evaluated_games=games,
        decoding=decoding,
        record_first=recording,
    )
    if clips is not None:
        clips.mkdir(parents=True, exist_ok=True)
        for episode in recorded:
            file = clips / f"{episode.game}.gif"
            temporary = file.with_suffix(".tmp")
            temporary.write_bytes(to_gif(episode))
            os.replace(temporary, file)


def evaluate_constant_actions(
    games: tuple[str, ...], evaluation: EvaluationConfig, table: Path, *, seed: int, num_episodes: int
) -> None:
    """Evaluates each game's legal actions, always the same one: a bar that learning must clear."""
    evaluation = replace(evaluation, num_episodes_per_game=num_episodes)
    for game in games:
        for action in GAMES[game].minimal_actions:
            evaluate(
                constant_policy(action),
                [game],
                evaluation,
                table,
                agent=CONSTANT_AGENT + ACTION_NAMES[action],
                seed=seed,
                gradient_step=0,
            )
