"""Plays a policy in the emulator: many games and episodes at once, batched into one forward, reproducible by seed.

Two groups of episodes take turns: while emulator threads step one, the network decides for the other. Every forward has
the same number of rows, filled up where fewer episodes are left: the kernels that torch chooses depend on the batch's
shape, and with the shape fixed a row's outputs do not depend on the other rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.envs.atari import DEFAULT_EMULATOR
from torchrl_sql.envs.context import Context, first_context, next_context
from torchrl_sql.evaluation.policies import check_action_set
from torchrl_sql.games import GAMES, NUM_ACTIONS, legal_action_mask
from torchrl_sql.modules import sample_index

CALIBRATION_INTERVAL_AGENT_STEPS = 50
"""How often the value of an action is kept beside the rewards that follow."""

ROWS_PER_FORWARD = {"cpu": 16, "cuda": 128}
"""By the policy's device: few enough that the last long episodes do not pay for many empty rows."""


@dataclass
class Rollout:
    """One finished episode.

    Attributes:
        game (str): what was played.
        episode (int): number of the episode.
        episode_seed (int): its emulator seed.
        terminated, truncated (bool): how it ended; exactly one is true.
        rewards (list of float): raw reward of each step.
        predictions (list of (int, float)): agent step and value of the action taken there, every 50 steps, if the
            policy writes ``action_value``.
        actions (list of int): of each step, if recorded.
        action_values (list of float32 ``[18]``): of each step, if recorded and written by the policy.
    """

    game: str
    episode: int
    episode_seed: int
    terminated: bool = False
    truncated: bool = False
    rewards: list[float] = field(default_factory=list, repr=False)
    predictions: list[tuple[int, float]] = field(default_factory=list, repr=False)
    actions: list[int] = field(default_factory=list, repr=False)
    action_values: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def episode_return(self) -> float:
        """Sum of the raw rewards."""
        return float(sum(self.rewards))

    @property
    def length_agent_steps(self) -> int:
        """Number of actions taken."""
        return len(self.rewards)


class _EpisodeNoise:
    """Uniform numbers that depend on the episode's seed and the step only, not on what else is played.

    Args:
        seed (SeedSequence): of the stream.
        num_columns (int): numbers per step.
    """

    def __init__(self, seed: np.random.SeedSequence, num_columns: int):
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._block = np.empty((0, num_columns))

    def at(self, step: int) -> np.ndarray:
        row = step % 512
        if row == 0:
            self._block = self._rng.random((512, self._block.shape[1]))
        return self._block[row]


class _Slot:
    """One emulator and the episode it plays."""

    def __init__(self, emulator: Emulator, context_steps: int) -> None:
        self._emulator = emulator
        self._context_steps = context_steps
        self._action = 0
        self._vector: AtariVector | None = None
        self._stepping = False
        self.rollout: Rollout
        self.noise: _EpisodeNoise
        self.return_noise: _EpisodeNoise
        self.context: Context = {}
        self.game_id: int
        self.observation: np.ndarray

    @property
    def game(self) -> str | None:
        """The game whose emulator this is, if there is one yet."""
        return None if self._vector is None else self._vector.game

    def start(self, rollout: Rollout, game_id: int) -> None:
        if self.game != rollout.game:
            self._vector = AtariVector(rollout.game, 1, self._emulator, num_threads=1)
        assert self._vector is not None
        self.rollout, self.game_id = rollout, game_id
        self.noise = _EpisodeNoise(np.random.SeedSequence(rollout.episode_seed), 3)
        # A stream of its own: a fourth column would change what all agents without a choice of return play.
        self.return_noise = _EpisodeNoise(np.random.SeedSequence(rollout.episode_seed, spawn_key=(1,)), 1)
        self.observation = self._vector.reset(np.array([rollout.episode_seed]))[0]
        if self._context_steps:
            self.context = first_context(torch.from_numpy(self.observation[-1]), self._context_steps)

    def send(self, action: int, value: np.ndarray | None, *, recorded: bool) -> None:
        """Starts a step, and keeps what the episode's record needs of the decision."""
        assert self._vector is not None
        step = self.rollout.length_agent_steps
        if value is not None and step % CALIBRATION_INTERVAL_AGENT_STEPS == 0:
            self.rollout.predictions.append((step, float(value[action])))
        if recorded:
            self.rollout.actions.append(action)
            if value is not None:
                self.rollout.action_values.append(value)
        self._action = action
        self._vector.send(np.array([action]))
        self._stepping = True

    def receive(self) -> bool:
        """Waits for the step under way, if any; whether the episode has ended."""
        assert self._vector is not None
        if self._stepping:
            observation, reward, terminated, truncated = self._vector.recv()
            self._stepping = False
            self.observation = observation[0]
            self.rollout.rewards.append(float(reward[0]))
            self.rollout.terminated, self.rollout.truncated = bool(terminated[0]), bool(truncated[0])
            if self._context_steps:
                frame, rewards = torch.from_numpy(self.observation[-1]), torch.tensor(self.rollout.rewards[-1:])
                self.context = next_context(self.context, torch.tensor(self._action), rewards, frame)
        return self.rollout.terminated or self.rollout.truncated


