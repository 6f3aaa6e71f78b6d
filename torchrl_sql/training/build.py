"""From a configuration to the parts of a run: the only place where configs meet components."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torchrl.objectives import LossModule

from torchrl_sql.config import ConfigError, OptimConfig, RunConfig
from torchrl_sql.data import FrameStore, mean_frame
from torchrl_sql.files import expand_path
from torchrl_sql.methods import make_method
from torchrl_sql.training.device import prepare_cpu, resolve_device, tune
from torchrl_sql.training.features import FeatureProbe
from torchrl_sql.training.initial import freeze_encoder, load_initial
from torchrl_sql.training.lamb import Lamb
from torchrl_sql.training.parallel import AveragedAfterwards, LossCall, Replicated, SingleProcess
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.trainer import Trainer


def check_here(config: RunConfig) -> None:
    """Refuses what this machine or these versions cannot run; no data is needed to find out.

    Raises:
        ConfigError: naming the key.
    """
    if "wandb" in config.trainer.loggers and find_spec("wandb") is None:
        raise ConfigError("trainer.loggers names wandb, which is not installed: pip install torchrl-sql[wandb]")
    method = make_method(config.method)
    try:
        method.network(config.model, config.games)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def learning_rate_factor(optim: OptimConfig, num_gradient_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine from 1 to ``final_learning_rate_fraction``; the argument is the step, from 0."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (optim.warmup_gradient_steps + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_gradient_steps)))
        final = optim.final_learning_rate_fraction
        return warmup * (final + (1 - final) * cosine)

    return factor


def build_optimizer(optim: OptimConfig, loss: LossModule) -> torch.optim.Optimizer:
    """The optimizer over what the loss trains; each leaves out a step whose gradient is not finite."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": partial(torch.optim.Adam, fused=True),
        "adamw": partial(torch.optim.AdamW, fused=True),
        "lamb": Lamb,
    }
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    return kinds[optim.name](trained, lr=optim.learning_rate, eps=optim.eps, weight_decay=optim.weight_decay)


def build_trainer(
    config: RunConfig,
    ranks: Ranks | None = None,
    *,
    memory_format: torch.memory_format | None = None,
    continues: bool = False,
) -> Trainer:
    """Everything a run needs, from its configuration; ``init.sha256`` of a run that starts from another is set there.

    Args:
        config (RunConfig): the run.
        ranks (Ranks, optional): the processes that train together; default this one alone.

    Keyword Args:
        memory_format (torch.memory_format, optional): layout of the convolutions; default what suits the device.
        continues (bool): the caller loads a checkpoint; ``init.policy`` is not read.

    Raises:
        ValueError, FileNotFoundError: if the store does not hold the games asked for, or the batch cannot be divided
            among the ranks.
    """
    ranks = ranks or Ranks(0, 1, resolve_device(config.trainer.device))
    prepare_cpu(config.num_threads)
    tune(ranks.device)
    torch.manual_seed(config.seed)
    device = ranks.device
    if memory_format is None:
        # Channels-last suits CUDA's convolutions; on the CPU the small network is faster without.
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    method = make_method(config.method)
    # Before any data is opened: the network refuses names that it does not know.
    network = method.network(config.model, config.games, memory_format=memory_format)
    if config.init.policy is not None and not continues:
        config.init.sha256 = load_initial(network, config, ranks)
    if config.init.freeze:
        freeze_encoder(network)
    loss = method.loss(network)
    store = FrameStore.open(expand_path(config.data.store))
    replay = method.replay(
        config.data,
        store,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
        keys=[*loss.in_keys, "index"],  # what nobody reads is not sent; the index names a batch left for inspection
    )
    for name, buffer in network.named_buffers():
        if name.endswith("input_mean"):
            buffer.copy_(torch.stack([torch.from_numpy(mean_frame(store, game)) / 255 for game in config.games]))
    loss = loss.to(device)
    network.to(device)  # its parameters are the loss's, and there already; its buffers are not
    compile, graph = config.trainer.compile != "off", config.trainer.compile == "graph"
    call: LossCall
    if ranks.world_size == 1:
        call = SingleProcess(loss, compile=compile)
    else:
        call = (AveragedAfterwards if graph else Replicated)(loss, ranks, compile=compile)
    return Trainer(
        loss,
        replay,
        build_optimizer(config.optim, loss),
        schedule=learning_rate_factor(config.optim, config.trainer.num_gradient_steps),
        target_updater=method.target_updater(loss),
        target_update_interval=config.trainer.target_update_interval_gradient_steps,
        max_grad_norm=config.optim.max_grad_norm,
        ranks=ranks,
        call=call,
        microbatch_size=config.trainer.microbatch_size,
        precision=config.trainer.precision,  # type: ignore[arg-type]  # the schema's bound is the Literal
        graph=graph,
        probe=FeatureProbe(network, method.features),
    )
