"""Losses: distributional conservative Q-learning and behavioural cloning, as TorchRL ``LossModule``."""

from torchrl_sql.objectives.bc import DiscreteBCLoss
from torchrl_sql.objectives.cql import DistributionalCQLLoss
from torchrl_sql.objectives.decision_transformer import DecisionTransformerLoss
from torchrl_sql.objectives.multi_step import MultiStep, MultiStepTransform
from torchrl_sql.objectives.return_distribution import c51_projection, check_support, expected_value, hl_gauss_target

__all__ = [
    "DecisionTransformerLoss",
    "DiscreteBCLoss",
    "DistributionalCQLLoss",
    "MultiStep",
    "MultiStepTransform",
    "c51_projection",
    "check_support",
    "expected_value",
    "hl_gauss_target",
]
