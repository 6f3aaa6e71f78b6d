from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.evaluation.protocol import Protocol, Share


def test_shares_by_hand():
    assert Share.parse("1/8") == Share(0, 8) and Share.parse("8/8") == Share(7, 8)
    assert Share.from_environment({}) == Share(0, 1)
    assert Share.from_environment({"RANK": "2", "WORLD_SIZE": "3"}) == Share(2, 3)
    # Two games, three episodes, two shares: each has both games.
    assert [(g, e) for e in range(3) for g in range(2) if Share(0, 2).has(g, e)] == [(0, 0), (1, 1), (0, 2)]


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 100))
def test_each_episode_is_in_one_share(count, game, episode):
    assert sum(Share(index, count).has(game, episode) for index in range(count)) == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", ""])
def test_bad_shares_are_refused(text):
    with pytest.raises(ValueError, match="a share must be K/N"):
        Share.parse(text)


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}]
)
def test_bad_ranks_are_refused(environment):
    with pytest.raises(ValueError, match="RANK must be a number below WORLD_SIZE"):
        Share.from_environment(environment)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_episodes": 0}, r"num_episodes must be in \[1, 1,000,000\], got 0"),
        ({"num_episodes": 10**23}, "num_episodes must be in .*, got 1000"),
        ({"seed": -1}, r"seed must be in \[0, 9,223,372,036,854,775,807\], got -1"),
        ({"seed": 2**63}, "seed must be in .*, got 9223372036854775808"),
        ({"epsilon": 2}, r"epsilon must be in \[0, 1\], got 2"),
    ],
)
def test_protocols_that_cannot_be_played_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"num_episodes": 1} | setting)


@pytest.mark.parametrize("name", ["num_episodes", "seed"])
def test_parts_of_episodes_and_seeds_are_refused(name):
    with pytest.raises(TypeError, match=rf"{name} must be an integer, got 1\.5"):
        Protocol(**{"num_episodes": 1} | {name: 1.5})
