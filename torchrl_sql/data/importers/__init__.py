"""Reads data sets of others into a store. A module with a ``FORMAT`` is a format that ``torchrl-sql import`` knows."""

from importlib import import_module
from pkgutil import iter_modules

from torchrl_sql.data.importers.dqn_replay import import_dqn_replay
from torchrl_sql.data.importers.job import Format, ImportSummary, summary_table
from torchrl_sql.data.importers.minari import import_minari
from torchrl_sql.data.importers.pool import ImportFailedError
from torchrl_sql.data.importers.torchrl_memmap import import_torchrl_memmap

__all__ = [
    "Format",
    "ImportFailedError",
    "ImportSummary",
    "formats",
    "import_dqn_replay",
    "import_minari",
    "import_torchrl_memmap",
    "summary_table",
]


def formats() -> dict[str, Format]:
    """All formats by name: the table that the command line reads."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {module.FORMAT.name: module.FORMAT for module in modules if hasattr(module, "FORMAT")}
