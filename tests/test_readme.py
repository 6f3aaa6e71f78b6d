"""What the README says can be done as it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.readme import render
from torchrl_sql.data import FrameStore

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_what_its_template_and_the_recorded_results_make():
    assert render() == README, "run: python benchmarks/readme.py"


def test_library_example_runs(tmp_path):
    store = FrameStore.create(tmp_path / "store")
    rng = np.random.default_rng(0)
    for game in ("Breakout", "Freeway"):
        with store.writer(game, source="noise") as writer:
            frames = rng.integers(0, 255, (9, 84, 84), dtype=np.uint8)
            writer.add_episode(frames, rng.integers(0, 4, 9), rng.normal(size=9), terminated=True)
    code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.S)  # the other: tests/training/test_policy.py
    names = {}
    code = code.replace("runs/quickstart/store", str(store.path)).replace("batch_size=512", "batch_size=4")
    exec(compile(code, "README.md", "exec"), names)
    gradients = [p.grad for p in names["loss"].parameters() if p.grad is not None]
    assert gradients and names["replay"].games == ("Breakout", "Freeway")


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_targets_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


def test_map_names_what_is_there():
    (tree,) = re.findall(r"## Repository layout\n\n```\n(.*?)```", README, flags=re.S)
    for line in tree.splitlines():
        base = ROOT / "torchrl_sql" if line.startswith("  ") else ROOT
        named = line.split("  ")[1 if line.startswith("  ") else 0].split()
        assert named
        for name in named:
            assert (base / name).exists(), name


def test_links_between_pages_lead_somewhere():
    folders = (".", "docs", "examples", "slurm", "benchmarks/results", "benchmarks/results/studies")
    pages = [page for folder in folders for page in (ROOT / folder).glob("*.md")]
    assert len(pages) > 20
    links = {
        (page, path) for page in pages for path in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8"))
    }
    assert [f"{page.name}: {path}" for page, path in sorted(links) if not (page.parent / path).exists()] == []
