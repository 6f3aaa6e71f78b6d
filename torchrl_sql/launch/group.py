"""A job group: tasks of one kind that are submitted together, and its record on disk.

``ROOT/launch/GROUP/`` holds ``launch.json`` (this record), ``git.diff``, the batch scripts and logs of its jobs, and
one folder per task (see :mod:`torchrl_sql.launch.attempt`); ``ROOT/launch/code/`` the code that all attempts run. ROOT
is new for each launch, or the folder of a study.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchrl_sql.config import ConfigError, configs_dir
from torchrl_sql.config.cluster import ClusterConfig, cluster_config_from_dict
from torchrl_sql.files import write_text
from torchrl_sql.launch.attempt import TaskFolder
from torchrl_sql.provenance import cluster_versions, git_state
from torchrl_sql.studies.plan import RUNS
from torchrl_sql.studies.task import Task

logger = logging.getLogger(__name__)

FORMAT = "torchrl_sql launch 2"
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job, or job array, that works on some of the tasks."""

    job: str
    """SLURM's job id; of an array, the array's."""
    tasks: list[int]
    """Which tasks; of an array, in the order of its elements."""
    submitted: str
    """UTC, ISO 8601."""

    def job_of(self, index: int) -> str:
        """The job id of a task, as scontrol and scancel take it."""
        return f"{self.job}_{self.tasks.index(index)}" if len(self.tasks) > 1 else self.job


@dataclass(kw_only=True)
class Group:
    """See the module."""

    folder: Path
    order: int
    """Of the groups of a launch: none waits for a later one."""
    command: str
    """The command line that launched it."""
    directory: str
    """The working folder of its jobs."""
    created: str
    """UTC, ISO 8601."""
    git_commit: str | None
    git_untracked: list[str]
    versions: dict[str, str]
    cluster: ClusterConfig | None
    """``None`` for a group that a user's own batch script made."""
    tasks: list[Task]
    submissions: list[Submission] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Group:
        """Reads a group's record.

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

    @property
    def name(self) -> str:
        """Of the group in its launch."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """The command of ``torchrl-sql`` that all of its tasks are."""
        return self.tasks[0].kind

    @property
    def root(self) -> Path:
        """Folder of the launch."""
        return self.folder.parents[1]

    @property
    def code(self) -> Path:
        """What Python finds the package in, on the nodes."""
        return self.folder.parent / "code"

    @property
    def stop_seconds(self) -> float:
        """Time that a job takes at most to stop and save once it is told."""
        return 60 if self.cluster is None else self.cluster.signal_delay_seconds / 2

    def create(self) -> None:
        """Makes the group's folder, and that of the code if this is the launch's first group.

        A training task gets its resolved settings as a file, and becomes ``train --config FILE``.

        Raises:
            FileExistsError: if there is such a folder.
        """
        self.folder.mkdir(parents=True)
        for index, task in enumerate(self.tasks):
            path = self.folder / f"task_{index}"
            path.mkdir()
            if task.config is not None:
                (path / "config.yaml").write_text(task.config, encoding="utf-8")
                arguments = ["train", "--config", str(path / "config.yaml")]
                self.tasks[index] = replace(task, arguments=arguments, config=None)
        if not self.code.exists():
            freeze_code(self.code)
        (self.folder / "git.diff").write_text(git_state().diff, encoding="utf-8")
        self.save()

    def save(self) -> None:
        """Writes the record in one move."""
        content = {"format": FORMAT} | asdict(self)
        del content["folder"]
        write_text(self.folder / "launch.json", json.dumps(content, indent=1) + "\n", concurrent=True)

    def task_folder(self, index: int) -> TaskFolder:
        """The folder of a task.

        Raises:
            ValueError: if there is no such task.
        """
        if not 0 <= index < len(self.tasks):
            raise ValueError(f"{self.folder} holds tasks 0 to {len(self.tasks) - 1}, got {index}")
        return TaskFolder(self.folder / f"task_{index}")

    def add_submission(self, job: str, tasks: Sequence[int]) -> None:
        """Records a job that was submitted."""
        self.submissions.append(Submission(job=job, tasks=list(tasks), submitted=_now()))
        self.save()

    def last_submission(self, index: int) -> Submission | None:
        """The newest submission that a task belongs to."""
        return next((each for each in reversed(self.submissions) if index in each.tasks), None)


def make_groups(root: Path, tasks: Sequence[Task], *, command: str, cluster: ClusterConfig | None) -> list[Group]:
    """Groups that are not on disk yet (:meth:`Group.create` puts them there).

    Args:
        root (Path): folder of the launch.
        tasks (sequence of Task): the work, each task after those that it waits for.

    Keyword Args:
        command (str): the command line that launches it.
        cluster (ClusterConfig, optional): what it is submitted with.

    Raises:
        ConfigError: for a folder whose name SLURM, Python's search path or :func:`expand_path` would not take as it is.
    """
    root = root.resolve()
    if any(character in str(root) for character in "%:$\\\n"):
        raise ConfigError(f"the folder of a launch must hold no %, :, $, \\ or line break, got {str(root)!r}")
    git, versions = git_state(), cluster_versions()
    by_name: dict[str, list[Task]] = {}
    for task in tasks:
        by_name.setdefault(task.group, []).append(task)
    return [
        Group(
            folder=root / "launch" / name,
            order=order,
            command=command,
            directory=str(Path.cwd()),
            created=_now(),
            git_commit=git.commit,
            git_untracked=git.untracked,
            versions=versions,
            cluster=cluster,
            tasks=own,
        )
        for order, (name, own) in enumerate(by_name.items())
    ]


def freeze_code(folder: Path) -> None:
    """Copies the package and ``configs/``: what a launch runs does not change with the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "configs")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    shutil.copytree(configs_dir(), folder / PACKAGE.name / "configs")


