"""A trained network as one file: its weights and its configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict.nn import TensorDictModuleBase

from torchrl_sql.config import run_config_from_yaml
from torchrl_sql.files import replacing
from torchrl_sql.methods import make_method
from torchrl_sql.training.build import find_checkpoint, load_agent
from torchrl_sql.training.checkpoint import CheckpointError

POLICY_FILE = "policy.safetensors"
"""In the folder of a trained run."""

_POLICY_FORMAT = "torchrl_sql policy 1"


def export_policy(checkpoint: Path, path: Path) -> None:
    """Writes the online network of a checkpoint as one safetensors file for :func:`load_policy`.

    Its metadata are ``format``, ``config`` (the run's configuration as YAML), ``games`` (their names separated by
    commas, in the order of ``game_id``) and ``gradient_step``.

    Args:
        checkpoint (Path): a checkpoint, or a run's folder (its newest checkpoint is taken).
        path (Path): the file to write, in one move.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        OSError: if the file cannot be written; nothing is left of it.
    """
    checkpoint = find_checkpoint(checkpoint)
    network, config, gradient_step = load_agent(checkpoint)
    metadata = {
        "format": _POLICY_FORMAT,
        "config": config.to_yaml(),
        "games": ",".join(config.games),
        "gradient_step": str(gradient_step),
    }
    weights = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    with replacing(path, concurrent=True) as temporary:
        try:
            save_file(weights, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        shutil.copymode(checkpoint, temporary)  # safetensors' own is for the owner alone


def load_policy(path: Path | str, *, device: torch.device | str = "cpu") -> TensorDictModuleBase:
    """Loads a ``policy.safetensors`` file, ready to act. Runs no code from the file.

    Args:
        path (Path or str): what :func:`export_policy` or a finished training run wrote.

    Keyword Args:
        device (torch.device or str): where the weights go.

    Returns:
        The method's greedy policy in evaluation mode, which never chooses an action that its game does not know; of a
        Q-network :class:`torchrl_sql.modules.NetworkPolicy`: ``observation`` uint8 ``[*B, 4, 84, 84]`` and ``game_id``
        int64 ``[*B]`` (place of the game in the file's ``games``) in, ``action`` int64 ``[*B]`` out.

    Raises:
        CheckpointError: if the file is damaged or of another format.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no policy at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error
    if metadata.get("format") != _POLICY_FORMAT:
        raise CheckpointError(f"{path} must be of format {_POLICY_FORMAT!r}, got {metadata.get('format')!r}")
    config = run_config_from_yaml(metadata["config"], source=f"the configuration in {path}")
    method = make_method(config.method)
    network = method.network(config.model, config.games)
    network.load_state_dict(weights)
    return method.policy(network.to(device), config.games).eval()
