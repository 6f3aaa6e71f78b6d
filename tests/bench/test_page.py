from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_of_the_page_are_what_the_command_prints():
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert printed.startswith("| network |")
    assert printed in page
