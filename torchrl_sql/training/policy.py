"""A trained network as one file: its weights and its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_sql.config import RunConfig, run_config_from_yaml
from torchrl_sql.files import replacing
from torchrl_sql.games import NUM_ACTIONS, legal_action_mask
from torchrl_sql.methods import make_method
from torchrl_sql.training.checkpoint import (
    CheckpointError,
    check_format,
    list_checkpoints,
    load_checkpoint,
    wrong_content,
)

POLICY_FILE = "policy.safetensors"
"""In the folder of a trained run."""

_POLICY_FORMAT = "torchrl_sql policy 3"


def find_checkpoint(path: Path | str) -> Path:
    """A checkpoint file itself, or the newest one of a run's folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"{path} must be a checkpoint or the folder of a trained run, but holds no checkpoint")
    return checkpoints[-1]


class Trained(NamedTuple):
    """A trained network on the CPU in evaluation mode, its run's configuration, its gradient steps."""

    network: nn.Module
    config: RunConfig
    gradient_step: int


def load_agent(path: Path) -> Trained:
    """Loads a trained network for acting.

    Args:
        path (Path): a checkpoint, or a run's folder (its newest checkpoint is taken).

    Raises:
        CheckpointError: if the checkpoint is damaged, or its weights are of another network than it says.
    """
    path = find_checkpoint(path)
    content: dict[str, Any] = load_checkpoint(path)
    with wrong_content(path):
        config = run_config_from_yaml(content["config"], source=f"the configuration in {path}")
        method = make_method(config.method)
        network = method.network(config.model, config.games)
        weights, gradient_step = content["trainer"]["loss"], int(content["trainer"]["step"])
    # The loss holds the network's own parameters: loading it loads them.
    try:
        method.loss(network).load_state_dict(weights)
    # What torch and tensordict raise for other names, shapes and types.
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must hold the weights of the network that its configuration describes ({config.method.name}, "
            f"{len(config.games)} games, 18 actions), got weights of other names or shapes"
        ) from error
    return Trained(network.eval(), config, gradient_step)


def export_policy(checkpoint: Path | str, path: Path | str, *, compact: bool = False) -> None:
    """Write the online network of a checkpoint as one safetensors file for :func:`load_policy`.

    Its metadata are ``format``, ``config`` (the run's configuration as YAML), ``games`` (their names separated by
    commas, in the order of ``game_id``), ``gradient_step``, ``heads`` (``all`` or ``legal``), and ``sha256`` of the
    others and the weights.

    Args:
        checkpoint (Path or str): a checkpoint, or a run's folder (its newest checkpoint is taken).
        path (Path or str): the file to write, in one move.

    Keyword Args:
        compact (bool): parameters in float16, and of the heads of a Q-network only the rows of legal actions, for files
            to hand around: some half of the size. Loaded, it acts with weights rounded to float16.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        OSError: if the file cannot be written; nothing is left of it.
    """
    checkpoint, path = find_checkpoint(checkpoint), Path(path)
    network, config, gradient_step = load_agent(checkpoint)
    metadata = {
        "format": _POLICY_FORMAT,
        "config": config.to_yaml(),
        "games": ",".join(config.games),
        "gradient_step": str(gradient_step),
        "heads": "legal" if compact else "all",
    }
    weights = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    if compact:
        weights |= {name: weights[name].half() for name, _ in network.named_parameters()}
        weights |= {name: _rows(weights[name])[_legal(config, weights[name])] for name in _heads(weights)}
    metadata["sha256"] = _digest(metadata, weights)
    with replacing(path, concurrent=True) as temporary:
        temporary.write_bytes(save(weights, metadata=metadata))


def load_policy(path: Path | str, *, device: torch.device | str = "cpu") -> TensorDictModuleBase:
    """Load a ``policy.safetensors`` file, ready to act. Runs no code from the file.

    Args:
        path (Path or str): what :func:`export_policy` or a finished training run wrote.

    Keyword Args:
        device (torch.device or str): where the weights go.

    Returns:
        The method's usual policy in evaluation mode, which never chooses an action that its game does not know. Of a
        Q-network it is the greedy :class:`torchrl_sql.modules.NetworkPolicy`: ``observation`` uint8
        ``[*B, 4, 84, 84]`` and ``game_id`` int64 ``[*B]`` (place of the game in the file's ``games``) in, ``action``
        int64 ``[*B]`` out. A return-conditioned transformer reads a context and random numbers too: its ``in_keys``.

    Raises:
        CheckpointError: if the file is damaged or of another format.
        FileNotFoundError: if there is none.
        OSError, MemoryError: if it cannot be read at present.
    """
    network, config, _ = read_policy(Path(path))
    return make_method(config.method).policy(network.to(device), config.games).eval()


def read_policy(path: Path) -> Trained:
    """The network of a ``policy.safetensors`` file, with its run's configuration; errors as of :func:`load_policy`."""
    return read_policy_file(path)[0]


def read_policy_file(path: Path) -> tuple[Trained, dict[str, str]]:
    """As :func:`read_policy`, with the file's metadata, see :func:`export_policy`."""
    if not path.is_file():
        raise FileNotFoundError(f"no policy at {path}")
    metadata, weights = _read(path)
    check_format(path, metadata.get("format"), _POLICY_FORMAT)
    if metadata.get("sha256") != _digest(metadata, weights):
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    with wrong_content(path):
        config = run_config_from_yaml(metadata["config"], source=f"the configuration in {path}")
        method = make_method(config.method)
        network = method.network(config.model, config.games)
        if metadata["heads"] == "legal":
            state = network.state_dict()
            for name in _heads(weights):
                whole = torch.zeros_like(state[name])
                _rows(whole)[_legal(config, whole)] = weights[name].to(whole.dtype)
                weights[name] = whole
        network.load_state_dict(weights)
        return Trained(network.eval(), config, int(metadata["gradient_step"])), metadata


def policy_digest(path: Path) -> str:
    """SHA-256 of metadata and weights, as a policy file says of itself.

    Raises:
        CheckpointError: if it is not such a file.
    """
    with wrong_content(path):
        return _read(path)[0]["sha256"]


def _heads(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the per-game heads' weights and biases."""
    return [name for name in weights if name.endswith((".heads.weight", ".heads.bias"))]


def _rows(heads: Tensor) -> Tensor:
    """A view ``[G, A, N, ...]`` of heads ``[G, N * A, ...]``."""
    return heads.unflatten(1, (-1, NUM_ACTIONS)).transpose(1, 2)


def _legal(config: RunConfig, heads: Tensor) -> Tensor:
    """Bool ``[G, A]``, or ``[1, A]`` where one head serves all games: actions that some game of each head knows."""
    legal = legal_action_mask(config.games)
    return legal if len(legal) == len(heads) else legal.any(0, keepdim=True)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, MemoryError):
        raise
    except Exception as error:  # safetensors' own, and whatever damaged names, types and offsets lead to
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error


def _digest(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the other metadata and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": None}, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
