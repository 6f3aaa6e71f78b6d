from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "store_damage.py"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_no_random_damage_is_silent_unnamed_or_deadly(tmp_path, codec):
    """A small version of the benchmark: four damages of each kind."""
    file = tmp_path / "counts.json"
    command = [sys.executable, str(BENCHMARK), "--damages", "52", "--seed", "1", "--codec", codec, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(file.read_text())
    assert counts["bad"] == [] and sum(counts["total"].values()) - counts["total"]["unnoticed"] == 52
    assert counts["total"]["named"] > 30 and counts["total"]["harmless"] > 0
