"""The report's tables of what stands behind its scores: protocol, curves, values, data, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sql.games import ACTION_NAMES
from torchrl_sql.report.analysis import ALL, Analysis, Line
from torchrl_sql.report.score_tables import ends, interval_of
from torchrl_sql.report.table import Cell, Record, Table
from torchrl_sql.report.text import format_score, span, two_digits


def _number(name: str, pattern: str = ",") -> Any:
    """The cell of a field that is a number, or unknown."""

    def cell(record: Record) -> str | None:
        value = record[name]
        return None if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, pattern)

    return cell


def protocol_table(analysis: Analysis) -> Table:
    """How the episodes of each agent and seed were played, and their checkpoint."""
    records = []
    for agent in analysis.agents:
        episodes, runs = analysis.episodes[agent.label], analysis.runs[agent.label]
        checkpoints = {row.seed: row.checkpoint for row in episodes}
        for s, seed in enumerate(runs.seeds):
            records.append(
                {
                    "agent": agent.label,
                    "name": agent.agent,
                    "num_parameters": agent.num_parameters,
                    "seed": seed if runs.trained else None,
                    "checkpoint": checkpoints[seed],
                    "gradient_step": episodes[0].gradient_step,
                    "decoding": agent.decoding,
                    "epsilon": episodes[0].epsilon,
                    "sticky": episodes[0].sticky,
                    "max_env_frames": episodes[0].max_env_frames,
                    "evaluation_seeds": " ".join(map(str, sorted({row.evaluation_seed for row in episodes}))),
                    "num_games": len(runs.games),
                    "min_episodes_per_game": int(runs.counts[s].min()),
                    "max_episodes_per_game": int(runs.counts[s].max()),
                }
            )

    return Table.wide(
        "protocol", "How the episodes of each agent and training seed were played.", records,
        {
            "Agent": lambda record: record["agent"],
            "Seed": _number("seed"),
            "Parameters": _number("num_parameters"),
            "Gradient steps": _number("gradient_step"),
            "Episodes per game": lambda each: span(each["min_episodes_per_game"], each["max_episodes_per_game"]),
            "Decoding": lambda record: record["decoding"],
            "Epsilon": _number("epsilon", "g"),
            "Sticky": _number("sticky", "g"),
            "Frame limit": _number("max_env_frames"),
            "Evaluation seed": lambda record: record["evaluation_seeds"],
        },
    )  # fmt: skip


def curve_table(analysis: Analysis, lines: Sequence[Line], *, name: str, axis: str) -> Table:
    """Every line's mean score in each game, and its IQM, along an axis; of many games, only the latter is shown."""
    scores = analysis.along(lines)
    records = [
        {"policy": label, "x": x, "game": game, "point": interval.point, **ends(interval)}
        for game, of_game in scores.items()
        for label, points in of_game.items()
        for x, interval in sorted(points.items())
    ]
    brief = analysis.many_games and ALL in scores

    def cell(record: Record) -> Cell:
        number = two_digits if record["game"] == ALL else format_score
        return Cell(number(record["point"]), interval_of(record, number))

    return Table.crossed(
        name, f"Mean raw return, or human-normalised IQM, against {axis}, with 95% intervals.", records, cell,
        by=lambda record: ("" if brief else f"{record['game']}, ") + f"{record['x']:,.15g}", across="policy",
        heading=axis if brief else f"Game, {axis}", shown=lambda record: record["game"] == ALL or not brief,
    )  # fmt: skip


