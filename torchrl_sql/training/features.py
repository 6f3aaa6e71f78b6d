"""What is in the features of a batch of states: numbers that tell a rich representation from a collapsed one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

FEATURE_METRICS = {
    "feature_rank": "Effective rank of the features",
    "feature_dormant": "Share of dormant features",
    "feature_cosine": "Cosine between features of different states",
    "feature_norm": "Feature norm before normalization",
}
"""What :func:`describe_features` reports -> title of the curve."""

_RANK_SHARE = 0.99  # of the singular values' sum (arXiv:2010.14498)
_DORMANT = 0.025  # [nearest code: arXiv:2302.12902]


def describe_features(features_BD: Tensor) -> dict[str, Tensor]:
    """Scalars of a batch's features, on their device.

    Args:
        features_BD (Tensor): ``[B, D]`` of at least two states.

    Returns:
        ``feature_rank``, the least number of singular values that sum to 99% of all (Kumar et al. 2021);
        ``feature_dormant``, the share of features whose mean magnitude is at most a fortieth of the average feature's
        (Sokar et al. 2023); ``feature_cosine``, the mean cosine over pairs of states, where two without
        any feature count as alike; ``feature_norm``, the mean norm.
    """
    features_BD = features_BD.float()
    finite = features_BD.isfinite().all()  # the trainer says what is wrong; singular values would raise
    values = torch.linalg.svdvals(torch.where(finite, features_BD, 0.0))
    rank = (values.cumsum(0) < _RANK_SHARE * values.sum()).sum() + 1.0
    magnitude_D = features_BD.abs().mean(0)
    norm_B = torch.linalg.vector_norm(features_BD, dim=-1)
    dead_B = norm_B < 1e-12  # alike, as if they all pointed along one more axis
    sum_D = torch.cat([features_BD / norm_B.clamp_min(1e-12).unsqueeze(-1), dead_B.unsqueeze(-1)], -1).sum(0)
    num_states = len(features_BD)
    return {
        "feature_rank": torch.where(finite, rank, torch.nan),
        "feature_dormant": (magnitude_D <= _DORMANT * magnitude_D.mean()).float().mean(),
        "feature_cosine": (sum_D.square().sum() - num_states) / (num_states * (num_states - 1)),
        "feature_norm": norm_B.mean(),
    }


class FeatureProbe:
    """Describes the features that a network has of a batch, and leaves the network and all random numbers alone.

    Args:
        network (nn.Module): the one that is trained.
        features (callable): the network and a batch -> ``[B, D]``, see ``Method.features``.
    """

    def __init__(self, network: nn.Module, features: Callable[[nn.Module, TensorDictBase], Tensor]) -> None:
        self._network, self._features = network, features

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Nothing of a batch of one state, which has no pairs."""
        if len(batch) < 2:
            return {}
        was_training = self._network.training
        self._network.eval()  # without dropout
        try:
            return describe_features(self._features(self._network, batch))
        finally:
            self._network.train(was_training)