def episode_seed(seed: int, game: str, episode: int) -> int:
    """The emulator seed of an episode, in 0..2^31-1."""
    return int(np.random.SeedSequence([seed, list(GAMES).index(game), episode]).generate_state(1)[0] & 0x7FFFFFFF)


def rollout(
    policy: TensorDictModuleBase,
    games: Sequence[str],
    episodes: Sequence[tuple[str, int]],
    emulator: Emulator = DEFAULT_EMULATOR,
    *,
    epsilon: float = 0.001,
    seed: int = 0,
    num_parallel: int | None = None,
    rows_per_forward: int | None = None,
    num_emulator_threads: int | None = None,
    record: Callable[[str, int], bool] = lambda game, episode: False,
) -> Iterator[Rollout]:
    """Plays episodes with a policy and yields each as it ends.

    Args:
        policy (TensorDictModuleBase): reads any of ``observation`` ``[B, 4, 84, 84]`` uint8, ``game_id`` ``[B]`` int64
            and ``uniform`` ``[B]`` float64 in [0, 1), a random number that depends on evaluation seed, episode and step
            alone; with ``context_steps`` K also ``context``, the last K steps (:func:`torchrl_sql.envs.next_context`),
            and ``return_uniform``, another such number. Writes ``action`` ``[B]`` integers in 0..17 and maybe
            ``action_value`` ``[B, 18]``. Where its parameters are, the batch is put.
        games (sequence of str): the policy's games; their order is the meaning of ``game_id``.
        episodes (sequence of (str, int)): games and episode numbers to play; a number stands for the same emulator
            and exploration noise in every evaluation of the same ``seed``.
        emulator (Emulator): how the games run.

    Keyword Args:
        epsilon (float): probability of a uniformly random legal action in place of the policy's.
        seed (int): evaluation seed.
        num_parallel (int, optional): episodes played at a time; default two forwards in each of the two groups.
        rows_per_forward (int, optional): ``B``; default by the policy's device, 16 or (CUDA) 128. What the network
            computes may depend on it in the last bits.
        num_emulator_threads (int, optional): default one per core.
        record (callable): whether to keep the actions and values of (game, episode).

    Raises:
        ValueError: for a game that the policy does not know, a bad probability, or a policy of another action set.
    """
    for game, _ in episodes:
        if game not in games:
            raise ValueError(f"episodes must be of the policy's games ({', '.join(games)}), got {game}")
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    check_action_set(policy)
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    rows = rows_per_forward or ROWS_PER_FORWARD.get(device.type, ROWS_PER_FORWARD["cuda"])
    num_parallel = num_parallel or 4 * rows
    num_threads = num_emulator_threads or len(os.sched_getaffinity(0))
    legal = legal_action_mask(games)
    queue = deque(episodes)

    def start(slot: _Slot) -> None:
        """In the background: creating or resetting an emulator takes as long as some hundred steps."""
        # The same game again where there is one: its emulator need not be created.
        game, episode = next((key for key in queue if key[0] == slot.game), queue[0])
        queue.remove((game, episode))
        new = Rollout(game, episode, episode_seed(seed, game, episode))
        starting.append((slot, starters.submit(slot.start, new, games.index(game))))

    def join() -> None:
        """Emulators that are ready join the smaller group; when few episodes are left, all share one forward."""
        few = len(queue) + len(starting) + sum(map(len, groups)) <= rows
        if few:
            groups[0].extend(groups[1])
            groups[1].clear()
        while starting and (starting[0][1].done() or not any(groups)):
            slot, started = starting.popleft()
            started.result()
            (groups[0] if few else min(groups, key=len)).append(slot)

    def send(group: list[_Slot]) -> None:
        actions, values = _act(policy, group, legal, epsilon, rows, device)
        for slot, action, value in zip(group, actions.tolist(), values, strict=True):
            slot.send(action, value, recorded=record(slot.rollout.game, slot.rollout.episode))

    def receive(group: list[_Slot]) -> Iterator[Rollout]:
        for slot in list(group):
            if slot.receive():
                group.remove(slot)
                yield slot.rollout
                if queue:
                    start(slot)

    starting: deque[tuple[_Slot, Future[None]]] = deque()
    groups: list[list[_Slot]] = [[], []]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="start") as starters:
        for _ in range(min(num_parallel, len(queue))):
            start(_Slot(emulator, getattr(policy, "context_steps", 0)))
        while starting or any(groups):
            for group in groups:
                join()
                yield from receive(group)
                if group:
                    send(group)


