"""``torchrl-sql collect``, ``import``, ``verify``, ``inspect``, ``convert`` and ``export``."""

from __future__ import annotations

import argparse
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torchrl_sql.cli.train import OVERRIDES_HELP
from torchrl_sql.files import check_exists


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    collect = commands.add_parser(
        "collect", help="make a store of emulator data with behaviour policies", description=_collect.__doc__
    )
    collect.add_argument("overrides", nargs="+", metavar="key=value", help=OVERRIDES_HELP)
    collect.set_defaults(run_command=_collect)

    importer = commands.add_parser("import", help="read a data set of others into a store", description=_import.__doc__)
    importer.fill = _add_formats
    importer.set_defaults(run_command=_import)

    verify = commands.add_parser("verify", help="compare every checksum of a store", description=_verify.__doc__)
    verify.add_argument("store", type=Path, help="folder of the store")
    verify.set_defaults(run_command=_verify)

    summary = commands.add_parser("inspect", help="show what a store holds", description=_inspect.__doc__)
    summary.add_argument("store", type=Path, help="folder of the store")
    summary.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="draw frames of each game there")
    summary.add_argument("--returns", type=Path, metavar="FILE.png", help="draw each game's returns over its steps")
    summary.set_defaults(run_command=_inspect)

    convert = commands.add_parser("convert", help="write a store with another codec", description=_convert.__doc__)
    convert.add_argument("store", type=Path, help="folder of the store")
    convert.add_argument("--codec", choices=("zstd", "lz4"), required=True, help="zstd is smaller, lz4 faster to read")
    convert.add_argument("--out", type=Path, required=True, help="the new store")
    convert.set_defaults(run_command=_convert)

    export = commands.add_parser(
        "export", help="write a part of a store as TorchRL transitions", description=_export.__doc__
    )
    export.add_argument("store", type=Path, help="folder of the store")
    export.add_argument("--out", type=Path, required=True, help="the new folder, for TensorDict.load_memmap")
    export.add_argument("--games", help="e.g. Breakout,Pong (default: all of the store)")
    export.add_argument("--dqn-replay", action="store_true", help="whole recordings, as DQN-Replay's files")
    part = export.add_argument_group("which transitions", argument_default=argparse.SUPPRESS)
    part.add_argument("--first-fraction", type=float, help="the first part of each run, in (0, 1] (default: 1)")
    part.add_argument("--last-fraction", type=float, help="the last part of each run, in (0, 1] (default: 1)")
    part.add_argument("--every-kth-episode", type=int, help="the episodes 0, K, 2K, ... of each run (default: 1)")
    part.add_argument("--transitions-per-game", type=int, help="the first so many of what is left of each game")
    part.add_argument("--n-steps", type=int, help="steps of the returns (default: 1)")
    part.add_argument("--gamma", type=float, help="discount of the returns (default: 0.99)")
    export.set_defaults(run_command=_export)


def _collect(args: argparse.Namespace) -> None:
    """Fills data.store with episodes of scripted behaviour policies, as the collection settings say."""
    from torchrl_sql.config import compose_run_config

    config = compose_run_config(args.overrides)  # before torch is imported: a mistake is named at once
    from torchrl_sql.collection import collect_data

    store = collect_data(config)
    _print_store(store.path)


def _add_formats(importer: argparse.ArgumentParser) -> None:
    """Adds a parser per format, whose options are the keyword arguments that the format names."""
    from torchrl_sql.data import importers

    parsers = importer.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for format in importers.formats().values():
        parser = parsers.add_parser(format.name, help=format.summary, description=_import.__doc__)
        parser.add_argument("source", metavar="SOURCE", help=format.summary)
        parser.add_argument("--out", type=Path, required=True, help="the store; made if absent")
        parser.add_argument("--codec", choices=("zstd", "lz4"), help="of a new store (default: zstd)")
        types, parameters = get_type_hints(format.read), inspect.signature(format.read).parameters
        for option, text in format.options.items():
            kinds = [types[option], *get_args(types[option])]  # X | None has the arguments X and None
            choices = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
            parser.add_argument(
                f"--{option.replace('_', '-')}",
                help=text,
                type=int if int in kinds else str,
                choices=choices[0] if choices else None,
                required=parameters[option].default is inspect.Parameter.empty,
                default=argparse.SUPPRESS,
            )
        parser.set_defaults(read=format.read, options=tuple(format.options))


def _import(args: argparse.Namespace) -> None:
    """Reads a data set of others into a store. The same command continues an import that was stopped."""
    new = not args.out.exists()
    try:
        _read_into_store(args)
    finally:
        if new:
            _remove_if_empty(args.out)


def _remove_if_empty(store: Path) -> None:
    """Leaves nothing of an import that brought nothing, e.g. from a folder that is not there."""
    from torchrl_sql.data.catalogue import LOCK_FILE, RECORDINGS_FILE

    names = {entry.name for entry in store.iterdir()} if store.is_dir() else set()
    if names == {"store.json", LOCK_FILE, RECORDINGS_FILE} and not (store / RECORDINGS_FILE).read_bytes():
        shutil.rmtree(store)


