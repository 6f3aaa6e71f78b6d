"""A training run in its folder: configuration, logs, checkpoints, resumption."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchrl.record.loggers import CSVLogger, Logger, TensorboardLogger, WandbLogger
from tqdm import tqdm

from torchrl_sql.config import ConfigError, RunConfig, run_config_from_yaml
from torchrl_sql.data import FrameStore
from torchrl_sql.data.run import write_atomically
from torchrl_sql.training.build import build_trainer, resolve_device
from torchrl_sql.training.checkpoint import checkpoint_path, load_checkpoint, load_latest_checkpoint, save_checkpoint
from torchrl_sql.training.distributed import Ranks, process_group
from torchrl_sql.training.interruption import Interrupted, StopSignals

logger = logging.getLogger(__name__)

_CONTINUE, _STOP, _REQUEUE = range(3)
"""What a rank asks for after a step; the greatest number of all ranks counts."""

_RESULT_SECTIONS = ("model", "objective", "optim")
_RESULT_TRAINER_KEYS = ("num_gradient_steps", "target_update_interval_gradient_steps", "precision")


def train(config: RunConfig, *, stop: StopSignals | None = None) -> Path:
    """Trains a run, or continues it from its newest checkpoint; a finished run returns at once.

    To be called by every process of a run: alone, or by each that torchrun or a launcher started (see
    :func:`~torchrl_sql.training.distributed.process_group`). The folder ``config.run_dir`` holds ``config.yaml``,
    ``checkpoints/`` and ``logs/``. A run that is interrupted and continued takes the same gradient steps as one that
    ran through.

    Args:
        config (RunConfig): the run.

    Keyword Args:
        stop (StopSignals, optional): installed already; default: installed here, for the time of the call.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if the folder holds a run with other settings.
        Interrupted: on every rank, if any received a signal of :class:`StopSignals`; everything is saved.
    """
    signals = StopSignals() if stop is None else nullcontext(stop)
    with signals as flags, process_group(resolve_device(config.trainer.device)) as ranks:
        return _train(config, ranks, flags)


def _train(config: RunConfig, ranks: Ranks, signals: StopSignals) -> Path:
    folder = Path(config.run_dir)
    num_steps = config.trainer.num_gradient_steps
    fingerprint = FrameStore.open(config.data.store).fingerprint(config.games)
    found = _load_latest(folder / "checkpoints", ranks)
    if found is not None:
        path, content = found
        _check_same_run(config, run_config_from_yaml(content["config"], source=f"the configuration in {path}"), folder)
        if content["data_fingerprint"] != fingerprint:
            raise ConfigError(
                f"{folder} was trained on other data than {config.data.store} holds now; choose another run_dir"
            )
        if content["step"] >= num_steps:
            logger.info("%s is trained already (%d gradient steps)", folder, content["step"])
            return folder
    trainer = build_trainer(config, ranks)
    if found is not None:
        trainer.load_state_dict(content["trainer"])
        logger.info("continuing %s at gradient step %d", folder, trainer.step)
        del found, content
    loggers: list[Logger] = []
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", config.to_yaml())
        write_atomically(folder / "versions.json", json.dumps(software_versions(), indent=1) + "\n")
        _trim_scalars(folder / "logs", last_step=trainer.step)
        loggers = _make_loggers(config, folder)

    def save() -> None:
        state = trainer.state_dict()
        if not ranks.is_main:
            return
        content = {
            "step": trainer.step,
            "config": config.to_yaml(),
            "games": list(config.games),
            "data_fingerprint": fingerprint,
            "versions": software_versions(),
            "trainer": state,
        }
        save_checkpoint(folder / "checkpoints", trainer.step, content, num_kept=config.trainer.num_checkpoints_kept)

    agreement = ranks.agreement()
    request = _CONTINUE

    def after_step() -> bool:
        nonlocal request
        request = agreement(_REQUEUE if signals.requeue else _STOP if signals.stop else _CONTINUE)
        stopping = request != _CONTINUE
        due = trainer.step % config.trainer.checkpoint_interval_gradient_steps == 0
        if due or stopping or trainer.step >= num_steps:
            save()
        return stopping

    bar = tqdm(
        total=num_steps,
        initial=trainer.step,
        desc=f"train {config.objective.name}",
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        disable=not ranks.is_main,
    )
    try:
        with bar:
            log_interval = config.trainer.log_interval_gradient_steps
            for metrics in trainer.train(num_steps, log_interval=log_interval, stop=after_step):
                for run_logger in loggers:
                    for name, value in metrics.items():
                        run_logger.log_scalar(f"train/{name}", value, step=trainer.step)
                bar.set_postfix_str(f"objective {metrics['objective']:.3f}", refresh=False)
                bar.update(trainer.step - bar.n)
        agreement.finish()
        ranks.maximum(0)  # nobody leaves before rank 0 has saved
    finally:
        trainer.replay.shutdown()
        for run_logger in loggers:
            if isinstance(run_logger, TensorboardLogger):
                run_logger.experiment.close()
    if trainer.step < num_steps:
        done = f"stopped at gradient step {trainer.step} of {num_steps}"
        raise Interrupted(f"{done}; the same command continues", requeue=request == _REQUEUE)
    return folder


def _load_latest(folder: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest usable checkpoint, the same on each rank: rank 0 chooses, each reads it."""
    if ranks.is_main:
        found = load_latest_checkpoint(folder, warn=logger.warning)
        ranks.broadcast(-1 if found is None else found[1]["step"])
        return found
    step = ranks.broadcast(0)
    if step < 0:
        return None
    path = checkpoint_path(folder, step)
    return path, load_checkpoint(path)


