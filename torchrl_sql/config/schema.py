"""The schema of a run's configuration: types, meaning and checks. The values live in ``configs/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_sql.games import resolve_games


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names key, expected and found."""


@dataclass(kw_only=True)
class CollectionConfig:
    """How ``torchrl-sql collect`` makes a store with weak skills; null where the data comes from elsewhere."""

    num_agent_steps_per_game: int = MISSING
    sticky_action_probability: float = MISSING
    max_env_frames_per_episode: int = MISSING
    """Emulator frames (four an agent step) after which a collected episode is truncated."""
    seed: int = MISSING


@dataclass(kw_only=True)
class DataConfig:
    """What is sampled."""

    store: str = MISSING
    """Path of the store."""
    games: Any = MISSING
    """``train40``, ``heldout5``, ``all``, names separated by commas, or a list of names."""
    first_fraction: float = MISSING
    """The first such part of each run, in (0, 1], counted in steps."""
    every_kth_episode: int = MISSING
    """Of these the episodes 0, k, 2k, ... of each run."""
    transitions_per_game: int | None = MISSING
    """Of what is left the first so many of each game; null for all."""
    mixture: Any = MISSING
    """``games`` (each game equally often), ``transitions``, or a list of one weight a game."""
    temperature: float = MISSING
    """Shares of the mixture are raised to the power 1 / temperature; larger values make them more equal."""
    replacement: bool = MISSING
    """false: no transition comes twice before all of its game have come once."""
    batch_size: int = MISSING
    """Transitions of the global batch."""
    n_steps: int = MISSING
    """Agent steps a target looks ahead."""
    prefetch: int = MISSING
    """Batches read ahead in threads."""


@dataclass(kw_only=True)
class ModelConfig:
    """Arguments of :func:`torchrl_sql.modules.make_q_actor`."""

    encoder: str = MISSING
    """A name in :data:`torchrl_sql.modules.ENCODERS`; building the network, before data is opened, refuses others."""
    num_atoms: int | None = MISSING
    """Atoms of the return distribution; null for scalar heads (MSE targets, behavioural cloning)."""
    v_min: float = MISSING
    """Least return of the support, in clipped-reward units."""
    v_max: float = MISSING
    pooling: str = MISSING
    """A name in :data:`torchrl_sql.modules.POOLINGS`."""
    num_embeddings: int | None = MISSING
    """Learned spatial embeddings; null for the encoder's default."""
    num_groups: int = MISSING
    """Groups of the ResNets' GroupNorm."""
    feature_norm: bool = MISSING
    """Divide the feature vector by its L2 norm."""
    logit_scale: float = MISSING
    """Initial value of the learned scale of the normalized features."""
    value_prior_std: float | None = MISSING
    """Standard deviation of the Gaussian that the initial return distribution resembles; null for uniform."""
    center_input: bool = MISSING
    """Subtract each game's mean frame (departs from the paper; helps small runs)."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    name: str = MISSING
    """``cql`` or ``bc`` (behavioural cloning)."""
    target: str | None = MISSING
    """``c51``, ``hl_gauss`` or ``mse``; null for bc."""
    cql_alpha: float | None = MISSING
    """Weight of the CQL penalty, dimensionless."""
    double_q: bool | None = MISSING
    gamma: float = MISSING
    """Discount per agent step (four emulator frames)."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = MISSING
    """``adam`` or ``adamw`` (decoupled weight decay); fused."""
    learning_rate: float = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    """Of adam: added to the gradient; of adamw: subtracted from the weights, times the learning rate."""
    warmup_gradient_steps: int = MISSING
    """Linear warm-up from 0."""
    final_learning_rate_fraction: float = MISSING
    """Cosine decay to this fraction of the learning rate at the last step; 1 for a constant rate."""
    max_grad_norm: float | None = MISSING
    """Gradients are scaled down to this global L2 norm; null for no clipping."""


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop."""

    num_gradient_steps: int = MISSING
    target_update_interval_gradient_steps: int = MISSING
    """Hard copy of the online network to the target network."""
    checkpoint_interval_gradient_steps: int = MISSING
    num_checkpoints_kept: int = MISSING
    """The newest ones; the one with the best evaluation stays too."""
    milestone_interval_gradient_steps: int | None = MISSING
    """Checkpoints of these steps are never deleted, for learning curves; null for none."""
    log_interval_gradient_steps: int = MISSING
    loggers: list[str] = MISSING
    """Any of ``csv``, ``tensorboard``, ``wandb``; csv is what reports read."""
    device: str = MISSING
    """``cpu``, ``cuda``, or ``auto`` for CUDA where there is one."""
    microbatch_size: int | None = MISSING
    """Transitions of one forward and backward pass on each rank, whose gradients add up; null for all of a rank's."""
    stall_warning_seconds: float = MISSING
    """After this time without a gradient step, the log says what each thread does."""
    precision: str = MISSING
    """``fp32`` or ``bf16`` (autocast; distribution arithmetic stays float32)."""
    compile: bool = MISSING


