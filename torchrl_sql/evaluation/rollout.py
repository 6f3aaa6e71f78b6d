"""Plays a policy in the emulator: many games and episodes at once, batched into one forward, reproducible by seed.

Two halves of the episodes take turns: while the emulator threads step one, the network decides for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.modules import DistributionalQValueActor, QValueActor

from torchrl_sql.envs import AtariVector
from torchrl_sql.evaluation.episodes import Decoding
from torchrl_sql.games import GAMES, NUM_ACTIONS, legal_action_mask


class Policy(Protocol):
    """What is evaluated: a preference for each of the 18 actions."""

    def __call__(self, observation: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, 4, 84, 84]`` uint8 and ``[B]`` int64 to ``[B, 18]`` float: Q-values or logits."""


class ActorPolicy:
    """The preferences of a TorchRL Q-value actor: its Q-values, or the expectations of its return distributions.

    Args:
        actor (QValueActor or DistributionalQValueActor): reads ``observation`` and ``game_id``, on any device.
    """

    def __init__(self, actor: QValueActor):
        self.actor = actor
        self.support = actor.support if isinstance(actor, DistributionalQValueActor) else None
        self.device = next(actor.parameters()).device

    @torch.inference_mode()
    def __call__(self, observation: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """See :class:`Policy`."""
        batch = TensorDict(observation=observation, game_id=game_id, batch_size=game_id.shape).to(self.device)
        action_value = self.actor(batch)["action_value"]
        if self.support is None:
            return action_value
        return (action_value.exp() * self.support.unsqueeze(-1)).sum(-2)


def constant_policy(action: int) -> Policy:
    """Always the same action, 0..17 (an illegal one acts as NOOP)."""
    preference = torch.nn.functional.one_hot(torch.tensor(action), NUM_ACTIONS).float()
    return lambda observation, game_id: preference.expand(len(game_id), -1)


def random_policy(observation: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
    """No preference: with ``decoding="sampled"``, uniform over the legal actions."""
    return torch.zeros(len(game_id), NUM_ACTIONS)


@dataclass
class Rollout:
    """One finished episode.

    Attributes:
        game (str), episode (int), episode_seed (int): which one.
        episode_return (float): sum of raw rewards.
        length_agent_steps (int): number of actions taken.
        terminated, truncated (bool): how it ended; exactly one is true.
        frames (list of uint8 ``[84, 84]``): the newest frame of each step, if recorded.
        values (list of float): the greedy action's preference at each step, if recorded.
        rewards (list of float): raw reward of each step, if recorded.
    """

    game: str
    episode: int
    episode_seed: int
    episode_return: float = 0.0
    length_agent_steps: int = 0
    terminated: bool = False
    truncated: bool = False
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    values: list[float] = field(default_factory=list, repr=False)
    rewards: list[float] = field(default_factory=list, repr=False)


class _Slot:
    """One emulator and the episode it plays."""

    def __init__(self) -> None:
        self.vector: AtariVector | None = None
        self.rollout: Rollout
        self.noise: _EpisodeNoise
        self.game_id: int
        self.observation: np.ndarray


class _EpisodeNoise:
    """Uniform numbers that depend on the episode's seed and the step only, not on what else is played."""

    def __init__(self, seed: int):
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._block = np.empty((0, 3))

    def at(self, step: int) -> np.ndarray:
        row = step % 512
        if row == 0:
            self._block = self._rng.random((512, 3))
        return self._block[row]


def episode_seed(seed: int, game: str, episode: int) -> int:
    """The emulator seed of an episode, in 0..2^31-1."""
    return int(np.random.SeedSequence([seed, list(GAMES).index(game), episode]).generate_state(1)[0] & 0x7FFFFFFF)


def rollout(
    policy: Policy,
    games: Sequence[str],
    episodes: Sequence[tuple[str, int]],
    *,
    decoding: Decoding = "greedy",
    epsilon: float = 0.001,
    sticky_action_probability: float = 0.25,
    max_env_frames_per_episode: int = 108_000,
    seed: int = 0,
    max_parallel: int = 64,
    record: Callable[[str, int], bool] = lambda game, episode: False,
) -> Iterator[Rollout]:
    """Plays episodes with a policy and yields each as it ends.

    Illegal actions are never chosen: they would act as NOOP.

    Args:
        policy (Policy): what decides.
        games (sequence of str): the policy's games; their order is the meaning of ``game_id``.
        episodes (sequence of (str, int)): games and episode numbers to play; a number stands for the same emulator
            and exploration noise in every evaluation of the same ``seed``.

    Keyword Args:
        decoding ("greedy" or "sampled"): take the most preferred action, or draw from the softmax of preferences.
        epsilon (float): probability of a uniformly random legal action.
        sticky_action_probability (float): see :class:`~torchrl_sql.envs.AtariVector`.
        max_env_frames_per_episode (int): emulator frames after which an episode is truncated.
        seed (int): evaluation seed.
        max_parallel (int): episodes played at a time.
        record (callable): whether to keep the frames of (game, episode).

    Raises:
        ValueError: if an episode's game is not one of ``games``, or a setting is out of range.
    """
    unknown = sorted({game for game, _ in episodes} - set(games))
    if unknown:
        raise ValueError(f"episodes must be of the policy's games ({', '.join(games)}), got {', '.join(unknown)}")
    if decoding not in ("greedy", "sampled"):
        raise ValueError(f"decoding must be greedy or sampled, got {decoding!r}")
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    legal = legal_action_mask(games)
    queue = deque(episodes)

    def start(slot: _Slot) -> None:
        game, episode = queue.popleft()
        if slot.vector is None or slot.vector.game != game:
            slot.vector = AtariVector(
                game,
                1,
                sticky_action_probability=sticky_action_probability,
                max_env_frames_per_episode=max_env_frames_per_episode,
                num_threads=1,
            )
        slot.rollout = Rollout(game, episode, episode_seed(seed, game, episode))
        slot.noise = _EpisodeNoise(slot.rollout.episode_seed)
        slot.game_id = games.index(game)
        slot.observation = slot.vector.reset(np.array([slot.rollout.episode_seed]))[0]

    def send(half: list[_Slot]) -> None:
        observation = torch.from_numpy(np.stack([slot.observation for slot in half]))
        game_id = torch.tensor([slot.game_id for slot in half])
        noise = torch.from_numpy(np.stack([slot.noise.at(slot.rollout.length_agent_steps) for slot in half]))
        preference = policy(observation, game_id).double().cpu().masked_fill(~legal[game_id], -torch.inf)
        actions = _choose(preference, legal[game_id], noise, decoding=decoding, epsilon=epsilon)
        for row, (slot, action) in enumerate(zip(half, actions.numpy(), strict=True)):
            if record(slot.rollout.game, slot.rollout.episode):
                slot.rollout.frames.append(slot.observation[-1].copy())
                slot.rollout.values.append(float(preference[row].max()))
            assert slot.vector is not None
            slot.vector.send(np.array([action]))

    def receive(slot: _Slot) -> bool:
        assert slot.vector is not None
        observation, reward, terminated, truncated = slot.vector.recv()
        slot.observation = observation[0]
        slot.rollout.episode_return += float(reward[0])
        slot.rollout.length_agent_steps += 1
        slot.rollout.terminated, slot.rollout.truncated = bool(terminated[0]), bool(truncated[0])
        if record(slot.rollout.game, slot.rollout.episode):
            slot.rollout.rewards.append(float(reward[0]))
        return bool(terminated[0] or truncated[0])

    halves: list[list[_Slot]] = [[], []]
    for i in range(min(max_parallel, len(queue))):
        slot = _Slot()
        start(slot)
        halves[i % 2].append(slot)
    for half in halves:
        if half:
            send(half)
    while any(halves):
        for half in halves:
            for slot in list(half):
                if receive(slot):
                    yield slot.rollout
                    if queue:
                        start(slot)
                    else:
                        half.remove(slot)
            if half:
                send(half)


def _choose(
    preference_BA: torch.Tensor, legal_BA: torch.Tensor, noise_B3: torch.Tensor, *, decoding: Decoding, epsilon: float
) -> torch.Tensor:
    """Actions int64 ``[B]``; preferences are minus infinity where illegal.

    The noise decides whether to explore, where to, and which sample is drawn.
    """
    explore_B, uniform_B, sample_B = noise_B3.unbind(-1)
    chosen_B = preference_BA.argmax(-1) if decoding == "greedy" else _draw(preference_BA.softmax(-1), sample_B)
    random_B = _draw(legal_BA / legal_BA.sum(-1, keepdim=True), uniform_B)
    return torch.where(explore_B < epsilon, random_B, chosen_B)


def _draw(probability_BA: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first action whose cumulative probability exceeds the uniform number."""
    cumulative_BA = probability_BA.double().cumsum(-1)
    return (cumulative_BA > uniform_B.unsqueeze(-1) * cumulative_BA[:, -1:]).int().argmax(-1)
