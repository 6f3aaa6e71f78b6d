"""A stage: tasks of one kind that are submitted together, and its record on disk.

``ROOT/launch/KIND/`` holds ``launch.json`` (this record), ``git.diff``, the batch scripts and logs of its jobs, and one
folder a task (see :mod:`torchrl_sql.launch.task`). ROOT is new for each launch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchrl_sql.config.cluster import ClusterConfig, cluster_config_from_dict
from torchrl_sql.launch.task import TaskFolder
from torchrl_sql.provenance import cluster_versions, git_state

logger = logging.getLogger(__name__)

FORMAT = "torchrl_sql launch 1"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work."""

    label: str
    """What tells it from its stage's other tasks, e.g. ``seed=1``."""
    arguments: list[str]
    """Of ``torchrl-sql``; a training run's settings are in ``config.yaml`` of the task's folder, resolved."""
    run_dir: str | None = None
    """Folder of the training run that it makes."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job, or job array, that works on some of the tasks."""

    job: str
    """SLURM's job id; of an array, the array's."""
    tasks: list[int]
    """Which tasks; of an array, in the order of its elements."""
    submitted: str
    """UTC, ISO 8601."""


@dataclass(kw_only=True)
class Stage:
    """See the module."""

    folder: Path
    kind: str
    """``train``, or another command of ``torchrl-sql``."""
    command: str
    """The command line that launched it."""
    directory: str
    """The working folder of its jobs."""
    created: str
    """UTC, ISO 8601."""
    git_commit: str | None
    git_untracked: list[str]
    versions: dict[str, str]
    stop_seconds: float
    """Time that a job takes at most to stop and save once it is told."""
    cluster: ClusterConfig | None
    """``None`` for a stage that a user's own batch script made."""
    tasks: list[Task]
    submissions: list[Submission] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Stage:
        """Reads a stage's record.

        Raises:
            ValueError: if the folder holds none.
        """
        file = folder / "launch.json"
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} must be the record of a launch: {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"{file} must be of format {FORMAT!r}")
        try:
            cluster = content.pop("cluster")
            return cls(
                folder=folder,
                cluster=None if cluster is None else cluster_config_from_dict(cluster),
                tasks=[Task(**task) for task in content.pop("tasks")],
                submissions=[Submission(**submission) for submission in content.pop("submissions")],
                **content,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} must be the record of a launch: {error}") from None

    def create(self, configs: Sequence[str | None]) -> None:
        """Makes the stage's folder.

        Args:
            configs (sequence of str): for each task that is a training run its resolved configuration as YAML.

        Raises:
            FileExistsError: if there is such a folder.
        """
        self.folder.mkdir(parents=True)
        for index, (task, config) in enumerate(zip(self.tasks, configs, strict=True)):
            path = self.folder / f"task_{index}"
            path.mkdir()
            if config is not None:
                (path / "config.yaml").write_text(config, encoding="utf-8")
            if task.run_dir is not None:
                (path / "run_dir").write_text(f"{task.run_dir}\n", encoding="utf-8")
        (self.folder / "git.diff").write_text(git_state().diff, encoding="utf-8")
        self.save()

    def save(self) -> None:
        """Writes the record in one move."""
        content = {"format": FORMAT} | asdict(self)
        del content["folder"]
        TaskFolder(self.folder).write("launch.json", json.dumps(content, indent=1))

    def task_folder(self, index: int) -> TaskFolder:
        """The folder of a task.

        Raises:
            ValueError: if there is no such task.
        """
        if not 0 <= index < len(self.tasks):
            raise ValueError(f"{self.folder} holds tasks 0 to {len(self.tasks) - 1}, got {index}")
        return TaskFolder(self.folder / f"task_{index}")

    @property
    def unfinished(self) -> list[int]:
        """The tasks that are not done."""
        return [index for index in range(len(self.tasks)) if not self.task_folder(index).done]

    def add_submission(self, job: str, tasks: Sequence[int]) -> None:
        """Records a job that was submitted."""
        self.submissions.append(Submission(job=job, tasks=list(tasks), submitted=_now()))
        self.save()


def new_stage(
    root: Path,
    kind: str,
    tasks: Sequence[Task],
    *,
    command: str,
    stop_seconds: float,
    cluster: ClusterConfig | None,
) -> Stage:
    """A stage that is not on disk yet (:meth:`Stage.create` puts it there).

    Args:
        root (Path): folder of the launch.
        kind (str): what the stage does.
        tasks (sequence of Task): the work.

    Keyword Args:
        command (str): the command line that launches it.
        stop_seconds (float): see :class:`Stage`.
        cluster (ClusterConfig, optional): what it is submitted with.
    """
    git = git_state()
    return Stage(
        folder=root.resolve() / "launch" / kind,
        kind=kind,
        command=command,
        directory=str(Path.cwd()),
        created=_now(),
        git_commit=git.commit,
        git_untracked=git.untracked,
        versions=cluster_versions(),
        stop_seconds=stop_seconds,
        cluster=cluster,
        tasks=list(tasks),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def find_stages(root: Path) -> list[Stage]:
    """The stages of a launch, oldest first.

    Raises:
        ValueError: if ``root`` holds none.
    """
    files = list(root.glob("launch/*/launch.json"))
    if not files:
        raise ValueError(f"{root} must be a folder made by torchrl-sql launch or slurm/*.sh, but has no launch/")
    return sorted((Stage.load(file.parent.resolve()) for file in files), key=lambda stage: stage.created)


def readable_stages(runs: Path) -> Iterator[Stage]:
    """Every stage of the launches in ``runs``, but for those whose records cannot be read: with a warning."""
    for file in runs.glob("*/launch/*/launch.json"):
        try:
            yield Stage.load(file.parent.resolve())
        except ValueError as error:
            logger.warning("passed over: %s", error)


def find_launch(run_or_job: str, *, runs: Path = Path("runs")) -> Path:
    """The folder of a launch.

    Args:
        run_or_job (str): the folder itself, or the id of a job. Ids start anew with a new cluster: the newest launch
            counts.

    Keyword Args:
        runs (Path): where a job's launch is looked for.

    Raises:
        ValueError: if there is none.
    """
    job = run_or_job.split("_")[0]
    if not job.isdigit():
        return Path(run_or_job)
    found = [
        (submission.submitted, stage.folder.parents[1], submission.job)
        for stage in readable_stages(runs)
        for submission in stage.submissions
        if submission.job in (job, run_or_job) or (job == run_or_job and submission.job.split("_")[0] == job)
    ]
    if not found:
        raise ValueError(f"no launch in {runs.resolve()} belongs to job {run_or_job}; give the run's folder")
    elements = sorted({name for _, _, name in found if name != run_or_job and "_" in name})
    if run_or_job == job and len(elements) > 1:
        raise ValueError(f"job {job} is an array, each element a launch of its own: give one of {', '.join(elements)}")
    return max(found)[1]
