"""Random damages of a small store, and what becomes of each: named, harmless, or wrong data in silence.

    python benchmarks/store_damage.py --json store_damage.json

A store of three recordings of two games, of several commits each, is copied, damaged in one random way and judged in a
forked child: ``verify`` reads it, then all transitions are read with n = 1 and n = 3, summaries are made and writers
are opened. In the kinds marked live, everything is mapped and read before the damage is done.

- named: ``verify``, or opening the store, says what is wrong with which file;
- harmless: ``verify`` finds nothing, and every transition is what was written;
- earlier: ``verify`` finds nothing, and every recording is exactly what it was after one and the same earlier commit:
  a copy whose list of recordings and manifests were all taken before the next one;
- wrong: ``verify`` finds nothing, but something else is read;
- unnamed: an error that names no file of the store, or is neither ValueError nor OSError;
- dead: the interpreter.

Beside it: how often reading alone, without ``verify`` before, gave other data (``unnoticed``): the flat files have one
checksum each, which only ``verify`` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from torchrl_sql.data import AtariFrameStorage, FrameStore, summarise, verify
from torchrl_sql.data.frames import Codec
from torchrl_sql.provenance import describe_benchmark

RECORDINGS = (("Pong", "0"), ("Pong", "1"), ("Breakout", "0"))
OUTCOMES = ("named", "harmless", "earlier", "wrong", "unnamed", "dead")


def build(folder: Path, codec: Codec) -> None:
    """``folder/store``, ``folder/other`` with other contents, and ``folder/commitK``, the store after commit K."""
    for name, first_tag in (("store", 0), ("other", 100_000)):
        rng = np.random.default_rng(first_tag)
        store = FrameStore.create(folder / name, codec=codec, chunk_frames=4, shard_frames=16)
        for commit in range(3):
            for index, (game, run) in enumerate(RECORDINGS):
                with store.writer(game, run=run, source=name) as writer:
                    for _ in range(3):
                        num_steps = int(rng.integers(3, 12))
                        frames = np.zeros((num_steps + int(rng.integers(2)), 84, 84), np.uint8)
                        tags = first_tag + 10_000 * index + writer.num_steps + np.arange(len(frames))
                        frames[:, 0, :4] = tags.astype("<u4").view(np.uint8).reshape(-1, 4)
                        frames[:, 30:34] = rng.integers(0, 256, (len(frames), 4, 84))
                        actions, rewards = rng.integers(0, 2, num_steps), rng.integers(-1, 2, num_steps)
                        writer.add_episode(frames, actions, rewards.astype("f4"), bool(rng.integers(2)))
            if name == "store" and commit < 2:
                shutil.copytree(folder / name, folder / f"commit{commit}")


def read(store: FrameStore, live: AtariFrameStorage | None = None) -> dict[str, str]:
    """SHA-256 of everything that can be read of each recording."""
    digests = {}
    storages = [live] if live is not None else [AtariFrameStorage(store, n_steps=n) for n in (1, 3)]
    wholes = [storage[:] for storage in storages]
    for game in storages[0].games:
        digest = hashlib.sha256()
        for storage, whole in zip(storages, wholes, strict=True):
            rows = whole[whole["game_id"] == storage.games.index(game)]
            for _, value in sorted(rows.flatten_keys().items()):
                digest.update(value.contiguous().numpy().tobytes())
        digests[game] = digest.hexdigest()
    if live is None:
        for summary in summarise(store):
            digests[summary.game] += hashlib.sha256(pickle.dumps((summary.returns, summary.action_counts))).hexdigest()
    return digests


# Damages: each changes the store and says what it did.

Damage = Callable[[random.Random, Path, Path], str]


def any_file(rng: random.Random, store: Path) -> Path:
    """One file of the store, each name as likely as any other."""
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock"]
    kind = rng.choice(sorted({path.name for path in files}))
    return rng.choice([path for path in files if path.name == kind])


def flip(rng: random.Random, store: Path, folder: Path) -> str:
    file = any_file(rng, store)
    data = bytearray(file.read_bytes())
    for position in [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 3)) if data else 0)]:
        data[position] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{file}"


def truncate(rng: random.Random, store: Path, folder: Path) -> str:
    file = any_file(rng, store)
    os.truncate(file, rng.randrange(file.stat().st_size + 1))
    return f"{file}"


def zero(rng: random.Random, store: Path, folder: Path) -> str:
    file = any_file(rng, store)
    data = bytearray(file.read_bytes())
    begin = rng.randrange(len(data) + 1)
    end = rng.choice((len(data), min(len(data), begin + 64)))
    data[begin:end] = bytes(end - begin)
    with file.open("r+b") as stream:
        stream.write(data)
    return f"{file} {begin}-{end}"


def append(rng: random.Random, store: Path, folder: Path) -> str:
    file = any_file(rng, store)
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.randrange(1, 100)))
    return f"{file}"


def digit(rng: random.Random, store: Path, folder: Path) -> str:
    file = rng.choice(sorted(store.rglob("*.json")))
    text = file.read_text()
    position = rng.choice([index for index, character in enumerate(text) if character.isdigit()])
    file.write_text(text[:position] + rng.choice("0123456789-") + text[position + 1 :])
    return f"{file} {position}"


def delete(rng: random.Random, store: Path, folder: Path) -> str:
    if rng.random() < 0.5:
        file = any_file(rng, store)
        file.unlink()
        return f"{file}"
    path = rng.choice([path for path in sorted(store.rglob("*")) if path.is_dir()])
    shutil.rmtree(path)
    return f"{path}"


def exchange(first: Path, second: Path) -> str:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return f"{first} {second}"


def swap_shards(rng: random.Random, store: Path, folder: Path) -> str:
    return exchange(*rng.sample(sorted(store.rglob("frames/c/*/0/0")), 2))


def swap_in_store(rng: random.Random, store: Path, folder: Path) -> str:
    first, second = rng.sample([store / game / run for game, run in RECORDINGS], 2)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.name != ".lock")
    name = rng.choice([name for name in [*names, Path()] if (second / name).exists()])
    return exchange(first / name, second / name)


def swap_with_other_store(rng: random.Random, store: Path, folder: Path) -> str:
    shutil.copytree(folder / "other", store.parent / "other")
    file = any_file(rng, store).relative_to(store)
    name = rng.choice([file, *file.parents[:-1]])
    return exchange(store / name, store.parent / "other" / name) if (store.parent / "other" / name).exists() else ""


def put_back(rng: random.Random, store: Path, folder: Path) -> str:
    older = folder / f"commit{rng.randrange(2)}"
    file = any_file(rng, older).relative_to(older)
    name = rng.choice([file, *file.parents[:-1]])
    if (older / name).is_file():
        shutil.copyfile(older / name, store / name)
    else:
        shutil.rmtree(store / name)
        shutil.copytree(older / name, store / name)
    return f"{older / name}"


def copy_during_commit(rng: random.Random, store: Path, folder: Path) -> str:
    """Some files were copied before a commit, the others after it."""
    older = folder / f"commit{rng.randrange(2)}"
    files = sorted(path.relative_to(older) for path in older.rglob("*") if path.is_file())
    taken = [file for file in files if rng.random() < 0.5]
    for file in taken:
        shutil.copyfile(older / file, store / file)
    return f"{older.name} {len(taken)} of {len(files)}"


DAMAGES: dict[str, tuple[Damage, bool]] = {
    "flip bits": (flip, False),
    "truncate": (truncate, False),
    "zeros": (zero, False),
    "append": (append, False),
    "change a digit": (digit, False),
    "delete a file or folder": (delete, False),
    "swap shards": (swap_shards, False),
    "swap between recordings": (swap_in_store, False),
    "swap with another store": (swap_with_other_store, False),
    "put an older file or folder back": (put_back, False),
    "copy during a commit": (copy_during_commit, False),
    "truncate, live": (truncate, True),
    "zeros, live": (zero, True),
}


def judge(path: Path, truth: dict[str, str], earlier: list[dict[str, str]]) -> tuple[str, bool, str]:
    """Outcome, whether reading alone gave other data, and details."""
    errors: list[BaseException | str] = []
    digests: dict[str, str] | None = None
    try:
        store = FrameStore.open(path)
        errors += [str(damage) for damage in verify(store)]
    except Exception as error:
        errors.append(error)
    named = bool(errors)
    try:
        digests = read(FrameStore.open(path))
    except Exception as error:
        errors.append(error)
    if not named and digests is not None:
        for game, run in RECORDINGS:
            try:
                FrameStore.open(path).writer(game, run=run, source="store").close(commit=False)
            except Exception as error:
                errors.append(error)
    for error in errors:
        if isinstance(error, BaseException) and not (
            isinstance(error, (ValueError, OSError)) and str(path) in str(error)
        ):
            return "unnamed", False, repr(error)
    if named:
        return "named", digests not in (None, truth), str(errors[0])
    if digests == truth:
        return "harmless", False, ""
    if digests is None:
        return "named", False, str(errors[0])
    return ("earlier" if digests in earlier else "wrong"), True, ""


def in_child(work: Callable[[], tuple[str, bool, str]]) -> tuple[str, bool, str]:
    """What ``work`` returns in a forked child; "dead" if a signal ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(work()).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(child, 0)
    return ("dead", False, f"status {status}") if not data else tuple(json.loads(data))


