"""One import: a source of episodes into one run of a store, resumable and all or nothing.

An import writes into ``STORE/.importing/<Game>/<run>`` and is moved to ``STORE/<Game>/<run>`` in one rename when its
last row is there. Readers therefore never see half of a game, and what a killed import committed is found again by
the next one.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrl_sql.data.catalogue import list_recording
from torchrl_sql.data.recording import Manifest, Recording, open_recording
from torchrl_sql.data.store import FrameStore
from torchrl_sql.files import sync_folder

STAGING_FOLDER = ".importing"
"""Folder inside a store where unfinished imports lie; not part of the store."""


@dataclass(frozen=True)
class Episode:
    """One episode of a source.

    Attributes:
        frames (uint8 ``[T, 84, 84]`` or ``[T + 1, 84, 84]``): newest frame of each observation.
        actions (integers ``[T]``): indices into the 18 full actions.
        rewards (floats ``[T]``): as the source has them.
        ending (str): ``"terminated"`` (game over), ``"truncated"`` (a time-out) or ``"cut"`` (the data ends here).
        num_rows (int): rows of the source it took.
        num_later (int): how many of the episodes before it, the last ones, were played after it.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    ending: Literal["terminated", "truncated", "cut"]
    num_rows: int
    num_later: int = 0


@dataclass(frozen=True)
class Position:
    """A place to continue from: a source yields one after the episodes that lie before it.

    Attributes:
        state (mapping of JSON values, or None): what :meth:`EpisodeSource.read` needs to continue; None at the end.
        dropped (mapping): rows before this position that are not transitions, by reason.
        parts (sequence of str): names of the parts of the source (files, episodes) that were read so far.
    """

    state: Mapping[str, Any] | None
    dropped: Mapping[str, int]
    parts: Sequence[str]


class EpisodeSource(ABC):
    """Episodes of one game. Sent to worker processes, so it must be picklable.

    Attributes:
        game (str): name of the game.
        description (str): goes to the manifest, for people.
        rewards (str): ``"raw"`` or ``"clipped"``.
        request (mapping of JSON values): what is imported; an unfinished import continues only with an equal one, and
            only if what was read before is still the same, see :meth:`digest`.
    """

    game: str
    description: str
    rewards: Literal["raw", "clipped"]
    request: Mapping[str, Any]

    @abstractmethod
    def count_rows(self) -> int:
        """Rows that :meth:`read` goes through from the start. Raises if files are missing."""

    @abstractmethod
    def read(self, state: Mapping[str, Any] | None) -> Iterator[Episode | Position]:
        """Yields episodes, with positions between them; the last item is a position whose state is None.

        Args:
            state (mapping or None): of the position to continue from; None: from the start.
        """

    @abstractmethod
    def digest(self, part: str) -> str:
        """Tells the contents of a part (named by a position) from others. Raises if it is missing."""


@dataclass(frozen=True)
class Format:
    """A kind of data set, as ``torchrl-sql import`` names it.

    Attributes:
        name (str): on the command line.
        summary (str): what SOURCE is.
        read (callable): imports ``(source, store_path, *, progress, **options)``; returns a summary per game.
        options (mapping): which of its keyword arguments the command line takes, with their help. A type of ``int``
            is read as a number, one of ``Literal[...]`` as a choice; one without a default must be given.
    """

    name: str
    summary: str
    read: Callable[..., list[ImportSummary]]
    options: Mapping[str, str]


