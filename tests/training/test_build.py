from __future__ import annotations

import pytest
import torch

from torchrl_sql.config import ConfigError, compose_run_config
from torchrl_sql.training import train
from torchrl_sql.training.build import resolve_device


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
def test_a_cuda_device_always_has_its_index(monkeypatch, name, num_gpus, local_rank, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_device_that_is_not_there_is_named(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"trainer.device must be on .* which has 0 GPUs, got '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.encoder=resnt", "model: encoder .*'resnt'"),
        ("model.pooling=max", "model: pooling .*'max'"),
        ("trainer.loggers=[csv,wandb]", "trainer.loggers names wandb, which is not installed"),
        ("trainer.device=cuda:7", "trainer.device must be on"),
    ],
)
def test_what_cannot_run_here_is_refused_before_the_store_is_opened(tmp_path, setting, message):
    words = ["scale=cpu", "data.store=/nowhere", f"run_dir={tmp_path / 'run'}", setting]
    with pytest.raises(ConfigError, match=message):
        train(compose_run_config(words))
    assert not list(tmp_path.iterdir())
