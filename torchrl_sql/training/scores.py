"""Evaluation while training: rank 0 plays the checkpoint that it has just written, the other ranks wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from torchrl_sql.config import ConfigError, RunConfig
from torchrl_sql.files import expand_path
from torchrl_sql.methods import make_method
from torchrl_sql.training.checkpoint import checkpoint_step
from torchrl_sql.training.logs import log_scores
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.signals import Interrupted, StopSignals

logger = logging.getLogger(__name__)

Evaluate = Callable[[Path, Callable[[], None]], Mapping[str, float]]
"""Plays a checkpoint, continues where it was stopped, and returns scores by name. It calls what it is given often, and
ends with what that raises; it leaves torch's random states as they were."""

_NEWS_SECONDS = 1.0
"""How often the ranks hear of one another meanwhile."""

_OVER = 2
"""Rank 0 votes so when it has done; 1 of any rank asks it to stop."""


class _StopAsked(Exception):
    """Of a rank: the evaluation is to end, and to be continued later."""


class Scores:
    """Plays checkpoints of a run as its settings say.

    Args:
        config (RunConfig): the run.
        ranks (Ranks): the processes that train it.
        signals (StopSignals): installed.
        evaluate (callable, optional): an :data:`Evaluate`; needed if the settings ask for evaluation.

    Raises:
        ConfigError: if it is needed and is not there, or the method does not act.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, signals: StopSignals, evaluate: Evaluate | None) -> None:
        self.interval = config.trainer.evaluation_interval_gradient_steps
        self._first = 0 if config.online is not None else 1
        self.ranks, self.signals = ranks, signals
        if self.interval is None:
            return
        key = f"trainer.evaluation_interval_gradient_steps={self.interval}"
        if make_method(config.method).values == "none":
            raise ConfigError(f"{key} must be null with method.name={config.method.name}, which does not act")
        if evaluate is None:
            raise ConfigError(
                f"{key} needs an evaluation: torchrl-sql train has one, train(..., evaluate=...) takes one"
            )
        self._evaluate = evaluate

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint of this gradient step is to be played: of learning online, from step 0 on."""
        return self.interval is not None and step >= self._first and step % self.interval == 0

    def of(self, checkpoint: Path, *, alive: Callable[[], None]) -> Mapping[str, float] | None:
        """Plays a checkpoint on rank 0; to be called by every rank.

        An evaluation that fails costs its scores, not the training.

        Args:
            checkpoint (Path): on disk.

        Keyword Args:
            alive (callable): called often, on each rank.

        Returns:
            Scores by name on rank 0, if it was not stopped and did not fail; else ``None``.
        """
        if not self.ranks.is_main:
            while self.ranks.maximum(int(self.signals.stop)) < _OVER:
                alive()
            return None
        heard = time.monotonic()

        def listen() -> None:
            nonlocal heard
            alive()
            if self.ranks.world_size > 1 and time.monotonic() < heard + _NEWS_SECONDS:
                return
            heard = time.monotonic()
            if self.ranks.maximum(int(self.signals.stop)):
                raise _StopAsked

        try:
            return self._evaluate(checkpoint, listen)
        except _StopAsked:
            logger.info("the evaluation of %s was stopped; it continues with the run", checkpoint)
        except torch.AcceleratorError:  # the device is of no use to training either
            raise
        except Exception as error:
            logger.error("%s could not be evaluated, training goes on: %s", checkpoint, error)
        finally:
            self.ranks.maximum(_OVER)
        return None

    def complete(self, config: RunConfig, checkpoint: Path) -> None:
        """Plays and logs a trained run's last checkpoint, as far as that was not done; to be called by every rank.

        Raises:
            Interrupted: on every rank, if any was asked to stop.
        """
        played = self.of(checkpoint, alive=lambda: None)
        if played is not None:
            logs, step = expand_path(config.run_dir) / "logs", checkpoint_step(checkpoint)
            log_scores(logs, config.trainer.loggers, run_name=config.name, step=step, scores=played)
        stop, requeue = (self.ranks.maximum(int(asked)) for asked in (self.signals.stop, self.signals.requeue))
        if stop:
            message = f"the evaluation of {checkpoint} was stopped; the same command continues"
            raise Interrupted(message, requeue=bool(requeue))
