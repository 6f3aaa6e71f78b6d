"""The report's tables of what stands behind its scores: protocol, curves, values, data, settings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torchrl_sql.games import ACTION_NAMES
from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.table import Cell, Record, Table
from torchrl_sql.report.text import format_interval, format_score, two_digits
from torchrl_sql.statistics.intervals import aggregates, game_means


def protocol_table(analysis: Analysis) -> Table:
    """One row per agent: how its episodes were played. The records have one per seed, with its checkpoint."""
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for agent in analysis.agents:
        episodes = analysis.episodes[agent.label]
        episode = episodes[0]
        runs = analysis.runs[agent.label]
        counts = runs.counts
        checkpoints = {row.seed: row.checkpoint for row in episodes}
        evaluation_seeds = sorted({row.evaluation_seed for row in episodes})
        for s, seed in enumerate(runs.seeds):
            records.append(
                {
                    "agent": agent.label,
                    "name": agent.agent,
                    "num_parameters": agent.num_parameters,
                    "seed": seed,
                    "checkpoint": checkpoints[seed],
                    "gradient_step": episode.gradient_step,
                    "decoding": agent.decoding,
                    "epsilon": episode.epsilon,
                    "sticky": episode.sticky,
                    "max_env_frames": episode.max_env_frames,
                    "evaluation_seeds": " ".join(str(seed) for seed in evaluation_seeds),
                    "min_episodes_per_game": int(counts[s].min()),
                    "max_episodes_per_game": int(counts[s].max()),
                }
            )
        rows.append(
            [
                Cell(agent.label),
                Cell("–" if agent.num_parameters is None else f"{agent.num_parameters:,}"),
                Cell(f"{episode.gradient_step:,}"),
                Cell(f"{len(counts)}"),
                Cell(f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}–{counts.max()}"),
                Cell(agent.decoding),
                Cell(f"{episode.epsilon:g}"),
                Cell(f"{episode.sticky:g}"),
                Cell(f"{episode.max_env_frames:,}"),
                Cell(", ".join(str(seed) for seed in evaluation_seeds)),
            ]
        )
    return Table(
        name="protocol",
        caption="How each agent's episodes were played. The file protocol.csv names each seed's checkpoint.",
        header=(
            "Agent",
            "Parameters",
            "Gradient steps",
            "Seeds",
            "Episodes per game and seed",
            "Decoding",
            "Epsilon",
            "Sticky",
            "Frame limit",
            "Evaluation seed",
        ),
        rows=rows,
        records=records,
    )


def learning_curve_table(analysis: Analysis) -> Table | None:
    """One row per checkpoint, one column per agent: human-normalised IQM. The records have every game's mean too."""
    human_games, _ = analysis.split("human")
    cells: dict[int, dict[str, Cell]] = defaultdict(dict)
    records: list[Record] = []
    for label, curve in analysis.learning_curves.items():
        for step, runs in curve.runs.items():
            record: Record = {"policy": label, "gradient_step": step}
            for game, mean in game_means(runs).items():
                fields = {"point": mean.point, "low_95": mean.low, "high_95": mean.high}
                records.append({**record, "game": game, "statistic": "mean raw return", **fields})
            if not human_games:
                continue
            iqm = aggregates(runs.select(human_games).normalised("human"))["IQM"]
            fields = {"point": iqm.point, "low_95": iqm.low, "high_95": iqm.high}
            records.append({**record, "game": "all", "statistic": "human-normalised IQM", **fields})
            cells[step][label] = Cell(two_digits(iqm.point), (format_interval(iqm, two_digits),))
    if not records:
        return None
    return Table(
        name="learning_curves",
        caption=f"Human-normalised IQM over {len(human_games)} games at each evaluated checkpoint.",
        header=("Gradient steps", *analysis.learning_curves),
        rows=[
            [Cell(f"{step:,}"), *(cells[step].get(label, Cell("–")) for label in analysis.learning_curves)]
            for step in sorted(cells)
        ],
        records=records,
    )


def calibration_table(analysis: Analysis) -> Table | None:
    """One row per game: what the first agent with recorded values predicted, and what followed. Records: all agents."""
    rows: list[list[Cell]] = []
    records: list[Record] = []
    shown = next(iter(analysis.calibration), None)
    if shown is None:
        return None
    for label, games in analysis.calibration.items():
        for game, values in games.items():
            used = values.num_episodes > 0
            predicted = float(values.predicted.mean()) if used else math.nan
            realised = float(values.realised.mean()) if used else math.nan
            records.append(
                {
                    "policy": label,
                    "game": game,
                    "num_states": len(values.predicted),
                    "num_episodes": values.num_episodes,
                    "num_cut_episodes_left_out": values.num_cut,
                    "predicted": predicted,
                    "realised": realised,
                    "bias": values.bias.point,
                    "bias_low_95": values.bias.low,
                    "bias_high_95": values.bias.high,
                    "root_mean_square_error": values.root_mean_square_error,
                    "correlation": values.correlation,
                }
            )
            if label != shown:
                continue
            cut = (f"{values.num_cut:,} cut, left out",) if values.num_cut else ()
            numbers = (predicted, realised, values.bias.point, values.root_mean_square_error, values.correlation)
            cells = [Cell("–" if math.isnan(value) else two_digits(value)) for value in numbers]
            cells[2] = Cell(cells[2].text, (format_interval(values.bias, two_digits),) if used else ())
            rows.append([Cell(game), Cell(f"{len(values.predicted):,}"), Cell(f"{values.num_episodes:,}", cut), *cells])
    return Table(
        name="calibration",
        caption=f"Value of the action that {shown} took, and the discounted sum of clipped rewards that followed, at "
        "recorded states. Bias: mean of predicted minus realised, with a 95% interval over training seeds, or over the "
        "episodes of one seed.",
        header=("Game", "States", "Episodes", "Predicted", "Realised", "Bias", "RMSE", "Correlation"),
        rows=rows,
        records=records,
    )


def data_table(analysis: Analysis) -> Table | None:
    """One row per game: how much data, how good, how large."""
    rows: list[list[Cell]] = []
    records: list[Record] = []
    for data in analysis.data.game_data:
        whole, clipped = data.behaviour, ("clipped rewards",) if data.rewards == "clipped" else ()
        row = [
            Cell(data.game),
            Cell(f"{data.num_transitions:,}"),
            Cell(f"{data.num_episodes:,}"),
            Cell("–" if whole is None else f"{format_score(whole.mean)} ± {format_score(whole.std)}", clipped),
            Cell(f"{data.bytes_per_transition:,.0f}"),
        ]
        record: dict[str, str | int | float | None] = {
            "game": data.game,
            "num_transitions": data.num_transitions,
            "num_episodes": data.num_episodes,
            "bytes_per_transition": data.bytes_per_transition,
            "rewards": data.rewards,
            "behaviour_mean": None if whole is None else whole.mean,
            "behaviour_std": None if whole is None else whole.std,
        }
        shares = [
            f"{name}: {format_score(summary.mean)} ± {format_score(summary.std)}, n = {summary.num_episodes:,}"
            for name, summary in data.behaviours.items()
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
        header=("Game", "Transitions", "Episodes", "Behaviour return", "Bytes per transition", "By behaviour"),
        rows=rows,
        records=records,
    )


def settings_tables(analysis: Analysis) -> list[Table]:
    """The resolved settings, one table per group, nested names joined with dots; and the versions."""
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
