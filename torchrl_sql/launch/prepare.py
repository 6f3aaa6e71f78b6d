"""Makes the stage of a job that a user's own batch script started (``slurm/*.sh``), and prints its folder.

``python -m torchrl_sql.launch.prepare KIND ARGUMENT...`` runs once at the start of each life, on the first node.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrl_sql.config import ConfigError
from torchrl_sql.launch.group import new_stage, readable_stages
from torchrl_sql.launch.plan import RUNS, choose_root, expand_sweep, plan_command, plan_training


def prepare(kind: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Path:
    """The stage of this job: a new one in its first life, the same one in later lives.

    Args:
        kind (str): ``train``, or any other command of ``torchrl-sql``.
        arguments (sequence of str): the command's. For ``train`` in a job array they may hold several values
            (``seed=0,1,2``): element ``i`` takes combination ``i``.
        environment (mapping): e.g. ``os.environ``, with SLURM's variables.

    Raises:
        ConfigError: for arguments that cannot be run.
    """
    job = environment["SLURM_JOB_ID"]
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    command = shlex.join([kind, *arguments])
    if int(environment.get("SLURM_RESTART_COUNT", 0)) > 0 and (found := _of_job(job, command)):
        return found
    if kind == "train":
        combinations = expand_sweep(arguments)
        element = int(environment.get("SLURM_ARRAY_TASK_ID", 0))
        if array is None and len(combinations) > 1:
            raise ConfigError(f"{len(combinations)} combinations of settings: sbatch --array=0-{len(combinations) - 1}")
        if element >= len(combinations):
            raise ConfigError(f"array element {element} has no settings: there are {len(combinations)} combinations")
        # A single run's folder is the launch's own.
        chosen = combinations[element][1]
        root = choose_root(plan_training(chosen, Path("unnamed"))[0].name)
        planned = plan_training(chosen, root)
    else:
        root = choose_root(kind)
        planned = [plan_command(kind, arguments)]
    stage = new_stage(root, kind, [p.task for p in planned], command=command, stop_seconds=60, cluster=None)
    stage.create([p.config for p in planned])
    stage.add_submission(job, [0])
    return stage.folder


def _of_job(job: str, command: str) -> Path | None:
    """The newest stage that this job made; ids start anew with a new cluster, so the command must be the same too."""
    own = [
        s
        for s in readable_stages(RUNS)
        if s.command == command and any(submission.job == job for submission in s.submissions)
    ]
    return max(own, key=lambda stage: stage.created).folder if own else None


if __name__ == "__main__":
    try:
        print(prepare(sys.argv[1], sys.argv[2:], os.environ))
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
