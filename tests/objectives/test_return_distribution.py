import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchrl_sql.objectives import c51_projection, check_support, clipped_mass, expected_value, hl_gauss_target

SUPPORT = torch.linspace(-10, 10, 51, dtype=torch.double)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double).unsqueeze(-1)


def project(probs, support, reward, discount):
    return c51_projection(
        torch.tensor(probs, dtype=torch.double),
        torch.tensor(support, dtype=torch.double),
        column(*reward),
        column(*discount),
    )


def scatter_projection(probs: torch.Tensor, support: torch.Tensor, reward: float, discount: float) -> list[float]:
    """Algorithm 1 of Bellemare et al. (2017), one atom at a time in Python's float64."""
    atoms = support.tolist()
    v_min, v_max = atoms[0], atoms[-1]
    target = [0.0] * len(atoms)
    for mass, z in zip(probs.tolist(), atoms, strict=True):
        b = (min(max(reward + discount * z, v_min), v_max) - v_min) / (v_max - v_min) * (len(atoms) - 1)
        low = min(int(b), len(atoms) - 2)
        target[low] += mass * (low + 1 - b)
        target[low + 1] += mass * (b - low)
    return target


# Numbers by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.0, 1.0, [0.1, 0.2, 0.4, 0.2, 0.1]),  # nothing moves
        (1.0, 1.0, [0.0, 0.1, 0.2, 0.4, 0.3]),  # one atom up, the last two pile up
        (-1.0, 1.0, [0.3, 0.4, 0.2, 0.1, 0.0]),
        (0.25, 1.0, [0.075, 0.175, 0.35, 0.25, 0.15]),  # a quarter of each mass moves on, but the last
        (0.0, 0.5, [0.0, 0.2, 0.6, 0.2, 0.0]),  # positions -1, -1/2, 0, 1/2, 1
        (1.5, 0.0, [0.0, 0.0, 0.0, 0.5, 0.5]),  # terminal: everything at the reward
        (9.0, 0.0, [0.0, 0.0, 0.0, 0.0, 1.0]),  # clipped
        (-9.0, 1.0, [1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_projection_by_hand(reward, discount, expected):
    probs = [[0.1, 0.2, 0.4, 0.2, 0.1]]
    got = project(probs, [-2.0, -1, 0, 1, 2], [reward], [discount])
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.double))


def test_projection_of_a_batch_on_another_support():
    got = project([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [4.0, 6, 8], [1.0, 2.0], [1.0, 0.5])
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]], dtype=torch.double))


def test_hl_gauss_by_hand():
    # Bins from -3 to -1 to 1 to 3, in standard deviations of 1.
    got = hl_gauss_target(column(0.0), torch.tensor([-2.0, 0, 2], dtype=torch.double), sigma_ratio=0.5)
    within_one, within_three = 0.6826894921370859, 0.9973002039367398
    side = (within_three - within_one) / 2
    expected = [side / within_three, within_one / within_three, side / within_three]
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.double))


def test_expected_value_by_hand():
    log_probs = torch.tensor([[0.5, 1.0], [0.25, 0.0], [0.25, 0.0]]).log()
    torch.testing.assert_close(expected_value(log_probs, torch.tensor([-4.0, 0, 4])), torch.tensor([-1.0, -4]))


# Contracts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ([1.0, 1.0, 1.0], "strictly increasing"),
        ([2.0, 1.0, 0.0], "strictly increasing"),
        ([0.0, float("inf")], "finite"),
        ([0.0, 1.0, 3.0], "evenly spaced"),
        ([0.0], "at least 2"),
        ([[0.0, 1.0]], "vector"),
    ],
)
def test_unusable_support_is_refused(support, message):
    with pytest.raises(ValueError, match=message):
        check_support(torch.tensor(support))


def test_usable_supports():
    for dtype in (torch.float32, torch.float64):
        check_support(torch.linspace(-10, 10, 51, dtype=dtype))
        check_support(torch.linspace(1000, 1001, 201, dtype=dtype))
        check_support(torch.arange(3).to(dtype))


def test_leading_dimensions():
    probs = torch.rand(2, 3, 51, dtype=torch.double).softmax(-1)
    reward, discount = torch.randn(2, 3, 1, dtype=torch.double), torch.rand(2, 3, 1, dtype=torch.double)
    flat = c51_projection(probs.flatten(0, 1), SUPPORT, reward.flatten(0, 1), discount.flatten(0, 1))
    torch.testing.assert_close(c51_projection(probs, SUPPORT, reward, discount).flatten(0, 1), flat)
    torch.testing.assert_close(hl_gauss_target(reward, SUPPORT)[1, 2], hl_gauss_target(reward[1, 2], SUPPORT))


# Properties ----------------------------------------------------------------------------------------------------------

distributions = hnp.arrays("float64", 51, elements=st.floats(-8, 8)).map(lambda x: torch.from_numpy(x).softmax(-1))
rewards = st.floats(-30, 30)
discounts = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(distributions, rewards, discounts)
def test_projection_equals_the_papers_algorithm(probs, reward, discount):
    got = c51_projection(probs, SUPPORT, column(reward)[0], column(discount)[0])
    expected = torch.tensor(scatter_projection(probs, SUPPORT, reward, discount), dtype=torch.double)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    single = c51_projection(probs.float(), SUPPORT.float(), column(reward)[0].float(), column(discount)[0].float())
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(distributions, rewards, discounts)
def test_projection_is_a_distribution(probs, reward, discount):
    got = c51_projection(probs, SUPPORT, column(reward)[0], column(discount)[0])
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0, dtype=torch.double))


