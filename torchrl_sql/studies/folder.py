"""A study's folder: what is done there, what is the study's own, and running the rest here."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchrl_sql.config import ConfigError, load_run_config, run_config_from_yaml
from torchrl_sql.config.study import STUDY_FILE, StudyConfig, load_study
from torchrl_sql.files import KERNELS_VARIABLE, write_text
from torchrl_sql.studies.local import Start, format_seconds, run_tasks
from torchrl_sql.studies.task import Task, read_record

_COPYING = ".copying"
"""What is being copied from another study lies there until it is complete."""
_KERNELS = ".compiled"
"""What runs have compiled: those that differ in their seeds have the same kernels."""


def run_study(
    study: StudyConfig,
    tasks: Sequence[Task],
    folder: Path,
    *,
    num_jobs: int = 1,
    fresh: bool = False,
    reuse: Path | None = None,
    confirm: Callable[[str], bool],
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Runs what is not done of a study, here.

    Args:
        study (StudyConfig): the study.
        tasks (sequence of Task): what :func:`torchrl_sql.studies.plan.plan_study` planned of it.
        folder (Path): where everything goes.

    Keyword Args:
        num_jobs (int): tasks at the same time.
        fresh (bool): delete what an earlier run of a study made there first.
        reuse (Path, optional): another study's folder (:func:`check_reuse`): what is :func:`reusable` is copied.
        confirm (callable): is asked before anything is deleted, with what and why.
        say (callable): is given a line of progress for people.

    Returns:
        The page.

    Raises:
        ValueError: if tasks failed, or what is in the way is not the study's, or must not be deleted.
        KeyboardInterrupt: if it was stopped.
    """
    with owned(folder):
        prepare_folder(study, tasks, folder, fresh=fresh, reuse=reuse, confirm=confirm, say=say)
        say(f"{sum(map(Task.is_done, tasks))} of {len(tasks)} tasks of {folder} are done")

        def start(task: Task) -> Start:
            log = task.record_file.with_suffix(".log")
            return Start([sys.executable, "-m", "torchrl_sql", *task.arguments], task_environment(folder), log)

        try:
            failed = run_tasks(tasks, start, num_jobs=num_jobs, say=say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command, without --fresh, continues where it was") from None
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(tasks)} tasks of {folder} failed:{reasons}")
    return folder / "report.html"


def task_environment(folder: Path) -> dict[str, str]:
    """Of the processes of a study that runs in this folder: they share their compiled kernels there, unless this
    process's environment says where they are.
    """
    return {KERNELS_VARIABLE: str(folder.absolute() / _KERNELS)} | os.environ


def format_tasks(tasks: Sequence[Task], *, fresh: bool = False, reuse: Path | None = None) -> str:
    """Every task with its state, its command and what it waits for, for people."""
    lines = []
    copies = {} if reuse is None else reusable(tasks, reuse, fresh=fresh)
    for task in tasks:
        record, change = task.record(), task.change()
        state = "to do"
        if task.name in copies:
            state = f"to be copied from {reuse}"
        elif fresh:
            pass
        elif task.is_done():
            assert record is not None
            state = f"done in {format_seconds(record['seconds'])}"
            if record["copied_from"] is not None:
                state += f", copied from {record['copied_from']}"
        elif change is not None:
            state = f"to do again: {change}"
        elif record is not None and record["seconds"] is None:
            state = "started"
        lines += [f"{task.name}: {state}", f"  {task.command}"]
        lines += [f"  after {', '.join(task.after)}"] * bool(task.after)
    return "\n".join(lines)


