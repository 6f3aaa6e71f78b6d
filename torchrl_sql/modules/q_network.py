"""The multi-game Q-network and the TorchRL actor around it (arXiv:2211.15144).

Legend: B batch, K stacked frames, D features, A actions, N atoms, G games.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Categorical
from torchrl.modules import DistributionalQValueActor, DistributionalQValueModule, QValueActor, QValueModule

from torchrl_sql.arguments import check_choice, check_count, check_number
from torchrl_sql.games import NUM_ACTIONS, legal_action_mask, resolve_games
from torchrl_sql.modules.encoders import ENCODERS, Encoder
from torchrl_sql.modules.heads import PerGameLinear
from torchrl_sql.modules.pooling import POOLINGS

_INITIAL_LOGIT_STD = 0.05  # [ours]


class MultiGameQNetwork(nn.Module):
    """A shared encoder, a pooled and normalized feature vector, and one linear head per game.

    ``phi = pool(encoder(x))``, with ``feature_dim`` set also ``phi = relu(W phi)``; then, with feature normalization,
    ``phi <- s * phi / ||phi||_2`` and ``out = head[game](phi)``. Without the scale ``s``, which is ours, the logits of
    a linear head are confined to ``+-||weight||``, flat for a softmax over 51 atoms; with it, an optimizer's step on
    the head moves them ``s`` times as far. A learned one is stored as its logarithm, so that one step changes it by a
    fraction of itself. Heads of normalized features start so small that the logits' standard deviation is 0.05 whatever
    ``s`` and ``D``: a fresh network's Q-values hardly differ between actions, less than the returns to be learned.

    Args:
        encoder (nn.Module): ``[B, *input_shape]`` float -> a feature map ``[B, C, H, W]``, tokens ``[B, T, C]`` (a map
            of ``T`` places) or a vector ``[B, C]`` (a map of one). It is run once on zeros, in evaluation mode and
            without gradient, to see which.
        num_games (int): ``G``.

    Keyword Args:
        num_actions (int): ``A``.
        num_atoms (int or None): ``N``; ``None`` for scalar Q-values.
        input_shape (sequence of int): shape of one observation, frames first.
        pooling (str): ``"spatial_embedding"`` (the paper's), ``"average"`` (its ablation), or ``"flatten"`` (on
            ``NatureCNN`` and with ``feature_norm=False``, the network of DQN; for encoders that give a vector).
        num_embeddings (int): learned maps per channel of ``"spatial_embedding"``.
        feature_dim (int or None): size of the hidden layer after pooling, ``None`` for no such layer.
        feature_norm (bool): divide the features by their L2 norm.
        logit_scale (float or None): ``s``, or its initial value; ``None`` for the plain ``phi / ||phi||_2``. Used with
            ``feature_norm`` only.
        learn_logit_scale (bool): train ``s``; otherwise it stays.
        per_game_heads (bool): False for one head that serves all games (an ablation).
        initial_bias (Tensor or None): the heads' biases at the start, ``[N]`` for all actions alike; ``None`` for 0.
        input_mean (Tensor or None): ``[G, H, W]`` float, a mean image per game in the units of the scaled input (0 to
            1), subtracted from each frame. A departure from the paper that helps where a static background makes all
            states alike.
        legal_actions (Tensor or None): ``[G, A]`` bool; where given, the network also returns each sample's row.
        memory_format (torch.memory_format): layout of the encoder's weights and input; ``torch.channels_last`` suits
            compiled networks on CUDA.

    Shape:
        - observation: ``[*B, *input_shape]``, uint8 (scaled to [0, 1] here, on the device) or float (taken as scaled);
          any number of leading dimensions, none included
        - game_id: ``[*B]`` int64 in ``[0, G)``; may be left out with one game
        - output: a tuple of the logits ``[*B, N, A]`` (``[*B, A]`` with scalar heads), the detached L2 norm of the
          features before normalization ``[*B, 1]``, the features themselves before normalization ``[*B, D]``, and with
          ``legal_actions`` the mask ``[*B, A]``. Numbers are in the parameters' precision, also under autocast.

    Raises:
        TypeError, ValueError: for arguments, shapes or feature maps other than the above.
    """

    input_mean: Tensor | None
    legal_actions: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        num_games: int,
        *,
        num_actions: int = NUM_ACTIONS,
        num_atoms: int | None = 51,
        input_shape: Sequence[int] = (4, 84, 84),
        pooling: str = "spatial_embedding",
        num_embeddings: int = 1,
        feature_dim: int | None = None,
        feature_norm: bool = True,
        logit_scale: float | None = 30.0,
        learn_logit_scale: bool = True,
        per_game_heads: bool = True,
        initial_bias: Tensor | None = None,
        input_mean: Tensor | None = None,
        legal_actions: Tensor | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        counts = {"num_games": num_games, "num_actions": num_actions, "num_embeddings": num_embeddings}
        optional = {"num_atoms": num_atoms, "feature_dim": feature_dim}
        for name, count in counts.items() | {item for item in optional.items() if item[1] is not None}:
            check_count(name, count)
        check_choice("pooling", pooling, POOLINGS)
        check_choice("feature_norm", feature_norm, (True, False))
        check_choice("learn_logit_scale", learn_logit_scale, (True, False))
        check_choice("per_game_heads", per_game_heads, (True, False))
        if logit_scale is not None:
            check_number("logit_scale", logit_scale, 0, above=True)
        self.input_shape = tuple(input_shape)
        mean_shape = (num_games, *self.input_shape[1:])
        _check_shape("initial_bias", initial_bias, (num_atoms or 1,))
        _check_shape("input_mean", input_mean, mean_shape)
        if input_mean is not None and not input_mean.is_floating_point():
            raise TypeError(f"input_mean must be floats in [0, 1], got {input_mean.dtype}")
        _check_shape("legal_actions", legal_actions, (num_games, num_actions))
        self.encoder = encoder
        feature_map = probe_map(encoder, self.input_shape)
        channels, height, width = feature_map.shape[1:]
        self.pooling = POOLINGS[pooling](channels, height, width, num_embeddings)
        with torch.no_grad():
            num_features = self.pooling(feature_map).shape[1]
        self.hidden: nn.Module = nn.Identity()
        if feature_dim is not None:
            self.hidden = nn.Sequential(nn.Linear(num_features, feature_dim), nn.ReLU())
            num_features = feature_dim
        self.feature_norm = feature_norm
        self.logit_scale = 1.0 if logit_scale is None else logit_scale
        learned = feature_norm and logit_scale is not None and learn_logit_scale
        self.log_scale = nn.Parameter(torch.empty(1)) if learned else None
        self.output_shape = (num_actions,) if num_atoms is None else (num_atoms, num_actions)
        weight_std = _INITIAL_LOGIT_STD / self.logit_scale if feature_norm else None
        num_heads = num_games if per_game_heads else 1
        self.heads = PerGameLinear(num_heads, num_features, math.prod(self.output_shape), weight_std)
        self.num_games = num_games
        self.initial_bias = initial_bias
        self.register_buffer("input_mean", None if input_mean is None else input_mean.to(torch.get_default_dtype()))
        self.register_buffer("legal_actions", legal_actions, persistent=False)  # a fact, not learned
        self.memory_format = memory_format
        self.encoder.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's annotations
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the scale and the heads' biases anew; the other layers do so themselves."""
        if self.log_scale is not None:
            self.log_scale.fill_(math.log(self.logit_scale))
        if self.initial_bias is not None:
            bias = self.initial_bias.unsqueeze(-1).expand(self.output_shape)
            self.heads.bias.copy_(bias.flatten())

    def forward(self, observation: Tensor, game_id: Tensor | None = None) -> tuple[Tensor, ...]:
        batch_shape, game_id = self._check_shapes(observation, game_id)
        features = self._features(observation, game_id)
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        scaled = features
        if self.feature_norm:
            scale = self.logit_scale if self.log_scale is None else self.log_scale.exp()
            scaled = features / norm.clamp_min(1e-6) * scale
        head = game_id if self.heads.weight.shape[0] == self.num_games else torch.zeros_like(game_id)
        out = (
            self.heads(scaled, head).reshape(*batch_shape, *self.output_shape),
            norm.detach().reshape(*batch_shape, 1),
            features.reshape(*batch_shape, features.shape[-1]),
        )
        if self.legal_actions is None:
            return out
        legal = self.legal_actions[game_id]
        return (*out, legal.reshape(*batch_shape, legal.shape[-1]))

    def features(self, observation: Tensor, game_id: Tensor | None = None) -> Tensor:
        """The third output alone: ``[*B, D]``, before normalization."""
        batch_shape, game_id = self._check_shapes(observation, game_id)
        features = self._features(observation, game_id)
        return features.reshape(*batch_shape, features.shape[-1])

    def _features(self, observation: Tensor, game_id_B: Tensor) -> Tensor:
        """``[B, D]`` of observations ``[*B, ...]``."""
        dtype, layout = self.heads.bias.dtype, self.memory_format
        flat = observation.reshape(-1, *self.input_shape)
        x = scale_frames(flat, game_id_B, self.input_mean, dtype=dtype, memory_format=layout)
        return self.hidden(self.pooling(as_map(self.encoder(x)))).to(dtype)

    def _check_shapes(self, observation: Tensor, game_id: Tensor | None) -> tuple[torch.Size, Tensor]:
        """The batch shape, and the games flattened; raises ``ValueError`` for shapes that do not fit."""
        batch_shape = observation.shape[: observation.ndim - len(self.input_shape)]
        if game_id is None and self.num_games == 1:
            game_id = torch.zeros(batch_shape, dtype=torch.int64, device=observation.device)
        shape = None if game_id is None else game_id.shape
        if observation.shape[len(batch_shape) :] != self.input_shape or shape != batch_shape:
            raise ValueError(
                f"observation must be [*B, {', '.join(map(str, self.input_shape))}] and game_id [*B], "
                f"got {tuple(observation.shape)} and {shape if shape is None else tuple(shape)}"
            )
        assert game_id is not None
        return batch_shape, game_id.reshape(-1)


