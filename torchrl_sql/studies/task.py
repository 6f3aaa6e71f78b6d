"""A task: one command of ``torchrl-sql`` with what it waits for, what it makes, and the record of it."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchrl_sql.files import write_text


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work."""

    name: str
    """Of the task among those planned with it, e.g. ``train-bc-seed0``."""
    arguments: list[str]
    """Of ``torchrl-sql``."""
    group: str
    """Tasks of one group are submitted together, as an array."""
    after: list[str] = field(default_factory=list)
    """Tasks that must be over first."""
    tolerant: bool = False
    """Runs even if tasks that it waits for failed."""
    run_dir: str | None = None
    """Folder of the training run that it makes."""
    config: str | None = None
    """Of a training run: its resolved configuration as YAML."""
    one_process: bool = False
    """Of a training run: it takes one process, with one GPU, whatever a cluster's profile has."""
    folder: str | None = None
    """Of a study: where the task's record is kept; ``None`` outside studies."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the results, with plain keys: a task whose recorded settings differ is done again."""
    inputs: dict[str, str] = field(default_factory=dict)
    """The keys of the tasks whose results it reads."""
    makes: list[str] = field(default_factory=list)
    """Paths, relative to ``folder``."""

    @property
    def kind(self) -> str:
        """The command of ``torchrl-sql``."""
        return self.arguments[0]

    @property
    def command(self) -> str:
        """The command line."""
        return shlex.join(["torchrl-sql", *self.arguments])

    @property
    def key(self) -> str:
        """Digest of what decides the results."""
        content = json.dumps([self.kind, self.settings, self.inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def record_file(self) -> Path:
        """Of the record: that the task was started, and how it ended."""
        assert self.folder is not None
        return Path(self.folder, "tasks", f"{self.name}.json")

    def record(self) -> dict[str, Any] | None:
        """What was recorded of an earlier start; ``None`` if there was none, and outside studies.

        Raises:
            ValueError: if the record is damaged.
        """
        return read_record(self.record_file) if self.folder is not None and self.record_file.exists() else None

    def write_record(self, *, seconds: float | None, copied_from: Path | None = None) -> None:
        """Records that the task starts (``None``) or how long it took, and in which study's folder if not in this one;
        tasks outside studies have no record.
        """
        if self.folder is None:
            return
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        names = ("key", "settings", "inputs", "makes", "command")
        content = {name: getattr(self, name) for name in names}
        content |= {"seconds": seconds, "written": datetime.now(UTC).isoformat(timespec="seconds")}
        if copied_from is not None:
            content["copied_from"] = str(copied_from)
        write_text(self.record_file, json.dumps(content, indent=1) + "\n", concurrent=True)

    def is_done(self) -> bool:
        """Whether it was recorded as done, with these settings and inputs, and what it made is there.

        A tolerant task never is: what it could not have may be there now.
        """
        record = None if self.tolerant else self.record()
        if record is None or record["key"] != self.key or record["seconds"] is None:
            return False
        assert self.folder is not None
        return Path(self.folder, self.makes[0]).exists()

    def done_in(self, other: Path) -> dict[str, Any] | None:
        """The record of the same task in another study's folder: same name, settings and inputs.

        ``None`` if it is not done there, and for tasks that share what they make with others: tables of scores, stores
        of several agents.

        Raises:
            ValueError: if the record is damaged.
        """
        file = other / "tasks" / f"{self.name}.json"
        shares = any(Path(path).name == "scores.csv" or Path(path).parts[0] == "stores" for path in self.makes)
        if self.kind not in ("collect", "import", "train") or shares or not file.exists():
            return None
        record = read_record(file)
        same = (record["key"], record["makes"]) == (self.key, self.makes) and record["seconds"] is not None
        return record if same and (other / self.makes[0]).exists() else None

    def change(self) -> str | None:
        """Why what was made earlier does not count any more; ``None`` if it does, or nothing was made."""
        record = None if self.tolerant else self.record()
        if record is None or record["key"] == self.key:
            return None
        new, old = self.settings, record["settings"]
        changes = [
            f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        return ", ".join(changes) or "what it reads is made anew"


def read_record(file: Path) -> dict[str, Any]:
    """What :meth:`Task.write_record` wrote.

    Raises:
        ValueError: if the record is damaged, or names paths outside the study's folder as made by the task.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        record = {key: content[key] for key in ("key", "settings", "inputs", "makes", "seconds")}
        record["copied_from"] = content.get("copied_from")
        record["makes"] = [Path(path).as_posix() for path in record["makes"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must be the record of a task: {error!r}; delete it, and what the task made") from None
    folder = file.parents[1].resolve()
    for path in record["makes"]:
        if not (folder / path).resolve().is_relative_to(folder) or (folder / path).resolve() == folder:
            raise ValueError(f"{file} must name paths in {folder}, got {path!r}")
    return record
