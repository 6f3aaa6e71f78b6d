"""Agent steps per second of our emulator processes against ALE's own vector emulator, and the time to start an episode.

    python benchmarks/emulator.py --json benchmarks/results/emulator.json    # a minute

Both sides play the same games, seeds and actions with the same preprocessing and sticky actions, in turns: eight copies
in one thread of :class:`ale_py.vector_env.AtariVectorEnv`, and eight in one process of
:class:`torchrl_sql.envs.AtariVector`. They give the same episodes (``tests/envs/test_console.py``). Rates are of
processor time, of all threads and processes of a side, which suffers less from other work on the machine; rates by the
clock are beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ale_py.vector_env import AtariVectorEnv

from torchrl_sql.envs import AtariVector
from torchrl_sql.games import GAMES
from torchrl_sql.provenance import describe_benchmark

PLAYED = ("Assault", "Breakout", "Freeway", "SpaceInvaders")
NUM_COPIES = 8


class Ours:
    """Copies of a game in one process."""

    def __init__(self, game: str) -> None:
        self._vector = AtariVector(game, NUM_COPIES, num_processes=1)
        self.reset = self._vector.reset
        self.step = self._vector.step

    def processor_seconds(self) -> float:
        """Of both processes."""
        pid = self._vector._consoles[0]._process._process.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Theirs:
    """The same in one thread of ALE's vector emulator."""

    def __init__(self, game: str) -> None:
        self._env = AtariVectorEnv(
            GAMES[game].rom,
            NUM_COPIES,
            num_threads=1,
            repeat_action_probability=0.25,
            full_action_space=True,
            noop_max=0,
            use_fire_reset=False,
            reward_clipping=False,
        )
        self.processor_seconds = time.process_time
        self.step = self._env.step

    def reset(self, seeds: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Starts episodes, in all copies or those of a mask."""
        return self._env.reset(seed=seeds, options=None if mask is None else {"reset_mask": mask})[0]


def measure(side: Ours | Theirs, work: Callable[[], int]) -> tuple[float, float]:
    """Seconds per unit of work: of processor time and by the clock."""
    processor, clock = side.processor_seconds(), time.perf_counter()
    amount = work()
    return (side.processor_seconds() - processor) / amount, (time.perf_counter() - clock) / amount


def play(side: Ours | Theirs, num_steps: int) -> int:
    rng, seed = np.random.default_rng(0), NUM_COPIES
    for _ in range(num_steps):
        _, _, terminated, truncated, *_ = side.step(rng.integers(0, 18, NUM_COPIES))
        if (ended := terminated | truncated).any():
            side.reset(np.arange(seed, seed + ended.sum()), ended)
            seed += int(ended.sum())
    return num_steps * NUM_COPIES


def start(side: Ours | Theirs, times: int) -> int:
    for number in range(times):
        side.reset(np.arange(NUM_COPIES) + number)
    return times * NUM_COPIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the sides take turns (default: 5)")
    parser.add_argument("--steps", type=int, default=60, help="per copy, game and round (default: 60)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for game in PLAYED:
        sides = {"ours": Ours(game), "ale": Theirs(game)}
        for side in sides.values():
            side.reset(np.arange(NUM_COPIES))
        rounds: list[dict[str, dict[str, tuple[float, float]]]] = []
        for _ in range(args.rounds):
            each = {name: {"start": measure(side, lambda side=side: start(side, 2))} for name, side in sides.items()}
            for name, side in sides.items():
                each[name]["step"] = measure(side, lambda side=side: play(side, args.steps))
            rounds.append(each)

        def median(name: str, what: str, which: int, rounds=rounds) -> float:
            return statistics.median(each[name][what][which] for each in rounds)

        row = {
            name: {
                "agent_steps_per_processor_second": 1 / median(name, "step", 0),
                "agent_steps_per_second": 1 / median(name, "step", 1),
                "start_processor_milliseconds": 1e3 * median(name, "start", 0),
            }
            for name in sides
        }
        row["ours_over_ale"] = {
            "processor": statistics.median(each["ale"]["step"][0] / each["ours"]["step"][0] for each in rounds),
            "clock": statistics.median(each["ale"]["step"][1] / each["ours"]["step"][1] for each in rounds),
        }
        results[game] = row
        print(game, json.dumps(row), flush=True)
    if args.json:
        machine = describe_benchmark() | {"load_average": os.getloadavg()}
        document = {"machine": machine, "num_copies": NUM_COPIES, "rounds": args.rounds, "games": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
