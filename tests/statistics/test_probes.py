"""Linear probes: numbers by hand, and the same as ridge regression over features."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.statistics.probes import PENALTIES, LinearProbe, split_episodes, why_unread

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
    # Fitted are episodes 0 to 5, whose mean is 1; tested 6 and 7, which have 1 and 3: errors 0 and 2, deviations 1.
    label = np.tile([0.0, 2.0], 100)
    label[150:] = np.tile([1.0, 3.0], 25)
    assert r2(np.full((200, 5), 0.1), label) == pytest.approx(1 - (0 + 4) / (1 + 1))


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
    parts = split_episodes(episodes)

    def score(fit, test, penalty):
        x, y = features[fit] - features[fit].mean(0), label[fit] - label[fit].mean()
        scale = penalty * np.square(x).sum() / len(x)
        weights = np.linalg.solve(x.T @ x + scale * np.eye(width), x.T @ y)
        missed = label[test] - label[fit].mean() - (features[test] - features[fit].mean(0)) @ weights
        return 1 - np.square(missed).sum() / np.square(label[test] - label[test].mean()).sum()

    chosen = max(PENALTIES, key=lambda penalty: score(parts == 0, parts == 1, penalty))
    near = [score(parts < 2, parts == 2, penalty) for penalty in PENALTIES if chosen / 11 < penalty < chosen * 11]
    found = r2(features, label, episodes)
    assert min(abs(found - each) for each in near) < 1e-4  # a tie may be decided by rounding


def test_more_features_than_a_block_are_read_too():
    features = np.zeros((200, 4100))
    features[:, 4099] = NOISE[:, 0]
    assert r2(features, NOISE[:, 0]) > 0.999


def test_half_of_the_episodes_fit_a_quarter_chooses_a_quarter_tests_and_none_does_two_of_these():
    episodes = np.array([7, 3, 3, 9, 12, 5, 1, 1, 20, 30])  # in order: 1, 3, 5, 7 fit; 9, 12 choose; 20, 30 test
    assert split_episodes(episodes).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 2, 2]
    assert split_episodes(np.arange(5)).tolist() == [0, 0, 0, 1, 2]


@given(st.lists(st.integers(0, 40), min_size=4, max_size=200).filter(lambda numbers: len(set(numbers)) >= 4))
def test_no_episode_is_in_two_parts_and_no_part_is_empty(numbers):
    episodes = np.array(numbers)
    parts = split_episodes(episodes)
    assert all(len(set(parts[episodes == number])) == 1 for number in numbers)
    assert set(parts) == {0, 1, 2}


def test_what_hardly_varies_is_not_read():
    parts = np.repeat([0, 1, 2], 100)
    label = np.arange(300.0)
    assert why_unread(label, parts) is None
    label[100:196] = 4.0
    assert why_unread(label, parts) == "the same in 96% of the states that choose"
    label[100:196:48] = 5.0
    assert why_unread(label, parts) is None
    label[200:] = np.nan
    assert why_unread(label, parts) == "in none of the states that test"
    with pytest.raises(ValueError, match=r"such as can be read, but lives is the same in 100% of the states that fit"):
        LinearProbe(NOISE, EPISODES).r2({"lives": np.zeros(200)})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="episodes must be at least 4, got 3"):
        LinearProbe(NOISE[:3], np.arange(3))
    with pytest.raises(ValueError, match="features must be finite"):
        LinearProbe(np.full((200, 2), np.nan), EPISODES)
