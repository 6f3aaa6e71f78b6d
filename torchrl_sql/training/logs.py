"""What a run says while it trains: metrics in files and services, a progress line, a summary."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchrl.record.loggers import CSVLogger, Logger, TensorboardLogger, WandbLogger
from tqdm import tqdm

from torchrl_sql.files import write_text
from torchrl_sql.training.checkpoint import DISK_FULL

logger = logging.getLogger(__name__)

_LINE_INTERVAL_SECONDS = 30.0
_ROW = re.compile(r"(\d+),(-?(?:[\d.]+(?:e[+-]?\d+)?|inf|nan))\r?\n")


class RunLog:
    """Logs the metrics of a run and shows its progress.

    Metrics go to ``folder`` (and to W&B, under the run id in ``folder/wandb_id``), as functions of the gradient step.
    What was logged after ``first_step`` is dropped: a continued run logs it again. Progress is a bar on a terminal,
    else a line in the log every half minute. If the disk is full, the log says which metrics are missing.

    Args:
        folder (Path): the run's ``logs``.
        names (sequence of str): any of ``csv``, ``tensorboard``, ``wandb``.

    Keyword Args:
        run_name (str): what W&B calls it.
        first_step (int): gradient step to continue from.
        num_steps (int): gradient step to reach.
    """

    def __init__(self, folder: Path, names: list[str], *, run_name: str, first_step: int, num_steps: int) -> None:
        _trim_scalars(folder, last_step=first_step)
        self._folder = folder
        self._loggers = _open_loggers(folder, names, run_name, purge_step=first_step + 1 if first_step else None)
        self._first_step, self._num_steps, self._step = first_step, num_steps, first_step
        self._started = time.perf_counter()
        self._next_line = self._started
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=f"train {run_name}",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._num_results = 0
        self._data_wait_sum = 0.0

    def close(self) -> None:
        """Ends the progress line and flushes what is left."""
        self._bar.close()
        _flush(self._loggers, self._step)

    def result(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of an interval that ended at ``step``; adds ``eta_seconds``."""
        eta = (time.perf_counter() - self._started) / (step - self._first_step) * (self._num_steps - step)
        for run_logger in self._loggers:
            with _outlives_full_disk(run_logger, step):
                for name, value in {**metrics, "eta_seconds": eta}.items():
                    run_logger.log_scalar(f"train/{name}", value, step=step)
        self._num_results += 1
        self._data_wait_sum += metrics["data_wait_fraction"]
        text = (
            f"objective {metrics['objective']:.3f}, {metrics['samples_per_second']:,.0f} samples/s, "
            f"data wait {metrics['data_wait_fraction']:.1%}"
        )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        now = time.perf_counter()
        if self._bar.disable and (now >= self._next_line or step == self._num_steps):
            self._next_line = now + _LINE_INTERVAL_SECONDS
            logger.info("step %s of %s: %s, %s left", f"{step:,}", f"{self._num_steps:,}", text, _duration(eta))

    def scores(self, step: int, scores: Mapping[str, float], *, seconds: float) -> None:
        """Logs what an evaluation of ``step`` gave, unless it is in the log; its time is not training's."""
        _log_scores(self._folder, self._loggers, step, scores)
        self._started += seconds

    def summary(self, *, step: int, batch_size: int, num_checkpoints: int, stall_seconds: float, run_dir: Path) -> str:
        """What was done since the start, and where things are."""
        num_steps, seconds = step - self._first_step, time.perf_counter() - self._started
        wait = f"{self._data_wait_sum / self._num_results:.1%}" if self._num_results else "unknown"
        state = "trained" if step >= self._num_steps else "stopped"
        return "\n".join(
            [
                f"{state} at gradient step {step:,} of {self._num_steps:,}",
                f"  this time    {num_steps:,} gradient steps in {_duration(seconds)}",
                f"  speed        {num_steps * batch_size / seconds:,.0f} samples/s, data wait {wait}",
                f"  checkpoints  {num_checkpoints} written, training waited {stall_seconds:.2f} s for them",
                f"  folder       {run_dir}: checkpoints/, logs/, config.yaml, versions.json",
            ]
        )


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The logged metrics of a run: name -> ``[(gradient step, value), ...]``."""
    folder = run_dir / "logs" / "csv" / "scalars" / "train"
    return {path.stem: list(_rows(path)) for path in sorted(folder.glob("*.csv"))}


def log_scores(folder: Path, names: Sequence[str], *, run_name: str, step: int, scores: Mapping[str, float]) -> None:
    """Adds scores of a checkpoint to the logs of a run that nobody trains at present, unless they are there.

    Args:
        folder (Path): the run's ``logs``.
        names (sequence of str): its loggers, as of :class:`RunLog`.

    Keyword Args:
        run_name (str): what W&B calls it.
        step (int): gradient step of the checkpoint.
        scores (mapping): values by name; logged as ``evaluation/NAME``.
    """
    loggers = _open_loggers(folder, names, run_name, purge_step=None)
    _log_scores(folder, loggers, step, scores)
    _flush(loggers, step)
    for run_logger in loggers:
        if isinstance(run_logger, WandbLogger):
            run_logger.experiment.finish()  # else the next run's scores would go to this one


def _log_scores(folder: Path, loggers: Sequence[Logger], step: int, scores: Mapping[str, float]) -> None:
    """What the CSV files have, the other loggers have."""
    for name, value in scores.items():
        path = folder / "csv" / "scalars" / "evaluation" / f"{name}.csv"
        if path.is_file() and step in dict(_rows(path)):
            continue
        for run_logger in loggers:
            with _outlives_full_disk(run_logger, step):
                run_logger.log_scalar(f"evaluation/{name}", value, step=step)


def _open_loggers(folder: Path, names: Sequence[str], run_name: str, *, purge_step: int | None) -> list[Logger]:
    makers: Mapping[str, Any] = {
        "csv": lambda: CSVLogger("csv", log_dir=str(folder)),
        "tensorboard": lambda: _PurgingTensorboardLogger(folder, purge_step),
        "wandb": lambda: WandbLogger(exp_name=run_name, save_dir=str(folder), id=_wandb_id(folder)),
    }
    return [makers[name]() for name in names]


def _flush(loggers: Sequence[Logger], step: int) -> None:
    for run_logger in loggers:
        if isinstance(run_logger, TensorboardLogger):
            with _outlives_full_disk(run_logger, step):
                run_logger.experiment.close()


@contextmanager
def _outlives_full_disk(run_logger: Logger, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        logger.error(
            "DISK FULL: metrics of gradient step %d may be missing in %s (%s); training goes on",
            step,
            run_logger.exp_name,
            error,
        )


class _PurgingTensorboardLogger(TensorboardLogger):
    """Tells TensorBoard to forget what came after the step that a run continues from."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._purge_step = purge_step
        super().__init__("tensorboard", log_dir=str(folder))

    def _create_experiment(self) -> SummaryWriter:
        return SummaryWriter(log_dir=str(Path(self.log_dir) / self.exp_name), purge_step=self._purge_step)


def _wandb_id(folder: Path) -> str:
    """The W&B run of this folder, chosen at its first start."""
    path = folder / "wandb_id"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _rows(path: Path) -> Iterator[tuple[int, float]]:
    """Rows of gradient step and value, without those that a crash left unfinished."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if match := _ROW.fullmatch(line):
            yield int(match[1]), float(match[2])


def _trim_scalars(logs: Path, *, last_step: int) -> None:
    for path in logs.glob("csv/scalars/**/*.csv"):
        write_text(path, "".join(f"{step},{value}\n" for step, value in _rows(path) if step <= last_step))
