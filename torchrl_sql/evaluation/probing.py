"""What can be read, linearly, from a trained encoder: linear probes of the emulator's state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchrl_sql.config import QNetworkConfig, RunConfig
from torchrl_sql.envs import Emulator
from torchrl_sql.envs.labels import LabelledStates, record_labelled_states
from torchrl_sql.evaluation.policies import digest_of_weights
from torchrl_sql.files import read_json, write_text
from torchrl_sql.methods import make_method
from torchrl_sql.modules.q_network import as_map, scale_frames
from torchrl_sql.statistics.probes import LinearProbe, quarters_of, why_unread
from torchrl_sql.training.policy import POLICY_FILE, read_policy_file

PROBES = "probes.json"
"""In the folder of a study, or where ``--out`` says."""

RANDOM, PIXELS = "random", "pixels"
"""What stands for an agent: encoders as runs begin, and the frames themselves."""

_FORMAT, _VERSION = "torchrl_sql probes", 1
_BATCH_SIZE = 128
_KIND = ("encoder", "num_groups", "last_norm_scale", "center_input")
"""Settings of the model that encoders must share to be compared."""


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """Which states are labelled, see :func:`record_labelled_states`.

    Attributes:
        num_episodes (int): per game.
        states_per_episode (int): at most.
        sticky_action_probability (float): see :class:`Emulator`.
        max_env_frames (int): likewise.
        seed (int): of episodes and states.
    """

    num_episodes: int = 24
    states_per_episode: int = 50
    sticky_action_probability: float = 0.25
    max_env_frames: int = 4_000
    seed: int = 0


class ProbeScore(NamedTuple):
    """How well one label is read.

    Attributes:
        agent (str): the run's name, ``random`` or ``pixels``.
        seed (int or None): of the run, or of the random encoder.
        game, label (str): what is read.
        r2 (float): see :meth:`LinearProbe.r2`.
        num_features (int): of how many.
    """

    agent: str
    seed: int | None
    game: str
    label: str
    r2: float
    num_features: int


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Scores of several encoders on the same states.

    Attributes:
        scores (sequence of ProbeScore): of all encoders, games and labels.
        left_out (sequence of str): labels that are not read, and why.
        policies (sequence of mapping): name, seed, method, gradient steps, file and digest of each.
        protocol (ProbeProtocol): which states.
        made (mapping): command, date, commit, machine, versions.
    """

    scores: Sequence[ProbeScore]
    left_out: Sequence[str]
    policies: Sequence[Mapping[str, Any]]
    protocol: ProbeProtocol
    made: Mapping[str, Any]

    def to_json(self) -> str:
        """As :func:`read_probes` reads it."""
        content = asdict(self) | {"scores": [score._asdict() for score in self.scores]}
        return json.dumps({"format": _FORMAT, "version": _VERSION} | content, indent=1, allow_nan=False)

    def write(self, path: Path) -> None:
        """In one move."""
        write_text(path, self.to_json() + "\n")


