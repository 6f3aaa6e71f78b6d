from __future__ import annotations

import pytest

from torchrl_sql.config import compose_run_config
from torchrl_sql.training.build import build_trainer


@pytest.mark.parametrize(
    ("setting", "message"), [("encoder=resnt", "encoder .*'resnt'"), ("pooling=max", "pooling .*'max'")]
)
def test_unknown_networks_are_refused_before_the_store_is_opened(tmp_path, setting, message):
    config = compose_run_config(["scale=cpu", f"data.store={tmp_path / 'none'}", f"model.{setting}"])
    with pytest.raises(ValueError, match=message):
        build_trainer(config)
