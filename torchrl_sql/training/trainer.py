"""The update step and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.objectives import LossModule, TargetNetUpdater

_NUM_CHECKED_STEPS = 3
"""First gradient steps after a start in which the loss checks rewards and network outputs for non-finite values."""


class Replay(Protocol):
    """What the trainer samples from: any TorchRL replay buffer."""

    def sample(self) -> TensorDictBase:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """What was delivered so far."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after :meth:`state_dict`."""

    def shutdown(self) -> None:
        """Ends reader threads."""


class Trainer:
    """Takes gradient steps on batches from a replay buffer; everything it is made of is given.

    Args:
        loss (LossModule): its ``loss_*`` entries sum to the objective, its other entries are metrics.
        replay (Replay): source of batches.
        optimizer (Optimizer): over the loss's parameters.

    Keyword Args:
        scheduler (LRScheduler, optional): stepped after each gradient step.
        target_updater (TargetNetUpdater, optional): stepped every ``target_update_interval`` gradient steps. For a hard
            copy each time, ``HardUpdate(loss, value_network_update_interval=0)``.
        target_update_interval (int): in gradient steps.
        max_grad_norm (float, optional): gradients are scaled down to this global L2 norm.
        device (torch.device or str): where batches go; the loss must be there already.
        precision ("fp32" or "bf16"): ``"bf16"`` runs the loss under autocast.
        compile (bool): compile the loss, forward and backward, as one graph.

    Attributes:
        step (int): gradient steps taken.
    """

    def __init__(
        self,
        loss: LossModule,
        replay: Replay,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        target_updater: TargetNetUpdater | None = None,
        target_update_interval: int = 1,
        max_grad_norm: float | None = None,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        compile: bool = False,
    ):
        self.loss = loss
        self.replay = replay
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.target_updater = target_updater
        self.target_update_interval = target_update_interval
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.device = torch.device(device)
        self.precision = precision
        self.step = 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._compiled_loss = torch.compile(loss, fullgraph=True) if compile else loss
        self._num_checks_left = _NUM_CHECKED_STEPS if hasattr(loss, "check_finite") else 0

    def update(self, batch: TensorDictBase) -> TensorDict:
        """One gradient step; nothing is read back to the host.

        Args:
            batch (TensorDictBase): what the loss reads, on the trainer's device.

        Returns:
            Scalars: the loss's entries, ``objective`` (sum of its ``loss_*``) and ``grad_norm`` (before clipping).
        """
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self._compiled_loss(batch)
        objective = sum(value for key, value in losses.items() if key.startswith("loss_"))
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        if self.target_updater is not None and self.step % self.target_update_interval == 0:
            self.target_updater.step()
        metrics = losses.detach()
        metrics["objective"] = objective.detach()
        metrics["grad_norm"] = grad_norm.detach()
        return metrics

    def _check_finite(self, batch: TensorDictBase) -> None:
        """Runs the loss once more with its checks on. They synchronise and do not compile, hence not in the update."""
        self.loss.check_finite = True
        try:
            with torch.no_grad():
                self.loss(batch.clone())
        finally:
            self.loss.check_finite = False

    def train(self, num_gradient_steps: int, *, log_interval: int) -> Iterator[dict[str, float]]:
        """Takes gradient steps up to ``num_gradient_steps`` in all.

        Args:
            num_gradient_steps (int): where to stop, counted from the first start.

        Keyword Args:
            log_interval (int): gradient steps between results.

        Yields:
            After every ``log_interval``-th step and the last: the mean of each metric since the last result, with
            ``learning_rate``, ``samples_per_second`` and ``data_wait_fraction`` (share of time spent waiting for data).

        Raises:
            FloatingPointError: if the objective was not finite in the interval.
        """
        sums: TensorDict | None = None
        num_steps, num_samples, data_seconds, started = 0, 0, 0.0, time.perf_counter()
        while self.step < num_gradient_steps:
            waiting = time.perf_counter()
            batch = self.replay.sample().to(self.device, non_blocking=True)
            data_seconds += time.perf_counter() - waiting
            if self._num_checks_left:
                self._check_finite(batch)
                self._num_checks_left -= 1
            metrics = self.update(batch)
            sums = metrics if sums is None else sums + metrics
            num_steps += 1
            num_samples += batch.shape[0]
            if self.step % log_interval and self.step < num_gradient_steps:
                continue
            means = {key: value / num_steps for key, value in zip(sums.keys(), _to_host(sums), strict=True)}
            if not -float("inf") < means["objective"] < float("inf"):
                raise FloatingPointError(
                    f"the objective must be finite, but gradient steps {self.step - num_steps + 1} to {self.step} had: "
                    + ", ".join(f"{key}={value:g}" for key, value in means.items())
                )
            elapsed = time.perf_counter() - started
            yield means | {
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "samples_per_second": num_samples / elapsed,
                "data_wait_fraction": data_seconds / elapsed,
            }
            sums, num_steps, num_samples, data_seconds, started = None, 0, 0, 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the steps to come, made of tensors, numbers, strings, lists and dicts."""
        return {
            "step": self.step,
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "replay": self.replay.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues as the trainer whose :meth:`state_dict` this is would have."""
        self.step = state["step"]
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.replay.load_state_dict(state["replay"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())


def _to_host(metrics: TensorDict) -> list[float]:
    """All scalars in one transfer."""
    return torch.stack([value.float() for value in metrics.values()]).tolist()
