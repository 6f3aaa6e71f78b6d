"""The first thing to run on a GPU: every test that needs one, then what training is worth there, in ten minutes.

    make gpu-check                                                     # or: python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu --tiny --minutes 5     # the same paths, in little, without a GPU

No network and no data set are needed; frames come from the emulator. The plan (:func:`make_plan`) is worked through in
order, the most valuable rows first. A row that fails is reported as failed; a process of its own measures, so that one
that breaks the device loses itself only. When the time is up the row under way is stopped; rows that no longer fit are
skipped, and named. Results are written before and after each row.

- ``step`` rows are :meth:`torchrl_sql.training.Trainer.update` of a run of ``scale=paper``, timed as ``torchrl-sql
  bench`` does. ``share_of_matmul_peak``: its counted operations over the measured rate of a large matrix product in the
  same precision. ``start_seconds``: of the first four steps, with compiling. ``host_milliseconds``: what the host
  needs to issue a step with its batch. ``host_blocked_milliseconds``: time of a step inside CUDA calls that may wait
  for the device. ``convolution_milliseconds`` and so on: a step's kernels by kind; each is in the JSON file.
  ``data_wait_N``: share of the time in which the device waits for batches with N readers.
- ``peer`` rows are the same step composed of TorchRL's parts, see ``update_step.py``: ``torchrl`` as it comes,
  ``torchrl_hooked`` with care, which does double Q as the ``double_q`` rows do; both layouts are tried for it, too.
- ``curve``: 10 points of a loss curve beside the CPU's in fp32, as the root of the mean square of relative differences;
  three times that of the CPU's own curve in bf16 is taken to be noise.
- ``resume``: a run continued from its middle beside the one that ran through. ``checkpoint``: what saving costs.
- ``evaluation``: agent steps per second of the evaluation loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _gpu_rows import Item, Measurements, make_store

from torchrl_sql.data.gather import fastest_gather
from torchrl_sql.games import TRAIN_40
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.training.device import describe_device, resolve_device

ROOT = Path(__file__).resolve().parent.parent
TARGET_SHARE, TARGET_RATIO, TARGET_WAIT, TARGET_BLOCKED = 0.25, 4.0, 0.02, 0.1
LONGEST_ROW_SECONDS = 240
NETWORKS = ("resnet50", "resnet101", "resnet34")
NAMES = ("kind", "network", "side", "batch_size", "precision", "layout", "mode")
"""What identifies a row, with ``double_q``."""


def step(network: str, batch_size: int, precision: str, layout: str, mode: str, **more: Any) -> Item:
    row = {"network": network, "batch_size": batch_size, "precision": precision, "layout": layout, "mode": mode}
    return {"kind": "step", **row, "double_q": False, "readers": [], "games": TRAIN_40, **more}


def peer(network: str, batch_size: int, precision: str, mode: str, side: str, layout: str = "contiguous") -> Item:
    row = {"network": network, "batch_size": batch_size, "precision": precision, "layout": layout, "mode": mode}
    return {"kind": "peer", "side": side, **row}


def make_plan() -> list[Item]:
    """What is measured, the most valuable first; ``seconds`` is how much time a row should have left to begin."""
    games = TRAIN_40[:4]
    best = ("bf16", "channels_last")
    plan: list[Item] = [
        {"kind": "tests", "seconds": 60},
        {"kind": "device_peak", "precisions": ["bf16", "fp32"]},
        step("resnet50", 512, *best, "graph", readers=[1, 2, 4]),
        peer("resnet50", 512, "bf16", "eager", "torchrl_hooked"),
        peer("resnet50", 512, "bf16", "eager", "torchrl_hooked", "channels_last"),
        step("resnet50", 512, "bf16", "contiguous", "eager"),
        step("resnet50", 512, *best, "eager"),
        step("resnet50", 512, *best, "graph", double_q=True),
        {
            "kind": "curve",
            "games": games,
            "batch_size": 32,
            "num_steps": 200,
            "modes": ["eager", "graph"],
            "seconds": 60,  # a small network
        },
        {
            "kind": "resume",
            "games": games,
            "batch_size": 32,
            "num_steps": 40,
            "precision": "bf16",
            "mode": "graph",
            "seconds": 80,
        },
        {"kind": "checkpoint", "network": "resnet50", "batch_size": 64, "precision": "bf16", "games": TRAIN_40},
        {
            "kind": "evaluation",
            "network": "resnet50",
            "games": games,
            "num_episodes_per_game": 64,
            "max_agent_steps": 400,
        },
        step("resnet101", 512, *best, "graph", readers=[2]),
        peer("resnet101", 512, "bf16", "eager", "torchrl_hooked"),
        peer("resnet101", 512, "bf16", "eager", "torchrl_hooked", "channels_last"),
        peer("resnet50", 512, "bf16", "eager", "torchrl"),
        peer("resnet101", 512, "bf16", "kernels", "torchrl_hooked"),
        step("resnet101", 512, *best, "eager"),
        step("resnet101", 512, *best, "graph", double_q=True),
        step("resnet50", 512, *best, "kernels"),
        step("resnet50", 512, "bf16", "contiguous", "graph"),
        peer("resnet50", 512, "bf16", "kernels", "torchrl_hooked"),
        step("resnet50", 64, *best, "graph", readers=[2]),
        step("resnet50", 64, *best, "eager"),
    ]
    for precision, batch_size, mode, layout, network in itertools.product(
        ("bf16", "fp32"), (512, 64), ("eager", "graph", "kernels"), ("channels_last", "contiguous"), NETWORKS
    ):
        if (row := step(network, batch_size, precision, layout, mode)) not in [item | {"readers": []} for item in plan]:
            plan.append(row)
    plan += [
        peer(network, 512, "fp32", "eager", side) for network in NETWORKS for side in ("torchrl_hooked", "torchrl")
    ]
    for item in plan:
        compiling = 150 if item.get("network") == "resnet101" else 110  # on 16 cores of an H100's host
        item.setdefault("seconds", compiling if item.get("mode") in ("graph", "kernels") else 25)
    return plan


def make_tiny_plan(device: str) -> list[Item]:
    """Each kind of row once, as small as it can be."""
    games = ("Pong", "Breakout")
    settings = {"games": games, "batch_size": 8, "num_steps": 10}
    modes = ("eager", "kernels", "graph") if device == "cuda" else ("eager",)  # compiling takes longer than all else
    plan: list[Item] = [
        {"kind": "tests"},
        {"kind": "device_peak", "precisions": ["fp32"]},
        *(step("resnet_small", 8, "fp32", "channels_last", mode, games=games, readers=[1, 2]) for mode in modes),
        step("resnet_small", 8, "fp32", "contiguous", "eager", games=games, double_q=True),
        step("no_such_network", 8, "fp32", "contiguous", "eager", games=games),
        *(peer("resnet_small", 8, "fp32", "eager", side) for side in ("torchrl_hooked", "torchrl")),
        {"kind": "curve", **settings, "modes": modes},
        *({"kind": "resume", **settings, "precision": "fp32", "mode": mode} for mode in modes),
        {"kind": "checkpoint", "network": "resnet_small", "batch_size": 8, "precision": "fp32", "games": games},
        {
            "kind": "evaluation",
            "network": "resnet_small",
            "games": games,
            "num_episodes_per_game": 1,
            "max_agent_steps": 20,
        },
    ]
    return [item | {"seconds": 0} for item in plan]


def name_of(item: Item) -> str:
    return " ".join([*(str(item[key]) for key in NAMES if key in item), *["double_q"] * item.get("double_q", False)])


class Worker:
    """A process that measures; another one takes its place if it dies or has to be stopped."""

    def __init__(self, device: str, folder: Path, *, tiny: bool) -> None:
        self.device = device
        self._settings = (device, folder, tiny)
        self._process: Any = None

    def measure(self, item: Item, seconds: float) -> dict[str, Any]:
        """The item's columns.

        Raises:
            TimeoutError: if it took longer; it was stopped.
            RuntimeError: if the process died.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs, *self._settings))
            self._process.start()
            theirs.close()
        try:
            self._connection.send(item)
            if self._connection.poll(seconds):
                answer: dict[str, Any] = self._connection.recv()
                if "failed" in answer:
                    self._kill()
                return answer
        except (EOFError, ConnectionError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            raise RuntimeError(f"the measuring process died (exit code {code})") from None
        self._kill()
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(ConnectionError):
                self._connection.send(None)
            self._process.join(5)
            self._kill()

    def _kill(self) -> None:
        """End the process with all that it started."""
        with suppress(ProcessLookupError):  # it has no group of its own yet, or is gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = None


def work(connection: Connection, device: str, folder: Path, tiny: bool) -> None:
    """The measuring process: answers items with their columns."""
    os.setpgid(0, 0)  # compilers and emulators end with it
    os.environ["RL_WARNINGS"] = "False"
    measurements = Measurements(device, folder, tiny=tiny)
    while (item := connection.recv()) is not None:
        try:
            answer = measurements(item)
        except Exception as error:
            connection.send({"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"})
            return  # after an error of the device, of whatever class, the next measurement would be another's victim
        connection.send(answer)


def run_tests(seconds: float, device: str) -> dict[str, Any]:
    """Every test marked ``gpu``."""
    files = sorted(str(path) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", "-v"]
    command += ["--continue-on-collection-errors", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return {"failed": f"not over after {seconds:.0f} s", "summary": (error.stdout or b"").decode()[-2000:]}
    lines = done.stdout.strip().splitlines()
    row = {"summary": lines[-1] if lines else done.stderr[-300:]}
    if done.returncode != 0 or (device == "cuda" and " passed" not in row["summary"]):
        print(done.stdout, done.stderr, sep="\n")
        row["failed"] = "; ".join(line for line in lines if line.startswith(("FAILED", "ERROR"))) or row["summary"]
    return row


def run(plan: list[Item], worker: Worker, deadline: float, save: Any) -> list[Item]:
    """Works through the plan; returns its items with what became of each: columns, ``failed`` or ``skipped``."""
    rows = [
        {key: value for key, value in item.items() if key not in ("games", "readers", "seconds")}
        | {"skipped": "not reached"}
        for item in plan
    ]
    for number, item in enumerate(plan):
        left = max(0.0, deadline - time.monotonic())
        limit = min(left, LONGEST_ROW_SECONDS)
        try:
            rows[number]["skipped"] = "under way"
            save(rows)
            if left <= item["seconds"]:
                found = {"skipped": f"{left:.0f} s were left"}
            else:
                found = run_tests(limit, worker.device) if item["kind"] == "tests" else worker.measure(item, limit)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            found = {"skipped" if limit == left else "failed": str(error)}
        except RuntimeError as error:
            found = {"failed": str(error)}
        del rows[number]["skipped"]
        rows[number] |= found | {"row_seconds": round(left - (deadline - time.monotonic()), 1)}
        print(f"{max(0.0, deadline - time.monotonic()):5.0f} s left  {name_of(item)}: {_short(found)}", flush=True)
        save(rows)
    return rows


def _short(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, list))


def targets(rows: list[Item]) -> list[dict[str, str]]:
    """What was hoped for beside what was measured."""
    done = [row for row in rows if not {"failed", "skipped"} & row.keys()]
    table: list[dict[str, str]] = []

    def greatest(key: str, **wanted: Any) -> Any:
        values = [row[key] for row in done if key in row and all(row.get(k) == v for k, v in wanted.items())]
        return max(values, default=None)

    def add(what: str, value: float | None, target: float, *, at_least: bool) -> None:
        met = value is not None and (value >= target if at_least else value <= target)
        verdict = "not measured" if value is None else "met" if met else "MISSED"
        bound = f"{'at least' if at_least else 'at most'} {target:g}"
        measured = "" if value is None else f"{value:.3g}"
        table.append({"what": what, "target": bound, "measured": measured, "verdict": verdict})

    for network in ("resnet50", "resnet101"):
        row = {"network": network, "batch_size": 512, "precision": "bf16"}
        share = greatest("share_of_matmul_peak", kind="step", double_q=False, **row)
        add(f"{network}, 512, bf16, best row: share of the measured matmul peak", share, TARGET_SHARE, at_least=True)
        theirs = greatest("samples_per_second", kind="peer", side="torchrl_hooked", **row)
        for mathematics, double_q in (("default", False), ("equal mathematics", True)):
            ours = greatest("samples_per_second", kind="step", double_q=double_q, **row)
            ratio = ours / theirs if ours and theirs else None
            what = f"{network}, 512, bf16, {mathematics}: samples/s, hooked composition at its best = 1"
            add(what, ratio, TARGET_RATIO, at_least=True)
    graph = {"kind": "step", "mode": "graph"}
    blocked = greatest("host_blocked_milliseconds", **graph)
    add("graph, worst row: ms per step in which the host is blocked", blocked, TARGET_BLOCKED, at_least=False)
    wait = greatest("data_wait_2", **graph)
    add("graph, worst row: share of the time waiting for data, 2 readers", wait, TARGET_WAIT, at_least=False)
    for row in (row for row in done if row["kind"] == "curve"):
        for mode in row["modes"]:
            what = f"{mode}: loss curve in bf16, relative distance from the CPU's in fp32"
            add(what, row[f"deviation_{mode}"], row["greatest_deviation"], at_least=False)
    return table


def markdown(machine: dict[str, Any], rows: list[Item]) -> str:
    """The result as a page."""
    made = f"`{machine['command']}`, {machine['date']}, commit {machine['commit']}, frames by `{machine['frames']}`."
    done = [row for row in rows if not {"failed", "skipped"} & row.keys()]
    steps = [row for row in done if row["kind"] in ("step", "peer")]
    others = [row for row in done if row["kind"] not in ("step", "peer")]
    lines = [f"# {machine['device']}", "", made, "", *_table(targets(rows))]
    lines += ["", "## Gradient steps", "", *_table(steps), "", "## Others", ""]
    lines += [f"- {name_of(row)}: {_short({k: v for k, v in row.items() if k not in NAMES})}" for row in others]
    lines += ["", "## Failed", ""]
    lines += [f"- {name_of(row)}: {row['failed']}" for row in rows if "failed" in row] or ["Nothing."]
    lines += ["", "## Not measured", ""]
    skipped = {
        row["skipped"]: [name_of(each) for each in rows if each.get("skipped") == row["skipped"]]
        for row in rows
        if "skipped" in row
    }
    lines += [f"- {why}: {'; '.join(names)}" for why, names in skipped.items()] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Nothing."]
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="each kind of row, in little")
    parser.add_argument("--minutes", type=float, default=10, help="in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="without suffix (default: benchmarks/results/gpu_check_DEVICE)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these of the plan, as the output names them")
    args = parser.parse_args()
    plan = make_tiny_plan(args.device) if args.tiny else make_plan()
    if args.rows:
        known = {name_of(item): item for item in plan}
        if unknown := [name for name in args.rows if name not in known]:
            parser.error(f"--rows must be of the plan ({', '.join(known)}), got {unknown[0]!r}")
        plan = [known[name] for name in args.rows]
    deadline = time.monotonic() + 60 * args.minutes - 15  # for the imports before, and to stop and write
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    out = args.out or ROOT / "benchmarks" / "results" / f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '_', name).lower()}"
    machine = {"device": describe_device(device), "frames": fastest_gather().__name__, **describe_benchmark()}

    def save(rows: list[Item]) -> None:
        out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(machine, rows))

    with tempfile.TemporaryDirectory() as folder:
        games = ("Pong", "Breakout") if args.tiny else TRAIN_40
        make_store(Path(folder, "store"), games=games, num_steps=60 if args.tiny else 300)
        worker = Worker(args.device, Path(folder), tiny=args.tiny)
        try:
            rows = run(plan, worker, deadline, save)
        finally:
            worker.close()
    print(out.with_suffix(".md").read_text())
    if any(row["kind"] == "tests" and "failed" in row for row in rows):
        sys.exit("gpu tests failed")


if __name__ == "__main__":
    main()
