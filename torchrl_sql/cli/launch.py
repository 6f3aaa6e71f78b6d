"""``torchrl-sql launch``, ``status``, ``logs``, ``cancel`` and ``resume``: work on a SLURM cluster."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_sql.launch.group import Stage
    from torchrl_sql.launch.plan import PlannedTask

KINDS = ("train", "sweep", "evaluate", "import", "collect", "report", "bench", "chain")
_EPILOG = """\
  torchrl-sql launch train scale=paper model.encoder=resnet50 data.store=STORE cluster=gpus8
  torchrl-sql launch sweep scale=gpu seed=0,1,2 cluster=gpus8 cluster.array_parallelism=2
  torchrl-sql launch evaluate runs/A runs/B --shares 4 cluster=gpus1
  torchrl-sql launch import dqn-replay SOURCE --games train40 --out STORE cluster=cpu
  torchrl-sql launch chain scale=cpu data.store=STORE seed=0,1,2 cluster=my_cluster.yaml

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
    launch.add_argument("kind", choices=KINDS, help="what to run; sweep: train with several values, KEY=A,B")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, and cluster=...")
    launch.set_defaults(run_command=_launch)

    status = commands.add_parser("status", help="state of launched jobs", description=_status.__doc__)
    status.add_argument("run", help="folder of a launch, or a job's id")
    status.set_defaults(run_command=_status)

    logs = commands.add_parser("logs", help="log of a launched job", description=_logs.__doc__)
    logs.add_argument("run", help="folder of a launch, or a job's id")
    logs.add_argument("--stage", help="of a chain (default: the newest that has a log)")
    logs.add_argument("--task", type=int, default=0, help="of an array (default: 0)")
    logs.add_argument("--rank", type=int, default=0, help="process of the job (default: 0)")
    logs.add_argument("--follow", action="store_true", help="until the job ends")
    logs.set_defaults(run_command=_logs)

    cancel = commands.add_parser("cancel", help="cancel launched jobs", description=_cancel.__doc__)
    cancel.add_argument("run", help="folder of a launch, or a job's id")
    cancel.add_argument("--task", type=int, help="of an array (default: all)")
    cancel.set_defaults(run_command=_cancel)

    resume = commands.add_parser("resume", help="submit what is unfinished again", description=_resume.__doc__)
    _add_launch_options(resume, into=False)
    resume.add_argument("run", help="folder of a launch, or a job's id")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="cluster=... and cluster.KEY=VALUE to change")
    resume.set_defaults(run_command=_resume)


def _add_launch_options(parser: argparse.ArgumentParser, *, into: bool = True) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the batch scripts and stop")
    how.add_argument("--local", action="store_true", help="run here, in the foreground, without SLURM")
    if into:
        parser.add_argument("--into", type=Path, help="new folder of the launch (default: runs/NAME-DATE-TIME-RANDOM)")
        parser.add_argument("--import", dest="source", metavar="ARGUMENTS", help="chain: of torchrl-sql import")
        parser.add_argument(
            "--shares", type=int, metavar="N", help="evaluate, chain: elements an evaluation is split into"
        )


