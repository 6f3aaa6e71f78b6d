"""Small convolutional encoders from earlier Atari agents, as capacity baselines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NatureCNN(nn.Sequential):
    """The three convolutions of DQN (Mnih et al. 2015).

    Keyword Args:
        in_channels (int): stacked frames ``K``.

    Shape:
        - input: ``[B, K, 84, 84]`` float in [0, 1]
        - output: ``[B, 64, 7, 7]``
    """

    def __init__(self, *, in_channels: int = 4) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 32, 8, 4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1),
            nn.ReLU(),
        )


class _ImpalaBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.residual(x))


class ImpalaCNN(nn.Sequential):
    """The residual encoder of IMPALA (Espeholt et al. 2018): three convolve-and-pool stages of two residual blocks.

    Keyword Args:
        in_channels (int): stacked frames ``K``.
        widths (sequence of int): channels of each stage.

    Shape:
        - input: ``[B, K, 84, 84]`` float in [0, 1]
        - output: ``[B, widths[-1], 11, 11]``
    """

    def __init__(self, *, in_channels: int = 4, widths: Sequence[int] = (16, 32, 32)) -> None:
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.MaxPool2d(3, 2, padding=1),
                _ImpalaBlock(width),
                _ImpalaBlock(width),
            ]
            channels = width
        super().__init__(*layers, nn.ReLU())
