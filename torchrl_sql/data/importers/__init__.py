"""Reads data sets of others into a store: DQN-Replay, TorchRL's Atari DQN folders, Minari."""

from torchrl_sql.data.importers.dqn_replay import import_dqn_replay
from torchrl_sql.data.importers.job import ImportSummary, summary_table
from torchrl_sql.data.importers.minari import import_minari
from torchrl_sql.data.importers.pool import ImportFailedError
from torchrl_sql.data.importers.torchrl_memmap import import_torchrl_memmap

__all__ = [
    "ImportFailedError",
    "ImportSummary",
    "import_dqn_replay",
    "import_minari",
    "import_torchrl_memmap",
    "summary_table",
]
