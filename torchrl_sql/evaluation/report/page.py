"""Writes a report: the page, and its plots and tables as files beside it; and its summary for a terminal."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from torchrl_sql.evaluation.report.data import (
    Analysis,
    Clip,
    ReportData,
)
from torchrl_sql.evaluation.report.findings import findings, notes
from torchrl_sql.evaluation.report.plots import (
    action_plot,
    aggregate_plot,
    all_games_plots,
    curve_plots,
    game_plot,
    profile_plot,
    scaling_plot,
)
from torchrl_sql.evaluation.report.style import COLOURS, Plot, draw
from torchrl_sql.evaluation.report.table import to_text
from torchrl_sql.evaluation.report.tables import (
    aggregate_table,
    comparison_table,
    data_table,
    protocol_table,
    published_table,
    score_table,
    seed_table,
    settings_tables,
)

logger = logging.getLogger(__name__)

MAX_SINGLE_GAME_PLOTS = 6
"""Up to so many games get a plot of their own with every policy; more share one plot."""

MAX_OPEN_SETTINGS = 40
"""Up to so many settings are shown at once; more are folded by group."""


def write_report(data: ReportData, out: str | os.PathLike[str]) -> Path:
    """Writes the page ``out`` and, in ``<stem>_files/`` beside it, its plots (PNG, SVG) and tables (CSV).

    The page loads nothing: styles, drawings and clips are inside. It is published in one step, after its files.

    Args:
        data (ReportData): what to show.
        out (path): the HTML file, e.g. ``runs/quickstart/report.html``; its folder is created.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: if the episode table is empty, incomplete or ambiguous for one of the agents (see
            :meth:`torchrl_sql.evaluation.scores.RunReturns.from_episodes`).
    """
    out = Path(out)
    analysis = Analysis(data)
    plots = _plots(analysis)
    tables = {
        "scores": score_table(analysis),
        "comparison": comparison_table(analysis),
        "human": aggregate_table(analysis, "human"),
        "dqn": aggregate_table(analysis, "dqn"),
        "seeds": seed_table(analysis),
        "data": data_table(analysis),
        "published": published_table(analysis),
        "protocol": protocol_table(analysis),
    }
    settings = settings_tables(analysis)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            colours=COLOURS,
            findings=findings(analysis),
            notes=[*notes(analysis), *data.caveats],
            plots=plots,
            tables=tables,
            settings=settings,
            open_settings=sum(len(table.rows) for table in settings) <= MAX_OPEN_SETTINGS,
            behaviours=_behaviours(data),
            clips=[(clip, _data_uri(clip.data, clip.mime), _still(clip)) for clip in data.clips],
            files=f"{out.stem}_files",
        )
    )
    folder = out.parent / f"{out.stem}_files"
    folder.mkdir(parents=True, exist_ok=True)
    for group in plots.values():
        for plot in group:
            (folder / f"{plot.name}.png").write_bytes(plot.png())
            (folder / f"{plot.name}.svg").write_bytes(plot.svg())
    for table in (*tables.values(), *settings):
        if table is not None:
            (folder / f"{table.name}.csv").write_text(table.to_csv(), encoding="utf-8")
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    logger.info("wrote %s and %s", out, folder)
    return out


def format_score_table(data: ReportData) -> str:
    """The score table, the aggregates, the findings and what limits them as plain text for a terminal."""
    analysis = Analysis(data)

    def lines() -> Iterator[str]:
        for table in (score_table(analysis), seed_table(analysis), aggregate_table(analysis, "human")):
            if table is not None:
                yield f"{table.caption.replace('in bold', 'marked *')}\n"
                yield to_text(table) + "\n"
        marks = {"for": "+", "neutral": "=", "against": "-"}
        for kind, text in findings(analysis):
            yield f"{marks[kind]} {text}"

    return "\n".join(lines())


def _plots(analysis: Analysis) -> dict[str, list[Plot]]:
    games = list(analysis.data.games)
    few = len(games) <= MAX_SINGLE_GAME_PLOTS
    return {
        "games": draw(lambda: [game_plot(analysis, g) for g in games] if few else all_games_plots(analysis)),
        "aggregates": draw(lambda: [aggregate_plot(analysis), profile_plot(analysis), scaling_plot(analysis)]),
        "curves": draw(lambda: curve_plots(analysis)),
        "actions": draw(lambda: (action_plot(data) for data in analysis.data.game_data)) if few else [],
    }


def _behaviours(data: ReportData) -> list[tuple[str, str]]:
    """What is said of the data, once for all games of which the same is said."""
    games: dict[str, list[str]] = {}
    for game in data.game_data:
        games.setdefault(game.behaviour_text, []).append(game.game)
    return [(", ".join(names), text) for text, names in games.items()]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchrl_sql.evaluation.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = lambda plot: Markup(plot.inline())
    environment.filters["typographic"] = _typographic
    return environment


def _typographic(text: str) -> str:
    """Minus signs for the hyphens that stand before a digit and after no word."""
    return "".join(
        "−" if c == "-" and text[i + 1 : i + 2].isdigit() and not text[i - 1 : i].isalnum() else c
        for i, c in enumerate(text)
    )


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _still(clip: Clip) -> str | None:
    """The last frame of an animation, for readers who asked for less motion."""
    if clip.mime != "image/gif":
        return None
    with Image.open(io.BytesIO(clip.data)) as image:
        image.seek(getattr(image, "n_frames", 1) - 1)
        file = io.BytesIO()
        image.convert("RGB").save(file, format="PNG")
    return _data_uri(file.getvalue(), "image/png")
