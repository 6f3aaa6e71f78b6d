"""``torchrl-sql quickstart`` and ``study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sql.arguments import check_count
from torchrl_sql.cli.train import OVERRIDES_HELP
from torchrl_sql.files import expand_path

if TYPE_CHECKING:
    from torchrl_sql.config.study import StudyConfig
    from torchrl_sql.studies.task import Task


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    quickstart = commands.add_parser(
        "quickstart",
        help="collect, train, evaluate and report, at small scale, in one go",
        description=_quickstart.__doc__,
    )
    quickstart.add_argument("--seed", type=int, help="of data, training and evaluation (default: 0)")
    _add_options(quickstart)
    quickstart.set_defaults(run_command=_quickstart, name="quickstart")

    study = commands.add_parser(
        "study", help="several runs, their seeds and evaluations, and the page about them", description=_study.__doc__
    )
    study.add_argument("name", metavar="STUDY", help="a name in configs/study/, or FILE.yaml")
    add_study_options(study)
    _add_options(study)
    study.set_defaults(run_command=_study)


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--seeds`` and ``--reuse``."""
    parser.add_argument("--seeds", type=_numbers, metavar="0,1,...", help="of training (default: the study's)")
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="FOLDER",
        help="of another study, whose data and runs this begins with",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder (default: runs/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tasks side by side (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="list the tasks and stop")
    parser.add_argument("--fresh", action="store_true", help="delete what it made earlier, and start over")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def read_study(name: str, overrides: Sequence[str], seeds: Sequence[int] | None) -> StudyConfig:
    """A study with its scale, its store, settings of all its runs, and seeds, from the command line.

    Data that the study collects keeps the seed of its file, so that seeds trained apart see the same.

    Raises:
        ConfigError: for a study or settings that cannot be, and for settings that runs of the study decide.
    """
    from torchrl_sql.config import ConfigError
    from torchrl_sql.config.study import check_study, combined, find_study, load_study, setting_key

    given = {setting_key(word): word.partition("=")[2] for word in overrides}
    study = load_study(find_study(name), scale=given.get("scale"), store=given.get("data.store"))
    rest = [word for word in overrides if setting_key(word) not in ("scale", "data.store")]
    for key in map(setting_key, rest):
        if own := [run for run, each in study.runs.items() if key in map(setting_key, each.set)]:
            raise ConfigError(
                f"{key} is not one for all runs, {', '.join(own)} of {name} set it: use a copy of its file"
            )
    data_seed = [f"collection.seed={study.seeds[0]}"] if seeds else []
    changed = replace(study, common=combined(data_seed, study.common, rest), seeds=list(seeds or study.seeds))
    check_study(changed)
    if study.report.probes:
        from torchrl_sql.envs.labels import LABELS  # imports torch

        if unlabelled := [game for game in study.report.probes if game not in LABELS]:
            raise ConfigError(f"report.probes must be games with labels ({', '.join(LABELS)}), got {unlabelled[0]!r}")
    return changed


def _quickstart(args: argparse.Namespace) -> None:
    """Run the method end to end at small scale.

    Collects emulator data, trains one network for all games with CQL + C51 and one by behavioural cloning, evaluates
    them in the emulator and writes report.html. Run again, it continues where it was.
    """
    if args.seed is not None:
        args.seeds, args.overrides = [args.seed], [*args.overrides, f"collection.seed={args.seed}"]
    else:
        args.seeds = None
    args.reuse = None
    _study(args)


def _study(args: argparse.Namespace) -> None:
    """Train, evaluate and compare the runs of a study, of configs/study/NAME.yaml or a file of your own.

    Run again, it continues: what is done stays, what changed is done again.
    """
    from torchrl_sql.studies.folder import check_reuse, format_tasks, run_study
    from torchrl_sql.studies.plan import RUNS, plan_study

    check_count("--jobs", args.jobs)
    study = read_study(args.name, args.overrides, args.seeds)
    folder = args.out or RUNS / Path(args.name).stem
    tasks = plan_study(study, folder)
    check_commands(tasks)
    if args.reuse is not None:
        check_reuse(args.reuse, folder)
    if args.dry_run:
        print(format_tasks(tasks, fresh=args.fresh, reuse=args.reuse))
        return
    check_given_store(tasks)
    for each in (folder, *[args.reuse] * (args.reuse is not None)):
        try:
            refuse_alive(each)
        except OSError as error:
            print(f"Make sure yourself that no launched job of {each} is left: {error}")
    run_study(
        study,
        tasks,
        folder,
        num_jobs=args.jobs,
        fresh=args.fresh,
        reuse=args.reuse,
        confirm=(lambda what: True) if args.yes else confirm,
        say=lambda line: print(line, flush=True),
    )


def check_commands(tasks: Sequence[Task]) -> None:
    """Checks that tasks can be understood as commands; those of a group differ by their seed.

    Raises:
        SystemExit: if one is not; it has been printed.
    """
    from torchrl_sql.cli import parse

    for task in {task.group: task for task in tasks}.values():
        parse(task.arguments)


def check_given_store(tasks: Sequence[Task], *, elsewhere: bool = False) -> None:
    """Checks that the store that a study was given has the games of the runs that are to do.

    Args:
        tasks (sequence of Task): of the study.

    Keyword Args:
        elsewhere (bool): they run on other machines: a store that is not on this one is left to them.

    Raises:
        FileNotFoundError: if there is no such store.
        ValueError: if it has not all of these games.
    """
    to_do = [task.settings for task in tasks if task.kind == "train" and "data" in task.settings and not task.is_done()]
    if not to_do or (elsewhere and not Path(to_do[0]["data"]).exists()):
        return
    from torchrl_sql.data import FrameStore  # imports torch

    store = FrameStore.open(expand_path(to_do[0]["data"]))
    for game in dict.fromkeys(game for settings in to_do for game in settings["data.games"]):
        store.recordings_of(game)


def refuse_alive(folder: Path) -> None:
    """Checks that no launched job works on a study.

    Raises:
        ValueError: if one does, or will.
        OSError: if SLURM does not answer.
    """
    from torchrl_sql.launch.group import find_groups
    from torchrl_sql.launch.status import task_states

    for group in find_groups(folder) if (folder / "launch").exists() else ():
        if alive := [state for state in task_states(group) if state.is_alive]:
            raise ValueError(f"{folder} is not over: {alive[0].task} is {alive[0].state}, job {alive[0].job}")


def confirm(what: str) -> bool:
    """Asks on a terminal.

    Raises:
        ValueError: elsewhere.
    """
    if not sys.stdin.isatty():
        raise ValueError(f"{what}\nGive --yes to delete this, or --out for another folder")
    return input(f"{what}\nDelete this? [y/N] ").strip().lower() in ("y", "yes")