@settings(max_examples=60, deadline=None)
@given(distributions, rewards, discounts)
def test_clipped_mass_is_that_of_the_atoms_that_leave_the_support(probs, reward, discount):
    moved = [reward + discount * z for z in SUPPORT.tolist()]
    expected = sum(mass for mass, z in zip(probs.tolist(), moved, strict=True) if not -10 <= z <= 10)
    got = clipped_mass(probs, SUPPORT, column(reward)[0], column(discount)[0])
    assert got.item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(distributions, st.floats(-1, 1), st.floats(0, 0.9))
def test_projection_keeps_the_mean_where_nothing_is_clipped(probs, reward, discount):
    got = c51_projection(probs, SUPPORT, column(reward)[0], column(discount)[0])
    torch.testing.assert_close((got * SUPPORT).sum(), reward + discount * (probs * SUPPORT).sum())


@settings(max_examples=40, deadline=None)
@given(distributions)
def test_projection_is_the_identity_at_gamma_one_and_reward_zero(probs):
    for dtype, atol in ((torch.double, 1e-12), (torch.float, 1e-5)):
        got = c51_projection(
            probs.to(dtype), SUPPORT.to(dtype), torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        )
        torch.testing.assert_close(got, probs.to(dtype), rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(distributions, rewards, rewards, discounts)
def test_projection_is_monotone_in_reward(probs, reward, other, discount):
    """A greater reward gives a distribution that dominates: no greater distribution function anywhere."""
    less, more = sorted((reward, other))
    low, high = c51_projection(probs, SUPPORT, column(less, more), column(discount, discount)).cumsum(-1)
    assert (high <= low + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(distributions, st.floats(-3, 3), discounts, st.floats(-100, 100), st.floats(0.1, 10))
def test_projection_shift_and_scale(probs, reward, discount, shift, scale):
    """Returns measured in another unit, and from another zero, are distributed alike."""
    base = c51_projection(probs, SUPPORT, column(reward)[0], column(discount)[0])
    scaled = c51_projection(probs, scale * SUPPORT, scale * column(reward)[0], column(discount)[0])
    torch.testing.assert_close(scaled, base, rtol=0, atol=1e-9)
    moved_reward = column(reward + shift * (1 - discount))[0]
    moved = c51_projection(probs, SUPPORT + shift, moved_reward, column(discount)[0])
    torch.testing.assert_close(moved, base, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(rewards, st.floats(0.3, 3))
def test_hl_gauss_is_a_distribution(value, sigma_ratio):
    got = hl_gauss_target(column(value), SUPPORT, sigma_ratio)
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0, dtype=torch.double))


@settings(max_examples=100, deadline=None)
@given(rewards, st.floats(0.75, 2))
def test_hl_gauss_recovers_its_mean(value, sigma_ratio):
    width, sigma = 0.4, sigma_ratio * 0.4
    mean = (hl_gauss_target(column(value), SUPPORT, sigma_ratio) * SUPPORT).sum().item()
    clipped = min(max(value, -10), 10)
    assert abs(mean - clipped) < sigma
    if abs(clipped) < 10 - 4 * sigma:
        assert abs(mean - clipped) < 1e-4 * width


@settings(max_examples=60, deadline=None)
@given(st.floats(-9, 9), st.floats(0.01, 0.75))
def test_narrow_hl_gauss_errs_by_less_than_half_a_bin(value, sigma_ratio):
    mean = (hl_gauss_target(column(value), SUPPORT, sigma_ratio) * SUPPORT).sum().item()
    assert abs(mean - value) <= (0.5 + 1e-9 if sigma_ratio < 0.5 else 0.003) * 0.4


@pytest.mark.parametrize("sigma_ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_hl_gauss_refuses_what_is_no_width(sigma_ratio):
    with pytest.raises(ValueError, match="sigma_ratio must be in"):
        hl_gauss_target(column(0.0), SUPPORT, sigma_ratio)


@settings(max_examples=60, deadline=None)
@given(rewards, rewards)
def test_hl_gauss_is_monotone(value, other):
    low, high = hl_gauss_target(column(*sorted((value, other))), SUPPORT).cumsum(-1)
    assert (high <= low + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(rewards, st.floats(-100, 100), st.floats(0.1, 10))
def test_hl_gauss_shift_and_scale(value, shift, scale):
    base = hl_gauss_target(column(value), SUPPORT)
    torch.testing.assert_close(hl_gauss_target(scale * column(value), scale * SUPPORT), base, rtol=0, atol=1e-9)
    torch.testing.assert_close(hl_gauss_target(column(value) + shift, SUPPORT + shift), base, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(rewards)
def test_hl_gauss_in_float32(value):
    got = hl_gauss_target(column(value).float(), SUPPORT.float())
    torch.testing.assert_close(got, hl_gauss_target(column(value), SUPPORT).float(), rtol=0, atol=1e-5)
