"""SLURM: batch scripts through submitit, submission, and the states of jobs without accounting."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from submitit import SlurmExecutor

from torchrl_sql.config.cluster import ClusterConfig
from torchrl_sql.launch.group import Group, Submission
from torchrl_sql.launch.ranks import outside_jobs
from torchrl_sql.studies.task import Task

_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""The states of jobs that are over; a job in any other one runs, or will, or somebody holds it."""

_SIZES = re.compile(r"nodes|ntasks.*|tasks-per-node|gpus.*|gres|tres-per-.*|(cpus|mem)-per-gpu|exclusive")
"""Options of sbatch that are for whole nodes, or several."""


class _Executor(SlurmExecutor):
    """Writes scripts that start a command; also where there is no SLURM, for the text."""

    def __init__(self, group: Group, command: str) -> None:
        super().__init__(group.folder)
        self._command = command

    @classmethod
    def affinity(cls) -> int:
        return 2

    @property
    def text(self) -> str:
        """The batch script."""
        return self._make_submission_file_text(self._command, "")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        of_a_job = os.environ.keys() - outside_jobs(os.environ).keys()  # sbatch would hand it over to the new one
        return [
            "env",
            *(f"--unset={name}" for name in of_a_job),
            *super()._make_submission_command(submission_file_path),
        ]

    def sbatch(self) -> str:
        """Submits it; returns the job id."""
        return self._submit_command(self._command).job_id


def resources(cluster: ClusterConfig, task: Task) -> ClusterConfig:
    """What the job of a task takes: training and bench all nodes, all else one process. Evaluation, probes and training
    by one process have one GPU.

    All memory of a node (0) is for who takes whole nodes; the others get the partition's default, and none of the sizes
    among the options of sbatch. Where ``gpus-per-node`` is left out (null), the one GPU is of the kind of ``gres``.
    """
    if task.kind in ("train", "bench") and not task.one_process:
        return cluster
    num_gpus = min(1, cluster.gpus_per_node) if task.kind in ("train", "evaluate", "probe") else 0
    given = {name.replace("_", "-"): value for name, value in cluster.sbatch.items()}
    options = {name: value for name, value in given.items() if value is None or not _SIZES.fullmatch(name)}
    if num_gpus and "gpus-per-node" in options:
        its_kind = re.search(r"(?:^|,)gpu(:[a-zA-Z][^:,(]*)?", str(given.get("gres")))
        options["gres"] = f"gpu{(its_kind and its_kind[1]) or ''}:{num_gpus}"
    if _is_all(given.get("mem")):
        del options["mem"]
    memory = None if _is_all(cluster.memory) else cluster.memory
    return replace(cluster, nodes=1, tasks_per_node=1, gpus_per_node=num_gpus, memory=memory, sbatch=options)


def _is_all(memory: object) -> bool:
    return re.fullmatch(r"0+[KMGT]?", str(memory)) is not None


def _executor(group: Group, tasks: Sequence[int], dependency: str | None) -> _Executor:
    assert group.cluster is not None
    cluster = resources(group.cluster, group.tasks[0])
    python = shlex.quote(sys.executable) if cluster.python is None else cluster.python
    folder = shlex.quote(str(group.folder))
    executor = _Executor(group, f'$torchrl_sql_block {python} -u -m torchrl_sql.cli.job {folder} "$torchrl_sql_index"')
    given = {name.replace("_", "-"): value for name, value in cluster.sbatch.items()}
    signal = f"USR2@{cluster.signal_delay_seconds}"  # submitit would take its name from the environment
    more: dict[str, object] = {"requeue": True, "mem": cluster.memory, "signal": signal}
    num_cpus = given.get("cpus-per-task", cluster.cpus_per_task)
    if dependency is not None:
        dependency = ",".join(filter(None, [dependency, given.pop("dependency", None)]))
        more |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    begin = ["torchrl_sql_begin", str(group.folder), str(len(group.submissions)), *map(str, tasks)]
    parameters = {
        "job_name": group.root.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "comment": cluster.comment,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.timeout_minutes,
        "array_parallelism": cluster.array_parallelism,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": [
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
            *cluster.setup,
            f"export TORCHRL_SQL_MAX_CRASHES={cluster.max_crashes}",
            f"source {shlex.quote(str(group.code / 'torchrl_sql' / 'launch' / 'job.sh'))}",
            shlex.join(begin),
        ],
        "teardown": ["torchrl_sql_end $?", ""],
        # Since SLURM 22.05 srun does not take the job's CPUs per task over; with sbatch --export=NONE it would start
        # processes without the batch script's variables.
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--export=ALL",
            *([] if num_cpus is None else [f"--cpus-per-task={num_cpus}"]),
        ],
    }
    parameters = {name: value for name, value in parameters.items() if name.replace("_", "-") not in given}
    more = {name: value for name, value in (more | given).items() if value is not None and value is not False}
    executor.update_parameters(**parameters, additional_parameters=more)
    if len(tasks) > 1:
        executor.parameters["map_count"] = len(tasks)
    return executor


