"""Data collection: behaviour policies play in the emulator, a store keeps it."""

from __future__ import annotations

import sys
from functools import partial
from typing import cast

from tqdm import tqdm

from torchrl_sql.config import ConfigError, RunConfig
from torchrl_sql.data import FrameStore
from torchrl_sql.data.frames import Codec
from torchrl_sql.envs import Emulator, SkillMixture, collect, weak_skills
from torchrl_sql.envs.behaviours import describe
from torchrl_sql.files import expand_path


def collect_data(config: RunConfig) -> FrameStore:
    """Fills ``config.data.store`` as ``config.collection`` says; continues an interrupted collection.

    Raises:
        ConfigError: if the store was collected in another way.
    """
    collection = config.collection
    how = {
        "seed": collection.seed,
        "num_agent_steps_per_game": collection.num_agent_steps_per_game,
        "sticky_action_probability": collection.sticky_action_probability,
        "max_env_frames_per_episode": collection.max_env_frames_per_episode,
        "max_repeat_probability": collection.max_repeat_probability,
    }
    emulator = Emulator(
        sticky_action_probability=collection.sticky_action_probability,
        max_env_frames=collection.max_env_frames_per_episode,
    )
    mixture = weak_skills(collection.max_repeat_probability)
    policies = {game: SkillMixture(game, mixture) for game in config.games}
    store = FrameStore.create(expand_path(config.data.store), codec=cast(Codec, collection.codec), exist_ok=True)
    if store.encoding.codec != collection.codec:
        raise ConfigError(
            f"the store {config.data.store} is in {store.encoding.codec}, wanted {collection.codec}: set "
            f"collection.codec={store.encoding.codec}, or choose another data.store"
        )
    for game, policy in policies.items():
        found = dict(store.recording(game).manifest.metadata) if game in store.games else how
        if found != how:
            raise ConfigError(
                f"the store {config.data.store} holds {game} collected with {found}, wanted {how}; choose another "
                "data.store or delete it"
            )
        with store.writer(
            game, source=describe(game, mixture), behaviours=policy.behaviour_names, metadata=how
        ) as writer:
            bar = tqdm(
                total=collection.num_agent_steps_per_game,
                initial=writer.num_steps,
                desc=f"collect {game}",
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                dynamic_ncols=True,
            )
            with bar:
                collect(
                    writer,
                    policy,
                    game,
                    collection.num_agent_steps_per_game,
                    emulator,
                    seed=collection.seed,
                    progress=partial(_advance, bar),
                )
    return store


def _advance(bar: tqdm, num_done: int) -> None:
    bar.update(num_done - bar.n)
