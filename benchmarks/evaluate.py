"""Steps per second of evaluation: against the emulator alone, the network alone, and a plain loop of TorchRL's parts.

    python benchmarks/evaluate.py --json evaluate.json              # some minutes
    python benchmarks/evaluate.py --before CHECKOUT --json it.json  # this code against an earlier one's, some minutes

All sides play the same games with sticky actions, from running emulators; resets between episodes count, creating the
emulators does not. One agent step is four emulator frames.

- ``emulator``: :class:`torchrl_sql.envs.AtariVector` in one process, random actions, nothing else.
- ``network``: the policy's forward on one core, at the number of rows that evaluation uses.
- ``evaluation``: :func:`torchrl_sql.evaluation.rollout.rollout` with that network and one torch thread.
- ``gym_loop``: one game at a time, one copy, gymnasium's ``AtariPreprocessing`` (OpenCV) in TorchRL's ``GymWrapper``
  with ``CatFrames``, and the same policy, as a TorchRL user would write an evaluation. TorchRL's own ``Resize`` needs
  torchvision, which this project does without.

With ``--before`` both versions play what a quickstart plays, in turns, each in a process of its own: ``evaluation`` of
an untrained network and ``constant`` actions as ``torchrl-sql evaluate`` does, ``collection`` into a store. Seconds are
after imports, emulators' creation included. Beside them is the time on all cores by all processes, imports included,
which suffers less from other work on the machine, and a digest of the returns or of the store's files, which must be
the same. Last comes the least that these steps can cost: ALE's ``act`` in one process, four times a step with random
actions, no picture taken, no network, no process told; it bounds what any code around ALE can save.

With one core for emulators and one for the network, the limit of the pipeline is the slower of the two rates. Emulator
processes also use what the network leaves of its core, so a step's whole work is compared with two cores as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode, roms
from gymnasium.wrappers import AtariPreprocessing
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import CatFrames, Compose, GymWrapper, TransformedEnv, UnsqueezeTransform

from torchrl_sql.data import FrameStore
from torchrl_sql.envs import AtariVector, Emulator, SkillMixture, collect
from torchrl_sql.evaluation.agents import make_agents
from torchrl_sql.evaluation.protocol import Protocol
from torchrl_sql.evaluation.rollout import ROWS_PER_FORWARD, rollout
from torchrl_sql.games import GAMES
from torchrl_sql.modules import NetworkPolicy, make_q_actor
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training.device import prepare_cpu

gymnasium.register_envs(ale_py)

WARM_UP_SECONDS = 12.0
QUICKSTART = ("Freeway", "Assault")
SHORTER = Emulator(max_env_frames=3_000)
PLAYED = ("Assault", "Breakout", "Freeway", "SpaceInvaders")


def emulator_rate(seconds: float) -> float:
    """Agent steps per second of one emulator process, the games in equal shares."""
    vectors = [AtariVector(game, 8, num_processes=1) for game in PLAYED]
    for vector in vectors:
        vector.reset(np.arange(8))
    rng, steps, spent = np.random.default_rng(0), 0, 0.0
    while spent < seconds:
        for vector in vectors:
            start = time.perf_counter()
            _, _, terminated, truncated = vector.step(rng.integers(0, 18, 8))
            if (ended := terminated | truncated).any():
                vector.reset(np.arange(ended.sum()), ended)
            spent += time.perf_counter() - start
            steps += 8
    return steps / spent


def reset_seconds() -> float:
    """Time to start an episode in an emulator that exists."""
    vector = AtariVector("Breakout", 1)
    vector.reset(np.array([0]))
    start = time.perf_counter()
    for seed in range(10):
        vector.reset(np.array([seed]))
    return (time.perf_counter() - start) / 10


def network_rate(policy: NetworkPolicy, seconds: float) -> float:
    """Decisions a second."""
    rows = ROWS_PER_FORWARD["cpu"]
    batch = TensorDict(
        observation=torch.randint(256, (rows, 4, 84, 84), dtype=torch.uint8),
        game_id=torch.arange(rows) % len(PLAYED),
        uniform=torch.zeros(rows, dtype=torch.float64),
        batch_size=[rows],
    )
    with torch.inference_mode():
        policy(batch.clone())
        start, decisions = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            policy(batch.clone())
            decisions += rows
    return decisions / (time.perf_counter() - start)


class _Enough(Exception):
    """Ends a rollout from within."""


def evaluation_rate(policy: NetworkPolicy, seconds: float) -> float:
    """Agent steps per second, after the seconds in which the emulators are created."""
    times: list[float] = []
    begin = time.perf_counter() + WARM_UP_SECONDS

    def count(module: torch.nn.Module, inputs: tuple[TensorDict, ...]) -> None:
        if (now := time.perf_counter()) > begin:
            times.append(now)
            if now > begin + seconds:
                raise _Enough

    episodes = [(game, episode) for episode in range(500) for game in PLAYED]
    counting = policy.register_forward_pre_hook(count)
    with contextlib.suppress(_Enough):
        for _ in rollout(policy, PLAYED, episodes, epsilon=0.05):
            pass
    counting.remove()
    return len(times) * ROWS_PER_FORWARD["cpu"] / (times[-1] - begin)  # so many episodes fill every forward


def gym_loop_rate(policy: NetworkPolicy, seconds: float) -> float:
    """Agent steps per second of TorchRL's own parts, one game after the other."""
    spent, steps = 0.0, 0
    for game_id, game in enumerate(PLAYED):
        emulator = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.25, full_action_space=True)
        env = TransformedEnv(
            GymWrapper(AtariPreprocessing(emulator, noop_max=0), categorical_action_encoding=True),
            Compose(UnsqueezeTransform(-3, in_keys=["observation"]), CatFrames(4, dim=-3, in_keys=["observation"])),
        )

        def decide(observation: torch.Tensor, game_id: int = game_id) -> torch.Tensor:
            batch = TensorDict(
                observation=observation.unsqueeze(0),
                game_id=torch.tensor([game_id]),
                uniform=torch.zeros(1, dtype=torch.float64),
                batch_size=[1],
            )
            return policy(batch)["action"][0]

        act = TensorDictModule(decide, ["observation"], ["action"])
        with torch.inference_mode():
            env.rollout(5, act)
            start = time.perf_counter()
            while time.perf_counter() - start < seconds / len(PLAYED):
                steps += env.rollout(100, act).shape[0]
        spent += time.perf_counter() - start
        env.close()
    return steps / spent


