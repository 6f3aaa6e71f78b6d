"""A task's folder: the files by which its attempts, its launcher and the batch script know of one another.

A task is one piece of work: a training run, an evaluation. An *attempt* is one start of its processes. It has many:
each requeue, each crash, each ``torchrl-sql resume`` begins another. SLURM's own states do not tell whether the work is
done (and are forgotten after minutes without accounting), so the task's folder does:

========== ===========================================================================================
file       meaning
========== ===========================================================================================
attempt    the newest attempt that started; a process of an older one that still runs must stop
done       the work is complete; an attempt that starts later has nothing to do
done.RANK  where there are several processes: the attempt in which this one has done its part
FATAL      an error that would come again: its text; not retried
requeue    the attempt that ended on purpose, all saved, to be continued at once
stopped    the attempt that ended on purpose, all saved, not to be continued by itself
cancelled  the submission that a user cancelled
progress   of training: the newest checkpoint when the newest attempt started, or was told to stop
crashes    one line per attempt that crashed, or of training was told to stop: the attempt, how, progress
========== ===========================================================================================

``job.sh`` reads and writes the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torchrl_sql.files import write_text

ATTEMPT_VARIABLE = "TORCHRL_SQL_ATTEMPT"
"""Environment variable by which a batch script tells its processes their attempt."""
TASK_VARIABLE = "TORCHRL_SQL_TASK"
"""The same for the task's folder. Training takes its run's folder over from an earlier attempt at the same task."""


class Attempt(NamedTuple):
    """Orders the attempts of a task."""

    submission: int
    """0-based submission count."""
    restart: int
    """Restarts within the submission, as SLURM counts them."""

    def __str__(self) -> str:
        return f"{self.submission}.{self.restart}"

    @classmethod
    def parse(cls, text: str) -> Attempt:
        """The attempt that ``str`` wrote."""
        submission, restart = text.strip().split(".")
        return cls(int(submission), int(restart))


class TaskFolder:
    """Reads and writes the files above.

    Args:
        path (Path): the folder; exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self, name: str) -> str | None:
        """A file's content, without white space at its ends; ``None`` if there is no such file."""
        try:
            return (self.path / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """Writes a file in one move."""
        write_text(self.path / name, text + "\n", concurrent=True)

    @property
    def done(self) -> bool:
        """Whether the work is complete."""
        return (self.path / "done").exists()

    def newest_attempt(self) -> Attempt | None:
        """The newest attempt that started."""
        text = self.text("attempt")
        return None if text is None else Attempt.parse(text)

    def is_superseded(self, attempt: Attempt) -> bool:
        """Whether a newer attempt has started."""
        newest = self.newest_attempt()
        return newest is not None and newest > attempt

    def reason_not_to_start(self, attempt: Attempt) -> str | None:
        """Why this attempt must not work: an error that would come again, a cancellation or a newer attempt."""
        fatal = self.text("FATAL")
        if fatal is not None:
            return f"an earlier attempt failed in a way that a retry does not mend: {fatal}"
        if self.text("cancelled") == str(attempt.submission):
            return "the job was cancelled"
        if self.is_superseded(attempt):
            return f"attempt {attempt} was superseded by {self.newest_attempt()}"
        return None

    def clear_for_resume(self) -> None:
        """Forgets earlier ends, for a user who submits the task again."""
        for name in ("done", "FATAL", "crashes", "requeue", "stopped", "cancelled"):
            (self.path / name).unlink(missing_ok=True)


def newest_checkpoint(run_dir: str | None) -> str:
    """The name of a training run's newest checkpoint, ``step_000000100``; empty if there is none."""
    return max((path.stem for path in Path(run_dir, "checkpoints").glob("step_*.pt")), default="") if run_dir else ""