def _read_into_store(args: argparse.Namespace) -> None:
    from torchrl_sql.data import FrameStore, importers

    if args.codec is not None:
        store = FrameStore.create(args.out, codec=args.codec, exist_ok=True)
        if store.encoding.codec != args.codec:
            raise ValueError(
                f"{args.out} is in {store.encoding.codec} already, got --codec {args.codec}: leave it out, and "
                "`torchrl-sql convert` the store when it is whole"
            )
    failed: importers.ImportFailedError | None = None
    options = {name: getattr(args, name) for name in args.options if hasattr(args, name)}
    try:
        summaries = args.read(args.source, args.out, progress=True, **options)
    except importers.ImportFailedError as error:
        failed, summaries = error, list(error.summaries)
    if summaries:
        print(importers.summary_table(summaries))
    if failed is not None:
        from torchrl_sql.launch.job import is_transient

        may_pass = any(is_transient(error, has_checkpoint=False) for error in failed.failures.values())
        raise OSError(failed) if may_pass else ValueError(failed)


def _verify(args: argparse.Namespace) -> None:
    """Reads a whole store once, compares every checksum and names each damaged part, and actions that are not legal."""
    import numpy as np

    check_exists(args.store)
    from torchrl_sql.data import FrameStore, verify
    from torchrl_sql.games import NUM_ACTIONS, illegal_actions

    store = FrameStore.open(args.store)
    with _bar("verify", "file") as progress:
        damages = list(verify(store, progress=progress))
    for damage in damages:
        print(damage)
    if damages:
        raise ValueError(f"{len(damages)} damaged parts in {args.store}")
    print(f"{args.store} is intact")
    for recording in store.recordings:
        counts = np.bincount(recording.actions, minlength=NUM_ACTIONS)
        if illegal := illegal_actions(recording.game, counts.tolist()):
            print(f"{recording.game}, run {recording.name!r}: not legal in this game, act as NOOP: {illegal}")


def _inspect(args: argparse.Namespace) -> None:
    """Shows transitions, episodes, returns, actions and bytes of each game in a store; as pictures its frames, and the
    returns over an agent's life.
    """
    check_exists(args.store)
    from torchrl_sql.data import FrameStore, summarise
    from torchrl_sql.data.summary import draw_contact_sheets, draw_lives

    for option, file in (("--contact-sheet", args.contact_sheet), ("--returns", args.returns)):
        if file is not None and file.suffix.lower() != ".png":
            raise ValueError(f"{option} must name a .png file, got {file}")
    _print_store(args.store)
    for file in (args.returns, args.contact_sheet):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if args.returns is not None:
        draw_lives(list(summarise(FrameStore.open(args.store)))).save(args.returns)
        print(f"Returns: {args.returns}")
    if args.contact_sheet is not None:
        draw_contact_sheets(FrameStore.open(args.store)).save(args.contact_sheet)
        print(f"Frames: {args.contact_sheet}")


def _convert(args: argparse.Namespace) -> None:
    """Writes a store with another codec, the same transitions. The same command continues one that was stopped."""
    check_exists(args.store)
    from torchrl_sql.data import FrameStore, convert

    store = FrameStore.open(args.store)
    with _bar("convert", "frame") as progress:
        convert(store, args.out, codec=args.codec, progress=progress)
    _print_store(args.out)


def _export(args: argparse.Namespace) -> None:
    """Writes a part of a store as memory-mapped transitions, 56 KB each, that plain TorchRL reads; with --dqn-replay
    whole recordings in the file format of DQN-Replay.
    """
    check_exists(args.store)
    from torchrl_sql.data import AtariFrameStorage, FrameStore, export_dqn_replay, export_memmap

    names = ("n_steps", "gamma", "first_fraction", "last_fraction", "every_kth_episode", "transitions_per_game")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.dqn_replay:
        if options:
            raise ValueError(f"--dqn-replay writes whole recordings, got --{next(iter(options)).replace('_', '-')}")
        store = FrameStore.open(args.store)
        with _bar("export", "row") as progress:
            folders = export_dqn_replay(store, args.out, args.games, progress=progress)
        for folder in folders:
            print(f"{folder}: checkpoints 0-{len(list(folder.glob('add_count_ckpt.*.gz'))) - 1}")
        return
    storage = AtariFrameStorage(args.store, args.games, **options)
    with _bar("export", "tr") as progress:
        num_bytes = export_memmap(storage, args.out, progress=progress)
    print(f"{len(storage):,} transitions of {', '.join(storage.games)}, {num_bytes / 1e6:,.1f} MB: {args.out}")


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal; yields what it is told by: how much is done, and how much there is."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _print_store(path: Path) -> None:
    from torchrl_sql.data import FrameStore, summarise
    from torchrl_sql.data.summary import format_summaries

    store = FrameStore.open(path)
    print(format_summaries(list(summarise(store)), codec=store.encoding.codec))
