"""``torchrl-sql launch``, ``status``, ``logs``, ``cancel`` and ``resume``: work on a SLURM cluster."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sql.cli.study import (
    add_study_options,
    check_commands,
    check_given_store,
    confirm,
    read_study,
    refuse_alive,
)

if TYPE_CHECKING:
    from torchrl_sql.config.cluster import ClusterConfig
    from torchrl_sql.launch.group import Group
    from torchrl_sql.launch.status import TaskState
    from torchrl_sql.studies.task import Task

KINDS = ("train", "study", "evaluate", "import", "collect", "report", "bench")
_EPILOG = """\
  torchrl-sql launch train scale=paper data.store=STORE seed=0,1,2 cluster=gpus8
  torchrl-sql launch study quickstart cluster=my_cluster.yaml
  torchrl-sql launch evaluate runs/A runs/B --shares 4 cluster=gpus1
  torchrl-sql launch import dqn-replay SOURCE --games train40 --out STORE cluster=cpu

Settings of the cluster are cluster=NAME (configs/cluster/) or cluster=FILE.yaml, and cluster.KEY=VALUE.
"""


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    launch = commands.add_parser(
        "launch",
        help="submit any of these commands to a SLURM cluster",
        description=_launch.__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_launch_options(launch)
    launch.add_argument("kind", choices=KINDS, help="what to run")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, and cluster=...")
    launch.set_defaults(run_command=_launch)

    status = commands.add_parser("status", help="state of launched jobs", description=_status.__doc__)
    status.add_argument("run", help="folder of a launch, or a job's id")
    status.set_defaults(run_command=_status)

    logs = commands.add_parser("logs", help="log of a launched job", description=_logs.__doc__)
    logs.add_argument("run", help="folder of a launch, or a job's id")
    logs.add_argument("--group", help="of a study (default: the newest that has a log)")
    logs.add_argument("--task", type=int, default=0, help="of an array (default: 0)")
    logs.add_argument("--rank", type=int, default=0, help="process of the job (default: 0)")
    logs.add_argument("--follow", action="store_true", help="until the job ends")
    logs.set_defaults(run_command=_logs)

    cancel = commands.add_parser("cancel", help="cancel launched jobs", description=_cancel.__doc__)
    cancel.add_argument("run", help="folder of a launch, or a job's id")
    cancel.add_argument("--group", help="of a study (default: all)")
    cancel.add_argument("--task", type=int, help="of an array (default: all)")
    cancel.set_defaults(run_command=_cancel)

    resume = commands.add_parser("resume", help="submit what is unfinished again", description=_resume.__doc__)
    _add_launch_options(resume, new=False)
    resume.add_argument("--new-code", action="store_true", help="run the code that is installed now, not the launch's")
    resume.add_argument("run", help="folder of a launch, or a job's id")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="cluster=... and cluster.KEY=VALUE to change")
    resume.set_defaults(run_command=_resume)


def _add_launch_options(parser: argparse.ArgumentParser, *, new: bool = True) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the batch scripts and stop")
    how.add_argument("--local", action="store_true", help="run here, in the foreground, without SLURM")
    if new:
        how.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)  # job.sh, for scripts of one's own
        parser.add_argument(
            "--into", type=Path, help="new folder (default: runs/NAME-DATE-TIME-RANDOM); of a study its own (runs/NAME)"
        )
        parser.add_argument("--yes", action="store_true", help="study: delete what is to be made again without asking")
        parser.add_argument("--shares", type=int, metavar="N", help="evaluate: elements an evaluation is split into")
        add_study_options(parser)


def _launch(args: argparse.Namespace) -> None:
    """Submits a command to a SLURM cluster, or with --local runs it here. Values separated by commas are several runs;
    a study is all of its tasks. Each launch keeps the resolved settings, its code, versions, batch scripts and logs. A
    job that reaches its time limit, is preempted or crashes is queued again and continues from its newest checkpoint.
    """
    from torchrl_sql.cli import expand_paths, parse
    from torchrl_sql.config.cluster import compose_cluster_config, split_overrides
    from torchrl_sql.launch.group import make_groups

    if args.in_job:
        _make_group_of_job(args.kind, args.arguments)
        return
    options = argparse.ArgumentParser(prog="torchrl-sql launch", add_help=False, allow_abbrev=False)
    _add_launch_options(options)
    _, words = options.parse_known_args(args.arguments, namespace=args)  # they may follow the command's own
    expand_paths(args)
    if {"-h", "--help"} & set(words):
        parse(["launch", "--help"])
    for option, kind in (("shares", "evaluate"), ("seeds", "study"), ("reuse", "study"), ("yes", "study")):
        given = getattr(args, option)
        if given is not None and given is not False and args.kind != kind:
            raise ValueError(f"--{option} belongs to launch {kind}, got it with launch {args.kind}")
    cluster_overrides, words = split_overrides(words)
    cluster = compose_cluster_config(cluster_overrides)
    command = shlex.join(["torchrl-sql", *args.words])
    if args.kind == "study":
        _launch_study(args, words, cluster, command)
        return
    root, tasks = _plan(args.kind, words, cluster.num_tasks, into=args.into, num_shares=args.shares)
    groups = make_groups(root, tasks, command=command, cluster=cluster)
    _create_and_start(groups, args)


def _create_and_start(groups: Sequence[Group], args: argparse.Namespace) -> None:
    if not args.dry_run:
        for group in groups:
            group.create()
        print(f"Launch: {groups[0].root}")
    _start(groups, {group.name: list(range(len(group.tasks))) for group in groups}, args)


def _plan(
    kind: str, words: Sequence[str], num_ranks: int, *, into: Path | None = None, num_shares: int | None = None
) -> tuple[Path, list[Task]]:
    """The folder of a new launch, and its tasks."""
    from torchrl_sql.cli import parse
    from torchrl_sql.config import compose_run_config
    from torchrl_sql.studies.plan import choose_root, expand, plan_evaluation, plan_training
    from torchrl_sql.studies.task import Task

    if kind == "train":
        _check_settings(words)
        root = choose_root(compose_run_config(expand(words)[0][1]).name, out=into)
        return root, plan_training(words, root, num_ranks=num_ranks)
    if kind == "evaluate":
        agents = list(takewhile(lambda word: not word.startswith("-"), words))
        if not agents:
            raise ValueError("launch evaluate needs runs or checkpoints before its options")
        tasks = plan_evaluation(agents, words[len(agents) :], num_shares=1 if num_shares is None else num_shares)
    else:
        tasks = [Task(name=kind, arguments=[kind, *words], group=kind)]
    for task in tasks:
        parse(task.arguments)
    return choose_root(kind, out=into), tasks


def _check_settings(words: Sequence[str]) -> None:
    if bad := [word for word in words if word.startswith("-") or "=" not in word]:
        raise ValueError(f"settings must be key=value, got {bad[0]!r}")


def _launch_study(args: argparse.Namespace, words: Sequence[str], cluster: ClusterConfig, command: str) -> None:
    """What is not done of a study; an earlier launch of it is kept as ``launch-1``, ``launch-2``, ..."""
    from torchrl_sql.launch.group import make_groups
    from torchrl_sql.studies.folder import check_reuse, owned, prepare_folder, reusable
    from torchrl_sql.studies.plan import RUNS, plan_study

    if not words or "=" in words[0] or words[0].startswith("-"):
        raise ValueError("launch study needs the study's name before its settings")
    _check_settings(words[1:])
    study = read_study(words[0], words[1:], args.seeds)
    folder = (args.into or RUNS / Path(words[0]).stem).resolve()
    tasks = plan_study(study, folder, num_ranks=cluster.num_tasks)
    check_commands(tasks)
    if args.reuse is not None:
        check_reuse(args.reuse, folder)

    def to_do(copied: Collection[str] = ()) -> list[Group]:
        left = [task for task in tasks if not task.is_done() and task.name not in copied]
        return make_groups(folder, left, command=command, cluster=cluster)

    groups = to_do(() if args.reuse is None else reusable(tasks, args.reuse))
    if args.dry_run:
        _create_and_start(groups, args)
        return
    check_given_store(tasks, elsewhere=not args.local)
    launched = folder / "launch"
    with owned(folder), owned(launched) if launched.exists() else nullcontext():
        for each in (folder, *[args.reuse] * (args.reuse is not None)):
            refuse_alive(each)
        allow = (lambda what: True) if args.yes else confirm
        prepare_folder(study, tasks, folder, reuse=args.reuse, confirm=allow, say=print)
        if launched.exists():
            number = 1 + len(list(folder.glob("launch-*")))
            launched.rename(folder / f"launch-{number}")
        _create_and_start(to_do(), args)  # again: what was deleted may have been of tasks that were done


def _make_group_of_job(kind: str, words: Sequence[str]) -> None:
    """Prints the folder of the group of this job, which a script of the user's own started: a new one in its first
    attempt, the same one later. In an array of training runs, element ``i`` takes the ``i``-th combination of values.
    """
    from torchrl_sql.launch.group import make_groups, readable_groups
    from torchrl_sql.studies.plan import RUNS, expand

    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    element = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    if array:
        job = f"{array}_{element}"
    command = shlex.join([kind, *words])
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0:
        # Ids start anew with a new cluster, so the command must be the same too.
        same = [group for group in readable_groups(RUNS) if group.command == command]
        if own := [group for group in same if any(each.job == job for each in group.submissions)]:
            print(max(own, key=lambda group: group.created).folder)
            return
    if kind == "train":
        combinations = expand(words)
        if not array and len(combinations) > 1:
            raise ValueError(f"{len(combinations)} combinations of settings: sbatch --array=0-{len(combinations) - 1}")
        if element >= len(combinations):
            raise ValueError(f"array element {element} has no settings: there are {len(combinations)} combinations")
        words = combinations[element][1]
    root, tasks = _plan(kind, words, int(os.environ.get("SLURM_NTASKS", 1)))
    (group,) = make_groups(root, tasks, command=command, cluster=None)
    group.create()
    group.add_submission(job, [0])
    print(group.folder)


def _start(groups: Sequence[Group], to_do: Mapping[str, Sequence[int]], args: argparse.Namespace) -> None:
    """Submits tasks, each after those that it waits for; or runs or prints them."""
    from torchrl_sql.launch.group import Submission
    from torchrl_sql.launch.local import run_local
    from torchrl_sql.launch.slurm import Place, script_text, split, submit

    if args.local:
        run_local(groups, to_do, say=print)
        return
    places = {
        group.tasks[index].name: Place(submission, index)
        for group in groups
        for index in range(len(group.tasks))
        if index not in to_do[group.name]
        and not group.task_folder(index).done
        and (submission := group.last_submission(index)) is not None
    }
    for group in groups:
        for number, (tasks, dependency) in enumerate(split(group, to_do[group.name], places)):
            if args.dry_run:
                print(script_text(group, tasks, dependency=dependency), end="")
                job = "_".join(["JOB_OF", group.name.upper(), *[str(number)] * (number > 0)])
                submission = Submission(job=job, tasks=tasks, submitted="")
            else:
                print(f"{group.name}: job {submit(group, tasks, dependency=dependency)}, {len(tasks)} tasks")
                submission = group.submissions[-1]
            places |= {group.tasks[index].name: Place(submission, index) for index in tasks}
    if not args.dry_run:
        root = shlex.quote(str(groups[0].root))
        print(f"Next: torchrl-sql status {root}, torchrl-sql logs --follow {root}")


def _groups(run: str) -> list[Group]:
    from torchrl_sql.launch.group import find_groups, find_launch

    return find_groups(find_launch(run))


def _alive(groups: Sequence[Group]) -> list[TaskState]:
    from torchrl_sql.launch.status import task_states

    return [state for group in groups for state in task_states(group) if state.is_alive]


def _status(args: argparse.Namespace) -> None:
    """Shows the state, restarts and newest checkpoint of each task of a launch."""
    from torchrl_sql.launch.status import format_states, task_states

    print(format_states([state for group in _groups(args.run) for state in task_states(group)]))


def _logs(args: argparse.Namespace) -> None:
    """Prints the log of a task; with --follow as it is written, through every restart."""
    from torchrl_sql.launch.status import follow, log_file

    groups = [
        group for group in _groups(args.run) if args.group in (None, group.name) and 0 <= args.task < len(group.tasks)
    ]
    started = [group for group in groups if log_file(group, args.task, rank=args.rank) is not None]
    if not groups or (not started and not args.follow):
        raise ValueError(
            f"{args.run} has no log of task {args.task}, rank {args.rank}" + f" of {args.group}" * bool(args.group)
        )
    group = (started or groups)[-1]
    if not args.follow:
        path = log_file(group, args.task, rank=args.rank)
        assert path is not None
        print(path.read_text(encoding="utf-8", errors="replace"), end="")
        return
    for text in follow(group, args.task, rank=args.rank):
        print(text, end="", flush=True)


def _cancel(args: argparse.Namespace) -> None:
    """Cancels what a launch has not finished. It is not queued again, whatever signal is on its way to it."""
    from torchrl_sql.launch.slurm import cancel
    from torchrl_sql.launch.status import task_states

    jobs = []
    for group in reversed(_groups(args.run)):  # those that wait for others first
        for state in task_states(group):
            if state.is_alive and args.group in (None, group.name) and args.task in (None, state.number):
                submission = group.last_submission(state.number)
                assert submission is not None
                group.task_folder(state.number).write("cancelled", str(group.submissions.index(submission)))
                jobs.append(state.job)
    if not jobs:
        parts = [f"{key} {value}" for key, value in (("group", args.group), ("task", args.task)) if value is not None]
        raise ValueError(f"nothing of {', '.join([args.run, *parts])} is pending or running")
    cancel(jobs)
    print(f"Cancelled: {' '.join(jobs)}")


def _resume(args: argparse.Namespace) -> None:
    """Submits the unfinished tasks of a launch again: cancelled, failed, stopped or never submitted ones. They continue
    from their newest checkpoints, with the settings and the code that they were launched with.
    """
    from torchrl_sql.launch.group import find_groups
    from torchrl_sql.studies.folder import owned

    root = _groups(args.run)[0].root
    with nullcontext() if args.dry_run else owned(root / "launch"):  # two at once would give submissions one number
        _submit_unfinished(find_groups(root), args)


def _submit_unfinished(groups: Sequence[Group], args: argparse.Namespace) -> None:
    from torchrl_sql.config import check_ranks, load_run_config
    from torchrl_sql.config.cluster import compose_cluster_config, override_cluster_config
    from torchrl_sql.launch.group import freeze_code, unfinished
    from torchrl_sql.launch.slurm import cancel, resources

    alive = {state.task: state for state in _alive(groups)}
    to_do = unfinished(groups, alive)
    if not any(to_do.values()):
        for name, state in alive.items():
            raise ValueError(f"{args.run} is not over: {name} is {state.state}, job {state.job}")
        print(f"{args.run} is finished")
        return
    stale = [
        alive[name] for group in groups for index in to_do[group.name] if (name := group.tasks[index].name) in alive
    ]
    if args.new_code and len(alive) > len(stale):
        raise ValueError(f"--new-code needs a launch that is over, but {next(iter(alive))} is not")
    for group in groups:
        if not to_do[group.name]:
            continue
        if group.cluster is None or any(override.startswith("cluster=") for override in args.overrides):
            group.cluster = compose_cluster_config(args.overrides)
        else:
            group.cluster = override_cluster_config(group.cluster, args.overrides)
        for index in to_do[group.name]:
            if group.kind == "train":
                config = load_run_config(group.task_folder(index).path / "config.yaml")
                check_ranks(config, resources(group.cluster, group.tasks[index]).num_tasks)
    if not args.dry_run:
        if stale:
            cancel([state.job for state in stale])
        if args.new_code:
            groups[0].code.rename(groups[0].code.with_name(f"code-before-{datetime.now():%Y%m%d-%H%M%S}"))
            freeze_code(groups[0].code)
        for group in groups:
            group.save()
            for index in to_do[group.name]:
                group.task_folder(index).clear_for_resume()
    _start(groups, to_do, args)
