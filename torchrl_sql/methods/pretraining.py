"""Methods that prepare an encoder for others, see ``init.policy``: masked auto-encoding, contrastive prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import LossModule

from torchrl_sql.arguments import check_choice
from torchrl_sql.config import AutoencodingConfig, ContrastiveConfig, ModelConfig, QNetworkConfig
from torchrl_sql.games import FRAME_SHAPE
from torchrl_sql.methods.method import Method
from torchrl_sql.modules import ENCODERS, ContrastivePredictor, MaskedAutoencoder
from torchrl_sql.objectives import ContrastivePredictionLoss, MaskedAutoencodingLoss


class _Pretraining(Method):
    """Of the model's settings, those of the encoder count, and of pooling where there is pooling."""

    values = "none"

    def features(self, network: nn.Module, batch: TensorDictBase) -> Tensor:
        """Of the states; what follows them is not looked at."""
        assert isinstance(network, TensorDictModule)
        features: Tensor = network.module.features(batch["observation"], batch["game_id"])
        return features

    def policy(self, network: nn.Module, games: Sequence[str], *, decoding: str = "") -> NoReturn:
        """Always raises ``ValueError``."""
        name = self.settings.name
        raise ValueError(f"method {name!r} prepares an encoder and does not act: start another run with init.policy")


class MaskedAutoencoding(_Pretraining):
    """MAE, with the feature map's places hidden (arXiv:2406.06037)."""

    settings: AutoencodingConfig
    label = "MAE"

    @property
    def metrics(self) -> Mapping[str, str]:
        """The loss, and the same as a share."""
        return {
            "loss_mae": "Reconstruction error (squared, per pixel)",
            "unexplained": "Share of the pixels' variance not reconstructed",
        }

    def network(self, model: ModelConfig, games: Sequence[str], **options: Any) -> nn.Module:
        """The encoder and a decoder to pixels."""
        settings = self.settings
        autoencoder = MaskedAutoencoder(
            _encoder(model),
            mask_share=settings.mask_share,
            width=settings.decoder_width,
            num_layers=settings.decoder_layers,
            input_mean=_input_mean(model, games),
            **options,
        )
        return TensorDictModule(autoencoder, in_keys=autoencoder.in_keys, out_keys=autoencoder.out_keys)

    def loss(self, network: nn.Module) -> LossModule:
        """Squared error over pixels."""
        assert isinstance(network, TensorDictModule)
        return MaskedAutoencodingLoss(network)


class ContrastivePrediction(_Pretraining):
    """CPC, over ``data.n_steps`` agent steps (arXiv:2205.15241)."""

    settings: ContrastiveConfig
    label = "CPC"

    @property
    def metrics(self) -> Mapping[str, str]:
        """The loss and the accuracy."""
        return {
            "loss_cpc": "Contrastive loss (nats)",
            "accuracy": "Share of states whose next state is found in the batch",
        }

    def network(self, model: ModelConfig, games: Sequence[str], **options: Any) -> nn.Module:
        """The encoder, pooling, two layers and the bilinear score."""
        assert isinstance(model, QNetworkConfig)
        encoder = _encoder(model)
        default = ENCODERS[model.encoder].num_embeddings
        predictor = ContrastivePredictor(
            encoder,
            width=self.settings.width,
            pooling=model.pooling,
            num_embeddings=default if model.num_embeddings is None else model.num_embeddings,
            input_mean=_input_mean(model, games),
            **options,
        )
        return TensorDictModule(predictor, in_keys=predictor.in_keys, out_keys=predictor.out_keys)

    def loss(self, network: nn.Module) -> LossModule:
        """Cross-entropy over the batch's states."""
        assert isinstance(network, TensorDictModule)
        return ContrastivePredictionLoss(network, same_game=self.settings.same_game)


def _encoder(model: ModelConfig) -> nn.Module:
    assert isinstance(model, QNetworkConfig)
    check_choice("encoder", model.encoder, ENCODERS)
    return ENCODERS[model.encoder].build(num_groups=model.num_groups, last_norm_scale=model.last_norm_scale)


def _input_mean(model: ModelConfig, games: Sequence[str]) -> Tensor | None:
    """Zeros until they are set, as in a Q-network."""
    assert isinstance(model, QNetworkConfig)
    return torch.zeros(len(games), *FRAME_SHAPE) if model.center_input else None
