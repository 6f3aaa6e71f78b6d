"""Learning online: agent steps and gradient steps per second, and what a growing store costs the learner.

    python benchmarks/online.py --json benchmarks/results/online_cpu.json

One network (scale=cpu; --device cuda takes it to a GPU), batches of 32, 3-step returns, Breakout. Per round, one after
the other:

- emulator: emulators that step together, random actions. acting: the same with the network's forward. As many
  emulators as agent steps are owed per gradient step, so that each plays one of them: 4 and 16.
- learner: gradient steps on a store that nobody appends to.
- online: both overlapped, as train-online does it, at replay ratios 1/4 and 1/16, with as many emulators as above.
- recipe: TorchRL's DQN recipe for Atari (sota-implementations/dqn): its Collector, GymEnv with TorchRL's transforms,
  LazyMemmapStorage and DistributionalDQNLoss, with our network. recipe_env: the same with our AtariEnv in place of
  GymEnv and transforms, which is the fairer comparison of everything else.
- gymnasium: a plain loop over gymnasium's vector environment of ALE, as many copies as agent steps are owed per
  gradient step, with a ring of NumPy arrays and the recipe's loss, optimizer and network.

All sides give torch one thread.

Then the buffers, at each capacity: processor time of a batch and of an appended transition, of the growing store and of
TorchRL's LazyTensorStorage, which is as large as half of the machine's memory allows where the capacity does not fit
(``memory_capacity``). Speeds are medians over rounds; wall clock and processor time are both there, as the machine may
have other work. ``share_of_slower_limit`` is the speed of an overlapped run, by the clock, against the slower of the
learner alone and of acting alone, each with the whole machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.postprocs import MultiStep
from torchrl.envs import (
    CatFrames,
    Compose,
    DoubleToFloat,
    EnvBase,
    GrayScale,
    GymEnv,
    NoopResetEnv,
    RewardSum,
    SignTransform,
    StepCounter,
    ToTensorImage,
    TransformedEnv,
    UnaryTransform,
)
from torchrl.modules import EGreedyModule
from torchrl.objectives import DistributionalDQNLoss, HardUpdate

from torchrl_sql.config import RunConfig, compose_run_config
from torchrl_sql.data import OfflineAtariReplay
from torchrl_sql.data.growing import GrowingStore
from torchrl_sql.envs import AtariEnv
from torchrl_sql.envs.lockstep import Lockstep
from torchrl_sql.methods import make_method
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training import Trainer
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.device import describe_device, resolve_device

Array = np.ndarray
GAME = "Breakout"
RATIOS = (4, 16)
LABELS = {"agent_step": 0.0, "gradient_step": 0.0, "epsilon": 0.1}
LEGAL = np.array([0, 1, 3, 4])


def run_config(folder: Path, ratio: int, network: list[str]) -> RunConfig:
    """A run that begins to learn soon; 1/ratio gradient steps per agent step."""
    return compose_run_config(
        [
            "scale=cpu", "online=cpu", f"data.games={GAME}", f"run_dir={folder}", *network,
            f"online.agent_steps_per_gradient_step={ratio}", f"online.num_emulators={ratio}", "data.n_steps=3",
            "online.first_agent_steps=2_000",
            f"online.commit_interval_gradient_steps={max(50, 500 // ratio)}",
            "online.epsilon_decay_agent_steps=1",  # else most steps would be random, and need no network
        ]
    )  # fmt: skip


def processor_seconds() -> float:
    """Of this process and its children, where emulators may run."""
    pids = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
    ticks = 0
    for pid in pids:
        with suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), processor_seconds()

    def rates(self, count: int) -> dict[str, float]:
        """``count`` per second of each kind."""
        wall, cpu = time.perf_counter() - self._wall, processor_seconds() - self._cpu
        return {"per_second": count / wall, "per_cpu_second": count / cpu}


def emulator(folder: Path, network: list[str], num_emulators: int, num_steps: int, *, acting: bool) -> dict[str, float]:
    """Agent steps of emulators that step together."""
    config = run_config(folder, num_emulators, network)
    device = resolve_device(config.trainer.device)
    method = make_method(config.method)
    policy = method.policy(method.network(config.model, config.games), config.games).eval().to(device)
    players = Lockstep([GAME], num_emulators, seed=0)
    players.begin({})
    game_id = torch.zeros(num_emulators, dtype=torch.int64)
    clock, rng = Clock(), np.random.default_rng(0)
    for _ in range(num_steps // num_emulators):
        if acting:
            with torch.inference_mode():
                observation = torch.from_numpy(players.observation)
                batch = TensorDict(observation=observation, game_id=game_id, batch_size=[num_emulators])
                policy(batch.to(device))["action"].cpu()
        players.step(LEGAL[rng.integers(4, size=num_emulators)], {})
    rates = clock.rates(num_steps)
    players.close()
    return rates


def learner(store: Path, folder: Path, network: list[str], num_steps: int) -> dict[str, float]:
    """Gradient steps on data that is there."""
    config = compose_run_config(
        ["scale=cpu", "method=dqn_c51", f"data.games={GAME}", f"data.store={store}", f"run_dir={folder}",
         "data.n_steps=3", *network]
    )  # fmt: skip
    return _rates(build_trainer(config), num_steps)


def online(folder: Path, network: list[str], ratio: int, num_steps: int) -> dict[str, float]:
    """Gradient steps of a run that plays."""
    return _rates(build_trainer(run_config(folder, ratio, network)), num_steps)


def _rates(trainer: Trainer, num_steps: int) -> dict[str, float]:
    list(trainer.train(5, log_interval=50))
    clock = Clock()
    list(trainer.train(5 + num_steps, log_interval=50))
    rates = clock.rates(num_steps)
    trainer.replay.shutdown()
    return rates


def resized(pixels: torch.Tensor) -> torch.Tensor:
    """What the recipe's Resize does, which needs torchvision; and uint8."""
    small = torch.nn.functional.interpolate(pixels[None], (84, 84), mode="bilinear", antialias=True)
    return (255 * small[0]).to(torch.uint8)


