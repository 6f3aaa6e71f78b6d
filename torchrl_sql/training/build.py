"""From a configuration to the parts of a run: the only place where configs meet components."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchrl.modules import DistributionalQValueActor, QValueActor
from torchrl.objectives import HardUpdate, LossModule

from torchrl_sql.config import OptimConfig, QLearningConfig, RunConfig, run_config_from_yaml
from torchrl_sql.data import FrameStore, OfflineAtariReplay, mean_frame
from torchrl_sql.games import FRAME_SHAPE
from torchrl_sql.modules import make_q_actor
from torchrl_sql.objectives import DiscreteBCLoss, DistributionalCQLLoss
from torchrl_sql.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from torchrl_sql.training.parallel import Replicated, SingleProcess
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.trainer import Trainer


def set_num_threads(config: RunConfig) -> None:
    """Applies ``config.num_threads`` to this process."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)


def resolve_device(name: str) -> torch.device:
    """This process's device: ``auto`` is CUDA where there is one; of several GPUs, that of ``LOCAL_RANK``.

    A CUDA device has its index: ``torch.cuda.set_device`` asks for one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if torch.cuda.device_count() > 1 else 0}"
    return torch.device(name)


def build_actor(
    config: RunConfig,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    mask_illegal_actions: bool = False,
) -> DistributionalQValueActor | QValueActor:
    """The Q-network.

    Args:
        config (RunConfig): its model, method and games, one head each.

    Keyword Args:
        memory_format (torch.memory_format): layout of the convolutions.
        mask_illegal_actions (bool): never choose an action that the game does not know.

    Returns:
        The actor; the mean frames of ``center_input`` are zeros until they are set or loaded.

    Raises:
        ValueError: for an encoder or pooling of an unknown name.
    """
    model, method, games = config.model, config.method, config.games
    input_mean = torch.zeros(len(games), *FRAME_SHAPE) if model.center_input else None
    heads: dict[str, Any] = {"num_atoms": None}
    if isinstance(method, QLearningConfig):
        heads = {key: getattr(method, key) for key in ("num_atoms", "v_min", "v_max", "value_prior_std")}
    return make_q_actor(
        games,
        encoder=model.encoder,
        pooling=model.pooling,
        num_embeddings=model.num_embeddings,
        num_groups=model.num_groups,
        feature_norm=model.feature_norm,
        logit_scale=model.logit_scale,
        input_mean=input_mean,
        memory_format=memory_format,
        mask_illegal_actions=mask_illegal_actions,
        **heads,
    )


def build_loss(config: RunConfig, actor: DistributionalQValueActor | QValueActor) -> LossModule:
    """The objective over ``actor``'s parameters."""
    method = config.method
    if not isinstance(method, QLearningConfig):
        return DiscreteBCLoss(actor)
    return DistributionalCQLLoss(
        actor,
        gamma=method.gamma,
        cql_alpha=method.cql_alpha,
        double_q=method.double_q,
        target=method.target,  # type: ignore[arg-type]
    )


def learning_rate_factor(optim: OptimConfig, num_gradient_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine from 1 to ``final_learning_rate_fraction``; the argument is the step, from 0."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (optim.warmup_gradient_steps + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_gradient_steps)))
        final = optim.final_learning_rate_fraction
        return warmup * (final + (1 - final) * cosine)

    return factor


def build_optimizer(optim: OptimConfig, loss: LossModule) -> torch.optim.Optimizer:
    """Fused Adam or AdamW over what the loss trains."""
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    return kinds[optim.name](
        trained, lr=optim.learning_rate, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def build_trainer(config: RunConfig, ranks: Ranks | None = None) -> Trainer:
    """Everything a run needs, from its configuration.

    Args:
        config (RunConfig): the run.
        ranks (Ranks, optional): the processes that train together; default this one alone.

    Raises:
        ValueError, FileNotFoundError: if the store does not hold the games asked for, or the batch cannot be divided
            among the ranks.
    """
    ranks = ranks or Ranks(0, 1, resolve_device(config.trainer.device))
    set_num_threads(config)
    torch.manual_seed(config.seed)
    device = ranks.device
    # Channels-last suits CUDA's convolutions; on the CPU the small network is faster without.
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    # Before any data is opened: the network refuses names that it does not know.
    actor = build_actor(config, memory_format=memory_format)
    store = FrameStore.open(config.data.store)
    replay = OfflineAtariReplay(
        store,
        batch_size=config.data.batch_size,
        games=config.games,
        n_steps=config.data.n_steps,
        gamma=getattr(config.method, "gamma", 1.0),
        first_fraction=config.data.first_fraction,
        every_kth_episode=config.data.every_kth_episode,
        transitions_per_game=config.data.transitions_per_game,
        mixture=config.data.mixture,
        temperature=config.data.temperature,
        replacement=config.data.replacement,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
    )
    if config.model.center_input:
        means = [torch.from_numpy(mean_frame(store, game)) / 255 for game in config.games]
        actor.module[0].module.input_mean.copy_(torch.stack(means))
    loss = build_loss(config, actor).to(device)
    compile = config.trainer.compile
    call = Replicated(loss, ranks, compile=compile) if ranks.world_size > 1 else SingleProcess(loss, compile=compile)
    # Interval 0 copies at each call; the trainer calls it when it is due.
    target_updater = (
        HardUpdate(loss, value_network_update_interval=0) if isinstance(config.method, QLearningConfig) else None
    )
    return Trainer(
        loss,
        replay,
        build_optimizer(config.optim, loss),
        schedule=learning_rate_factor(config.optim, config.trainer.num_gradient_steps),
        target_updater=target_updater,
        target_update_interval=config.trainer.target_update_interval_gradient_steps,
        max_grad_norm=config.optim.max_grad_norm,
        ranks=ranks,
        call=call,
        microbatch_size=config.trainer.microbatch_size,
        precision=config.trainer.precision,  # type: ignore[arg-type]
    )


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, or the newest one of a run's folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    if path.is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"{path} must be a checkpoint or the folder of a trained run, but holds no checkpoint")
    return checkpoints[-1]


class Trained(NamedTuple):
    """A trained network: the actor on the CPU in evaluation mode, its run's configuration, its gradient steps."""

    actor: DistributionalQValueActor | QValueActor
    config: RunConfig
    gradient_step: int


def load_actor(path: Path) -> Trained:
    """Loads a trained network for acting.

    Args:
        path (Path): a checkpoint, or a run's folder (its newest checkpoint is taken).

    Raises:
        CheckpointError: if the checkpoint is damaged, or its weights are of another network than it says.
    """
    path = find_checkpoint(path)
    content: dict[str, Any] = load_checkpoint(path)
    config = run_config_from_yaml(content["config"], source=f"the configuration in {path}")
    actor = build_actor(config)
    # The loss holds the actor's own parameters: loading it loads them.
    try:
        build_loss(config, actor).load_state_dict(content["trainer"]["loss"])
    except (RuntimeError, ValueError, KeyError) as error:  # torch's and tensordict's ways to say so
        raise CheckpointError(
            f"{path} must hold the weights of the network that its configuration describes ({config.model.encoder}, "
            f"{len(config.games)} games, 18 actions), got weights of other names or shapes"
        ) from error
    return Trained(actor.eval(), config, content["trainer"]["step"])
