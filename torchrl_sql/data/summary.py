"""What a store holds, game by game."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from torchrl_sql.data.chunks import StoredFrames
from torchrl_sql.data.index import EpisodeIndex, Subset
from torchrl_sql.data.recording import Recording
from torchrl_sql.data.store import FrameStore
from torchrl_sql.games import ACTION_NAMES, FRAME_SHAPE, NUM_ACTIONS, illegal_actions, resolve_games

_LABEL_PIXELS = 16
_NUM_PARTS = 20
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class GameSummary:
    """Statistics of one game, all its recordings taken together.

    Attributes:
        game (str): name of the game.
        num_transitions (int): agent steps.
        num_unsampleable (int): those that one-step targets cannot use, because the frame that follows was never stored.
        num_cut (int): episodes whose end the data does not show; they are in none of the three arrays that follow.
        num_bytes (int): on disk, indices and manifests included; of a part, its share by transitions.
        returns (array): float64 ``[episodes]``, sums of the stored rewards.
        lengths (array): int64 ``[episodes]``, agent steps.
        behaviours (array): int64 ``[episodes]``, which of ``behaviour_names`` played.
        behaviour_names (tuple of str): the behaviour policies.
        action_counts (array): int64 ``[18]``.
        rewards ("raw", "clipped" or "mixed"): what the returns are sums of.
        sources (tuple of str): where the recordings came from.
    """

    game: str
    num_transitions: int
    num_unsampleable: int
    num_cut: int
    num_bytes: int
    returns: np.ndarray
    lengths: np.ndarray
    behaviours: np.ndarray
    behaviour_names: tuple[str, ...]
    action_counts: np.ndarray
    rewards: str
    sources: tuple[str, ...]

    @property
    def life(self) -> np.ndarray:
        """float64 ``[20]``: mean return of the whole episodes that end in each twentieth of their steps, in the order
        of the recordings and of play; NaN where none does.
        """
        part = np.ceil(np.cumsum(self.lengths) / self.lengths.sum() * _NUM_PARTS).astype(np.int64) - 1
        sums = np.bincount(part, weights=self.returns, minlength=_NUM_PARTS)
        counts = np.bincount(part, minlength=_NUM_PARTS)
        return np.divide(sums, counts, out=np.full(_NUM_PARTS, np.nan), where=counts > 0)

    @property
    def bytes_per_transition(self) -> float:
        """Bytes on disk for each stored transition."""
        return self.num_bytes / max(self.num_transitions, 1)

    @property
    def ratio_to_raw(self) -> float:
        """How many times smaller than one raw frame (7,056 bytes) a transition is; NaN without transitions."""
        return math.prod(FRAME_SHAPE) / self.bytes_per_transition if self.num_transitions else math.nan


def summarise(
    store: FrameStore, games: str | Sequence[str] | None = None, *, subset: Subset | None = None
) -> Iterator[GameSummary]:
    """Yields the summary of each game of a store, in its order.

    Args:
        store (FrameStore): where they are.
        games (str or sequence of str, optional): see :func:`torchrl_sql.games.resolve_games`; default all. Absent ones
            are ignored.

    Keyword Args:
        subset (Subset, optional): summarise the transitions that one-step targets can draw from it, and the
            (whole) episodes that these are of; default all that is stored.

    Raises:
        ValueError, FileNotFoundError: if a manifest or a member is damaged or missing.
    """
    names_of_games = store.games if games is None else resolve_games(games)
    for game in [game for game in store.games if game in names_of_games]:
        recordings = store.recordings_of(game)
        names: list[str] = []
        behaviours = []
        for recording in recordings:
            for name in recording.manifest.behaviours:
                if name not in names:
                    names.append(name)
            position = np.array([names.index(name) for name in recording.manifest.behaviours])
            behaviours.append(position[recording.episodes["component"]])
        episodes = np.concatenate([recording.episodes for recording in recordings])
        used = episodes["num_steps"].astype(np.int64)
        if subset is not None:
            used = EpisodeIndex((game,), recordings, n_steps=1, subset=subset).num_drawable_steps
        kept = np.ones(len(used), bool) if subset is None else used > 0
        whole = kept & ~episodes["cut"]
        ends = np.cumsum([recording.num_episodes for recording in recordings])[:-1]
        used_by_recording = np.split(used, ends)
        num_bytes = sum(_folder_bytes(recording.path) for recording in recordings)
        num_stored = sum(recording.num_steps for recording in recordings)
        rewards = {recording.manifest.rewards for recording in recordings}
        yield GameSummary(
            game=game,
            num_transitions=int(used.sum()),
            num_unsampleable=int((~episodes["terminated"] & ~episodes["has_final_frame"])[kept].sum()),
            num_cut=int((kept & episodes["cut"]).sum()),
            num_bytes=round(num_bytes * int(used.sum()) / max(num_stored, 1)),
            returns=np.concatenate([recording.episode_returns() for recording in recordings])[whole],
            lengths=episodes["num_steps"].astype(np.int64)[whole],
            behaviours=np.concatenate(behaviours)[whole],
            behaviour_names=tuple(names),
            action_counts=sum(
                (
                    np.bincount(recording.actions[_first_rows_of_each(recording, counts)], minlength=NUM_ACTIONS)
                    for recording, counts in zip(recordings, used_by_recording, strict=True)
                ),
                np.zeros(NUM_ACTIONS, np.int64),
            ),
            rewards=rewards.pop() if len(rewards) == 1 else "mixed",
            sources=tuple(dict.fromkeys(recording.manifest.source for recording in recordings)),
        )


def _first_rows_of_each(recording: Recording, counts: np.ndarray) -> np.ndarray:
    """int64: the rows of the first ``counts`` steps of each episode."""
    return np.repeat(recording.first_steps() - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def format_summaries(summaries: Sequence[GameSummary], *, codec: str) -> str:
    """The summaries as a table for a terminal, with the behaviour policies and actions of each game."""
    header = (
        f"{'game':<16} {'transitions':>12} {'episodes':>9} {'return':>16} {'length':>8} {'bytes/tr.':>9} {'of raw':>8}"
    )
    lines = [header, "-" * len(header)]

    def spread(returns: np.ndarray) -> str:
        return f"{returns.mean():.2f} ± {returns.std():.2f}" if len(returns) else "-"

    for s in summaries:
        length = f"{s.lengths.mean():.0f}" if len(s.lengths) else "-"
        ratio = f"1/{s.ratio_to_raw:.0f}" if s.num_transitions else "-"
        lines.append(
            f"{s.game:<16} {s.num_transitions:>12,} {len(s.returns):>9,} {spread(s.returns):>16} {length:>8} "
            f"{s.bytes_per_transition:>9.1f} {ratio:>8}"
        )
        for index, name in enumerate(s.behaviour_names):
            returns = s.returns[s.behaviours == index]
            if len(returns):
                lines.append(f"  {name:<14} {'':>12} {len(returns):>9,} {spread(returns):>16}")
        if len(s.returns) >= _NUM_PARTS:
            life = s.life[~np.isnan(s.life)]
            lines.append(f"  returns from first to last steps: {life[0]:.2f} {_bars(life)} {life[-1]:.2f}")
        share = s.action_counts / max(s.action_counts.sum(), 1)
        actions = ", ".join(f"{ACTION_NAMES[a]} {share[a]:.0%}" for a in np.argsort(-share) if share[a] > 0)
        lines.append(f"  actions: {actions or '-'}")
        lines.append(f"  rewards: {s.rewards}; source: {'; '.join(s.sources)}")
        if illegal := illegal_actions(s.game, s.action_counts.tolist()):
            lines.append(f"  not legal in {s.game}, act as NOOP: {illegal}")
        if s.num_cut:
            lines.append(f"  cut, so not among episodes and returns: {s.num_cut:,} whose end the data does not show")
        if s.num_unsampleable:
            lines.append(
                f"  cannot be sampled, as the frame that follows is not stored: {s.num_unsampleable:,} transitions"
            )
    total = sum(s.num_transitions for s in summaries)
    num_bytes = sum(s.num_bytes for s in summaries)
    lines.append(
        f"{len(summaries)} game{'s' * (len(summaries) != 1)}, {total:,} transitions, "
        f"{num_bytes / 1e6:,.1f} MB in {codec}, {num_bytes / max(total, 1):.1f} bytes per transition"
    )
    return "\n".join(lines)


def _bars(values: np.ndarray) -> str:
    """A bar per value, from the least to the greatest of them."""
    height = (values - values.min()) / max(np.ptp(values), 1e-9) * (len(_BARS) - 1)
    return "".join(_BARS[round(each)] for each in height)


def draw_lives(summaries: Sequence[GameSummary]) -> Image.Image:
    """Returns over the steps of each game, below each other: a point per whole episode, a line through the means.

    Raises:
        ValueError: if no game has a whole episode.
    """
    drawn = [summary for summary in summaries if len(summary.returns)]
    if not drawn:
        raise ValueError("there are no whole episodes, so there are no returns to draw")
    width, height, margin = 640, 200, 24
    image = Image.new("RGB", (width, len(drawn) * height), "white")
    draw = ImageDraw.Draw(image)
    for row, summary in enumerate(drawn):
        least, greatest = summary.returns.min(), max(summary.returns.max(), summary.returns.min() + 1e-9)
        bottom = (row + 1) * height - margin

        def place(step: float, value: float, total: int, bottom: int, least: float, greatest: float) -> tuple:
            share = (value - least) / (greatest - least)
            return margin + step / total * (width - 2 * margin), bottom - share * (height - 3 * margin)

        total = int(summary.lengths.sum())
        frame = (total, bottom, least, greatest)
        for step, value in zip(np.cumsum(summary.lengths), summary.returns, strict=True):
            x, y = place(step, value, *frame)
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill="#9db7d5")
        middles = (np.arange(_NUM_PARTS) + 0.5) * total / _NUM_PARTS
        kept = ~np.isnan(summary.life)
        means = zip(middles[kept], summary.life[kept], strict=True)
        draw.line([place(*each, *frame) for each in means], fill="#1f4e8c", width=2)
        text = f"{summary.game}: returns {least:g} to {summary.returns.max():g}, {total:,} agent steps"
        draw.text((margin, row * height + 6), text, fill="black")
    return image


def mean_frame(store: FrameStore, game: str, *, num_samples: int = 2000, seed: int = 0) -> np.ndarray:
    """Mean of random frames of one game, all its recordings taken together.

    Args:
        store (FrameStore): where it is.
        game (str): its name.

    Keyword Args:
        num_samples (int): frames drawn, with replacement.
        seed (int): seed of the draw.

    Returns:
        float32 ``[84, 84]`` in 0..255.

    Raises:
        ValueError: if the store holds no frames of the game.
        DamagedFramesError: if a frame cannot be read.
    """
    frames = _frames_of(store, game)
    drawn = np.sort(np.random.default_rng(seed).integers(0, len(frames), num_samples))
    batches = np.array_split(drawn, range(512, num_samples, 512))
    total = sum((frames[batch].sum(0, dtype=np.int64) for batch in batches), np.zeros(FRAME_SHAPE, np.int64))
    return (total / num_samples).astype(np.float32)


def contact_sheet(store: FrameStore, game: str, *, num_columns: int = 12, num_rows: int = 8) -> np.ndarray:
    """Frames of a game at equal distances through all its recordings, in reading order.

    Args:
        store (FrameStore): where it is.
        game (str): its name.

    Keyword Args:
        num_columns (int): frames side by side.
        num_rows (int): frames above each other.

    Returns:
        uint8 ``[84 * num_rows, 84 * num_columns]``.

    Raises:
        ValueError: if the store holds no frames of the game.
        DamagedFramesError: if a frame cannot be read.
    """
    frames = _frames_of(store, game)
    tiles = frames[np.arange(num_columns * num_rows) * len(frames) // (num_columns * num_rows)]
    height, width = FRAME_SHAPE
    tiles = tiles.reshape(num_rows, num_columns, height, width)
    return tiles.transpose(0, 2, 1, 3).reshape(num_rows * height, num_columns * width)


def draw_contact_sheets(store: FrameStore, *, num_columns: int = 12) -> Image.Image:
    """The contact sheets of all games that have frames, each under its name: 8 rows of frames or a few more in all.

    Raises:
        ValueError: if the store holds no frames yet.
        DamagedFramesError: if a frame cannot be read.
    """
    games = [*dict.fromkeys(recording.game for recording in store.recordings if recording.num_frames)]
    if not games:
        raise ValueError(f"the store {store.path} holds no frames yet")
    num_rows = -(-8 // len(games))
    height, width = FRAME_SHAPE
    block = _LABEL_PIXELS + num_rows * height
    image = Image.new("L", (num_columns * width, len(games) * block), 255)
    for index, game in enumerate(games):
        ImageDraw.Draw(image).text((4, index * block + 2), game, fill=0)
        sheet = contact_sheet(store, game, num_columns=num_columns, num_rows=num_rows)
        image.paste(Image.fromarray(sheet), (0, index * block + _LABEL_PIXELS))
    return image


def _frames_of(store: FrameStore, game: str) -> StoredFrames:
    frames = StoredFrames(store.recordings_of(game))
    if not len(frames):
        raise ValueError(f"the store {store.path} holds no frames of {game} yet")
    return frames


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