def _launch(args: argparse.Namespace) -> None:
    """Submits a command to a SLURM cluster, or with --local runs it here. Each launch makes a folder of its own, with
    the resolved settings, the state of the code, versions, batch scripts and logs. A job that reaches its time limit,
    is preempted or crashes is queued again and continues from its newest checkpoint.
    """
    from torchrl_sql.cli import parse
    from torchrl_sql.config import check_ranks, run_config_from_yaml
    from torchrl_sql.config.cluster import compose_cluster_config, split_overrides
    from torchrl_sql.launch.group import new_stage
    from torchrl_sql.launch.plan import choose_root, plan_command, plan_evaluation, plan_training

    options = argparse.ArgumentParser(prog="torchrl-sql launch", add_help=False, allow_abbrev=False)
    _add_launch_options(options)
    _, words = options.parse_known_args(args.arguments, namespace=args)  # they may follow the command's own
    if {"-h", "--help"} & set(words):
        parse(["launch", "--help"])
    if args.source is not None and args.kind != "chain":
        raise ValueError(f"--import belongs to launch chain, got it with launch {args.kind}")
    if args.shares is not None and args.kind not in ("evaluate", "chain"):
        raise ValueError(f"--shares belongs to launch evaluate and chain, got it with launch {args.kind}")
    num_shares = 1 if args.shares is None else args.shares
    cluster_overrides, words = split_overrides(words)
    cluster = compose_cluster_config(cluster_overrides)
    planned: dict[str, list[PlannedTask]]
    if args.kind in ("train", "sweep", "chain"):
        if bad := [word for word in words if word.startswith("-") or "=" not in word]:
            raise ValueError(f"settings must be key=value, got {bad[0]!r}")
        root = choose_root(plan_training(words, Path("unnamed"))[0].name, out=args.into)
        planned = {"train": plan_training(words, root)}
        for task in planned["train"]:
            assert task.config is not None
            check_ranks(run_config_from_yaml(task.config, source=task.task.label), cluster.num_tasks)
        if (len(planned["train"]) > 1) != (args.kind == "sweep") and args.kind != "chain":
            found = f"{len(planned['train'])} combinations of settings"
            raise ValueError(f"launch train takes one, launch sweep several, got launch {args.kind} with {found}")
        if args.kind == "chain":
            planned = _plan_chain(words, planned["train"], root, source=args.source, num_shares=num_shares)
    else:
        root = choose_root(args.kind, out=args.into)
        if args.kind == "evaluate":
            agents = list(takewhile(lambda word: not word.startswith("-"), words))
            if not agents:
                raise ValueError("launch evaluate needs runs or checkpoints before its options")
            planned = {"evaluate": plan_evaluation(agents, words[len(agents) :], num_shares=num_shares)}
        else:
            planned = {args.kind: [plan_command(args.kind, words)]}
    command = shlex.join(["torchrl-sql", *args.words])
    delay = cluster.signal_delay_seconds / 2
    stages = [
        new_stage(root, kind, [p.task for p in tasks], command=command, stop_seconds=delay, cluster=cluster)
        for kind, tasks in planned.items()
    ]
    if not args.dry_run:
        for stage, tasks in zip(stages, planned.values(), strict=True):
            stage.create([p.config for p in tasks])
        print(f"Launch: {root}")
    _start(stages, args)


def _plan_chain(
    words: Sequence[str], training: list[PlannedTask], root: Path, *, source: str | None, num_shares: int
) -> dict[str, list[PlannedTask]]:
    """Data, training, evaluation, report, in this order."""
    from torchrl_sql.config import compose_run_config
    from torchrl_sql.launch.plan import expand_sweep, plan_command, plan_evaluation

    first = expand_sweep(words)[0][1]
    config = compose_run_config(first)
    data: dict[str, list[PlannedTask]] = {}
    if source is not None:
        data["import"] = [plan_command("import", [*shlex.split(source), "--out", config.data.store])]
    else:
        data["collect"] = [plan_command("collect", first)]
    runs = [planned.task.run_dir for planned in training if planned.task.run_dir is not None]
    evaluations = plan_evaluation(runs, [], num_shares=num_shares)
    report = plan_command("report", [*runs, "--out", str(root.resolve() / "report.html")])
    return data | {"train": training, "evaluate": evaluations, "report": [report]}


