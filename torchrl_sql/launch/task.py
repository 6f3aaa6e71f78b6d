"""A task's folder: the files by which its lives, its launcher and the batch script know of one another.

A task is one piece of work: a training run, an evaluation. A *life* of it is one start of its processes. It has many:
each requeue, each crash, each ``torchrl-sql resume`` begins another. SLURM's own states do not tell whether the work is
done (and are forgotten after minutes without accounting), so the task's folder does:

========== ===========================================================================================
file       meaning
========== ===========================================================================================
life       the newest life that started; a process of an older one that still runs must stop
done       the work is complete; a life that starts later has nothing to do
FATAL      an error that would come again: its text; not retried
requeue    the life that ended on purpose, all saved, to be continued at once
stopped    the life that ended on purpose, all saved, not to be continued by itself
cancelled  the submission that a user cancelled
crashes    a line a life that crashed, or of training was told to stop: the life, how, the newest checkpoint then
run_dir    the folder of the training run, where checkpoints are
========== ===========================================================================================

``job.sh`` reads and writes the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torchrl_sql.files import write_text

LIFE_VARIABLE = "TORCHRL_SQL_LIFE"
"""Environment variable by which a batch script tells its processes their life."""


class Life(NamedTuple):
    """Orders the lives of a task."""

    submission: int
    """The how many-th submission of the task this is, from 0."""
    restart: int
    """Restarts within the submission, as SLURM counts them."""

    def __str__(self) -> str:
        return f"{self.submission}.{self.restart}"

    @classmethod
    def parse(cls, text: str) -> Life:
        """The life that ``str`` wrote."""
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

    def newest_life(self) -> Life | None:
        """The newest life that started."""
        text = self.text("life")
        return None if text is None else Life.parse(text)

    def is_superseded(self, life: Life) -> bool:
        """Whether a newer life has started."""
        newest = self.newest_life()
        return newest is not None and newest > life

    def reasons_not_to_start(self, life: Life) -> str | None:
        """Why this life must not work: an error that would come again, a cancellation or a newer life."""
        fatal = self.text("FATAL")
        if fatal is not None:
            return f"an earlier life failed in a way that a retry does not mend: {fatal}"
        if self.text("cancelled") == str(life.submission):
            return "the job was cancelled"
        if self.is_superseded(life):
            return f"life {life} was superseded by {self.newest_life()}"
        return None

    def clear_for_resume(self) -> None:
        """Forgets earlier failures, for a user who submits the task again."""
        for name in ("FATAL", "crashes", "requeue", "stopped", "cancelled"):
            (self.path / name).unlink(missing_ok=True)