def calibration_table(analysis: Analysis) -> Table:
    """What agents predicted in each game, and what followed."""
    records = [
        {
            "policy": label,
            "game": game,
            "num_states": len(values.predicted),
            "num_episodes": values.num_episodes,
            "num_cut_episodes_left_out": values.num_cut,
            "predicted": float(values.predicted.mean()) if values.num_episodes else math.nan,
            "realised": float(values.realised.mean()) if values.num_episodes else math.nan,
            "bias": values.bias.point,
            **ends(values.bias),
            "root_mean_square_error": values.root_mean_square_error,
            "correlation": values.correlation,
        }
        for label, games in analysis.calibration.items()
        for game, values in games.items()
    ]

    def bias(record: Record) -> Cell | None:
        return Cell(two_digits(record["bias"]), interval_of(record, two_digits)) if record["num_episodes"] else None

    return Table.wide(
        "calibration",
        "Value of the action taken, and the discounted sum of clipped rewards that followed, at recorded states. Bias: "
        "mean of predicted minus realised, with a 95% interval over training seeds, or over the episodes of one seed.",
        records,
        {
            "Agent": lambda record: record["policy"],
            "Game": lambda record: record["game"],
            "States": _number("num_states"),
            "Episodes": _number("num_episodes"),
            "Cut, left out": _number("num_cut_episodes_left_out"),
            "Predicted": _number("predicted", "z.2f"),
            "Realised": _number("realised", "z.2f"),
            "Bias": bias,
            "RMSE": _number("root_mean_square_error", "z.2f"),
            "Correlation": _number("correlation", "z.2f"),
        },
    )


def data_table(analysis: Analysis) -> Table:
    """How much data there is of each game, how good, how large."""
    records = [
        {
            "game": data.game,
            "num_transitions": data.num_transitions,
            "num_episodes": data.num_episodes,
            "bytes_per_transition": data.bytes_per_transition,
            "rewards": data.rewards,
            "behaviour_mean": None if data.behaviour is None else data.behaviour.mean,
            "behaviour_std": None if data.behaviour is None else data.behaviour.std,
            "by_behaviour": "; ".join(
                f"{name}: {format_score(returns.mean)} ± {format_score(returns.std)}, n = {returns.num_episodes:,}"
                for name, returns in data.behaviours.items()
            ),
        }
        | {f"action_{name}": int(n) for name, n in zip(ACTION_NAMES, data.action_counts, strict=True)}
        for data in analysis.data.game_data
    ]

    def behaviour(record: Record) -> Cell | None:
        if record["behaviour_mean"] is None:
            return None
        text = f"{format_score(record['behaviour_mean'])} ± {format_score(record['behaviour_std'])}"
        return Cell(text, "clipped rewards" if record["rewards"] == "clipped" else "")

    def actions(record: Record) -> str:
        counts = {name: record[f"action_{name}"] for name in ACTION_NAMES}
        most = sorted(counts, key=lambda name: -counts[name])[:3]
        return ", ".join(f"{name} {counts[name] / max(sum(counts.values()), 1):.0%}" for name in most if counts[name])

    return Table.wide(
        "data", "The training data. Returns are mean ± standard deviation over episodes; bytes are on disk.", records,
        {
            "Game": lambda record: record["game"],
            "Transitions": _number("num_transitions"),
            "Episodes": _number("num_episodes"),
            "Behaviour return": behaviour,
            "Bytes per transition": _number("bytes_per_transition", ",.0f"),
            "By behaviour": lambda record: record["by_behaviour"],
            "Most frequent actions": actions,
        },
    )  # fmt: skip


def settings_tables(analysis: Analysis) -> list[Table]:
    """The resolved settings, one table per group, nested names joined with dots; and the versions."""
    columns = {"Setting": lambda record: record["setting"], "Value": lambda record: Cell(record["value"])}
    return [
        Table.wide(
            "settings_" + "".join(c if c.isalnum() else "_" for c in title.lower()), title, _flatten(values), columns
        )
        for title, values in (*analysis.data.settings.items(), ("Versions", analysis.data.versions))
        if values
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[dict[str, str]]:
    records = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            records += _flatten(value, f"{prefix}{key}.")
        else:
            records.append({"setting": f"{prefix}{key}", "value": str(value)})
    return records
