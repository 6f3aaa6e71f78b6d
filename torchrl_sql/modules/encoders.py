"""Encoders from stacked frames to feature maps, and the table of their names.

The ResNets have GroupNorm in place of BatchNorm (He et al. 2016; Wu & He 2018) because a batch mixes games: statistics
over the batch would leak from one game into another, and differ between the mixed training batch and a single game's
evaluation batch. The convolutions of DQN and IMPALA are capacity baselines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_sql.arguments import check_number
from torchrl_sql.modules.norm import GroupNorm


class _Trunk(nn.Sequential):
    """Layers of which a slice is an ``nn.Sequential``: torch would call the subclass, whose arguments differ."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _group_norm(channels: int, num_groups: int) -> GroupNorm:
    # At least four channels per group: fewer make the statistics of a late, small map (3x3) a handful of numbers.
    if channels < 4:
        raise ValueError(f"normalized layers must have at least 4 channels, got {channels}: give a larger width")
    return GroupNorm(min(num_groups, channels // 4), channels)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class _ResidualBlock(nn.Module):
    """``relu(residual(x) + shortcut(x))``, the shortcut being a strided 1x1 convolution where the shape changes.

    ``residual`` ends in a GroupNorm.
    """

    def __init__(
        self, residual: nn.Sequential, in_channels: int, out_channels: int, stride: int, num_groups: int
    ) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride), _group_norm(out_channels, num_groups)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def _basic_block(in_channels: int, width: int, stride: int, num_groups: int) -> _ResidualBlock:
    residual = nn.Sequential(
        _conv(in_channels, width, 3, stride),
        _group_norm(width, num_groups),
        nn.ReLU(),
        _conv(width, width, 3),
        _group_norm(width, num_groups),
    )
    return _ResidualBlock(residual, in_channels, width, stride, num_groups)


def _bottleneck_block(in_channels: int, width: int, stride: int, num_groups: int) -> _ResidualBlock:
    out_channels = 4 * width
    residual = nn.Sequential(
        _conv(in_channels, width, 1),
        _group_norm(width, num_groups),
        nn.ReLU(),
        _conv(width, width, 3, stride),
        _group_norm(width, num_groups),
        nn.ReLU(),
        _conv(width, out_channels, 1),
        _group_norm(out_channels, num_groups),
    )
    return _ResidualBlock(residual, in_channels, out_channels, stride, num_groups)


class _ResidualTrunk(_Trunk):
    """Convolutions start from He et al.'s normal initialization, each block's last norm at the scale given."""

    def __init__(self, *layers: nn.Module, last_norm_scale: float) -> None:
        super().__init__(*layers)
        check_number("last_norm_scale", last_norm_scale, 0)
        self.last_norm_scale = last_norm_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts these layers anew; the others do so themselves."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, _ResidualBlock):
                norm = layer.residual[-1]
                assert isinstance(norm, GroupNorm)
                nn.init.constant_(norm.weight, self.last_norm_scale)


class ResNet(_ResidualTrunk):
    """A torchvision-style ResNet trunk with GroupNorm and without a classifier.

    A 7x7 stride-2 stem and a stride-2 max-pool, then four stages of 64, 128, 256 and 512 channels (four times that with
    bottleneck blocks). Convolutions start from He et al.'s normal initialization.

    Args:
        depths (sequence of int): number of residual blocks in each stage, e.g. ``(3, 4, 6, 3)``.

    Keyword Args:
        bottleneck (bool): blocks of 1x1, 3x3, 1x1 convolutions (ResNet-50, -101) instead of two 3x3.
        in_channels (int): stacked frames ``K``.
        num_groups (int): groups of the normalization layers, at most a quarter of a layer's channels.
        last_norm_scale (float): initial scale of the last normalization of each residual branch; with 0 a block starts
            as its shortcut.
        strides (sequence of int): of each stage's first block; ``(1, 2, 1, 1)``, PTR's, keeps a map of 11 x 11.

    Shape:
        - input: ``[B, K, 84, 84]`` float in [0, 1]
        - output: ``[B, 512, 3, 3]``, or ``[B, 2048, 3, 3]`` with bottleneck blocks
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool,
        in_channels: int = 4,
        num_groups: int = 32,
        last_norm_scale: float = 1.0,
        strides: Sequence[int] = (1, 2, 2, 2),
    ) -> None:
        block, expansion = (_bottleneck_block, 4) if bottleneck else (_basic_block, 1)
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False),
            _group_norm(64, num_groups),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        ]
        channels = 64
        for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            width = 64 * 2**stage
            for index in range(depth):
                layers.append(block(channels, width, stride if index == 0 else 1, num_groups))
                channels = width * expansion
        super().__init__(*layers, last_norm_scale=last_norm_scale)


class SmallResNet(_ResidualTrunk):
    """A ResNet small enough to learn Atari games on two CPU cores within minutes (about 42k parameters).

    An 8x8 stride-4 stem of 16 channels, then three basic blocks of 16, 32 (stride 2) and 32 channels. Not from the
    paper: an early stride of 4 and few channels are what make a training step take milliseconds.

    Keyword Args:
        width (int): channels of the stem; those of the blocks are once and twice as many.
        strides (sequence of int): of the blocks; ``(2, 2, 2)`` leaves a map of 3 x 3, that of the paper's networks.
        in_channels (int): stacked frames ``K``.
        num_groups (int): groups of the normalization layers, at most a quarter of a layer's channels.
        last_norm_scale (float): initial scale of the last normalization of each residual branch; with 0 a block starts
            as its shortcut.

    Shape:
        - input: ``[B, K, 84, 84]`` float in [0, 1]
        - output: ``[B, 2 * width, 10, 10]``
    """

    def __init__(
        self,
        *,
        width: int = 16,
        strides: Sequence[int] = (1, 2, 1),
        in_channels: int = 4,
        num_groups: int = 32,
        last_norm_scale: float = 1.0,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 8, 4, bias=False),
            _group_norm(width, num_groups),
            nn.ReLU(),
            _basic_block(width, width, strides[0], num_groups),
            _basic_block(width, 2 * width, strides[1], num_groups),
            _basic_block(2 * width, 2 * width, strides[2], num_groups),
            last_norm_scale=last_norm_scale,
        )


class NatureCNN(_Trunk):
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


class ImpalaCNN(_Trunk):
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


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How to build a named encoder, and the sizes between it and the heads."""

    build: Callable[..., nn.Module]
    """Makes the module; takes ``num_groups`` and ``last_norm_scale``, which only the ResNets use."""
    num_embeddings: int = 8
    """Learned spatial embeddings, one per channel each."""
    feature_dim: int | None = None
    """Width of the hidden layer after pooling; ``None`` for no such layer."""


_PTR_STRIDES = (1, 2, 1, 1)  # [nearest code: PTR]

# feature_dim and num_embeddings [ours]: they put ResNet-34 / 50 / 101 with C51 and 40 games at 31.3M / 60.8M / 79.8M
# parameters, against the published 31M / 60M / 79M. (1024 features would put ResNet-50 5.3% above.)
ENCODERS: dict[str, Encoder] = {
    "resnet_tiny": Encoder(build=partial(SmallResNet, width=8)),
    "resnet_small": Encoder(build=SmallResNet),
    "resnet_small_3x3": Encoder(build=partial(SmallResNet, strides=(2, 2, 2))),
    "resnet_medium": Encoder(build=partial(SmallResNet, width=32)),
    "resnet18": Encoder(build=partial(ResNet, (2, 2, 2, 2), bottleneck=False), num_embeddings=4, feature_dim=256),
    "resnet34": Encoder(build=partial(ResNet, (3, 4, 6, 3), bottleneck=False), num_embeddings=4, feature_dim=256),
    "resnet50": Encoder(build=partial(ResNet, (3, 4, 6, 3), bottleneck=True), num_embeddings=1, feature_dim=960),
    "resnet101": Encoder(build=partial(ResNet, (3, 4, 23, 3), bottleneck=True), num_embeddings=1, feature_dim=960),
    "resnet34_11x11": Encoder(
        build=partial(ResNet, (3, 4, 6, 3), bottleneck=False, strides=_PTR_STRIDES), num_embeddings=4, feature_dim=256
    ),
    "resnet50_11x11": Encoder(
        build=partial(ResNet, (3, 4, 6, 3), bottleneck=True, strides=_PTR_STRIDES), num_embeddings=1, feature_dim=960
    ),
    "nature": Encoder(build=lambda **_: NatureCNN(), feature_dim=512),
    "impala": Encoder(build=lambda **_: ImpalaCNN(), feature_dim=256),
}
