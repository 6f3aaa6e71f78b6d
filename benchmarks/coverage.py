"""Do the report's 95% intervals cover, and do its verdicts err as seldom as they should?

Simulated agents: a run's expected score in a game is the game's mean plus an effect of its seed, half of whose variance
(or none) is shared by all games of the seed; its episodes scatter around it. ``spread`` is the seed effect's standard
deviation over the standard error of a run's mean. Skewed returns are Gamma(1), as heavy as an Atari game's.

    python benchmarks/coverage.py        # hours; writes benchmarks/results/coverage.{json,md}, continues what is there
    python benchmarks/coverage.py --fresh
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

from torchrl_sql.files import write_text
from torchrl_sql.games import TRAIN_40
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.statistics.intervals import (
    AGGREGATES,
    aggregate_differences,
    aggregates,
    game_differences,
    game_means,
    rliable_aggregates,
    verdict,
)
from torchrl_sql.statistics.scores import RunReturns

NUM_EPISODES = 16
EPISODE_SD = 0.2
RLIABLE = "mean by rliable"
SPREADS = (0.0, 0.3, 1.0, 3.0, 10.0)
RESULTS = Path(__file__).parent / "results"


class World:
    """Agents of one kind: where their scores lie and how they scatter."""

    def __init__(self, num_games: int, spread: float, *, shared: float, skewed: bool):
        self.games = TRAIN_40[:num_games]
        self.means = np.linspace(0.2, 1.2, num_games) if num_games > 1 else np.array([0.5])
        self.run_error = EPISODE_SD / np.sqrt(NUM_EPISODES)
        self.seed_sd = spread * self.run_error
        self.shared, self.skewed = shared, skewed

    def returns(self, generator: np.random.Generator, num_seeds: int, shift: float = 0.0) -> RunReturns:
        """The episodes of one agent; ``shift`` is in standard deviations of a run's score."""
        return self._runs(self._episodes(generator, num_seeds) + shift * np.hypot(self.seed_sd, self.run_error))

    def wider(self, generator: np.random.Generator, num_seeds: int) -> RunReturns:
        """An agent of the same means that scatters four times as much."""
        return self._runs(self.means[:, None] + 4 * (self._episodes(generator, num_seeds) - self.means[:, None]))

    def _episodes(self, generator: np.random.Generator, num_seeds: int) -> np.ndarray:
        shape = (num_seeds, len(self.games))
        effect = np.sqrt(self.shared) * generator.normal(size=(num_seeds, 1))
        effect = effect + np.sqrt(1 - self.shared) * generator.normal(size=shape)
        noise_shape = (*shape, NUM_EPISODES)
        noise = generator.gamma(1.0, size=noise_shape) - 1 if self.skewed else generator.normal(size=noise_shape)
        return (self.means + self.seed_sd * effect)[..., None] + EPISODE_SD * noise

    def _runs(self, values: np.ndarray) -> RunReturns:
        counts = np.full(values.shape[:2], NUM_EPISODES)
        return RunReturns(games=self.games, seeds=tuple(range(len(values))), values=values, counts=counts)

    def truth(self) -> dict[str, float]:
        """What each estimate estimates, from 20,000 seeds."""
        scores = self._episodes(np.random.default_rng(1), 20_000 if len(self.games) < 40 else 5_000).mean(-1)
        return {"game": float(self.means[0])} | {name: float(f(scores).mean()) for name, f in AGGREGATES.items()}


