"""The Multi-Game Decision Transformer, and cloning with the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import LossModule

from torchrl_sql.config import DataConfig, DecisionTransformerConfig, ModelConfig, SequenceConfig, TransformerConfig
from torchrl_sql.data import FrameStore, OfflineAtariReplay
from torchrl_sql.methods.method import Method
from torchrl_sql.modules import DecisionTransformerPolicy, make_decision_transformer
from torchrl_sql.objectives import DecisionTransformerLoss


class TransformerCloning(Method):
    """Behavioural cloning with MGDT's network and no return tokens: what is left of it without conditioning."""

    settings: SequenceConfig
    label = "BC (transformer)"
    values = "logits"
    return_token = False

    @property
    def metrics(self) -> Mapping[str, str]:
        """The two losses and the accuracy."""
        return {
            "loss_action": "Loss of actions, its share of the mean (nats)",
            "loss_reward": "Loss of rewards, its share of the mean (nats)",
            "accuracy": "Share of actions predicted right",
        }

    def network(self, model: ModelConfig, games: Sequence[str], **options: Any) -> nn.Module:
        """One network for all games, which it is not told."""
        assert isinstance(model, TransformerConfig)
        return make_decision_transformer(
            width=model.width,
            num_layers=model.num_layers,
            num_steps=self.settings.num_steps,
            patch_size=model.patch_size,
            dropout=model.dropout,
            return_token=self.return_token,
        )

    def loss(self, network: nn.Module) -> LossModule:
        """Cross-entropies of what the tokens predict."""
        return DecisionTransformerLoss(network, class_averaged=self.settings.class_averaged)

    def features(self, network: nn.Module, batch: TensorDictBase) -> Tensor:
        """Of each window's last step, padding aside."""
        module: Any = network
        features: Tensor = module.module.features(*(batch[key] for key in module.in_keys), mask=batch["mask"])
        return features

    def replay(self, data: DataConfig, store: FrameStore, **options: Any) -> OfflineAtariReplay:
        """Windows of steps; ``data.n_steps`` has no meaning for them."""
        return super().replay(data, store, window_steps=self.settings.num_steps, **options)

    def policy(self, network: nn.Module, games: Sequence[str], *, decoding: str = "greedy") -> TensorDictModuleBase:
        """Acts on the last steps."""
        return DecisionTransformerPolicy(network, games, decoding=decoding)


class DecisionTransformer(TransformerCloning):
    """MGDT (arXiv:2205.15241)."""

    settings: DecisionTransformerConfig
    label = "MGDT"
    return_token = True

    @property
    def metrics(self) -> Mapping[str, str]:
        """The three losses and the accuracy."""
        return {"loss_return": "Loss of returns, its share of the mean (nats)", **super().metrics}

    def policy(self, network: nn.Module, games: Sequence[str], *, decoding: str = "expert") -> TensorDictModuleBase:
        """Asks for a high return, unless another decoding is wanted."""
        return DecisionTransformerPolicy(network, games, decoding=decoding, kappa=self.settings.kappa)
