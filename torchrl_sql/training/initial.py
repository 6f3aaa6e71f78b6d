"""Where a run's weights start: from another run's policy, whole or its encoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrl_sql.config import ConfigError, QNetworkConfig, RunConfig, run_config_from_yaml
from torchrl_sql.files import expand_path
from torchrl_sql.games import find_game
from torchrl_sql.methods import make_method
from torchrl_sql.training.policy import read_policy_file
from torchrl_sql.training.ranks import Ranks

logger = logging.getLogger(__name__)

_ENCODER = re.compile(r"(?:.*\.)?encoder\.(.+)")
_HEADS = re.compile(r"(?:.*\.)?heads\.(?:weight|bias)")
_ONE_HEAD = "all games"
MEAN_FRAMES = re.compile(r"(?:.*\.)?input_mean")
_GIVEN = re.compile(rf"{MEAN_FRAMES.pattern}|(?:.*\.)?support")
"""Not learned: what the data and the settings say."""


class Start(NamedTuple):
    """What a network was filled with.

    Attributes:
        source (str): name of the policy's run.
        sha256 (str): of the policy.
        games (tuple of str): those of the run that it can play, with whatever it has of its own for each: head and mean
            frame.
    """

    source: str
    sha256: str
    games: tuple[str, ...]


def load_initial(network: nn.Module, config: RunConfig, ranks: Ranks) -> Start:
    """Fill a fresh network with what ``config.init`` names; nothing is loaded in part.

    ``load: encoder`` takes what maps frames to the feature map, ``load: all`` everything that is learned, of per-game
    heads those of games that both runs have, by name; a variation of a game starts with the head of the game. Mean
    frames come with ``all`` likewise. The rest stays as it is, and the log names it.

    Args:
        network (nn.Module): of the run, on the CPU.
        config (RunConfig): with ``init.policy``.
        ranks (Ranks): rank 0 reads the file for all.

    Raises:
        CheckpointError: if the file is damaged or of another format.
        ConfigError: if the networks differ, with the settings, or the names and shapes, of what does; or if
            ``init.sha256`` is another's.
        FileNotFoundError: if there is no such file.
    """
    path = expand_path(config.init.policy or "")

    def read() -> dict[str, Any]:
        trained, metadata = read_policy_file(path)
        return metadata | {"weights": trained.network.state_dict(), "groups": _groups(trained.network)}

    source = ranks.on_main(read)
    if config.init.sha256 not in (None, source["sha256"]):
        raise ConfigError(
            f"init.sha256 must be that of {path}, {source['sha256']}, got {config.init.sha256}: it is another policy"
        )
    if config.init.load == "all" and source["heads"] == "legal":
        raise ConfigError(
            f"init.load=all takes whole heads, but {path} is a compact policy, which has those of legal actions only; "
            "init.load=encoder starts with new ones"
        )
    before = run_config_from_yaml(source["config"], source=f"the configuration in {path}")
    _check_same_function((config, _groups(network)), (before, source["groups"]), path)
    ours, theirs = network.state_dict(), source["weights"]
    known: dict[str, str] = {}
    if config.init.load == "encoder":
        here, there = _encoder(ours), _encoder(theirs)
        for weights, method in ((here, config.method), (there, before.method)):
            if not weights:
                raise ConfigError(
                    f"init.load must be all between networks that have no encoder of stacked frames, got encoder with "
                    f"method.name={method.name} {'here' if method is config.method else f'in {path}'}"
                )
        new = [name for name in ours if not _ENCODER.fullmatch(name) and not _GIVEN.fullmatch(name)]
    else:
        here, there = (
            {name: value for name, value in weights.items() if not (_HEADS.fullmatch(name) or _GIVEN.fullmatch(name))}
            for weights in (ours, theirs)
        )
        sources = {name: _source_of(name, _head_names(before)) for name in _head_names(config)}
        shared = {name: source for name, source in sources.items() if source is not None}
        new = [f"the head of {name}" for name in sources if name not in shared]
        if shared:
            _check_heads(shared, (ours, config), (theirs, before), path)
            here |= _of_games(_HEADS, ours, _head_names(config), {name: name for name in shared})
            there |= _of_games(_HEADS, theirs, _head_names(before), shared)
        known = {game: base for game in config.games if (base := _source_of(game, before.games)) is not None}
        here |= _of_games(MEAN_FRAMES, ours, config.games, {game: game for game in known})
        there |= _of_games(MEAN_FRAMES, theirs, before.games, known)
        if any(MEAN_FRAMES.fullmatch(name) for name in ours):
            new += [f"the mean frame of {game}" for game in config.games if game not in known]
    _copy(here, there, path)
    if ranks.is_main:
        loaded = sum(value.numel() for value in here.values())
        logger.info(
            "starting from %s (method %s, sha256 %s): %s weights loaded; new: %s",
            path, before.method.name, source["sha256"], f"{loaded:,}", ", ".join(new) or "nothing",
        )  # fmt: skip
    return Start(before.name, str(source["sha256"]), tuple(known))


def freeze_encoder(network: nn.Module) -> None:
    """Keep the encoder's parameters out of training.

    Raises:
        ConfigError: if the network has none.
    """
    frozen = [parameter for name, parameter in network.named_parameters() if _ENCODER.fullmatch(name)]
    if not frozen:
        raise ConfigError("init.freeze must be false with a network that has no encoder of stacked frames, got true")
    for parameter in frozen:
        parameter.requires_grad_(False)


def _groups(network: nn.Module) -> list[int]:
    """Of each group normalization."""
    return [module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)]


def _check_same_function(
    ours: tuple[RunConfig, Sequence[int]], theirs: tuple[RunConfig, Sequence[int]], path: object
) -> None:
    """Raise where weights of the same names and shapes would compute something else; given with :func:`_groups`."""
    load = ours[0].init.load
    here, there = ours[0].model, theirs[0].model
    if not isinstance(here, QNetworkConfig) or not isinstance(there, QNetworkConfig):
        return
    keys = ["encoder", "center_input", *["pooling", "feature_norm"] * (load == "all")]
    settings: dict[str, tuple[object, object]] = {key: (getattr(here, key), getattr(there, key)) for key in keys}
    if load == "all" and here.feature_norm:
        settings["logit_scale"] = _fixed_scale(here), _fixed_scale(there)
    if here.encoder == there.encoder and ours[1] != theirs[1]:
        settings["num_groups"] = here.num_groups, there.num_groups
    for key, (value, other) in settings.items():
        if value != other:
            raise ConfigError(
                f"init.load={load} needs model.{key}={other} as in {path}, got {value}: the same weights "
                "would compute something else"
            )


def _fixed_scale(model: QNetworkConfig) -> float | str:
    """What normalized features are multiplied with, unless it is one of the weights."""
    if model.logit_scale is None:
        return 1.0
    return "learned" if model.learn_logit_scale else model.logit_scale


def _encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the encoder, by their names in it."""
    return {match[1]: value for name, value in weights.items() if (match := _ENCODER.fullmatch(name))}


