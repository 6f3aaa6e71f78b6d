"""Checks of arguments whose errors name the argument, what it must be and what it is."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real


def check_number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Checks that ``value`` is a finite number in ``[low, high]``.

    Args:
        name (str): the argument's name, for the message.
        value (object): what the user passed.
        low (float): the lower bound.
        high (float): the upper bound.

    Keyword Args:
        above (bool): ``low`` itself is excluded.

    Raises:
        TypeError: if it is no number (``True`` is none).
        ValueError: if it is outside the bounds, not finite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (low < number if above else low <= number) or not number <= high or not math.isfinite(number):
        interval = f"{'(' if above else '['}{low:g}, {f'{high:g}]' if math.isfinite(high) else 'inf)'}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_count(name: str, value: object, low: int = 1) -> None:
    """Checks that ``value`` is an integer of at least ``low``; raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``; ``1`` does not pass for ``True``."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
