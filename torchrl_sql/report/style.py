"""How the report's plots look, and how one drawing becomes PNG, SVG and inline SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.8
"""Of a plot, in inches: text of 9 points stays readable when a phone shows the plot 360 pixels wide."""

SMALL_WIDTH = 4.0
"""Of small multiples, three of which stand side by side on a laptop."""

COLOURS = {  # light theme, dark theme; told apart with every common colour vision deficiency, and in grey
    "ink": ("#1c2127", "#e6e8eb"),
    "muted": ("#666e79", "#9aa3af"),
    "rule": ("#dde0e4", "#343a42"),
    "paper": ("#fefefe", "#15181c"),
    "method": ("#0a5da6", "#63b1f2"),
    "method2": ("#3f8fcc", "#458fd0"),
    "method3": ("#85b4da", "#3a6ea3"),
    "bc": ("#c2520a", "#f2964f"),
    "bc2": ("#e09a62", "#b0672f"),
    "other": ("#8a4a9e", "#cb92dd"),
    "other2": ("#2a7f56", "#6cc394"),
    "other3": ("#8a6d00", "#d6b64a"),
    "other4": ("#c43a63", "#f290ad"),
    "other5": ("#4b5a6e", "#b4c2d6"),
    "data": ("#8b929c", "#808893"),
}
"""Theme colours: the light one is drawn, and becomes the CSS variable ``--<name>`` in inline SVG."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["rule"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"][0],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["rule"][0],
    "ytick.color": COLOURS["rule"][0],
    "xtick.labelcolor": COLOURS["muted"][0],
    "ytick.labelcolor": COLOURS["ink"][0],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "text.parse_math": False,  # labels come from outside: a dollar sign is a dollar sign
    "text.color": COLOURS["ink"][0],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": COLOURS["paper"][0],
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "torchrl_sql",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure with its file name, caption, and a description for those who cannot see it."""

    name: str
    caption: str
    description: str
    figure: Figure

    def png(self) -> bytes:
        """The light theme's picture."""
        return self._save("png")

    @cached_property
    def svg(self) -> bytes:
        """The light theme's drawing, a file that stands by itself."""
        return self._save("svg")

    def _save(self, file_format: str) -> bytes:
        file = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(file, format=file_format, metadata=metadata)
        return file.getvalue()

    def inline(self) -> str:
        """SVG for inside a page: theme colours as CSS variables, ids that no other plot has, nothing loaded."""
        text = self.svg.decode()
        view_box = re.search(r'viewBox="[^"]*"', text)
        body = text[text.index("</metadata>") + len("</metadata>") :] if "</metadata>" in text else text
        assert view_box is not None, "matplotlib writes a viewBox"
        body = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{self.name}-", body)
        for name, (light, _) in COLOURS.items():
            body = body.replace(light, f"var(--{name})")
        label = escape(self.description, quote=True)
        return f'<svg {view_box[0]} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of the given size in inches, and its only axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw(plots: Callable[[], Iterable[Plot | None]]) -> list[Plot]:
    """Calls a maker of plots in the report's style and drops those that had nothing to show."""
    with matplotlib.rc_context(STYLE):
        return [plot for plot in plots() if plot is not None]
