from __future__ import annotations

import pytest
import torch

from torchrl_sql.config import compose_run_config
from torchrl_sql.training.build import build_trainer, resolve_device


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


@pytest.mark.parametrize(
    ("setting", "message"), [("encoder=resnt", "encoder .*'resnt'"), ("pooling=max", "pooling .*'max'")]
)
def test_unknown_networks_are_refused_before_the_store_is_opened(tmp_path, setting, message):
    config = compose_run_config(["scale=cpu", f"data.store={tmp_path / 'none'}", f"model.{setting}"])
    with pytest.raises(ValueError, match=message):
        build_trainer(config)
