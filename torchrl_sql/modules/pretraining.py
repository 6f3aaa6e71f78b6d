"""Networks that prepare an encoder without acting: masked auto-encoding and contrastive predictive coding.

Legend: B batch, K stacked frames, H, W sides of the feature map, P = H * W its places, C channels, D width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_sql.arguments import check_choice, check_count
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK
from torchrl_sql.modules.decision_transformer import TransformerBlock, check_width
from torchrl_sql.modules.pooling import POOLINGS
from torchrl_sql.modules.q_network import as_map, probe_map, scale_frames

_INPUT_SHAPE = (FRAME_STACK, *FRAME_SHAPE)


class _Pretraining(nn.Module):
    """The encoder of a Q-network, fed as there. Its keys are those that a ``TensorDictModule`` around it needs."""

    in_keys: ClassVar[list[NestedKey]]
    out_keys: ClassVar[list[NestedKey]]
    input_mean: Tensor | None

    def __init__(self, encoder: nn.Module, input_mean: Tensor | None, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.encoder = encoder
        self.map_shape = probe_map(encoder, _INPUT_SHAPE).shape[1:]
        self.register_buffer("input_mean", input_mean)
        self.memory_format = memory_format
        encoder.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's annotations

    def _scaled(self, observation: Tensor, game_id: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return scale_frames(observation, game_id, self.input_mean, dtype=dtype, memory_format=self.memory_format)

    def _check_shapes(self, observation: Tensor, game_id: Tensor) -> None:
        if observation.shape[1:] != _INPUT_SHAPE or game_id.shape != observation.shape[:1]:
            raise ValueError(
                f"observation must be [B, {', '.join(map(str, _INPUT_SHAPE))}] and game_id [B], "
                f"got {tuple(observation.shape)} and {tuple(game_id.shape)}"
            )


class MaskedAutoencoder(_Pretraining):
    """Decodes frames from a tenth of the feature map's places.

    Places of the final feature map are hidden from a transformer, which sees a learned token there, and learned
    positions everywhere; its output tokens are patches of the stacked frames. As in Atari-PB (arXiv:2406.06037), where
    90% are hidden and the transformer has 4 layers of width 512. Where the map's side does not divide 84, patches are
    rounded up and what stands over at the right and below is cut off.

    Args:
        encoder (nn.Module): ``[B, K, 84, 84]`` -> ``[B, C, H, W]``.

    Keyword Args:
        mask_share (float): share of the places that are hidden, rounded to whole places.
        width (int): ``D`` of the transformer, a multiple of 64.
        num_layers (int): its blocks.
        input_mean (Tensor or None): ``[G, 84, 84]``, subtracted from each frame of its game; the target is then what
            remains.
        memory_format (torch.memory_format): layout of the encoder.

    Shape:
        - observation: ``[B, K, 84, 84]`` uint8; game_id: ``[B]`` int64
        - output: ``reconstruction`` and ``target``, ``[B, K, 84, 84]`` float in units of the scaled input, and
          ``masked`` ``[B, P]`` bool, the hidden places, drawn anew at each call

    Raises:
        ValueError: if no place would be hidden, or all; for other shapes and sizes.
    """

    in_keys: ClassVar[list[NestedKey]] = ["observation", "game_id"]
    out_keys: ClassVar[list[NestedKey]] = ["reconstruction", "target", "masked"]

    def __init__(
        self,
        encoder: nn.Module,
        *,
        mask_share: float = 0.9,
        width: int = 512,
        num_layers: int = 4,
        input_mean: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, input_mean, memory_format)
        check_width(width)
        check_count("num_layers", num_layers)
        channels, height, columns = self.map_shape
        self.num_places = height * columns
        self.num_masked = round(mask_share * self.num_places)
        if not 0 < self.num_masked < self.num_places:
            raise ValueError(
                f"mask_share must hide 1 to {self.num_places - 1} of the map's {self.num_places} places, "
                f"got {mask_share}: {self.num_masked}"
            )
        self.patch = (math.ceil(FRAME_SHAPE[0] / height), math.ceil(FRAME_SHAPE[1] / columns))
        self.project = nn.Linear(channels, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(self.num_places, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, dropout=0.0) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, FRAME_STACK * math.prod(self.patch))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts token, positions and the last layer anew, from near-black frames; the others do so themselves."""
        for weight in (self.mask_token, self.position, self.pixels.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.pixels.bias)

    def features(self, observation: Tensor, game_id: Tensor) -> Tensor:
        """The feature map's mean over its places, ``[B, C]``."""
        return as_map(self.encoder(self._scaled(observation, game_id))).mean((-2, -1))

    def forward(self, observation: Tensor, game_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_shapes(observation, game_id)
        x = self._scaled(observation, game_id)
        tokens_BPC = as_map(self.encoder(x)).flatten(2).transpose(1, 2)
        order = torch.rand(tokens_BPC.shape[:2], device=x.device).argsort(-1)
        masked_BP = order < self.num_masked
        return self.decode(tokens_BPC, masked_BP), x.detach(), masked_BP

    def decode(self, tokens_BPC: Tensor, masked_BP: Tensor) -> Tensor:
        """Frames ``[B, K, 84, 84]`` from the places of feature maps that are not masked."""
        y_BPD = torch.where(masked_BP.unsqueeze(-1), self.mask_token, self.project(tokens_BPC)) + self.position
        for block in self.blocks:
            y_BPD = block(y_BPD, None)
        patches = self.pixels(self.norm(y_BPD)).to(self.position.dtype).transpose(1, 2)
        _, height, columns = self.map_shape
        size = (height * self.patch[0], columns * self.patch[1])
        return F.fold(patches, size, kernel_size=self.patch, stride=self.patch)[..., : FRAME_SHAPE[0], : FRAME_SHAPE[1]]


class ContrastivePredictor(_Pretraining):
    """Scores every pair of a state and a later state by ``phi(s)' W phi(s')``.

    ``phi`` is the encoder, pooled, and two layers; as in MGDT (arXiv:2205.15241), whose layers have 512 units.

    Args:
        encoder (nn.Module): ``[B, K, 84, 84]`` -> ``[B, C, H, W]``.

    Keyword Args:
        width (int): ``D`` of both layers.
        pooling (str): a name in ``POOLINGS``.
        num_embeddings (int): of its learned maps.
        input_mean, memory_format: see :class:`MaskedAutoencoder`.

    Shape:
        - observation, next_observation: ``[B, K, 84, 84]`` uint8; game_id: ``[B]`` int64
        - output: ``scores`` ``[B, B]``, of state ``i`` and later state ``j``
    """

    in_keys: ClassVar[list[NestedKey]] = ["observation", "game_id", ("next", "observation")]
    out_keys: ClassVar[list[NestedKey]] = ["scores"]

    def __init__(
        self,
        encoder: nn.Module,
        *,
        width: int = 512,
        pooling: str = "spatial_embedding",
        num_embeddings: int = 1,
        input_mean: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, input_mean, memory_format)
        check_count("width", width)
        check_choice("pooling", pooling, POOLINGS)
        channels, height, columns = self.map_shape
        self.pooling = POOLINGS[pooling](channels, height, columns, num_embeddings)
        with torch.no_grad():
            num_features = self.pooling(torch.zeros(1, *self.map_shape)).shape[1]
        self.layers = nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width))
        self.bilinear = nn.Linear(width, width, bias=False)

    def features(self, observation: Tensor, game_id: Tensor) -> Tensor:
        """The pooled feature map, before the two layers."""
        return self.pooling(as_map(self.encoder(self._scaled(observation, game_id))))

    def forward(self, observation: Tensor, game_id: Tensor, next_observation: Tensor) -> Tensor:
        self._check_shapes(observation, game_id)
        self._check_shapes(next_observation, game_id)
        both = torch.cat([observation, next_observation])
        now_BD, later_BD = self.layers(self.features(both, game_id.repeat(2))).chunk(2)
        return (self.bilinear(now_BD) @ later_BD.T).to(self.bilinear.weight.dtype)
