"""Writes README.md from docs/README.md.j2 and benchmarks/results/*.json, so that its numbers are measured ones.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def render() -> str:
    """The text of README.md; a number that no result has is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([ROOT / "docs", RESULTS]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    return environment.get_template("README.md.j2").render(results)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render(), encoding="utf-8")
