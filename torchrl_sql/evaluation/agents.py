"""Agents that are evaluated: trained networks, random play, always one action."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase

from torchrl_sql.config import compose_run_config
from torchrl_sql.evaluation.clips import find_clip, write_clip
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy, digest_of_weights
from torchrl_sql.evaluation.protocol import WHOLE, AgentId, Decoding, Protocol, Share
from torchrl_sql.evaluation.rollout import Rollout
from torchrl_sql.evaluation.runner import evaluate
from torchrl_sql.games import ACTION_NAMES, find_game
from torchrl_sql.methods import make_method
from torchrl_sql.statistics.intervals import interquartile_mean
from torchrl_sql.statistics.scores import human_normalised, split_by_reference
from torchrl_sql.training.checkpoint import list_checkpoints, mark_best
from torchrl_sql.training.device import prepare_cpu, resolve_device, tune
from torchrl_sql.training.policy import POLICY_FILE, find_checkpoint, load_agent, read_policy


class Agent:
    """What can be evaluated.

    Args:
        id (AgentId): who it is in the tables.
        policy (TensorDictModuleBase): how it plays, as :func:`torchrl_sql.evaluation.runner.evaluate` takes it.
        policy_games (sequence of str): those it can play, in the order of the policy's ``game_id``.

    Keyword Args:
        games (sequence of str, optional): those it plays; default all that it can.
        protocol (Protocol, optional): how it is evaluated unless told otherwise; default
            ``configs/evaluation/sticky.yaml``.
        gamma (float, optional): discount of its training, if its outputs are values.
        run_dir (Path, optional): the folder of the run that it is a checkpoint of.
        usual_decoding (str): the one by which checkpoints of its run are compared.
    """

    def __init__(
        self,
        id: AgentId,
        policy: TensorDictModuleBase,
        policy_games: Sequence[str],
        *,
        games: Sequence[str] | None = None,
        protocol: Protocol | None = None,
        gamma: float | None = None,
        run_dir: Path | None = None,
        usual_decoding: str = "greedy",
    ) -> None:
        self.id = id
        self.policy = policy
        self.policy_games = tuple(policy_games)
        self.games = self.policy_games if games is None else tuple(games)
        self.protocol = protocol or _protocol_without_run()
        self.gamma = gamma
        self.usual_decoding = usual_decoding
        self.run_dir = run_dir

    def evaluate(
        self,
        folder: Path,
        *,
        protocol: Protocol | None = None,
        share: Share = WHOLE,
        clips: Path | None = None,
        clip_episode: int = 0,
        on_decision: Callable[[], None] = lambda: None,
    ) -> list[EpisodeResult]:
        """Plays, and adds each finished episode to the tables of ``folder``.

        Args:
            folder (Path): of the tables.

        Keyword Args:
            protocol (Protocol, optional): in place of its own.
            share (Share): which share of the episodes to play.
            clips (Path, optional): folder for a clip of one episode of each game; existing ones stay.
            clip_episode (int): which one, from 0.
            on_decision (callable): is called often; what it raises ends the evaluation, which can be continued.

        Raises:
            ValueError: as :func:`torchrl_sql.evaluation.runner.evaluate` does, and for an episode that is not played.
        """
        protocol = protocol or self.protocol
        if not 0 <= clip_episode < protocol.num_episodes:
            raise ValueError(
                f"the episode of a clip must be one of the {protocol.num_episodes} played per game, from 0, got "
                f"{clip_episode}"
            )

        def has_clip(game: str) -> bool:
            return clips is None or find_clip(clips, game, self.id, clip_episode) is not None

        def draw(played: Rollout) -> None:
            assert clips is not None
            values = "logits" if self.gamma is None else "Q-values"
            write_clip(played, clips, self.id, protocol.emulator, value_name=values)

        return evaluate(
            self.policy,
            self.games,
            protocol,
            agent=self.id,
            policy_games=self.policy_games,
            gamma=self.gamma if self.id.decoding == "greedy" else None,
            folder=folder,
            share=share,
            recorded=[(game, clip_episode) for game in self.games if not has_clip(game)],
            on_recorded=draw,
            on_decision=on_decision,
        )

    def mark_if_best(self, episodes: Sequence[EpisodeResult]) -> bool:
        """Records this checkpoint as its run's best so far, if it is; training never deletes the best.

        The score is the human-normalised interquartile mean over its policy's games that have a human score.

        Args:
            episodes (sequence of EpisodeResult): of this agent.

        Returns:
            Whether it is the best now. It cannot be by another decoding than the usual one, under another protocol than
            the run's, without one of its games, or by fewer episodes.
        """
        means = self._comparable_means(episodes)
        scores = [] if means is None else _normalised(means)
        if self.run_dir is None or not scores:
            return False
        return mark_best(self.run_dir, self.id.gradient_step, float(interquartile_mean(np.array(scores))))

    def scores(self, episodes: Sequence[EpisodeResult]) -> dict[str, float]:
        """What the logs of its run keep of an evaluation.

        Args:
            episodes (sequence of EpisodeResult): of this agent.

        Returns:
            ``return_GAME``, the mean return, and ``human_normalised_mean`` over the games that have a human score.
            Empty unless checkpoints of the run are compared by it, see :meth:`mark_if_best`.
        """
        means = self._comparable_means(episodes)
        if means is None:
            return {}
        scores = {f"return_{game}": mean for game, mean in means.items()}
        normalised = _normalised(means)
        return scores | ({"human_normalised_mean": fmean(normalised)} if normalised else {})

    def _comparable_means(self, episodes: Sequence[EpisodeResult]) -> dict[str, float] | None:
        """Mean return by game, if checkpoints of its run are compared by it."""
        if self.run_dir is None or self.id.decoding != self.usual_decoding:
            return None
        protocol = self.protocol
        returns: dict[str, list[float]] = {game: [] for game in self.policy_games}
        for row in episodes:
            if (row.emulator, row.epsilon, row.evaluation_seed) != (protocol.emulator, protocol.epsilon, protocol.seed):
                return None
            if row.game in returns:  # not a variation of one
                returns[row.game].append(row.episode_return)
        if any(len(values) < protocol.num_episodes for values in returns.values()):
            return None
        return {game: fmean(values) for game, values in returns.items()}


def _normalised(means: Mapping[str, float]) -> list[float]:
    """Human-normalised scores of the games that have a human score."""
    scored, _ = split_by_reference(tuple(means), "human")
    return [human_normalised(means[game], game) for game in scored]


@cache
def _protocol_without_run() -> Protocol:
    run = compose_run_config(["scale=paper", "evaluation=sticky", "data.store=unused"])
    return Protocol.from_config(run.evaluation)


class TrainedAgent(Agent):
    """A trained network, under its run's name and protocol.

    Args:
        path (Path): a checkpoint, a run's folder (its newest checkpoint is taken, or its policy's file if all
            checkpoints were deleted), or a ``.safetensors`` file as :func:`torchrl_sql.training.export_policy` writes
            it.

    Keyword Args:
        games (sequence of str, optional): some of its games, or variations of them; default all its games.
        decoding (str, optional): how actions follow from its outputs; default its method's usual one.
        device (str, optional): ``cpu``, ``cuda`` or ``auto``; default as in training.

    Raises:
        FileNotFoundError, CheckpointError: if there is no usable checkpoint.
    """

    def __init__(
        self,
        path: Path,
        *,
        games: Sequence[str] | None = None,
        decoding: Decoding | None = None,
        device: str | None = None,
    ) -> None:
        run_dir = path if path.is_dir() else path.parent if path.name == POLICY_FILE else path.parent.parent
        if path.is_dir() and not list_checkpoints(path / "checkpoints") and (path / POLICY_FILE).is_file():
            path = path / POLICY_FILE
        if path.suffix == ".safetensors":
            network, config, gradient_step = read_policy(path)
        else:
            path = find_checkpoint(path)
            network, config, gradient_step = load_agent(path)
        method = make_method(config.method)
        if method.values == "none":
            raise ValueError(f"{path} must hold a network that acts, got one of method {config.method.name!r}")
        usual = config.method.decodings[0]
        prepare_cpu(config.num_threads)  # as in training: the last bits of outputs depend on it
        agent = AgentId(
            name=config.name,
            training_seed=config.seed,
            gradient_step=gradient_step,
            decoding=decoding or cast(Decoding, usual),
            checkpoint=digest_of_weights(network),
        )
        place = resolve_device(device or config.trainer.device)
        tune(place, try_algorithms=False)  # an episode that is played again must end as before
        network.to(place)
        in_run = (run_dir / "config.yaml").is_file() and (path.parent.name == "checkpoints" or path.parent == run_dir)
        super().__init__(
            agent,
            method.policy(network, config.games, decoding=agent.decoding),
            config.games,
            games=games,
            protocol=Protocol.from_config(config.evaluation),
            gamma=method.gamma if method.values == "q" else None,
            run_dir=run_dir if in_run else None,
            usual_decoding=usual,
        )


def evaluate_checkpoint(checkpoint: Path, on_decision: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Plays a checkpoint of a run into the run's tables; torch's random states and settings stay as they are.

    Args:
        checkpoint (Path): in the folder of the run.
        on_decision (callable): is called often; what it raises ends the evaluation, which can be continued.

    Returns:
        Its :meth:`Agent.scores`.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    tries_algorithms = torch.backends.cudnn.benchmark
    try:
        with torch.random.fork_rng(devices):  # a network is made before it is loaded
            agent = TrainedAgent(checkpoint)
            if agent.run_dir is None:
                raise ValueError(f"{checkpoint} must be in the folder of a run, which has config.yaml")
            episodes = agent.evaluate(agent.run_dir, on_decision=on_decision)
    finally:
        torch.backends.cudnn.benchmark = tries_algorithms
    agent.mark_if_best(episodes)
    return agent.scores(episodes)


def find_runs(path: Path) -> list[Path]:
    """A checkpoint, or the folder of a run, itself; of any other folder the runs in it, e.g. of a study.

    Raises:
        FileNotFoundError: if there is none.
    """
    if path.is_file() or _holds_network(path):
        return [path]
    names = ("checkpoints", POLICY_FILE)
    folders = {
        found.parent for depth in ("*", "*/*", "*/*/*") for name in names for found in path.glob(f"{depth}/{name}")
    }
    if runs := sorted(filter(_holds_network, folders)):
        return runs
    raise FileNotFoundError(
        f"{path} must be a checkpoint, the folder of a trained run or one that holds such folders, found no checkpoint "
        f"and no {POLICY_FILE}"
    )


def _holds_network(folder: Path) -> bool:
    has_policy = (folder / POLICY_FILE).is_file() and (folder / "config.yaml").is_file()
    return has_policy or bool(list_checkpoints(folder / "checkpoints"))


class RandomAgent(Agent):
    """Uniform over each game's legal actions."""

    def __init__(self, games: Sequence[str]) -> None:
        super().__init__(AgentId(name="random", decoding="sampled"), RandomPolicy(games), games)


