"""The report's tables of scores, from the analysis of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_sql.report.analysis import ALL, BEHAVIOUR, DQN, HUMAN, RANDOM, Analysis
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
from torchrl_sql.statistics.scores import Reference, normalised_score, split_by_reference


def ends(interval: Interval) -> dict[str, float | str]:
    """An interval as fields of a record."""
    return {"low_95": interval.low, "high_95": interval.high, "interval_over": interval.unit}


def interval_of(record: Record, number: Any = format_score) -> str:
    """The interval that a record has, as text."""
    return format_interval(Interval(math.nan, record["low_95"], record["high_95"]), number)


def over_units(analysis: Analysis) -> str:
    """What the intervals of the main agent are over."""
    runs = analysis.runs[analysis.main.label]
    if not runs.trained:
        return "over episodes"
    return "over the episodes of one seed" if analysis.one_seed else f"over {len(runs.seeds)} training seeds"


def score_table(analysis: Analysis) -> Table:
    """Games by policies; a few games stand side by side, many below one another."""
    records = [
        {
            "game": game,
            "policy": policy,
            "detail": score.detail,
            "mean_return": score.mean.point,
            **(ends(score.mean) if score.num_episodes else dict.fromkeys(ends(score.mean))),
            "num_episodes": score.num_episodes,
            "num_seeds": len(analysis.runs[policy].seeds) if policy in analysis.runs else None,
            "human_normalised": _normalised_or_none(score.mean.point, game),
        }
        for game in analysis.data.games
        for policy, score in analysis.policies[game].items()
    ]
    best = {game: max((means[game].point for means in analysis.game_means.values() if game in means), default=math.inf)
            for game in analysis.data.games}  # fmt: skip

    def cell(record: Record) -> Cell:
        interval = "" if record["low_95"] is None else interval_of(record)
        strong = record["policy"] in analysis.runs and record["mean_return"] == best[record["game"]]
        return Cell(format_score(record["mean_return"]), f"{interval} {record['detail']}".strip(), strong)

    published = [name for name in (RANDOM, HUMAN, DQN) if name in analysis.policy_columns]
    caption = f"Mean raw return per episode with 95% intervals {over_units(analysis)}"
    caption += f"; published scores: {', '.join(published)}" if published else ""
    many = analysis.many_games
    return Table.crossed(
        "score_table", f"{caption}. The agent with the highest mean is in bold or marked *.", records, cell,
        by="game" if many else "policy", across="policy" if many else "game", heading="Game" if many else "Policy",
        order=[*analysis.data.games, *analysis.policy_columns],
    )  # fmt: skip


def _normalised_or_none(score: float, game: str) -> float | None:
    return normalised_score(score, game, "human") if split_by_reference([game], "human")[0] else None


def aggregate_table(analysis: Analysis, reference: Reference) -> Table:
    """Agents, and the data's behaviour, by aggregates."""
    games, label = analysis.aggregate_games(reference), REFERENCE_LABELS[reference]
    estimates = dict(analysis.aggregates(reference))
    behaviours = [analysis.policies[game].get(BEHAVIOUR) for game in games]
    means = [behaviour.mean.point for behaviour in behaviours if behaviour is not None]
    if games and len(means) == len(games):
        scores = np.array([normalised_score(mean, game, reference) for mean, game in zip(means, games, strict=True)])
        estimates[BEHAVIOUR] = {
            name: Interval(float(function(scores)), math.nan, math.nan) for name, function in AGGREGATES.items()
        }
    num_parameters = {agent.label: agent.num_parameters for agent in analysis.agents}
    records = [
        {
            "policy": policy,
            "aggregate": sentence(name),
            "point": interval.point,
            **ends(interval),
            "num_games": len(games),
            "num_seeds": len(analysis.runs[policy].seeds) if policy in analysis.runs else None,
            "num_parameters": num_parameters.get(policy),
        }
        for policy, intervals in estimates.items()
        for name, interval in intervals.items()
    ]
    return Table.crossed(
        f"aggregate_{reference}_normalised",
        f"{sentence(label)}-normalised score with 95% intervals {over_units(analysis)} on {len(games)} of "
        f"{plural(len(analysis.data.games), 'game')}: 0 is the published random score, 1 the published {label} score. "
        "Higher is better, except for the optimality gap.",
        records, lambda record: Cell(two_digits(record["point"]), interval_of(record, two_digits)),
        by="policy", across="aggregate", heading="Policy",
    )  # fmt: skip


def comparison_table(analysis: Analysis) -> Table:
    """Per policy that the main agent is compared with: in which games it scores higher, lower, or neither."""
    main = analysis.main.label
    kinds: tuple[Verdict, ...] = ("higher", "not distinguishable", "lower", "unknown")
    records = []
    for policy in analysis.policy_columns:
        if policy in (main, RANDOM, HUMAN, DQN) or analysis.data.absent is not None:
            continue
        verdicts = analysis.verdicts(policy)
        chance = analysis.probability_of_improvement(policy) if policy in analysis.runs else None
        point, low, high = (None, None, None) if chance is None else chance[:3]
        records.append(
            {"policy": policy}
            | {kind: " ".join(game for game, verdict in verdicts.items() if verdict == kind) for kind in kinds}
            | {"improvement": point, "low_95": low, "high_95": high}
        )

    def games(kind: Verdict) -> Any:
        return lambda record: _games_cell(record[kind].split(), sum(len(record[other].split()) for other in kinds))

    return Table.wide(
        "comparison",
        f"{main} against each policy, game by game. A verdict needs a 95% interval of the difference over training "
        f"seeds that leaves out 0; of one seed there is none. P(improvement): the chance that a run of {main} beats a "
        "run of the other agent in the same game.",
        records,
        {
            "Compared with": lambda record: record["policy"],
            f"{main} higher": games("higher"),
            "Not distinguishable": games("not distinguishable"),
            f"{main} lower": games("lower"),
            "No verdict": games("unknown"),
            "P(improvement)": lambda record: (
                None
                if record["improvement"] is None
                else Cell(two_digits(record["improvement"]), interval_of(record, two_digits))
            ),
        },
    )


