"""Injects every fault of ``tests/slurm/test_faults.py`` several times and counts what came of it.

``python benchmarks/slurm_faults.py --rounds 3`` writes ``benchmarks/results/slurm_faults.json``. Rounds run one after
the other, each with a SLURM of its own; ``--faults`` chooses some, as pytest's ``-k`` does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _machine import describe

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", default="fault", help="an expression of pytest -k (default: all)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "slurm_faults.json")
    args = parser.parse_args()
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    record = describe() | {"slurm": slurm, "outcomes": []}
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
                record["outcomes"] += [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for fault in dict.fromkeys(outcome["fault"] for outcome in record["outcomes"]):
        own = [outcome for outcome in record["outcomes"] if outcome["fault"] == fault]
        good = [outcome for outcome in own if outcome["outcome"] != "failed"]
        print(f"{fault:32} {len(good)} of {len(own)} {', '.join(sorted({o['outcome'] for o in own}))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
