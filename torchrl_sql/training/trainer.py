"""The update step and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Optimizer
from torchrl.objectives import LossModule, TargetNetUpdater

from torchrl_sql.arguments import check_choice, check_count, check_number
from torchrl_sql.training.data_wait import DataWait
from torchrl_sql.training.parallel import LossCall, SingleProcess
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.recorded import Recorded

_NUM_CHECKED_STEPS = 3
"""First gradient steps after a start in which batches and gradients are checked at once, not at the next result."""


class Replay(Protocol):
    """What the trainer samples from, e.g. :class:`~torchrl_sql.data.OfflineAtariReplay`."""

    def sample(self) -> TensorDictBase:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """What was delivered so far."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after :meth:`state_dict`."""

    def seek(self, step: int) -> None:
        """Make the batch of this gradient step, counted from 0, the next one; asked after a :class:`NonFiniteError`."""

    def shutdown(self) -> None:
        """End reader threads."""


class NonFiniteError(FloatingPointError):
    """The objective or its gradient was not finite.

    Attributes:
        step (int): the first such gradient step.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class _Interval:
    """What was gathered since the last result. The sums belong to the state: they outlive an interruption."""

    sums: TensorDict | None = None
    num_steps: int = 0
    num_timed_samples: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, metrics: TensorDict, num_samples: int) -> None:
        self.sums = metrics if self.sums is None else self.sums + metrics
        self.num_steps += 1
        self.num_timed_samples += num_samples


class Trainer:
    """Takes gradient steps on batches from a replay buffer; everything it is made of is given.

    Args:
        loss (LossModule): its ``loss_*`` entries sum to the objective, its other entries are metrics.
        replay (Replay): source of batches.
        optimizer (Optimizer): over the loss's parameters.

    Keyword Args:
        schedule (callable, optional): factor on the optimizer's learning rates at a gradient step, counted from 0.
        target_updater (TargetNetUpdater, optional): stepped every ``target_update_interval`` gradient steps. For a hard
            copy each time, ``HardUpdate(loss, value_network_update_interval=0)``.
        target_update_interval (int): in gradient steps.
        max_grad_norm (float, optional): gradients are scaled down to this global L2 norm.
        ranks (Ranks, optional): the processes that train together, whose device batches go to; the loss must be there
            already. Default: this process alone, on the device of the optimizer's parameters.
        call (LossCall, optional): how the loss is called; default :class:`SingleProcess`, not compiled.
        microbatch_size (int, optional): transitions of a forward and backward pass; the gradients of a batch add up
            to its mean, with priority weights to the mean of the microbatches' own weighted means. Default: the whole
            batch that the replay buffer delivers at once.
        precision ("fp32" or "bf16"): ``"bf16"`` runs the loss under autocast.
        graph (bool): record the step and replay it, see :class:`~torchrl_sql.training.recorded.Recorded`: from batch to
            weights with one process, with several in two parts around the exchange, for which ``call`` must wait. All
            batches must then have one size, and learning rates are float32 tensors.
        probe (callable, optional): further scalars of the last (micro)batch of a logging interval, called with weights
            as they are after it; it must leave random numbers alone. The loss's own come first.

    Attributes:
        step (int): gradient steps taken.

    Raises:
        TypeError, ValueError: for numbers out of range, another precision, or a loss that is not reduced to the mean
            of its batch.
    """

    def __init__(
        self,
        loss: LossModule,
        replay: Replay,
        optimizer: Optimizer,
        *,
        schedule: Callable[[int], float] | None = None,
        target_updater: TargetNetUpdater | None = None,
        target_update_interval: int = 1,
        max_grad_norm: float | None = None,
        ranks: Ranks | None = None,
        call: LossCall | None = None,
        microbatch_size: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        graph: bool = False,
        probe: Callable[[TensorDictBase], Mapping[str, Tensor]] | None = None,
    ):
        if (reduction := getattr(loss, "reduction", "mean")) != "mean":
            raise ValueError(f"the loss must have reduction='mean', for (micro)batches are averaged, got {reduction!r}")
        if kept := getattr(loss, "keep", ()):
            raise ValueError(f"the loss must give scalars, got keep={kept}: use those in a loss around it")
        check_count("target_update_interval", target_update_interval)
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, 0, above=True)
        if microbatch_size is not None:
            check_count("microbatch_size", microbatch_size)
        check_choice("precision", precision, ("fp32", "bf16"))
        self.loss = loss
        self.replay = replay
        self.optimizer = optimizer
        self.schedule = schedule
        self.target_updater = target_updater
        self.target_update_interval = target_update_interval
        self.max_grad_norm = max_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ranks = ranks or Ranks(0, 1, self._parameters[0].device)
        self.microbatch_size = microbatch_size
        self.precision = precision
        self.step = 0
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        self._call = SingleProcess(loss) if call is None else call
        self._interval = _Interval()
        self._data_wait = DataWait(self.device)
        # From the first gradient that is not finite on, steps are counted and, by fused optimizers, not taken: the
        # weights are still those before it when the host hears of it at the next result.
        self._broken = torch.zeros((), device=self.device)
        self._num_broken_steps = torch.zeros((), device=self.device)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self._graph = graph
        self._probe = probe
        if graph:
            for group, learning_rate in zip(optimizer.param_groups, self._learning_rates, strict=True):
                group["lr"] = torch.tensor(learning_rate, device=self.device)
                if "capturable" in group:
                    group["capturable"] = self.device.type == "cuda"  # torch refuses it elsewhere
        self._set_learning_rates()
        self._make_programs()

    def _make_programs(self) -> None:
        """What a step calls; what was recorded before is dropped, as it holds the tensors of that time."""
        self._take_step: Callable[..., TensorDict] = self._take_whole_step
        self._accumulate: Callable[..., TensorDict] = self._accumulate_gradients
        self._apply: Callable[..., Tensor] = self._apply_gradients
        if self._graph and self.ranks.world_size == 1:
            self._take_step = Recorded(self._take_whole_step, self.device)
        elif self._graph:
            self._accumulate = Recorded(self._accumulate_gradients, self.device)
            self._apply = Recorded(self._apply_gradients, self.device)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.ranks.device

    def update(self, batch: TensorDictBase) -> TensorDict:
        """One gradient step; nothing is read back to the host. Target updates are :meth:`train`'s.

        Args:
            batch (TensorDictBase): what the loss reads, on the trainer's device.

        Returns:
            Scalars of this rank: the loss's entries, ``objective`` (sum of its ``loss_*``) and ``grad_norm`` (of all
            ranks, before clipping).

        Raises:
            ValueError: if the batch does not divide into microbatches.
        """
        metrics = self._take_step(batch)
        self.step += 1
        self._set_learning_rates()
        return metrics

    def _take_whole_step(self, batch: TensorDictBase) -> TensorDict:
        metrics = self._accumulate(batch)
        self._call.average_gradients()
        metrics["grad_norm"] = self._apply()
        return metrics

    def _apply_gradients(self) -> Tensor:
        """Change the parameters by their gradients; returns the gradients' norm before clipping."""
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        )
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        torch.maximum(self._broken, norm.isfinite().logical_not().float(), out=self._broken)
        self._num_broken_steps += self._broken
        self.optimizer.step()
        return norm

    def _set_learning_rates(self) -> None:
        """Of the gradient step to come."""
        for group, learning_rate in zip(self.optimizer.param_groups, self._scheduled(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def _scheduled(self, step: int | None = None) -> list[float]:
        """Learning rates of a gradient step, counted from 0; by default of the one to come."""
        factor = 1.0 if self.schedule is None else self.schedule(self.step if step is None else step)
        return [learning_rate * factor for learning_rate in self._learning_rates]

    def _accumulate_gradients(self, batch: TensorDictBase) -> TensorDict:
        """Leave the gradient of the batch's mean loss in the parameters; returns the mean metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        size = self.microbatch_size or batch.shape[0]
        if batch.shape[0] % size:
            raise ValueError(f"microbatch_size must divide the rank's batch of {batch.shape[0]}, got {size}")
        microbatches = batch.split(size)
        sums: TensorDict | None = None
        for index, microbatch in enumerate(microbatches, start=1):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                losses = self._call(microbatch, exchange=index == len(microbatches))
            parts = [value for key, value in losses.items() if key.startswith("loss_")]
            if not parts:
                raise ValueError(f"the loss must have entries loss_*, got {sorted(losses.keys())}")
            objective = sum(parts)
            # An objective that is not finite breaks its gradient, if it does not do so itself, on every rank.
            factor = torch.where(objective.isfinite(), 1.0, torch.nan)
            (objective / len(microbatches)).backward(factor)
            losses["objective"] = objective
            sums = losses.detach() if sums is None else sums + losses.detach()
        assert sums is not None
        return sums / len(microbatches)

    def _check_batch(self, batch: TensorDictBase) -> None:
        """Wait for the device; the same on each rank.

        Raises:
            NonFiniteError: naming an entry that the loss reads and that has a value that is not finite.
        """
        entries = {key: batch.get(key, None) for key in self.loss.in_keys}
        broken = [key for key, value in entries.items() if value is not None and not value.isfinite().all()]
        if self.ranks.maximum(len(broken)):
            where = f"{broken[0]!r} of the batch" if broken else "the batch of another rank"
            raise NonFiniteError(f"{where} of gradient step {self.step + 1} is not finite", step=self.step + 1)

    def train(
        self, num_gradient_steps: int, *, log_interval: int, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, float]]:
        """Take gradient steps up to ``num_gradient_steps`` in all.

        Args:
            num_gradient_steps (int): where to stop, counted from the first start.

        Keyword Args:
            log_interval (int): gradient steps between results.
            stop (callable): asked after each step whether to leave early. With several ranks it must answer the same
                on each.

        Yields:
            After every ``log_interval``-th step and the last: the mean of each metric over ranks and over the steps
            since the last result, with ``learning_rate`` (of the last step), ``samples_per_second`` (of all ranks) and
            ``data_wait_fraction`` (share of time in which the device waited for data).

        Raises:
            NonFiniteError: if the objective or its gradient was not finite since the last result or target update. With
                a fused optimizer weights, moments and target are then those before that step.
        """
        check_count("log_interval", log_interval)
        self._data_wait.take_seconds()
        self._interval.num_timed_samples, self._interval.started = 0, time.perf_counter()
        num_checked = self.step + _NUM_CHECKED_STEPS
        while self.step < num_gradient_steps:
            with self._data_wait:
                batch = self.replay.sample().to(self.device, non_blocking=True)
            is_checked = self.step < num_checked
            if is_checked:
                self._check_batch(batch)
            self._interval.add(self.update(batch), batch.shape[0])
            target_updater = self.target_updater if self.step % self.target_update_interval == 0 else None
            if is_checked or target_updater is not None:
                self.check_gradients()  # a target made after a broken step would not be that of the state before it
            if target_updater is not None:
                target_updater.step()
            if self.step % log_interval == 0 or self.step >= num_gradient_steps:
                yield self._result(batch)
            if stop():
                return

    def _result(self, batch: TensorDictBase) -> dict[str, float]:
        """Means of the interval that ends here with a batch; begins the next."""
        self.check_gradients()
        means = self._probed(batch) | self._means()
        data_seconds = self._data_wait.take_seconds()
        interval, self._interval = self._interval, _Interval()
        seconds = torch.tensor([data_seconds, self._interval.started - interval.started], device=self.device)
        data_seconds, all_seconds = self.ranks.mean(seconds).tolist()
        return means | {
            "learning_rate": self._scheduled(self.step - 1)[0],
            "samples_per_second": interval.num_timed_samples * self.ranks.world_size / all_seconds,
            "data_wait_fraction": data_seconds / all_seconds,
        }

    def _probed(self, batch: TensorDictBase) -> dict[str, float]:
        """What the probe says, the mean over ranks."""
        if self._probe is None:
            return {}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            scalars = self._probe(batch[: self.microbatch_size])
        if not scalars:
            return {}
        values = self.ranks.mean(torch.stack([value.float() for value in scalars.values()]))
        return dict(zip(scalars, values.tolist(), strict=True))

    def _means(self) -> dict[str, float]:
        """Each metric's mean over ranks and over the steps of the interval; the same on each rank."""
        sums = self._interval.sums
        if sums is None:
            return {}
        values = torch.stack([value.float() for value in sums.values()]) / self._interval.num_steps
        return dict(zip(sums.keys(), self.ranks.mean(values).tolist(), strict=True))

    def check_gradients(self) -> None:
        """Wait for the device; the same on each rank.

        Raises:
            NonFiniteError: if a gradient (or objective) since the last start was not finite.
        """
        if num_broken_steps := int(self._num_broken_steps):
            step = self.step - num_broken_steps + 1
            means = ", ".join(f"{name}={value:g}" for name, value in self._means().items())
            first = self.step - self._interval.num_steps + 1
            raise NonFiniteError(
                f"the gradient of step {step} is not finite; means of gradient steps {first} to {self.step}: {means}",
                step=step,
            )

    def exclude(self, seconds: float) -> None:
        """Leave out of the present interval's speed what was spent on something else than training."""
        self._interval.started += seconds

    def rewind(self, step: int) -> None:
        """After a :class:`NonFiniteError`: count back to the gradient step before it, whose batch comes next.

        Weights and optimizer state stay as they are.
        """
        self.step = step
        self.replay.seek(step)
        self._interval = _Interval()
        self._data_wait.take_seconds()
        self._set_learning_rates()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the steps to come, made of tensors, numbers, strings, lists and dicts.

        To be called by every rank. Only the list of random states depends on the number of ranks. The schedule has no
        state: it follows from the step.
        """
        sums = self._interval.sums
        if sums is not None:
            names, mean = list(sums.keys()), self.ranks.mean(torch.stack([value.float() for value in sums.values()]))
            sums = TensorDict(dict(zip(names, mean.unbind(), strict=True)))
        cuda_rng = self.device.type == "cuda"
        return {
            "step": self.step,
            "loss": dict(self.loss.state_dict()),
            "optimizer": self._optimizer_state(),
            "replay": self.replay.state_dict(),
            "interval": None if sums is None else {"sums": sums.to_dict(), "num_steps": self._interval.num_steps},
            "rng": self.ranks.gather(torch.get_rng_state()),
            "cuda_rng": self.ranks.gather(torch.cuda.get_rng_state(self.device)) if cuda_rng else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the trainers whose :meth:`state_dict` this is would have, on each rank.

        Tensors keep the memory layout and the device that they have here. With more ranks than there were, the new ones
        keep their present random states.

        Raises:
            LookupError, TypeError, AttributeError, ValueError: if it is not the state of such a trainer.
        """
        self.step = state["step"]
        weights = self.loss.state_dict()
        for key in weights.keys() | state["loss"].keys():
            weights[key].copy_(_of_shape(state["loss"][key], weights[key].shape))
        self._load_optimizer(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        self._interval = _Interval()
        self._data_wait.take_seconds()
        if state["interval"] is not None:
            sums = {name: _of_shape(value, ()) for name, value in state["interval"]["sums"].items()}
            self._interval.sums = TensorDict(sums, device=self.device)
            self._interval.num_steps = int(state["interval"]["num_steps"])
        if self.ranks.rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][self.ranks.rank].cpu())
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"][self.ranks.rank].cpu(), self.device)

    def _optimizer_state(self) -> dict[str, Any]:
        """As an optimizer without recorded steps has it."""
        state = self.optimizer.state_dict()
        for group, learning_rate in zip(state["param_groups"], self._scheduled(), strict=True):
            group["lr"] = learning_rate
            if "capturable" in group:
                group["capturable"] = False
        return state

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments of another optimizer; this one's settings stay as they are."""
        groups = self.optimizer.state_dict()["param_groups"]
        if (there := [group["params"] for group in state["param_groups"]]) != [group["params"] for group in groups]:
            raise ValueError(f"expected the state of {len(self._parameters)} parameters, got groups of {there}")
        self.optimizer.load_state_dict({"state": self._laid_out(state["state"]), "param_groups": groups})
        self._set_learning_rates()
        self._make_programs()

    def _laid_out(self, moments: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Optimizer state in the memory layout of its parameters: fused optimizers walk raw memory."""
        keys = dict.fromkeys(key for state in moments.values() for key in state)  # in their order, as saved again

        def laid_out(value: Tensor, parameter: Tensor) -> Tensor:
            if value.ndim == 0:  # a count of steps
                return value.clone()
            return torch.empty_like(parameter).copy_(_of_shape(value, parameter.shape))

        return {
            index: {key: laid_out(moments[index][key], parameter) for key in keys}
            for index, parameter in enumerate(self._parameters)
            if index in moments
        }


def _of_shape(value: Tensor, shape: Sequence[int]) -> Tensor:
    if value.shape != torch.Size(shape):
        raise ValueError(f"expected a tensor {list(shape)}, got {list(value.shape)}")
    return value
