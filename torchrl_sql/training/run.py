"""A training run in its folder: configuration, logs, checkpoints, resumption."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from torchrl_sql.config import ConfigError, RunConfig, check_ranks, run_config_from_yaml
from torchrl_sql.data import FrameStore
from torchrl_sql.files import write_text
from torchrl_sql.provenance import software_versions
from torchrl_sql.training.build import build_trainer, resolve_device
from torchrl_sql.training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_latest_checkpoint,
    write_content,
)
from torchrl_sql.training.logs import RunLog
from torchrl_sql.training.policy import POLICY_FILE, export_policy
from torchrl_sql.training.ranks import Ranks, process_group
from torchrl_sql.training.signals import Interrupted, StopSignals
from torchrl_sql.training.stall import StallWatch
from torchrl_sql.training.trainer import NonFiniteError, Trainer
from torchrl_sql.training.writer import CheckpointWriter, HostCopies

logger = logging.getLogger(__name__)

_CONTINUE, _STOP, _REQUEUE = range(3)
"""What a rank asks for after a step; the greatest number of all ranks counts."""

_RESULT_SECTIONS = ("data", "model", "objective", "optim")
_OTHER_DATA_KEYS = ("store", "games", "prefetch")
"""Not compared as they are: what the store holds has its fingerprint, and games their resolved names."""

_RESULT_TRAINER_KEYS = ("num_gradient_steps", "target_update_interval_gradient_steps", "precision")


def train(config: RunConfig, *, stop: StopSignals | None = None) -> Path:
    """Trains a run, or continues it from its newest checkpoint; a finished run returns at once.

    To be called by every process of a run: alone, or by each that torchrun or a launcher started (see
    :func:`~torchrl_sql.training.ranks.process_group`). The folder ``config.run_dir`` holds ``config.yaml``,
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
    check_ranks(config, ranks.world_size)
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
            if ranks.is_main:
                _export_once(path, folder)
                logger.info("%s is trained already (%d gradient steps)", folder, content["step"])
            return folder
    trainer = build_trainer(config, ranks)
    if found is not None:
        trainer.load_state_dict(content["trainer"])
        if ranks.is_main:
            logger.info("continuing %s at gradient step %d", folder, trainer.step)
        del found, content
    versions = software_versions()
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", config.to_yaml())
        write_text(folder / "versions.json", json.dumps(versions, indent=1) + "\n")

    about = {
        "config": config.to_yaml(),
        "games": list(config.games),
        "data_fingerprint": fingerprint,
        "versions": versions,
    }

    def state() -> dict[str, Any]:
        return {"step": trainer.step, **about, "trainer": trainer.state_dict()}

    with ExitStack() as stack:
        stack.callback(trainer.replay.shutdown)
        main = stack.enter_context(_MainRank(config, folder, first_step=trainer.step)) if ranks.is_main else None
        watch = stack.enter_context(StallWatch(config.trainer.stall_warning_seconds))
        agreement = ranks.agreement()
        request = _CONTINUE

        def after_step() -> bool:
            nonlocal request
            watch.beat()
            request = agreement(_REQUEUE if signals.requeue else _STOP if signals.stop else _CONTINUE)
            due = trainer.step % config.trainer.checkpoint_interval_gradient_steps == 0
            if due or request != _CONTINUE or trainer.step >= num_steps:
                trainer.check_gradients()  # what is saved must be worth to be continued
                content = state()
                if main is not None:
                    main.writer.save(trainer.step, content)
            elif main is not None:
                main.writer.check()
            return request != _CONTINUE

        try:
            log_interval = config.trainer.log_interval_gradient_steps
            for metrics in trainer.train(num_steps, log_interval=log_interval, stop=after_step):
                if main is not None:
                    main.log.result(trainer.step, metrics)
        except NonFiniteError as error:
            trainer.rewind(error.step - 1)
            where = _save_for_inspection(folder / "nonfinite", state(), trainer, ranks)
            raise NonFiniteError(f"{error}. {where}", step=error.step) from error
        agreement.finish()
        problem = None if main is None else main.finish(trainer.step)
        if ranks.maximum(int(problem is not None)):  # also: nobody leaves before rank 0 has saved
            raise problem or RuntimeError("rank 0 could not write the last checkpoint")
    if trainer.step < num_steps:
        done = f"stopped at gradient step {trainer.step} of {num_steps}"
        raise Interrupted(f"{done}; the same command continues", requeue=request == _REQUEUE)
    return folder


class _MainRank:
    """What only rank 0 has: the log and the writer of checkpoints."""

    def __init__(self, config: RunConfig, folder: Path, *, first_step: int) -> None:
        trainer = config.trainer
        self.config = config
        self.folder = folder
        self.log = RunLog(
            folder / "logs",
            trainer.loggers,
            run_name=config.name,
            first_step=first_step,
            num_steps=trainer.num_gradient_steps,
        )
        self.writer = CheckpointWriter(
            folder / "checkpoints",
            num_kept=trainer.num_checkpoints_kept,
            milestone_interval=trainer.milestone_interval_gradient_steps,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()
        self.log.close()

    def finish(self, step: int) -> Exception | None:
        """Waits for the last checkpoint, exports a trained policy, says what was done; returns what went wrong."""
        try:
            self.writer.finish(step)
            if step >= self.config.trainer.num_gradient_steps:
                _export_once(checkpoint_path(self.writer.folder, step), self.folder)
        except (OSError, ValueError) as error:
            return error
        summary = self.log.summary(
            step=step,
            batch_size=self.config.data.batch_size,
            num_checkpoints=self.writer.num_written,
            stall_seconds=self.writer.stall_seconds,
            run_dir=self.folder,
        )
        logger.info("%s", summary)
        return None


def _export_once(checkpoint: Path, folder: Path) -> None:
    """Writes ``policy.safetensors`` of a trained run unless it is there."""
    path = folder / POLICY_FILE
    if not path.is_file():
        export_policy(checkpoint, path)


def _save_for_inspection(folder: Path, state: dict[str, Any], trainer: Trainer, ranks: Ranks) -> str:
    """Writes the state before the next gradient step and each rank's batch for it; says where and how to read them."""
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        write_content(folder / "state.pt", HostCopies().copy(state))
    batch = {"step": trainer.step + 1, "batch": trainer.replay.sample().to_dict()}
    write_content(folder / f"batch_rank{ranks.rank}.pt", batch)
    ranks.maximum(0)
    return (
        f"{folder} holds state.pt, a checkpoint of the state before it, and batch_rank*.pt, its batch on each rank; "
        "torchrl_sql.training.checkpoint.load_checkpoint reads them"
    )


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


def _check_same_run(new: RunConfig, old: RunConfig, folder: Path) -> None:
    """Refuses to continue a run whose results would be a mixture of two configurations."""

    def relevant(config: RunConfig) -> dict[str, Any]:
        values = asdict(config)
        flat = {f"{section}.{key}": value for section in _RESULT_SECTIONS for key, value in values[section].items()}
        for key in _OTHER_DATA_KEYS:
            del flat[f"data.{key}"]
        flat |= {"seed": config.seed, "data.games": list(config.games)}
        flat |= {f"trainer.{key}": values["trainer"][key] for key in _RESULT_TRAINER_KEYS}
        return flat

    before, now = relevant(old), relevant(new)
    changed = [f"{key}: {before[key]} there, {now[key]} now" for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another run_dir or delete it"
        )
