"""Linear probes: numbers by hand, and the same as ridge regression over features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.statistics.probes import PENALTIES, LinearProbe, quarters_of, why_unread

RNG = np.random.default_rng(0)
EPISODES = np.repeat(np.arange(8), 25)
NOISE = RNG.standard_normal((200, 6))


def r2(features, label, episodes=EPISODES):
    return LinearProbe(features, episodes).r2({"label": label})["label"]


def test_a_feature_that_is_the_label_reads_it():
    label = RNG.standard_normal(200)
    assert r2(np.column_stack([NOISE, 3 * label - 7]), label) > 0.999


def test_features_that_know_nothing_of_the_label_read_nothing():
    label = RNG.standard_normal(200)
    features = np.column_stack([NOISE, label])
    shuffled = RNG.permutation(label)
    assert -0.1 < r2(features, shuffled) < 0.1


def test_of_features_that_are_all_alike_the_mean_is_what_is_read():
    # The four quarters have 0, 1, 2, 3. What others' mean misses: 2, 2/3, 2/3, 2; what the mean of all does: 1.5, 0.5,
    # 0.5, 1.5.
    label = np.repeat([0.0, 1.0, 2.0, 3.0], 50)
    assert r2(np.full((200, 5), 0.1), label) == pytest.approx(1 - (4 + 4 / 9) / (2.25 + 0.25))


def test_states_without_the_label_do_not_count():
    label = NOISE[:, 0].copy()
    features = NOISE.copy()
    label[::3] = np.nan
    features[::3] = 1e3 * RNG.standard_normal(features[::3].shape)
    assert r2(features, label) > 0.999


def test_labels_read_together_are_read_as_if_alone():
    some = np.where(np.arange(200) % 3 > 0, NOISE[:, 1], np.nan)
    labels = {"a": NOISE[:, 0], "b": some, "c": NOISE[:, 2] + RNG.standard_normal(200)}
    together = LinearProbe(NOISE, EPISODES).r2(labels)
    assert [*together] == ["a", "b", "c"]
    assert together == pytest.approx({name: r2(NOISE, label) for name, label in labels.items()})


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_it_is_ridge_regression_with_an_intercept(seed, width):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((80, width)) * rng.uniform(0.5, 2, width) + rng.normal(size=width)
    label = features @ rng.standard_normal(width) + rng.standard_normal(80)
    episodes = rng.permutation(np.repeat(np.arange(8), 10))
    quarters = quarters_of(episodes)

    def missed(fit, test, penalty):
        x, y = features[fit] - features[fit].mean(0), label[fit] - label[fit].mean()
        scale = penalty * np.square(x).sum() / len(x)
        weights = np.linalg.solve(x.T @ x + scale * np.eye(width), x.T @ y)
        return np.square(label[test] - label[fit].mean() - (features[test] - features[fit].mean(0)) @ weights).sum()

    total = 0.0
    for test, choose in ((0, 1), (1, 2), (2, 3), (3, 0)):
        fit = ~np.isin(quarters, (test, choose))
        best = min(PENALTIES, key=lambda penalty: missed(fit, quarters == choose, penalty))
        total += missed(quarters != test, quarters == test, best)
    # A tie of penalties may be decided by rounding.
    assert abs(r2(features, label, episodes) - (1 - total / (80 * label.var()))) < 1e-3


def test_more_features_than_a_block_are_read_too():
    features = np.zeros((200, 4100))
    features[:, 4099] = NOISE[:, 0]
    assert r2(features, NOISE[:, 0]) > 0.999


def test_quarters_are_of_whole_episodes_in_their_order():
    episodes = np.array([7, 3, 3, 9, 12, 5, 1, 1, 20, 30])  # in order: 1, 3; 5, 7; 9, 12; 20, 30
    assert quarters_of(episodes).tolist() == [1, 0, 0, 2, 2, 1, 0, 0, 3, 3]
    assert quarters_of(np.arange(5)).tolist() == [0, 0, 1, 2, 3]


@given(st.lists(st.integers(0, 40), min_size=4, max_size=200).filter(lambda numbers: len(set(numbers)) >= 4))
def test_no_episode_is_in_two_quarters_and_no_quarter_is_empty(numbers):
    episodes = np.array(numbers)
    quarters = quarters_of(episodes)
    assert all(len(set(quarters[episodes == number])) == 1 for number in numbers)
    assert set(quarters) == {0, 1, 2, 3}


def test_what_one_episode_alone_shows_is_not_read():
    # The label is the episode's number, and the features tell episodes apart, in no order: nothing holds for others.
    features = np.eye(8)[EPISODES] + 0.01 * RNG.standard_normal((200, 8))
    assert r2(features, RNG.permutation(8)[EPISODES].astype(float)) < 0.1


def test_what_hardly_varies_is_not_read():
    quarters = np.repeat([0, 1, 2, 3], 50)
    label = np.arange(200.0)
    assert why_unread(label, quarters) is None
    label[:192] = 4.0
    assert why_unread(label, quarters) == "the same in 96% of the states"
    label[::48] = 5.0
    assert why_unread(label, quarters) is None
    label[150:] = np.nan
    assert why_unread(label, quarters) == "in no state of some quarter of the episodes"
    with pytest.raises(ValueError, match=r"such as can be read, but lives is the same in 100% of the states"):
        LinearProbe(NOISE, EPISODES).r2({"lives": np.zeros(200)})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="episodes must be at least 4, got 3"):
        LinearProbe(NOISE[:3], np.arange(3))
    with pytest.raises(ValueError, match="features must be finite"):
        LinearProbe(np.full((200, 2), np.nan), EPISODES)
