"""The last steps of an episode, as agents with a memory of a few steps see them.

A context is a mapping of four entries, ``K`` steps long: ``observation`` uint8 ``[*B, K, 84, 84]``, ``action`` int64
``[*B, K]``, ``reward`` float32 ``[*B, K, 1]`` and ``mask`` bool ``[*B, K]``. The oldest step comes first; until the
episode has ``K`` steps, the rest is padding: zeros, with ``mask`` False. Action and reward of the present step, the
last that is not padding, are not known yet: zeros too.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Transform

from torchrl_sql.games import FRAME_SHAPE, NUM_ACTIONS

Context = dict[str, Tensor]


def first_context(frame: Tensor, num_steps: int) -> Context:
    """The context at an episode's start.

    Args:
        frame (Tensor): the newest frame, uint8 ``[*B, 84, 84]``.
        num_steps (int): ``K``.
    """
    shape = (*frame.shape[:-2], num_steps)
    context = {
        "observation": frame.new_zeros(*shape, *FRAME_SHAPE),
        "action": frame.new_zeros(shape, dtype=torch.int64),
        "reward": frame.new_zeros(*shape, 1, dtype=torch.float32),
        "mask": frame.new_zeros(shape, dtype=torch.bool),
    }
    context["observation"][..., 0, :, :] = frame
    context["mask"][..., 0] = True
    return context


def next_context(context: Context, action: Tensor, reward: Tensor, frame: Tensor) -> Context:
    """The context after one more step; the given one stays as it is.

    Args:
        context (mapping): of the step before.
        action (Tensor): int64 ``[*B]``, what was done there.
        reward (Tensor): float ``[*B, 1]``, what it brought.
        frame (Tensor): uint8 ``[*B, 84, 84]``, what is seen now.
    """
    num_steps = context["mask"].shape[-1]
    place = torch.arange(num_steps, device=frame.device)
    num_known = context["mask"].sum(-1, keepdim=True)
    present = place == num_known - 1
    known = {
        **context,
        "action": torch.where(present, action.unsqueeze(-1), context["action"]),
        "reward": torch.where(present, reward, context["reward"].squeeze(-1)).unsqueeze(-1),
    }
    # A full window loses its oldest step.
    source = (place + (num_known == num_steps)).clamp_max(num_steps - 1)
    new = place == num_known.clamp_max(num_steps - 1)
    now = {"observation": frame.unsqueeze(-3), "mask": torch.ones_like(new)}
    result = {}
    for key, entry in known.items():
        trailing = (1,) * (entry.ndim - place.ndim - action.ndim)
        index = source.reshape(*source.shape, *trailing).expand(entry.shape)
        slid, at = entry.gather(action.ndim, index), new.reshape(*new.shape, *trailing)
        result[key] = torch.where(at, now.get(key, torch.zeros_like(entry)), slid)
    return result


class PolicyInputs(Transform):
    """Gives a TorchRL environment what evaluation gives its policies beside ``observation`` and ``game_id``.

    Writes ``context`` (see this module; it needs the reward, so that the transform belongs on the environment itself)
    and the random numbers ``uniform`` and ``return_uniform`` float64 ``[*B]`` in [0, 1), from torch's generator.

    Args:
        num_steps (int): ``K``.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_sql.envs import AtariEnv
        >>> env = TransformedEnv(AtariEnv("Breakout", 2), PolicyInputs(4))
        >>> env.rollout(3)["context", "observation"].shape
        torch.Size([2, 3, 4, 84, 84])
    """

    def __init__(self, num_steps: int = 4) -> None:
        super().__init__()
        self.num_steps = num_steps

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        context = first_context(tensordict_reset["observation"][..., -1, :, :], self.num_steps)
        mask = tensordict.get("_reset", None)
        if mask is not None and "context" in tensordict:
            for key, entry in context.items():
                at = mask.reshape(*mask.shape[: tensordict.ndim], *(1,) * (entry.ndim - tensordict.ndim))
                context[key] = torch.where(at, entry, tensordict["context", key])
        return self._write(tensordict_reset, context)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        context = {str(key): value for key, value in tensordict["context"].items()}
        frame = next_tensordict["observation"][..., -1, :, :]
        return self._write(
            next_tensordict, next_context(context, tensordict["action"], next_tensordict["reward"], frame)
        )

    def _write(self, tensordict: TensorDictBase, context: Context) -> TensorDictBase:
        tensordict["context"] = TensorDict(context, tensordict.batch_size)
        for key in ("uniform", "return_uniform"):
            tensordict[key] = torch.rand(tensordict.batch_size, dtype=torch.float64, device=tensordict.device)
        return tensordict

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Adds the entries that are written."""
        batch = observation_spec.shape
        shape, device = (*batch, self.num_steps), observation_spec.device
        observation_spec["context"] = Composite(
            observation=Bounded(0, 255, shape=(*shape, *FRAME_SHAPE), dtype=torch.uint8, device=device),
            action=Bounded(0, NUM_ACTIONS - 1, shape=shape, dtype=torch.int64, device=device),
            reward=Unbounded(shape=(*shape, 1), device=device),
            mask=Binary(self.num_steps, shape=shape, dtype=torch.bool, device=device),
            shape=batch,
            device=device,
        )
        for key in ("uniform", "return_uniform"):
            observation_spec[key] = Bounded(0.0, 1.0, shape=batch, dtype=torch.float64, device=device)
        return observation_spec