@dataclass(kw_only=True)
class EvaluationConfig:
    """The evaluation protocol (every report states it)."""

    num_episodes_per_game: int = MISSING
    epsilon: float = MISSING
    """Probability of a uniformly random legal action."""
    sticky_action_probability: float = MISSING
    max_env_frames_per_episode: int = MISSING
    seed: int = MISSING


@dataclass(kw_only=True)
class RunConfig:
    """One run: everything that decides what it computes."""

    name: str = MISSING
    run_dir: str = MISSING
    """Folder of checkpoints, logs and reports."""
    seed: int = MISSING
    num_threads: int | None = MISSING
    """CPU threads of torch in training and evaluation; null for torch's own choice."""
    collection: CollectionConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def games(self) -> tuple[str, ...]:
        """Names of the games; their order is the meaning of ``game_id``."""
        return resolve_games(self.data.games)

    def to_yaml(self) -> str:
        """The resolved configuration, loadable by :func:`load_run_config`."""
        return OmegaConf.to_yaml(OmegaConf.structured(self), resolve=True)


def configs_dir() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_experiments() -> list[str]:
    """Names usable as ``experiment=NAME``."""
    return sorted(path.stem for path in (configs_dir() / "experiment").glob("*.yaml"))


def compose_run_config(overrides: Sequence[str]) -> RunConfig:
    """Composes and checks a run's configuration.

    Args:
        overrides (sequence of str): Hydra overrides, e.g. ``["experiment=quickstart", "objective.cql_alpha=0.5"]``.

    Raises:
        ConfigError: for unknown keys or groups, values of a wrong type and combinations that cannot run.
    """
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    try:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            config = compose("run", overrides=list(overrides))
        return _checked(config)
    except OverrideParseException as error:
        message = f"settings must be key=value, got {error.override!r}: {_first_line(error)}"
        hint = "; a list is written key=[A,B]" if "," in str(error.override) else ""
        raise ConfigError(message + hint) from None
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        raise ConfigError("; ".join(_first_line(e) for e in (error, cause) if e)) from None


def load_run_config(path: Path) -> RunConfig:
    """Reads the YAML that :meth:`RunConfig.to_yaml` wrote.

    Raises:
        ConfigError: if the file is not such a configuration.
    """
    return run_config_from_yaml(path.read_text(encoding="utf-8"), source=str(path))


def run_config_from_yaml(text: str, *, source: str) -> RunConfig:
    """As :func:`load_run_config`, from the text itself; ``source`` names it in errors."""
    try:
        return _checked(OmegaConf.merge(OmegaConf.structured(RunConfig), yaml.safe_load(text)))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ConfigError) as error:
        raise ConfigError(f"{source} must hold a run's configuration: {error}") from None


