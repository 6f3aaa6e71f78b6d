from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data.permutation import PATTERN_LENGTH, game_pattern, mix, permute


def whole(size: int, key: int) -> np.ndarray:
    keys = mix(np.full(size, key, np.uint64))
    return permute(np.arange(size, dtype=np.uint64), np.full(size, size, np.uint64), keys).astype(np.int64)


def test_mix_is_splitmix64():
    """The first outputs of the published generator with seed 0, whose state grows by the golden ratio."""
    state = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert [hex(value) for value in mix(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_permutations_look_random():
    """Where each position goes, and how far apart neighbours land, over 300 keys: chi-squared, 99.9% quantiles."""
    orders = np.stack([whole(500, key) for key in range(300)])
    counts, _, _ = np.histogram2d(np.tile(np.arange(500), 300), orders.ravel(), bins=10)
    assert ((counts - 1500) ** 2 / 1500).sum() < 128.6  # 81 degrees of freedom: rows and columns have fixed sums.
    steps = np.bincount((np.diff(orders, axis=1) % 500).ravel(), minlength=500)[1:]
    assert ((steps - steps.mean()) ** 2 / steps.mean()).sum() < 602.1  # 498 degrees of freedom.


def test_pattern_by_hand():
    """Multiples of the golden ratio: 0, .618, .236, .854, .472, .090, ..."""
    game, before, count = game_pattern((0.5, 0.0, 0.25, 0.25))
    assert game[:6].tolist() == [0, 2, 0, 3, 0, 0]
    assert before[:6].tolist() == [0, 0, 1, 0, 2, 3]
    assert count.sum() == PATTERN_LENGTH and count[1] == 0
    np.testing.assert_allclose(count / PATTERN_LENGTH, [0.5, 0.0, 0.25, 0.25], atol=1e-4)


@pytest.mark.parametrize("length", [64, 512])
def test_every_stretch_has_the_shares(length):
    game, _, _ = game_pattern((1.0,) * 40)
    for start in range(0, PATTERN_LENGTH, length):
        counts = np.bincount(game[start : start + length].astype(np.int64), minlength=40)
        assert np.abs(counts - length / 40).max() < 2.5


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_is_a_permutation(size, key):
    assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


@settings(deadline=None)
@given(st.integers(2**20, 2**52), st.integers(0, 2**64 - 1), st.integers(0, 2**20 - 65))
def test_large_sizes(size, key, start):
    """Distinct, inside, and the same alone as in company."""
    position = np.arange(start, start + 64, dtype=np.uint64)
    sizes, keys = np.full(64, size, np.uint64), np.full(64, key, np.uint64)
    found = permute(position, sizes, keys)
    assert len(set(found.tolist())) == 64 and (found < size).all()
    assert permute(position[5:6], sizes[:1], keys[:1])[0] == found[5]
