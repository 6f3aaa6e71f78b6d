from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.evaluation.share import Shard


def test_shards_by_hand():
    assert Shard.parse("1/8") == Shard(0, 8) and Shard.parse("8/8") == Shard(7, 8)
    assert Shard.from_environment({}) == Shard(0, 1)
    assert Shard.from_environment({"RANK": "2", "WORLD_SIZE": "3"}) == Shard(2, 3)
    # Two games, three episodes, two shards: each has both games.
    assert [(g, e) for e in range(3) for g in range(2) if Shard(0, 2).has(g, e)] == [(0, 0), (1, 1), (0, 2)]


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 100))
def test_each_episode_is_in_one_shard(count, game, episode):
    assert sum(Shard(index, count).has(game, episode) for index in range(count)) == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", ""])
def test_bad_shards_are_refused(text):
    with pytest.raises(ValueError, match="a shard must be K/N"):
        Shard.parse(text)


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}]
)
def test_bad_ranks_are_refused(environment):
    with pytest.raises(ValueError, match="RANK must be a number below WORLD_SIZE"):
        Shard.from_environment(environment)
