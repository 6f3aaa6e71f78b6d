"""What a launch's tasks are doing: their own files first, SLURM's state where it has one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torchrl_sql.launch.attempt import newest_checkpoint
from torchrl_sql.launch.group import Group
from torchrl_sql.launch.slurm import JobState, job_states

logger = logging.getLogger(__name__)

_FOLLOW_SECONDS = 1.0
_STATE_SECONDS = 20.0
"""Between two questions to SLURM's controller, which serves the whole cluster, about a job that runs."""
_POLLS_AFTER_END = 5
"""While a job is requeued, SLURM's states pass through failures for a second or two."""


class TaskState(NamedTuple):
    """One row of ``torchrl-sql status``."""

    group: str
    number: int
    task: str
    job: str
    """Of SLURM, as scancel takes it; empty if the task was never submitted."""
    state: str
    is_alive: bool
    restarts: int
    progress: str
    """Newest checkpoint."""
    note: str


def task_states(group: Group) -> list[TaskState]:
    """The state of each of a group's tasks.

    Raises:
        OSError: if SLURM does not answer.
    """
    asked: dict[str, dict[int, JobState]] = {}
    rows = []
    for index, task in enumerate(group.tasks):
        folder = group.task_folder(index)
        submission = group.last_submission(index)
        job = "" if submission is None else submission.job_of(index)
        known: JobState | None = None
        if submission is not None and submission.job != "local" and not folder.done:
            if submission.job not in asked:
                asked[submission.job] = job_states(submission.job)
            states = asked[submission.job]
            position = submission.tasks.index(index) if len(submission.tasks) > 1 else next(iter(states), 0)
            known = states.get(position)
        fatal = folder.text("FATAL")
        note = ""
        if folder.done:
            state = "COMPLETED"
        elif known is not None and known.is_alive:
            state, note = known.state, known.nodes if known.state == "RUNNING" else known.reason
        elif fatal is not None:
            state, note = "FAILED", fatal.splitlines()[0]
        elif submission is None:
            state = "NOT SUBMITTED"
        else:
            state, note = "ENDED" if known is None else known.state, "unfinished; torchrl-sql resume continues it"
        attempt = folder.newest_attempt()
        rows.append(
            TaskState(
                group=group.name,
                number=index,
                task=task.name,
                job=job,
                state=state,
                is_alive=not folder.done and known is not None and known.is_alive,
                restarts=0 if attempt is None else attempt.restart,
                progress=newest_checkpoint(task.run_dir),
                note=note,
            )
        )
    return rows


def format_states(states: Sequence[TaskState]) -> str:
    """A table for people."""
    rows = [("group", "task", "job", "state", "restarts", "newest checkpoint", "")]
    for state in states:
        label = f"{state.number} {state.task}"
        rows.append((state.group, label, state.job, state.state, str(state.restarts), state.progress, state.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    )


def log_file(group: Group, index: int, *, rank: int) -> Path | None:
    """The log of a rank of a task's newest submission; ``None`` before its job has started."""
    submission = group.last_submission(index)
    if submission is None:
        return None
    job = (
        f"local{group.submissions.index(submission)}_{index}" if submission.job == "local" else submission.job_of(index)
    )
    path = group.folder / f"{job}_{rank}_log.out"
    return path if path.exists() else None


def follow(group: Group, index: int, *, rank: int) -> Iterator[str]:
    """A task's log, as it grows, until the task ends for good.

    Raises:
        OSError: if SLURM does not answer at the start; later that passes.
    """
    position, path, num_polls_after_end = 0, log_file(group, index, rank=rank), 0
    state, asked = task_states(group)[index], time.monotonic()
    while num_polls_after_end < _POLLS_AFTER_END:
        # Before reading: what a job writes last must not be missed.
        if not state.is_alive or group.task_folder(index).done or time.monotonic() - asked >= _STATE_SECONDS:
            try:
                state = task_states(group)[index]
                num_polls_after_end = 0 if state.is_alive else num_polls_after_end + 1
            except OSError as error:
                logger.warning("%s", error)
            asked = time.monotonic()
        path = path or log_file(group, index, rank=rank)
        if path is not None:
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            if text:
                yield text
        if state.state in ("COMPLETED", "NOT SUBMITTED"):
            return
        time.sleep(_FOLLOW_SECONDS)
