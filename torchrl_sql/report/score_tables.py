"""The report's tables of scores, from the analysis of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchrl_sql.games import GAMES
from torchrl_sql.report.analysis import BEHAVIOUR, DQN, HUMAN, RANDOM, Analysis
from torchrl_sql.report.table import Cell, Record, Table
from torchrl_sql.report.text import REFERENCE_LABELS, format_interval, format_score, name_games, sentence
from torchrl_sql.statistics.aggregates import AGGREGATES, Interval, interquartile_mean
from torchrl_sql.statistics.scores import Reference, normalised_score, published_scores, split_by_reference

MIN_PUBLISHED_GAMES = 5
"""With fewer games that published agents share with a report, their IQM stands beside ours in the table only."""


def score_table(analysis: Analysis) -> Table:
    """One row a game, one column a policy."""
    columns = analysis.policy_columns
    counts = {label: sorted({int(n) for n in runs.counts.sum(0)}) for label, runs in analysis.runs.items()}
    count_once = analysis.many_games and all(len(found) == 1 for found in counts.values())
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for game in analysis.data.games:
        policies = analysis.policies(game)
        best = max(policies[agent.label][0].point for agent in analysis.data.agents)
        row = [Cell(game)]
        for policy in columns:
            if policy not in policies:
                row.append(Cell("–"))
                continue
            interval, num_episodes, detail = policies[policy]
            is_agent = policy in analysis.runs
            lines = [] if num_episodes is None else [format_interval(interval)]
            lines += [] if num_episodes is None or (is_agent and count_once) else [f"n = {num_episodes:,}"]
            lines += [detail] if detail else []
            row.append(Cell(format_score(interval.point), tuple(lines), is_agent and interval.point == best))
            records.append(
                {
                    "game": game,
                    "policy": policy,
                    "detail": detail,
                    "mean_return": interval.point,
                    "low_95": interval.low,
                    "high_95": interval.high,
                    "num_episodes": num_episodes,
                    "num_seeds": len(analysis.runs[policy].seeds) if is_agent else None,
                    "human_normalised": _normalised_or_none(interval.point, game),
                }
            )
        rows.append(row)
    published = [name for name in (RANDOM, HUMAN, DQN) if name in columns]
    if len({found[0] for found in counts.values()}) == 1:
        episodes = f"{counts[analysis.method.label][0]:,} of each agent"
    else:
        episodes = ", ".join(f"{found[0]:,} of {label}" for label, found in counts.items())
    return Table(
        name="score_table",
        caption="Mean raw return an episode, its 95% interval"
        + (f"; episodes a game: {episodes}" if count_once else " and number of episodes")
        + (f"; published scores: {', '.join(published)}" if published else "")
        + ". The best agent is in bold.",
        header=("Game", *columns),
        rows=rows,
        records=records,
    )


def _normalised_or_none(score: float, game: str) -> float | None:
    return normalised_score(score, game, "human") if split_by_reference([game], "human")[0] else None


def aggregate_table(analysis: Analysis, reference: Reference) -> Table | None:
    """One row an agent (and the data's behaviour), one column an aggregate; None if no game can be normalised."""
    games, _ = analysis.split(reference)
    estimates = dict(analysis.aggregates(reference))
    if not estimates:
        return None
    behaviours = [analysis.policies(game).get(BEHAVIOUR) for game in games]
    means = [behaviour[0].point for behaviour in behaviours if behaviour is not None]
    if len(means) == len(games):
        scores = np.array([[normalised_score(m, game, reference) for m, game in zip(means, games, strict=True)]])
        estimates[BEHAVIOUR] = {
            name: Interval(float(function(scores)), math.nan, math.nan) for name, function in AGGREGATES.items()
        }
    num_parameters = {agent.label: agent.num_parameters for agent in analysis.data.agents}
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for label, found in estimates.items():
        row = [Cell(label)]
        for name, interval in found.items():
            shown = ("no interval",) if math.isnan(interval.low) else (f"[{interval.low:.2f}, {interval.high:.2f}]",)
            row.append(Cell(f"{interval.point:.2f}", shown))
            records.append(
                {
                    "policy": label,
                    "aggregate": name,
                    "point": interval.point,
                    "low_95": interval.low,
                    "high_95": interval.high,
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
        f"{f'{len(games)} of the {len(analysis.data.games)}' if len(games) < len(analysis.data.games) else len(games)} "
        f"game{'s' * (len(analysis.data.games) > 1)}: 0 is the published random score, 1 the published {label} score. "
        "Higher is better, except for the optimality gap.",
        header=("Policy", "IQM", "Median", "Mean", "Optimality gap"),
        rows=rows,
        records=records,
    )


def reference_table(analysis: Analysis) -> Table:
    """One row a game: the published scores that normalise it, and so the aggregates that it is part of."""
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


def comparison_table(analysis: Analysis) -> Table:
    """One row a policy the method is compared with: in which games it scores higher, as much, or lower."""
    method = analysis.method.label
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for policy in analysis.policy_columns:
        if policy in (method, RANDOM, HUMAN, DQN):
            continue
        verdicts = analysis.verdicts(policy)
        games = {
            kind: [game for game, verdict in verdicts.items() if verdict == kind]
            for kind in ("above", "overlap", "below")
        }
        record: dict[str, str | int | float | None] = {"policy": policy}
        record |= {kind: " ".join(names) for kind, names in games.items()}
        cells = [Cell(_games_cell(names, len(verdicts))) for names in games.values()]
        if policy in analysis.runs:
            chance = analysis.probability_of_improvement(policy)
            cells.append(Cell(f"{chance.point:.2f}", (f"[{chance.low:.2f}, {chance.high:.2f}]",)))
            record |= {
                "improvement": chance.point,
                "improvement_low_95": chance.low,
                "improvement_high_95": chance.high,
            }
        else:
            cells.append(Cell("–"))
            record |= {"improvement": None, "improvement_low_95": None, "improvement_high_95": None}
        rows.append([Cell(policy), *cells])
        records.append(record)
    return Table(
        name="comparison",
        caption=f"{method} against each policy, game by game. Two scores differ where their 95% intervals are apart; "
        "where they overlap, the episodes played cannot tell the two apart. P(improvement): the chance that a run of "
        f"{method} beats a run of the other agent in the same game.",
        header=("Compared with", f"{method} higher", "Intervals overlap", f"{method} lower", "P(improvement)"),
        rows=rows,
        records=records,
    )


def _games_cell(games: Sequence[str], total: int) -> str:
    if not games:
        return "–"
    return f"all {total}" if len(games) == total > 3 else ", ".join(games) if total <= 6 else f"{len(games)} of {total}"


def seed_table(analysis: Analysis) -> Table | None:
    """One row a seed and game, and one a seed over all games; None if no agent has more than one seed.

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
                    value, count = float(interquartile_mean(normalised[label].scores[s : s + 1])), None
                    row.append(Cell(f"{value:.2f}"))
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
    scores = published_scores()[agent]
    return float(interquartile_mean(np.array([[normalised_score(scores[game], game, "human") for game in games]])))


def published_table(analysis: Analysis) -> Table | None:
    """Published agents beside the method on the games both have; None if there are no such games."""
    agents = published_scores()
    games = published_games(analysis)
    if not games:
        return None
    label = analysis.method.label
    ours = {game: analysis.game_means[label][game].point for game in games}
    columns = {label: ours} | {name.replace("_", " "): scores for name, scores in agents.items()}
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
            value = float(
                interquartile_mean(np.array([[normalised_score(scores[g], g, "human") for g in human_games]]))
            )
            row.append(Cell(f"{value:.2f}", strong=name == label))
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
