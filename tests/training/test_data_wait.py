from __future__ import annotations

import time

import pytest
import torch

from torchrl_sql.training.data_wait import MAX_STEPS_AHEAD, DataWait

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_a_gpu)]


def work_of_the_gpu(seconds):
    """Queued, not waited for."""
    torch.cuda._sleep(int(seconds * 1.5e9))  # cycles at some 1.5 to 2 GHz


@pytest.mark.parametrize("device", DEVICES)
def test_waits_add_up_until_they_are_taken(device):
    wait = DataWait(torch.device(device))
    for _ in range(3):
        with wait:
            time.sleep(0.02)
        time.sleep(0.1)
    assert 0.05 <= wait.take_seconds() < 0.2
    assert wait.take_seconds() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_never_came_was_not_waited_for(device):
    wait = DataWait(torch.device(device))
    with pytest.raises(OSError), wait:
        time.sleep(0.1)
        raise OSError
    with wait:
        pass
    assert wait.take_seconds() < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_with_steps_to_take_does_not_wait_though_the_host_does():
    wait = DataWait(torch.device("cuda"))
    work_of_the_gpu(0.5)
    for _ in range(5):
        with wait:
            time.sleep(0.02)
    assert wait.take_seconds() < 0.02
    with wait:
        time.sleep(0.02)
    assert wait.take_seconds() > 0.015


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_goes_so_many_steps_ahead_and_no_further():
    wait = DataWait(torch.device("cuda"))
    work_of_the_gpu(0.001)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in range(MAX_STEPS_AHEAD + 2):
        if step == MAX_STEPS_AHEAD + 1:
            issued = time.perf_counter() - began
        with wait:
            pass
        work_of_the_gpu(0.1)
    assert issued < 0.05
    assert time.perf_counter() - began > 0.05
    torch.cuda.synchronize()  # other tests' calls would wait for it
