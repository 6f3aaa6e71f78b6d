"""Imports Minari data sets of Atari games whose observations are 84x84 grey frames or stacks of four of them.

Such a data set is what Minari's ``DataCollector`` records from an emulator wrapped in gymnasium's
``AtariPreprocessing`` (and ``FrameStackObservation``). The public ``atari/*`` data sets hold 210x160 colour screens of
single emulator frames instead: no agent step of this package can be made from them without the emulator, so they are
refused. Minari stores frames as JPEG unless it is told ``jpeg_encoding=False``: what is imported is then not exactly
what the emulator showed, and a warning says so.

The data set's ``env_spec`` says how it was recorded. Rewards that ``ClipReward`` clipped are marked as clipped; refused
are episodes that end with each life, other steps than four emulator frames, other game modes and difficulties.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchrl_sql.data.importers.job import Episode, EpisodeSource, Format, ImportJob, ImportSummary, Position
from torchrl_sql.data.importers.pool import run_imports
from torchrl_sql.games import FRAME_SHAPE, FRAME_STACK, GAMES, NUM_ACTIONS, find_game

if TYPE_CHECKING:
    from minari import EpisodeData, MinariDataset

_COMMIT_INTERVAL_STEPS = 100_000
_STEP_FRAMES = 4
_HARMLESS_WRAPPERS = frozenset({
    "ArrayConversion", "Autoreset", "DtypeObservation", "FireResetEnv", "FrameStack", "FrameStackObservation",
    "GrayScaleObservation", "GrayscaleObservation", "HumanRendering", "JaxToNumpy", "NoopResetEnv", "NumpyToTorch",
    "OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "RenderCollection",
    "ReshapeObservation", "ResizeObservation", "TimeLimit", "TransformObservation", "WarpFrame",
})  # fmt: skip
"""Of gymnasium and Stable-Baselines3: they leave rewards, ends of episodes and the number of frames per step alone."""

logger = logging.getLogger(__name__)


def import_minari(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    game: str | None = None,
    run: str | None = None,
    rewards: Literal["raw", "clipped"] | None = None,
    progress: bool = False,
) -> list[ImportSummary]:
    """Imports one Minari data set as one run of a game.

    Of stacked observations the newest frame is kept: the store pads the first stacks of an episode with black frames,
    as DQN-Replay does, whatever the data set's own wrapper did. The frame after a truncated episode's last step is
    kept, so that all transitions can be sampled. Stopped at any instant and called again, it continues and ends in the
    same files byte for byte, if the data set's files are still the same.

    Args:
        source (str or path): id of a local data set (it is not downloaded), or the folder of one.
        store_path (path): the store; made if absent.

    Keyword Args:
        game (str, optional): name of the game; default is what the data set's environment says.
        run (str, optional): name of the run in the store; default is the data set's id with ``-`` for ``/``.
        rewards (str, optional): ``"raw"`` or ``"clipped"`` to [-1, 1], where the data set's environment does not say:
            nothing named is taken as raw, with a warning; a wrapper unknown here must be accounted for.
        progress (bool): show a bar with rate and time left on standard error.

    Returns:
        A list of one summary.

    Raises:
        ImportError: if the package ``minari`` is not installed.
        FileNotFoundError: if there is no such data set on this machine.
        ValueError: if its spaces are not those of an Atari game, its game cannot be told, or its environment played
            something else than whole games in steps of four frames.
        ImportFailedError: if an episode is damaged.
    """
    dataset = MinariSource(source, game, rewards)
    name = run or re.sub(r"[^A-Za-z0-9._-]", "-", dataset.request["dataset_id"])
    return run_imports([ImportJob(dataset, Path(store_path), name)], progress=progress)


FORMAT = Format(
    "minari",
    "id or folder of a Minari data set of 84x84 frames",
    import_minari,
    {
        "game": "its game, if the data set does not say",
        "run": "name in the store (default: of the id)",
        "rewards": "what was recorded, if the data set does not say",
    },
)


class MinariSource(EpisodeSource):
    """One Minari data set.

    Args:
        source (str or path): id or folder.
        game (str, optional): name of the game; default is what the data set's environment says.
        rewards (str, optional): ``"raw"`` or ``"clipped"``; default is what the data set's environment says.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        game: str | None = None,
        rewards: Literal["raw", "clipped"] | None = None,
    ) -> None:
        self._source = os.fspath(source)
        spec = self._dataset.spec
        self.game = _game_of(spec.env_spec, spec.dataset_id, game)
        self.description = f"Minari data set {spec.dataset_id}"
        self.rewards = _rewards(spec.env_spec, spec.dataset_id, rewards)
        self.request = {
            "format": "minari",
            "dataset_id": spec.dataset_id,
            "num_steps": int(spec.total_steps),
            "rewards": self.rewards,
        }
        self._full_actions = _full_actions(self.game, spec.action_space, spec.dataset_id)
        space = spec.observation_space
        shape = space.shape or ()
        if space.dtype != np.uint8 or _to_frames(np.zeros((1, *shape), np.uint8)) is None:
            raise ValueError(
                f"{spec.dataset_id}: observations must be uint8 [84, 84], [84, 84, 1], [1, 84, 84] or [4, 84, 84] "
                f"(of AtariPreprocessing), got {space}"
            )
        storage = self._dataset.storage
        if storage.jpeg_encoding and len(shape) in (2, 3) and min(shape[:2]) >= 32:
            logger.warning("%s may hold its frames as JPEG: they are not exactly the emulator's", spec.dataset_id)

    def count_rows(self) -> int:
        """Steps of all episodes."""
        return int(self._dataset.total_steps)

    def read(self, state: Mapping[str, Any] | None) -> Iterator[Episode | Position]:
        """One episode after the other, with a position now and then."""
        first, num_steps = state["episode"] if state else 0, 0
        indices = self._dataset.episode_indices[first:]
        for number, index in enumerate(indices.tolist(), start=first + 1):
            try:
                (data,) = self._dataset.iterate_episodes([index])
            except Exception as error:  # Of h5py, PyArrow, JPEG and NumPy.
                raise ValueError(f"{self.request['dataset_id']}, episode {index} cannot be read: {error}") from error
            episode = self._convert(data)
            yield episode
            num_steps += episode.num_rows
            if num_steps >= _COMMIT_INTERVAL_STEPS:
                yield Position({"episode": number}, {}, self._files)
                num_steps = 0
        yield Position(None, {}, self._files)

    def digest(self, part: str) -> str:
        """SHA-256 of a file of the data set."""
        with (Path(self._dataset.storage.data_path) / part).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _files(self) -> list[str]:
        folder = Path(self._dataset.storage.data_path)
        return sorted(
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if file.is_file() and file.name != "metadata.json"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_dataset"}

    @cached_property
    def _dataset(self) -> MinariDataset:
        try:
            import minari
        except ImportError as error:
            raise ImportError("Minari data sets need the package minari: pip install 'torchrl-sql[minari]'") from error
        for folder in (Path(self._source) / "data", Path(self._source)):
            if (folder / "metadata.json").is_file():
                break
        else:
            folder = minari.storage.get_dataset_path(self._source) / "data"
        if not (folder / "metadata.json").is_file():
            raise FileNotFoundError(f"{self._source} is neither a folder with a Minari data set nor the id of one here")
        try:
            return minari.MinariDataset(folder)
        except ImportError:  # The package for this kind of file is missing: the message says how to get it.
            raise
        except Exception as error:
            raise ValueError(f"{folder / 'metadata.json'} does not describe a Minari data set: {error!r}") from error

    def _convert(self, data: EpisodeData) -> Episode:
        where = f"{self.request['dataset_id']}, episode {data.id}"
        num_steps = len(data.rewards)
        ended = np.stack([data.terminations, data.truncations]).astype(bool)
        if not num_steps or ended.shape != (2, num_steps) or ended[:, :-1].any():
            raise ValueError(f"{where}: only the last of its {num_steps} steps may be terminated or truncated")
        observations = np.asarray(data.observations)
        frames = _to_frames(observations)
        if frames is None or observations.dtype != np.uint8 or len(frames) != num_steps + 1:
            raise ValueError(
                f"{where}: observations must be {num_steps + 1} frames or stacks, "
                f"got {observations.dtype} {list(observations.shape)}"
            )
        if observations.shape[1] == FRAME_STACK and (observations[1:, :-1] != observations[:-1, 1:]).any():
            raise ValueError(f"{where}: each stack must be the one before, moved by one frame")
        actions, rewards = np.asarray(data.actions), np.asarray(data.rewards)
        if actions.shape != (num_steps,) or actions.min() < 0 or actions.max() >= len(self._full_actions):
            raise ValueError(f"{where}: actions must be {num_steps} numbers in 0..{len(self._full_actions) - 1}")
        limit = 1.0 if self.rewards == "clipped" else np.finfo(np.float32).max
        allowed = (-limit <= rewards) & (rewards <= limit)
        if not allowed.all():
            kind = "within [-1, 1], for they are clipped" if self.rewards == "clipped" else "finite"
            raise ValueError(f"{where}: rewards must be {kind}, got {rewards[~allowed][0]}")
        terminated, truncated = ended[:, -1]
        return Episode(
            frames[:num_steps] if terminated else frames,
            self._full_actions[actions],
            rewards.astype(np.float32),
            "terminated" if terminated else "truncated" if truncated else "cut",
            num_steps,
        )


def _to_frames(observations: np.ndarray) -> np.ndarray | None:
    """The newest frame of each observation, ``[T, 84, 84]``; None for other shapes."""
    shape = observations.shape[1:]
    if shape == FRAME_SHAPE:
        return observations
    if shape == (*FRAME_SHAPE, 1):
        return observations[..., 0]
    if shape in ((1, *FRAME_SHAPE), (FRAME_STACK, *FRAME_SHAPE)):
        return observations[:, -1]
    return None


def _game_of(env_spec: Any, dataset_id: str, given: str | None) -> str:
    """The given game, if it can be, or that of ``ALE/MsPacman-v5``, ``PongNoFrameskip-v4`` and the like."""
    env_id, kwargs = getattr(env_spec, "id", ""), getattr(env_spec, "kwargs", {})
    chosen = {name: kwargs[name] for name in ("mode", "difficulty") if kwargs.get(name) is not None}
    if given is not None:
        game = find_game(given)
        default = find_game(game.base)
        for name in ("mode", "difficulty") if env_spec is not None else ():
            value = chosen.get(name, getattr(default, name))
            if value != getattr(game, name):
                raise ValueError(f"{dataset_id}: {name} must be {getattr(game, name)}, as in {game.name}, got {value}")
        return game.name
    rom = kwargs.get("game")
    name = re.sub(r"(-ram)?((NoFrameskip|Deterministic)?-v\d+)?$", "", env_id.rpartition("/")[2])
    for game in GAMES.values():
        if rom == game.rom or name.lower() == game.name.lower():
            return find_game(game.name + "".join(f"-{key[0]}{value}" for key, value in chosen.items())).name
    raise ValueError(f"{dataset_id} comes from {env_id or 'an environment it does not name'}: give the argument game")


def _rewards(env_spec: Any, dataset_id: str, given: Literal["raw", "clipped"] | None) -> Literal["raw", "clipped"]:
    """What the data set holds, by what its environment and the caller say.

    Raises:
        ValueError: if they disagree, or if the environment's steps or episodes are not those of this package.
    """
    if env_spec is None:
        if given is None:
            logger.warning(
                "%s does not say how it was recorded: its rewards are taken as the game's own. If they were clipped, "
                "give rewards='clipped' (--rewards clipped)",
                dataset_id,
            )
        return given or "raw"
    kwargs, unknown = env_spec.kwargs, []
    found: Literal["raw", "clipped"] | None = None
    num_frames: Any = kwargs.get("frameskip", _STEP_FRAMES)
    for wrapper in env_spec.additional_wrappers:
        arguments = wrapper.kwargs or {}
        if arguments.get("terminal_on_life_loss") or wrapper.name == "EpisodicLifeEnv":
            raise ValueError(f"{dataset_id}: episodes must be whole games, but {wrapper.name} ends them with each life")
        if wrapper.name == "AtariPreprocessing":
            num_frames *= arguments.get("frame_skip", 4)
        elif wrapper.name in ("MaxAndSkipObservation", "MaxAndSkipEnv"):
            num_frames *= arguments.get("skip", 4)
        elif wrapper.name == "RepeatAction":
            num_frames *= arguments.get("num_repeats", 1)
        elif wrapper.name in ("ClipReward", "ClipRewardEnv"):
            bounds = arguments.get("min_reward", -1), arguments.get("max_reward", 1)
            if bounds != (-1, 1):
                raise ValueError(f"{dataset_id}: rewards must be raw or clipped to [-1, 1], got {wrapper}")
            found = "clipped"
        elif wrapper.name not in _HARMLESS_WRAPPERS:
            unknown.append(wrapper.name)
    if num_frames != _STEP_FRAMES:
        raise ValueError(f"{dataset_id}: steps must be of {_STEP_FRAMES} emulator frames, got {num_frames}")
    if given is None and unknown:
        raise ValueError(
            f"{dataset_id}: what {', '.join(unknown)} did is unknown here: if episodes are whole games in steps of "
            f"{_STEP_FRAMES} frames, give rewards='raw' or 'clipped' (--rewards)"
        )
    if given is not None and found is not None and given != found:
        raise ValueError(f"{dataset_id}: rewards are {found} by its environment, cannot take them as {given}")
    return given or found or "raw"


def _full_actions(game: str, action_space: Any, dataset_id: str) -> np.ndarray:
    """The full action of each action of the data set."""
    minimal = find_game(game).minimal_actions
    num_actions = getattr(action_space, "n", None)
    if num_actions == NUM_ACTIONS:
        return np.arange(NUM_ACTIONS)
    if num_actions == len(minimal) and getattr(action_space, "start", 0) == 0:
        return np.array(minimal)
    raise ValueError(
        f"{dataset_id}: actions must be Discrete({NUM_ACTIONS}) or, as {game}'s minimal set, Discrete({len(minimal)}), "
        f"got {action_space}"
    )