def recipe_env() -> EnvBase:
    """As sota-implementations/dqn/utils_atari.py makes it, with uint8 pixels, which take a quarter of its floats."""
    gymnasium.register_envs(ale_py)
    env = GymEnv(
        "BreakoutNoFrameskip-v4",
        frame_skip=4,
        from_pixels=True,
        pixels_only=False,
        categorical_action_encoding=True,
        full_action_space=True,
    )
    return TransformedEnv(
        env,
        Compose(
            NoopResetEnv(noops=30, random=True),
            SignTransform(in_keys=["reward"]),
            ToTensorImage(),
            GrayScale(),
            UnaryTransform(["pixels"], ["observation"], fn=resized),
            CatFrames(N=4, dim=-3, in_keys=["observation"]),
            RewardSum(),
            StepCounter(max_steps=4500),
            DoubleToFloat(),
        ),
    )


class WithGame(TensorDictModuleBase):
    """The recipe's environment has no game id."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [], ["game_id"]

    def forward(self, tensordict: Any) -> Any:
        """Writes zeros."""
        return tensordict.set(
            "game_id", torch.zeros(tensordict.batch_size, dtype=torch.int64, device=tensordict.device)
        )


def torchrl_update(q_network: TensorDictModuleBase) -> Callable[[TensorDict], None]:
    """A gradient step of TorchRL's recipe, with fused Adam."""
    loss = DistributionalDQNLoss(q_network, gamma=0.99, delay_value=True)
    loss.make_value_estimator()
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4, fused=True)
    updater = HardUpdate(loss, value_network_update_interval=500)

    def update(batch: TensorDict) -> None:
        value = loss(batch)["loss"]
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
        optimizer.step()
        updater.step()

    return update


