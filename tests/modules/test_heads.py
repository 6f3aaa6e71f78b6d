import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from torchrl_sql.modules import PerGameLinear

# With 8 games, 80 samples are computed by tiles and fewer by all heads.
NUM_GAMES = 8


def reference(heads: PerGameLinear, features: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
    return torch.stack([heads.weight[game] @ x + heads.bias[game] for x, game in zip(features, game_id, strict=True)])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, NUM_GAMES - 1), min_size=1, max_size=120), st.integers(0, 2**31))
def test_equals_one_product_per_sample(games, seed):
    torch.manual_seed(seed)
    heads = PerGameLinear(NUM_GAMES, 5, 3).double()
    heads.bias.data.normal_()
    features = torch.randn(len(games), 5, dtype=torch.double, requires_grad=True)
    game_id = torch.tensor(games)
    inputs = [features, heads.weight, heads.bias]
    output, expected = heads(features, game_id), reference(heads, features, game_id)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    for got, want in zip(
        torch.autograd.grad(output, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_work_does_not_grow_with_the_games():
    features, game_id = torch.randn(512, 16), torch.randint(40, (512,))
    with FlopCounterMode(display=False) as counter:
        PerGameLinear(40, 16, 3)(features, game_id)
    rows = counter.get_total_flops() // (2 * 16 * 3)
    assert 512 <= rows <= 512 + 40 * 31  # all heads would be 512 * 40


@pytest.mark.parametrize("batch_size", [20, 100])
def test_no_gradient_for_an_absent_game(batch_size):
    heads = PerGameLinear(NUM_GAMES, 5, 3)
    game_id = torch.randint(NUM_GAMES - 1, (batch_size,))  # never the last
    heads(torch.randn(batch_size, 5), game_id).square().sum().backward()
    assert not heads.weight.grad[-1].any() and not heads.bias.grad[-1].any()
    assert heads.weight.grad[game_id[0]].any()


@pytest.mark.parametrize("batch_size", [20, 100])
def test_compiles_without_graph_breaks(batch_size):
    heads = PerGameLinear(NUM_GAMES, 5, 3)
    features, game_id = torch.randn(batch_size, 5), torch.randint(NUM_GAMES, (batch_size,))
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, game_id), heads(features, game_id))


@pytest.mark.parametrize("batch_size", [20, 100])
def test_bias_is_added_in_float32_under_autocast(batch_size):
    heads = PerGameLinear(NUM_GAMES, 5, 3)
    heads.weight.data.zero_()
    heads.bias.data.fill_(1.001)  # not representable in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = heads(torch.randn(batch_size, 5), torch.zeros(batch_size, dtype=torch.long))
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.full((batch_size, 3), 1.001), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 100), st.sampled_from([-100, -NUM_GAMES - 1, -2, -1, NUM_GAMES, NUM_GAMES + 1, 100]), st.data())
def test_an_unknown_game_raises_or_reads_nothing_of_other_samples(batch_size, bad_id, data):
    heads = PerGameLinear(NUM_GAMES, 5, 3)
    game_id = torch.randint(NUM_GAMES, (batch_size,))
    features = torch.randn(batch_size, 5, requires_grad=True)
    bad = data.draw(st.integers(0, batch_size - 1))
    expected = heads(features, game_id).detach()
    game_id[bad] = bad_id
    try:
        out = heads(features, game_id)
    except (IndexError, RuntimeError):
        return
    (gradient,) = torch.autograd.grad(out[bad].sum(), features)
    others = torch.arange(batch_size) != bad
    assert not gradient[others].any()
    torch.testing.assert_close(out[others], expected[others])
