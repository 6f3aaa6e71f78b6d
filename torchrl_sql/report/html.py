"""Writes a report: the page, and its plots and tables as files beside it; and its summary for a terminal."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image

from torchrl_sql.files import replacing, write_text
from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.figures.aggregates import aggregate_plot, profile_plot
from torchrl_sql.report.figures.curves import line_plots, training_plots
from torchrl_sql.report.figures.games import few_games_plot, many_games_plots
from torchrl_sql.report.figures.values import calibration_plots
from torchrl_sql.report.findings import findings
from torchrl_sql.report.model import Clip, ReportData
from torchrl_sql.report.probes import probe_plot
from torchrl_sql.report.style import COLOURS, Plot, draw
from torchrl_sql.report.table import Table
from torchrl_sql.report.tables import all_tables
from torchrl_sql.report.text import name_games, plural, sentence, span

logger = logging.getLogger(__name__)

MAX_OPEN_SETTINGS = 40
"""Up to so many settings are shown at once; more are folded by group."""

LEADING_TABLES = ("scores_along_axis", "aggregate_human_normalised", "score_table")
"""The first of these that there is stands on the first screen."""

MAX_CLIP_BYTES = 6_000_000
"""Of gameplay inside the page; clips of further games stay in their folder, and the page says so."""


def write_report(analysis: Analysis, out: str | os.PathLike[str]) -> Path:
    """Writes the page ``out`` and, in ``<stem>_files/`` beside it, its plots (PNG, SVG) and tables (CSV, LaTeX).

    The page loads nothing: styles, drawings, clips and the same plots and tables as downloads are inside, so that it
    can be sent and opened alone. It is published in one step, after its files. A page about the same sources is
    replaced, with its files.

    Args:
        analysis (Analysis): what to show.
        out (path): the HTML file, e.g. ``runs/quickstart/report.html``; its folder is created.

    Returns:
        ``out`` as a path.

    Raises:
        FileExistsError: if ``out`` is something else than a page about the same sources.
        ValueError: if the episodes of an agent are ambiguous.
    """
    out = Path(out)
    sources = " ".join(quote(os.path.relpath(path, out.parent)) for path in analysis.data.sources)
    earlier = _earlier_files(out, sources)
    plots = _plots(analysis)
    tables = all_tables(analysis)
    downloads: dict[str, list[tuple[str, bytes, str]]] = {
        plot.name: [
            (f"{plot.name}.png", plot.png(), "image/png"),
            (f"{plot.name}.svg", plot.svg, "image/svg+xml"),
        ]
        for group in plots.values()
        for plot in group
    }
    downloads |= {
        f"{name}.csv": [
            (f"{name}.csv", table.to_csv().encode(), "text/csv"),
            (f"{name}.tex", table.to_latex().encode(), "application/x-tex"),
        ]
        for name, table in tables.items()
    }
    pictures = analysis.data.reconstructions
    downloads |= {picture.name: [(f"{picture.name}.png", picture.data, "image/png")] for picture in pictures}
    page = _render(analysis, plots=plots, tables=tables, downloads=downloads, sources=sources, out=out)
    folder = _folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: content for files in downloads.values() for name, content, _ in files}
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    write_text(out, page)
    for name in earlier - contents.keys():
        (folder / name).unlink(missing_ok=True)
    logger.info("wrote %s and %s", out, folder)
    return out


def _folder(out: Path) -> Path:
    return out.parent / f"{out.stem}_files"


def _earlier_files(out: Path, sources: str) -> set[str]:
    """Names of the files of the page that ``out`` replaces; refuses to replace another one."""
    if not out.exists():
        return set()
    page = out.read_text(encoding="utf-8", errors="replace") if out.is_file() else ""
    made_of = re.search(r'<meta name="torchrl-sql-sources" content="([^"]*)">', page)
    if made_of is None:
        raise FileExistsError(
            f"{out} is there and was not written as a report by this version; choose another --out, or delete it"
        )
    if made_of[1] != sources:
        raise FileExistsError(
            f"{out} is a report about {made_of[1] or 'other data'}, now wanted about {sources}; choose another --out, "
            "or delete it"
        )
    return set(re.findall(r'<a download="([^"/]+)"', page))


def _render(
    analysis: Analysis,
    *,
    plots: Mapping[str, list[Plot]],
    tables: Mapping[str, Table],
    downloads: Mapping[str, list[tuple[str, bytes, str]]],
    sources: str,
    out: Path,
) -> str:
    data = analysis.data
    clips, clip_note = _clips(data)
    settings = [tables[name] for name in tables if name.startswith("settings_")]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            summary=_summary(analysis),
            sources=sources,
            colours=COLOURS,
            findings=findings(analysis),
            caveats=[*caveats(analysis), *clip_note],
            plots=plots,
            tables=tables,
            lead=next(tables[name] for name in LEADING_TABLES if name in tables),
            settings=settings,
            downloads={
                key: [(name, name.rsplit(".", 1)[1].upper(), _data_uri(content, mime)) for name, content, mime in files]
                for key, files in downloads.items()
            },
            open_settings=sum(len(table.rows) for table in settings) <= MAX_OPEN_SETTINGS,
            many_games=analysis.many_games,
            behaviours=_behaviours(data),
            clips=[(clip, _data_uri(clip.data, clip.mime), _still(clip)) for clip in clips],
            reconstructions=[(picture, _data_uri(picture.data, "image/png")) for picture in data.reconstructions],
            published_sources=dict.fromkeys(agent.source for agent in analysis.published.values()),
            files=_folder(out).name,
        )
    )


def _summary(analysis: Analysis) -> str:
    """The page in a sentence: who, against whom, on what."""
    if analysis.data.absent is not None:
        return f"{analysis.data.absent} has no scores yet."
    others = " and ".join(agent.label for agent in analysis.against)
    runs = analysis.runs[analysis.main.label]
    parts = [analysis.main.label + (f" against {others}" if others else "")]
    parts += [name_games(runs.games, 0) if len(runs.games) <= 3 else plural(len(runs.games), "game")]
    parts += [plural(len(runs.seeds), "training seed")] * runs.trained
    return ", ".join([*parts, f"{span(runs.counts.min(), runs.counts.max())} episodes per game and seed"]) + "."


def _plots(analysis: Analysis) -> dict[str, list[Plot]]:
    """By section; ``lead`` is what a reader sees first."""
    many, axis = analysis.many_games, analysis.data.x or ""
    groups = {
        "axis": draw(lambda: line_plots(analysis, analysis.lines, name="scores_along_axis", axis=axis)),
        "aggregates": draw(lambda: [aggregate_plot(analysis), profile_plot(analysis)]),
        "games": draw(lambda: many_games_plots(analysis) if many else [few_games_plot(analysis)]),
        "learning": draw(
            lambda: line_plots(analysis, analysis.learning_curves, name="learning_curve", axis=analysis.learning.axis)
        ),
        "calibration": draw(lambda: calibration_plots(analysis)),
        "training": draw(lambda: training_plots(analysis)),
        "probes": draw(lambda: [] if analysis.data.probes is None else [probe_plot(analysis.data.probes)]),
    }
    first = groups["axis"] or groups["aggregates"] or groups["games"]
    return groups | {"lead": [first.pop(0)] if first else []}


def _clips(data: ReportData) -> tuple[list[Clip], list[str]]:
    """The clips that fit into the page, and what is to be said of the others."""
    shown: list[Clip] = []
    for clip in data.clips:
        if sum(len(other.data) for other in (*shown, clip)) <= MAX_CLIP_BYTES:
            shown.append(clip)
    missing = [clip.game for clip in data.clips if clip not in shown]
    if not missing:
        return shown, []
    return shown, [f"Clips of {', '.join(missing)} are not in this page, to keep it small; they are beside the scores."]


def _behaviours(data: ReportData) -> list[tuple[str, str]]:
    """What is said of the data, once for all games of which the same is said."""
    games: dict[str, list[str]] = {}
    for game in data.game_data:
        games.setdefault(game.behaviour_text, []).append(game.game)
    return [(sentence(name_games(names, len(data.game_data))), text) for text, names in games.items()]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchrl_sql.report"),
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
    return re.sub(r"(?<![^\W_])-(?=\d)", "−", text)


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
