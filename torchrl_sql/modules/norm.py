"""Group normalization (Wu & He 2018) that keeps the precision and the layout of what it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``torch.nn.functional.group_norm``, with statistics in float32 and a result of ``x``'s dtype.

    Written for a compiler: moments are taken of each channel first, and so are all sums of the gradient. So ``x`` is
    read twice forward and, with the gradient, twice backward, along its memory in channels-last, too, where a group of
    channels is no block. Moments are sums of deviations from the channel's first pixel and of their squares: faster
    than ``torch.var_mean`` (benchmarks/results/gpu.md), and as exact where the mean is large. Where that pixel is far
    from all others, the variance's relative error can reach ``H * W`` times float32's epsilon: 2e-4 for 42 x 42.

    Args:
        x (Tensor): ``[B, C, H, W]`` of any floating dtype and memory format.
        num_groups (int): a divisor of ``C``.
        weight (Tensor): ``[C]``.
        bias (Tensor): ``[C]``.
        eps (float): added to the variance.
    """
    values = x.float()
    pixel = values[:, :, :1, :1].detach()  # no moment depends on which
    deviations = values - pixel
    size = x.shape[2] * x.shape[3]
    offsets = deviations.sum((2, 3)) / size
    variances = (deviations.square().sum((2, 3)) / size - offsets.square()).unflatten(1, (num_groups, -1))
    means = (pixel.flatten(1) + offsets).unflatten(1, (num_groups, -1))  # [B, G, C / G]
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True).clamp_min(0)
    return _normalize(values, mean, variance, weight, bias, eps).to(x.dtype)


def _normalize(values: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    num_groups = mean.shape[1]
    scale = (variance + eps).rsqrt() * weight.float().view(num_groups, -1)
    shift = bias.float().view(num_groups, -1) - mean * scale
    scale, shift = (value.flatten(1)[:, :, None, None] for value in (scale, shift))
    return torch.addcmul(shift, values, scale)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose result has the dtype of its input on CUDA, too.

    There torch's own is in float32 under autocast, so that all that follows until the next convolution takes twice the
    memory traffic, and turns channels-last into contiguous and back; compiled, :func:`group_norm` does neither. Eager,
    its operators would each be a pass over memory: torch's kernel has fewer. On the CPU torch's own is the fastest.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" and torch.compiler.is_compiling():
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
