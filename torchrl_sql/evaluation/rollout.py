"""Plays a policy in the emulator: many games and episodes at once, batched into one forward, reproducible by seed.

Episodes take turns, the one that waits longest first: while emulator threads step some, the network decides for others.
Every forward has the same number of rows, filled up where fewer episodes are left: the kernels that torch chooses
depend on the batch's shape, and with the shape fixed a row's outputs do not depend on the other rows. No more episodes
are under way than two forwards decide for, so that the first are over, and kept, early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from torchrl_sql.arguments import check_count
from torchrl_sql.envs import Emulator
from torchrl_sql.envs.atari import DEFAULT_EMULATOR
from torchrl_sql.envs.context import Context, first_context, next_context
from torchrl_sql.envs.slots import Slot, Slots
from torchrl_sql.evaluation.policies import check_action_set
from torchrl_sql.games import NUM_ACTIONS, find_game, legal_action_mask, place_of
from torchrl_sql.modules import sample_index

CALIBRATION_INTERVAL_AGENT_STEPS = 50
"""How often the value of an action is kept beside the rewards that follow."""

ROWS_PER_FORWARD = {"cpu": 16, "cuda": 128}
"""By the policy's device: few enough that the last long episodes do not pay for many empty rows."""
ROWS_WITHOUT_PARAMETERS = 4
"""Without a network a forward costs little: emulators need not wait until many others have answered."""


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


class _Playing:
    """An episode under way: its record, its noise, and what the agent remembers of it."""

    def __init__(self, rollout: Rollout, game_id: int, *, recorded: bool) -> None:
        self.rollout, self.game_id, self.recorded = rollout, game_id, recorded
        self.noise = _EpisodeNoise(np.random.SeedSequence(rollout.episode_seed), 3)
        # A stream of its own: a fourth column would change what all agents without a choice of return play.
        self.return_noise = _EpisodeNoise(np.random.SeedSequence(rollout.episode_seed, spawn_key=(1,)), 1)
        self.context: Context = {}
        self._action: int | None = None

    def decided(self, action: int, value: np.ndarray | None) -> None:
        """Keeps what the episode's record needs of a decision."""
        step = self.rollout.length_agent_steps
        if value is not None and step % CALIBRATION_INTERVAL_AGENT_STEPS == 0:
            self.rollout.predictions.append((step, float(value[action])))
        if self.recorded:
            self.rollout.actions.append(action)
            if value is not None:
                self.rollout.action_values.append(value)
        self._action = action

    def saw(self, slot: Slot[_Playing], context_steps: int) -> bool:
        """Takes in what the slot shows; whether the episode has ended."""
        frame = torch.from_numpy(slot.observation[-1])
        if self._action is None:
            self.context = first_context(frame, context_steps) if context_steps else {}
            return False
        self.rollout.rewards.append(slot.reward)
        self.rollout.terminated, self.rollout.truncated = slot.terminated, slot.truncated
        if context_steps:
            self.context = next_context(self.context, torch.tensor(self._action), torch.tensor([slot.reward]), frame)
        return slot.terminated or slot.truncated


