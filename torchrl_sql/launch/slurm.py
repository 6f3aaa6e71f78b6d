"""SLURM: batch scripts through submitit, submission, and the states of jobs without accounting."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from submitit import SlurmExecutor

from torchrl_sql.config.cluster import ClusterConfig
from torchrl_sql.launch.group import Stage
from torchrl_sql.launch.job import run_task

JOB_SHELL = Path(__file__).resolve().parent / "job.sh"


class _Executor(SlurmExecutor):
    """Also where there is no SLURM, for the text of a script; submitting runs sbatch, which then is missing."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def resources(cluster: ClusterConfig, kind: str) -> ClusterConfig:
    """What a stage of this kind takes: training and bench all nodes, all else one process, and evaluation one GPU.

    All memory of a node (0) is for who takes whole nodes; the others get the partition's default.
    """
    if kind in ("train", "bench"):
        return cluster
    num_gpus = min(1, cluster.gpus_per_node) if kind == "evaluate" else 0
    memory = None if re.fullmatch(r"0+[KMGT]?", cluster.memory or "") else cluster.memory
    return replace(cluster, nodes=1, tasks_per_node=1, gpus_per_node=num_gpus, memory=memory)


def make_executor(stage: Stage, tasks: Sequence[int], *, submission: int, after: str | None = None) -> SlurmExecutor:
    """The executor of submitit for some of a stage's tasks.

    Args:
        stage (Stage): with a cluster.
        tasks (sequence of int): which.

    Keyword Args:
        submission (int): number of the submission within the stage.
        after (str, optional): id of a job that must succeed first.
    """
    assert stage.cluster is not None
    cluster = resources(stage.cluster, stage.kind)
    python = shlex.quote(sys.executable) if cluster.python is None else cluster.python
    # USR2 stays pending until the job's handlers are there: importing takes seconds, and the default is to die.
    executor = _Executor(stage.folder, python=f"env --block-signal=USR2 {python}")
    more: dict[str, object] = {"requeue": True}
    if cluster.memory is not None:
        more["mem"] = cluster.memory
    if after is not None:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    begin = ["torchrl_sql_begin", str(stage.folder), str(submission), *map(str, tasks)]
    parameters = {
        "job_name": stage.folder.parent.parent.name,
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
        "signal_delay_s": cluster.signal_delay_seconds,
        "array_parallelism": cluster.array_parallelism,
        "stderr_to_stdout": True,
        "setup": [
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
            *cluster.setup,
            f"export TORCHRL_SQL_MAX_CRASHES={cluster.max_crashes}",
            f"source {shlex.quote(str(JOB_SHELL))}",
            shlex.join(begin),
        ],
        "teardown": ["torchrl_sql_end $?", ""],
        # Since SLURM 22.05 srun does not take the job's CPUs per task over.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": more,
    }
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return executor


def script_text(stage: Stage, tasks: Sequence[int], *, after: str | None = None) -> str:
    """The batch script of a stage's next submission, exactly as :func:`submit` gives it to sbatch."""
    executor = make_executor(stage, tasks, submission=len(stage.submissions), after=after)
    if len(tasks) > 1:
        executor.parameters["map_count"] = len(tasks)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(stage: Stage, tasks: Sequence[int], *, after: str | None = None) -> str:
    """Submits some of a stage's tasks, as an array if there are several; returns the job id, of an array the array's.

    Raises:
        OSError: if there is no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise OSError("sbatch is not on PATH: submit on a login node of the cluster, or use --local or --dry-run")
    executor = make_executor(stage, tasks, submission=len(stage.submissions), after=after)
    folder = [str(stage.folder)] * len(tasks)
    try:
        jobs = executor.map_array(run_task, folder, list(tasks))
    except RuntimeError as error:  # submitit's FailedSubmissionError
        raise OSError(f"sbatch refused the job: {error}") from error
    job = jobs[0].job_id.split("_")[0]
    stage.add_submission(job, tasks)
    return job


class JobState(NamedTuple):
    """What SLURM knows of a job, or of an element of an array."""

    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ..."""
    restarts: int
    reason: str
    nodes: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or will without anybody's doing."""
        return self.state in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "REQUEUED",
            "REQUEUE_HOLD",
            "SUSPENDED",
        )


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
    found: list[int] = []
    for part in ranges.split("%")[0].split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


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
