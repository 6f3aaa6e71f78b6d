from __future__ import annotations

import pytest

from torchrl_sql.config import compose_run_config
from torchrl_sql.training import train


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.encoder=resnt", "model: encoder .*'resnt'"),
        ("model.pooling=max", "model: pooling .*'max'"),
        ("trainer.loggers=[csv,wandb]", "trainer.loggers names wandb, which is not installed"),
        ("trainer.device=cuda:7", "device=cuda:7 must be one of the"),
    ],
)
def test_what_cannot_run_here_is_refused_before_the_store_is_opened(tmp_path, setting, message):
    words = ["scale=cpu", "data.store=/nowhere", f"run_dir={tmp_path / 'run'}", setting]
    with pytest.raises(ValueError, match=message):
        train(compose_run_config(words))
    assert not list(tmp_path.iterdir())