def bare_emulator_seconds(num_steps: int = 5_000) -> float:
    """Processor time of four frames of ALE, and nothing else, in the quickstart's games."""
    spent = 0.0
    ALEInterface.setLoggerMode(LoggerMode.Error)
    for game in QUICKSTART:
        ale = ALEInterface()
        ale.loadROM(roms.get_rom_path(GAMES[game].rom))
        legal = [action.value for action in ale.getMinimalActionSet()]
        start = time.process_time()
        for action in np.random.default_rng(0).choice(legal, num_steps).tolist():
            for _ in range(4):
                ale.act(action)
            if ale.game_over():  # it would emulate nothing from here on
                ale.reset_game()
        spent += time.process_time() - start
    return spent / (num_steps * len(QUICKSTART))


def play_evaluation(policy: NetworkPolicy, num_episodes: int, folder: Path) -> tuple[str, int]:
    """Returns of some episodes of each of the quickstart's games, and agent steps."""
    episodes = [(game, episode) for episode in range(num_episodes) for game in QUICKSTART]
    played = list(rollout(policy, QUICKSTART, episodes, SHORTER))
    returns = sorted((one.game, one.episode, one.episode_return, one.length_agent_steps) for one in played)
    return repr(returns), sum(one.length_agent_steps for one in played)


