"""The same tasks without SLURM: in the foreground of this machine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from torchrl_sql.launch.attempt import ATTEMPT_VARIABLE, TASK_VARIABLE, Attempt
from torchrl_sql.launch.group import Group
from torchrl_sql.launch.ranks import outside_jobs
from torchrl_sql.launch.slurm import resources
from torchrl_sql.studies.local import Start, run_tasks
from torchrl_sql.studies.task import Task


def run_local(
    groups: Sequence[Group], to_do: Mapping[str, Sequence[int]], *, say: Callable[[str], None] = lambda line: None
) -> None:
    """Runs tasks one after the other, each training run in as many processes as its cluster's profile says, or in one
    if it learns online.

    Output goes to the terminal and to the group's folder. Nothing is retried: who sees an error decides.

    Raises:
        KeyboardInterrupt: if it was interrupted; a training run has saved.
        OSError: if a task fails.
    """
    places = {group.tasks[index].name: (group, index) for group in groups for index in to_do[group.name]}
    attempts = {group.name: Attempt(len(group.submissions), 0) for group in groups}
    for group in groups:
        if to_do[group.name]:
            group.add_submission("local", to_do[group.name])

    def start(task: Task) -> Start:
        group, index = places[task.name]
        assert group.cluster is not None
        num_processes = resources(group.cluster, task).num_tasks
        command = [sys.executable, "-m"]
        if num_processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m"]
        attempt = attempts[group.name]
        paths = [str(group.code), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {ATTEMPT_VARIABLE: str(attempt), TASK_VARIABLE: str(group.task_folder(index).path)}
        own |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        return Start(
            [*command, "torchrl_sql.cli.job", str(group.folder), str(index)],
            outside_jobs(os.environ) | group.cluster.environment | own,
            group.folder / f"local{attempt.submission}_{index}_0_log.out",
        )

    def is_done(task: Task) -> bool:
        group, index = places[task.name]
        return group.task_folder(index).done

    tasks = [group.tasks[index] for group, index in places.values()]
    root = shlex.quote(str(groups[0].root))
    try:
        failed = run_tasks(tasks, start, is_done=is_done, say=say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; torchrl-sql resume {root} --local continues") from None
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise OSError(f"tasks failed; torchrl-sql resume {root} --local tries them again{reasons}")