def script_text(group: Group, tasks: Sequence[int], *, dependency: str | None = None) -> str:
    """The batch script of a group's next submission, exactly as :func:`submit` gives it to sbatch."""
    return _executor(group, tasks, dependency).text


def submit(group: Group, tasks: Sequence[int], *, dependency: str | None = None) -> str:
    """Submits some of a group's tasks, as an array if there are several; returns the job id, of an array the array's.

    Args:
        group (Group): with a cluster.
        tasks (sequence of int): which.

    Keyword Args:
        dependency (str, optional): as sbatch takes it.

    Raises:
        OSError: if there is no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise OSError("sbatch is not on PATH: submit on a login node of the cluster, or use --local or --dry-run")
    try:
        job = _executor(group, tasks, dependency).sbatch()
    except RuntimeError as error:  # submitit's FailedSubmissionError
        raise OSError(f"sbatch refused the job: {error}") from error
    group.add_submission(job, tasks)
    return job


class Place(NamedTuple):
    """Where a task was submitted to."""

    submission: Submission
    number: int
    """Of the task in its group."""

    @property
    def job(self) -> str:
        """Its job, as scontrol and dependencies take it."""
        return self.submission.job_of(self.number)


def split(group: Group, tasks: Sequence[int], places: Mapping[str, Place]) -> list[tuple[list[int], str | None]]:
    """How to submit some of a group's tasks so that each waits for no more than it must.

    Args:
        group (Group): the group.
        tasks (sequence of int): which.
        places (mapping): where the tasks that are to do, of earlier groups, were submitted to, by name.

    Returns:
        For each submission its tasks and their dependency. Tasks that wait for one element each of an array, in its
        order, are an array again (``aftercorr``); a task that takes what it gets waits for the end of all others,
        whatever it is (``afterany``).
    """
    waits = [[places[name] for name in group.tasks[index].after if name in places] for index in tasks]
    if len(tasks) > 1 and all(len(each) == 1 for each in waits):
        first = waits[0][0].submission
        if [each[0].job for each in waits] == [f"{first.job}_{position}" for position in range(len(first.tasks))]:
            return [(list(tasks), f"aftercorr:{first.job}")]
    submissions: dict[str | None, list[int]] = {}
    for index, each in zip(tasks, waits, strict=True):
        tolerant = group.tasks[index].tolerant
        jobs = dict.fromkeys(place.submission.job if tolerant else place.job for place in each)
        dependency = ":".join(["afterany" if tolerant else "afterok", *jobs]) if jobs else None
        submissions.setdefault(dependency, []).append(index)
    return [(indices, dependency) for dependency, indices in submissions.items()]


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs.

    Raises:
        OSError: if SLURM does not.
    """
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")


class JobState(NamedTuple):
    """What SLURM knows of a job, or of an element of an array."""

    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ..."""
    restarts: int
    reason: str
    nodes: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or may run later: also if somebody must release it first."""
        return self.state not in _OVER


def parse_job_states(text: str) -> dict[int, JobState]:
    """Reads ``scontrol -o show job``: array index -> state; 0 for a job without array."""
    states: dict[int, JobState] = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        if "JobState" not in values:
            continue
        state = JobState(
            values["JobState"], int(values.get("Restarts", 0)), values.get("Reason", ""), values.get("NodeList", "")
        )
        for index in _expand(values.get("ArrayTaskId", "0")):
            states[index] = state
    return states


def _expand(ranges: str) -> list[int]:
    """``1,3-5%2`` as numbers."""
    numbers: list[int] = []
    for part in ranges.split("%")[0].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def job_states(job: str) -> dict[int, JobState]:
    """The states of a job's elements; empty once SLURM has forgotten it (minutes after its end).

    Raises:
        OSError: if SLURM does not answer.
    """
    if shutil.which("scontrol") is None:
        raise OSError("scontrol is not on PATH: ask on a node of the cluster")
    done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr + done.stdout:
            return {}
        raise OSError(f"scontrol show job {job}: {done.stderr.strip() or done.stdout.strip()}")
    return parse_job_states(done.stdout)
