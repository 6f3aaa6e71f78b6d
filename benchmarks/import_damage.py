"""Random damage of an import's source: is it named, is what was imported right, do the other games go on?

Episodes of two games become a DQN-Replay log, TorchRL's memory-mapped folders and a Minari data set. One file of one
game is damaged at random (flipped bits, a block of zeros, a cut, a deletion, bytes added), both games are imported,
then the file is put back and the import is called again: it must end in the very files of an undamaged import.

DQN-Replay's files end in checksums of their contents. TorchRL's and Minari's have none: another frame or reward that is
possible in itself is not to be told from the true one.

    python benchmarks/import_damage.py --json benchmarks/results/import_damage.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from torchrl_sql.data import FrameStore, export_dqn_replay
from torchrl_sql.data.importers import ImportFailedError, import_dqn_replay, import_minari, import_torchrl_memmap
from torchrl_sql.games import GAMES

GOOD, BAD = "Breakout", "Pong"
OUTCOMES = {
    "named": "the error names the damaged file",
    "named beside it": "the error names another file of the same checkpoint, which contradicts the damaged one",
    "harmless": "imported, and all is right",
    "undetected": "imported, and something is wrong: must be 0 where the files have checksums",
    "without a name": "an error that names no file",
    "others stopped": "the other game is not there",
    "half-written": "something of the failed game is in the store, or the import does not end in the same files",
}


def make_store(path: Path, seed: int) -> FrameStore:
    """Two games, three episodes each, with frames that hardly compress."""
    rng, store = np.random.default_rng(seed), FrameStore.create(path, chunk_frames=4, shard_frames=32)
    for game in (GOOD, BAD):
        with store.writer(game, source="noise") as writer:
            for num_steps in rng.integers(8, 20, 3):
                frames = rng.integers(1, 256, (num_steps, 84, 84), dtype=np.uint8)
                actions = rng.choice(GAMES[game].minimal_actions, num_steps)
                writer.add_episode(frames, actions, rng.integers(-1, 2, num_steps).astype("f4"), True)
    return store


def write_memmap(log: Path, root: Path) -> None:
    """What TorchRL makes of a DQN-Replay log."""
    from torchrl.data.datasets import AtariDQNExperienceReplay

    for game in (GOOD, BAD):
        for number, files in AtariDQNExperienceReplay._list_runs(log / game / "1" / "replay_logs").items():
            AtariDQNExperienceReplay._preproc_run(root / game / "1" / str(number), {number: files}, number)


def write_minari(store: FrameStore, root: Path) -> None:
    """A data set of the game that is damaged."""
    import gymnasium
    import minari

    recording = store.recording(BAD)
    frames, buffers = recording.open_frames()[: recording.num_frames].read().result(), []
    for episode, step in zip(recording.episodes, recording.first_steps(), strict=True):
        first, n = int(episode["first_frame"]), int(episode["num_steps"])
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=np.concatenate([frames[first : first + n], frames[first : first + 1]]),
                actions=recording.actions[step : step + n].tolist(),
                rewards=recording.rewards[step : step + n].tolist(),
                terminations=[False] * (n - 1) + [True],
                truncations=[False] * n,
            )
        )
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    minari.create_dataset_from_buffers(
        "pong/noise-v0",
        buffers,
        observation_space=gymnasium.spaces.Box(0, 255, (84, 84), np.uint8),
        action_space=gymnasium.spaces.Discrete(18),
        jpeg_encoding=False,
        **dict.fromkeys(("author", "author_email", "algorithm_name", "code_permalink", "description"), "noise"),
    )


def damage(file: Path, rng: np.random.Generator) -> str:
    """Damages a file in one of six ways; returns which."""
    data = bytearray(file.read_bytes())
    kind = str(rng.choice(["flip", "flips", "zeros", "cut", "delete", "append"]))
    place = int(rng.integers(len(data)))
    if kind == "flip":
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == "flips":
        for position in rng.integers(len(data), size=16):
            data[position] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        size = min(int(rng.integers(1, 512)), len(data) - place)
        data[place : place + size] = bytes(size)
    elif kind == "cut":
        del data[place:]
    elif kind == "append":
        data += rng.bytes(int(rng.integers(1, 64)))
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(data)
    return kind


def contents(store: Path, game: str) -> dict[str, bytes]:
    """All files of a game, of unfinished imports too."""
    files = (f for folder in store.glob(f"**/{game}") for f in sorted(folder.rglob("*")))
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file() and f.name != ".lock"}


def held(store: Path, game: str) -> list[bytes]:
    """What can be read of a game: frames, actions, rewards, episodes."""
    result = []
    for recording in FrameStore.open(store).recordings_of(game):
        frames = recording.open_frames()[: recording.num_frames].read().result()
        result += [a.tobytes() for a in (frames, recording.actions, recording.rewards, recording.episodes)]
    return result


def try_damage(
    source: Path, read: Callable[[Path], object], root: Path, rng: np.random.Generator, *, one: bool
) -> dict:
    """One damage: what was done, and what came of it. ``one``: the source holds the damaged game only."""
    reference, store = root / "reference", root / "store"
    if not reference.exists():
        FrameStore.create(reference, chunk_frames=4, shard_frames=32)
        read(reference)
    files = sorted(f for f in source.rglob("*") if f.is_file() and (one or BAD in f.parts) and f.stat().st_size)
    file = files[rng.integers(len(files))]
    good = file.read_bytes()
    FrameStore.create(store, chunk_frames=4, shard_frames=32)
    kind, message = damage(file, rng), ""
    try:
        read(store)
    except (ImportFailedError, ValueError, OSError) as error:
        message = str(error)
    except Exception as error:
        message = f"without a name: {error!r}"
    games = FrameStore.open(store).games
    if not one and (GOOD not in games or held(store, GOOD) != held(reference, GOOD)):
        outcome = "others stopped"
    elif message and BAD in games:
        outcome = "half-written"
    elif not message:
        outcome = "harmless" if held(store, BAD) == held(reference, BAD) else "undetected"
    elif file.name in message or file.stem in message:
        outcome = "named"
    else:
        beside = file.parent if file.parent.name.isdecimal() else source
        is_near = (f"_ckpt.{file.name.split('.')[-2]}.gz" if file.suffix == ".gz" else str(beside)) in message
        outcome = "named beside it" if is_near or (one and "pong/noise-v0" in message) else "without a name"
    file.write_bytes(good)
    if outcome not in ("undetected", "harmless"):
        try:
            read(store)
            if contents(store, BAD) != contents(reference, BAD):
                outcome = "half-written"
        except Exception as error:
            outcome, message = "half-written", f"{message}; then {error!r}"
    shutil.rmtree(store)
    return {"file": file.name, "kind": kind, "outcome": outcome, "message": message}


def run(root: Path, num_damages: dict[str, int], seed: int) -> list[dict]:
    """So many damages of each format."""
    store = make_store(root / "original", seed)
    dqn, memmap, minari = root / "dqn", root / "memmap", root / "minari"
    export_dqn_replay(store, dqn, num_rows=24)
    if num_damages.get("torchrl-memmap"):
        write_memmap(dqn, memmap)
    if num_damages.get("minari"):
        write_minari(store, minari)
    last = len(list((dqn / BAD / "1" / "replay_logs").glob("add_count*"))) - 1
    arguments = {"games": f"{BAD},{GOOD}", "rewards": "raw"}
    formats: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "dqn-replay": (dqn, lambda out: import_dqn_replay(dqn, out, checkpoints=f"0-{last}", **arguments)),
        "torchrl-memmap": (
            memmap,
            lambda out: import_torchrl_memmap(memmap, out, checkpoints=f"0-{last}", **arguments),
        ),
        "minari": (minari, lambda out: import_minari(minari / "pong" / "noise-v0", out, game=BAD, rewards="raw")),
    }
    results = []
    for number, (name, (source, read)) in enumerate(formats.items()):
        (root / f"work-{name}").mkdir()
        for index in range(num_damages.get(name, 0)):
            rng = np.random.default_rng([seed, number, index])
            one = try_damage(source, read, root / f"work-{name}", rng, one=name == "minari")
            results.append({"format": name, "index": index, **one})
    return results


def is_fault(result: dict) -> bool:
    """Whether that should not have come of a damage."""
    accepted = {"named", "named beside it", "harmless"} | (
        {"undetected"} if result["format"] != "dqn-replay" else set()
    )
    return result["outcome"] not in accepted


def main() -> None:
    from torchrl_sql.provenance import describe_benchmark

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, nargs=3, default=[600, 200, 100], help="of each format (600 200 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        names = ("dqn-replay", "torchrl-memmap", "minari")
        results = run(Path(folder), dict(zip(names, args.damages, strict=True)), args.seed)
    counts = {name: Counter(r["outcome"] for r in results if r["format"] == name) for name in names}
    print(f"{'':17}" + "".join(f"{name:>16}" for name in names))
    for outcome, meaning in OUTCOMES.items():
        print(f"{outcome:17}" + "".join(f"{counts[name][outcome]:>16}" for name in names) + f"   {meaning}")
    wrong = [r for r in results if is_fault(r)]
    for result in wrong:
        print(result)
    if args.json:
        table = {name: {outcome: counts[name][outcome] for outcome in OUTCOMES} for name in names}
        record = {"machine": describe_benchmark(), "counts": table, "wrong": wrong}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
