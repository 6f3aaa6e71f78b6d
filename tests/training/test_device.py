from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from torchrl_sql.training.device import describe_device, resolve_device


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, and these environment variables only."""

    def make(num_gpus, **variables):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("name", "num_gpus", "local_rank", "device"),
    [
        ("auto", 0, "1", "cpu"),
        ("auto", 1, "3", "cuda:0"),  # the launcher shows each process its own GPU only
        ("auto", 4, "3", "cuda:3"),
        ("cuda", 1, None, "cuda:0"),
        ("cuda", 4, None, "cuda:0"),
        ("cuda:2", 4, "3", "cuda:2"),
        ("cpu", 4, "3", "cpu"),
    ],
)
def test_a_cuda_device_always_has_its_index(machine, name, num_gpus, local_rank, device):
    machine(num_gpus, **({} if local_rank is None else {"LOCAL_RANK": local_rank}))
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(
    "asked", [{"SLURM_JOB_GPUS": "0,1"}, {"SLURM_GPUS_ON_NODE": "8"}, {"CUDA_VISIBLE_DEVICES": "0"}]
)
def test_auto_never_takes_the_cpu_where_gpus_were_asked_for(machine, asked):
    machine(0, **asked)
    ((name, value),) = asked.items()
    message = rf"GPUs were asked for \({name}={value}\) and torch .* sees none: .*choose device=cpu"
    with pytest.raises(ValueError, match=message):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "hidden", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"SLURM_GPUS_ON_NODE": "0"}]
)
def test_auto_takes_the_cpu_where_gpus_were_hidden_on_purpose(machine, hidden):
    machine(0, **hidden)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "num_gpus", "variables", "message"),
    [
        ("cuda", 0, {}, "device=cuda:0 must be one of the 0 GPUs that torch .* sees"),
        ("cuda:4", 4, {}, "device=cuda:4 must be one of the 4 GPUs"),
        ("cuda", 2, {"LOCAL_RANK": "2"}, "device=cuda:2 must be one of the 2 GPUs"),
        *(
            (name, 4, {}, "device must be auto, cpu, cuda or cuda:INDEX, got")
            for name in ("cuda:abc", "cpu:3", "gpu", "")
        ),
    ],
)
def test_a_device_that_is_not_there_is_named(machine, name, num_gpus, variables, message):
    machine(num_gpus, **variables)
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_the_description_names_device_and_torch_build():
    threads = torch.get_num_threads()
    expected = f"cpu ({threads} threads), torch {torch.__version__} ("
    assert describe_device(torch.device("cpu")).startswith(expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_freed_memory_is_used_again_without_page_faults():
    program = """if True:
        import resource, torch
        from torchrl_sql.training.device import prepare_cpu

        def num_page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(4_000_000) for _ in range(8)]  # 128 MB: by default glibc keeps 64 at most
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, blocks

        prepare_cpu(None)
        print([num_page_faults()[0] for _ in range(10)][-1])  # the first rounds make the heap grow
    """  # in a process of its own, whose heap nobody else has cut to pieces
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # of 31,250 pages