def override_run_config(config: RunConfig, overrides: Sequence[str], *, section: str) -> RunConfig:
    """A copy of ``config`` with changes within one section: ``evaluation=sticky``, ``evaluation.epsilon=0.01``.

    Raises:
        ConfigError: for keys of another section, unknown keys and values that do not fit.
    """
    changes: Any = OmegaConf.structured(config)
    try:
        for override in overrides:
            if override.startswith(f"{section}="):
                with initialize_config_dir(str(configs_dir()), version_base="1.3"):
                    change = compose(override.replace("=", "/", 1))
            elif override.startswith(f"{section}.") and "=" in override:
                change = OmegaConf.from_dotlist([override])
            else:
                raise ConfigError(f"overrides here must be {section}=NAME or {section}.KEY=VALUE, got {override!r}")
            changes = OmegaConf.merge(changes, change)
        return _checked(changes)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_first_line(error)) from None


def _checked(config: Any) -> RunConfig:
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} must be given, e.g. {key}=...")
    run_config = OmegaConf.to_object(config)
    assert isinstance(run_config, RunConfig)
    check(run_config)
    return run_config


def check_ranks(config: RunConfig, num_ranks: int) -> None:
    """Checks that the batch divides among processes, and each one's share into microbatches.

    Args:
        config (RunConfig): a checked run.
        num_ranks (int): processes that train it together.

    Raises:
        ConfigError: if it does not.
    """
    batch_size, microbatch_size = config.data.batch_size, config.trainer.microbatch_size
    if batch_size % num_ranks:
        raise ConfigError(f"data.batch_size must be a multiple of the {num_ranks} processes, got {batch_size}")
    share = batch_size // num_ranks
    if microbatch_size is not None and share % microbatch_size:
        raise ConfigError(
            f"trainer.microbatch_size must be null or a divisor of each process's batch of {share}, "
            f"got {microbatch_size}"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check(config: RunConfig) -> None:
    """Checks the values and the constraints between them, before any data is opened.

    Raises:
        ConfigError: naming the key, what it must be and what it is.
    """

    def require(holds: bool, key: str, must: str) -> None:
        if not holds:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key} must be {must}, got {value!r}")

    try:
        games = config.games
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.games: {error}") from None
    require(config.num_threads is None or config.num_threads >= 1, "num_threads", "at least 1, or null")
    objective, model, optim, trainer = config.objective, config.model, config.optim, config.trainer
    data = config.data
    weights = data.mixture if isinstance(data.mixture, list) else [1.0] * len(games)
    require(
        (data.mixture in ("games", "transitions") or isinstance(data.mixture, list))
        and len(weights) == len(config.games)
        and all(isinstance(weight, (int, float)) and weight >= 0 for weight in weights)
        and sum(weights) > 0,
        "data.mixture",
        f"games, transitions or a list of {len(config.games)} weights >= 0, one a game",
    )
    require(data.temperature > 0, "data.temperature", "greater than 0")
    require(0 < data.first_fraction <= 1, "data.first_fraction", "in (0, 1]")
    require(
        data.transitions_per_game is None or data.transitions_per_game >= 1,
        "data.transitions_per_game",
        "at least 1, or null",
    )
    positive = [
        "data.batch_size",
        "data.n_steps",
        "data.every_kth_episode",
        "model.num_groups",
        "trainer.num_gradient_steps",
    ]
    positive += ["evaluation.num_episodes_per_game", "evaluation.max_env_frames_per_episode"]
    if config.collection is not None:
        positive += ["collection.num_agent_steps_per_game", "collection.max_env_frames_per_episode"]
    for key in positive:
        section, name = key.split(".")
        require(getattr(getattr(config, section), name) >= 1, key, "at least 1")
    require(config.seed >= 0, "seed", "at least 0")
    require(config.data.prefetch >= 0, "data.prefetch", "at least 0")
    require(objective.name in ("cql", "bc"), "objective.name", "cql or bc")
    require(0 < objective.gamma <= 1, "objective.gamma", "in (0, 1]")
    if objective.name == "cql":
        require(objective.target in ("c51", "hl_gauss", "mse"), "objective.target", "c51, hl_gauss or mse")
        require(objective.cql_alpha is not None and objective.cql_alpha >= 0, "objective.cql_alpha", "at least 0")
        require(objective.double_q is not None, "objective.double_q", "true or false")
        if objective.target == "mse":
            require(model.num_atoms is None, "model.num_atoms", "null (scalar heads) with objective.target=mse")
        else:
            must = f"at least 2 with objective.target={objective.target}"
            require(model.num_atoms is not None and model.num_atoms >= 2, "model.num_atoms", must)
    else:
        require(model.num_atoms is None, "model.num_atoms", "null (scalar heads) with objective.name=bc")
    require(model.num_embeddings is None or model.num_embeddings >= 1, "model.num_embeddings", "at least 1, or null")
    require(model.logit_scale > 0, "model.logit_scale", "greater than 0")
    if model.value_prior_std is not None:
        require(model.num_atoms is not None, "model.value_prior_std", "null with model.num_atoms=null")
        require(model.value_prior_std > 0, "model.value_prior_std", "greater than 0, or null")
    require(model.v_min < model.v_max, "model.v_min", f"less than model.v_max={model.v_max}")
    require(optim.name in ("adam", "adamw"), "optim.name", "adam or adamw")
    require(optim.weight_decay >= 0, "optim.weight_decay", "at least 0")
    require(optim.learning_rate > 0, "optim.learning_rate", "greater than 0")
    require(optim.max_grad_norm is None or optim.max_grad_norm > 0, "optim.max_grad_norm", "greater than 0, or null")
    require(0 <= optim.final_learning_rate_fraction <= 1, "optim.final_learning_rate_fraction", "in [0, 1]")
    require(
        0 <= optim.warmup_gradient_steps < trainer.num_gradient_steps,
        "optim.warmup_gradient_steps",
        f"less than trainer.num_gradient_steps={trainer.num_gradient_steps}",
    )
    for name in ("target_update_interval", "checkpoint_interval", "log_interval"):
        key = f"{name}_gradient_steps"
        require(getattr(trainer, key) >= 1, f"trainer.{key}", "at least 1")
    require(trainer.num_checkpoints_kept >= 1, "trainer.num_checkpoints_kept", "at least 1")
    milestone = trainer.milestone_interval_gradient_steps
    require(
        milestone is None or (milestone >= 1 and milestone % trainer.checkpoint_interval_gradient_steps == 0),
        "trainer.milestone_interval_gradient_steps",
        "null or a multiple of trainer.checkpoint_interval_gradient_steps="
        f"{trainer.checkpoint_interval_gradient_steps}",
    )
    microbatch = trainer.microbatch_size
    require(
        microbatch is None or (microbatch >= 1 and config.data.batch_size % microbatch == 0),
        "trainer.microbatch_size",
        f"null or a divisor of data.batch_size={config.data.batch_size}",
    )
    require(trainer.stall_warning_seconds > 0, "trainer.stall_warning_seconds", "greater than 0")
    require(trainer.device.split(":")[0] in ("auto", "cpu", "cuda"), "trainer.device", "auto, cpu or cuda")
    require(trainer.precision in ("fp32", "bf16"), "trainer.precision", "fp32 or bf16")
    require(
        "csv" in trainer.loggers and set(trainer.loggers) <= {"csv", "tensorboard", "wandb"},
        "trainer.loggers",
        "a list of csv (always), tensorboard, wandb",
    )
    for section in ("evaluation", "collection"):
        if getattr(config, section) is not None:
            key = f"{section}.sticky_action_probability"
            require(0 <= getattr(config, section).sticky_action_probability <= 1, key, "in [0, 1]")
    require(0 <= config.evaluation.epsilon <= 1, "evaluation.epsilon", "in [0, 1]")
