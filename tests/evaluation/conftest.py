"""Runs of untrained networks."""

from __future__ import annotations

import pytest
import torch

from torchrl_sql.config import compose_run_config
from torchrl_sql.methods import make_method
from torchrl_sql.training.checkpoint import save_checkpoint

GAMES = ("Breakout", "Freeway")


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Makes the folder of a run with checkpoints of an untrained network, as training leaves it."""

    def make(*overrides: str, steps: tuple[int, ...] = (3, 6)):
        folder = tmp_path_factory.mktemp("runs") / "small"
        config = compose_run_config(
            [
                "scale=cpu",
                "data.store=store",
                "name=small",
                f"run_dir={folder}",
                f"data.games=[{','.join(GAMES)}]",
                "evaluation.num_episodes_per_game=2",
                "evaluation.max_env_frames_per_episode=240",
                *overrides,
            ]
        )
        folder.mkdir()
        (folder / "config.yaml").write_text(config.to_yaml())
        for step in steps:
            torch.manual_seed(step)
            method = make_method(config.method)
            loss = method.loss(method.network(config.model, config.games))
            content = {"config": config.to_yaml(), "trainer": {"step": step, "loss": loss.state_dict()}}
            save_checkpoint(folder / "checkpoints", step, content)
        return folder

    return make
