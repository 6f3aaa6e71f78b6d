from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrl_sql.data import GameMixtureSampler, GameMixtureSamplerWithoutReplacement
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
PINNED_ORDER = [375, 1340, 933, 1238, 1019, 434]


def test_stream_is_pinned():
    """A change here changes every run: batches of old checkpoints would not continue."""
    assert GameMixtureSampler(seed=7).indices(fake_storage(1000, 500), 6, 3).tolist() == PINNED


def test_sample_counts_steps():
    storage = fake_storage(10, 30)
    sampler = GameMixtureSampler(seed=1)
    first, info = sampler.sample(storage, 4)
    assert first.dtype == torch.int64 and first.shape == (4,) and info == {}
    assert sampler.state_dict()["step"] == 1 and sampler.step == 1
    second, _ = sampler.sample(storage, 4)
    assert (first == sampler.indices(storage, 4, 0)).all() and (second == sampler.indices(storage, 4, 1)).all()


def test_save_and_load(tmp_path):
    sampler = GameMixtureSampler(mixture=[1, 3], temperature=float("inf"), seed=2**64 - 1)
    for _ in range(41):
        sampler.sample(fake_storage(10, 30), 4)
    sampler.dumps(tmp_path / "sampler")
    other = GameMixtureSampler(mixture=[1.0, 3.0], temperature=float("inf"), seed=2**64 - 1, rank=1, world_size=2)
    other.loads(tmp_path / "sampler")
    assert other.step == 41 and other.state_dict() == sampler.state_dict()


SETTINGS = {"mixture": [1.0, 3.0], "temperature": 2.0, "seed": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed must be 5 as in the state to continue from, got 6"),
        ({"mixture": [3, 1]}, r"mixture must be \[1.0, 3.0\] as in the state to continue from, got \[3.0, 1.0\]"),
        ({"mixture": "games"}, r"mixture must be \[1.0, 3.0\] .* got 'games'"),
        ({"temperature": 1.0}, "temperature must be 2.0"),
        ({"replacement": False}, "sampler must be 'GameMixtureSampler' .* got 'GameMixtureSamplerWithoutReplacement'"),
    ],
)
def test_the_state_of_other_batches_is_refused(change, message):
    storage, drawn = fake_storage(10, 30), GameMixtureSampler(**SETTINGS)
    drawn.sample(storage, 4)
    other = GameMixtureSampler(**{**SETTINGS, **change})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(drawn.state_dict())
    assert other.step == 0
    with pytest.raises(ValueError, match="must be None as in the state"):
        other.load_state_dict({"step": 3})


@pytest.mark.parametrize("replacement", [True, False])
def test_the_state_of_another_batch_size_is_refused(replacement):
    storage, drawn = fake_storage(10, 30), GameMixtureSampler(replacement=replacement)
    drawn.sample(storage, 4)
    new, used = (GameMixtureSampler(replacement=replacement) for _ in range(2))
    new.load_state_dict(drawn.state_dict())
    with pytest.raises(ValueError, match="batch_size must be 4, as in the batches before, got 8"):
        new.sample(storage, 8)
    assert new.sample(storage, 4)[0].tolist() == drawn.sample(storage, 4)[0].tolist()
    used.sample(storage, 8)
    with pytest.raises(ValueError, match="batch_size must be 4 as in the state to continue from, got 8"):
        used.load_state_dict(drawn.state_dict())


def test_without_replacement_no_batch_has_another_size():
    """With position = step * batch_size, some transitions would come twice and others never."""
    storage, sampler = fake_storage(100), GameMixtureSampler(replacement=False, mixture="transitions")
    sampler.sample(storage, 10)
    with pytest.raises(ValueError, match="batch_size must be 10, as in the batches before, got 5"):
        sampler.sample(storage, 5)
    rest = [sampler.sample(storage, 10)[0] for _ in range(9)]
    assert len(torch.cat([sampler.indices(storage, 10, 0), *rest]).unique()) == 100


