"""From a feature map to a feature vector (arXiv:2211.15144)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LearnedSpatialEmbedding(nn.Module):
    """Pools a feature map with learned spatial weights instead of a plain average.

    Each channel is multiplied point-wise by a learned map of its own and summed over space, ``E`` times over:
    ``out[c, e] = sum_{h,w} weight[e, c, h, w] * x[c, h, w]``. Unlike an average, it keeps where a feature was seen.

    Args:
        channels, height, width (int): shape of the feature map.
        num_embeddings (int): ``E``, the number of learned maps per channel.

    Shape:
        - input: ``[B, C, H, W]`` float
        - output: ``[B, C * E]`` float
    """

    def __init__(self, channels: int, height: int, width: int, num_embeddings: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, channels, height, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit variance out for unit variance in."""
        nn.init.normal_(self.weight, std=self.weight[0, 0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,echw->bce", x, self.weight).flatten(1)


class GlobalAveragePooling(nn.Module):
    """Averages each channel over space, ``[B, C, H, W]`` to ``[B, C]``: the ablation of learned embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


# Name -> pooling of a [C, H, W] map, given C, H, W and the number of spatial embeddings.
POOLINGS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "spatial_embedding": LearnedSpatialEmbedding,
    "average": lambda *_: GlobalAveragePooling(),
    "flatten": lambda *_: nn.Flatten(),
}
