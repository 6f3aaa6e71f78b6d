"""Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL."""

from torchrl_sql.games import GAMES

__version__ = "0.1.0"
__all__ = ["GAMES", "__version__"]
