"""Trains runs in several processes; started by the fixture ``run_ranks``.

The argument lists phases (JSON): each forks its processes anew, which train its jobs one after another. Importing once
and forking saves most of the time.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any
from unittest.mock import patch

import torch

from torchrl_sql.config import compose_run_config
from torchrl_sql.evaluation.agents import evaluate_checkpoint
from torchrl_sql.training import Interrupted, Trainer, train

update = Trainer.update


def train_jobs(phase: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": phase["world_size"], "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in places.items()})
    for job in phase["jobs"]:
        signals = {step: number for step, at, number in job["signals"] if at == rank}

        def update_then_signal(self: Trainer, batch: Any, signals: dict[int, int] = signals) -> Any:
            metrics = update(self, batch)
            if self.step in signals:
                os.kill(os.getpid(), signals[self.step])
            return metrics

        os.environ["MASTER_PORT"] = str(job["port"])
        try:
            with patch.object(Trainer, "update", update_then_signal):
                train(compose_run_config(job["overrides"]), evaluate=evaluate_checkpoint)
            outcome = "trained"
        except Interrupted as interruption:
            outcome = f"{interruption}, requeue={interruption.requeue}"
        except ValueError as error:
            outcome = str(error)
        say({"job": job["name"], "rank": rank, "outcome": outcome})


def say(what: dict[str, Any]) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())  # in one piece: the processes share the pipe


def main() -> None:
    for phase in json.loads(sys.argv[1]):
        processes = []
        for rank in range(phase["world_size"]):
            if (process := os.fork()) == 0:
                try:
                    train_jobs(phase, rank)
                except Exception:
                    traceback.print_exc()
                    sys.exit(1)
                sys.exit(0)  # as a process of its own does: with all that runs at the end
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        say({"phase": phase["name"], "codes": codes})


main()
