from __future__ import annotations

import dataclasses

import pytest

from torchrl_sql.bench import Measurements, format_plans, plan

MEASURED = Measurements(
    step_seconds={4: 0.02, 64: 0.05, 512: 0.4},
    read_transitions_per_second=10_000,
    read_bytes_per_transition=4_000,
    num_parameters=80_000_000,
    gpus_per_node=8,
    node_bytes_per_second=300e9,
    network_bytes_per_second=20e9,
)


def test_one_gpu_by_hand():
    one = plan(MEASURED, num_gpus=1, num_gradient_steps=864_000)
    assert one.samples_per_gpu == 512
    assert one.gradient_seconds == 0
    assert one.step_seconds == one.compute_seconds == 0.4
    assert one.data_seconds == pytest.approx(0.0512)
    assert one.days == pytest.approx(4.0)
    assert one.transitions_per_second == pytest.approx(1280)
    assert one.read_bytes_per_second == pytest.approx(5.12e6)


def test_gradients_within_a_node_and_across_nodes_by_hand():
    node = plan(MEASURED, num_gpus=8)
    assert node.compute_seconds == 0.05
    assert node.gradient_seconds == pytest.approx(2 * 7 / 8 * 320e6 / 300e9)
    assert node.step_seconds == pytest.approx(0.05 + node.gradient_seconds)
    nodes = plan(MEASURED, num_gpus=32)
    assert nodes.gradient_seconds == pytest.approx(2 * 31 / 32 * 320e6 / 20e9)


def test_compute_is_interpolated_and_never_below_the_least_measured():
    assert plan(MEASURED, num_gpus=16).compute_seconds == pytest.approx(0.02 + (32 - 4) / 60 * 0.03)
    assert plan(MEASURED, num_gpus=512).compute_seconds == 0.02


def test_slow_readers_set_the_pace():
    slow = dataclasses.replace(MEASURED, read_transitions_per_second=512)
    assert plan(slow, num_gpus=1).step_seconds == 1.0


@pytest.mark.parametrize("num_gpus", [0, 3])
def test_batch_must_be_shared_out_evenly(num_gpus):
    with pytest.raises(ValueError, match=f"num_gpus must divide batch_size 512, got {num_gpus}"):
        plan(MEASURED, num_gpus=num_gpus)


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="step_seconds must be known for 1024 samples or more, got up to 512"):
        plan(MEASURED, num_gpus=1, batch_size=1024)
    with pytest.raises(ValueError, match="network_bytes_per_second must be known for 32 GPUs at 8 per node"):
        plan(dataclasses.replace(MEASURED, network_bytes_per_second=None), num_gpus=32)


def test_the_table_has_one_row_per_plan():
    table = format_plans([plan(MEASURED, num_gpus=n) for n in (1, 8)]).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| 1 | 512 | 400 | 0 |")
    assert {line.count("|") for line in table} == {11}