@dataclass(frozen=True)
class ImportJob:
    """What to import, and where to."""

    source: EpisodeSource
    store_path: Path
    run: str


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What became of one game's rows.

    ``num_rows_read`` is the sum of ``num_transitions`` and of ``dropped``.

    Attributes:
        game, run (str): names in the store.
        num_rows_read (int): rows in the source.
        num_transitions (int): agent steps stored.
        dropped (mapping): rows not stored, by reason.
        num_episodes (int): episodes stored to their end, of which
        num_truncated (int): ended in a time-out.
        num_cut (int): more episodes, whose end the data does not show.
        mean_clipped_return (float): mean over the ``num_episodes`` of the sum of rewards, each clipped to [-1, 1]; NaN
            if there is none.
    """

    game: str
    run: str
    num_rows_read: int
    num_transitions: int
    dropped: Mapping[str, int]
    num_episodes: int
    num_truncated: int
    num_cut: int
    mean_clipped_return: float

    @classmethod
    def of_run(cls, run: Recording) -> ImportSummary:
        """Reads the summary of a finished import from its manifest."""
        record = run.manifest.metadata["import"]
        num_episodes = run.num_episodes - record["num_cut"]
        return cls(
            game=run.game,
            run=run.name,
            num_rows_read=run.num_steps + sum(record["dropped"].values()),
            num_transitions=run.num_steps,
            dropped=record["dropped"],
            num_episodes=num_episodes,
            num_truncated=record["num_truncated"],
            num_cut=record["num_cut"],
            mean_clipped_return=record["clipped_return_sum"] / num_episodes if num_episodes else float("nan"),
        )


def summary_table(summaries: Sequence[ImportSummary]) -> str:
    """One line per game: rows read, transitions kept, rows dropped by reason, episodes, mean clipped return."""
    reasons = list(dict.fromkeys(reason for summary in summaries for reason in summary.dropped))
    header = ["game", "run", "rows read", "transitions", *(f"dropped: {reason}" for reason in reasons)]
    header += ["episodes", "timed out", "cut", "mean clipped return"]
    lines = [header]
    for s in summaries:
        counts = (s.num_rows_read, s.num_transitions, *(s.dropped.get(reason, 0) for reason in reasons))
        counts += (s.num_episodes, s.num_truncated, s.num_cut)
        lines.append([s.game, s.run, *(f"{count:,}" for count in counts), f"{s.mean_clipped_return:.2f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def run_import(job: ImportJob, report: Callable[[int, int], None]) -> ImportSummary:
    """Starts or continues one import, or finds that it is done.

    Args:
        job (ImportJob): what to import.
        report (callable): is given the number of rows done and of all rows, again and again.

    Raises:
        FileExistsError: if the store holds another run of that name.
        ValueError: if an unfinished import of other data is in the way, the source is damaged, or the run that is there
            is not the one that the store lists.
        OSError: if a file cannot be read or written.
    """
    source, store = job.source, FrameStore.open(job.store_path)
    target = store.path / source.game / job.run
    if (target / "manifest.json").exists() and (run := open_recording(target)) is not None:
        if _recorded(run.manifest, "request") != source.request:
            raise FileExistsError(
                f"{target} is there already, from {run.manifest.source}: choose another store, or delete it"
            )
        _check_contents(source, run.manifest, f"{target} is there already, from another {source.description}")
        list_recording(target, run.manifest.checksum)
        return ImportSummary.of_run(run)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is in the way: it has files but no manifest; delete it")

    num_rows = source.count_rows()
    staging = FrameStore(store.path / STAGING_FOLDER, store.encoding)
    staged = staging.path / source.game / job.run
    if (staged / "manifest.json").exists():
        manifest = Manifest.read(staged / "manifest.json")
        unfinished = f"{staged} holds an unfinished import of"
        if _recorded(manifest, "request") != source.request:
            raise ValueError(f"{unfinished} {manifest.source}: finish that one, or delete the folder")
        _check_contents(source, manifest, f"{unfinished} another {source.description}")
    with staging.writer(source.game, run=job.run, source=source.description, rewards=source.rewards) as writer:
        record = dict(writer.metadata.get("import", {}))
        if not record:
            record = {"request": dict(source.request), "state": None, "dropped": {}, "contents": {}, "complete": False}
            record |= {"num_truncated": 0, "num_cut": 0, "clipped_return_sum": 0.0}
        num_done = writer.num_steps + sum(record["dropped"].values())
        report(num_done, num_rows)
        for item in () if record["complete"] else source.read(record["state"]):
            if isinstance(item, Episode):
                writer.add_episode(
                    item.frames,
                    item.actions,
                    item.rewards,
                    item.ending == "terminated",
                    cut=item.ending == "cut",
                    num_later=item.num_later,
                )
                if item.ending == "cut":
                    record["num_cut"] += 1
                else:
                    record["num_truncated"] += item.ending == "truncated"
                    record["clipped_return_sum"] += float(np.clip(item.rewards, -1, 1).sum(dtype=np.float64))
                num_done += item.num_rows
            else:
                if item.state is None and not writer.num_steps:
                    raise ValueError(f"{source.description}: there is no episode in it")
                contents = {part: record["contents"].get(part) or source.digest(part) for part in item.parts}
                record |= {"state": item.state, "dropped": dict(item.dropped), "complete": item.state is None}
                record["contents"] = contents
                writer.commit(metadata={"import": record})
                num_done = writer.num_steps + sum(record["dropped"].values())
            report(num_done, num_rows)
    target.parent.mkdir(exist_ok=True)
    os.rename(staged, target)
    for folder in (target.parent, store.path):
        sync_folder(folder)
    run = Recording(target)
    list_recording(target, run.manifest.checksum)
    return ImportSummary.of_run(run)


def _recorded(manifest: Manifest, key: str) -> Any:
    record = manifest.metadata.get("import")
    return record.get(key) if isinstance(record, dict) else None


def _check_contents(source: EpisodeSource, manifest: Manifest, message: str) -> None:
    for part, digest in _recorded(manifest, "contents").items():
        if source.digest(part) != digest:
            raise ValueError(f"{message}: part {part} had other contents; choose another store, or delete the folder")
