from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import GameMixtureSampler
from torchrl_sql.data.sampler import _choose, _scale_bits


def fake_storage(*sizes: int) -> SimpleNamespace:
    """All that the sampler asks of a storage."""
    return SimpleNamespace(game_offsets=np.concatenate([[0], np.cumsum(sizes)]))


def shares(sampler: GameMixtureSampler, storage: SimpleNamespace, num_draws: int = 200_000) -> np.ndarray:
    """Fraction of draws that fell into each game."""
    index = sampler.indices(storage, num_draws, 0).numpy()
    return np.histogram(index, bins=storage.game_offsets)[0] / num_draws


def test_scaling_by_hand():
    bits = np.array([0, 2**63, 2**64 - 1, 2**62, 2**64 - 1], np.uint64)
    size = np.array([10, 10, 10, 4, 2**32 - 1])
    assert _scale_bits(bits, size).tolist() == [0, 5, 9, 1, 2**32 - 2]


def test_choosing_by_hand():
    bits = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert _choose(bits, np.array([1.0, 1.0])).tolist() == [0, 1, 1]
    assert _choose(bits, np.array([0.0, 0.1, 0.2, 0.0])).tolist() == [1, 2, 2]  # Never a game of weight 0.


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1))
def test_scaling_is_exact(bits, size):
    assert _scale_bits(np.array([bits], np.uint64), np.array([size]))[0] == bits * size >> 64


PINNED = [1479, 1479, 234, 1206, 733, 1351]


def test_stream_is_pinned():
    """A change here changes every run: batches of old checkpoints would not continue."""
    assert GameMixtureSampler(seed=7).indices(fake_storage(1000, 500), 6, 3).tolist() == PINNED


def test_sample_counts_steps():
    storage = fake_storage(10, 30)
    sampler = GameMixtureSampler(seed=1)
    first, info = sampler.sample(storage, 4)
    assert first.dtype == torch.int64 and first.shape == (4,) and info == {}
    assert sampler.state_dict() == {"step": 1}
    second, _ = sampler.sample(storage, 4)
    assert (first == sampler.indices(storage, 4, 0)).all() and (second == sampler.indices(storage, 4, 1)).all()


def test_save_and_load(tmp_path):
    sampler = GameMixtureSampler()
    sampler.load_state_dict({"step": 41})
    sampler.dumps(tmp_path / "sampler")
    other = GameMixtureSampler()
    other.loads(tmp_path / "sampler")
    assert other.step == 41


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("games", [1 / 3, 1 / 3, 1 / 3]),
        ("transitions", [0.1, 0.3, 0.6]),
        ([1, 0, 3], [0.25, 0, 0.75]),
        ([0, 0, 2.0], [0, 0, 1]),
    ],
)
def test_mixtures(mixture, expected):
    storage = fake_storage(100, 300, 600)
    found = shares(GameMixtureSampler(mixture=mixture, seed=5), storage)
    np.testing.assert_allclose(found, expected, atol=0.005)  # More than four standard deviations.
    assert (found[np.array(expected) == 0] == 0).all()


def test_uniform_within_a_game():
    index = GameMixtureSampler(seed=2).indices(fake_storage(50, 8), 400_000, 9).numpy()
    counts = np.bincount(index[index >= 50] - 50, minlength=8)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 24.3  # 99.9% quantile for 7 degrees of freedom.


def test_cost_does_not_grow_with_the_store():
    sampler, small, large = GameMixtureSampler(), fake_storage(*[100] * 40), fake_storage(*[50_000_000] * 40)

    def seconds(storage: SimpleNamespace) -> float:
        times = []
        for step in range(50):
            start = time.perf_counter()
            sampler.indices(storage, 512, step)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    seconds(small)
    assert seconds(large) < 3 * seconds(small)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixture": "uniform"}, "mixture must be 'games', 'transitions' or weights, got 'uniform'"),
        ({"mixture": [1, -1]}, "weights must be finite, >= 0"),
        ({"mixture": [0, 0]}, "not all 0"),
        ({"mixture": [1, float("nan")]}, "finite"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"rank": 2, "world_size": 2}, "rank must lie in 0..world_size-1, got rank 2 of world_size 2"),
        ({"world_size": 0}, "rank must lie in"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GameMixtureSampler(**kwargs)


def test_bad_calls():
    with pytest.raises(ValueError, match="positive multiple of world_size 3, got 8"):
        GameMixtureSampler(world_size=3).sample(fake_storage(5), 8)
    with pytest.raises(ValueError, match="one weight for each of the 3 games, got 2"):
        GameMixtureSampler(mixture=[1, 1]).sample(fake_storage(5, 5, 5), 8)
    with pytest.raises(ValueError, match="game 1 of the storage has no sampleable transition"):
        GameMixtureSampler().sample(fake_storage(5, 0), 8)
    with pytest.raises(TypeError, match="game_offsets, got list"):
        GameMixtureSampler().sample([1, 2], 8)
    sampler = GameMixtureSampler(mixture=[1, 0])
    assert (sampler.sample(fake_storage(5, 0), 8)[0] < 5).all()


sizes = st.lists(st.integers(1, 2**31), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes, st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.sampled_from([1, 2, 3, 4, 6]))
def test_union_of_ranks_is_the_global_batch(sizes, seed, step, world_size):
    storage = fake_storage(*sizes)
    whole = GameMixtureSampler(seed=seed).indices(storage, 12, step)
    parts = [
        GameMixtureSampler(seed=seed, rank=rank, world_size=world_size).indices(storage, 12, step)
        for rank in range(world_size)
    ]
    assert torch.cat(parts).tolist() == whole.tolist()
    assert (whole >= 0).all() and (whole < sum(sizes)).all()


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 20), st.integers(1, 20))
def test_resume_equals_uninterrupted(seed, before, after):
    storage = fake_storage(1000, 2000)
    straight, resumed = GameMixtureSampler(seed=seed), GameMixtureSampler(seed=seed)
    for _ in range(before):
        straight.sample(storage, 8)
    resumed.load_state_dict(straight.state_dict())
    for _ in range(after):
        assert straight.sample(storage, 8)[0].tolist() == resumed.sample(storage, 8)[0].tolist()


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_steps_and_seeds_differ(seed, step):
    storage = fake_storage(2**31)
    batch = GameMixtureSampler(seed=seed).indices(storage, 16, step)
    assert not set(batch.tolist()) & set(GameMixtureSampler(seed=seed).indices(storage, 16, step + 1).tolist())
    assert batch.tolist() != GameMixtureSampler(seed=seed ^ 1).indices(storage, 16, step).tolist()
