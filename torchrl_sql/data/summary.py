"""What a store holds, game by game."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from torchrl_sql.data.index import EpisodeIndex, Part
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.shards import FrameReader
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import ACTION_NAMES, FRAME_SHAPE, NUM_ACTIONS

_LABEL_PIXELS = 16


@dataclass(frozen=True, kw_only=True)
class GameSummary:
    """Statistics of one game, all its runs taken together.

    Attributes:
        game (str): name of the game.
        num_transitions (int): agent steps.
        num_unsampleable (int): those that one-step targets cannot use, because the frame that follows was never stored.
        num_bytes (int): on disk, indices and manifests included; of a part, its share by transitions.
        returns (array): float64 ``[episodes]``, sums of the stored rewards.
        lengths (array): int64 ``[episodes]``, agent steps.
        behaviours (array): int64 ``[episodes]``, which of ``behaviour_names`` played.
        behaviour_names (tuple of str): the behaviour policies.
        action_counts (array): int64 ``[18]``.
        rewards ("raw", "clipped" or "mixed"): what the returns are sums of.
        sources (tuple of str): where the runs came from.
    """

    game: str
    num_transitions: int
    num_unsampleable: int
    num_bytes: int
    returns: np.ndarray
    lengths: np.ndarray
    behaviours: np.ndarray
    behaviour_names: tuple[str, ...]
    action_counts: np.ndarray
    rewards: str
    sources: tuple[str, ...]

    @property
    def bytes_per_transition(self) -> float:
        """Bytes on disk for each stored transition."""
        return self.num_bytes / max(self.num_transitions, 1)

    @property
    def ratio_to_raw(self) -> float:
        """How many times smaller than one raw frame (7,056 bytes) a transition is."""
        return prod(FRAME_SHAPE) / self.bytes_per_transition


def summarise(
    store: FrameStore, games: Sequence[str] | None = None, *, part: Part | None = None
) -> Iterator[GameSummary]:
    """Yields the summary of each game of a store, in its order.

    Args:
        store (FrameStore): where they are.
        games (sequence of str, optional): some of them; default all. Absent ones are passed over.

    Keyword Args:
        part (Part, optional): summarise the transitions that one-step targets can draw from this part, and the
            (whole) episodes that these are of; default all that is stored.

    Raises:
        ValueError, FileNotFoundError: if a manifest or a member is damaged or missing.
    """
    for game in store.games if games is None else [game for game in store.games if game in games]:
        runs = store.recordings_of(game)
        names: list[str] = []
        behaviours = []
        for run in runs:
            for name in run.manifest.behaviours:
                if name not in names:
                    names.append(name)
            position = np.array([names.index(name) for name in run.manifest.behaviours])
            behaviours.append(position[run.episodes["component"]])
        episodes = np.concatenate([run.episodes for run in runs])
        used = episodes["num_steps"].astype(np.int64)
        if part is not None:
            used = EpisodeIndex((game,), runs, n_steps=1, part=part).num_drawable_steps
        kept = slice(None) if part is None else used > 0
        ends = np.cumsum([run.num_episodes for run in runs])[:-1]
        used_by_run = np.split(used, ends)
        num_bytes, num_stored = sum(_folder_bytes(run.path) for run in runs), sum(run.num_steps for run in runs)
        rewards = {run.manifest.rewards for run in runs}
        yield GameSummary(
            game=game,
            num_transitions=int(used.sum()),
            num_unsampleable=int((~episodes["terminated"] & ~episodes["has_final_frame"])[kept].sum()),
            num_bytes=round(num_bytes * int(used.sum()) / max(num_stored, 1)),
            returns=np.concatenate([run.episode_returns() for run in runs])[kept],
            lengths=episodes["num_steps"].astype(np.int64)[kept],
            behaviours=np.concatenate(behaviours)[kept],
            behaviour_names=tuple(names),
            action_counts=sum(
                (
                    np.bincount(run.actions[_first_steps_of_each(run, counts)], minlength=NUM_ACTIONS)
                    for run, counts in zip(runs, used_by_run, strict=True)
                ),
                np.zeros(NUM_ACTIONS, np.int64),
            ),
            rewards=rewards.pop() if len(rewards) == 1 else "mixed",
            sources=tuple(dict.fromkeys(run.manifest.source for run in runs)),
        )


def _first_steps_of_each(run: Recording, counts: np.ndarray) -> np.ndarray:
    """Whether (bool ``[num_steps]``) a step is among the first ``counts`` of its episode."""
    lengths = run.episodes["num_steps"]
    return np.arange(run.num_steps) < np.repeat(run.first_steps() + counts, lengths)


def format_summaries(summaries: Sequence[GameSummary]) -> str:
    """The summaries as a table for a terminal, with the behaviour policies and actions of each game."""
    header = (
        f"{'game':<16} {'transitions':>12} {'episodes':>9} {'return':>16} {'length':>8} {'bytes/tr.':>9} {'of raw':>8}"
    )
    lines = [header, "-" * len(header)]
    for s in summaries:
        returns = f"{s.returns.mean():.2f} ± {s.returns.std():.2f}" if len(s.returns) else "-"
        length = f"{s.lengths.mean():.0f}" if len(s.lengths) else "-"
        lines.append(
            f"{s.game:<16} {s.num_transitions:>12,} {len(s.returns):>9,} {returns:>16} {length:>8} "
            f"{s.bytes_per_transition:>9.1f} {f'1/{s.ratio_to_raw:.0f}':>8}"
        )
        for index, name in enumerate(s.behaviour_names):
            own = s.returns[s.behaviours == index]
            if len(own):
                lines.append(f"  {name:<14} {'':>12} {len(own):>9,} {f'{own.mean():.2f} ± {own.std():.2f}':>16}")
        share = s.action_counts / max(s.action_counts.sum(), 1)
        actions = ", ".join(f"{ACTION_NAMES[a]} {share[a]:.0%}" for a in np.argsort(-share) if share[a] > 0)
        lines.append(f"  actions: {actions}")
        lines.append(f"  rewards: {s.rewards}; source: {'; '.join(s.sources)}")
        if s.num_unsampleable:
            lines.append(
                f"  cannot be sampled, as the frame that follows is not stored: {s.num_unsampleable:,} transitions"
            )
    total = sum(s.num_transitions for s in summaries)
    lines.append(f"{len(summaries)} games, {total:,} transitions, {sum(s.num_bytes for s in summaries) / 1e6:,.1f} MB")
    return "\n".join(lines)


def contact_sheet(store: FrameStore, game: str, *, num_columns: int = 12, num_rows: int = 8) -> np.ndarray:
    """Frames of a game at equal distances through all its runs, in reading order.

    Args:
        store (FrameStore): where it is.
        game (str): its name.

    Keyword Args:
        num_columns (int): frames side by side.
        num_rows (int): frames above each other.

    Returns:
        uint8 ``[84 * num_rows, 84 * num_columns]``.

    Raises:
        ValueError: if the store holds none of the game.
        DamagedFramesError: if a frame cannot be read.
    """
    runs = store.recordings_of(game)
    ends = np.cumsum([run.num_frames for run in runs])
    position = np.arange(num_columns * num_rows) * ends[-1] // (num_columns * num_rows)
    run = np.searchsorted(ends, position, side="right")
    row = position - np.concatenate([[0], ends])[run]
    frames = FrameReader(runs).read(run, row, row, row + 1, length=1)
    height, width = FRAME_SHAPE
    tiles = frames.reshape(num_rows, num_columns, height, width)
    return tiles.transpose(0, 2, 1, 3).reshape(num_rows * height, num_columns * width)


def draw_contact_sheets(store: FrameStore, *, num_columns: int = 12) -> Image.Image:
    """The contact sheets of all games below each other, each under its name: 8 rows of frames or a few more in all.

    Raises:
        ValueError: if the store holds no games yet.
        DamagedFramesError: if a frame cannot be read.
    """
    games = store.games
    if not games:
        raise ValueError(f"the store {store.path} holds no games yet")
    num_rows = -(-8 // len(games))
    height, width = FRAME_SHAPE
    block = _LABEL_PIXELS + num_rows * height
    image = Image.new("L", (num_columns * width, len(games) * block), 255)
    for number, game in enumerate(games):
        ImageDraw.Draw(image).text((4, number * block + 2), game, fill=0)
        sheet = contact_sheet(store, game, num_columns=num_columns, num_rows=num_rows)
        image.paste(Image.fromarray(sheet), (0, number * block + _LABEL_PIXELS))
    return image


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
