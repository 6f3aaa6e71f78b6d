"""Agents that are evaluated: trained networks, random play, always one action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from torchrl_sql.config import EvaluationConfig, QLearningConfig
from torchrl_sql.evaluation.clips import find_clip, write_clip
from torchrl_sql.evaluation.episodes import Decoding, EpisodeResult
from torchrl_sql.evaluation.policies import ConstantPolicy, NetworkPolicy, RandomPolicy, digest_of_weights
from torchrl_sql.evaluation.rollout import Rollout
from torchrl_sql.evaluation.runner import evaluate
from torchrl_sql.evaluation.share import WHOLE, Shard
from torchrl_sql.games import ACTION_NAMES, GAMES
from torchrl_sql.statistics.aggregates import interquartile_mean
from torchrl_sql.statistics.scores import human_normalised, split_by_reference
from torchrl_sql.training.build import Trained, resolve_device, set_num_threads
from torchrl_sql.training.checkpoint import mark_best

CONSTANT_AGENT = "constant_"
"""Prefix of the names of agents that always take one action, e.g. ``constant_UP``."""

SIMPLE_PROTOCOL = EvaluationConfig(
    num_episodes_per_game=16,
    epsilon=0.001,
    sticky_action_probability=0.25,
    max_env_frames_per_episode=108_000,
    seed=0,
)
"""How agents without a run are evaluated unless told otherwise: that of configs/evaluation/sticky.yaml."""


def evaluate_checkpoint(
    trained: Trained,
    evaluation: EvaluationConfig,
    folder: Path,
    *,
    games: Sequence[str] | None = None,
    decoding: Decoding = "greedy",
    device: str | None = None,
    shard: Shard = WHOLE,
    clips: Path | None = None,
) -> list[EpisodeResult]:
    """Evaluates a trained network; the agent's name in the tables is its run's.

    Args:
        trained (Trained): what :func:`torchrl_sql.training.load_actor` loaded.
        evaluation (EvaluationConfig): the protocol.
        folder (Path): of the tables to add to.

    Keyword Args:
        games (sequence of str, optional): some of the network's games; default all.
        decoding ("greedy" or "sampled"): how actions follow from its outputs.
        device (str, optional): ``cpu``, ``cuda`` or ``auto``; default as in training.
        shard (Shard): which share of the episodes to play.
        clips (Path, optional): folder for a clip of each game's first episode; existing ones stay.

    Raises:
        ValueError: as :func:`torchrl_sql.evaluation.runner.evaluate` does.
    """
    actor, config, gradient_step = trained
    set_num_threads(config)
    digest = digest_of_weights(actor)
    actor.to(resolve_device(device or config.trainer.device))
    games = config.games if games is None else games
    has_values = isinstance(config.method, QLearningConfig)
    who: dict[str, Any] = {
        "agent": config.name,
        "training_seed": config.seed,
        "gradient_step": gradient_step,
        "decoding": decoding,
    }

    def draw(episode: Rollout) -> None:
        assert clips is not None
        write_clip(
            episode,
            clips,
            **who,
            value_name="Q-values" if has_values else "logits",
            sticky_action_probability=evaluation.sticky_action_probability,
            max_env_frames_per_episode=evaluation.max_env_frames_per_episode,
        )

    return evaluate(
        NetworkPolicy(actor, config.games, decoding=decoding),
        games,
        **who,
        checkpoint=digest,
        policy_games=config.games,
        gamma=config.method.gamma if isinstance(config.method, QLearningConfig) and decoding == "greedy" else None,
        shard=shard,
        folder=folder,
        recorded_games=() if clips is None else [game for game in games if find_clip(clips, game, **who) is None],
        on_recorded=draw,
        **_protocol(evaluation),
    )


def mark_if_best(run_dir: Path, trained: Trained, episodes: Sequence[EpisodeResult]) -> bool:
    """Marks a checkpoint as its run's best, which training never deletes, if it scores highest so far.

    The score is the human-normalised interquartile mean over the network's games that have a human score.

    Args:
        run_dir (Path): folder of the run whose checkpoint it is.
        trained (Trained): the checkpoint.
        episodes (sequence of EpisodeResult): all of its greedy episodes in all of its games, under the run's protocol.

    Returns:
        Whether it is the best now. It cannot be with fewer episodes of a game than the run's protocol has.
    """
    counts = Counter(each.game for each in episodes)
    if any(counts[game] < trained.config.evaluation.num_episodes_per_game for game in trained.config.games):
        return False
    scored, _ = split_by_reference(trained.config.games, "human")
    if not scored:
        return False
    returns = {game: [each.episode_return for each in episodes if each.game == game] for game in scored}
    scores = np.array([[human_normalised(fmean(returns[game]), game) for game in scored]])
    return mark_best(run_dir, trained.gradient_step, float(interquartile_mean(scores)))


def evaluate_simple_agent(
    name: str,
    games: Sequence[str],
    evaluation: EvaluationConfig,
    folder: Path,
    *,
    training_seed: int = 0,
    shard: Shard = WHOLE,
) -> list[EpisodeResult]:
    """Evaluates an agent that needs no training: the bars that learning must clear, and a check of published scores.

    Args:
        name (str): ``random`` (uniform over the legal actions), ``noop``, or ``constant_`` and an action, e.g.
            ``constant_UP``.
        games (sequence of str): what to play.
        evaluation (EvaluationConfig): the protocol.
        folder (Path): of the table to add to.

    Keyword Args:
        training_seed (int): ``seed`` in the table.
        shard (Shard): which share of the episodes to play.
    """
    action = "NOOP" if name == "noop" else name.removeprefix(CONSTANT_AGENT)
    if name != "random" and action not in ACTION_NAMES:
        raise ValueError(f"a simple agent must be random, noop or {CONSTANT_AGENT}ACTION, got {name!r}")
    return evaluate(
        RandomPolicy(games) if name == "random" else ConstantPolicy(ACTION_NAMES.index(action)),
        games,
        agent=name,
        training_seed=training_seed,
        decoding="sampled" if name == "random" else "greedy",
        shard=shard,
        folder=folder,
        **_protocol(evaluation),
    )


def evaluate_constant_actions(
    games: Sequence[str], evaluation: EvaluationConfig, folder: Path, *, seed: int, num_episodes: int
) -> None:
    """Evaluates each game's legal actions, always the same one: a bar that learning must clear."""
    evaluation = replace(evaluation, num_episodes_per_game=num_episodes)
    for game in games:
        for action in GAMES[game].minimal_actions:
            name = CONSTANT_AGENT + ACTION_NAMES[action]
            evaluate_simple_agent(name, [game], evaluation, folder, training_seed=seed)


def _protocol(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Arguments of :func:`evaluate`."""
    return {
        "num_episodes": evaluation.num_episodes_per_game,
        "epsilon": evaluation.epsilon,
        "sticky_action_probability": evaluation.sticky_action_probability,
        "max_env_frames_per_episode": evaluation.max_env_frames_per_episode,
        "seed": evaluation.seed,
    }
