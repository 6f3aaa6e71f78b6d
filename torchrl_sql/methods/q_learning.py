"""Conservative Q-learning with C51, HL-Gauss or MSE targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrl.objectives import HardUpdate, LossModule, TargetNetUpdater

from torchrl_sql.config import ModelConfig, QLearningConfig
from torchrl_sql.methods.method import Method, q_network
from torchrl_sql.objectives import DistributionalCQLLoss


class QLearning(Method):
    """Scaled Q-learning (arXiv:2211.15144) and its ablations."""

    settings: QLearningConfig
    label = "Scaled QL"
    values = "q"

    @property
    def metrics(self) -> Mapping[str, str]:
        """Losses and values."""
        return {
            "loss_qvalue": f"TD loss ({'squared error' if self.settings.target == 'mse' else 'nats'})",
            "loss_cql": "CQL penalty, weighted",
            "q_data": "Q of the data's actions",
            "q_max": "Maximum Q",
        }

    def network(self, model: ModelConfig, games: Sequence[str], **options: Any) -> nn.Module:
        """A head of ``num_atoms`` log-probabilities per game and action, or of one value."""
        settings = self.settings
        return q_network(
            model,
            games,
            num_atoms=settings.num_atoms,
            v_min=settings.v_min,
            v_max=settings.v_max,
            value_prior_std=settings.value_prior_std,
            mask_illegal_actions=settings.mask_illegal_actions,
            **options,
        )

    def loss(self, network: nn.Module) -> LossModule:
        """Temporal differences and the CQL penalty."""
        settings = self.settings
        return DistributionalCQLLoss(
            network,
            gamma=settings.gamma,
            cql_alpha=settings.cql_alpha,
            double_q=settings.double_q,
            target=settings.target,  # type: ignore[arg-type]  # the schema's bound is the Literal
        )

    def target_updater(self, loss: LossModule) -> TargetNetUpdater:
        """A hard copy."""
        # Interval 0 copies at each call; the trainer calls it when it is due.
        return HardUpdate(loss, value_network_update_interval=0)
