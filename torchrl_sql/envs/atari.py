"""The emulator, with the one definition of preprocessing: arrays (:class:`AtariVector`), TorchRL (:class:`AtariEnv`).

Preprocessing (Machado et al. 2018; Kumar et al. 2023): 84x84 grayscale, maximum over the last two of four skipped
frames, a stack of four zero-padded at an episode's start, the full set of 18 actions with a game's illegal ones acting
as NOOP, no no-op starts, no automatic FIRE, raw rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_sql.arguments import check_count
from torchrl_sql.envs.console import Settings
from torchrl_sql.envs.consoles import RemoteConsole
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK, NUM_ACTIONS, find_game, legal_action_mask

SCREEN_SHAPE = (210, 160)
"""Height and width of the emulator's picture; its pixels are wide: on a television it is four by three."""


@dataclass(frozen=True, kw_only=True)
class Emulator:
    """How the emulator runs a game: with an episode's seed and actions, all that decides the episode.

    Attributes:
        sticky_action_probability (float): that an emulator frame repeats the previous action instead of the given one;
            0.25 in Machado et al. (2018) and in DQN-Replay.
        max_env_frames (int): emulator frames (four per agent step) after which an episode is truncated.

    Raises:
        TypeError, ValueError: for a probability outside [0, 1], or an episode without a frame.
    """

    sticky_action_probability: float = 0.25
    max_env_frames: int = 108_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.sticky_action_probability <= 1.0:
            raise ValueError(f"sticky_action_probability must be in [0, 1], got {self.sticky_action_probability}")
        check_count("max_env_frames", self.max_env_frames)


DEFAULT_EMULATOR = Emulator()
"""Sticky actions as in the data, 30 minutes of play per episode."""


class AtariVector:
    """``N`` independent copies of one game, or variation of a game, played by other processes.

    A finished copy must be reset by the caller before its next step: there is no hidden automatic reset, so no junk
    step. The same seed gives the same frames, whatever ``num_envs`` is. Each observation is an array of its own, from
    which the next one is made: whoever changes it changes that, too.

    Args:
        game (str): its name, as :func:`torchrl_sql.games.find_game` takes it.
        num_envs (int): number of copies, ``N``.
        emulator (Emulator): how they run.

    Keyword Args:
        num_processes (int): that play them; 0 takes one per core, shared with all other games of this process.
        screen (bool): give the game's picture in colour, uint8 ``[N, 1, 210, 160, 3]``, in place of the observation
            (the maximum over two frames here too, so that flickering objects stay visible).

    Raises:
        ValueError: for an unknown game or no copies.
        ChildProcessError: by all methods, if a process that plays has ended.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        emulator: Emulator = DEFAULT_EMULATOR,
        *,
        num_processes: int = 0,
        screen: bool = False,
    ):
        known = find_game(game)
        self.game = known.name
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        settings = Settings(
            rom=known.rom,
            mode=known.mode,
            difficulty=known.difficulty,
            sticky_action_probability=emulator.sticky_action_probability,
            max_env_frames=emulator.max_env_frames,
            shape=SCREEN_SHAPE if screen else FRAME_SHAPE,
            colour=screen,
        )
        self._consoles = [RemoteConsole(settings, num_processes=num_processes) for _ in range(num_envs)]
        stack = (1, *SCREEN_SHAPE, 3) if screen else (FRAME_STACK, *FRAME_SHAPE)
        self._observation = np.zeros((num_envs, *stack), np.uint8)
        self._finished = np.ones(num_envs, np.bool_)
        legal = legal_action_mask([game])[0].numpy()
        self._emulated_action = np.where(legal, np.arange(NUM_ACTIONS), 0)

    @property
    def runs(self) -> bool:
        """Whether the processes that play do."""
        return all(console.runs for console in self._consoles)

    def reset(self, seeds: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Starts new episodes.

        Args:
            seeds (array): int ``[number of copies reset]`` in 0..2^31-1, one per copy in ascending order.
            mask (array, optional): bool ``[N]``, the copies to reset; default all.

        Returns:
            uint8 ``[N, 4, 84, 84]``: the stacks of all copies, oldest frame first.
        """
        indices = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        seeds = np.asarray(seeds)
        if seeds.shape != indices.shape or (seeds < 0).any() or (seeds >= 2**31).any():
            raise ValueError(
                f"seeds must be {len(indices)} numbers in 0..2^31-1, one per copy that is reset, got {seeds}"
            )
        for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
            self._consoles[index].start(seed)
        self._observation = self._observation.copy()
        self._observation[indices] = 0
        for index in indices.tolist():
            self._consoles[index].receive(self._observation[index, -1])
        self._finished[indices] = False
        return self._observation

    def send(self, actions: np.ndarray) -> None:
        """Starts a step with full-set actions, int ``[N]`` in 0..17, without waiting; :meth:`recv` collects it.

        Raises:
            ValueError: for other actions, and if the episode of a copy has ended. Nothing is started then.
        """
        actions = np.asarray(actions)
        fit = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        if not fit or not ((actions >= 0) & (actions < NUM_ACTIONS)).all():
            raise ValueError(
                f"actions must be integers [{self.num_envs}] in 0..{NUM_ACTIONS - 1}, got {actions.dtype} "
                f"{list(actions.shape)}: {actions}"
            )
        if self._finished.any():
            finished = np.flatnonzero(self._finished)
            raise ValueError(f"copies must be reset before a step, got {finished} without an episode")
        for console, action in zip(self._consoles, self._emulated_action[actions].tolist(), strict=True):
            console.act(action)

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Waits for the step started by :meth:`send`.

        Returns:
            observation uint8 ``[N, 4, 84, 84]``, raw reward int32 ``[N]``, terminated bool ``[N]``, truncated bool
            ``[N]``. The observation of a finished copy is its episode's last.
        """
        observation = np.empty_like(self._observation)
        observation[:, :-1] = self._observation[:, 1:]
        answers = [console.receive(observation[i, -1]) for i, console in enumerate(self._consoles)]
        self._observation = observation
        reward, terminated, truncated = (np.array(column) for column in zip(*answers, strict=True))
        self._finished = terminated | truncated
        return observation, reward.astype(np.int32), terminated, truncated

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """:meth:`send` followed by :meth:`recv`."""
        self.send(actions)
        return self.recv()


def replay_episode(
    game: str, seed: int, actions: Sequence[int], emulator: Emulator
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Plays the actions of a known episode again, which gives the same episode, to look at it.

    Args:
        game (str): its game.
        seed (int): its emulator seed.
        actions (sequence of int): its actions, 0..17.
        emulator (Emulator): as it was played.

    Yields:
        for each action: the observation uint8 ``[4, 84, 84]`` and the screen uint8 ``[210, 160, 3]`` on which it was
        taken, and the raw reward that followed.
    """
    views = [AtariVector(game, 1, emulator, screen=screen) for screen in (False, True)]
    observation, screen = (view.reset(np.array([seed]))[0] for view in views)
    for action in actions:
        for view in views:
            view.send(np.array([action]))
        (next_observation, reward, _, _), (next_screen, _, _, _) = (view.recv() for view in views)
        yield observation, screen[0], float(reward[0])
        observation, screen = next_observation[0], next_screen[0]


