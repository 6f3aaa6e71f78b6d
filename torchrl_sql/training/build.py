"""From a configuration to the parts of a run: the only place where configs meet components."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrl.objectives import LossModule

from torchrl_sql.config import ConfigError, OnlineConfig, OptimConfig, RunConfig
from torchrl_sql.data import FrameStore, mean_frame
from torchrl_sql.data.growing import GrowingStore
from torchrl_sql.envs import Emulator
from torchrl_sql.envs.lockstep import Lockstep
from torchrl_sql.files import expand_path
from torchrl_sql.methods import Method, make_method
from torchrl_sql.training.device import prepare_cpu, resolve_device, tune
from torchrl_sql.training.features import FeatureProbe
from torchrl_sql.training.initial import MEAN_FRAMES, freeze_encoder, load_initial
from torchrl_sql.training.lamb import Lamb
from torchrl_sql.training.online import OnlineReplay, Pace
from torchrl_sql.training.parallel import AveragedAfterwards, LossCall, Replicated, SingleProcess
from torchrl_sql.training.ranks import Ranks
from torchrl_sql.training.trainer import Replay, Trainer
from torchrl_sql.training.writer import MAX_FAILURES


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
    if config.online is not None and method.values != "q":
        raise ConfigError(
            f"method.name must be one that learns values to act by with online settings, got {config.method.name}"
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
    on_tick: Callable[[], None] = lambda: None,
) -> Trainer:
    """Everything a run needs, from its configuration; ``init.sha256`` of a run that starts from another is set there.

    Args:
        config (RunConfig): the run.
        ranks (Ranks, optional): the processes that train together; default this one alone.

    Keyword Args:
        memory_format (torch.memory_format, optional): layout of the convolutions; default what suits the device.
        continues (bool): the caller loads a checkpoint; ``init.policy`` is not read, nothing is measured on the data,
            and nothing played yet.
        on_tick (callable): of :class:`OnlineReplay`, where the run plays.

    Raises:
        ValueError, FileNotFoundError: if the store does not hold the games asked for, or the batch cannot be divided
            among the ranks.
    """
    ranks = ranks or Ranks(0, 1, resolve_device(config.trainer.device))
    prepare_cpu(config.num_threads)
    tune(ranks.device, try_algorithms=True)
    torch.manual_seed(config.seed)
    device = ranks.device
    if memory_format is None:
        # Channels-last suits CUDA's convolutions, but not torch's group normalization, which compiled steps do not call
        # (benchmarks/results/gpu.md); on the CPU the small network is faster without.
        suits = device.type == "cuda" and config.trainer.compile != "off"
        memory_format = torch.channels_last if suits else torch.contiguous_format
    method = make_method(config.method)
    # Before any data is opened: the network refuses names that it does not know.
    network = method.network(config.model, config.games, memory_format=memory_format)
    playable: tuple[str, ...] = ()
    if config.init.policy is not None and not continues:
        config.init.source, config.init.sha256, playable = load_initial(network, config, ranks)
    new = [game for game in config.games if game not in playable]
    if new and config.online is not None and config.online.initial_epsilon < 1 and not continues:
        raise ConfigError(
            f"online.initial_epsilon must be 1 with games that no loaded policy can play, {', '.join(new)}, got "
            f"{config.online.initial_epsilon}"
        )
    if config.init.freeze:
        freeze_encoder(network)
    network.to(device)
    loss = method.loss(network).to(device)
    if ranks.rank:  # masks and dropout are drawn for each rank's own samples
        torch.manual_seed(int(np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1)[0]))
    options: dict[str, Any] = {
        "seed": config.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "device": device,
        "keys": [*loss.in_keys, "index"],  # what nobody reads is not sent; the index names a batch left for inspection
    }
    replay: Replay
    if config.online is None:
        replay = method.replay(config.data, FrameStore.open(expand_path(config.data.store)), **options)
    else:
        replay = build_online_replay(config, config.online, method, network, on_tick=on_tick, **options)
        if not continues:
            replay.begin()
    for name, buffer in () if continues else network.named_buffers():
        if MEAN_FRAMES.fullmatch(name):
            store = FrameStore.open(expand_path(config.data.store))
            for game in new:
                buffer[config.games.index(game)] = torch.from_numpy(mean_frame(store, game)) / 255
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


def build_online_replay(
    config: RunConfig,
    online: OnlineConfig,
    method: Method,
    network: nn.Module,
    *,
    on_tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> OnlineReplay:
    """What a run that plays samples from; the store is made, nothing is played yet.

    Args:
        config (RunConfig): the run.
        online (OnlineConfig): its section.
        method (Method): likewise.
        network (nn.Module): whose parameters learn.

    Keyword Args:
        on_tick (callable): of :class:`OnlineReplay`.
        options: of :meth:`Method.replay`.

    Raises:
        ValueError, FileNotFoundError: if the other store does not hold the games.
    """
    num_offline = round(online.offline_fraction * config.data.batch_size)
    offline = None
    if online.offline_store is not None:
        # Another seed, so that equal numbers of transitions do not mean equal draws.
        other = options | {"seed": config.seed + 1}
        data = replace(config.data, batch_size=num_offline)
        offline = method.replay(data, FrameStore.open(expand_path(online.offline_store)), **other)
    sections = {key: asdict(getattr(config, key)) for key in ("online", "data", "model", "method", "optim", "init")}
    if online.initial_epsilon == 1:  # as in stores of before there was another
        del sections["online"]["initial_epsilon"]
    for section, key in (("data", "store"), ("data", "prefetch"), ("init", "policy"), ("online", "offline_store")):
        del sections[section][key]
    sections["data"]["games"] = list(config.games)
    growing = GrowingStore(
        expand_path(config.data.store),
        config.games,
        source=f"torchrl-sql train-online, seed {config.seed}",
        about={"played_by": {"seed": config.seed, **sections}},
        shard_frames=online.shard_frames,
    )
    emulator = Emulator(
        sticky_action_probability=online.sticky_action_probability, max_env_frames=online.max_env_frames_per_episode
    )
    own = replace(config.data, batch_size=config.data.batch_size - num_offline)
    return OnlineReplay(
        growing,
        Lockstep(config.games, online.num_emulators, emulator, seed=config.seed),
        method.policy(network, config.games),
        partial(method.replay, own, newest_steps=online.capacity_transitions_per_game, **options),
        Pace(
            agent_steps_per_gradient_step=online.agent_steps_per_gradient_step,
            first_agent_steps=online.first_agent_steps,
            initial_epsilon=online.initial_epsilon,
            final_epsilon=online.final_epsilon,
            epsilon_decay_agent_steps=online.epsilon_decay_agent_steps,
            commit_interval_gradient_steps=online.commit_interval_gradient_steps,
            seed=config.seed,
        ),
        offline=offline,
        # After so many failures in a row training stops, at the latest before another checkpoint is due.
        unsaved_steps=(MAX_FAILURES + 1) * config.trainer.checkpoint_interval_gradient_steps,
        on_tick=on_tick,
    )
