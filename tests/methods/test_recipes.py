"""CONTRIBUTING's recipes for a method and a setting, followed to the letter in a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from torchrl_sql.data import FrameStore

ROOT = Path(__file__).parents[2]


def blocks(recipe):
    """File and text of each code block of a recipe."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^### {recipe}\n(.*?)(?=^##)", page, flags=re.S | re.M)
    return re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, flags=re.S)


def follow(recipe, folder):
    for name, text in blocks(recipe):
        file = folder / name
        grows = name in ("torchrl_sql/methods/__init__.py", "torchrl_sql/config/schema.py")
        assert grows == (file.exists() and file.suffix == ".py"), name
        file.write_text((file.read_text() + "\n\n" if grows else "") + text)


@pytest.fixture
def copy(tmp_path):
    """A copy of package and configs, and its command line."""
    shutil.copytree(ROOT / "torchrl_sql", tmp_path / "torchrl_sql", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")

    def run(*words):
        command = [sys.executable, "-m", "torchrl_sql", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})

    return tmp_path, run


@pytest.mark.slow
def test_the_recipes_make_a_method_that_trains_and_plays_and_has_a_setting(copy):
    folder, run = copy
    with FrameStore.create(folder / "store").writer("Freeway", source="noise") as writer:
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 255, (40, 84, 84), dtype=np.uint8)
        writer.add_episode(frames, rng.integers(0, 3, 40), rng.integers(0, 2, 40).astype(float), terminated=True)
    settings = ["scale=cpu", "method=filtered", "data.store=store", "data.games=[Freeway]", "data.batch_size=4"]
    settings += ["trainer.num_gradient_steps=2", "optim.warmup_gradient_steps=0", "trainer.loggers=[csv]"]

    assert "method must be one of" in run("train", *settings).stderr
    follow("A method", folder)
    trained = run("train", *settings, "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    played = run("evaluate", "run", "--episodes", "1", "--max-env-frames", "240")
    assert played.returncode == 0, played.stderr
    assert "filtered" in (folder / "run" / "scores.csv").read_text()
    reported = run("report", "run")
    assert "Filtered" in reported.stdout, reported.stderr

    assert "no setting 'method.least_reward'" in run("train", *settings, "method.least_reward=0.5").stderr
    follow("A setting", folder)
    printed = run("train", *settings, "method.least_reward=0.5", "--print-config")
    assert "least_reward: 0.5" in printed.stdout, printed.stderr
    assert "must be at least 0, got -1.0" in run("train", *settings, "method.least_reward=-1").stderr
