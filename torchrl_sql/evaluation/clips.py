"""Gameplay clips: the game in colour, the four frames that the network sees, the score, and the values of its actions.

MP4 through the encoder that the package ``imageio-ffmpeg`` brings (``pip install torchrl-sql[video]``); without it, a
smaller and shorter GIF.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from torchrl_sql.envs import Emulator, replay_episode
from torchrl_sql.evaluation.protocol import AgentId
from torchrl_sql.evaluation.rollout import Rollout
from torchrl_sql.files import replacing
from torchrl_sql.games import ACTION_NAMES, find_game

MAX_AGENT_STEPS = 900
"""Where a clip ends: a minute, at 15 agent steps per second."""
_GIF_AGENT_STEPS = 300
FRAMES_PER_SECOND = 15
"""An agent step is four of 60 frames per second."""

_WIDTH, _HEIGHT = 1008, 480  # multiples of 16, as H.264 likes them
_SCREEN = (16, 44, 560, 420)  # left, top, width, height: four by three
_PANEL_LEFT, _PANEL_RIGHT = 596, 992
_STACK_SIDE, _STACK_GAP, _STACK_TOP = 90, 12, 62
_BARS_TOP, _BARS_BOTTOM = 190, 464
_BAR_LEFT, _BAR_RIGHT = 706, 926
_BACKGROUND, _TEXT, _MUTED, _BAR, _CHOSEN = "#14171c", "#f2f4f7", "#9aa4b2", "#4b5a70", "#f5a524"


def has_video_encoder() -> bool:
    """Whether clips can be MP4."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def find_clip(folder: Path, game: str, agent: AgentId, episode: int = 0) -> Path | None:
    """The clip of an agent's episode in a game, None without one."""
    stem = _stem(game, agent, episode)
    return next((path for suffix in ("mp4", "gif") if (path := folder / f"{stem}.{suffix}").is_file()), None)


def _stem(game: str, agent: AgentId, episode: int) -> str:
    stem = f"{game}-{agent.name}-{agent.decoding}-seed{agent.training_seed}-{agent.gradient_step}"
    return f"{stem}-episode{episode}" if episode else stem


def write_clip(
    episode: Rollout, folder: Path, agent: AgentId, emulator: Emulator, *, value_name: str = "Q-values"
) -> Path:
    """Plays a recorded episode again and writes ``<game>-<agent>-<decoding>-seed<seed>-<step>.mp4`` (or ``.gif``).

    The name of an episode other than the first ends in ``-episode<number>``. The file appears whole, in one move.

    Args:
        episode (Rollout): with actions (and the policy's values, if it has any) recorded.
        folder (Path): created if absent.
        agent (AgentId): who played it.
        emulator (Emulator): as it was played.

    Keyword Args:
        value_name (str): what the values are.

    Raises:
        ValueError: if nothing was recorded, or the emulator does not replay the episode.
    """
    if not episode.actions:
        raise ValueError(f"episode {episode.episode} of {episode.game} must be recorded to be drawn, got no actions")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_stem(episode.game, agent, episode.episode)}.{'mp4' if has_video_encoder() else 'gif'}"
    heading = f"{episode.game}   {agent.name}" + (
        f"   gradient step {agent.gradient_step:,}" if agent.gradient_step else ""
    )
    views = replay_episode(episode.game, episode.episode_seed, episode.actions[:MAX_AGENT_STEPS], emulator)
    images = _draw(episode, views, heading, value_name)
    with replacing(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, images, fps=FRAMES_PER_SECOND)
        else:
            _write_gif(temporary, images)
    return path


def write_mp4(path: Path, images: Iterable[Image.Image], *, fps: int) -> None:
    """Writes pictures of one size, of an even number of pixels each way."""
    import imageio_ffmpeg  # optional extra `video`

    images = iter(images)
    first = next(images, None)
    if first is None:
        raise ValueError("images must hold at least one picture, got none")
    writer = imageio_ffmpeg.write_frames(
        str(path),
        first.size,
        fps=fps,
        quality=None,
        macro_block_size=2,
        output_params=["-crf", "27", "-preset", "medium", "-movflags", "+faststart", "-f", "mp4"],
    )
    writer.send(None)
    try:
        for image in chain([first], images):
            writer.send(image.tobytes())
    finally:
        writer.close()


