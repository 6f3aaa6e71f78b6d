"""``make gpu-check`` without a GPU: its plan, its table, and what it does with rows that fail or take too long."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


@pytest.fixture
def blocked_milliseconds(gpu_check):
    from _gpu_rows import profiled

    return lambda trainer, **more: profiled(trainer, **more)[0]["host_blocked_milliseconds"]


@pytest.fixture
def worker(gpu_check, tmp_path):
    worker = gpu_check.Worker("cpu", tmp_path, tiny=True)
    yield worker
    worker.close()


def test_the_plan_has_the_whole_table_with_the_most_valuable_rows_first(gpu_check):
    plan = gpu_check.make_plan()
    names = [gpu_check.name_of(item) for item in plan]
    assert len(set(names)) == len(names)
    table = {
        (item["network"], item["batch_size"], item["precision"], item["layout"], item["mode"])
        for item in plan
        if item["kind"] == "step" and not item["double_q"]
    }
    assert len(table) == 3 * 2 * 2 * 2 * 3
    assert names[:3] == ["tests", "device_peak", "step resnet50 512 bf16 channels_last graph"]
    assert plan[2]["readers"] == [1, 2, 4]


def test_a_row_that_fails_or_ends_its_process_loses_only_itself(gpu_check, worker):
    peak = {"kind": "device_peak", "precisions": ["fp32"], "seconds": 0}
    plan = [peak, {"kind": "no_such_kind", "seconds": 0}, peak, peak | {"precisions": 7}, peak]
    kept = []
    rows = gpu_check.run(plan, worker, time.monotonic() + 300, lambda rows: kept.append(copy.deepcopy(rows)))
    left = [sum("skipped" in row for row in rows) for rows in kept]
    assert [row.get("failed", "")[:14] for row in rows] == ["", "AttributeError", "", "TypeError: 'in", ""]
    assert rows[0]["fp32_tflops"] > 0 and left == [5, 4, 4, 3, 3, 2, 2, 1, 1, 0]
    page = gpu_check.markdown({"device": "x", "command": "x", "date": "x", "commit": "x", "frames": "x"}, kept[2])
    assert page.endswith(
        "## Not measured\n\n- under way: no_such_kind\n- not reached: device_peak; device_peak; device_peak\n"
    )
    # As the system's killer of processes does.
    worker._process.kill()
    (died, again) = gpu_check.run([peak, peak], worker, time.monotonic() + 300, kept.append)
    assert died["failed"] == "the measuring process died (exit code -9)"
    assert again["fp32_tflops"] > 0


def test_what_takes_too_long_is_stopped_and_the_rest_skipped(gpu_check, worker):
    peak = {"kind": "device_peak", "precisions": ["fp32"], "seconds": 0}
    deadline = time.monotonic() + 0.5  # shorter than a process needs to start
    rows = gpu_check.run([peak | {"seconds": 60}, peak, peak], worker, deadline, lambda rows: None)
    assert [row["skipped"] for row in rows] == ["0 s were left", "stopped after 0 s", "0 s were left"]
    assert time.monotonic() < deadline + 300
    assert worker._process is None


def test_a_row_that_hangs_fails_while_there_is_time_for_others(gpu_check, worker, monkeypatch):
    monkeypatch.setattr(gpu_check, "LONGEST_ROW_SECONDS", 0.3)
    peak = {"kind": "device_peak", "precisions": ["fp32"], "seconds": 0}
    (row,) = gpu_check.run([peak], worker, time.monotonic() + 300, lambda rows: None)
    assert row["failed"] == "stopped after 0 s"


def steps_that(update, device):
    return SimpleNamespace(device=torch.device(device), replay=SimpleNamespace(sample=lambda: None), update=update)


def test_time_in_calls_that_wait_is_added_up_per_step(blocked_milliseconds):
    def update(batch):
        for name, seconds in (("cudaStreamSynchronize", 0.01), ("cudaMemcpyAsync", 0.02), ("cudaLaunchKernel", 0.04)):
            with record_function(name):
                time.sleep(seconds)

    assert 30 <= blocked_milliseconds(steps_that(update, "cpu"), num_steps=3) < 40
    assert blocked_milliseconds(steps_that(lambda batch: time.sleep(0.01), "cpu")) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_waits_for_the_device_is_told_from_one_that_does_not(blocked_milliseconds, waits):
    def update(batch):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        if waits:
            torch.cuda.synchronize()

    assert (blocked_milliseconds(steps_that(update, "cuda")) > 5) == waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_told_apart_by_kind(gpu_check):
    from _gpu_rows import profiled

    x = torch.randn(8, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def update(batch):
        torch.nn.functional.conv2d(x, x[:, :, :3, :3].contiguous())
        return matrix @ matrix

    row, kernels = profiled(steps_that(update, "cuda"))
    assert row["convolution_milliseconds"] > 0 and row["matmul_milliseconds"] > 0 and row["triton_milliseconds"] == 0
    assert sum(value for name, value in row.items() if name != "host_blocked_milliseconds") == pytest.approx(
        sum(milliseconds for _, milliseconds, _ in kernels), abs=0.01
    )


def row(**changes):
    common = {"kind": "step", "network": "resnet50", "batch_size": 512, "precision": "bf16", "mode": "graph"}
    return common | {"double_q": False} | changes


def test_targets_by_hand(gpu_check):
    rows = [
        row(samples_per_second=24_000, share_of_matmul_peak=0.26, host_blocked_milliseconds=0.02, data_wait_2=0.03),
        row(mode="eager", samples_per_second=12_000, share_of_matmul_peak=0.13, host_blocked_milliseconds=9.0),
        row(double_q=True, samples_per_second=21_000, share_of_matmul_peak=0.4),
        row(network="resnet101", failed="OutOfMemoryError", samples_per_second=1e9),
        row(kind="peer", mode="eager", side="torchrl_hooked", samples_per_second=5_000),
        row(kind="peer", mode="kernels", side="torchrl_hooked", samples_per_second=6_000),
        row(kind="peer", mode="eager", side="torchrl", samples_per_second=9_999),
        {"kind": "curve", "modes": ["eager", "graph"], "greatest_deviation": 0.01}
        | {"deviation_eager": 0.01, "deviation_graph": 0.011},
    ]
    found = [(line["measured"], line["verdict"]) for line in gpu_check.targets(rows)]
    assert found == [
        ("0.26", "met"),
        ("4", "met"),
        ("3.5", "MISSED"),
        *[("", "not measured")] * 3,
        ("0.02", "met"),
        ("0.03", "MISSED"),
        ("0.01", "met"),
        ("0.011", "MISSED"),
    ]


@pytest.mark.slow
def test_the_whole_script_in_little_without_a_gpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--tiny", "--minutes", "60"]
    subprocess.run([*command, "--out", str(tmp_path / "check")], check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    kinds = ["tests", "device_peak", "step", "peer", "curve", "resume", "checkpoint", "evaluation"]
    assert list(dict.fromkeys(row["kind"] for row in rows)) == kinds
    assert [row["network"] for row in rows if "failed" in row] == ["no_such_network"]
    assert not any("skipped" in row for row in rows)
    (resumed,) = (row for row in rows if row["kind"] == "resume")
    assert resumed["is_equal_bit_for_bit"] and resumed["greatest_way_of_a_weight"] > 0
    page = (tmp_path / "check.md").read_text()
    assert page.startswith("# cpu (") and "## Not measured\n\nNothing." in page
