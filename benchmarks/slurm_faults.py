"""Injects every fault of ``tests/slurm/test_faults.py`` several times and counts what came of it.

``python benchmarks/slurm_faults.py --rounds 3`` writes ``benchmarks/results/slurm_faults.json`` and ``.md``. Rounds run
one after the other, each with a SLURM of its own; outcomes are added to those that the file has. ``--faults`` chooses,
as pytest's ``-k`` does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torchrl_sql.provenance import describe_benchmark

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", default="fault", help="an expression of pytest -k (default: all)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "slurm_faults.json")
    args = parser.parse_args()
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    record = describe_benchmark() | {"slurm": slurm, "outcomes": []}
    if args.json.exists():  # a measurement in several sittings
        record["outcomes"] = json.loads(args.json.read_text(encoding="utf-8"))["outcomes"]
    code = 0
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "outcomes"
            command = [sys.executable, "-m", "pytest", "-m", "slurm", "tests/slurm/test_faults.py", "-k", args.faults]
            environment = os.environ | {"TORCHRL_SQL_SLURM_RECORD": str(lines)}
            code |= subprocess.run(command, cwd=ROOT, env=environment).returncode
            if lines.exists():
                found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
                record["outcomes"] += [outcome | {"commit": record["commit"]} for outcome in found]
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = write_page(record)
    args.json.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return code


def write_page(record: dict[str, Any]) -> str:
    """The record as a table."""
    outcomes = record["outcomes"]
    lines = ["# Faults of training jobs on SLURM", ""]
    commits = ", ".join(sorted({outcome["commit"] for outcome in outcomes}))
    lines += [f"Last command: `{record['command']}`, {record['date']}; commits: {commits}.", ""]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [
        f"{record['slurm']}, two nodes on one host; {record['processor']}, {record['num_cores']} cores; {versions}."
    ]
    lines += ["Seconds are those of a busy machine, three faults at a time.", ""]
    lines += ["| fault | right | outcome | seconds |", "|---|---|---|---|"]
    for fault in dict.fromkeys(outcome["fault"] for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome["fault"] == fault]
        right = sum(outcome["outcome"] != "failed" for outcome in own)
        kinds = ", ".join(sorted({outcome["outcome"] for outcome in own}))
        seconds = ", ".join(f"{outcome['seconds']:.0f}" for outcome in own)
        lines.append(f"| {fault.replace('_', ' ')} | {right} of {len(own)} | {kinds} | {seconds} |")
    right = sum(outcome["outcome"] != "failed" for outcome in outcomes)
    return "\n".join([*lines, "", f"Right in all: {right} of {len(outcomes)}.", ""])


if __name__ == "__main__":
    sys.exit(main())
