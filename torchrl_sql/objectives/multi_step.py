"""n-step windows whose ``done`` and ``terminated`` are those of their end, for targets that bootstrap from there."""

from __future__ import annotations

from tensordict import TensorDictBase
from torchrl.data import postprocs
from torchrl.envs import transforms


class MultiStep(postprocs.MultiStep):
    """TorchRL's post-processor of collected batches, with the flags of the window's end.

    TorchRL's (0.14.1) moves the next observation and sums the rewards, but leaves ``done``, ``terminated`` and
    ``truncated`` where the window began: all but the last window into a terminal state then bootstrap from it.

    Args:
        gamma (float): discount per step.
        n_steps (int): steps of a window; shorter at a trajectory's end and at the end of a batch.

    Reads: ``[*B, T]`` with ``("next", "reward")`` and the flags under ``"next"``.
    Writes: everything under ``"next"`` as at the window's end, but ``("next", "reward")``, the discounted sum;
    ``steps_to_next_obs`` ``[*B, T, 1]`` int64; and what TorchRL's writes besides.
    """

    def __init__(self, gamma: float, n_steps: int) -> None:
        super().__init__(gamma, n_steps)
        self.done_keys = ()  # what TorchRL does not move

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return _with_steps_as_column(super().forward(tensordict))


class MultiStepTransform(transforms.MultiStepTransform):
    """The same for :class:`torchrl.envs.transforms.MultiStepTransform`, the transform of a replay buffer's writes.

    Args:
        n_steps (int): steps of a window; shorter at a trajectory's end.
        gamma (float): discount per step.
        **keys: ``reward_keys``, ``done_key`` and ``mask_key`` of TorchRL's.
    """

    def __init__(self, n_steps: int, gamma: float, **keys) -> None:
        super().__init__(n_steps, gamma, done_keys=[], **keys)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        out = super()._inv_call(tensordict)
        return None if out is None else _with_steps_as_column(out)


def _with_steps_as_column(tensordict: TensorDictBase) -> TensorDictBase:
    return tensordict.set("steps_to_next_obs", tensordict["steps_to_next_obs"].unsqueeze(-1))