def _games_cell(games: Sequence[str], total: int) -> str:
    return f"all {total}" if len(games) == total > 3 else ", ".join(games) if total <= 6 else f"{len(games)} of {total}"


def seed_table(analysis: Analysis) -> Table:
    """Every seed by itself, if there are several, in each game and over all; of many games only the latter is shown."""
    normalised = analysis.normalised("human")
    several = any(len(runs.seeds) > 1 for runs in analysis.runs.values())
    records = [
        {"game": game, "seed": seed, "policy": label, "mean": float(scores[s]), "num_episodes": count}
        for label, runs in analysis.runs.items()
        for game, scores, counts in (
            *zip(runs.games, runs.run_scores().T, runs.counts.T.tolist(), strict=True),
            *([(ALL, interquartile_mean(normalised[label].run_scores()), [None] * len(runs.seeds))]
              if label in normalised else []),
        )
        for s, (seed, count) in enumerate(zip(runs.seeds, counts, strict=True))
        if several and runs.trained
    ]  # fmt: skip
    brief = analysis.many_games and normalised
    return Table.crossed(
        "seeds",
        "Each training seed by itself: " + ("" if brief else "mean raw return by game")
        + (" and " if normalised and not brief else "") + ("human-normalised IQM over games." if normalised else "."),
        records, lambda record: (two_digits if record["game"] == ALL else format_score)(record["mean"]),
        by=lambda record: f"{record['game']}, seed {record['seed']}", across="policy", heading="Game and seed",
        shown=lambda record: record["game"] == ALL or not brief,
    )  # fmt: skip


def area_span(analysis: Analysis) -> str:
    """The gradient steps that areas under learning curves are over."""
    steps = analysis.learning.area_steps
    return f"{min(steps, default=0):,} to {max(steps, default=0):,} gradient steps"


def area_table(analysis: Analysis) -> Table:
    """Agents by the areas under their learning curves; of many games, only that of all is shown."""
    steps, main = analysis.learning.area_steps, analysis.main.label
    compared = [label for label in analysis.learning.areas if label != main]
    verdicts = {label: analysis.area_verdicts(label) for label in compared}
    records = [
        {
            "policy": label,
            "game": game,
            "mean_over_steps": score.point,
            **ends(score),
            "first_gradient_step": steps[0],
            "last_gradient_step": steps[-1],
            "num_evaluations": len(steps),
            "num_seeds": len(runs.seeds),
            "main_agent_is": verdicts.get(label, {}).get(game),
        }
        for label, runs in analysis.learning.areas.items()
        for game, score in analysis.scores_of(runs).items()
    ]
    aggregated = any(record["game"] == ALL for record in records)
    brief = analysis.many_games and aggregated

    def cell(record: Record) -> Cell:
        number = two_digits if record["game"] == ALL else format_score
        return Cell(number(record["mean_over_steps"]), interval_of(record, number))

    return Table.crossed(
        "learning_areas",
        f"Area under the learning curve: mean score over {area_span(analysis)}, by the trapezoidal rule over "
        f"{plural(len(steps), 'evaluation')}, with 95% intervals {over_units(analysis)}"
        + ("; IQM: of the games' human-normalised areas." if aggregated else "."),
        records, cell, by="policy", across="game", heading="Agent", order=[*analysis.runs, ALL, *analysis.data.games],
        shown=lambda record: record["game"] == ALL or not brief,
    )  # fmt: skip


def published_iqm(scores: Mapping[str, float], games: Sequence[str]) -> float:
    """Human-normalised IQM of one score per game."""
    return float(interquartile_mean(np.array([normalised_score(scores[game], game, "human") for game in games])))


def published_table(analysis: Analysis) -> Table:
    """Published agents beside the main one on the games that both have."""
    label, games = analysis.main.label, analysis.published_games
    human_games, _ = split_by_reference(games, "human")
    ours = {game: analysis.game_means[label][game].point for game in games}
    agents = {label: ours} | {agent.label: agent.scores for agent in analysis.published.values()}
    records = [
        {
            "game": game,
            "agent": name,
            "score": scores[game],
            "human_normalised": _normalised_or_none(scores[game], game),
        }
        for game in games
        for name, scores in agents.items()
    ]
    total = f"Human-normalised IQM ({len(human_games)})"
    if human_games:
        records += [
            {"game": total, "agent": name, "score": None, "human_normalised": published_iqm(scores, human_games)}
            for name, scores in agents.items()
        ]

    def cell(record: Record) -> Cell:
        known = record["score"]
        text = two_digits(record["human_normalised"]) if known is None else format_score(known)
        return Cell(text, strong=record["agent"] == label)

    return Table.crossed(
        "published_agents",
        f"Mean raw return on {name_games(games, len(analysis.data.games))}, which published multi-game agents share "
        "with this report.",
        records, cell, by="game", across="agent", heading="Game",
    )  # fmt: skip
