"""Conservative Q-learning on a categorical return distribution: the loss of Scaled Q-learning (arXiv:2211.15144)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import LossModule, ValueEstimators

from torchrl_sql.arguments import check_choice, check_number
from torchrl_sql.objectives.common import (
    action_index,
    action_values,
    check_actor,
    check_kept,
    check_reduction,
    check_written,
    mask_illegal,
    mean_over_batch,
    next_inputs,
    priority_weights,
    writes,
)
from torchrl_sql.objectives.return_distribution import (
    c51_projection,
    check_support,
    clipped_mass,
    expected_value,
    hl_gauss_target,
)


class DistributionalCQLLoss(LossModule):
    r"""C51 TD loss (arXiv:1707.06887) plus the discrete CQL penalty (arXiv:2006.04779).

    .. math::
        L = \mathrm{TD}(\theta) + \alpha \, E_s[\log \sum_a \exp Q(s, a) - Q(s, a_\mathrm{data})]

    with ``Q`` the expectation of the predicted distribution. ``TD`` is, by ``target``:

    - ``"c51"``: cross-entropy to the projected distribution of ``r + gamma^n Z(s', a')``;
    - ``"hl_gauss"``: cross-entropy to a histogram of a normal around ``r + gamma^n Q(s', a')`` (arXiv:2403.03950);
    - ``"mse"``: ``(r + gamma^n Q(s', a') - Q(s, a))^2`` on scalar heads; no half, as in the nearest code, so that
      ``cql_alpha`` weighs what it weighs there.

    ``a'`` is the target network's greedy action, or the online network's with ``double_q`` (then ``cql_alpha=0`` and
    ``"c51"`` make :class:`torchrl.objectives.DistributionalDQNLoss`). ``terminated`` stops bootstrapping, ``truncated``
    does not. Where the actor has an action mask of its own, ``a'`` is legal, and the penalty's sum runs over the legal
    actions and the data's own.

    With n steps, the reward, the next observation and ``terminated`` must be those of the window's end. TorchRL's
    ``MultiStep`` and ``MultiStepTransform`` leave ``terminated`` where the window began, so that targets bootstrap from
    terminal states: use those of this package.

    A call runs the online network once on the observation and the target network once on the next one; ``double_q``
    adds a forward of the online network, without gradient, on the next one. Nothing is read back to the host, and
    ``torch.compile(loss, fullgraph=True)`` works. Under autocast the networks run in the lower precision, the
    arithmetic of distributions in float32. ``gamma``, ``cql_alpha`` and the support keep their precision whatever
    ``loss.to(dtype)`` does to the networks; ``loss.gamma = 0.9`` and ``loss.cql_alpha = 0.1`` schedule them.

    An ensemble is one loss per member, over actors of their own, whose losses are summed.

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
        reduction (str): ``"mean"`` (also as None), ``"sum"`` or ``"none"`` (losses of shape ``[*B]``).
        use_prioritized_weights (bool or "auto"): weigh samples by the ``priority_weight`` entry; ``"auto"`` where the
            batch has one. As in TorchRL, ``"mean"`` is then the weighted mean.
        static_keys (sequence of NestedKey): what the network reads that a transition does not change: taken from the
            root where ``"next"`` lacks it.
        keep (sequence of NestedKey): outputs of the online network on the observation, such as ``"features"`` of
            :func:`torchrl_sql.modules.make_q_actor`, to be returned with their graph: an auxiliary loss costs no second
            pass.

    Reads: ``value_network.in_keys`` and the same under ``"next"``; ``action`` ``[*B]`` or ``[*B, 1]`` indices, or
    ``[*B, A]`` one-hot; ``("next", "reward")`` ``[*B, 1]`` float (with n steps the discounted sum);
    ``("next", "terminated")`` ``[*B, 1]`` bool, or ``("next", "done")`` where that is absent; optional
    ``steps_to_next_obs`` ``[*B, 1]`` or ``[*B]`` integers (1 if absent); optional ``priority_weight`` ``[*B]``. Keys
    that ``set_keys`` gave in place of ``terminated`` and ``steps_to_next_obs`` may not be absent.

    Writes: ``td_error`` ``[*B, 1]`` into its input, each sample's TD loss, as priority;
    in place where the batch is locked, which must have the entry then.

    Returns:
        ``loss_qvalue`` and ``loss_cql`` (already weighted: the objective is their sum); detached means over the batch
        with its mask and weights: ``td_error``, ``cql_gap`` (the penalty before its weight), ``q_data`` (Q of the
        data's actions), ``q_max`` (of the greedy ones), ``q_target`` (of the targets), with a support
        ``clipped_mass`` (the share of the targets' probability that lay beyond it and was moved to its ends; with
        ``"hl_gauss"`` the share of such targets) and, where the network writes it, ``feature_norm``; and what ``keep``
        names.

    Raises:
        TypeError, ValueError: if ``value_network`` does not fit, its support is unusable, or a value is out of range.
        KeyError: from a call, naming what the batch lacks.

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
        done: NestedKey = "done"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        feature_norm: NestedKey = "feature_norm"

    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    _schedulable_buffers = frozenset({"gamma", "cql_alpha"})

    gamma: Tensor
    cql_alpha: Tensor
    support: Tensor | None
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
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
        static_keys: Sequence[NestedKey] = ("game_id",),
        keep: Sequence[NestedKey] = (),
    ) -> None:
        super().__init__()
        check_actor(value_network, "value_network")
        check_number("gamma", gamma, 0, 1)
        check_number("cql_alpha", cql_alpha, 0)
        check_number("sigma_ratio", sigma_ratio, 0, above=True)
        check_choice("target", target, ("c51", "hl_gauss", "mse"))
        check_choice("double_q", double_q, (True, False))
        check_choice("delay_value", delay_value, (True, False))
        check_reduction(reduction, use_prioritized_weights)
        distributional = isinstance(value_network, DistributionalQValueActor)
        if distributional == (target == "mse"):
            expected = "a scalar QValueActor" if target == "mse" else "a DistributionalQValueActor"
            raise ValueError(f"target={target!r} needs {expected}, got {type(value_network).__name__}")
        if double_q and not delay_value:
            raise ValueError("double_q=True needs delay_value=True: without target parameters both networks are one")
        self.register_buffer("gamma", torch.tensor(float(gamma)))
        self.register_buffer("cql_alpha", torch.tensor(float(cql_alpha)))
        self.register_buffer("support", None)
        if isinstance(value_network, DistributionalQValueActor):
            check_support(value_network.support)
            self.support = value_network.support.clone()
        self.double_q = double_q
        self.target = target
        self.sigma_ratio = sigma_ratio
        self.delay_value = delay_value
        self.reduction = reduction or "mean"
        self.use_prioritized_weights = use_prioritized_weights
        self.static_keys = list(static_keys)
        self.keep = check_kept(keep, value_network)
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)

    def _apply(self, fn: Callable[..., Any]) -> DistributionalCQLLoss:
        """Moves and casts the networks; what defines the problem moves but keeps its precision."""
        exact = {name: self._buffers[name] for name in ("gamma", "cql_alpha", "support")}
        super()._apply(fn)
        for name, value in exact.items():
            if value is not None:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def reset_parameters_recursive(self) -> None:
        """Starts the network anew, and the target with the same parameters."""
        super().reset_parameters_recursive()
        if self.delay_value:
            # By the module's dictionary: the attribute would warn that no updater is associated yet.
            self._modules["target_value_network_params"].data.update_(self.value_network_params.data)

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: Any) -> LossModule:
        """Sets ``gamma``, as TorchRL's scripts do; targets are one-step (or n-step) ones, computed here.

        Args:
            value_type (ValueEstimators, optional): ``TD0`` or None.
            **hyperparams: ``gamma`` (float), the discount per agent step; ``device`` is ignored.

        Raises:
            NotImplementedError: for another estimator.
            TypeError: for another hyper-parameter.
        """
        if value_type not in (None, ValueEstimators.TD0, "td0", "TD0"):
            raise NotImplementedError(f"value_type must be None or TD0, the only target of this loss, got {value_type}")
        if unknown := sorted(hyperparams.keys() - {"gamma", "device"}):
            raise TypeError(f"make_value_estimator takes gamma and device, got {unknown}")
        if (gamma := hyperparams.get("gamma")) is not None:
            check_number("gamma", float(gamma), 0, 1)
            self.gamma.fill_(gamma)
        return self

    def set_keys(self, **kwargs: NestedKey) -> None:
        """As TorchRL's; raises ``ValueError`` for a ``feature_norm`` that the network does not write."""
        check_written(self.value_network, ["feature_norm"], kwargs)
        super().set_keys(**kwargs)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of a batch, in the order of positional arguments; the last two may be absent."""
        keys = self.tensor_keys
        return [
            *self.value_network.in_keys,
            keys.action,
            unravel_key(("next", keys.reward)),
            unravel_key(("next", keys.terminated)),
            *(unravel_key(("next", key)) for key in self.value_network.in_keys),
            keys.steps_to_next_obs,
            unravel_key(("next", keys.done)),
        ]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the result: the two losses, the metrics, and what ``keep`` names."""
        metrics = ["td_error", "cql_gap", "q_data", "q_max", "q_target"]
        if self.support is not None:
            metrics.append("clipped_mass")
        if self._writes_feature_norm:
            metrics.append("feature_norm")
        return ["loss_qvalue", "loss_cql", *metrics, *self.keep]

    @property
    def _writes_feature_norm(self) -> bool:
        return writes(self.value_network, self.tensor_keys.feature_norm)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys, network = self.tensor_keys, self.value_network
        reward, terminated, steps = self._read_transition(tensordict)
        # Not the batch size of the tensordict, which dispatch can only guess.
        batch_shape = reward.shape[:-1]
        inputs = TensorDict({key: tensordict[key] for key in network.in_keys}, batch_shape)
        values = action_values(network, self.value_network_params, inputs, keys.action_value)
        with torch.no_grad():
            next_values, next_action = self._next_values(tensordict, batch_shape)
        action = action_index(tensordict[keys.action], values.shape[-1], batch_shape, network.action_space)
        discount = self.gamma if steps is None else self.gamma**steps
        discount = discount * terminated.logical_not().to(values.dtype)

        taken, next_taken = _select(values, action), _select(next_values, next_action)
        loss_td, q_target, clipped = self._td(taken, next_taken, reward.to(values.dtype), discount)
        unmasked = self._q_values(values)
        q_values = mask_illegal(unmasked, network, inputs, action)
        q_data = _select(q_values, action)
        gap = q_values.logsumexp(-1) - q_data

        tensordict.set(keys.priority, loss_td.detach().unsqueeze(-1), inplace=tensordict.is_locked)
        weights = priority_weights(self, tensordict, batch_shape)
        mean = mean_over_batch(self, tensordict, weights)
        result = {
            "loss_qvalue": self._reduce_loss(loss_td, tensordict, weights=weights),
            "loss_cql": self.cql_alpha * self._reduce_loss(gap, tensordict, weights=weights),
            "td_error": mean(loss_td),
            "cql_gap": mean(gap),
            "q_data": mean(q_data),
            "q_max": mean(mask_illegal(unmasked, network, inputs).amax(-1)),
            "q_target": mean(q_target),
        }
        if clipped is not None:
            result["clipped_mass"] = mean(clipped)
        if self._writes_feature_norm:
            result["feature_norm"] = mean(inputs[keys.feature_norm].squeeze(-1))
        out = TensorDict(result)
        for key in self.keep:
            out[key] = inputs[key]
        self._clear_weakrefs(tensordict, out, "value_network_params", "target_value_network_params")
        return out

    def _read_transition(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reward, ``terminated`` and, if there, ``steps_to_next_obs``, each ``[*B, 1]``."""
        keys = self.tensor_keys
        reward = tensordict[unravel_key(("next", keys.reward))]
        end_key = unravel_key(("next", keys.terminated))
        if (terminated := tensordict.get(end_key, None)) is None:
            if keys.terminated != self._AcceptedKeys.terminated:
                raise KeyError(f"{end_key!r}, given by set_keys(terminated=...), is not in the batch")
            done_key = unravel_key(("next", keys.done))
            if (terminated := tensordict.get(done_key, None)) is None:
                raise KeyError(f"neither {end_key!r} nor {done_key!r} is in the batch")
            end_key = done_key
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is None and keys.steps_to_next_obs != self._AcceptedKeys.steps_to_next_obs:
            raise KeyError(f"{keys.steps_to_next_obs!r}, given by set_keys(steps_to_next_obs=...), is not in the batch")
        # Any other shape would broadcast into a loss between samples.
        if reward.shape[-1:] != (1,):
            raise ValueError(f"('next', {keys.reward!r}) must be [*B, 1], got {tuple(reward.shape)}")
        if steps is not None and steps.shape == reward.shape[:-1]:
            steps = steps.unsqueeze(-1)  # as TorchRL's MultiStep writes it
        for key, value in ((end_key, terminated), (keys.steps_to_next_obs, steps)):
            if value is not None and value.shape != reward.shape:
                raise ValueError(f"{key!r} must be {tuple(reward.shape)} like the reward, got {tuple(value.shape)}")
        return reward, terminated, steps

    def _next_values(self, tensordict: TensorDictBase, batch_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The target network's values of the next observation, and the ``[*B]`` index of the action to evaluate."""
        key, network = self.tensor_keys.action_value, self.value_network
        inputs = next_inputs(network, tensordict, batch_shape, self.static_keys)
        choosing = inputs.copy()
        values = chooser = action_values(network, self.target_value_network_params, choosing, key)
        if self.double_q:
            choosing = inputs
            chooser = action_values(network, self.value_network_params, choosing, key)
        return values, mask_illegal(self._q_values(chooser), network, choosing).argmax(-1)

    def _q_values(self, values: Tensor) -> Tensor:
        """``[*B, A]`` expectations of log-probabilities ``[*B, N, A]``; scalar values as they are."""
        return values if self.support is None else expected_value(values, self.support.to(values.dtype))

    def _td(
        self, taken: Tensor, next_taken: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each sample's TD loss, target value and clipped mass, ``[*B]`` each, from the values of the two actions."""
        if self.support is None:
            q_target = (reward + discount * next_taken.unsqueeze(-1)).squeeze(-1)
            return (taken - q_target).square(), q_target, None
        support, probs = self.support.to(taken.dtype), next_taken.exp()
        if self.target == "c51":
            target_probs = c51_projection(probs, support, reward, discount)
            clipped = clipped_mass(probs, support, reward, discount)
        else:
            value = reward + discount * (probs * support).sum(-1, keepdim=True)
            target_probs = hl_gauss_target(value, support, self.sigma_ratio)
            clipped = ((value < support[0]) | (value > support[-1])).squeeze(-1).to(value.dtype)
        return -(target_probs * taken).sum(-1), (target_probs * support).sum(-1), clipped


def _select(values: Tensor, action: Tensor) -> Tensor:
    """``values`` ``[*B, (N,) A]`` at ``action`` ``[*B]``."""
    index = action.reshape(*action.shape, *(1 for _ in range(values.ndim - action.ndim)))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)
