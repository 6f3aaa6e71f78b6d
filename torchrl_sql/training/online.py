"""A replay buffer that plays: before each batch it sees to it that the steps owed by then have been played."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from torchrl_sql.arguments import check_count, check_number
from torchrl_sql.data import FrameStore, OfflineAtariReplay, Recording
from torchrl_sql.data.growing import GrowingStore
from torchrl_sql.envs.lockstep import Lockstep, PlayedEpisode
from torchrl_sql.games import legal_action_mask
from torchrl_sql.training.checkpoint import CheckpointError
from torchrl_sql.training.trainer import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When is played, how, and when it is shown to the learner.

    Attributes:
        agent_steps_per_gradient_step (float): of all emulators together; four is a replay ratio of 1/4.
        first_agent_steps (int): steps before the first gradient step; more, until each game has an episode.
        initial_epsilon (float): probability of a random legal action until then.
        final_epsilon (float): probability of a random legal action in the end.
        epsilon_decay_agent_steps (int): from the one to the other, linearly, from the first gradient step on.
        commit_interval_gradient_steps (int): finished episodes are shown to the learner at its multiples.
        seed (int): of exploration.

    Raises:
        TypeError, ValueError: for a value that is no such number.
    """

    agent_steps_per_gradient_step: float
    first_agent_steps: int
    initial_epsilon: float = 1.0
    final_epsilon: float
    epsilon_decay_agent_steps: int
    commit_interval_gradient_steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("agent_steps_per_gradient_step", self.agent_steps_per_gradient_step, 0, above=True)
        for name in ("initial_epsilon", "final_epsilon"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("first_agent_steps", "epsilon_decay_agent_steps", "commit_interval_gradient_steps"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)

    def epsilon(self, agent_step: int) -> float:
        """Probability of a random action, so many agent steps after learning began."""
        done = min(agent_step / self.epsilon_decay_agent_steps, 1.0)
        return round(self.initial_epsilon - (self.initial_epsilon - self.final_epsilon) * done, 6)


class _Shown(NamedTuple):
    """What the learner sees from a gradient step on, and which episodes came with it."""

    step: int
    recordings: list[Recording]
    episodes: list[PlayedEpisode]


class OnlineReplay:
    """What :class:`~torchrl_sql.training.trainer.Trainer` samples from when the agent makes its own data.

    Batch ``t`` is a function of seed, ``t`` and what was committed; what is committed when follows from ``t`` too.
    While the learner takes a step, a thread plays the agent steps that are owed at the next one, with the weights of
    before the step: acting and learning overlap, and yet each repetition is the same (on the CPU bit for bit).

    The state counts what was committed, and holds the actions of all episodes since: to continue, the store is taken
    back to that commit, and the emulators play those episodes again.

    Args:
        growing (GrowingStore): where whole episodes go; this object opens and closes it.
        players (Lockstep): the emulators; closed by this object, too.
        policy (TensorDictModuleBase): ``observation`` ``[N, 4, 84, 84]`` uint8 and ``game_id`` ``[N]`` to ``action``
            ``[N]``; its parameters are the learner's own, its ``games``, if it has any, those of the players.
        make_replay (callable): the replay buffer over the store, when there is something in it, with the games in the
            order of the players', e.g. ``partial(OfflineAtariReplay, games=games, batch_size=32, n_steps=3)``.
        pace (Pace): how much is played when.

    Keyword Args:
        offline (OfflineAtariReplay, optional): its batches are appended to those of the store.
        unsaved_steps (float): :meth:`begin` refuses a store that holds what was played at this gradient step or later,
            which no start that never saved a state can have left.
        on_tick (callable): is called often by :meth:`begin` and :meth:`load_state_dict`, by several threads; what it
            raises ends them, and the store stays as it was committed.

    Call :meth:`begin` or :meth:`load_state_dict` before anything else.

    Raises:
        ValueError: if players, store and policy are of other games, or have them in another order.
    """

    def __init__(
        self,
        growing: GrowingStore,
        players: Lockstep,
        policy: TensorDictModuleBase,
        make_replay: Callable[[FrameStore], OfflineAtariReplay],
        pace: Pace,
        *,
        offline: OfflineAtariReplay | None = None,
        unsaved_steps: float = math.inf,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        if players.games != growing.games:
            raise ValueError(f"players and store must have the same games, got {players.games} and {growing.games}")
        if tuple(known := getattr(policy, "games", players.games)) != players.games:
            raise ValueError(f"the policy must have the players' games in their order, {players.games}, got {known}")
        self.growing, self.players, self.pace = growing, players, pace
        self._make_replay, self._offline = make_replay, offline
        self._unsaved_steps, self._on_tick = unsaved_steps, on_tick
        self._replay: OfflineAtariReplay | None = None
        self._policy, self._acting = policy, deepcopy(policy).eval()
        self._stream: torch.cuda.Stream | None = None
        self._legal = legal_action_mask(players.games).numpy()[players.game_id]
        self._num_ticks = 0
        self._first_ticks: int | None = None  # before learning began; None as long as it has not
        self._unpublished: list[PlayedEpisode] = []
        self._shown: deque[_Shown] = deque(maxlen=2)
        self._returns: list[float] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="play")
        self._playing: Future[None] | None = None

    @property
    def num_agent_steps(self) -> int:
        """Played so far by all emulators together."""
        return self._num_ticks * len(self.players)

    def begin(self) -> None:
        """Empties the store and plays the first steps.

        Raises:
            FloatingPointError: if the policy's values are not finite.
            ValueError: if the store holds anything but an earlier start of this run.
            EmulatorError: if an emulator fails.
            OSError: if the disk is full.
        """
        with self._ending_if_it_fails():
            self.growing.open(dropping={"gradient_step": self._unsaved_steps})
            self.players.begin(self._labels(0))
            while self.num_agent_steps < self.pace.first_agent_steps or not self.growing.num_episodes:
                self._on_tick()
                self._tick(0)
            self._first_ticks = self._num_ticks
            self._publish(0)

    def sample(self) -> TensorDictBase:
        """The next batch.

        Raises:
            EmulatorError: if an emulator has failed; what was committed stays.
            OSError: if the disk is full; likewise.
            RuntimeError: before :meth:`begin` or :meth:`load_state_dict`.
        """
        if self._replay is None:
            raise RuntimeError("nothing was played yet: call begin() or load_state_dict() before sample()")
        step = self._replay.sampler.step
        self._wait()
        if step % self.pace.commit_interval_gradient_steps == 0 and step > self._shown[-1].step:
            self._publish(step)
        self._play_ahead(step + 1)
        batch = self._replay.sample()
        return batch if self._offline is None else torch.cat([batch, self._offline.sample()])

    def state_dict(self) -> dict[str, Any]:
        """What was delivered and played so far; waits for the steps under way.

        Commits what has ended, which the learner sees later, so that the end of a run is in its store.
        """
        assert self._replay is not None
        self._wait()
        self.growing.commit()
        return {
            "replay": self._replay.state_dict(),
            "offline": None if self._offline is None else self._offline.state_dict(),
            "shown_at": self._shown[-1].step,
            "manifests": {recording.game: recording.manifest.to_json() for recording in self._shown[-1].recordings},
            "num_ticks": self._num_ticks,
            "first_ticks": self._first_ticks,
            "returns": list(self._returns),
            "episodes": [episode.state_dict() for episode in (*self._unpublished, *self.players.episodes)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the store back to where it was and plays again what was not committed then.

        Raises:
            CheckpointError: if the store is not the one that the state is of; it is left as it was.
            ValueError, LookupError, TypeError: if the state is another kind's.
        """
        with self._ending_if_it_fails():
            try:
                self.growing.open(state["manifests"])
            except ValueError as error:  # of the store: the state itself may be intact
                raise CheckpointError(str(error)) from error
            self._num_ticks, self._first_ticks = int(state["num_ticks"]), int(state["first_ticks"])
            for episode in self.players.play_again(state["episodes"], self._on_tick):
                self._keep(episode)
            self._returns = list(state["returns"])
            recordings = [self.growing.store.recording(game) for game in self.players.games]
            self._show(_Shown(int(state["shown_at"]), recordings, []))
            assert self._replay is not None
            self._replay.load_state_dict(state["replay"])
            if self._offline is not None:
                self._offline.load_state_dict(state["offline"])

    def seek(self, step: int) -> None:
        """Makes the batch of this gradient step the next one; what was played stays."""
        assert self._replay is not None
        with suppress(NonFiniteError):  # the weights that played are those that the caller goes back from
            self._wait()
        while self._shown[-1].step > step and len(self._shown) > 1:
            self._unpublished = self._shown.pop().episodes + self._unpublished
            self._replay.show(self._shown[-1].recordings, until=self._next_commit(self._shown[-1].step))
        for replay in (self._replay, *([] if self._offline is None else [self._offline])):
            replay.seek(step)

    def metrics(self) -> dict[str, float]:
        """``agent_steps``, ``epsilon``, and the mean ``episode_return`` (raw) of what ended since the last call."""
        self._wait()
        returns, self._returns = self._returns, []
        played = {"agent_steps": float(self.num_agent_steps), "epsilon": self._epsilon}
        return played | ({"episode_return": float(np.mean(returns))} if returns else {})

    def shutdown(self) -> None:
        """Ends threads, emulators and writers; what was not committed is in the state only."""
        self._thread.shutdown()
        self.players.close()
        self.growing.close()
        for replay in (self._replay, self._offline):
            if replay is not None:
                replay.shutdown()

    @contextmanager
    def _ending_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.shutdown()
            raise

    def _next_commit(self, step: int) -> int:
        interval = self.pace.commit_interval_gradient_steps
        return (step // interval + 1) * interval

    def _publish(self, step: int) -> None:
        """Commits finished episodes and shows them from this gradient step on."""
        published, self._unpublished = self._unpublished, []
        self._show(_Shown(step, self.growing.commit(), published))

    def _show(self, shown: _Shown) -> None:
        if self._replay is None:
            replay = self._make_replay(self.growing.store)
            if replay.games != self.players.games:
                replay.shutdown()
                raise ValueError(
                    f"make_replay must be given games={[*self.players.games]}, the players' in their order, got a "
                    f"replay of {[*replay.games]}"
                )
            self._replay = replay
        self._replay.show(shown.recordings, until=self._next_commit(shown.step))
        self._shown.append(shown)

    def _wait(self) -> None:
        """Until nothing is played."""
        if self._playing is not None:
            playing, self._playing = self._playing, None
            try:
                playing.result()
            except FloatingPointError as error:  # of the acting network
                assert self._replay is not None
                raise NonFiniteError(str(error), step=self._replay.sampler.step) from error

    def _play_ahead(self, gradient_step: int) -> None:
        """Begins to play what is owed at a gradient step, with the weights of now."""
        assert self._first_ticks is not None
        first = self._first_ticks * len(self.players)
        owed = first + self.pace.agent_steps_per_gradient_step * gradient_step
        if self.num_agent_steps >= owed:
            return
        with torch.no_grad():
            for copy, own in zip(_tensors(self._acting), _tensors(self._policy), strict=True):
                copy.copy_(own)
        device = self._device
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def play() -> None:
            if copied is None:
                self._play(owed, gradient_step - 1)
                return
            # A stream of its own, so that acting does not wait for the learner's work.
            self._stream = self._stream or torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(copied)
                self._play(owed, gradient_step - 1)

        self._playing = self._thread.submit(play)

    @property
    def _device(self) -> torch.device:
        parameter = next(self._acting.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _play(self, owed: float, gradient_step: int) -> None:
        while self.num_agent_steps < owed:
            self._tick(gradient_step)

    @property
    def _epsilon(self) -> float:
        if self._first_ticks is None:
            return self.pace.initial_epsilon
        return self.pace.epsilon((self._num_ticks - self._first_ticks) * len(self.players))

    def _labels(self, gradient_step: int) -> dict[str, float]:
        return {"agent_step": self.num_agent_steps, "gradient_step": gradient_step, "epsilon": self._epsilon}

    def _tick(self, gradient_step: int) -> None:
        """One step of each emulator."""
        key, counter = np.array([self.pace.seed, 1], np.uint64), np.array([0, 0, self._num_ticks, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter).random_raw(2 * len(self.players)).reshape(2, -1)
        chance, choice = (bits >> np.uint64(11)) * 2.0**-53
        explores = chance < self._epsilon
        # The index of the first legal action whose share of the legal ones reaches beyond the random number.
        cumulative = self._legal.cumsum(1)
        actions = (cumulative > choice[:, None] * cumulative[:, -1:]).argmax(1)
        if not explores.all():
            actions = np.where(explores, actions, self._decide())
        self._num_ticks += 1
        for episode in self.players.step(actions, self._labels(gradient_step)):
            self._keep(episode)

    @torch.inference_mode()
    def _decide(self) -> np.ndarray:
        observation = torch.from_numpy(self.players.observation)
        batch = TensorDict(
            observation=observation, game_id=torch.from_numpy(self.players.game_id), batch_size=[len(self.players)]
        )
        return self._acting(batch.to(self._device))["action"].cpu().numpy()

    def _keep(self, episode: PlayedEpisode) -> None:
        game = self.players.games[self.players.game_id[episode.emulator]]
        self.growing.add(
            game,
            np.stack(episode.frames),
            np.array(episode.actions),
            np.array(episode.rewards, np.float32),
            terminated=episode.terminated,
            labels=episode.labels,
        )
        self._returns.append(sum(episode.rewards))
        episode.frames.clear()  # from here on only its actions are needed
        self._unpublished.append(episode)


def _tensors(module: nn.Module) -> Sequence[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
