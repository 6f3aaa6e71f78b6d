"""LAMB (You et al. 2020, arXiv:1904.00962), the optimizer of large batches.

timm has it too, and brings torchvision along; pytorch-optimizer's limits the norms of weights to 10. Neither can leave
out a step on the device when a gradient is not finite, which :class:`~torchrl_sql.training.Trainer` relies on. Steps
are timm's with ``always_adapt=True, max_grad_norm=None`` (compared with timm 1.0.31: equal to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Lamb(Optimizer):
    """Adam whose step in each tensor is as long as ``lr`` times the tensor's own norm.

    As optax's: bias-corrected moments, decoupled weight decay inside the trust ratio, a ratio of 1 where either norm is
    0, no limits on it, and no clipping of gradients here.

    Honours ``found_inf`` as torch's fused optimizers do: where that attribute is a tensor of 1, parameters and state
    stay as they are, without reading it back.

    Args:
        params (iterable): parameters or groups of them.

    Keyword Args:
        lr (float): learning rate.
        betas (tuple of float): decay of the moments.
        eps (float): added to the root of the second moment.
        weight_decay (float): decoupled.
    """

    _step_supports_amp_scaling = True  # torch's word for an optimizer that honours found_inf

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; ``closure``, if given, computes the gradients and its value is returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return value

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["num_updates"] = parameter.new_zeros(())  # not "step": torch would leave that on the CPU
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        num_updates, mean, square = state["num_updates"], state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        # 1, or 0 for a step that is left out: every change below is multiplied by it.
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones_like(num_updates) if found_inf is None else (found_inf == 0).to(parameter.dtype)
        gradient = torch.where(taken > 0, gradient, 0)
        num_updates += taken
        mean.lerp_(gradient, taken * (1 - beta1))
        square.lerp_(gradient.square(), taken * (1 - beta2))
        count = num_updates.clamp_min(1)
        update = mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + group["eps"])
        update += group["weight_decay"] * parameter
        parameter_norm, update_norm = parameter.norm(), update.norm()
        ratio = torch.where((parameter_norm > 0) & (update_norm > 0), parameter_norm / update_norm, 1.0)
        parameter -= taken * group["lr"] * ratio * update
