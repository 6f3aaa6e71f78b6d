"""What ``gpu_check.py`` measures: each function takes an item of its plan and returns the columns it fills."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import scaling_table
import torch
import update_step
from _episodes import play
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from torchrl_sql.bench import StepTimes, time_calls, time_steps
from torchrl_sql.config import RunConfig, compose_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.envs import Emulator
from torchrl_sql.evaluation.rollout import rollout
from torchrl_sql.methods import make_method
from torchrl_sql.modules import NetworkPolicy, make_q_actor
from torchrl_sql.training import Trainer, train
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.checkpoint import checkpoint_path, load_checkpoint
from torchrl_sql.training.device import resolve_device, tune
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.writer import CheckpointWriter

COMPILE = {"eager": "off", "kernels": "kernels", "graph": "graph"}
"""Modes of this table -> ``trainer.compile``."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMalloc",
                 "cudaFree", "cudaHostAlloc")  # fmt: skip
"""Starts of the names of CUDA's calls in which a host may wait for the device."""
SHORT_COPY_MICROSECONDS = 50
"""An asynchronous copy that only had to be queued returns sooner; one from pageable memory waits."""

KERNELS = {
    "triton": r"^triton",
    "convolution": r"conv|wgrad|dgrad|fprop",
    "matmul": r"gemm|nvjet|cutlass|cublas",
    "optimizer": r"multi_tensor|fused_adam",
    "copy": r"^mem(cpy|set)",
}
"""Kinds of kernels by their names; the first that fits. Compiled ones are Triton's: all between products."""
LONGEST_NAME = 200
"""Of a kernel, in results."""

Item = dict[str, Any]


def make_store(path: Path, *, games: tuple[str, ...], num_steps: int) -> None:
    """Frames of real play, since readers decode: one episode of at most ``num_steps`` of each game."""
    store = FrameStore.create(path)
    with ThreadPoolExecutor() as pool:
        episodes = list(pool.map(lambda game: next(play(game, max_steps=num_steps)), games))
    for game, episode in zip(games, episodes, strict=True):
        with store.writer(game, source="a random policy, for a benchmark") as writer:
            writer.add_episode(episode.frames, episode.actions, episode.rewards, terminated=episode.terminated)