def unfinished(groups: Sequence[Group], alive: Container[str]) -> dict[str, list[int]]:
    """The tasks of each group to submit again: those that are neither done nor, by name, ``alive``; and what waits for
    earlier jobs of such tasks, or has read what they left.
    """
    to_do: dict[str, list[int]] = {}
    names: set[str] = set()
    for group in groups:
        to_do[group.name] = []
        for index, task in enumerate(group.tasks):
            done, again = group.task_folder(index).done, not names.isdisjoint(task.after)
            if (again and task.tolerant) or (not done and (again or task.name not in alive)):
                to_do[group.name].append(index)
                names.add(task.name)
    return to_do


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def find_groups(root: Path) -> list[Group]:
    """The groups of a launch, in their order.

    Raises:
        ValueError: if ``root`` holds none.
    """
    files = list(root.glob("launch/*/launch.json"))
    if not files:
        raise ValueError(f"{root} must be a folder made by torchrl-sql launch or slurm/*.sh, but has no launch/")
    return sorted((Group.load(file.parent.resolve()) for file in files), key=lambda group: group.order)


def readable_groups(runs: Path) -> Iterator[Group]:
    """Every group of the launches in ``runs``, but for those whose records cannot be read: with a warning."""
    for file in runs.glob("*/launch/*/launch.json"):
        try:
            yield Group.load(file.parent.resolve())
        except ValueError as error:
            logger.warning("ignored: %s", error)


def find_launch(run_or_job: str) -> Path:
    """The folder of a launch.

    Args:
        run_or_job (str): the folder itself, or the id of a job. Ids start anew with a new cluster: the newest launch
            counts. A folder whose name looks like an id is given as ``./12``.

    Raises:
        ValueError: if there is none in ``runs/``.
    """
    job = run_or_job.split("_")[0]
    if not job.isdigit() or Path(run_or_job, "launch").is_dir():
        return Path(run_or_job)
    matches = [
        (submission.submitted, group.root, submission.job)
        for group in readable_groups(RUNS)
        for submission in group.submissions
        if submission.job in (job, run_or_job) or (job == run_or_job and submission.job.split("_")[0] == job)
    ]
    if not matches:
        raise ValueError(f"no launch in {RUNS.resolve()} belongs to job {run_or_job}; give the run's folder")
    elements = sorted({name for _, _, name in matches if name != run_or_job and "_" in name})
    if run_or_job == job and len(elements) > 1:
        raise ValueError(f"job {job} is an array, each element a launch of its own: give one of {', '.join(elements)}")
    return max(matches)[1]