def software_versions() -> dict[str, str]:
    """The machine, and versions of what computes the results."""
    names = ("torchrl_sql", "torch", "torchrl", "tensordict", "ale-py", "numpy", "tensorstore")
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return machine | {"python": platform.python_version()} | {name: version(name) for name in names}


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The logged metrics of a run: name -> ``[(gradient step, value), ...]``."""
    folder = run_dir / "logs" / "csv" / "scalars" / "train"
    return {
        path.stem: [(int(step), float(value)) for step, value in _rows(path)] for path in sorted(folder.glob("*.csv"))
    }


def _rows(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield line.split(",")


def _trim_scalars(logs: Path, *, last_step: int) -> None:
    """Drops what was logged after the checkpoint that a run continues from: it will be logged again."""
    for path in logs.glob("csv/scalars/**/*.csv"):
        kept = [row for row in _rows(path) if len(row) == 2 and int(row[0]) <= last_step]
        write_atomically(path, "".join(f"{step},{value}\n" for step, value in kept))


def _make_loggers(config: RunConfig, folder: Path) -> list[Logger]:
    makers: Mapping[str, Any] = {
        "csv": lambda: CSVLogger("csv", log_dir=str(folder / "logs")),
        "tensorboard": lambda: TensorboardLogger("tensorboard", log_dir=str(folder / "logs")),
        "wandb": lambda: WandbLogger(exp_name=config.name, save_dir=str(folder / "logs")),
    }
    return [makers[name]() for name in config.trainer.loggers]


def _check_same_run(new: RunConfig, old: RunConfig, folder: Path) -> None:
    """Refuses to continue a run whose results would be a mixture of two configurations."""

    def relevant(config: RunConfig) -> dict[str, Any]:
        values = asdict(config)
        flat = {"seed": config.seed, "data.games": list(config.games)}
        flat |= {f"{section}.{key}": value for section in _RESULT_SECTIONS for key, value in values[section].items()}
        flat |= {f"data.{key}": values["data"][key] for key in ("mixture", "batch_size", "n_steps")}
        flat |= {f"trainer.{key}": values["trainer"][key] for key in _RESULT_TRAINER_KEYS}
        return flat

    before, now = relevant(old), relevant(new)
    changed = [f"{key}: {before[key]} there, {now[key]} now" for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another run_dir or delete it"
        )
