"""A training run in its folder: configuration, logs, checkpoints, resumption."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torchrl_sql.config import ConfigError, RunConfig, check_ranks, run_config_from_yaml
from torchrl_sql.data import FrameStore
from torchrl_sql.files import KERNELS_VARIABLE, check_outside_stores, expand_path, write_text
from torchrl_sql.provenance import software_versions
from torchrl_sql.training.build import build_trainer, check_here
from torchrl_sql.training.checkpoint import (
    checkpoint_path,
    load_latest_checkpoint,
    make_room,
    write_content,
    wrong_content,
)
from torchrl_sql.training.device import describe_device, resolve_device
from torchrl_sql.training.lock import RunLock
from torchrl_sql.training.logs import RunLog
from torchrl_sql.training.online import OnlineReplay
from torchrl_sql.training.policy import POLICY_FILE, export_policy, policy_digest
from torchrl_sql.training.ranks import Ranks, process_group
from torchrl_sql.training.scores import Evaluate, Scores
from torchrl_sql.training.signals import Interrupted, StopSignals
from torchrl_sql.training.stall import StallWatch
from torchrl_sql.training.trainer import NonFiniteError, Trainer
from torchrl_sql.training.writer import CheckpointWriter, HostCopies

logger = logging.getLogger(__name__)

_CONTINUE, _STOP, _REQUEUE = range(3)
"""What a rank asks for after a step; the greatest number of all ranks counts."""

_CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def train(config: RunConfig, *, evaluate: Evaluate | None = None) -> Path:
    """Train a run, or continue it from its newest checkpoint; a finished run returns at once.

    To be called by every process of a run: alone, or by each that torchrun or a launcher started (see
    :func:`~torchrl_sql.training.ranks.process_group`). The folder ``config.run_dir`` holds ``config.yaml``,
    ``checkpoints/`` and ``logs/``. A run that is interrupted and continued takes the same gradient steps as one that
    ran through.

    Args:
        config (RunConfig): the run.

    Keyword Args:
        evaluate (callable, optional): plays checkpoints where the run's settings ask for it, see
            :func:`torchrl_sql.evaluation.agents.evaluate_checkpoint`.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if the folder holds a run with other settings.
        ValueError: if it is a store, or in one.
        RunFolderError: if another process trains in the folder.
        Interrupted: on every rank, if any received a signal of :class:`StopSignals`; everything is saved.
    """
    check_here(config)
    with StopSignals() as signals, process_group(resolve_device(config.trainer.device)) as ranks:
        check_ranks(config, ranks.world_size)
        folder = expand_path(config.run_dir)
        check_outside_stores(folder, "run_dir")
        if folder.resolve() == expand_path(config.data.store).resolve():
            raise ConfigError(f"data.store must be another folder than run_dir, got {folder} for both")
        fingerprint = _fingerprint(config)  # before there is a folder: data that is missing leaves none
        kernels = expand_path(os.environ.get(KERNELS_VARIABLE) or folder / "compiled")
        with _own(folder, ranks) as lock, _kernels_in(kernels):
            return _train(config, fingerprint, ranks, signals, lock, Scores(config, ranks, signals, evaluate))


@contextmanager
def _own(folder: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Rank 0 holds the lock of the folder; if it cannot, no rank goes on."""
    locks: list[RunLock] = []
    ranks.on_main(lambda: locks.append(RunLock(folder)))
    lock = locks[0] if locks else None
    with lock or nullcontext():
        yield lock


