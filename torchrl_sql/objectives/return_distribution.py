"""Arithmetic of categorical return distributions: pure functions of tensors, compiled and differentiated as they are.

Legend: ``*B`` any batch dimensions, N atoms, A actions. Everything stays on the device of its inputs and in their
dtype; callers pass float32 or wider.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrl_sql.arguments import check_number


def check_support(support: Tensor) -> None:
    """Checks that a support can carry a return distribution.

    Args:
        support (Tensor): ``[N]`` float, in units of discounted reward. Read on the host: call it once, when building.

    Raises:
        ValueError: unless the atoms are finite, strictly increasing and evenly spaced, and at least two.
    """
    if support.ndim != 1 or support.numel() < 2:
        raise ValueError(f"support must be a vector of at least 2 atoms, got shape {tuple(support.shape)}")
    gaps = support.double().diff()
    if not bool(torch.isfinite(support).all()) or not bool((gaps > 0).all()):
        raise ValueError(f"support must be finite and strictly increasing, got {support.tolist()}")
    # Atoms stored in float32 carry rounding of their own magnitude, not of their spacing.
    tolerance = 8 * torch.finfo(torch.float32).eps * float(support.abs().max())
    if float((gaps - gaps.mean()).abs().max()) > tolerance:
        raise ValueError(f"support must be evenly spaced, got gaps from {float(gaps.min())} to {float(gaps.max())}")


def expected_value(log_probs: Tensor, support: Tensor) -> Tensor:
    """Q-values, the expectation of return distributions.

    Args:
        log_probs (Tensor): ``[*B, N, A]`` log-probabilities.
        support (Tensor): ``[N]``.

    Returns:
        ``[*B, A]``.
    """
    # Product and sum, not a matrix product, which autocast would compute in its lower precision.
    return (log_probs.exp() * support.unsqueeze(-1)).sum(-2)


def c51_projection(probs: Tensor, support: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    r"""Projects the Bellman update of a return distribution back onto its support (Bellemare et al. 2017, eq. 7).

    The mass of atom ``z_j`` moves to ``clip(reward + discount * z_j, z_1, z_N)`` and is shared by the two atoms next to
    it in proportion to proximity: ``target_i = sum_j [1 - |clip(Tz_j) - z_i| / dz]_0^1 * probs_j``. Written as a dense
    product of triangles rather than as two scatters: it has no atomics, so that it is deterministic on CUDA, and fuses.

    Args:
        probs (Tensor): ``[*B, N]`` probabilities of the next state's return.
        support (Tensor): ``[N]``, evenly spaced.
        reward (Tensor): ``[*B, 1]``; the discounted sum with n-step returns.
        discount (Tensor): ``[*B, 1]``; ``gamma ** steps``, and 0 where the next state is terminal.

    Returns:
        ``[*B, N]`` probabilities.
    """
    num_atoms = support.shape[0]
    v_min, v_max = support[0], support[-1]
    # In units of atoms; clipped once more because rounding of the division could leave the last atom.
    position = ((reward + discount * support).clamp(v_min, v_max) - v_min) * ((num_atoms - 1) / (v_max - v_min))
    position = position.clamp(0, num_atoms - 1)
    atom = torch.arange(num_atoms, device=support.device, dtype=support.dtype)
    share = (1 - (position.unsqueeze(-2) - atom.unsqueeze(-1)).abs()).clamp_min(0)  # [*B, N to, N from]
    return (share * probs.unsqueeze(-2)).sum(-1)


def clipped_mass(probs: Tensor, support: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """The probability that :func:`c51_projection` moves to the ends of the support because it would lie beyond them.

    Args:
        probs (Tensor): ``[*B, N]``; the arguments are those of :func:`c51_projection`.
        support (Tensor): ``[N]``.
        reward (Tensor): ``[*B, 1]``.
        discount (Tensor): ``[*B, 1]``.

    Returns:
        ``[*B]``, in [0, 1].
    """
    moved = reward + discount * support
    return (probs * ((moved < support[0]) | (moved > support[-1]))).sum(-1)


def hl_gauss_target(value: Tensor, support: Tensor, sigma_ratio: float = 0.75) -> Tensor:
    """A normal distribution around a scalar target as a histogram (Farebrother et al. 2024, section 3.1).

    Atoms are the centres of the bins, whose mass is a difference of the normal's distribution function, renormalized to
    what lies within the outermost bins' edges. The source's bins lie otherwise: their *edges* span the support, so that
    the outermost centres are half a bin inside, and its targets are not clipped.

    Args:
        value (Tensor): ``[*B, 1]`` targets; clipped to the support, as C51 clips atoms.
        support (Tensor): ``[N]``, evenly spaced.
        sigma_ratio (float): standard deviation in units of a bin's width; 0.75 is the source's.

    Returns:
        ``[*B, N]`` probabilities. With ratios from 0.75 to 2 their mean differs from the clipped ``value`` by less than
        1e-4 bins further than four standard deviations inside the support, and by less than one standard deviation
        anywhere. Inside, narrower distributions err by more, as few bins hold their mass: 0.003 bins at 0.5, up to half
        a bin towards 0.

    Raises:
        TypeError, ValueError: if ``sigma_ratio`` is not a positive number.
    """
    check_number("sigma_ratio", sigma_ratio, 0, above=True)
    num_atoms = support.shape[0]
    width = (support[-1] - support[0]) / (num_atoms - 1)
    edges = torch.cat([support - width / 2, support[-1:] + width / 2])
    distance = (edges - value.clamp(support[0], support[-1])) / (width * (sigma_ratio * math.sqrt(2)))
    cdf = torch.erf(distance)
    return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])
