"""What a masked auto-encoder makes of states: a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchrl_sql.config import RunConfig
from torchrl_sql.data import FrameStore
from torchrl_sql.methods import make_method
from torchrl_sql.report.dataset import find_store
from torchrl_sql.report.model import Picture
from torchrl_sql.training.policy import POLICY_FILE, read_policy

_SCALE = 2


def reconstructions(runs: Iterable[tuple[Path, RunConfig]]) -> list[Picture]:
    """A picture of each masked auto-encoder, of its first run that is trained and whose data is there.

    Args:
        runs (iterable of (Path, RunConfig)): folders and configurations, of any methods.
    """
    first: dict[str, tuple[Path, RunConfig]] = {}
    for folder, config in runs:
        there = (folder / POLICY_FILE).is_file() and find_store(folder, config) is not None
        if config.method.name == "mae" and there:
            first.setdefault(config.name, (folder, config))
    pictures = []
    for name, (folder, config) in first.items():
        file = io.BytesIO()
        draw_reconstructions(folder).save(file, format="PNG")
        caption = (
            f"Frames from the data of {name}, seed {config.seed} ({', '.join(config.games)}): as they are; grey, the "
            "places of the feature map that are hidden; as they are decoded from the other places."
        )
        title = f"Reconstructions of {name}"
        pictures.append(Picture(name=f"reconstructions_{name}", title=title, caption=caption, data=file.getvalue()))
    return pictures


@torch.no_grad()
def draw_reconstructions(run: Path, *, states_per_game: int = 6, seed: int = 0) -> Image.Image:
    """Newest frames of states of a run's data: as they are, the hidden places grey, and as they are decoded.

    Three rows per game, a column per state. The hidden places are those of the feature map, each of which saw more of
    the frame than the patch that is grey here.

    Args:
        run (Path): folder of a trained run with ``method=mae``, whose store is there.

    Keyword Args:
        states_per_game (int): columns.
        seed (int): which states, and which places are hidden.

    Raises:
        CheckpointError: if the run's policy is damaged.
        FileNotFoundError: if it, or the store, is not there.
        ValueError: for a run of another method, or too many states.
    """
    trained: Any
    trained, config, _ = read_policy(run / POLICY_FILE)
    if config.method.name != "mae":
        raise ValueError(f"{run} must be a run with method=mae, got {config.method.name}")
    num_states = states_per_game * len(config.games)
    data = replace(config.data, batch_size=4 * num_states, mixture="games", prefetch=0)
    store = find_store(run, config)
    if store is None:
        raise FileNotFoundError(f"{data.store}, the data of {run}, is not there")
    replay = make_method(config.method).replay(data, FrameStore.open(store), seed=seed)
    batch = replay.sample()
    replay.shutdown()
    places = [(batch["game_id"] == game).nonzero().squeeze(-1)[:states_per_game] for game in range(len(config.games))]
    if min(map(len, places)) < states_per_game:
        raise ValueError(
            f"states_per_game must be smaller: {4 * num_states} states did not hold {states_per_game} each"
        )
    batch = batch[torch.cat(places)]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        trained(batch)
    frames = batch["observation"].float() / 255
    decoded = batch["reconstruction"] + (frames - batch["target"])  # with the game's mean, where it was taken off
    network = trained.module
    hidden = batch["masked"].float().unflatten(-1, network.map_shape[1:])
    grey = hidden.repeat_interleave(network.patch[0], -2).repeat_interleave(network.patch[1], -1)[..., :84, :84]
    rows = torch.stack([frames[:, -1], torch.where(grey > 0, 0.5, frames[:, -1]), decoded[:, -1]])
    return _tiled(rows.unflatten(1, (len(config.games), states_per_game)).transpose(0, 1).flatten(0, 1))


def _tiled(frames: Tensor) -> Image.Image:
    """Frames ``[rows, columns, 84, 84]`` in [0, 1] side by side, enlarged, with white lines between them."""
    padded = torch.nn.functional.pad(frames, (1, 1, 1, 1), value=1.0)
    pixels = (padded.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = pixels.shape
    return Image.fromarray(pixels.numpy()).resize((width * _SCALE, height * _SCALE), Image.Resampling.NEAREST)