def measure(world: World, num_seeds: int, num_trials: int) -> dict[str, float]:
    """Coverage of each estimate, false verdicts between equal agents, and power at a difference of two run SDs."""
    generator = np.random.default_rng([num_seeds, num_trials])
    truth = world.truth()
    covered = dict.fromkeys([*truth, RLIABLE], 0)
    counts = dict.fromkeys(
        ("false, game", "false, IQM", "false, game, one four times as wide", "power, game", "t test's power, game"), 0
    )
    for _ in range(num_trials):
        x, y = world.returns(generator, num_seeds), world.returns(generator, num_seeds)
        intervals = {"game": game_means(x)[x.games[0]], **aggregates(x)}
        intervals[RLIABLE] = rliable_aggregates(x, num_resamples=400)["mean"]
        for name, value in {**truth, RLIABLE: truth["mean"]}.items():
            covered[name] += intervals[name].low <= value <= intervals[name].high
        counts["false, game"] += verdict(game_differences(x, y)[x.games[0]]) in ("higher", "lower")
        counts["false, IQM"] += verdict(aggregate_differences(x, y)["IQM"]) in ("higher", "lower")
        wide = world.wider(generator, num_seeds)
        counts["false, game, one four times as wide"] += verdict(game_differences(x, wide)[x.games[0]]) in (
            "higher",
            "lower",
        )
        better = world.returns(generator, num_seeds, shift=2.0)
        counts["power, game"] += verdict(game_differences(better, y)[x.games[0]]) == "higher"
        test = stats.ttest_ind(better.run_scores()[:, 0], y.run_scores()[:, 0])
        counts["t test's power, game"] += test.pvalue < 0.05 and test.statistic > 0
    named = {f"covers, {name}": count for name, count in covered.items()} | counts
    return {name: round(float(count) / num_trials, 4) for name, count in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that coverage.json has")
    args = parser.parse_args()
    path = RESULTS / "coverage.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not args.fresh else {"rows": []}
    if result["rows"] and (result["trials"], result["episodes"]) != (args.trials, NUM_EPISODES):
        parser.error(f"{path} is of {result['trials']} trials, {result['episodes']} episodes: --fresh measures anew")
    rows: list[dict] = result["rows"]
    before = [*result.get("before", []), result["benchmark"]] if rows else []
    for skewed, num_games, shared, spread, num_seeds in product(
        (False, True), (1, 8, 40), (0.0, 0.5), SPREADS, (3, 5, 10)
    ):
        row = {"skewed": skewed, "games": num_games, "shared": shared, "spread": spread, "seeds": num_seeds}
        if (num_games == 1 and shared) or (skewed and spread not in (0.0, 1.0)):
            continue
        if any(row.items() <= known.items() for known in rows):
            continue
        world = World(num_games, spread, shared=shared, skewed=skewed)
        rows.append(row | measure(world, num_seeds, args.trials))
        print(rows[-1], flush=True)
        about = {"benchmark": describe_benchmark(), "before": before, "trials": args.trials, "episodes": NUM_EPISODES}
        result = about | {"rows": rows}
        write_text(path, json.dumps(result, indent=1) + "\n")
        write_text(path.with_suffix(".md"), to_markdown(result))


def to_markdown(result: dict) -> str:
    """Worst rows first, then all of them."""
    about, rows = result["benchmark"], result["rows"]
    gaussian = [row for row in rows if not row["skewed"]]
    covers = [name for name in rows[0] if name.startswith("covers") and RLIABLE not in name]
    wrong, uneven = ["false, game", "false, IQM"], ["false, game, one four times as wide"]

    def span(names: list[str], chosen: list[dict]) -> str:
        rates = [row[name] for row in chosen for name in names]
        return f"{min(rates):.3f} to {max(rates):.3f}"

    skewed = [row for row in rows if row["skewed"]]
    lost = max(row["t test's power, game"] - row["power, game"] for row in gaussian)
    begun = "".join(f", begun at {part['commit']}, {part['date']}" for part in result["before"][:1])
    lines = [
        "# Coverage of intervals, false verdicts, power",
        "",
        f"`python benchmarks/coverage.py`, finished at {about['commit']}, {about['date']}{begun}: "
        f"{result['trials']:,} simulated pairs of agents "
        f"per row, {result['episodes']} episodes per run. A rate of 0.95 has a Monte-Carlo error of "
        f"{np.sqrt(0.95 * 0.05 / result['trials']):.3f}.",
        "",
        f"- Gaussian rows: coverage {span(covers, gaussian)}; false verdicts {span(wrong, gaussian)}, "
        f"{span(uneven, gaussian)} where one spread is four times the other; power at most "
        f"{lost:.3f} below that of the t test that assumes equal spreads.",
        f"- Coverage of the mean by rliable's bootstrap there: {span([f'covers, {RLIABLE}'], gaussian)}.",
        f"- Skewed rows: coverage {span(covers, skewed)}; false verdicts {span(wrong, skewed)}, "
        f"{span(uneven, skewed)}.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
    ]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