class Ring:
    """The newest steps of games that step together, each with its stack of frames; three-step returns are summed when
    they are sampled.
    """

    def __init__(self, num_steps: int, num_games: int) -> None:
        shape = (num_steps, num_games)
        self._observation = np.zeros((*shape, 4, 84, 84), np.uint8)
        self._action, self._reward = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        self._terminated, self._ended = np.zeros(shape, bool), np.zeros(shape, bool)
        self._rng, self._num_added = np.random.default_rng(0), 0

    def __len__(self) -> int:
        return self._num_added * self._action.shape[1]

    def add(self, observation: Array, action: Array, reward: Array, terminated: Array, ended: Array) -> None:
        """A step of each game from ``observation``; the next one's is what it led to, unless the episode ended."""
        at = self._num_added % len(self._action)
        self._observation[at], self._action[at], self._reward[at] = observation, action, reward
        self._terminated[at], self._ended[at] = terminated, ended
        self._num_added += 1

    def sample(self, device: torch.device) -> TensorDict:
        """32 transitions: none reaches beyond the newest, or beyond a time-out, or begins after an episode's end."""
        num_steps, num_games = self._action.shape
        starts, games = np.empty(0, np.int64), np.empty(0, np.int64)
        while len(starts) < 32:
            draws = self._rng.integers(max(1, self._num_added - num_steps + 1), self._num_added - 3, 64)
            of = self._rng.integers(num_games, size=64)
            spans = (draws[:, None] + np.arange(3)) % num_steps
            cut = (self._ended[spans, of[:, None]] & ~self._terminated[spans, of[:, None]]).any(1)
            good = ~cut & ~self._ended[(draws - 1) % num_steps, of]  # there gymnasium begins an episode: no step
            starts, games = np.concatenate([starts, draws[good]])[:32], np.concatenate([games, of[good]])[:32]
        spans, of = (starts[:, None] + np.arange(3)) % num_steps, games[:, None]
        ends = self._terminated[spans, of]
        before = np.cumsum(ends, 1) - ends == 0  # the episode's end not passed
        reward = (self._reward[spans, of] * before * 0.99 ** np.arange(3)).sum(1, dtype=np.float32)
        terminated, game_id = torch.as_tensor(ends.any(1)[:, None]), torch.zeros(32, dtype=torch.int64)
        following = TensorDict(
            observation=torch.as_tensor(self._observation[(starts + 3) % num_steps, games]),
            reward=torch.as_tensor(reward[:, None]), done=terminated, terminated=terminated, game_id=game_id,
        )  # fmt: skip
        return TensorDict(
            observation=torch.as_tensor(self._observation[starts % num_steps, games]), game_id=game_id,
            action=torch.as_tensor(self._action[starts % num_steps, games]), next=following,
            steps_to_next_obs=torch.as_tensor(before.sum(1)[:, None]), batch_size=[32],
        ).to(device)  # fmt: skip