def episode_seed(seed: int, game: str, episode: int) -> int:
    """The emulator seed of an episode, in 0..2^31-1."""
    return int(np.random.SeedSequence([seed, *find_game(game).seed_key, episode]).generate_state(1)[0] & 0x7FFFFFFF)


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
    record: Callable[[str, int], bool] = lambda game, episode: False,
    on_decision: Callable[[], None] = lambda: None,
) -> Iterator[Rollout]:
    """Plays episodes with a policy and yields each as it ends.

    Args:
        policy (TensorDictModuleBase): reads any of ``observation`` ``[B, 4, 84, 84]`` uint8, ``game_id`` ``[B]`` int64
            and ``uniform`` ``[B]`` float64 in [0, 1), a random number that depends on evaluation seed, episode and step
            alone; with ``context_steps`` K also ``context``, the last K steps (:func:`torchrl_sql.envs.next_context`),
            and ``return_uniform``, another such number. Writes ``action`` ``[B]`` integers in 0..17 and maybe
            ``action_value`` ``[B, 18]``. Where its parameters are, the batch is put.
        games (sequence of str): the policy's games; their order is the meaning of ``game_id``. A variation that is not
            among them is played as its game.
        episodes (sequence of (str, int)): games and episode numbers to play; a number stands for the same emulator
            and exploration noise in every evaluation of the same ``seed``.
        emulator (Emulator): how the games run.

    Keyword Args:
        epsilon (float): probability of a uniformly random legal action in place of the policy's.
        seed (int): evaluation seed.
        num_parallel (int, optional): episodes played at a time; default two forwards of a network.
        rows_per_forward (int, optional): ``B``; default by the policy's device, 16 or (CUDA) 128, and 4 without
            parameters. What a network computes may depend on it in the last bits.
        record (callable): whether to keep the actions and values of (game, episode).
        on_decision (callable): is called before each forward; what it raises ends the rollout.

    Raises:
        TypeError, ValueError: for a game that the policy does not know, a bad probability or number, or a policy of
            another action set.
    """
    for name, number in (("num_parallel", num_parallel), ("rows_per_forward", rows_per_forward)):
        if number is not None:
            check_count(name, number)
    for game, _ in episodes:
        if place_of(game, games) is None:
            raise ValueError(
                f"episodes must be of the policy's games ({', '.join(games)}) or variations of them, got {game}"
            )
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    check_action_set(policy)
    parameter = next(policy.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    network_rows = rows_per_forward or ROWS_PER_FORWARD.get(device.type, ROWS_PER_FORWARD["cuda"])
    rows = rows_per_forward or (ROWS_WITHOUT_PARAMETERS if parameter is None else network_rows)
    context_steps = getattr(policy, "context_steps", 0)
    legal = legal_action_mask(games)
    queue = deque(episodes)

    def start(slot: Slot[_Playing] | None = None) -> None:
        # The same game again where there is one: its emulator is at hand.
        game, episode = next((key for key in queue if slot is not None and key[0] == slot.game), queue[0])
        queue.remove((game, episode))
        new = Rollout(game, episode, episode_seed(seed, game, episode))
        place = place_of(game, games)
        assert place is not None
        playing = _Playing(new, place, recorded=record(game, episode))
        slots.start(playing, game, new.episode_seed, slot=slot)

    with Slots[_Playing](emulator) as slots:
        for _ in range(min(num_parallel or 2 * network_rows, len(queue))):
            start()
        while slots:
            batch: list[Slot[_Playing]] = []
            while len(batch) < rows and (slot := slots.next(wait=not batch)) is not None:
                if not slot.episode.saw(slot, context_steps):
                    batch.append(slot)
                    continue
                yield slot.episode.rollout
                if queue:
                    start(slot)
            if batch:
                on_decision()
                actions, values = _act(policy, batch, legal, epsilon, rows, device)
                for slot, action, value in zip(batch, actions.tolist(), values, strict=True):
                    slot.episode.decided(action, value)
                    slots.send(slot, action)


def _act(
    policy: TensorDictModuleBase,
    slots: list[Slot[_Playing]],
    legal: torch.Tensor,
    epsilon: float,
    rows: int,
    device: torch.device,
) -> tuple[torch.Tensor, Sequence[np.ndarray | None]]:
    """Actions int64 ``[len(slots)]``, the policy's or exploring ones, and the policy's values of each."""
    noise = np.stack([slot.episode.noise.at(slot.episode.rollout.length_agent_steps) for slot in slots])
    game_ids = torch.tensor([slot.episode.game_id for slot in slots])
    actions, values = _decide(policy, slots, noise[:, 2], rows, device)
    explored = sample_index(legal[game_ids], torch.from_numpy(noise[:, 1]))
    actions = torch.where(torch.from_numpy(noise[:, 0] < epsilon), explored, actions)
    return actions, [None] * len(slots) if values is None else list(values)


@torch.inference_mode()
def _decide(
    policy: TensorDictModuleBase,
    slots: list[Slot[_Playing]],
    uniform: np.ndarray,
    rows: int,
    device: torch.device,
) -> tuple[torch.Tensor, np.ndarray | None]:
    """The policy's actions int64 ``[len(slots)]`` and values float32 ``[len(slots), 18]``, from a batch of ``rows``."""
    number = len(slots)

    def filled(values: Sequence[Any] | np.ndarray, dtype: type[np.generic]) -> torch.Tensor:
        """One row per slot, and zeros."""
        entry = np.zeros((rows, *np.shape(values[0])), dtype)
        for row, value in enumerate(values):
            entry[row] = value
        return torch.from_numpy(entry)

    playing = [slot.episode for slot in slots]
    batch = TensorDict(
        observation=filled([slot.observation for slot in slots], np.uint8),
        game_id=filled([one.game_id for one in playing], np.int64),
        uniform=filled(uniform, np.float64),
        batch_size=[rows],
    )
    if playing[0].context:
        contexts = {key: [one.context[key].numpy() for one in playing] for key in playing[0].context}
        batch["context"] = {key: filled(values, values[0].dtype.type) for key, values in contexts.items()}
        steps = [one.rollout.length_agent_steps for one in playing]
        uniforms = [one.return_noise.at(step)[0] for one, step in zip(playing, steps, strict=True)]
        batch["return_uniform"] = filled(uniforms, np.float64)
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
