from __future__ import annotations

import pytest
import torch

from torchrl_sql.training.lamb import Lamb


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def test_the_first_step_by_hand():
    """Bias-corrected moments give the gradient's signs; the step is as long as lr times the norm, 5 here."""
    p = parameter(3.0, 4.0)
    p.grad = torch.tensor([0.5, -0.25])
    Lamb([p], lr=0.1, eps=0.0).step()
    length = 0.1 * 5 / 2**0.5
    torch.testing.assert_close(p.detach(), torch.tensor([3 - length, 4 + length]))


def test_two_steps_by_hand():
    p = parameter(2.0)
    optimizer = Lamb([p], lr=0.5, betas=(0.5, 0.75), eps=0.0, weight_decay=0.25)
    p.grad = torch.tensor([1.0])
    optimizer.step()  # the only number moves by lr times itself: 2 - 0.5 * 2
    torch.testing.assert_close(p.detach(), torch.tensor([1.0]))
    p.grad = torch.tensor([-3.0])
    optimizer.step()
    # m = 0.5 * 0.5 - 0.5 * 3 = -1.25, corrected -5/3; with decay 0.25 still negative: 1 + 0.5 * 1
    torch.testing.assert_close(p.detach(), torch.tensor([1.5]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([-1.25]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.tensor([0.75 * 0.25 + 0.25 * 9]))


def test_zero_tensors_move_by_the_learning_rate():
    p = parameter(0.0, 0.0)
    p.grad = torch.tensor([2.0, -2.0])
    Lamb([p], lr=0.1, eps=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1]))


def test_continues_from_its_state_exactly():
    torch.manual_seed(0)
    gradients = torch.randn(6, 4, 3)
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    through, first = Lamb([p], weight_decay=0.01), Lamb([q], weight_decay=0.01)
    for step, gradient in enumerate(gradients):
        if step == 3:
            second = Lamb([q], lr=1.0)
            second.load_state_dict(first.state_dict())
        p.grad, q.grad = gradient.clone(), gradient.clone()
        through.step()
        (first if step < 3 else second).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("earlier_steps", [0, 2])
def test_a_step_that_is_not_finite_is_left_out_without_a_trace(earlier_steps):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3))
    optimizer = Lamb([p])
    optimizer.found_inf = torch.zeros(())
    for _ in range(earlier_steps):
        p.grad = torch.randn(3)
        optimizer.step()
    before = p.detach().clone(), {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.found_inf = torch.ones(())
    p.grad = torch.tensor([1.0, torch.nan, torch.inf])
    optimizer.step()
    assert torch.equal(p, before[0])
    for key, value in optimizer.state[p].items():
        assert torch.equal(value, before[1].get(key, torch.zeros_like(value)))
