"""The report's tables, from the analysis of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_sql.evaluation.report.data import BEHAVIOUR, HUMAN, RANDOM, Analysis
from torchrl_sql.evaluation.report.table import Cell, Record, Table
from torchrl_sql.evaluation.scores import (
    AGGREGATES,
    Interval,
    Reference,
    interquartile_mean,
    normalised_score,
    published_scores,
    split_by_reference,
)
from torchrl_sql.games import ACTION_NAMES

REFERENCE_LABELS: dict[Reference, str] = {"human": "human", "dqn": "DQN"}


def format_score(value: float) -> str:
    """A raw score with the digits that matter: ``9.4``, ``312``, ``49,100``."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def format_interval(interval: Interval) -> str:
    """``[low, high]`` as raw scores."""
    return f"[{format_score(interval.low)}, {format_score(interval.high)}]"


def score_table(analysis: Analysis) -> Table:
    """One row a game, one column a policy."""
    columns = analysis.policy_columns
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
            lines = [] if num_episodes is None else [format_interval(interval), f"n = {num_episodes:,}"]
            lines += [detail] if detail else []
            is_agent = policy in analysis.runs
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
    return Table(
        name="score_table",
        caption="Mean raw return an episode, its 95% interval and number of episodes; random and human are published "
        "scores. The best agent is in bold.",
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
                }
            )
        rows.append(row)
    label = REFERENCE_LABELS[reference]
    return Table(
        name=f"aggregate_{reference}_normalised",
        caption=f"{label[0].upper()}{label[1:]}-normalised score with 95% intervals: 0 is the published random score, "
        f"1 the published {label} score. Higher is better, except for the optimality gap.",
        header=("Policy", "IQM", "Median", "Mean", "Optimality gap"),
        rows=rows,
        records=records,
    )


def comparison_table(analysis: Analysis) -> Table:
    """One row a policy the method is compared with: in which games it scores higher, as much, or lower."""
    method = analysis.method.label
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for policy in analysis.policy_columns:
        if policy in (method, RANDOM, HUMAN):
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
    """One row a seed and game, and one a seed over all games; None if no agent has more than one seed."""
    seeds = sorted({seed for runs in analysis.runs.values() for seed in runs.seeds})
    if len(seeds) < 2:
        return None
    human_games, _ = analysis.split("human")
    rows: list[list[Cell]] = []
    records: list[Record] = []
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
                    scores = runs.select(human_games).normalised("human").run_scores()[s : s + 1]
                    value, count = float(interquartile_mean(scores)), None
                    row.append(Cell(f"{value:.2f}"))
                records.append({"game": game, "seed": seed, "policy": label, "mean": value, "num_episodes": count})
            rows.append(row)
    return Table(
        name="seeds",
        caption="Each training seed by itself: mean raw return by game, and human-normalised IQM over games.",
        header=("Game and seed", *analysis.runs),
        rows=rows,
        records=records,
    )


def protocol_table(analysis: Analysis) -> Table:
    """One row an agent: how its episodes were played."""
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for agent in analysis.data.agents:
        episode = analysis.episodes[agent.label][0]
        counts = analysis.runs[agent.label].counts
        record: dict[str, str | int | float | None] = {
            "agent": agent.label,
            "decoding": agent.decoding,
            "epsilon": episode.epsilon,
            "sticky": episode.sticky,
            "max_env_frames": episode.max_env_frames,
            "gradient_step": episode.gradient_step,
            "num_seeds": len(counts),
            "min_episodes_a_run": int(counts.min()),
            "max_episodes_a_run": int(counts.max()),
        }
        rows.append(
            [
                Cell(agent.label),
                Cell(agent.decoding),
                Cell(f"{episode.epsilon:g}"),
                Cell(f"{episode.sticky:g}"),
                Cell(f"{episode.max_env_frames:,}"),
                Cell(f"{episode.gradient_step:,}"),
                Cell(f"{len(counts)}"),
                Cell(f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}–{counts.max()}"),
            ]
        )
        records.append(record)
    return Table(
        name="protocol",
        caption="How each agent's episodes were played.",
        header=(
            "Agent",
            "Decoding",
            "Epsilon",
            "Sticky",
            "Frame limit",
            "Gradient steps",
            "Seeds",
            "Episodes a game and seed",
        ),
        rows=rows,
        records=records,
    )


def data_table(analysis: Analysis) -> Table | None:
    """One row a game: how much data, how good, how large."""
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for data in analysis.data.game_data:
        clipped = ("clipped rewards",) if data.rewards == "clipped" else ()
        row = [
            Cell(data.game),
            Cell(f"{data.num_transitions:,}"),
            Cell(f"{data.num_episodes:,}"),
            Cell(f"{format_score(data.behaviour.mean)} ± {format_score(data.behaviour.std)}", clipped),
            Cell(f"{data.bytes_per_transition:,.0f}"),
        ]
        record: dict[str, str | int | float | None] = {
            "game": data.game,
            "num_transitions": data.num_transitions,
            "num_episodes": data.num_episodes,
            "bytes_per_transition": data.bytes_per_transition,
            "rewards": data.rewards,
            "behaviour_mean": data.behaviour.mean,
            "behaviour_std": data.behaviour.std,
        }
        shares = [
            f"{name}: {format_score(summary.mean)} ± {format_score(summary.std)}, n = {summary.num_episodes:,}"
            for name, summary in data.components.items()
        ]
        row.append(Cell(shares[0] if shares else "–", tuple(shares[1:])))
        record |= {f"action_{name}": int(n) for name, n in zip(ACTION_NAMES, data.action_counts, strict=True)}
        rows.append(row)
        records.append(record)
    if not rows:
        return None
    return Table(
        name="data",
        caption="The training data. Returns are mean ± standard deviation over episodes; bytes are on disk.",
        header=("Game", "Transitions", "Episodes", "Behaviour return", "Bytes a transition", "By component"),
        rows=rows,
        records=records,
    )


def published_table(analysis: Analysis) -> Table | None:
    """Published agents beside the method on the games both have; None if there are no such games."""
    agents = published_scores()
    games = [game for game in analysis.data.games if all(game in scores for scores in agents.values())]
    if not games:
        return None
    label = analysis.method.label
    ours = {game: analysis.game_means[label][game].point for game in games}
    columns = {label: ours} | {f"{name.replace('_', ' ')}": scores for name, scores in agents.items()}
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
        caption="Mean raw return on the games that published multi-game agents share with this report.",
        header=("Game", *columns),
        rows=rows,
        records=records,
    )


def settings_tables(analysis: Analysis) -> list[Table]:
    """The resolved settings, one table a group, nested names joined with dots; and the versions."""
    groups = dict(analysis.data.settings) | ({"Versions": analysis.data.versions} if analysis.data.versions else {})
    tables = []
    for title, values in groups.items():
        items = _flatten(values)
        tables.append(
            Table(
                name="settings_" + "".join(c if c.isalnum() else "_" for c in title.lower()),
                caption=title,
                header=("Setting", "Value"),
                rows=[[Cell(key), Cell(value)] for key, value in items],
                records=[{"setting": key, "value": value} for key, value in items],
            )
        )
    return [table for table in tables if table.records]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            items += _flatten(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", str(value)))
    return items