def gymnasium_loop(folder: Path, network: list[str], ratio: int, num_steps: int) -> dict[str, float]:
    """Gradient steps of a loop that steps ``ratio`` games together before each."""
    config = run_config(folder, ratio, network)
    assert config.online is not None
    device = resolve_device(config.trainer.device)
    method = make_method(config.method)
    q_network = method.network(config.model, config.games).to(device)
    update = torchrl_update(q_network)
    gymnasium.register_envs(ale_py)
    env = gymnasium.make_vec(f"ALE/{GAME}-v5", num_envs=ratio, reward_clipping=True, full_action_space=True)
    ring, rng = Ring(20_000 // ratio, ratio), np.random.default_rng(0)
    game_id = torch.zeros(ratio, dtype=torch.int64, device=device)
    observation, _ = env.reset(seed=0)
    done, clock = 0, Clock()
    while done < num_steps:
        random = rng.random(ratio) < config.online.final_epsilon
        action = rng.integers(18, size=ratio)
        if not random.all():
            with torch.inference_mode():
                seen = TensorDict(
                    observation=torch.from_numpy(observation).to(device), game_id=game_id, batch_size=[ratio]
                )
                action = np.where(random, action, q_network(seen)["action"].cpu().numpy())
        following, reward, terminated, truncated, _ = env.step(action)
        ring.add(observation, action, reward, terminated, terminated | truncated)
        observation = following
        if len(ring) < 256:
            clock = Clock()
            continue
        update(ring.sample(device))
        done += 1
    rates = clock.rates(done)
    env.close()
    return rates


def recipe(folder: Path, network: list[str], ratio: int, num_steps: int, *, our_env: bool) -> dict[str, float]:
    """Gradient steps of TorchRL's loop: collect 16 frames, append them, take 16 / ratio gradient steps."""
    config = run_config(folder, ratio, network)
    device = resolve_device(config.trainer.device)
    method = make_method(config.method)
    q_network = method.network(config.model, config.games).to(device)
    env = AtariEnv(GAME, 1) if our_env else recipe_env()
    explore = EGreedyModule(
        AtariEnv(GAME, 1).action_spec[0] if our_env else env.action_spec, eps_init=0.5, eps_end=0.5
    ).to(device)
    actor = q_network if our_env else TensorDictSequential(WithGame(), q_network)
    # Named devices make the collector copy, so none is on the CPU.
    devices = {} if device.type == "cpu" else {"policy_device": device, "env_device": "cpu", "storing_device": "cpu"}
    collector = Collector(
        env, TensorDictSequential(actor, explore), frames_per_batch=16, total_frames=-1, init_random_frames=0, **devices
    )  # fmt: skip
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(20_000, scratch_dir=str(folder / "memmap")), batch_size=32, prefetch=3
    )
    steps = MultiStep(gamma=0.99, n_steps=3)
    update = torchrl_update(q_network)
    done, clock, due = 0, Clock(), 0.0
    for data in collector:
        buffer.extend(steps(data.unsqueeze(0) if data.ndim == 1 else data).reshape(-1).select(
            "observation", "action", "steps_to_next_obs", "game_id", ("next", "observation"), ("next", "reward"),
            ("next", "done"), ("next", "terminated"), ("next", "game_id"), strict=False,
        ))  # fmt: skip
        if len(buffer) < 256:
            clock = Clock()
            continue
        due += 16 / ratio
        while due >= 1:
            batch = buffer.sample().to(device)
            batch["next", "game_id"] = batch["game_id"]
            batch["steps_to_next_obs"] = batch["steps_to_next_obs"].reshape(-1, 1)
            update(batch)
            due, done = due - 1, done + 1
        if done >= num_steps:
            break
    rates = clock.rates(done)
    collector.shutdown()
    return rates