def unit_frames(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames of any shape as ``dtype``: bytes scaled to [0, 1], floats as they are.

    Raises:
        TypeError: for frames that are neither.
    """
    if frames.dtype == torch.uint8:
        return frames.to(dtype).div_(255)
    if not frames.is_floating_point():
        raise TypeError(f"frames must be uint8 in 0..255 or floats in [0, 1], got {frames.dtype}")
    return frames.to(dtype)


def scale_frames(
    observation: Tensor,
    game_id: Tensor,
    input_mean: Tensor | None,
    *,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Frames as encoders read them: ``[B, K, H, W]`` of ``dtype``, bytes scaled to [0, 1], their game's mean taken off.

    Args:
        observation (Tensor): ``[B, K, H, W]``.
        game_id (Tensor): ``[B]`` int64.
        input_mean (Tensor or None): ``[G, H, W]``.

    Keyword Args:
        dtype (torch.dtype): of the result.
        memory_format (torch.memory_format): likewise.

    Raises:
        TypeError: for frames that are neither bytes nor floats.
    """
    # The layout first: bytes are a quarter of the traffic.
    x = observation.contiguous(memory_format=memory_format)
    x = unit_frames(x, dtype)
    return x if input_mean is None else x - input_mean[game_id].unsqueeze(1)


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def as_map(features: Tensor) -> Tensor:
    """``[B, C, H, W]`` as it is, tokens ``[B, T, C]`` as ``[B, C, T, 1]``, a vector ``[B, C]`` as ``[B, C, 1, 1]``."""
    if features.ndim == 3:
        return features.transpose(1, 2).unsqueeze(-1)
    return features[..., None, None] if features.ndim == 2 else features


@torch.no_grad()
def probe_map(encoder: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """The encoder's map of one observation of zeros, its batch statistics left as they are."""
    training = {module: module.training for module in encoder.modules()}
    try:
        features = encoder.eval()(torch.zeros(1, *input_shape))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"encoder must give [B, C, H, W], [B, T, C] or [B, C] for {(1, *input_shape)}, got {got}")
    return as_map(features)


class GreedyDistributionalQValueModule(DistributionalQValueModule):
    """Picks the action of greatest expected return, of the legal ones with a mask, and leaves ``action_value`` alone.

    TorchRL's own reads a tensor back to the host, which breaks compiled and exported graphs. Its masking overwrites the
    log-probabilities of illegal actions, which gives those the expected value 0 (above every negative one).

    Reads: ``action_value_key`` ``[*B, N, A]`` log-probabilities; ``action_mask_key``, if not None, ``[*B, A]`` bool.
    Writes: ``action`` ``[*B]`` int64.
    """

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        q = (tensordict[self.action_value_key].exp() * self.support.unsqueeze(-1)).sum(-2)
        if self.action_mask_key is not None:
            q = q.masked_fill(~tensordict[self.action_mask_key], -torch.inf)
        tensordict[self.out_keys[0]] = q.argmax(-1)
        return tensordict


class GreedyQValueModule(QValueModule):
    """TorchRL's, but that it masks the choice only: ``action_value`` stays as the network wrote it.

    TorchRL's own writes the least number for illegal actions, which squares to infinity in losses.
    """

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        value = tensordict[self.action_value_key]
        tensordict = super().forward(tensordict)
        tensordict[self.action_value_key] = value
        return tensordict


def make_q_actor(
    games: int | str | Sequence[str],
    *,
    encoder: str | nn.Module = "resnet34",
    num_actions: int = NUM_ACTIONS,
    num_atoms: int | None = 51,
    v_min: float = -10.0,
    v_max: float = 10.0,
    pooling: str = "spatial_embedding",
    num_embeddings: int | None = None,
    num_groups: int = 32,
    feature_dim: int | None = None,
    last_norm_scale: float = 1.0,
    feature_norm: bool = True,
    logit_scale: float | None = 30.0,
    learn_logit_scale: bool = True,
    per_game_heads: bool = True,
    value_prior_std: float | None = None,
    mask_illegal_actions: bool = False,
    input_mean: Tensor | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> DistributionalQValueActor | QValueActor:
    """Makes the paper's multi-game Q-network as a TorchRL actor, which compiles and exports as one graph.

    Its many arguments are the network's settings, which a run's configuration reaches one by one.

    Args:
        games (int, str or sequence of str): number of games, or their names as :func:`torchrl_sql.games.resolve_games`
            takes them; ``game_id`` indexes them in this order.

    Keyword Args:
        encoder (str or nn.Module): a name in ``ENCODERS``, of which ``"resnet34"``, ``"resnet50"`` and ``"resnet101"``
            are the paper's and ``"resnet_small"`` learns on a CPU; or the module itself, then without hidden layer.
        num_actions (int): actions of every head.
        num_atoms (int or None): atoms of the return distribution; ``None`` gives scalar heads (for MSE TD targets and
            behavioural cloning) and a plain :class:`~torchrl.modules.QValueActor`.
        v_min (float): first atom, in units of clipped discounted reward.
        v_max (float): last atom.
        pooling (str): ``"spatial_embedding"``, ``"average"`` or ``"flatten"``.
        num_embeddings (int or None): learned maps per channel of the spatial embedding; ``None`` takes the encoder's
            default (1 for ResNet-50 and -101, 4 for ResNet-18 and -34, 8 for the others), which fits the published
            network sizes.
        num_groups (int): groups of the ResNets' normalization layers, at most a quarter of a layer's channels.
        feature_dim (int or None): width of the hidden layer after pooling, 0 for no such layer; ``None`` takes the
            encoder's default (256 for ResNet-18 and -34, 960 for ResNet-50 and -101, 512 and 256 for the CNNs, none for
            ``"resnet_small"``).
        last_norm_scale (float): initial scale of the last GroupNorm of each of the ResNets' residual branches.
        feature_norm (bool): divide the features by their L2 norm before the heads (the paper's).
        logit_scale (float or None): scale of normalized features, ``None`` for the plain ``phi / ||phi||``.
        learn_logit_scale (bool): train the scale, from there.
        per_game_heads (bool): False for one head that serves all games (an ablation).
        value_prior_std (float or None): start the heads' biases at ``-z^2 / (2 * value_prior_std^2)`` over the atoms
            ``z``, a return distribution centred on 0 with this standard deviation, at least a tenth of the atoms'
            spacing. ``None`` starts uniform over the support, from where a network must first unlearn values near
            ``v_min`` and ``v_max``.
        mask_illegal_actions (bool): never act with an action that the game does not know (such actions act as NOOP);
            needs names in ``games`` and all 18 actions. The actor then also writes ``action_mask`` ``[*B, A]``, as
            :class:`~torchrl.modules.EGreedyModule` reads it, and the losses leave illegal actions out of targets and
            penalty.
        input_mean (Tensor or None): ``[G, 84, 84]`` float in [0, 1], subtracted from each frame of its game.
        memory_format (torch.memory_format): layout of the encoder (an argument because TorchRL's actors do not take
            ``.to(memory_format=...)``).

    Returns:
        An actor that reads ``observation`` ``[*B, 4, 84, 84]`` and, with more than one game, ``game_id`` ``[*B]``, and
        writes ``action_value`` (``[*B, num_atoms, num_actions]`` log-probabilities, or ``[*B, num_actions]`` Q-values),
        ``action`` ``[*B]`` int64, ``features`` ``[*B, D]`` before normalization, for auxiliary losses, and
        ``feature_norm`` ``[*B, 1]``, their L2 norm.

    Raises:
        TypeError, ValueError: if an argument is out of its range, or a combination makes no sense.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> actor = make_q_actor(["Breakout", "Freeway"], encoder="resnet_small")
        >>> frames = torch.zeros(5, 4, 84, 84, dtype=torch.uint8)
        >>> state = TensorDict({"observation": frames, "game_id": torch.tensor([0, 1, 1, 0, 1])}, batch_size=[5])
        >>> actor(state)["action_value"].shape
        torch.Size([5, 51, 18])
    """
    if isinstance(encoder, str):
        check_choice("encoder", encoder, ENCODERS)
    check_count("num_groups", num_groups)
    if feature_dim is not None:
        check_count("feature_dim", feature_dim, 0)
    check_choice("mask_illegal_actions", mask_illegal_actions, (True, False))
    names = None if isinstance(games, int) else resolve_games(games)
    legal_actions = None
    if mask_illegal_actions:
        if names is None or num_actions != NUM_ACTIONS:
            raise ValueError(
                f"mask_illegal_actions needs games given by name and num_actions={NUM_ACTIONS}, "
                f"got games={games!r} and num_actions={num_actions}"
            )
        legal_actions = legal_action_mask(names)
    support = None if num_atoms is None else _support(num_atoms, v_min, v_max)
    num_games = games if isinstance(games, int) else len(resolve_games(games))
    defaults = ENCODERS[encoder] if isinstance(encoder, str) else Encoder(build=lambda **_: encoder)
    network = MultiGameQNetwork(
        defaults.build(num_groups=num_groups, last_norm_scale=last_norm_scale),
        num_games,
        num_actions=num_actions,
        num_atoms=num_atoms,
        pooling=pooling,
        num_embeddings=defaults.num_embeddings if num_embeddings is None else num_embeddings,
        feature_dim=(defaults.feature_dim if feature_dim is None else feature_dim) or None,
        feature_norm=feature_norm,
        logit_scale=logit_scale,
        learn_logit_scale=learn_logit_scale,
        per_game_heads=per_game_heads,
        initial_bias=None if value_prior_std is None else _log_prior(support, value_prior_std),
        input_mean=input_mean,
        legal_actions=legal_actions,
        memory_format=memory_format,
    )
    mask_key = "action_mask" if mask_illegal_actions else None
    module = TensorDictModule(
        network,
        in_keys=["observation"] if num_games == 1 else ["observation", "game_id"],
        out_keys=["action_value", "feature_norm", "features", *([mask_key] if mask_key else [])],
    )
    spec = Categorical(num_actions)
    if support is None:
        scalar = QValueActor(module, spec=spec)
        if mask_key:
            choice = scalar.module[-1].spec
            scalar.module[-1] = GreedyQValueModule("categorical", action_mask_key=mask_key, spec=choice)
        return scalar
    actor = DistributionalQValueActor(module, support=support, spec=spec)
    actor.module[-1] = GreedyDistributionalQValueModule(None, support, action_mask_key=mask_key, spec=spec)
    return actor


def _support(num_atoms: int, v_min: float, v_max: float) -> Tensor:
    check_count("num_atoms", num_atoms, 2)
    check_number("v_min", v_min, -math.inf)
    check_number("v_max", v_max, v_min, above=True)
    return torch.linspace(v_min, v_max, num_atoms)


def _log_prior(support: Tensor | None, std: float) -> Tensor:
    """Unnormalized log-probabilities of a normal around 0 over the atoms."""
    if support is None:
        raise ValueError(f"value_prior_std needs atoms, got {std} with num_atoms=None")
    # A narrower one has no two atoms that differ by less than a logit of 50: no gradient would ever widen it.
    check_number("value_prior_std", std, float(support[1] - support[0]) / 10)
    return -(support**2) / (2 * std**2)