@settings(deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_ran_out_after_the_batch_that_ends_an_epoch(batch_size, sizes):
    storage, sampler = fake_storage(*sizes), GameMixtureSampler(replacement=False, mixture="transitions")
    drawn, epochs = 0, 0
    while epochs < 3:
        sampler.sample(storage, batch_size)
        drawn += batch_size
        assert sampler.ran_out == (drawn // sum(sizes) > epochs)
        epochs = drawn // sum(sizes)
        after = drawn + sampler._remaining_batches * batch_size  # which TorchRL's buffers go by
        assert after // sum(sizes) > epochs >= (after - batch_size) // sum(sizes)


def test_an_epoch_counts_the_games_that_are_drawn():
    sampler = GameMixtureSampler(replacement=False, mixture=[1, 0])
    assert [sampler.sample(fake_storage(8, 90), 4) and sampler.ran_out for _ in range(4)] == [False, True] * 2


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


@pytest.mark.parametrize(
    ("mixture", "temperature", "expected"),
    [
        ("transitions", 2.0, [1 / 6, 2 / 6, 3 / 6]),
        ("transitions", float("inf"), [1 / 3, 1 / 3, 1 / 3]),
        ("games", 5.0, [1 / 3, 1 / 3, 1 / 3]),
        ([1, 0, 3], 0.5, [0.1, 0, 0.9]),
    ],
)
@pytest.mark.parametrize("sampler_class", [GameMixtureSampler, GameMixtureSamplerWithoutReplacement])
def test_temperature(sampler_class, mixture, temperature, expected):
    storage = fake_storage(100, 400, 900)
    found = shares(sampler_class(mixture=mixture, temperature=temperature, seed=5), storage)
    np.testing.assert_allclose(found, expected, atol=0.005)


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


def test_order_without_replacement_is_pinned():
    """As for the other stream."""
    sampler = GameMixtureSamplerWithoutReplacement(seed=7)
    assert sampler.indices(fake_storage(1000, 500), 6, 3).tolist() == PINNED_ORDER


def test_without_replacement_by_hand():
    """Two games in turn: of 5 transitions the first, of 2 the second."""
    storage, sampler = fake_storage(5, 2), GameMixtureSamplerWithoutReplacement(seed=1)
    draws = torch.cat([sampler.sample(storage, 4)[0] for _ in range(5)]).tolist()
    first, second = [i for i in draws if i < 5], [i for i in draws if i >= 5]
    assert len(first) in (10, 11) and sorted(first[:5]) == sorted(first[5:10]) == [0, 1, 2, 3, 4]
    assert all(sorted(second[i : i + 2]) == [5, 6] for i in range(0, len(second) - 1, 2))
    assert sampler.step == 5


def test_share_too_small_without_replacement():
    sampler = GameMixtureSamplerWithoutReplacement(mixture=[1.0, 1e-7])
    with pytest.raises(
        ValueError, match=r"game 1 of the storage has a share of 1\.0e-07 in the mixture, too small without replacement"
    ):
        sampler.sample(fake_storage(5, 5), 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixture": "uniform"}, "mixture must be 'games', 'transitions' or weights, got 'uniform'"),
        ({"mixture": [1, -1]}, "weights must be finite, >= 0"),
        ({"mixture": [0, 0]}, "not all 0"),
        ({"mixture": [1, float("nan")]}, "finite"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),  # the generator would take it for 1
        ({"seed": True}, "seed must be an integer, got True"),
        ({"rank": 0.0}, "rank must be an integer, got 0.0"),
        ({"world_size": 2.0}, "world_size must be an integer, got 2.0"),
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
    named = SimpleNamespace(**vars(fake_storage(5, 0)), games=("Pong", "Qbert"))
    for replacement in (True, False):
        with pytest.raises(
            ValueError, match=r"^Qbert has no sampleable transition: .*last_fraction.* n_steps or windows"
        ):
            GameMixtureSampler(replacement=replacement).sample(named, 8)
    with pytest.raises(ValueError, match=r"^Qbert has a share of"):
        GameMixtureSampler(replacement=False, mixture=[1.0, 1e-7]).sample(
            SimpleNamespace(**vars(fake_storage(5, 5)), games=named.games), 4
        )
    with pytest.raises(TypeError, match="game_offsets, got list"):
        GameMixtureSampler().sample([1, 2], 8)
    sampler = GameMixtureSampler(mixture=[1, 0])
    assert (sampler.sample(fake_storage(5, 0), 8)[0] < 5).all()


sizes = st.lists(st.integers(1, 2**31), min_size=1, max_size=6)


samplers = st.sampled_from([GameMixtureSampler, GameMixtureSamplerWithoutReplacement])


@settings(deadline=None)
@given(samplers, sizes, st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.sampled_from([1, 2, 3, 4, 6]))
def test_union_of_ranks_is_the_global_batch(sampler_class, sizes, seed, step, world_size):
    storage = fake_storage(*sizes)
    whole = sampler_class(seed=seed).indices(storage, 12, step)
    parts = [
        sampler_class(seed=seed, rank=rank, world_size=world_size).indices(storage, 12, step)
        for rank in range(world_size)
    ]
    assert torch.cat(parts).tolist() == whole.tolist()
    assert (whole >= 0).all() and (whole < sum(sizes)).all()


@settings(deadline=None)
@given(samplers, st.integers(0, 2**64 - 1), st.integers(0, 20), st.integers(1, 20))
def test_resume_equals_uninterrupted(sampler_class, seed, before, after):
    storage = fake_storage(1000, 2000)
    straight, resumed = sampler_class(seed=seed), sampler_class(seed=seed)
    for _ in range(before):
        straight.sample(storage, 8)
    resumed.load_state_dict(straight.state_dict())
    for _ in range(after):
        assert straight.sample(storage, 8)[0].tolist() == resumed.sample(storage, 8)[0].tolist()


@settings(deadline=None)
@given(samplers, st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_steps_and_seeds_differ(sampler_class, seed, step):
    storage = fake_storage(2**31)
    batch = sampler_class(seed=seed).indices(storage, 16, step)
    assert not set(batch.tolist()) & set(sampler_class(seed=seed).indices(storage, 16, step + 1).tolist())
    assert batch.tolist() != sampler_class(seed=seed ^ 1).indices(storage, 16, step).tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.0, 10.0)), min_size=1, max_size=5),
    st.sampled_from(["games", "transitions", "weights"]),
    st.sampled_from([0.5, 1.0, 3.0, float("inf")]),
    st.integers(0, 2**64 - 1),
)
def test_frequencies_are_those_of_the_mixture(games, mixture, temperature, seed):
    """Within six standard deviations, for any sizes, weights and temperature."""
    sizes, weights = (np.array(column, np.float64) for column in zip(*games, strict=True))
    assume(weights.max() > 0.01)
    raw = {"games": np.ones(len(sizes)), "transitions": sizes, "weights": weights}[mixture]
    scaled = np.array([(w / raw.max()) ** (1 / temperature) if w > 0 else 0.0 for w in raw])
    expected = scaled / scaled.sum()
    sampler = GameMixtureSampler(
        mixture=weights.tolist() if mixture == "weights" else mixture, temperature=temperature, seed=seed
    )
    num_draws = 20_000
    found = shares(sampler, fake_storage(*sizes.astype(int)), num_draws)
    assert (np.abs(found - expected) <= 6 * np.sqrt(expected * (1 - expected) / num_draws) + 2 / num_draws).all()
    assert not found[raw == 0].any()


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from(["games", "transitions", "weights"]),
    st.integers(0, 2**64 - 1),
    st.integers(1, 50),
    st.integers(1, 12),
)
def test_every_transition_once_before_any_comes_again(sizes, mixture, seed, num_steps, batch_size):
    """After any number of draws, the counts within a game differ by one at most."""
    storage = fake_storage(*sizes)
    weights = [1.0 + game for game in range(len(sizes))] if mixture == "weights" else mixture
    sampler = GameMixtureSamplerWithoutReplacement(mixture=weights, seed=seed)
    index = torch.cat([sampler.indices(storage, batch_size, step) for step in range(num_steps)])
    counts = np.bincount(index.numpy(), minlength=sum(sizes))
    for first, stop in zip(storage.game_offsets[:-1], storage.game_offsets[1:], strict=True):
        assert np.ptp(counts[first:stop]) <= 1
    if mixture == "transitions":
        assert np.ptp(counts) <= 1
