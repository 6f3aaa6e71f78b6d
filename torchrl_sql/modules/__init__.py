"""Networks: encoders, pooling, per-game heads, and the TorchRL actors made of them."""

from torchrl_sql.modules.decision_transformer import (
    DecisionTransformer,
    DecisionTransformerPolicy,
    make_decision_transformer,
)
from torchrl_sql.modules.encoders import ENCODERS, Encoder, ImpalaCNN, NatureCNN, ResNet, SmallResNet
from torchrl_sql.modules.heads import PerGameLinear
from torchrl_sql.modules.policy import NetworkPolicy, sample_index
from torchrl_sql.modules.pooling import POOLINGS, GlobalAveragePooling, LearnedSpatialEmbedding
from torchrl_sql.modules.pretraining import ContrastivePredictor, MaskedAutoencoder
from torchrl_sql.modules.q_network import GreedyDistributionalQValueModule, MultiGameQNetwork, make_q_actor

__all__ = [
    "ENCODERS",
    "POOLINGS",
    "ContrastivePredictor",
    "DecisionTransformer",
    "DecisionTransformerPolicy",
    "Encoder",
    "GlobalAveragePooling",
    "GreedyDistributionalQValueModule",
    "ImpalaCNN",
    "LearnedSpatialEmbedding",
    "MaskedAutoencoder",
    "MultiGameQNetwork",
    "NatureCNN",
    "NetworkPolicy",
    "PerGameLinear",
    "ResNet",
    "SmallResNet",
    "make_decision_transformer",
    "make_q_actor",
    "sample_index",
]
