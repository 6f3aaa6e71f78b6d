"""Our random agent beside the published random scores, from an evaluation of it, as a Markdown table.

    torchrl-sql evaluate random --games GAMES --episodes 40 --sticky 0 --max-env-frames 18000 --out runs/random
    python benchmarks/random_scores.py runs/random > benchmarks/results/random_scores.md

The published scores (Mnih et al. 2015 and successors, ``reference/games.csv``) are means of a few dozen episodes
without a stated error. A game agrees if the difference is within 1.96 standard errors of a difference of two such
means, each taken to have the error of ours.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from torchrl_sql.evaluation.episodes import SCORES, read_episodes
from torchrl_sql.games import GAMES
from torchrl_sql.provenance import describe_benchmark

TEXT = """\
# The random agent against the published random scores

Uniform over each game's legal actions, one decision in four frames, sticky actions {sticky:g}, no no-op starts,
episodes cut at {frames:,} emulator frames (five minutes). The published agent (Mnih et al. 2015) acted ten times a
second, one decision in six frames, after up to 30 no-ops, on older emulator and ROM builds: games in which holding an
action longer matters need not agree.

{agree} of {number} games agree within sampling error (difference below 1.96 standard errors of a difference of two
means, each with the error of ours); {inside} published scores lie inside our 95% interval.
Not within: {others}.
By chance about one game in twenty would not be. The others differ by more than noise; that the decision rate is the
reason is our guess and was not tested.

| game | ours [95% interval] | episodes | published | difference / standard error |
|---|---|---|---|---|
{rows}

Commit {commit}, {date}, ale-py {ale}.

    torchrl-sql evaluate random --games {games} \\
      --episodes {episodes} --sticky {sticky:g} --max-env-frames {frames} --out FOLDER
    python benchmarks/random_scores.py FOLDER
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    episodes = [row for row in read_episodes(parser.parse_args().folder / SCORES) if row.agent == "random"]
    returns: dict[str, list[float]] = defaultdict(list)
    for row in episodes:
        returns[row.game].append(row.episode_return)
    if len({len(values) for values in returns.values()}) > 1:
        raise ValueError("every game must have as many episodes: those that end first are not a fair sample")
    rows, others, inside = [], [], 0
    for game, values in returns.items():
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
        published = GAMES[game].random_score
        if published is None:
            raise ValueError(f"{game} has no published random score")
        # Where all our episodes are alike, any difference is one.
        distance = (mean - published) / (math.sqrt(2) * error) if error else math.copysign(math.inf, mean - published)
        distance = 0.0 if mean == published else distance
        inside += abs(mean - published) <= 1.96 * error
        if abs(distance) > 1.96:
            others.append(game)
        interval = f"[{mean - 1.96 * error:,.1f}, {mean + 1.96 * error:,.1f}]"
        rows.append(f"| {game} | {mean:,.1f} {interval} | {len(values)} | {published:,.1f} | {distance:+.1f} |")
    machine = describe_benchmark()
    print(
        TEXT.format(
            sticky=episodes[0].sticky,
            frames=episodes[0].max_env_frames,
            agree=len(rows) - len(others),
            number=len(rows),
            inside=inside,
            others=", ".join(others) or "none",
            rows="\n".join(rows),
            commit=machine["commit"],
            date=machine["date"],
            ale=machine["versions"]["ale-py"],
            games=",".join(returns),
            episodes=max(map(len, returns.values())),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