def _act(
    policy: TensorDictModuleBase,
    slots: list[_Slot],
    legal: torch.Tensor,
    epsilon: float,
    rows: int,
    device: torch.device,
) -> tuple[torch.Tensor, list[np.ndarray | None]]:
    """Actions int64 ``[len(slots)]``, the policy's or exploring ones, and the policy's values of each."""
    noise = np.stack([slot.noise.at(slot.rollout.length_agent_steps) for slot in slots])
    game_ids = torch.tensor([slot.game_id for slot in slots])
    decisions = [
        _decide(policy, slots[i : i + rows], noise[i : i + rows, 2], rows, device) for i in range(0, len(slots), rows)
    ]
    explored = sample_index(legal[game_ids], torch.from_numpy(noise[:, 1]))
    actions = torch.cat([action for action, _ in decisions])
    actions = torch.where(torch.from_numpy(noise[:, 0] < epsilon), explored, actions)
    values = [value for action, chunk in decisions for value in ([None] * len(action) if chunk is None else chunk)]
    return actions, values


@torch.inference_mode()
def _decide(
    policy: TensorDictModuleBase,
    slots: list[_Slot],
    uniform: np.ndarray,
    rows: int,
    device: torch.device,
) -> tuple[torch.Tensor, np.ndarray | None]:
    """The policy's actions int64 ``[len(slots)]`` and values float32 ``[len(slots), 18]``, from a batch of ``rows``."""
    number = len(slots)

    def filled(values: Iterable[Any], dtype: torch.dtype) -> torch.Tensor:
        """One row per slot, and zeros."""
        entry = torch.from_numpy(np.stack(list(values))).to(dtype)
        return torch.cat([entry, entry.new_zeros(rows - number, *entry.shape[1:])])

    batch = TensorDict(
        observation=filled([slot.observation for slot in slots], torch.uint8),
        game_id=filled([slot.game_id for slot in slots], torch.int64),
        uniform=filled(uniform, torch.float64),
        batch_size=[rows],
    )
    if slots[0].context:
        keys = slots[0].context
        batch["context"] = {key: filled([slot.context[key] for slot in slots], keys[key].dtype) for key in keys}
        batch["return_uniform"] = filled(
            [slot.return_noise.at(slot.rollout.length_agent_steps)[0] for slot in slots], torch.float64
        )
    out = policy(batch.to(device))
    action = out["action"].cpu()
    if action.shape != (rows,) or action.is_floating_point() or action.dtype == torch.bool:
        raise ValueError(f"the policy's action must be integers [{rows}], got {action.dtype} {tuple(action.shape)}")
    if action.min() < 0 or action.max() >= NUM_ACTIONS:
        raise ValueError(
            f"the policy's action must be in 0..{NUM_ACTIONS - 1}, got {int(action.min())}..{int(action.max())}"
        )
    value = out.get("action_value", None)
    if value is not None and value.shape[-1] != NUM_ACTIONS:
        raise ValueError(f"the policy must have {NUM_ACTIONS} actions, got action_value of shape {tuple(value.shape)}")
    if value is None or value.ndim > 2:  # a distribution over returns ([B, atoms, 18]) is not a value
        return action[:number].long(), None
    return action[:number].long(), value[:number].float().cpu().numpy()