class Measurements:
    """The measurements on one device.

    Args:
        device (str): as ``trainer.device``.
        folder (Path): with the ``store``; for runs too.
        tiny (bool): as little of each as shows that it works.
    """

    def __init__(self, device: str, folder: Path, *, tiny: bool) -> None:
        self.device = resolve_device(device)
        tune(self.device, try_algorithms=True)  # for the peers, too; runs do it themselves
        self.folder = folder
        self.tiny = tiny
        torch._dynamo.config.recompile_limit = 64  # as update_step.py does for TorchRL's side
        torch._logging.set_logs(dynamo=logging.ERROR)
        self._peaks: dict[str, float] = {}

    def __call__(self, item: Item) -> dict[str, Any]:
        """The columns of an item; whatever it raises is the item's failure."""
        torch.compiler.reset()
        gc.collect()  # the row before may have left graphs
        torch.cuda.empty_cache()
        measure: Callable[[Item], dict[str, Any]] = getattr(self, item["kind"])
        return measure(item)

    def config(self, *settings: str) -> RunConfig:
        """A run of the paper's scale on this device."""
        return compose_run_config(
            ["scale=paper", f"data.store={self.folder / 'store'}", f"trainer.device={self.device}",
             f"run_dir={self.folder / 'run'}", "trainer.loggers=[csv]", *settings]
        )  # fmt: skip

    def peak(self, precision: str) -> float:
        """Measured FLOP/s of a large matrix product."""
        if precision not in self._peaks:
            self._peaks[precision] = update_step.matmul_flops(precision, self.device, 256 if self.tiny else None)
        return self._peaks[precision]

    def device_peak(self, item: Item) -> dict[str, Any]:
        """The rates that the other rows are shares of."""
        return {f"{name}_tflops": float(f"{self.peak(name) / 1e12:.3g}") for name in item["precisions"]}

    def step(self, item: Item) -> dict[str, Any]:
        """A training run's own update, and its loop with several numbers of readers."""
        config = self.config(
            f"model.encoder={item['network']}", f"data.batch_size={item['batch_size']}",
            f"data.games=[{','.join(item['games'])}]", f"trainer.precision={item['precision']}",
            f"trainer.compile={COMPILE[item['mode']]}", f"method.double_q={str(item['double_q']).lower()}",
        )  # fmt: skip
        trainer = build_trainer(config, memory_format=LAYOUTS[item["layout"]])
        try:
            times = time_steps(trainer, num_repeats=5 if self.tiny else 20)
            _, forward_and_backward = scaling_table.count(item["network"], item["batch_size"])  # without double Q
            flops = item["batch_size"] * forward_and_backward * (5 / 4 if item["double_q"] else 1)
            row = {
                "samples_per_second": round(item["batch_size"] / times.step_seconds),
                "share_of_matmul_peak": round(flops / times.step_seconds / self.peak(item["precision"]), 3),
                **_milliseconds(times),
                "host_milliseconds": round(1e3 * issue_seconds(trainer), 2),
            }
            times_inside, kernels = profiled(trainer)
            row |= times_inside | {"kernels": kernels}
            for num_readers in item["readers"]:
                row[f"data_wait_{num_readers}"] = round(self._data_wait(config, trainer, num_readers), 4)
        finally:
            trainer.replay.shutdown()
        return row

    def _data_wait(self, config: RunConfig, trainer: Trainer, num_readers: int) -> float:
        """Share of the time in which the device waits for batches."""
        num_steps = 3 if self.tiny else 30
        trainer.replay.shutdown()
        config.data.prefetch = num_readers
        trainer.replay = make_method(config.method).replay(
            config.data, FrameStore.open(self.folder / "store"), seed=0, rank=0, world_size=1, device=trainer.device,
            keys=[*trainer.loss.in_keys, "index"],
        )  # fmt: skip
        trainer.rewind(0)
        trainer._probe = None  # what is logged of features is no part of a step
        results = list(trainer.train(3 * num_steps, log_interval=num_steps))
        return statistics.mean(result["data_wait_fraction"] for result in results[1:])  # the first starts the readers

    def peer(self, item: Item) -> dict[str, Any]:
        """The same step composed of TorchRL's parts."""
        batch = update_step.make_batch(item["batch_size"], update_step.NUM_GAMES[item["network"]], self.device)
        mode = "eager" if item["mode"] == "eager" else "compiled"
        variant = update_step.torchrl_step(
            item["network"], item["side"], item["precision"], mode, batch, LAYOUTS[item["layout"]]
        )
        times = time_calls(variant.step, self.device, num_repeats=5 if self.tiny else 20)
        return {"samples_per_second": round(item["batch_size"] / times.step_seconds)} | _milliseconds(times)

    def curve(self, item: Item) -> dict[str, Any]:
        """Training on the device beside the CPU's own noise of bf16: the same run in fp32 and bf16 there."""
        num_steps = item["num_steps"]

        def objective(device: torch.device, precision: str, mode: str) -> torch.Tensor:
            folder = self.folder / f"curve_{device.type}_{precision}_{mode}"
            config = compose_run_config(
                ["scale=cpu", f"data.store={self.folder / 'store'}", f"data.games=[{','.join(item['games'])}]",
                 f"run_dir={folder}", "trainer.loggers=[csv]", f"trainer.device={device}", "num_threads=null",
                 f"data.batch_size={item['batch_size']}", f"trainer.num_gradient_steps={num_steps}",
                 f"trainer.precision={precision}", f"trainer.compile={COMPILE[mode]}",
                 f"trainer.log_interval_gradient_steps={num_steps // 10}", "optim.warmup_gradient_steps=2"]
            )  # fmt: skip
            return torch.tensor([value for _, value in read_scalars(train(config))["objective"]])

        cpu = torch.device("cpu")
        expected = objective(cpu, "fp32", "eager")

        def deviation(curve: torch.Tensor) -> float:
            return float(((curve - expected) / expected).square().mean().sqrt())

        noise = deviation(objective(cpu, "bf16", "eager"))
        found = {mode: deviation(objective(self.device, "bf16", mode)) for mode in item["modes"]}
        return {
            "deviation_of_bf16_on_the_cpu": round(noise, 5),
            **{f"deviation_{mode}": round(value, 5) for mode, value in found.items()},
            "greatest_deviation": round(3 * noise, 5),
            "loss": [round(value, 4) for value in expected.tolist()],
        }

    def resume(self, item: Item) -> dict[str, Any]:
        """A run continued from its middle beside the one that ran through."""
        num_steps = item["num_steps"]

        def run(name: str) -> RunConfig:
            return compose_run_config(
                ["scale=cpu", f"data.store={self.folder / 'store'}", f"data.games=[{','.join(item['games'])}]",
                 f"run_dir={self.folder / name}", "trainer.loggers=[csv]", f"trainer.device={self.device}",
                 f"data.batch_size={item['batch_size']}", f"trainer.num_gradient_steps={num_steps}",
                 f"trainer.checkpoint_interval_gradient_steps={num_steps // 2}", "trainer.num_checkpoints_kept=2",
                 f"trainer.precision={item['precision']}", f"trainer.compile={COMPILE[item['mode']]}",
                 "optim.warmup_gradient_steps=2", "num_threads=null"]
            )  # fmt: skip

        whole = train(run(f"whole_{item['mode']}")) / "checkpoints"
        continued = self.folder / f"continued_{item['mode']}" / "checkpoints"
        continued.mkdir(parents=True)
        shutil.copy(checkpoint_path(whole, num_steps // 2), continued)
        if (whole.parent / "compiled").exists():  # as it is where a run goes on
            shutil.copytree(whole.parent / "compiled", continued.parent / "compiled")
        started = time.perf_counter()
        train(run(continued.parent.name))
        seconds = time.perf_counter() - started
        ours, theirs = (load_checkpoint(checkpoint_path(each, num_steps))["trainer"] for each in (continued, whole))
        start = load_checkpoint(checkpoint_path(whole, num_steps // 2))["trainer"]["loss"]
        weights = [key for key, value in start.items() if value.is_floating_point()]
        moved = max(float((theirs["loss"][key] - start[key]).abs().max()) for key in weights)
        apart = max(float((theirs["loss"][key] - ours["loss"][key]).abs().max()) for key in weights)
        return {
            "is_equal_bit_for_bit": apart == 0,
            "greatest_difference": apart,
            "greatest_way_of_a_weight": moved,
            "continued_seconds": round(seconds, 2),
        }

    def checkpoint(self, item: Item) -> dict[str, Any]:
        """What saving a network of this size costs training."""
        config = self.config(
            f"model.encoder={item['network']}", f"data.batch_size={item['batch_size']}",
            f"data.games=[{','.join(item['games'])}]", f"trainer.precision={item['precision']}",
            f"trainer.compile={COMPILE['eager']}",
        )  # fmt: skip
        trainer = build_trainer(config)
        writer = CheckpointWriter(self.folder / "checkpoints", num_kept=1, milestone_interval=None)
        stalls, writes = [], []
        try:
            for step in range(3):
                trainer.update(trainer.replay.sample())
                update_step.synchronize(self.device)
                started = time.perf_counter()
                writer.save(step, {"trainer": trainer.state_dict()})
                stalls.append(time.perf_counter() - started)
                writer.wait()
                writes.append(time.perf_counter() - started)
            path = checkpoint_path(writer.folder, step)
            started = time.perf_counter()
            trainer.load_state_dict(load_checkpoint(path)["trainer"])
            load_seconds = time.perf_counter() - started
        finally:
            writer.close()
            trainer.replay.shutdown()
        return {
            "megabytes": round(path.stat().st_size / 1e6),
            "first_stall_milliseconds": round(1e3 * stalls[0], 1),
            "stall_milliseconds": round(1e3 * min(stalls[1:]), 1),
            "write_seconds": round(min(writes), 2),
            "load_seconds": round(load_seconds, 2),
        }

    def evaluation(self, item: Item) -> dict[str, Any]:
        """Agent steps per second of evaluation's own loop, with the time in which emulators start."""
        actor = make_q_actor(item["games"], encoder=item["network"]).eval().to(self.device)
        policy = NetworkPolicy(actor, item["games"])
        episodes = list(itertools.product(item["games"], range(item["num_episodes_per_game"])))
        emulator = Emulator(max_env_frames=4 * item["max_agent_steps"])
        started = time.perf_counter()
        steps = sum(played.length_agent_steps for played in rollout(policy, item["games"], episodes, emulator))
        return {"agent_steps_per_second": round(steps / (time.perf_counter() - started))}


def _milliseconds(times: StepTimes) -> dict[str, Any]:
    row = {"milliseconds": round(1e3 * times.step_seconds, 2), "start_seconds": round(times.start_seconds, 1)}
    return row if times.peak_bytes is None else row | {"peak_megabytes": round(times.peak_bytes / 1e6)}


def issue_seconds(trainer: Trainer) -> float:
    """What the host itself needs for a step, the device idle before: it runs ahead if that is less than the step."""
    seconds = []
    for _ in range(5):
        update_step.synchronize(trainer.device)
        started = time.perf_counter()
        trainer.update(trainer.replay.sample())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def profiled(trainer: Trainer, num_steps: int = 5) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """What a step's time went into, as the profiler saw it.

    Returns:
        Milliseconds of a step: ``host_blocked_milliseconds`` inside calls that may wait for the device, of all threads;
        on CUDA also those of kernels by kind. And of each kernel its name, milliseconds and calls, the longest first.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.device.type == "cuda")
    for _ in range(num_steps):  # whose memory the profiled steps use again
        trainer.update(trainer.replay.sample())
    update_step.synchronize(trainer.device)
    with profile(activities=activities, acc_events=True) as trace:
        with record_function("gpu_check steps"):
            for _ in range(num_steps):
                trainer.update(trainer.replay.sample())
        update_step.synchronize(trainer.device)
    events = trace.events()
    (steps,) = (
        event.time_range for event in events if event.name == "gpu_check steps" and event.device_type == DeviceType.CPU
    )
    waits = [
        event.time_range.elapsed_us()
        for event in events
        if event.name.startswith(WAITING_CALLS)
        and steps.start <= event.time_range.start <= steps.end
        and not ("Async" in event.name and event.time_range.elapsed_us() < SHORT_COPY_MICROSECONDS)
    ]
    row = {"host_blocked_milliseconds": round(sum(waits) / 1e3 / num_steps, 3)}
    if trainer.device.type != "cuda":
        return row, []
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3 / num_steps)
    kinds = dict.fromkeys((*KERNELS, "other"), 0.0)
    for name, times in kernels.items():
        kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] += sum(times)
    row |= {f"{kind}_milliseconds": round(milliseconds, 2) for kind, milliseconds in kinds.items()}
    table = [(name[:LONGEST_NAME], round(sum(times), 4), len(times) // num_steps) for name, times in kernels.items()]
    return row, sorted(table, key=lambda kernel: -kernel[1])
