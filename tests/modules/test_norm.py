from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from torchrl_sql.modules.norm import GroupNorm, group_norm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make(dtype, layout, mean=3.0):  # with deviation 2
    generator = torch.Generator().manual_seed(0)
    x = (mean + 2 * torch.randn(5, 12, 7, 6, generator=generator)).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(12, generator=generator) for _ in "wb")
    return [value.requires_grad_() for value in (x, weight, bias)], torch.randn(5, 12, 7, 6, generator=generator)


def test_two_groups_by_hand():
    x = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(1, 2, 1, 2)  # each channel a group: means 2, 20, deviations 1, 10
    y = group_norm(x, 2, torch.tensor([1.0, 5.0]), torch.tensor([0.0, 7.0]), 0.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0, 2.0, 12.0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float32_it_is_torchs_with_its_gradients(layout):
    ours, cotangent = make(torch.float32, layout)
    theirs, _ = make(torch.float32, layout)
    y, expected = group_norm(ours[0], 3, *ours[1:], 1e-5), F.group_norm(theirs[0], 3, *theirs[1:], 1e-5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=layout)
    y.backward(cotangent)
    expected.backward(cotangent)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mean", "corner", "greatest"), [(1000.0, None, 1e-4), (3.0, 1000.0, 1e-5)])
def test_neither_a_large_mean_nor_an_outlier_in_front_costs_much(mean, corner, greatest):
    """Sums of squares are off by 0.02 with this mean."""
    (x, *parameters), _ = make(torch.float32, torch.channels_last, mean)
    if corner is not None:
        x.data[:, :, 0, 0] = corner
    exact = F.group_norm(x.double(), 3, eps=1e-5)
    expected = F.group_norm(x.double(), 3, *(each.double() for each in parameters), 1e-5)
    error = (group_norm(x, 3, *parameters, 1e-5) - expected).abs().max()
    assert error < greatest * exact.abs().max() * parameters[0].abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_the_exact_one_rounded_once(dtype, layout):
    """Also where the mean is fifty times the deviation, which statistics of half precision would not survive."""
    ours, cotangent = make(dtype, layout, mean=100.0)
    theirs, _ = make(dtype, layout, mean=100.0)
    y = group_norm(ours[0], 3, *ours[1:], 1e-5)
    expected = F.group_norm(theirs[0].double(), 3, theirs[1].double(), theirs[2].double(), 1e-5).float()
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-4)
    y.backward(cotangent.to(dtype))
    expected.backward(cotangent.to(dtype).float())  # as it reaches ours
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.dtype == one.dtype
        torch.testing.assert_close(one.grad.float(), other.grad.float(), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_on_the_cpu_it_is_torchs_own_to_the_bit_with_its_names():
    ours, theirs = GroupNorm(3, 12), nn.GroupNorm(3, 12)
    (x, _, _), _ = make(torch.float32, torch.contiguous_format)
    assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on the way to a CPU's kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_its_relu_it_compiles_to_one_kernel(layout):
    (x, *parameters), _ = make(torch.bfloat16, layout)
    compiled = torch.compile(lambda *args: group_norm(args[0], 3, *args[1:], 1e-5).relu(), fullgraph=True)
    with torch.no_grad():
        y, (code,) = run_and_get_code(compiled, x, *parameters)
        torch.testing.assert_close(y, group_norm(x, 3, *parameters, 1e-5).relu())
    assert len(re.findall(r"^ +cpp_fused\w+\(", code, re.MULTILINE)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_it_keeps_the_dtype_under_autocast(layout):
    """Not the layout: torch's eager kernel writes contiguous maps; compiled, ours keeps it."""
    norm = GroupNorm(8, 32).to("cuda")
    x = torch.randn(16, 32, 10, 10, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = F.group_norm(x.float(), 8, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-4)