class ConstantAgent(Agent):
    """Always the same action, named after it, e.g. ``constant_UP``: a bar that learning must clear.

    Args:
        action (int): 0..17; where a game does not know it, it acts as NOOP.
        games (sequence of str): what to play.

    Keyword Args:
        name (str, optional): in place of the action's.
    """

    _PREFIX = "constant_"

    def __init__(self, action: int, games: Sequence[str], *, name: str | None = None) -> None:
        super().__init__(AgentId(name=name or self._PREFIX + ACTION_NAMES[action]), ConstantPolicy(action), games)

    @classmethod
    def action_of(cls, name: str) -> int | None:
        """The action that an agent of this name always takes; None for other agents' names."""
        action = name.removeprefix(cls._PREFIX)
        return ACTION_NAMES.index(action) if action != name and action in ACTION_NAMES else None


def make_agents(
    word: str, games: Sequence[str] | None = None, *, decoding: Decoding | None = None, device: str | None = None
) -> Iterator[Agent]:
    """The agents that a word of the command line stands for.

    Args:
        word (str): a run's folder, one that holds runs, a checkpoint, a policy's file, ``random``, ``noop``,
            ``constant_ACTION``, or ``constant``: each legal action of each game.
        games (sequence of str, optional): what is played; a trained network plays all of its games by default.

    Keyword Args:
        decoding (str, optional): of a trained network.
        device (str, optional): likewise.

    Yields:
        One agent, or one per run in a folder, or with ``constant`` one per action, each with the games that know it.

    Raises:
        ValueError: without games where they are needed.
        FileNotFoundError, CheckpointError: if it is none of the words, and no usable checkpoint.
    """
    action = ConstantAgent.action_of(word)
    if word not in ("random", "noop", "constant") and action is None:
        for path in find_runs(Path(word)):
            yield TrainedAgent(path, games=games, decoding=decoding, device=device)
        return
    if games is None:
        raise ValueError(f"{word} needs --games and --out, having no run: e.g. --games all --out runs/{word}")
    if word == "random":
        yield RandomAgent(games)
    elif word == "noop":
        yield ConstantAgent(0, games, name="noop")
    elif action is not None:
        yield ConstantAgent(action, games)
    else:
        for action in range(len(ACTION_NAMES)):
            if knowing := [game for game in games if action in find_game(game).minimal_actions]:
                yield ConstantAgent(action, knowing)
