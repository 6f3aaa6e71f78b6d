"""Episodes as they look in the emulator, in colour: as GIF, as MP4 or in a window, several games side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from torchrl_sql.envs import Emulator, replay_episode
from torchrl_sql.envs.atari import SCREEN_SHAPE
from torchrl_sql.evaluation.clips import FRAMES_PER_SECOND, has_video_encoder, write_mp4
from torchrl_sql.evaluation.rollout import Rollout
from torchrl_sql.files import replacing

_GAP = 4
"""Pixels between games."""
_WINDOW_SCALE = 3


def film(
    episodes: Sequence[Sequence[Rollout]], emulator: Emulator, *, fps: int = FRAMES_PER_SECOND
) -> Iterator[Image.Image]:
    """The pictures of recorded episodes, at the emulator's resolution.

    Args:
        episodes (sequence of sequences of Rollout): with actions recorded; one sequence per place, left to right, whose
            episodes follow one another. Where a place has none left, its last picture stays.
        emulator (Emulator): as they were played.

    Keyword Args:
        fps (int): pictures per second of play, a divisor of 15: an agent acts 15 times per second.

    Raises:
        ValueError: for another number of pictures.
    """
    if fps < 1 or FRAMES_PER_SECOND % fps:
        raise ValueError(f"fps must be a divisor of {FRAMES_PER_SECOND}, the agent's steps per second, got {fps}")
    return _pictures(episodes, emulator, FRAMES_PER_SECOND // fps)


def _pictures(episodes: Sequence[Sequence[Rollout]], emulator: Emulator, interval: int) -> Iterator[Image.Image]:
    height, width = SCREEN_SHAPE
    picture = Image.new("RGB", (len(episodes) * (width + _GAP) - _GAP, height), "white")
    for screens in zip_longest(*(islice(_screens(place, emulator), None, None, interval) for place in episodes)):
        picture = picture.copy()
        for place, screen in enumerate(screens):
            if screen is not None:
                picture.paste(Image.fromarray(screen), (place * (width + _GAP), 0))
        yield picture


def _screens(episodes: Sequence[Rollout], emulator: Emulator) -> Iterator[np.ndarray]:
    for episode in episodes:
        for _, screen, _ in replay_episode(episode.game, episode.episode_seed, episode.actions, emulator):
            yield screen


def check_file(path: Path) -> None:
    """Raises what :func:`write_film` would raise for this file."""
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"a film must be a .gif or .mp4, got {path}")
    if path.suffix == ".mp4" and not has_video_encoder():
        raise ImportError("MP4 needs an encoder: pip install torchrl-sql[video], or write a .gif")


def check_window() -> None:
    """Raises what :func:`show` would raise here."""
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")):
        raise ValueError("there is no display for a window: give --out FILE.gif or FILE.mp4")
    if find_spec("pygame") is None:
        raise ImportError("a window needs pygame: pip install torchrl-sql[watch], or give --out FILE.gif")


def write_film(path: Path, pictures: Iterable[Image.Image], *, fps: int) -> None:
    """Writes pictures as GIF or MP4, as the file's name ends; the file appears whole, in one move.

    Raises:
        ValueError: for another ending, or if there is no picture.
        ImportError: for MP4 without an encoder.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, pictures, fps=fps)
        else:
            _write_gif(temporary, pictures, fps=fps)


def _write_gif(path: Path, pictures: Iterable[Image.Image], *, fps: int) -> None:
    """With one palette for all pictures: what does not change between two of them costs next to nothing."""
    palette = _Palette()
    indices = [palette.indices(np.asarray(picture)) for picture in pictures]
    if not indices:
        raise ValueError("a film must have a picture, got none")
    frames = [Image.fromarray(each) for each in indices]
    for frame in frames:
        frame.putpalette(palette.colours())
    frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, disposal=1
    )


class _Palette:
    """Places of up to 255 colours, of which the console has 128; a further one becomes the nearest."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def indices(self, picture: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]`` -> uint8 ``[H, W]``."""
        packed = picture.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        colours, inverse = np.unique(packed, return_inverse=True)
        return np.array([self._place(int(colour)) for colour in colours], np.uint8)[inverse].reshape(packed.shape)

    def _place(self, colour: int) -> int:
        if colour not in self._places:
            self._places[colour] = len(self._places) if len(self._places) < 255 else self._nearest(colour)
        return self._places[colour]

    def _nearest(self, colour: int) -> int:
        known = np.array(self.colours()).reshape(-1, 3)
        return int(np.abs(known - np.array(_channels(colour))).sum(1).argmin())

    def colours(self) -> list[int]:
        """Red, green and blue of each place."""
        by_place = {place: colour for colour, place in reversed(self._places.items())}
        return [value for place in sorted(by_place) for value in _channels(by_place[place])]


def _channels(colour: int) -> tuple[int, int, int]:
    return colour >> 16, colour >> 8 & 255, colour & 255


def show(pictures: Iterable[Image.Image], *, fps: int, title: str) -> None:
    """Shows pictures in a window, until they end or it is closed.

    Raises:
        ImportError: without pygame.
        ValueError: without a display.
    """
    check_window()
    import pygame  # optional extra `watch`

    pygame.display.init()  # no sound is asked for
    try:
        pygame.display.set_caption(title)
        clock = pygame.time.Clock()
        for picture in pictures:
            larger = picture.resize(
                (picture.width * _WINDOW_SCALE, picture.height * _WINDOW_SCALE), Image.Resampling.NEAREST
            )
            window = pygame.display.get_surface() or pygame.display.set_mode(larger.size)
            window.blit(pygame.image.frombytes(larger.tobytes(), larger.size, "RGB"), (0, 0))
            pygame.display.flip()
            clock.tick(fps)
            if any(event.type == pygame.QUIT for event in pygame.event.get()):
                return
    finally:
        pygame.quit()
