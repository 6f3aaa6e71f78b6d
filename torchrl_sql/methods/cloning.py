"""Behavioural cloning, on the same network with scalar heads, read as logits of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrl.objectives import LossModule

from torchrl_sql.config import ModelConfig
from torchrl_sql.methods.method import Method, q_network
from torchrl_sql.objectives import DiscreteBCLoss


class Cloning(Method):
    """The paper's first baseline."""

    label = "BC"
    values = "logits"

    @property
    def metrics(self) -> Mapping[str, str]:
        """The loss."""
        return {"loss_bc": "Cloning loss (nats)"}

    def network(self, model: ModelConfig, games: Sequence[str], **options: Any) -> nn.Module:
        """A logit per game and action."""
        return q_network(model, games, num_atoms=None, **options)

    def loss(self, network: nn.Module) -> LossModule:
        """Cross-entropy with the data's actions."""
        return DiscreteBCLoss(network)
