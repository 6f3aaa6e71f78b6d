from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_sql.training.features import FeatureProbe, describe_features


def described(rows):
    return {name: value.item() for name, value in describe_features(torch.tensor(rows)).items()}


def test_orthogonal_features_are_of_full_rank():
    assert described([[3.0, 0.0], [0.0, 4.0]]) == pytest.approx(
        {"feature_rank": 2, "feature_dormant": 0, "feature_cosine": 0, "feature_norm": 3.5}
    )


def test_collapsed_features_are_of_rank_one_and_alike():
    assert described([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]) == pytest.approx(
        {"feature_rank": 1, "feature_dormant": 0.5, "feature_cosine": 1, "feature_norm": 2}
    )


def test_the_cosine_is_the_mean_over_pairs():
    # cos 0, cos 45 degrees twice, over three pairs
    assert described([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])["feature_cosine"] == pytest.approx(2**0.5 / 3)


@pytest.mark.parametrize(("small", "rank"), [(0.05, 1), (0.051, 2)])
def test_the_rank_is_the_least_number_of_singular_values_that_sum_to_99_percent(small, rank):
    # 5 of 5.05 is 0.9901, 5 of 5.051 is 0.9899
    assert described([[5.0, 0.0], [0.0, small]])["feature_rank"] == rank


def test_features_of_zeros_are_described_too():
    assert described([[0.0, 0.0], [0.0, 0.0]]) == pytest.approx(
        {"feature_rank": 1, "feature_dormant": 1, "feature_cosine": 1, "feature_norm": 0}
    )


def test_features_that_are_not_finite_are_no_error_here():
    result = described([[1.0, float("inf")], [1.0, 2.0]])
    assert result["feature_rank"] != result["feature_rank"] and result["feature_norm"] == float("inf")


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x)


def test_the_probe_leaves_mode_and_random_numbers_alone():
    network = Noisy()
    probe = FeatureProbe(network, lambda network, batch: network(batch["x"]))
    batch = TensorDict(x=torch.tensor([[3.0, 0.0], [0.0, 4.0]]), batch_size=[2])
    before = torch.get_rng_state()
    assert probe(batch)["feature_norm"].item() == 3.5  # nothing is dropped
    assert network.dropout.training and torch.equal(torch.get_rng_state(), before)
    assert probe(batch[:1]) == {}
