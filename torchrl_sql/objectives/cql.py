"""Conservative Q-learning on a categorical return distribution: the loss of Scaled Q-learning (arXiv:2211.15144)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import LossModule

from torchrl_sql.objectives.common import action_index, action_values, check_actor, require_finite
from torchrl_sql.objectives.return_distribution import c51_projection, check_support, expected_value, hl_gauss_target


class DistributionalCQLLoss(LossModule):
    r"""C51 TD loss (arXiv:1707.06887) plus the discrete CQL penalty (arXiv:2006.04779).

    .. math::
        L = \mathrm{TD}(\theta) + \alpha \, E_s[\log \sum_a \exp Q(s, a) - Q(s, a_\mathrm{data})]

    with ``Q`` the expectation of the predicted distribution. ``TD`` is, by ``target``:

    - ``"c51"``: cross-entropy to the projected distribution of ``r + gamma^n Z(s', a')``;
    - ``"hl_gauss"``: cross-entropy to a histogram of a normal around ``r + gamma^n Q(s', a')`` (arXiv:2403.03950);
    - ``"mse"``: ``(r + gamma^n Q(s', a') - Q(s, a))^2 / 2`` on scalar heads.

    ``a'`` is the target network's greedy action, or the online network's with ``double_q`` (then ``cql_alpha=0`` and
    ``"c51"`` make :class:`torchrl.objectives.DistributionalDQNLoss`). ``terminated`` stops bootstrapping, ``truncated``
    does not.

    A call runs the online network once on the observation and the target network once on the next one; ``double_q``
    adds a forward of the online network, without gradient, on the next one. Nothing is read back to the host, and
    ``torch.compile(loss, fullgraph=True)`` works. Under autocast the networks run in the lower precision, the
    arithmetic of distributions in float32.

    Args:
        value_network (DistributionalQValueActor or QValueActor): any of TorchRL's, with a categorical or one-hot action
            and, for ``"c51"`` and ``"hl_gauss"``, an evenly spaced support.

    Keyword Args:
        gamma (float): discount per agent step (four emulator frames).
        cql_alpha (float): weight of the penalty, dimensionless.
        double_q (bool): choose the next action by the online network.
        target (str): ``"c51"``, ``"hl_gauss"`` or ``"mse"`` (scalar :class:`~torchrl.modules.QValueActor` only).
        sigma_ratio (float): ``"hl_gauss"``: standard deviation of the target in units of the atoms' spacing.
        delay_value (bool): keep separate target parameters, to be moved by :class:`torchrl.objectives.HardUpdate` or
            ``SoftUpdate``; otherwise the online parameters, detached, give the targets.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"`` (losses of shape ``[*B]``).
        use_prioritized_weights (bool or "auto"): weigh samples by the ``priority_weight`` entry; ``"auto"`` where the
            batch has one. As in TorchRL, ``"mean"`` is then the weighted mean.

    Attributes:
        check_finite (bool): set it for debugging: raise ``ValueError`` with the key's name where rewards or network
            outputs are not finite. It synchronizes with the device and cannot be compiled with ``fullgraph=True``.

    Reads: ``value_network.in_keys`` and the same under ``"next"`` (those that are not there, such as ``game_id``, are
    taken from the root, as in :func:`torchrl.envs.utils.step_mdp`); ``action`` ``[*B]`` or ``[*B, 1]`` indices, or
    ``[*B, A]`` one-hot; ``("next", "reward")`` ``[*B, 1]`` float (with n steps the discounted sum);
    ``("next", "terminated")`` ``[*B, 1]`` bool; optional ``steps_to_next_obs`` ``[*B, 1]`` or ``[*B]`` integers
    (1 if absent); optional ``priority_weight`` ``[*B]``.

    Writes: ``td_error`` ``[*B, 1]`` into its input, each sample's TD loss (squared error with ``"mse"``), as priority.

    Returns:
        ``loss_qvalue`` and ``loss_cql`` (already weighted: the objective is their sum), and detached batch means:
        ``td_error``, ``cql_gap`` (the penalty before its weight), ``q_data`` (Q of the data's actions), ``q_max`` (of
        the greedy ones), ``q_target`` (of the targets) and, where the network writes it, ``feature_norm``.

    Raises:
        TypeError, ValueError: if ``value_network`` does not fit, its support is unusable, or a value is out of range.

    Examples:
        >>> import torch
        >>> from torchrl.data import OneHot
        >>> from torchrl.modules import MLP, DistributionalQValueActor
        >>> from torchrl.objectives import SoftUpdate
        >>> actor = DistributionalQValueActor(
        ...     MLP(in_features=4, out_features=(51, 3)), spec=OneHot(3), support=torch.linspace(-10, 10, 51)
        ... )
        >>> loss = DistributionalCQLLoss(actor, gamma=0.99, cql_alpha=0.1)
        >>> updater = SoftUpdate(loss, eps=0.995)
        >>> data = TensorDict(
        ...     {
        ...         "observation": torch.randn(10, 4),
        ...         "action": OneHot(3).rand((10,)),
        ...         "next": {
        ...             "observation": torch.randn(10, 4),
        ...             "reward": torch.randn(10, 1),
        ...             "terminated": torch.zeros(10, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[10],
        ... )
        >>> losses = loss(data)
        >>> (losses["loss_qvalue"] + losses["loss_cql"]).backward()
        >>> data["td_error"].shape
        torch.Size([10, 1])
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the batch and of the network's output."""

        action_value: NestedKey = "action_value"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        feature_norm: NestedKey = "feature_norm"

    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"gamma", "cql_alpha"})

    gamma: Tensor
    cql_alpha: Tensor
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        value_network: DistributionalQValueActor | QValueActor,
        *,
        gamma: float = 0.99,
        cql_alpha: float = 0.1,
        double_q: bool = False,
        target: Literal["c51", "hl_gauss", "mse"] = "c51",
        sigma_ratio: float = 0.75,
        delay_value: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        check_actor(value_network, "value_network")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if cql_alpha < 0:
            raise ValueError(f"cql_alpha must not be negative, got {cql_alpha}")
        if sigma_ratio <= 0:
            raise ValueError(f"sigma_ratio must be positive, got {sigma_ratio}")
        if target not in ("c51", "hl_gauss", "mse"):
            raise ValueError(f"target must be 'c51', 'hl_gauss' or 'mse', got {target!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        distributional = isinstance(value_network, DistributionalQValueActor)
        if distributional == (target == "mse"):
            expected = "a scalar QValueActor" if target == "mse" else "a DistributionalQValueActor"
            raise ValueError(f"target={target!r} needs {expected}, got {type(value_network).__name__}")
        if distributional:
            check_support(value_network.support)
        if double_q and not delay_value:
            raise ValueError("double_q=True needs delay_value=True: without target parameters both networks are one")
        self.register_buffer("gamma", torch.tensor(gamma))
        self.register_buffer("cql_alpha", torch.tensor(cql_alpha))
        self.double_q = double_q
        self.target = target
        self.sigma_ratio = sigma_ratio
        self.delay_value = delay_value
        self.reduction = reduction
        self.use_prioritized_weights = use_prioritized_weights
        self.check_finite = False
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Nothing to forward: the one-step (or n-step) target is computed here."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments; ``steps_to_next_obs`` may be absent."""
        keys = self.tensor_keys
        return [
            *self.value_network.in_keys,
            keys.action,
            unravel_key(("next", keys.reward)),
            unravel_key(("next", keys.terminated)),
            *(unravel_key(("next", key)) for key in self.value_network.in_keys),
            keys.steps_to_next_obs,
        ]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the result: the two losses, then the metrics."""
        metrics = ["td_error", "cql_gap", "q_data", "q_max", "q_target"]
        if self._writes_feature_norm:
            metrics.append("feature_norm")
        return ["loss_qvalue", "loss_cql", *metrics]

    @property
    def _writes_feature_norm(self) -> bool:
        return self.tensor_keys.feature_norm in self.value_network.out_keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        reward, terminated, steps = self._read_transition(tensordict)
        # Not the batch size of the tensordict, which dispatch can only guess.
        batch_shape = reward.shape[:-1]
        inputs = TensorDict({key: tensordict[key] for key in self.value_network.in_keys}, batch_shape)
        values = action_values(self.value_network, self.value_network_params, inputs, keys.action_value)
        with torch.no_grad():
            next_values, next_action = self._next_values(tensordict, batch_shape)
        if self.check_finite:
            next_key = unravel_key(("next", keys.action_value))
            require_finite({("next", keys.reward): reward, keys.action_value: values, next_key: next_values})
        action = action_index(tensordict[keys.action], values.shape[-1], batch_shape, self.value_network.action_space)
        discount = self.gamma if steps is None else self.gamma**steps
        discount = discount * terminated.logical_not().to(values.dtype)
        reward = reward.to(values.dtype)

        taken, next_taken = _select(values, action), _select(next_values, next_action)
        if self.target == "mse":
            q_values = values
            q_target = reward + discount * next_taken.unsqueeze(-1)
            squared_error = (taken - q_target.squeeze(-1)).square()
            loss_td, priority = squared_error / 2, squared_error
        else:
            support = self.value_network_params["support"].to(values.dtype)
            q_values = expected_value(values, support)
            target_probs = self._target_probs(next_taken, support, reward, discount)
            q_target = (target_probs * support).sum(-1)
            loss_td = priority = -(target_probs * taken).sum(-1)
        q_data = _select(q_values, action)
        gap = q_values.logsumexp(-1) - q_data

        tensordict.set(keys.priority, priority.detach().unsqueeze(-1))
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is not None:
            weights = weights.reshape(batch_shape)
        result = {
            "loss_qvalue": self._reduce_loss(loss_td, tensordict, weights=weights),
            "loss_cql": self.cql_alpha * self._reduce_loss(gap, tensordict, weights=weights),
            "td_error": priority.detach().mean(),
            "cql_gap": gap.detach().mean(),
            "q_data": q_data.detach().mean(),
            "q_max": q_values.detach().amax(-1).mean(),
            "q_target": q_target.mean(),
        }
        if self._writes_feature_norm:
            result["feature_norm"] = inputs[keys.feature_norm].detach().mean()
        out = TensorDict(result)
        self._clear_weakrefs(tensordict, out, "value_network_params", "target_value_network_params")
        return out

    def _read_transition(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reward, ``terminated`` and, if there, ``steps_to_next_obs``, each ``[*B, 1]``."""
        keys = self.tensor_keys
        reward = tensordict[unravel_key(("next", keys.reward))]
        terminated = tensordict[unravel_key(("next", keys.terminated))]
        steps = tensordict.get(keys.steps_to_next_obs, None)
        # Any other shape would broadcast into a loss between samples.
        if reward.shape[-1:] != (1,):
            raise ValueError(f"('next', {keys.reward!r}) must be [*B, 1], got {tuple(reward.shape)}")
        if steps is not None and steps.shape == reward.shape[:-1]:
            steps = steps.unsqueeze(-1)  # as TorchRL's MultiStep writes it
        for key, value in ((("next", keys.terminated), terminated), (keys.steps_to_next_obs, steps)):
            if value is not None and value.shape != reward.shape:
                raise ValueError(f"{key!r} must be {tuple(reward.shape)} like the reward, got {tuple(value.shape)}")
        return reward, terminated, steps

    def _next_values(self, tensordict: TensorDictBase, batch_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The target network's values of the next observation, and the ``[*B]`` index of the action to evaluate."""
        keys = self.tensor_keys
        next_keys = {key: unravel_key(("next", key)) for key in self.value_network.in_keys}
        present = tensordict.keys(include_nested=True)
        if not any(next_key in present for next_key in next_keys.values()):
            raise KeyError(f"none of {list(next_keys.values())} is in the batch, which has {sorted(present, key=str)}")
        source = {key: next_key if next_key in present else key for key, next_key in next_keys.items()}
        inputs = TensorDict({key: tensordict[name] for key, name in source.items()}, batch_shape)
        network = self.value_network
        values = action_values(network, self.target_value_network_params, inputs.copy(), keys.action_value)
        chooser = values
        if self.double_q:
            chooser = action_values(network, self.value_network_params, inputs, keys.action_value)
        if self.target != "mse":
            chooser = expected_value(chooser, self.value_network_params["support"].to(chooser.dtype))
        return values, chooser.argmax(-1)

    def _target_probs(self, log_probs: Tensor, support: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        probs = log_probs.exp()
        if self.target == "c51":
            return c51_projection(probs, support, reward, discount)
        value = (probs * support).sum(-1, keepdim=True)
        return hl_gauss_target(reward + discount * value, support, self.sigma_ratio)


def _select(values: Tensor, action: Tensor) -> Tensor:
    """``values`` ``[*B, (N,) A]`` at ``action`` ``[*B]``."""
    index = action.reshape(*action.shape, *(1 for _ in range(values.ndim - action.ndim)))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)