def episodes(num_transitions: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Real play, repeated until there is enough of it."""
    players = Lockstep([GAME], 4, seed=1)
    players.begin({})
    rng, played = np.random.default_rng(1), []
    while len(played) < 24:
        played += players.step(LEGAL[rng.integers(4, size=4)], {})
    players.close()
    count = 0
    while count < num_transitions:
        for one in played:
            yield np.stack(one.frames), np.array(one.actions), np.array(one.rewards, np.float32)
            count += len(one.actions)


def buffers(folder: Path, capacity: int) -> dict[str, float]:
    """Processor milliseconds of a batch and of an appended transition, at this capacity."""
    print(f"buffers of {capacity:,} transitions", flush=True)
    growing = GrowingStore(folder / "store", [GAME], source="a benchmark", about={}, shard_frames=2_000)
    growing.open()
    for frames, actions, rewards in episodes(capacity):
        growing.add(GAME, frames, actions, rewards, terminated=True, labels=LABELS)
    recordings = growing.commit()
    make = partial(OfflineAtariReplay, batch_size=32, n_steps=3)
    replay = make(growing.store)
    rows: dict[str, float] = {}
    more = list(episodes(4_000))

    def append() -> int:
        """A thousand transitions and the commit that shows them, as at scale=cpu."""
        count = 0
        while count < 1_000:
            frames, actions, rewards = more.pop()
            growing.add(GAME, frames, actions, rewards, terminated=True, labels=LABELS)
            count += len(actions)
        replay.show(growing.commit(), until=10**9)
        return count

    rows["store_batch_ms"] = cpu_ms(replay.sample, 200)
    rows["store_append_ms"] = statistics.median(cpu_ms(append, 1) / 1_000 for _ in range(3))
    rows["store_first_batches_ms"] = cpu_ms(replay.sample, 125)  # files are mapped anew after a commit
    rows["store_bytes_per_transition"] = (
        sum(path.stat().st_size for path in recordings[0].path.rglob("*") if path.is_file()) / recordings[0].num_steps
    )
    one = replay.sample().exclude("index")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows["memory_capacity"] = fits = min(capacity, int(memory / 2 / (one.bytes() / 32)))
    other = TensorDictReplayBuffer(storage=LazyTensorStorage(fits), batch_size=32)
    for _ in range(-(-fits // 4096)):
        other.extend(torch.cat([one] * 128))
    rows["memory_batch_ms"] = cpu_ms(other.sample, 200)
    rows["memory_append_ms"] = cpu_ms(lambda: other.extend(one[:16]), 100) / 16
    rows["memory_bytes_per_transition"] = float(one.bytes() / 32)
    replay.shutdown()
    growing.close()
    return rows


def cpu_ms(work: Callable[[], Any], count: int) -> float:
    """Processor milliseconds per call."""
    work() if count > 1 else None
    began = time.process_time()
    for _ in range(count):
        work()
    return 1e3 * (time.process_time() - began) / count


def main() -> None:
    """Measure and print; with --json also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="resnet_tiny")
    parser.add_argument("--device", default="cpu", help="of acting and learning")
    parser.add_argument("--steps", type=int, default=120, help="gradient steps per measurement")
    parser.add_argument("--capacities", type=int, nargs="*", default=[100_000, 1_000_000], help="of the buffers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = [f"model.encoder={args.encoder}", f"trainer.device={args.device}"]
    machine = describe_benchmark() | {"load_average": os.getloadavg()}
    machine["device"] = describe_device(resolve_device(args.device))
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        online(folder / "first", network, 4, 20)
        sides: dict[str, Callable[[Path], dict[str, float]]] = {
            "learner": lambda at: learner(folder / "first" / "store", at, network, args.steps),
        }
        for ratio in RATIOS:
            for side, acting in (("emulator", False), ("acting", True)):
                sides[f"{side}_{ratio}"] = partial(
                    emulator, network=network, num_emulators=ratio, num_steps=1_200, acting=acting
                )
            sides[f"online_{ratio}"] = partial(online, network=network, ratio=ratio, num_steps=args.steps)
            for kind, ours in (("recipe", False), ("recipe_env", True)):
                sides[f"{kind}_{ratio}"] = partial(
                    recipe, network=network, ratio=ratio, num_steps=args.steps, our_env=ours
                )
            sides[f"gymnasium_{ratio}"] = partial(gymnasium_loop, network=network, ratio=ratio, num_steps=args.steps)
        for number in range(args.rounds):
            for side, measure in sides.items():
                rounds.setdefault(side, []).append(measure(folder / f"{side}-{number}"))
                print(side, rounds[side][-1], flush=True)
        buffer = {f"{capacity}": buffers(folder / f"buffer-{capacity}", capacity) for capacity in args.capacities}
    medians = {
        side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in rounds.items()
    }
    shares = {
        ratio: statistics.median(
            one["per_second"] / min(learner["per_second"], acting["per_second"] / ratio)
            for one, learner, acting in zip(
                rounds[f"online_{ratio}"], rounds["learner"], rounds[f"acting_{ratio}"], strict=True
            )
        )
        for ratio in RATIOS
    }
    result = {"medians": medians, "share_of_slower_limit": shares, "buffers": buffer}
    print(json.dumps(result, indent=1))
    if args.json is not None:
        document = machine | {"settings": vars(args) | {"json": None}} | result | {"rounds": rounds}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