class AtariEnv(EnvBase):
    """``N`` copies of one Atari game as a batched TorchRL environment (batch size ``[N]``).

    Writes ``observation`` uint8 ``[N, 4, 84, 84]``, ``game_id`` int64 ``[N]``, raw ``reward`` float32 ``[N, 1]``,
    ``terminated`` (game over), ``truncated`` (at the frame limit) and ``done`` bool ``[N, 1]``; reads ``action`` int64
    ``[N]`` in 0..17. ``set_seed``, or ``reset(seed=...)``, makes every later episode reproducible.

    Args:
        game (str): its name, as :func:`torchrl_sql.games.find_game` takes it.
        num_envs (int): number of copies, ``N``.
        emulator (Emulator): how they run.

    Keyword Args:
        game_id (int): what to write under ``game_id``: the game's place in the policy's list of games.
        num_processes (int): see :class:`AtariVector`.
        device (torch.device or str): where tensors are written and actions read; emulation is on the CPU.

    Examples:
        >>> env = AtariEnv("Breakout", 2)
        >>> env.rollout(3)["next", "observation"].shape
        torch.Size([2, 3, 4, 84, 84])
    """

    def __init__(
        self,
        game: str,
        num_envs: int = 1,
        emulator: Emulator = DEFAULT_EMULATOR,
        *,
        game_id: int = 0,
        num_processes: int = 0,
        device: torch.device | str = "cpu",
    ):
        super().__init__(device=device, batch_size=[num_envs])
        self._vector = AtariVector(game, num_envs, emulator, num_processes=num_processes)
        self._rng = np.random.default_rng()
        self._game_id = torch.full((num_envs,), game_id, dtype=torch.int64)
        self.observation_spec = Composite(
            observation=Bounded(0, 255, shape=(num_envs, FRAME_STACK, *FRAME_SHAPE), dtype=torch.uint8),
            game_id=Unbounded(shape=(num_envs,), dtype=torch.int64),
            shape=(num_envs,),
        )
        self.action_spec = Categorical(NUM_ACTIONS, shape=(num_envs,), dtype=torch.int64)
        self.reward_spec = Unbounded(shape=(num_envs, 1), dtype=torch.float32)
        self.done_spec = Composite(
            {key: Binary(1, shape=(num_envs, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")},
            shape=(num_envs,),
        )

    def _set_seed(self, seed: int | None) -> None:
        self._rng = np.random.default_rng(seed)

    def _observe(self, observation: np.ndarray, **entries: torch.Tensor) -> TensorDict:
        return TensorDict(
            observation=torch.tensor(observation),
            game_id=self._game_id.clone(),
            **entries,
            batch_size=self.batch_size,
        ).to(self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, *, seed: int | None = None) -> TensorDictBase:
        if seed is not None:
            self._set_seed(seed)
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = np.ones(self.batch_size, dtype=np.bool_) if mask is None else mask.reshape(self.batch_size).cpu().numpy()
        seeds = self._rng.integers(0, 2**31 - 1, size=int(mask.sum()))
        return self._observe(self._vector.reset(seeds, mask))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation, reward, terminated, truncated = self._vector.step(tensordict["action"].cpu().numpy())
        return self._observe(
            observation,
            reward=torch.from_numpy(reward).float().unsqueeze(-1),
            terminated=torch.from_numpy(terminated).unsqueeze(-1),
            truncated=torch.from_numpy(truncated).unsqueeze(-1),
            done=torch.from_numpy(terminated | truncated).unsqueeze(-1),
        )
