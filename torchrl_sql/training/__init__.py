"""Training: the update step, the loop, and runs in their folders."""

from torchrl_sql.training.build import load_actor
from torchrl_sql.training.run import Interrupted, train
from torchrl_sql.training.trainer import Trainer

__all__ = ["Interrupted", "Trainer", "load_actor", "train"]
