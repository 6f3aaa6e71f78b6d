"""What linear probes read from encoders, as a table and as one picture."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np

from torchrl_sql.evaluation.probing import PIXELS, RANDOM, ProbeResult
from torchrl_sql.report.style import COLOURS, WIDTH, Plot, new_figure
from torchrl_sql.report.table import Cell, Record, Table

MEAN = "mean of all"
"""Heads the row over all labels."""

_CAPTION = (
    "Share of a label's variance that ridge regression reads from the flattened feature map, in episodes that it did "
    "not see (R², mean over training seeds"
)
_LEAST = -0.2
"""What is less is drawn there."""


def probe_table(result: ProbeResult) -> Table:
    """A row per label, a column per encoder; the range over seeds as detail, the best trained encoder in bold."""
    records = _records(result)
    best: dict[str, float] = {}
    for record in records:
        if record["agent"] not in (RANDOM, PIXELS):
            best[_row(record)] = max(best.get(_row(record), -np.inf), record["r2"])

    def cell(record: Record) -> Cell:
        seeds = f"{record['low']:.2f} to {record['high']:.2f}" if record["num_seeds"] > 1 else ""
        strong = record["agent"] not in (RANDOM, PIXELS) and record["r2"] == best[_row(record)]
        return Cell(f"{record['r2']:.2f}", seeds, strong)

    left_out = f" Not read: {'; '.join(result.left_out)}." if result.left_out else ""
    return Table.crossed(
        "probes",
        f"{_CAPTION}, and their range). {RANDOM}: the encoders before training; {PIXELS}: the frames themselves. The "
        f"best trained encoder is in bold or marked *.{left_out}",
        records, cell, by=_row, across="agent", heading="Label",
    )  # fmt: skip


def probe_plot(result: ProbeResult) -> Plot:
    """A row per label, a dot per encoder: its mean over seeds, with a line over their range."""
    records = _records(result)
    rows = list(dict.fromkeys(map(_row, records)))
    agents = list(dict.fromkeys(record["agent"] for record in records))
    figure, axes = new_figure(0.24 * len(rows) + 0.35 + 0.19 * -(-len(agents) // 3), width=WIDTH)
    for place, (agent, style) in enumerate(_styles(agents).items()):
        own = [record for record in records if record["agent"] == agent]
        heights = [rows.index(_row(record)) + 0.5 * (place / max(1, len(agents) - 1) - 0.5) for record in own]
        points, low, high = (
            np.array([record[name] for record in own]).clip(_LEAST, 1) for name in ("r2", "low", "high")
        )
        axes.errorbar(points, heights, xerr=[points - low, high - points], linewidth=1.0, label=agent, **style)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(right=1.03)
    if axes.get_xlim()[0] < 0:
        axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    axes.grid(axis="x")
    for border in range(1, len(rows)):
        axes.axhline(border - 0.5, color=COLOURS["rule"][0], linewidth=0.5)
    axes.set_xlabel("R² in unseen episodes")
    figure.legend(loc="outside upper left", ncols=3)
    means = [record for record in records if _row(record) == MEAN]
    return Plot(
        name="probes",
        caption=f"{_CAPTION}; lines: their range). What is below {_LEAST:g} is drawn there.",
        description="Means over all labels: " + ", ".join(f"{record['agent']} {record['r2']:.2f}" for record in means),
        figure=figure,
    )


def _row(record: Record) -> str:
    return f"{record['game']}: {record['label']}" if record["game"] else MEAN


def _records(result: ProbeResult) -> list[dict[str, Any]]:
    """One per label and encoder, over its seeds, and one per encoder over all labels; in the order of the scores."""
    by_seed: dict[tuple[str, str, str], list[float]] = {}
    of_agent: dict[tuple[str, int | None], list[float]] = {}
    for score in result.scores:
        by_seed.setdefault((score.game, score.label, score.agent), []).append(score.r2)
        of_agent.setdefault((score.agent, score.seed), []).append(score.r2)
    for (agent, _), values in of_agent.items():
        by_seed.setdefault(("", MEAN, agent), []).append(float(np.mean(values)))
    last = (RANDOM, PIXELS)
    agents = sorted(dict.fromkeys(agent for *_, agent in by_seed), key=lambda agent: (agent in last, agent == PIXELS))
    return [
        {
            "game": game, "label": label, "agent": agent, "r2": float(np.mean(values)), "low": min(values),
            "high": max(values), "num_seeds": len(values),
        }
        for (game, label, agent), values in sorted(by_seed.items(), key=lambda item: agents.index(item[0][2]))
    ]  # fmt: skip


def _styles(agents: list[str]) -> dict[str, dict[str, Any]]:
    """Of dots: colours for trained encoders, grey for what is not trained."""
    trained = [agent for agent in agents if agent not in (RANDOM, PIXELS)]
    names = ("method", "bc", "other", "other2", "other3", "method3", "bc2")
    styles: dict[str, dict[str, Any]] = {
        agent: {"fmt": mark, "markersize": 5, "color": COLOURS[name][0]}
        for agent, name, mark in zip(trained, cycle(names), cycle("os^Dv"), strict=False)
    }
    grey = COLOURS["data"][0]
    untrained = {
        RANDOM: {"fmt": "x", "markersize": 5, "color": grey},
        PIXELS: {"fmt": "|", "markersize": 8, "color": grey},
    }
    return {agent: (styles | untrained)[agent] for agent in agents}