@contextmanager
def _kernels_in(folder: Path) -> Iterator[None]:
    """Compiled kernels go where the next start finds them, on whatever node."""
    before = {name: os.environ.pop(name, None) for name in _CACHE_VARIABLES}  # torch sets the second by the first
    os.environ[_CACHE_VARIABLES[0]] = str(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _train(
    config: RunConfig, fingerprint: str, ranks: Ranks, signals: StopSignals, lock: RunLock | None, scores: Scores
) -> Path:
    folder = expand_path(config.run_dir)
    about: dict[str, Any] = {
        "games": list(config.games),
        "data_fingerprint": fingerprint,
        "versions": software_versions() | {"device": describe_device(ranks.device)},
    }
    latest = _load_latest(folder / "checkpoints", ranks)
    if latest is not None:
        path, content = latest
        with wrong_content(path):
            before = run_config_from_yaml(content["config"], source=f"the configuration in {path}")
            same_data = content["data_fingerprint"] == about["data_fingerprint"]
            num_steps_taken = int(content["trainer"]["step"])
        if config.init.policy is not None:
            config.init.source = before.init.source
            if config.init.sha256 is None:
                source = expand_path(config.init.policy)
                there = ranks.on_main(lambda: policy_digest(source) if source.is_file() else None)
                config.init.sha256 = there or before.init.sha256  # the file that it started from may be gone
        _check_same_run(config, before, same_data=same_data)
        if num_steps_taken >= config.trainer.num_gradient_steps:
            ranks.on_main(lambda: _export_once(config, path))
            if ranks.is_main:
                logger.info("%s is trained already (%d gradient steps)", folder, num_steps_taken)
            if scores.is_due(num_steps_taken):
                scores.complete(config, path)
            return folder
    trainer = build_trainer(config, ranks, continues=latest is not None, on_tick=signals.check)
    about["config"] = config.to_yaml()
    if ranks.is_main:
        num_parameters = sum(parameter.numel() for parameter in trainer.loss.parameters())
        logger.info(
            "training %s parameters on %d x %s", f"{num_parameters:,}", ranks.world_size, about["versions"]["device"]
        )
    if latest is not None:
        with wrong_content(path):
            trainer.load_state_dict(content["trainer"])
        if ranks.is_main:
            logger.info("continuing %s at gradient step %d", folder, trainer.step)
        del latest, content
    if lock is not None:
        lock.check()
        write_text(folder / "config.yaml", config.to_yaml())
        write_text(folder / "versions.json", json.dumps(about["versions"], indent=1) + "\n")
    _Session(config, trainer, signals, about, lock, scores).run()
    return folder


def _fingerprint(config: RunConfig) -> str:
    """Of the data that is there before a run begins; empty if there is none. What a run plays follows from the rest."""
    store = config.data.store if config.online is None else config.online.offline_store
    return "" if store is None else FrameStore.open(expand_path(store)).fingerprint(config.games)


def _wish(signals: StopSignals) -> int:
    """What this rank was asked for."""
    return _REQUEUE if signals.requeue else _STOP if signals.stop else _CONTINUE


class _Session:
    """One start of a run: takes gradient steps and saves, until the run is trained or somebody asks to stop.

    Args:
        config (RunConfig): the run.
        trainer (Trainer): at the gradient step to continue from.
        signals (StopSignals): installed.
        about (dict): what a checkpoint says besides the trainer's state.
        lock (RunLock, optional): rank 0's.
        scores (Scores): plays checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        signals: StopSignals,
        about: dict[str, Any],
        lock: RunLock | None,
        scores: Scores,
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.ranks = trainer.ranks
        self.signals = signals
        self.about = about
        self.scores = scores
        self.num_steps = config.trainer.num_gradient_steps
        self.main = None if lock is None else _MainRank(config, lock, first_step=trainer.step)
        self.watch = StallWatch(config.trainer.stall_warning_seconds)
        self.agreement = self.ranks.agreement()
        self.request = _CONTINUE
        self.first_step, self.started = trainer.step + 1, time.perf_counter()
        self.unplayed = False

    def run(self) -> None:
        """Raises :class:`Interrupted` or :class:`NonFiniteError` if training did not reach its last step."""
        trainer, log_interval = self.trainer, self.config.trainer.log_interval_gradient_steps
        with ExitStack() as stack:
            stack.callback(trainer.replay.shutdown)
            if self.main is not None:
                stack.callback(self.main.close)
            stack.enter_context(self.watch)
            if self.scores.is_due(trainer.step):  # at step 0, or where the last start may have been stopped
                if not trainer.step:
                    self._save()
                if self._play():
                    raise self._interrupted()
            try:
                for metrics in trainer.train(self.num_steps, log_interval=log_interval, stop=self._after_step):
                    if self.main is not None:
                        played = trainer.replay.metrics() if isinstance(trainer.replay, OnlineReplay) else {}
                        self.main.log.result(trainer.step, metrics | played)
            except NonFiniteError as error:
                trainer.rewind(error.step - 1)
                raise NonFiniteError(f"{error}. {self._save_for_inspection()}", step=error.step) from error
            self.agreement.finish()
            self.ranks.on_main(self._finish)  # also: nobody leaves before rank 0 has saved
        if trainer.step < self.num_steps or self.unplayed:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        message = f"stopped at gradient step {self.trainer.step} of {self.num_steps}; the same command continues"
        return Interrupted(message, requeue=self.request == _REQUEUE)

    def _after_step(self) -> bool:
        """Save where it is due; returns whether to stop, the same on each rank."""
        self.watch.beat()
        step = self.trainer.step
        if step == self.first_step and self.main is not None:
            logger.info("the first gradient step took %.1f s", time.perf_counter() - self.started)
        self.request = self.agreement(_wish(self.signals))
        stop = self.request != _CONTINUE
        if stop or step % self.config.trainer.checkpoint_interval_gradient_steps == 0 or step >= self.num_steps:
            self.trainer.check_gradients()  # what is saved must be worth to be continued
            self._save()
            if self.scores.is_due(step):
                stop = self.unplayed = stop or self._play()
        elif self.main is not None:
            self.main.writer.check()
        return stop

    def _play(self) -> bool:
        """Evaluate the checkpoint of this step; returns whether to stop, the same on each rank."""
        trainer, started = self.trainer, time.perf_counter()
        folder = expand_path(self.config.run_dir) / "checkpoints"
        self.ranks.on_main(lambda: None if self.main is None else self.main.writer.wait())
        scores = self.scores.of(checkpoint_path(folder, trainer.step), alive=self.watch.beat)
        seconds = time.perf_counter() - started
        trainer.exclude(seconds)
        self.started += seconds
        if self.main is not None and scores is not None:
            self.main.log.scores(trainer.step, scores, seconds=seconds)
        self.request = self.ranks.maximum(_wish(self.signals))
        return self.request != _CONTINUE

    def _finish(self) -> None:
        assert self.main is not None
        self.main.finish(self.trainer.step)

    def _save(self) -> None:
        content = self._content()
        if self.main is not None:
            self.main.save(self.trainer.step, content)

    def _content(self) -> dict[str, Any]:
        """What a checkpoint holds; to be called by every rank."""
        return {**self.about, "trainer": self.trainer.state_dict()}

    def _save_for_inspection(self) -> str:
        """Write the present state and each rank's next batch; returns where they are and how to read them."""
        folder = expand_path(self.config.run_dir) / "nonfinite"
        content = self._content()
        problem: Exception | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.is_main:
                write_content(folder / "state.pt", HostCopies().copy(content))
            batch = {"step": self.trainer.step + 1, "batch": self.trainer.replay.sample().to_dict()}
            write_content(folder / f"batch_rank{self.ranks.rank}.pt", batch)
        except Exception as error:  # the run's own error matters more, and the other ranks wait
            problem = error
        if self.ranks.maximum(int(problem is not None)):
            return f"The state before it could not be saved in {folder}: {problem or 'another rank failed'}"
        return (
            f"{folder} holds state.pt, a checkpoint of the state before it, and batch_rank*.pt, its batch on each "
            "rank; torchrl_sql.training.checkpoint.load_checkpoint reads them"
        )


class _MainRank:
    """What only rank 0 has: the lock of the folder, the log and the writer of checkpoints."""

    def __init__(self, config: RunConfig, lock: RunLock, *, first_step: int) -> None:
        trainer = config.trainer
        self.config = config
        self.lock = lock
        self.folder = expand_path(config.run_dir)
        self.log = RunLog(
            self.folder / "logs",
            trainer.loggers,
            run_name=config.name,
            first_step=first_step,
            num_steps=trainer.num_gradient_steps,
        )
        self.writer = CheckpointWriter(
            self.folder / "checkpoints",
            num_kept=trainer.num_checkpoints_kept,
            milestone_interval=trainer.milestone_interval_gradient_steps,
        )

    def close(self) -> None:
        """Let a write that is under way end; flush the log."""
        self.writer.close()
        self.log.close()

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Begin to write a checkpoint if the folder is still this process's."""
        self.lock.check()
        self.writer.save(step, content)

    def finish(self, step: int) -> None:
        """Wait for the last checkpoint, export a trained policy, log a summary."""
        self.writer.finish(step)
        if step >= self.config.trainer.num_gradient_steps:
            _export_once(self.config, checkpoint_path(self.writer.folder, step))
        summary = self.log.summary(
            step=step,
            batch_size=self.config.data.batch_size,
            num_checkpoints=self.writer.num_written,
            stall_seconds=self.writer.stall_seconds,
            run_dir=self.folder,
        )
        logger.info("%s", summary)


def _export_once(config: RunConfig, checkpoint: Path) -> None:
    """Write ``policy.safetensors`` of a trained run unless it is there."""
    path = expand_path(config.run_dir) / POLICY_FILE
    if not path.is_file():
        export = partial(export_policy, checkpoint, path)
        make_room(export, checkpoint.parent, milestone_interval=config.trainer.milestone_interval_gradient_steps)


def _load_latest(folder: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest usable checkpoint, which rank 0 reads for all."""

    def load() -> tuple[str, dict[str, Any]] | None:
        latest = load_latest_checkpoint(folder, warn=logger.warning)
        return None if latest is None else (str(latest[0]), latest[1])

    latest = ranks.on_main(load)
    return None if latest is None else (Path(latest[0]), latest[1])


def _check_same_run(now: RunConfig, before: RunConfig, *, same_data: bool) -> None:
    """Refuse to continue a run that would become a mixture of two configurations or data sets."""

    def relevant(config: RunConfig) -> dict[str, Any]:
        places = ("init.policy", "online.offline_store")  # digests say what they hold
        settings = config.deciding_settings() | {"seed": config.seed}
        return {key: value for key, value in settings.items() if key not in places}

    old, new = relevant(before), relevant(now)
    changed = [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in old | new if old.get(key) != new.get(key)]
    if changed:
        raise ConfigError(
            f"{now.run_dir} holds a run with other settings ({'; '.join(changed)}); choose another run_dir or delete it"
        )
    if not same_data:
        store = now.data.store if now.online is None else now.online.offline_store
        raise ConfigError(f"{now.run_dir} was trained on other data than {store} holds now; choose another run_dir")