def read_probes(path: Path) -> ProbeResult:
    """What :meth:`ProbeResult.write` wrote.

    Raises:
        ValueError: if it is another file.
    """
    content = read_json(path, _FORMAT, version=_VERSION)
    try:
        protocol = ProbeProtocol(**content.pop("protocol"))
        scores = [ProbeScore(**score) for score in content.pop("scores")]
        return ProbeResult(scores=scores, protocol=protocol, **content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file of torchrl-sql probe, but {error}") from error


def find_policies(paths: Iterable[Path]) -> list[Path]:
    """The policy files that paths name: files, runs' folders, and folders that hold those, e.g. of a study.

    Raises:
        FileNotFoundError: if a path names none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        depths = ("", "*/", "*/*/")
        files = (
            [path] if path.is_file() else sorted(file for depth in depths for file in path.glob(depth + POLICY_FILE))
        )
        if not files:
            raise FileNotFoundError(
                f"{path} must be a {POLICY_FILE}, the folder of a finished run or one that holds such folders, "
                f"found no {POLICY_FILE}"
            )
        found |= dict.fromkeys(files)
    return list(found)


def probe(
    policies: Sequence[Path],
    games: Sequence[str],
    protocol: ProbeProtocol,
    *,
    made: Mapping[str, Any],
    device: torch.device,
) -> ProbeResult:
    """Reads labels of states from the encoders of policies, from encoders as their runs began, and from the pixels.

    Features are the feature map, flattened: what ``init.load=encoder`` hands over, of the same width for all methods on
    an encoder, and before pooling, which an encoder's next user learns anew. Where a run centres its input, the mean
    frame is that of these states, as it would be of a new run's data.

    Args:
        policies (sequence of Path): files, see :func:`find_policies`.
        games (sequence of str): with labels.
        protocol (ProbeProtocol): which states.

    Keyword Args:
        made (mapping): see :class:`ProbeResult`.
        device (torch.device): of the encoders.

    Raises:
        CheckpointError: if a policy file is damaged.
        ValueError: if a game has no labels, a network no encoder of stacked frames, networks have different encoders,
            two policies are of one run, or no label can be read.
    """
    encoders, about = _read_encoders(policies)
    emulator = Emulator(
        sticky_action_probability=protocol.sticky_action_probability, max_env_frames=protocol.max_env_frames
    )
    scores: list[ProbeScore] = []
    left_out: list[str] = []
    for game in games:
        states = record_labelled_states(
            game, num_episodes=protocol.num_episodes, states_per_episode=protocol.states_per_episode,
            emulator=emulator, seed=protocol.seed,
        )  # fmt: skip
        quarters = quarters_of(states.episode)
        reasons = {name: why_unread(label, quarters) for name, label in states.labels.items()}
        left_out += [f"{states.game}: {name} is {reason}" for name, reason in reasons.items() if reason is not None]
        labels = {name: label for name, label in states.labels.items() if reasons[name] is None}
        pixels = states.observation.reshape(len(states.observation), -1)
        scores += _scores(PIXELS, None, states, labels, pixels)
        mean_frame = states.observation[:, -1].mean(0) / 255
        for encoder in encoders:
            features = encoder.features(states.observation, mean_frame, device)
            scores += _scores(encoder.agent, encoder.config.seed, states, labels, features)
    if not scores:
        raise ValueError(f"some label must be read, but none can: {'; '.join(left_out)}; more episodes may differ more")
    return ProbeResult(scores=scores, left_out=left_out, policies=about, protocol=protocol, made=made)


def _read_encoders(policies: Sequence[Path]) -> tuple[list[_Encoder], list[dict[str, Any]]]:
    """The encoders of policies, the different ones with which their runs began, and what is said of the policies."""
    encoders: dict[str, _Encoder] = {}
    about: list[dict[str, Any]] = []
    kinds: dict[str, Path] = {}
    for path in policies:
        trained, metadata = read_policy_file(path)
        config = trained.config
        for other in about:
            if (other["name"], other["seed"]) == (config.name, config.seed):
                raise ValueError(
                    f"policies must be of different runs, got {config.name} of seed {config.seed} in "
                    f"{other['policy']} and {path}"
                )
        begun = _Encoder(RANDOM, config, _untrained(config), path)
        kinds.setdefault(begun.kind, path)
        if len(kinds) > 1:
            found = " and ".join(f"{kind} in {where}" for kind, where in kinds.items())
            raise ValueError(f"policies must have the same kind of encoder, to be compared, got {found}")
        encoders.setdefault(begun.digest, begun)
        encoders[str(path)] = _Encoder(config.name, config, trained.network, path)
        about.append({
            "name": config.name, "seed": config.seed, "method": config.method.name,
            "gradient_step": trained.gradient_step, "policy": str(path), "sha256": metadata["sha256"],
        })  # fmt: skip
    return [*encoders.values()], about


def _scores(
    agent: str, seed: int | None, states: LabelledStates, labels: Mapping[str, np.ndarray], features: np.ndarray
) -> list[ProbeScore]:
    scores = LinearProbe(features, states.episode).r2(labels)
    return [ProbeScore(agent, seed, states.game, name, r2, features.shape[1]) for name, r2 in scores.items()]


class _Encoder:
    """What maps stacked frames to features in a network, and whose it is."""

    def __init__(self, agent: str, config: RunConfig, network: nn.Module, path: Path) -> None:
        found = [module for name, module in network.named_modules() if name.split(".")[-1] == "encoder"]
        if not found:
            raise ValueError(
                f"{path} must hold a network with an encoder of stacked frames, got one with "
                f"method.name={config.method.name}"
            )
        assert isinstance(config.model, QNetworkConfig)
        self.agent, self.config = agent, config
        self.digest = digest_of_weights(found[0])
        self.kind = ", ".join(f"model.{key}={getattr(config.model, key)}" for key in _KIND)
        self._encoder, self._centred, self._path = found[0].eval(), config.model.center_input, path

    @torch.no_grad()
    def features(self, observation: np.ndarray, mean_frame: np.ndarray, device: torch.device) -> np.ndarray:
        """Float32 ``[N, D]`` of states ``[N, 4, 84, 84]``; ``mean_frame`` ``[84, 84]`` is in [0, 1]."""
        encoder = self._encoder.to(device)
        mean = torch.tensor(mean_frame, dtype=torch.float32, device=device)[None] if self._centred else None

        def flat(states: Tensor) -> Tensor:
            game_id = torch.zeros(len(states), dtype=torch.int64, device=device)
            x = scale_frames(
                states.to(device), game_id, mean, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            return as_map(encoder(x)).flatten(1).float().cpu()

        features = torch.cat([flat(batch) for batch in torch.from_numpy(observation).split(_BATCH_SIZE)])
        if not features.isfinite().all():
            raise ValueError(f"{self._path} must hold an encoder whose features are finite numbers, got others")
        return features.numpy()


def _untrained(config: RunConfig) -> nn.Module:
    """The network as its run began, but for what it loaded from another."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return make_method(config.method).network(config.model, config.games)
