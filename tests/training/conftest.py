from __future__ import annotations

import pytest

from torchrl_sql.config import compose_run_config
from torchrl_sql.stages import collect_data

TINY = [
    "experiment=quickstart",
    "collection.num_agent_steps_per_game=600",
    "collection.max_env_frames_per_episode=800",
    "data.games=[Breakout,Freeway]",
    "objective.cql_alpha=0.1",
    "data.batch_size=8",
    "trainer.num_gradient_steps=12",
    "trainer.target_update_interval_gradient_steps=3",
    "trainer.log_interval_gradient_steps=2",
    "trainer.checkpoint_interval_gradient_steps=4",
    "trainer.loggers=[csv]",
    "optim.warmup_gradient_steps=2",
]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store of some 600 real transitions of Breakout and of Freeway each."""
    path = tmp_path_factory.mktemp("data") / "store"
    collect_data(compose_run_config([*TINY, f"data.store={path}"]))
    return path


@pytest.fixture
def make_config(store, tmp_path):
    """Composes a tiny run over the store; each ``name`` has a folder of its own."""

    def make(*overrides, name="run"):
        return compose_run_config([*TINY, f"data.store={store}", f"run_dir={tmp_path / name}", *overrides])

    return make
