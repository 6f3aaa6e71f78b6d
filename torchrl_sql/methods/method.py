"""What a method is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import QValueActor
from torchrl.objectives import LossModule, TargetNetUpdater

from torchrl_sql.config import DataConfig, MethodConfig, ModelConfig, QNetworkConfig
from torchrl_sql.data import FrameStore, OfflineAtariReplay
from torchrl_sql.games import FRAME_SHAPE
from torchrl_sql.modules import NetworkPolicy, make_q_actor


class Method(ABC):
    """What an agent is: its network, what it learns from, what it minimises, how it acts.

    A method overrides what differs from a Q-network that learns from single transitions. One with a memory returns a
    replay buffer of sequences and a policy with ``context_steps``; one that only prepares an encoder has
    ``values = "none"``, and evaluation refuses it.

    Args:
        settings (MethodConfig): section ``method`` of a run's configuration.
    """

    label: ClassVar[str]
    """On pages, of the run that is named the same: ``"Scaled QL"`` of ``scaled_ql``."""
    values: ClassVar[Literal["q", "logits", "none"]]
    """What ``action_value`` means: expected returns, a policy's logits; ``none`` for a method that does not act."""

    def __init__(self, settings: MethodConfig) -> None:
        self.settings = settings

    @property
    def gamma(self) -> float:
        """Discount of its returns per agent step; 1 if it has none."""
        return getattr(self.settings, "gamma", 1.0)

    @property
    def metrics(self) -> Mapping[str, str]:
        """Scalars of its loss that pages draw -> title of the curve, with its unit."""
        return {}

    @abstractmethod
    def network(
        self, model: ModelConfig, games: Sequence[str], *, memory_format: torch.memory_format = torch.contiguous_format
    ) -> nn.Module:
        """The network, on the CPU; buffers ``input_mean`` are zeros until they are set or loaded.

        Args:
            model (ModelConfig): its settings.
            games (sequence of str): one head each.

        Keyword Args:
            memory_format (torch.memory_format): layout of the convolutions.

        Raises:
            ValueError: for names and sizes that make no network; no data is needed to find out.
        """

    @abstractmethod
    def loss(self, network: nn.Module) -> LossModule:
        """The loss over the network's own parameters: loading its state loads them."""

    def replay(self, data: DataConfig, store: FrameStore, **options: Any) -> OfflineAtariReplay:
        """The batches.

        Args:
            data (DataConfig): which transitions.
            store (FrameStore): where they are.
            options: ``seed``, ``rank``, ``world_size``, ``device``, ``keys`` and ``window_steps``, which takes the
                place of ``n_steps`` and ``gamma``, see :class:`OfflineAtariReplay`.

        Raises:
            ValueError: if the store does not hold the games, or the batch does not divide among the ranks.
        """
        if options.get("window_steps") is None:
            options |= {"n_steps": data.n_steps, "gamma": self.gamma}
        return OfflineAtariReplay(
            store,
            batch_size=data.batch_size,
            games=data.games,
            first_fraction=data.first_fraction,
            last_fraction=data.last_fraction,
            every_kth_episode=data.every_kth_episode,
            transitions_per_game=data.transitions_per_game,
            mixture=data.mixture,
            temperature=data.temperature,
            replacement=data.replacement,
            prefetch=data.prefetch,
            **options,
        )

    def features(self, network: nn.Module, batch: TensorDictBase) -> Tensor:
        """What the network makes of a batch's states before its heads, ``[B, D]``; logs say how rich it is.

        By default what the network's own ``features`` gives for its inputs.

        Args:
            network (nn.Module): of :meth:`network`, on the batch's device.
            batch (TensorDictBase): with what the network reads.
        """
        module: Any = network.module[0] if isinstance(network, QValueActor) else network
        features: Tensor = module.module.features(*(batch[key] for key in module.in_keys))
        return features

    def target_updater(self, loss: LossModule) -> TargetNetUpdater | None:
        """What copies the online network to a target network when it is called; None without one."""
        return None

    def policy(self, network: nn.Module, games: Sequence[str], *, decoding: str = "greedy") -> TensorDictModuleBase:
        """How it plays, as :func:`torchrl_sql.evaluation.evaluate` takes it; never an action that a game does not know.

        Args:
            network (nn.Module): of :meth:`network`, on its device.
            games (sequence of str): in the order of ``game_id``.

        Keyword Args:
            decoding (str): one of ``settings.decodings``; ``greedy`` or ``sampled``, if the method has no other.

        Raises:
            ValueError: for another decoding.
        """
        return NetworkPolicy(network, games, decoding=decoding)


def q_network(model: ModelConfig, games: Sequence[str], **heads: Any) -> nn.Module:
    """:func:`make_q_actor` by the settings; ``heads`` are its other arguments."""
    assert isinstance(model, QNetworkConfig)
    return make_q_actor(
        games,
        encoder=model.encoder,
        pooling=model.pooling,
        num_embeddings=model.num_embeddings,
        num_groups=model.num_groups,
        last_norm_scale=model.last_norm_scale,
        feature_dim=model.feature_dim,
        feature_norm=model.feature_norm,
        logit_scale=model.logit_scale,
        learn_logit_scale=model.learn_logit_scale,
        per_game_heads=model.per_game_heads,
        input_mean=torch.zeros(len(games), *FRAME_SHAPE) if model.center_input else None,
        **heads,
    )
