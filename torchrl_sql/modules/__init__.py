"""Networks: encoders, pooling, per-game heads, and the TorchRL actors made of them."""

from torchrl_sql.modules.cnn import ImpalaCNN, NatureCNN
from torchrl_sql.modules.heads import PerGameLinear
from torchrl_sql.modules.pooling import GlobalAveragePooling, LearnedSpatialEmbedding
from torchrl_sql.modules.q_network import LegalDistributionalQValueModule, MultiGameQNetwork, make_q_actor
from torchrl_sql.modules.resnet import ResNet, SmallResNet

__all__ = [
    "GlobalAveragePooling",
    "ImpalaCNN",
    "LearnedSpatialEmbedding",
    "LegalDistributionalQValueModule",
    "MultiGameQNetwork",
    "NatureCNN",
    "PerGameLinear",
    "ResNet",
    "SmallResNet",
    "make_q_actor",
]
