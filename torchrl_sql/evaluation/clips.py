"""Gameplay clips: what the policy saw, its value and its score."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from torchrl_sql.evaluation.rollout import Rollout

_SCALE = 3
_CAPTION_PIXELS = 22
_FRAME_MILLISECONDS = 67  # an agent step is four of 60 frames a second


def to_gif(episode: Rollout, *, max_agent_steps: int = 300) -> bytes:
    """Draws a recorded episode as an animated GIF at real speed.

    Args:
        episode (Rollout): with frames, values and rewards recorded.

    Keyword Args:
        max_agent_steps (int): where the clip ends (15 agent steps are a second).

    Raises:
        ValueError: if nothing was recorded.
    """
    if not episode.frames:
        raise ValueError(f"episode {episode.episode} of {episode.game} must be recorded to be drawn, got no frames")
    score = np.concatenate([[0.0], np.cumsum(episode.rewards)])
    images = []
    for step, (frame, value) in enumerate(zip(episode.frames[:max_agent_steps], episode.values, strict=False)):
        height, width = (_SCALE * side for side in frame.shape)
        image = Image.new("L", (width, height + _CAPTION_PIXELS), 255)
        image.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST))
        ImageDraw.Draw(image).text((6, height + 5), f"score {score[step]:g}   value {value:.2f}   step {step}", fill=0)
        images.append(image.quantize(32))
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=_FRAME_MILLISECONDS,
        loop=0,
        optimize=True,
    )
    return buffer.getvalue()