def run(folder: Path, num_damages: int, seed: int) -> dict[str, Any]:
    truth = read(FrameStore.open(folder / "store"))
    live_truth = read(FrameStore.open(folder / "store"), AtariFrameStorage(folder / "store"))
    earlier = [read(FrameStore.open(folder / f"commit{commit}")) for commit in range(2)]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in DAMAGES}
    bad = []
    for number in range(num_damages):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        damage, live = DAMAGES[kind]
        work = folder / "work"
        shutil.copytree(folder / "store", work / "store")

        def attempt(
            kind: str = kind, damage: Damage = damage, live: bool = live, number: int = number, work: Path = work
        ) -> tuple[str, bool, str]:
            rng = random.Random(f"{seed} {number}")
            if not live:
                done = damage(rng, work / "store", folder)
                outcome, unnoticed, detail = judge(work / "store", truth, earlier)
                return outcome, unnoticed, f"{done}: {detail}"
            store = FrameStore.open(work / "store")
            storage = AtariFrameStorage(store)
            read(store, storage)
            done = damage(rng, work / "store", folder)
            try:
                unnoticed = read(store, storage) != live_truth
            except Exception as error:
                unnoticed = False
                if not isinstance(error, (ValueError, OSError)) or str(work) not in str(error):
                    return "unnamed", False, f"{done}: {error!r}"
            outcome, _, detail = judge(work / "store", truth, earlier)
            return outcome, unnoticed, f"{done}: {detail}"

        outcome, unnoticed, detail = in_child(attempt)
        counts[kind][outcome] += 1
        counts[kind]["unnoticed"] += unnoticed
        if outcome in ("wrong", "unnamed", "dead"):
            bad.append(f"{kind} (damage {number}): {outcome}: {detail}")
            print(bad[-1], file=sys.stderr)
        shutil.rmtree(work)
    total = sum(counts.values(), Counter())
    return {
        "num_damages": num_damages,
        "seed": seed,
        "total": {outcome: total[outcome] for outcome in (*OUTCOMES, "unnoticed")},
        "kinds": {
            kind: {outcome: count[outcome] for outcome in (*OUTCOMES, "unnoticed")} for kind, count in counts.items()
        },
        "bad": bad,
    }


def table(result: dict[str, Any]) -> str:
    columns = (*OUTCOMES, "unnoticed")
    lines = [f"| damage | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind, counts in {**result["kinds"], "all": result["total"]}.items():
        lines.append(f"| {kind} | {' | '.join(str(counts[column]) for column in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1300, help="default: 1300")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("--codec", choices=get_args(Codec), default="zstd", help="of the store (default: zstd)")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.build, args.codec)
        return
    torch.set_num_threads(1)  # its threads do not survive a fork
    machine = describe_benchmark()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--build", folder, "--codec", args.codec]
        subprocess.run(command, check=True)  # TensorStore has threads, too
        result = run(Path(folder), args.damages, args.seed)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps({**result, "machine": machine}, indent=1) + "\n")
    if result["bad"]:
        sys.exit(f"{len(result['bad'])} damages were not named")


if __name__ == "__main__":
    main()