def prepare_folder(
    study: StudyConfig,
    tasks: Sequence[Task],
    folder: Path,
    *,
    fresh: bool = False,
    reuse: Path | None = None,
    confirm: Callable[[str], bool],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Makes room for what is to do, writes ``study.yaml`` and copies what is to be reused. Nothing is deleted that no
    task recorded as its own.

    Args and errors as of :func:`run_study`.
    """
    part = folder / _COPYING
    shutil.rmtree(part, ignore_errors=True)  # of a copy that was stopped
    if reuse is None:
        _make_room(study, tasks, folder, fresh=fresh, confirm=confirm)
        return
    try:
        with owned(reuse):
            copied = _copy_done(tasks, reusable(tasks, reuse, fresh=fresh), reuse, part, say)
        if not copied:
            say(f"Nothing is copied from {reuse}: this study was begun already, or nothing there is the same")
        _make_room(study, tasks, folder, fresh=fresh, confirm=confirm)
        for path in (path for _, _, paths in copied for path in paths):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).rename(folder / path)
        for task, seconds, _ in copied:
            task.write_record(seconds=seconds, copied_from=reuse)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_room(
    study: StudyConfig, tasks: Sequence[Task], folder: Path, *, fresh: bool, confirm: Callable[[str], bool]
) -> None:
    """Deletes what is to be made again, as far as it is the study's own, and writes ``study.yaml``."""
    recorded = {file.stem: read_record(file) for file in sorted((folder / "tasks").glob("*.json"))}
    owned_paths = {path for record in recorded.values() for path in record["makes"]}
    foreign = [folder / path for task in tasks for path in task.makes if path not in owned_paths]
    if present := [path for path in foreign if path.exists()]:
        raise ValueError(f"{present[0]} is there, but no task of this study made it: move it, or choose another --out")
    if not recorded and (folder / STUDY_FILE).exists() and not _is_resolved(folder / STUDY_FILE):
        raise ValueError(f"{folder / STUDY_FILE} is there, but no study wrote it: move it, or choose another --out")
    if fresh:
        why = f"--fresh deletes what earlier tasks made in {folder}:"
        paths = owned_paths | {f"tasks/{name}.{suffix}" for name in recorded for suffix in ("json", "log")}
    else:
        changed = {task.name: change for task in tasks if (change := task.change()) is not None}
        why = "".join(f"{name} is to be done again: {change}\n" for name, change in changed.items())
        paths = {path for name in changed for path in [*recorded[name]["makes"], f"tasks/{name}.json"]}
    there = sorted(path for path in paths if (folder / path).exists())
    if any(path in owned_paths for path in there):
        listing = "".join(f"\n  {folder / path}" for path in there)
        if not confirm(f"{why.rstrip()}{listing}"):
            raise ValueError("nothing was deleted")
    for path in there:
        _delete(folder, path)
    for task in tasks:  # tasks share tables: one that makes the table anew must not do for the others
        record = task.record()
        if record is not None and record["seconds"] is not None and not (task.tolerant or task.is_done()):
            task.write_record(seconds=None)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STUDY_FILE, study.to_yaml())


def check_reuse(other: Path, folder: Path) -> None:
    """Raises ``ValueError`` unless ``other`` is the folder of another study than ``folder``'s."""
    if not (other / STUDY_FILE).exists():
        raise ValueError(f"--reuse must be the folder of a study, but {other / STUDY_FILE} is not there")
    if other.resolve() == folder.resolve():
        raise ValueError(f"--reuse must be the folder of another study, got {other}")


def reusable(tasks: Sequence[Task], other: Path, *, fresh: bool = False) -> dict[str, float]:
    """How long tasks took whose results can be copied from another study's folder, with all that they read; by name.

    None of a study that was begun, unless that begins anew (``fresh``): it continues with what it has.

    Raises:
        ValueError: if a record is damaged.
    """
    found: dict[str, float] = {}
    if not fresh and any(task.record() is not None for task in tasks):
        return found
    for task in tasks:
        if all(name in found for name in task.after) and (record := task.done_in(other)) is not None:
            found[task.name] = record["seconds"]
    return found


def _copy_done(
    tasks: Sequence[Task], seconds: Mapping[str, float], other: Path, part: Path, say: Callable[[str], None]
) -> list[tuple[Task, float, list[str]]]:
    """Copies what those tasks of which ``seconds`` are known have made in another study's folder to ``part``.

    Returns:
        Of each task, how long it took there, and the paths.
    """
    copied = []
    for task in (task for task in tasks if task.name in seconds):
        say(f"{task.name}: copied from {other}")
        paths = [path for path in task.makes if (other / path).exists() and Path(path).name != ".lock"]
        for path in paths:
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                if (other / path).is_dir():
                    shutil.copytree(other / path, part / path, symlinks=True)
                else:
                    shutil.copy2(other / path, part / path)
            except shutil.Error as error:  # of several files
                raise OSError(f"{other / path} could not be copied: {error.args[0][0][2]}") from None
        if task.config is not None:
            run = Path(task.makes[0]).parent
            _place_run(other / run / "config.yaml", task.config, part / run / "config.yaml")
        copied.append((task, seconds[task.name], paths))
    return copied


def _place_run(source: Path, planned_text: str, file: Path) -> None:
    """Writes a copied run's configuration, with the places that are planned in this study."""
    config, planned = load_run_config(source), run_config_from_yaml(planned_text, source="the plan")
    config.run_dir, config.data.store, config.init.policy = planned.run_dir, planned.data.store, planned.init.policy
    write_text(file, config.to_yaml())


def _is_resolved(file: Path) -> bool:
    """Whether this is a study as :func:`prepare_folder` writes it, not one that somebody wrote by hand."""
    try:
        return load_study(file).to_yaml() == file.read_text(encoding="utf-8")
    except ConfigError:
        return False


def _delete(folder: Path, relative: str) -> None:
    """Deletes a path in a study's folder, and the folders above it that are empty then."""
    path = folder / relative
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    for parent in list(Path(relative).parents)[:-1]:
        if (folder / parent).is_dir() and not any((folder / parent).iterdir()):
            (folder / parent).rmdir()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keeps other processes from running a study in this folder.

    Raises:
        ValueError: if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder} is in use by process {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
