"""Losses as TorchRL ``LossModule``: conservative Q-learning, cloning, decision transformers, pre-training."""

from torchrl_sql.objectives.bc import DiscreteBCLoss
from torchrl_sql.objectives.cpc import ContrastivePredictionLoss
from torchrl_sql.objectives.cql import DistributionalCQLLoss
from torchrl_sql.objectives.decision_transformer import DecisionTransformerLoss
from torchrl_sql.objectives.mae import MaskedAutoencodingLoss
from torchrl_sql.objectives.multi_step import MultiStep, MultiStepTransform
from torchrl_sql.objectives.return_distribution import (
    c51_projection,
    check_support,
    clipped_mass,
    expected_value,
    hl_gauss_target,
)

__all__ = [
    "ContrastivePredictionLoss",
    "DecisionTransformerLoss",
    "DiscreteBCLoss",
    "DistributionalCQLLoss",
    "MaskedAutoencodingLoss",
    "MultiStep",
    "MultiStepTransform",
    "c51_projection",
    "check_support",
    "clipped_mass",
    "expected_value",
    "hl_gauss_target",
]
