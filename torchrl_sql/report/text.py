"""Numbers and names as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torchrl_sql.statistics.intervals import Interval
from torchrl_sql.statistics.scores import Reference

REFERENCE_LABELS: dict[Reference, str] = {"human": "human", "dqn": "DQN"}


def format_score(value: float) -> str:
    """A raw score with the digits that matter: ``9.4``, ``312``, ``49,100``."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:z.1f}"


def format_interval(interval: Interval, number: Callable[[float], str] = format_score) -> str:
    """``[low, high]``, or that there is none."""
    if math.isnan(interval.low):
        return "[no interval]"
    return f"[{number(interval.low)}, {number(interval.high)}]"


def two_digits(value: float) -> str:
    """A normalised score: ``0.67``; zero has no sign."""
    return f"{value:z.2f}"


def plural(count: int, noun: str) -> str:
    """``1 game``, ``40 games``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_size(num_parameters: int) -> str:
    """``79M``, ``3.4M``, ``850k``."""
    unit, name = (1e6, "M") if num_parameters >= 1e6 else (1e3, "k")
    value = num_parameters / unit
    return f"{value:.0f}{name}" if value >= 10 else f"{value:.1f}{name}"


def format_x(x: float, axis: str) -> str:
    """A place on an axis: ``79M``, or ``first_fraction=0.05``."""
    return format_size(int(x)) if axis == "parameters" else f"{axis.rpartition('.')[2]}={x:g}"


def span(low: int, high: int) -> str:
    """``3``, or ``3 to 5``."""
    return f"{low}" if low == high else f"{low} to {high}"


def sentence(text: str) -> str:
    """With a capital letter first."""
    return text[0].upper() + text[1:]


def name_games(games: Sequence[str], total: int) -> str:
    """``Breakout and Freeway``, ``all 40 games``, ``5 of 40 games (...)``, or only the count beyond eight."""
    if len(games) == total and total > 2:
        return f"all {total} games"
    if len(games) <= 3:
        return " and ".join([", ".join(games[:-1]), games[-1]] if len(games) > 1 else games)
    return f"{len(games)} of {total} games" + (f" ({', '.join(games)})" if len(games) <= 8 else "")