def _start(stages: Sequence[Stage], args: argparse.Namespace) -> None:
    """Submits the unfinished tasks of stages, each after the one before; or runs or prints them."""
    from torchrl_sql.launch.local import run_local
    from torchrl_sql.launch.slurm import script_text, submit

    after: str | None = None
    for stage in stages:
        if args.dry_run:
            print(script_text(stage, stage.unfinished, after=after), end="")
            after = f"JOB_OF_{stage.kind.upper()}"
        elif args.local:
            run_local(stage, stage.unfinished)
        else:
            after = submit(stage, stage.unfinished, after=after)
            print(f"{stage.kind}: job {after}, {len(stage.submissions[-1].tasks)} tasks")
    if not args.dry_run and not args.local:
        root = stages[0].folder.parents[1]
        print(f"Next: torchrl-sql status {root}, torchrl-sql logs --follow {root}")


def _stages(run: str) -> list[Stage]:
    from torchrl_sql.launch.group import find_launch, find_stages

    return find_stages(find_launch(run))


def _status(args: argparse.Namespace) -> None:
    """Shows the state, restarts and newest checkpoint of each task of a launch."""
    from torchrl_sql.launch.status import format_states, task_states

    print(format_states([state for stage in _stages(args.run) for state in task_states(stage)]))


def _logs(args: argparse.Namespace) -> None:
    """Prints the log of a task; with --follow as it is written, through every restart."""
    from torchrl_sql.launch.status import follow, log_file

    stages = [stage for stage in _stages(args.run) if args.stage in (None, stage.kind)]
    started = [stage for stage in stages if log_file(stage, args.task, rank=args.rank) is not None]
    if not stages or (not started and not args.follow):
        raise ValueError(
            f"{args.run} has no log of task {args.task}, rank {args.rank}" + f" of {args.stage}" * bool(args.stage)
        )
    stage = (started or stages)[-1]
    if not args.follow:
        path = log_file(stage, args.task, rank=args.rank)
        assert path is not None
        print(path.read_text(encoding="utf-8", errors="replace"), end="")
        return
    for text in follow(stage, args.task, rank=args.rank):
        print(text, end="", flush=True)


def _cancel(args: argparse.Namespace) -> None:
    """Cancels what a launch has not finished. It is not queued again, whatever signal is on its way to it."""
    from torchrl_sql.launch.status import last_submission, task_states

    jobs = []
    for stage in reversed(_stages(args.run)):  # those that wait for others first
        for state in task_states(stage):
            if state.is_alive and args.task in (None, state.number):
                submission = last_submission(stage, state.number)
                assert submission is not None
                stage.task_folder(state.number).write("cancelled", str(stage.submissions.index(submission)))
                jobs.append(state.job)
    if not jobs:
        raise ValueError(f"nothing of {args.run} is pending or running")
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")
    print(f"Cancelled: {' '.join(jobs)}")


def _resume(args: argparse.Namespace) -> None:
    """Submits the unfinished tasks of a launch again: cancelled, failed or stopped ones. They continue from their
    newest checkpoints, with the settings that they were launched with.
    """
    from torchrl_sql.config import check_ranks, load_run_config
    from torchrl_sql.config.cluster import compose_cluster_config, override_cluster_config
    from torchrl_sql.launch.status import task_states

    stages = _stages(args.run)
    alive = [state for stage in stages for state in task_states(stage) if state.is_alive]
    if alive:
        raise ValueError(f"{args.run} is not over: job {alive[0].job} is {alive[0].state}")
    stages = [stage for stage in stages if stage.unfinished]
    if not stages:
        print(f"{args.run} is finished")
        return
    for stage in stages:
        if stage.cluster is None or any(override.startswith("cluster=") for override in args.overrides):
            stage.cluster = compose_cluster_config(args.overrides)
        else:
            stage.cluster = override_cluster_config(stage.cluster, args.overrides)
        if stage.kind == "train":
            for index in stage.unfinished:
                config = load_run_config(stage.task_folder(index).path / "config.yaml")
                check_ranks(config, stage.cluster.num_tasks)
        stage.stop_seconds = stage.cluster.signal_delay_seconds / 2
        if not args.dry_run:
            stage.save()
            for index in stage.unfinished:
                stage.task_folder(index).clear_for_resume()
    _start(stages, args)
