"""A small version of benchmarks/import_damage.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "import_damage.py"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchrl.collectors 0.14 warns about a class of its own.
def test_any_damage_is_named_and_costs_its_game_only(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("import_damage", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "import_damage", benchmark)
    spec.loader.exec_module(benchmark)
    results = benchmark.run(tmp_path, {"dqn-replay": 30, "torchrl-memmap": 10}, seed=1)
    assert len(results) == 40 and not [result for result in results if benchmark.is_fault(result)]
    assert {result["kind"] for result in results} == {"flip", "flips", "zeros", "cut", "delete", "append"}