def _write_gif(path: Path, images: Iterator[Image.Image]) -> None:
    small = [
        image.resize((_WIDTH // 2, _HEIGHT // 2), Image.Resampling.LANCZOS).quantize(64)
        for image, _ in zip(images, range(_GIF_AGENT_STEPS), strict=False)
    ]
    small[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=small[1:],
        duration=1000 // FRAMES_PER_SECOND,
        loop=0,
        optimize=True,
    )


def _draw(
    episode: Rollout, views: Iterable[tuple[np.ndarray, np.ndarray, float]], heading: str, value_name: str
) -> Iterator[Image.Image]:
    """One picture per agent step, of what :func:`replay_episode` shows."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    actions = find_game(episode.game).minimal_actions
    values = np.array(episode.action_values)[:, actions] if episode.action_values else None
    score = 0.0
    for step, (stack, screen, reward) in enumerate(views):
        image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
        draw = ImageDraw.Draw(image)
        draw.text((_SCREEN[0], 12), heading, _TEXT, font)
        draw.text(
            (_PANEL_RIGHT, 12), f"score {score:,.0f}   {step / FRAMES_PER_SECOND:.1f} s", _TEXT, font, anchor="ra"
        )
        image.paste(Image.fromarray(screen).resize(_SCREEN[2:], Image.Resampling.NEAREST), _SCREEN[:2])
        draw.text((_PANEL_LEFT, _STACK_TOP - 19), "what the network sees, oldest first", _MUTED, small)
        for i, frame in enumerate(stack):
            picture = Image.fromarray(frame).resize((_STACK_SIDE, _STACK_SIDE), Image.Resampling.BILINEAR)
            image.paste(picture, (_PANEL_LEFT + i * (_STACK_SIDE + _STACK_GAP), _STACK_TOP))
        chosen, of_step = episode.actions[step], None if values is None else values[step]
        _draw_bars(draw, small, actions, chosen, of_step, values, value_name)
        yield image
        if reward != episode.rewards[step]:
            raise ValueError(
                f"the emulator must replay {episode.game}, seed {episode.episode_seed}, as it was played: step {step} "
                f"gave {episode.rewards[step]:g}, now {reward:g}"
            )
        score += reward


def _draw_bars(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    actions: tuple[int, ...],
    chosen: int,
    now: np.ndarray | None,
    all_steps: np.ndarray | None,
    value_name: str,
) -> None:
    """A row per legal action; its bar is how far its value is above the worst one's, on one scale for the clip."""
    title = "action" if now is None else f"{value_name} (bar: above the worst action)"
    draw.text((_PANEL_LEFT, _BARS_TOP - 24), f"{title}:", _MUTED, font)
    draw.text((_PANEL_RIGHT, _BARS_TOP - 24), ACTION_NAMES[chosen], _CHOSEN, font, anchor="ra")
    pitch = min(24.0, (_BARS_BOTTOM - _BARS_TOP) / len(actions))
    unit = 1.0 if all_steps is None else max(float(np.ptp(all_steps, axis=1).max()), 1e-6)
    for row, action in enumerate(actions):
        top = _BARS_TOP + row * pitch
        middle = top + pitch / 2
        color = _CHOSEN if action == chosen else _TEXT
        draw.text((_BAR_LEFT - 8, middle), ACTION_NAMES[action], color, font, anchor="rm")
        if now is not None:
            length = float(now[row] - now.min()) / unit * (_BAR_RIGHT - _BAR_LEFT)
            fill = _CHOSEN if action == chosen else _BAR
            draw.rectangle((_BAR_LEFT, top + 2, _BAR_LEFT + 1 + length, top + pitch - 2), fill)
            draw.text((_PANEL_RIGHT, middle), f"{now[row]:.2f}", color, font, anchor="rm")
        elif action == chosen:
            draw.rectangle((_BAR_LEFT, top + 2, _BAR_LEFT + 20, top + pitch - 2), _CHOSEN)
