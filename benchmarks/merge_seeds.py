"""Training seeds of one study whose pages were made apart: their scores together, and the verdicts.

    python benchmarks/merge_seeds.py benchmarks/results/studies/transfer_online.json \
        benchmarks/results/studies/transfer_online_cpc_seed2.json --agent cpc

Reads what ``torchrl-sql report --json`` prints. Of each agent it takes mean and interval over the seeds of each file,
which give number, mean and variance of the seeds, and adds them up. It prints those of one agent with Student's 95%
interval, and the difference of each other one to it with Welch's (of 1947, as docs/evaluation.md says).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from torchrl_sql.statistics.intervals import student, welch

TABLES = {
    "score_table": ("mean_return", "at the end"),
    "learning_areas": ("mean_over_steps", "over the learning curve"),
}


class Seeds(NamedTuple):
    """What is known of a number of seeds."""

    number: int
    mean: float
    squares: float
    """Sum of squared deviations from the mean."""

    def __add__(self, other: Any) -> Seeds:
        number = self.number + other.number
        between = (self.mean - other.mean) ** 2 * self.number * other.number / number
        mean = (self.number * self.mean + other.number * other.mean) / number
        return Seeds(number, mean, self.squares + other.squares + between)

    def values(self) -> np.ndarray:
        """Numbers with this mean and variance, for functions that want the seeds themselves."""
        pattern = np.linspace(-1, 1, self.number)
        return self.mean + pattern * np.sqrt(self.squares / max((pattern**2).sum(), 1e-300))


def seeds_of(row: dict[str, Any], key: str) -> Seeds:
    """The seeds that a row's interval is over; of one seed the interval is over episodes and says nothing of it."""
    number, low, high = row["num_seeds"], row["low_95"], row["high_95"]
    if number == 1 or low is None:  # None: all seeds are equal
        return Seeds(number, row[key], 0.0)
    variance = ((high - low) / 2 / stats.t.ppf(0.975, number - 1)) ** 2 * number
    return Seeds(number, row[key], variance * (number - 1))


def shown(values: tuple[Any, Any, Any]) -> str:
    """A point and its interval."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*map(float, values))


def main() -> None:
    """Print a line per table, game and other agent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--agent", required=True)
    args = parser.parse_args()
    documents = [json.loads(file.read_text())["tables"] for file in args.files]
    for table, (key, when) in TABLES.items():
        known: dict[str, dict[str, list[Seeds]]] = {}
        for document in documents:
            for row in document.get(table, []):
                if row.get("num_seeds"):  # no data, constant actions or published scores
                    known.setdefault(row["game"], {}).setdefault(row["policy"], []).append(seeds_of(row, key))
        for game, agents in known.items():
            ours = sum(agents[args.agent][1:], start=agents[args.agent][0])
            print(f"{game}, {when}: {args.agent} {shown(student(ours.values()))} ({ours.number} seeds)")
            for other, parts in agents.items():
                if other != args.agent:
                    theirs = sum(parts[1:], start=parts[0])
                    print(f"  {other} - {args.agent}: {shown(welch(theirs.values(), ours.values()))}")


if __name__ == "__main__":
    main()
