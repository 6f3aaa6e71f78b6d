"""What a result was computed with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def software_versions() -> dict[str, str]:
    """The machine, and versions of what computes the results."""
    names = ("torchrl_sql", "torch", "torchrl", "tensordict", "ale-py", "numpy", "tensorstore")
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return machine | {"python": platform.python_version()} | {name: version(name) for name in names}