def play_constants(policy: NetworkPolicy, num_episodes: int, folder: Path) -> tuple[str, int]:
    """Returns of each legal action of each game, and agent steps."""
    protocol = Protocol(emulator=SHORTER, num_episodes=max(num_episodes // 4, 1))
    agents = make_agents("constant", QUICKSTART)
    rows = [row for agent in agents for row in agent.evaluate(folder / "constant", protocol=protocol)]
    return repr(rows), sum(row.length_agent_steps for row in rows)


def play_collection(policy: NetworkPolicy, num_episodes: int, folder: Path) -> tuple[str, int]:
    """Files of a store of as many steps per game as the episodes above may have, and those steps."""
    store, num_steps = FrameStore.create(folder / "store"), num_episodes * SHORTER.max_env_frames // 4
    for game in QUICKSTART:
        mixture = SkillMixture(game)
        with store.writer(game, source="benchmark", behaviours=mixture.behaviour_names) as writer:
            collect(writer, mixture, game, num_steps, SHORTER)
    files = sorted(path for path in store.path.rglob("*") if path.is_file() and path.name != ".lock")
    digests = repr([(str(path.relative_to(folder)), sha256(path.read_bytes()).hexdigest()) for path in files])
    return digests, num_steps * len(QUICKSTART)


PLAYS = {"evaluation": play_evaluation, "constant": play_constants, "collection": play_collection}


def measure(name: str, policy: NetworkPolicy, num_episodes: int) -> dict[str, Any]:
    """Seconds of one of the plays, here."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        started = time.perf_counter()
        outcome, num_steps = PLAYS[name](policy, num_episodes, Path(folder))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "agent_steps": num_steps, "digest": sha256(outcome.encode()).hexdigest()[:16]}


def processor_seconds() -> float:
    """Of all processes started here that have ended, and of those that they started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare(before: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both versions' seconds of each of the plays, in turns, and medians of their ratios."""
    sides = {"before": before.resolve(), "after": Path(__file__).resolve().parents[1]}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PLAYS}
    for _ in range(args.rounds):
        for name, results in rounds.items():
            results.append({})
            for side, checkout in sides.items():
                words = [sys.executable, __file__, "--measure", name, "--episodes", str(args.episodes)]
                environment = os.environ | {"PYTHONPATH": str(checkout)}
                used = processor_seconds()
                said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
                result = json.loads(said.splitlines()[-1])
                results[-1][side] = result | {"processor_seconds": processor_seconds() - used}
            digests = {result["digest"] for result in results[-1].values()}
            print(name, {side: round(result["seconds"], 1) for side, result in results[-1].items()}, flush=True)
            if len(digests) > 1:
                raise ValueError(f"both versions must play the same in {name}, got {results[-1]}")

    def ratio(name: str, key: str) -> float:
        return statistics.median(each["before"][key] / each["after"][key] for each in rounds[name])

    keys = ("seconds", "processor_seconds")
    ratios = {name: {key: ratio(name, key) for key in keys} for name in rounds}
    print("before / after:", json.dumps(ratios))
    step = bare_emulator_seconds()
    bare = {
        name: {
            "seconds": each[0]["after"]["agent_steps"] * step,
            **{side: statistics.median(r[side]["agent_steps"] * step / r[side]["processor_seconds"] for r in each)
               for side in sides},
        }
        for name, each in rounds.items()
    }  # fmt: skip
    print("share of the processor time that ALE alone takes for the same steps:", json.dumps(bare))
    measured = {"before_over_after": ratios, "seconds_per_step_of_bare_ale": step, "bare_ale": bare}
    return {"episodes_per_game": args.episodes, "rounds": rounds} | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet_small")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="the sides take turns (default: 3)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="compare with this version's checkout")
    parser.add_argument("--episodes", type=int, default=20, help="per game, with --before (default: 20)")
    parser.add_argument("--measure", choices=PLAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    prepare_cpu(1)
    torch.manual_seed(0)
    games = QUICKSTART if args.measure else PLAYED
    policy = NetworkPolicy(make_q_actor(games, encoder=args.encoder).eval(), games)
    if args.measure:
        print(json.dumps(measure(args.measure, policy, args.episodes)))
        return
    if args.before:
        document = {"machine": describe_benchmark() | {"load_average": os.getloadavg()}, **compare(args.before, args)}
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return
    sides: dict[str, Callable[[], float]] = {
        "emulator": lambda: emulator_rate(args.seconds),
        "network": lambda: network_rate(policy, args.seconds),
        "evaluation": lambda: evaluation_rate(policy, args.seconds),
        "gym_loop": lambda: gym_loop_rate(policy, args.seconds),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        rounds.append({name: side() for name, side in sides.items()})
        print("  ".join(f"{name} {rate:,.0f}" for name, rate in rounds[-1].items()), "agent steps/s", flush=True)
    result: dict[str, Any] = {name: statistics.median(r[name] for r in rounds) for name in sides}
    share = statistics.median(r["evaluation"] / min(r["emulator"], r["network"]) for r in rounds)
    both = statistics.median(r["evaluation"] / (2 / (1 / r["emulator"] + 1 / r["network"])) for r in rounds)
    speedup = statistics.median(r["evaluation"] / r["gym_loop"] for r in rounds)
    print(f"evaluation: {share:.0%} of the slower limit, {both:.0%} of what two cores without any overhead would do,")
    print(f"            {speedup:.1f} times the gym loop (medians of rounds)")
    print(f"starting an episode: {(reset := reset_seconds()) * 1e3:.0f} ms")
    if args.json:
        machine = describe_benchmark() | {"load_average": os.getloadavg()}
        document = {"machine": machine, "encoder": args.encoder, "games": [GAMES[game].name for game in PLAYED]}
        document |= {"agent_steps_per_second": result, "rounds": rounds, "share_of_slower_limit": share}
        document |= {"share_of_two_cores": both, "times_gym_loop": speedup, "reset_seconds": reset}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
