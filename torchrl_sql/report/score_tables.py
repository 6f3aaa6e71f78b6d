"""The report's tables of scores, from the analysis of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from torchrl_sql.games import GAMES
from torchrl_sql.report.analysis import BEHAVIOUR, DQN, HUMAN, RANDOM, Analysis
from torchrl_sql.report.table import Cell, Record, Table
from torchrl_sql.report.text import (
    REFERENCE_LABELS,
    format_interval,
    format_score,
    name_games,
    plural,
    sentence,
    two_digits,
)
from torchrl_sql.statistics.intervals import AGGREGATES, Interval, Verdict, interquartile_mean
from torchrl_sql.statistics.scores import Reference, normalised_score, published_scores, split_by_reference

MIN_PUBLISHED_GAMES = 5
"""With fewer games that published agents share with a report, their IQM stands beside ours in the table only."""


def score_table(analysis: Analysis) -> Table:
    """One row per game, one column per policy."""
    columns = analysis.policy_columns
    counts = {label: sorted({int(n) for n in runs.counts.sum(0)}) for label, runs in analysis.runs.items()}
    count_once = analysis.many_games and all(len(numbers) == 1 for numbers in counts.values())
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for game in analysis.data.games:
        policies = analysis.policies(game)
        best = max(policies[agent.label].mean.point for agent in analysis.agents)
        row = [Cell(game)]
        for policy in columns:
            if policy not in policies:
                row.append(Cell("–"))
                continue
            mean, num_episodes, detail, _ = policies[policy]
            is_agent = policy in analysis.runs
            lines = [] if num_episodes is None else [format_interval(mean)]
            lines += [] if num_episodes is None or (is_agent and count_once) else [f"n = {num_episodes:,}"]
            lines += [detail] if detail else []
            row.append(Cell(format_score(mean.point), tuple(lines), is_agent and mean.point == best))
            records.append(
                {
                    "game": game,
                    "policy": policy,
                    "detail": detail,
                    "mean_return": mean.point,
                    "low_95": mean.low,
                    "high_95": mean.high,
                    "interval_over": None if num_episodes is None else mean.unit,
                    "num_episodes": num_episodes,
                    "num_seeds": len(analysis.runs[policy].seeds) if is_agent else None,
                    "human_normalised": _normalised_or_none(mean.point, game),
                }
            )
        rows.append(row)
    return Table(
        name="score_table",
        caption=_score_caption(analysis, counts if count_once else None),
        header=("Game", *columns),
        rows=rows,
        records=records,
    )


def _score_caption(analysis: Analysis, counts: Mapping[str, Sequence[int]] | None) -> str:
    """``counts``: episodes of each agent, where they are the same in every game."""
    caption = "Mean raw return per episode and its 95% interval"
    if counts is None:
        caption += ", number of episodes"
    elif len({numbers[0] for numbers in counts.values()}) == 1:
        caption += f"; episodes per game: {counts[analysis.main.label][0]:,} of each agent"
    else:
        listed = ", ".join(f"{numbers[0]:,} of {label}" for label, numbers in counts.items())
        caption += f"; episodes per game: {listed}"
    published = [name for name in (RANDOM, HUMAN, DQN) if name in analysis.policy_columns]
    if published:
        caption += f"; published scores: {', '.join(published)}"
    return f"{caption}. The agent with the highest mean is in bold."


def _normalised_or_none(score: float, game: str) -> float | None:
    return normalised_score(score, game, "human") if split_by_reference([game], "human")[0] else None


def aggregate_table(analysis: Analysis, reference: Reference) -> Table | None:
    """One row per agent (and the data's behaviour), one column per aggregate; None if no game can be normalised."""
    games, _ = analysis.split(reference)
    estimates = dict(analysis.aggregates(reference))
    if not estimates:
        return None
    behaviours = [analysis.policies(game).get(BEHAVIOUR) for game in games]
    means = [behaviour.mean.point for behaviour in behaviours if behaviour is not None]
    if len(means) == len(games):
        scores = np.array([normalised_score(mean, game, reference) for mean, game in zip(means, games, strict=True)])
        estimates[BEHAVIOUR] = {
            name: Interval(float(function(scores)), math.nan, math.nan) for name, function in AGGREGATES.items()
        }
    num_parameters = {agent.label: agent.num_parameters for agent in analysis.agents}
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for label, intervals in estimates.items():
        row = [Cell(label)]
        for name, interval in intervals.items():
            row.append(Cell(two_digits(interval.point), (format_interval(interval, two_digits),)))
            records.append(
                {
                    "policy": label,
                    "aggregate": name,
                    "point": interval.point,
                    "low_95": interval.low,
                    "high_95": interval.high,
                    "interval_over": interval.unit,
                    "num_games": len(games),
                    "num_seeds": len(analysis.runs[label].seeds) if label in analysis.runs else None,
                    "num_parameters": num_parameters.get(label),
                }
            )
        rows.append(row)
    label = REFERENCE_LABELS[reference]
    return Table(
        name=f"aggregate_{reference}_normalised",
        caption=f"{sentence(label)}-normalised score with 95% intervals over "
        f"{f'{len(games)} of the ' if len(games) < len(analysis.data.games) else ''}"
        f"{plural(len(analysis.data.games), 'game')}: 0 is the published random score, 1 the published {label} score. "
        "Higher is better, except for the optimality gap.",
        header=("Policy", "IQM", "Median", "Mean", "Optimality gap"),
        rows=rows,
        records=records,
    )


def reference_table(analysis: Analysis) -> Table:
    """One row per game: the published scores that normalise it, and so the aggregates that it is part of."""
    included = {reference: analysis.split(reference)[0] for reference in REFERENCE_LABELS}
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for game in analysis.data.games:
        known = GAMES[game]
        scores = (known.random_score, known.human_score, known.dqn_score)
        within = [game in games for games in included.values()]
        rows.append(
            [
                Cell(game),
                *(Cell("–" if score is None else format_score(score)) for score in scores),
                *(Cell("yes" if inside else "no") for inside in within),
            ]
        )
        record: dict[str, str | int | float | None] = {"game": game}
        record |= dict(zip(("random_score", "human_score", "dqn_score"), scores, strict=True))
        record |= {f"in_{reference}_normalised": str(game in games).lower() for reference, games in included.items()}
        records.append(record)
    return Table(
        name="games_in_aggregates",
        caption="Published scores that normalise each game, and the aggregates that it is part of.",
        header=("Game", "Random", "Human", "DQN", "In human-normalised", "In DQN-normalised"),
        rows=rows,
        records=records,
    )


def comparison_table(analysis: Analysis) -> Table | None:
    """One row per policy the main agent is compared with: in which games it scores higher, lower, or neither.

    None if there is nothing to compare with.
    """
    main = analysis.main.label
    kinds: tuple[Verdict, ...] = ("higher", "not distinguishable", "lower", "unknown")
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for policy in analysis.policy_columns:
        if policy in (main, RANDOM, HUMAN, DQN):
            continue
        verdicts = analysis.verdicts(policy)
        games = {kind: [game for game, verdict in verdicts.items() if verdict == kind] for kind in kinds}
        chance = analysis.probability_of_improvement(policy) if policy in analysis.runs else None
        cell = Cell("–")
        if chance is not None:
            cell = Cell(two_digits(chance.point), (format_interval(chance, two_digits),))
        rows.append([Cell(policy), *(Cell(_games_cell(names, len(verdicts))) for names in games.values()), cell])
        record: dict[str, str | int | float | None] = {"policy": policy}
        record |= {kind.replace(" ", "_"): " ".join(names) for kind, names in games.items()}
        improvement = (None, None, None) if chance is None else chance[:3]
        names = ("improvement", "improvement_low_95", "improvement_high_95")
        records.append(record | dict(zip(names, improvement, strict=True)))
    if not rows:
        return None
    return Table(
        name="comparison",
        caption=f"{main} against each policy, game by game. A verdict needs a 95% interval of the difference over "
        f"training seeds that leaves out 0; of one seed there is none. P(improvement): the chance that a run of {main} "
        "beats a run of the other agent in the same game.",
        header=("Compared with", f"{main} higher", "Not distinguishable", f"{main} lower", "No verdict",
                "P(improvement)"),
        rows=rows,
        records=records,
    )  # fmt: skip


def _games_cell(games: Sequence[str], total: int) -> str:
    if not games:
        return "–"
    return f"all {total}" if len(games) == total > 3 else ", ".join(games) if total <= 6 else f"{len(games)} of {total}"


def seed_table(analysis: Analysis) -> Table | None:
    """One row per seed and game, and one per seed over all games; None if no agent has more than one seed.

    Of many games, only the rows over all games are shown.
    """
    seeds = sorted({seed for runs in analysis.runs.values() for seed in runs.seeds})
    if len(seeds) < 2:
        return None
    human_games, _ = analysis.split("human")
    rows: list[list[Cell]] = []
    records: list[Record] = []
    normalised = analysis.normalised("human")
    for game in (*analysis.data.games, *(["IQM"] if human_games else [])):
        for seed in seeds:
            row = [Cell(f"{game}, seed {seed}")]
            for label, runs in analysis.runs.items():
                if seed not in runs.seeds:
                    row.append(Cell("–"))
                    continue
                s = runs.seeds.index(seed)
                if game in runs.games:
                    g = runs.games.index(game)
                    value, count = float(runs.run_scores()[s, g]), int(runs.counts[s, g])
                    row.append(Cell(format_score(value)))
                else:
                    value, count = float(interquartile_mean(normalised[label].run_scores()[s])), None
                    row.append(Cell(two_digits(value)))
                records.append({"game": game, "seed": seed, "policy": label, "mean": value, "num_episodes": count})
            if not (analysis.many_games and human_games and game != "IQM"):
                rows.append(row)
    shown = "human-normalised IQM over games"
    if not (analysis.many_games and human_games):
        shown = f"mean raw return by game, and {shown}" if human_games else "mean raw return by game"
    return Table(
        name="seeds",
        caption=f"Each training seed by itself: {shown}.",
        header=("Game and seed", *analysis.runs),
        rows=rows,
        records=records,
    )


def published_games(analysis: Analysis) -> list[str]:
    """The report's games in which every published agent has a score."""
    agents = published_scores().values()
    return [game for game in analysis.data.games if all(game in scores for scores in agents)]


def published_iqm(agent: str, games: Sequence[str]) -> float:
    """Human-normalised IQM of a published agent over ``games``, one score each."""
    return _human_iqm(published_scores()[agent], games)


def _human_iqm(scores: Mapping[str, float], games: Sequence[str]) -> float:
    return float(interquartile_mean(np.array([normalised_score(scores[game], game, "human") for game in games])))


def published_name(agent: str) -> str:
    """``Scaled QL 80M (JOWA's run)`` for ``Scaled_QL_80M``: its authors are not those who trained it."""
    return f"{agent.replace('_', ' ')} (JOWA's run)"


def published_table(analysis: Analysis) -> Table | None:
    """Published agents beside the main one on the games both have; None if there are no such games."""
    agents = published_scores()
    games = published_games(analysis)
    if not games:
        return None
    label = analysis.main.label
    ours = {game: analysis.game_means[label][game].point for game in games}
    columns = {label: ours} | {published_name(name): scores for name, scores in agents.items()}
    rows = [
        [Cell(game), *(Cell(format_score(scores[game]), strong=name == label) for name, scores in columns.items())]
        for game in games
    ]
    records: list[Record] = [
        {
            "game": game,
            "agent": name,
            "score": scores[game],
            "human_normalised": _normalised_or_none(scores[game], game),
        }
        for game in games
        for name, scores in columns.items()
    ]
    human_games, _ = split_by_reference(games, "human")
    if human_games:
        row = [Cell(f"Human-normalised IQM ({len(human_games)})")]
        for name, scores in columns.items():
            value = _human_iqm(scores, human_games)
            row.append(Cell(two_digits(value), strong=name == label))
            records.append({"game": "human-normalised IQM", "agent": name, "score": None, "human_normalised": value})
        rows.append(row)
    return Table(
        name="published_agents",
        caption=f"Mean raw return on {name_games(games, len(analysis.data.games))}, which published multi-game agents "
        "share with this report.",
        header=("Game", *columns),
        rows=rows,
        records=records,
    )