@torch.no_grad()
def _copy(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: object) -> None:
    """Copy all weights, or raise because of those that differ in name or shape."""

    def shape(weights: Mapping[str, Tensor], name: str) -> str:
        return str(list(weights[name].shape)) if name in weights else "absent"

    different = [
        f"{name} ({shape(ours, name)} here, {shape(theirs, name)} there)"
        for name in dict.fromkeys([*ours, *theirs])
        if shape(ours, name) != shape(theirs, name)
    ]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise ConfigError(
            f"init.policy={path} must be of a network of the same sizes, got others: {', '.join(different[:5])}{more}; "
            "give this run the model settings of that one"
        )
    for name, value in ours.items():
        value.copy_(theirs[name])


def _check_heads(
    shared: Iterable[str],
    ours: tuple[Mapping[str, Tensor], RunConfig],
    theirs: tuple[Mapping[str, Tensor], RunConfig],
    path: object,
) -> None:
    """Raise unless the outputs of both networks' heads mean the same."""
    here, there = (_kind_of_values(*each) for each in (ours, theirs))
    if here != there:
        raise ConfigError(
            f"init.load=all takes the heads of {', '.join(shared)}, which must be of the same kind, got {here} here "
            f"and {there} in {path}; init.load=encoder starts with new ones"
        )


def _of_games(
    kind: re.Pattern[str], weights: Mapping[str, Tensor], names: Sequence[str], shared: Mapping[str, str]
) -> dict[str, Tensor]:
    """Views of the rows, one for each of ``names``, of weights of a kind: those that ``shared`` names, called what it
    names them for.
    """
    return {
        f"{name} of {ours}": weights[name][names.index(theirs)] for name in weights if kind.fullmatch(name)
        for ours, theirs in shared.items()
    }  # fmt: skip


def _source_of(name: str, names: Sequence[str]) -> str | None:
    """Which of another run's games or heads becomes this one: its own, or the game that it is a variation of."""
    if name in names or name == _ONE_HEAD:
        return name if name in names else None
    base = find_game(name).base
    return base if base in names else None


def _head_names(config: RunConfig) -> list[str]:
    """What each head is for, in their order; none in a network without heads."""
    if not isinstance(config.model, QNetworkConfig) or make_method(config.method).values == "none":
        return []
    return list(config.games) if config.model.per_game_heads else [_ONE_HEAD]


def _kind_of_values(weights: Mapping[str, Tensor], config: RunConfig) -> str:
    """What heads put out: two of equal shape may mean different things."""
    values = make_method(config.method).values
    support = next((value for name, value in weights.items() if name.endswith("support")), None)
    if support is None:
        return values
    return f"{values} of {len(support)} atoms on [{float(support[0]):g}, {float(support[-1]):g}]"
