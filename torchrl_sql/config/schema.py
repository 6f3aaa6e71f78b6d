"""Every setting of a run: type, meaning, bound. The values live in ``configs/``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from omegaconf import MISSING, OmegaConf

from torchrl_sql.games import FRAME_STACK, resolve_games

if TYPE_CHECKING:
    Games = tuple[str, ...]
    Mixture = Literal["games", "transitions"] | tuple[float, ...]
else:
    Games = Mixture = Any  # OmegaConf cannot say "a string or a list"


CONFIG_FORMAT = 4
"""Of configurations as YAML. It grows when one that was written before would be misread."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names key, expected and found."""


class Bound(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], object]
    text: str


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
path = Bound(lambda value: value.strip() and not _CONTROL.search(value), "a path, without control characters")
positive = Bound(lambda value: value > 0, "greater than 0")
probability = Bound(lambda value: 0 <= value <= 1, "in [0, 1]")
fraction = Bound(lambda value: 0 < value <= 1, "in (0, 1]")
folder_name = Bound(
    lambda value: path.holds(value.strip(". ")) and "/" not in value and len(value.encode()) <= 200,
    "a name for a folder: at most 200 bytes, without slash and control characters",
)

device_name = Bound(lambda value: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value), "auto, cpu, cuda or cuda:N")
logger_names = Bound(
    lambda value: "csv" in value and len({*value} & {"csv", "tensorboard", "wandb"}) == len(value),
    "a list of csv (always), tensorboard, wandb, each once",
)


def at_least(least: int) -> Bound:
    """Numbers from ``least`` on."""
    return Bound(lambda value: value >= least, f"at least {least}")


def within(least: float, most: float) -> Bound:
    """Numbers from ``least`` to ``most``."""
    return Bound(lambda value: least <= value <= most, f"in [{least:,}, {most:,}]")


def one_of(*choices: str) -> Bound:
    """These words."""
    return Bound(lambda value: value in choices, f"one of {', '.join(choices)}")


def setting(bound: Bound, *, default: Any = MISSING) -> Any:
    """A field of a section whose value must be within a bound, if it is not null."""
    return field(default=default, metadata={"bound": bound})


def check_bounds(section: Any, prefix: str = "") -> None:
    """Raises ConfigError for the first value out of its bound in a dataclass of settings and those inside it.

    Args:
        section (dataclass): with fields made by :func:`setting`.
        prefix (str): of the keys in the message, e.g. ``"cluster."``.
    """
    for each in fields(section):
        key, value = prefix + each.name, getattr(section, each.name)
        bound: Bound = each.metadata.get("bound", Bound(lambda value: True, ""))
        if is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value}")
        elif value is not None and not bound.holds(value):
            raise ConfigError(f"{key} must be {bound.text}{', or null' * ('None' in str(each.type))}, got {value!r}")


MAX_SEED = 2**63 - 1
MAX_EPISODES = 1_000_000
"""Of an evaluation, per game."""


@dataclass(kw_only=True)
class CollectionConfig:
    """How ``torchrl-sql collect`` makes a store with weak skills."""

    num_agent_steps_per_game: int = setting(at_least(1))
    sticky_action_probability: float = setting(probability)
    max_env_frames_per_episode: int = setting(at_least(1))
    """Emulator frames (four per agent step) after which a collected episode is truncated."""
    codec: str = setting(one_of("zstd", "lz4"))
    """How frames are compressed: zstd is smaller, lz4 faster to read; see docs/data.md."""
    max_repeat_probability: float = setting(probability)
    """Each episode repeats its last action with a probability drawn uniformly from 0 to this."""
    seed: int = setting(within(0, MAX_SEED))


@dataclass(kw_only=True)
class DataConfig:
    """What is sampled."""

    store: str = setting(path)
    """Path of the store; ``~`` and ``$NAME`` are expanded where the work runs, not where it is launched."""
    games: Games = MISSING
    """``train40``, ``heldout5``, ``all``, names separated by commas, or a list of names; here resolved to names.
    ``Freeway-m1-d1`` is Freeway in mode 1 at difficulty 1."""
    first_fraction: float = setting(fraction)
    """The first such part of each recording, counted in steps."""
    last_fraction: float = setting(fraction)
    """The last such part of each recording: the episodes that begin in it."""
    every_kth_episode: int = setting(at_least(1))
    """Of these the episodes 0, k, 2k, ... of each recording."""
    transitions_per_game: int | None = setting(at_least(1))
    """Of what is left the first so many of each game; null for all."""
    mixture: Mixture = MISSING
    """``games`` (each game equally often), ``transitions``, or a list of one weight per game."""
    temperature: float = setting(positive)
    """Shares of the mixture are raised to the power 1 / temperature; larger values make them more equal."""
    replacement: bool = MISSING
    """false: no transition comes twice before all of its game have come once."""
    batch_size: int = setting(within(1, 1_048_576))
    """Transitions of the global batch."""
    n_steps: int = setting(within(1, 27_000))
    """Agent steps a target looks ahead."""
    prefetch: int = setting(within(0, 1024))
    """Batches read ahead in threads."""

    def __post_init__(self) -> None:
        try:
            self.games = resolve_games(self.games)
        except ValueError as error:
            raise ConfigError(f"data.games: {error}") from None
        if isinstance(self.mixture, (list, tuple)):
            self.mixture = tuple(self.mixture)


@dataclass(kw_only=True)
class ModelConfig:
    """The network below its heads; each kind has settings of its own."""

    choices: ClassVar[str]
    """Files of ``configs/model/`` of this kind."""


@dataclass(kw_only=True)
class QNetworkConfig(ModelConfig):
    """An encoder of stacked frames: arguments of :func:`torchrl_sql.modules.make_q_actor`."""

    choices = "q_network, small"

    encoder: str = MISSING
    """A name in :data:`torchrl_sql.modules.ENCODERS`; building the network, before data is opened, refuses others."""
    pooling: str = MISSING
    """A name in :data:`torchrl_sql.modules.POOLINGS`."""
    num_embeddings: int | None = setting(within(1, 65_536))
    """Learned spatial embeddings; null for the encoder's default."""
    num_groups: int = setting(at_least(1))
    """Groups of the ResNets' GroupNorm."""
    last_norm_scale: float = setting(at_least(0))
    """Initial scale of the last GroupNorm of each of the ResNets' residual branches."""
    feature_dim: int | None = setting(within(0, 65_536))
    """Width of the hidden layer after pooling, 0 for no such layer; null for the encoder's default."""
    feature_norm: bool = MISSING
    """Divide the feature vector by its L2 norm."""
    logit_scale: float | None = setting(positive)
    """Scale of the normalized features; null for the plain phi / ||phi||."""
    learn_logit_scale: bool = MISSING
    """Train the scale, from there."""
    per_game_heads: bool = MISSING
    """false: one head serves all games."""
    center_input: bool = MISSING
    """Subtract each game's mean frame (departs from the paper; helps small runs)."""


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    """A transformer over windows of steps: arguments of :func:`torchrl_sql.modules.make_decision_transformer`."""

    choices = "mgdt_10m, mgdt_200m, mgdt_40m, mgdt_small"

    width: int = setting(within(64, 65_536))
    """Of tokens, a multiple of 64."""
    num_layers: int = setting(within(1, 1_024))
    patch_size: int = setting(at_least(1))
    """Side of a patch in pixels, a divisor of 84."""
    dropout: float = setting(Bound(lambda value: 0 <= value < 1, "in [0, 1)"))
    """On both branches of a block."""


MODEL_SETTINGS: dict[str, type[ModelConfig]] = {"q_network": QNetworkConfig, "transformer": TransformerConfig}
"""Kinds of networks; ``configs/model/`` refers to them as ``NAME_schema``."""


@dataclass(kw_only=True)
class MethodConfig:
    """What is learned, and by which loss. This is all of a method without settings of its own."""

    model: ClassVar[type[ModelConfig]] = QNetworkConfig
    """The kind of network it trains."""

    decodings: ClassVar[tuple[str, ...]] = ("greedy", "sampled")
    """Ways to act, none for a method that does not; the first is the usual one, by which checkpoints are compared."""

    name: str = MISSING
    """Of ``torchrl_sql.methods.METHODS``."""


@dataclass(kw_only=True)
class QLearningConfig(MethodConfig):
    """Conservative Q-learning: heads and loss."""

    target: str = setting(one_of("c51", "hl_gauss", "mse"))
    num_atoms: int | None = setting(within(2, 65_536))
    """Atoms of the return distribution; null for scalar heads, which ``target: mse`` needs."""
    v_min: float = MISSING
    """Least return of the support, in clipped-reward units."""
    v_max: float = MISSING
    value_prior_std: float | None = setting(positive)
    """Standard deviation of the Gaussian that the initial return distribution resembles; null for uniform."""
    cql_alpha: float = setting(at_least(0))
    """Weight of the CQL penalty, dimensionless."""
    double_q: bool = MISSING
    gamma: float = setting(fraction)
    """Discount per agent step (four emulator frames)."""
    mask_illegal_actions: bool = False
    """Leave actions that a game does not know out of targets and penalty. Without a penalty nothing would ever correct
    their values."""


@dataclass(kw_only=True)
class SequenceConfig(MethodConfig):
    """A model of windows of steps."""

    model = TransformerConfig

    num_steps: int = setting(at_least(1))
    """Steps of a window."""
    class_averaged: bool = MISSING
    """Divide each cross-entropy by its number of classes too."""


@dataclass(kw_only=True)
class DecisionTransformerConfig(SequenceConfig):
    """Return-conditioned: it also models the return, and asks for a high one when it acts."""

    decodings = ("expert", "expert_128", "sampled", "greedy")

    kappa: float = setting(at_least(0))
    """How strongly the decoding ``expert`` prefers high returns."""


@dataclass(kw_only=True)
class AutoencodingConfig(MethodConfig):
    """Masked auto-encoding: what is hidden, and the decoder."""

    decodings = ()

    mask_share: float = setting(probability)
    """Share of the feature map's places that the decoder does not see."""
    decoder_width: int = setting(within(64, 65_536))
    """Of the decoder's tokens, a multiple of 64."""
    decoder_layers: int = setting(within(1, 1_024))


@dataclass(kw_only=True)
class ContrastiveConfig(MethodConfig):
    """Contrastive prediction of the state ``data.n_steps`` later."""

    decodings = ()

    width: int = setting(within(1, 65_536))
    """Of the two layers on top of the encoder."""
    same_game: bool = MISSING
    """Only states of the same game are candidates."""


METHOD_SETTINGS: dict[str, type[MethodConfig]] = {
    "cql": QLearningConfig,
    "mgdt": DecisionTransformerConfig,
    "bc_transformer": SequenceConfig,
    "mae": AutoencodingConfig,
    "cpc": ContrastiveConfig,
}
"""Settings of methods that have any, by name; ``configs/method/`` refers to them as ``NAME_schema``."""


@dataclass(kw_only=True)
class InitConfig:
    """Where the weights start; the section is absent in files of before there was it."""

    policy: str | None = field(default=None, metadata={"bound": path})
    """The ``policy.safetensors`` of another run, expanded like ``data.store``; null for random weights. A run that is
    continued does not read it again."""
    load: str = field(default="encoder", metadata={"bound": one_of("encoder", "all")})
    """encoder: what maps frames to the feature map. all: everything that is learned, of per-game heads those of games
    that both runs have, and of games whose variations this run has, and their mean frames. What is not loaded is new.
    """
    freeze: bool = False
    """Do not train the encoder, loaded or not."""
    sha256: str | None = None
    """Of the policy; the run writes it here when it starts. Given before, it refuses another policy."""
    source: str | None = None
    """Name of the run that the policy is of; the run writes it here when it starts."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = setting(one_of("adam", "adamw", "lamb"))
    """adamw has decoupled weight decay; lamb moves each tensor by the learning rate times its own norm."""
    learning_rate: float = setting(fraction)
    eps: float = setting(positive)
    weight_decay: float = setting(at_least(0))
    """Of adam: added to the gradient; of adamw: subtracted from the weights, times the learning rate."""
    warmup_gradient_steps: int = setting(at_least(0))
    """Linear warm-up from 0."""
    final_learning_rate_fraction: float = setting(probability)
    """Cosine decay to this fraction of the learning rate at the last step; 1 for a constant rate."""
    max_grad_norm: float | None = setting(positive)
    """Gradients are scaled down to this global L2 norm; null for no clipping."""


@dataclass(kw_only=True)
class TrainerConfig:
    """The loop."""

    num_gradient_steps: int = setting(at_least(1))
    target_update_interval_gradient_steps: int = setting(at_least(1))
    """Hard copy of the online network to the target network."""
    checkpoint_interval_gradient_steps: int = setting(at_least(1))
    num_checkpoints_kept: int = setting(at_least(1))
    """The newest ones; the one with the best evaluation stays too."""
    milestone_interval_gradient_steps: int | None = setting(at_least(1))
    """Checkpoints of these steps are never deleted, for learning curves; null for none."""
    evaluation_interval_gradient_steps: int | None = field(default=None, metadata={"bound": at_least(1)})
    """Checkpoints of these steps are played while training waits, as ``torchrl-sql evaluate`` plays them; null for
    none, as in files of before there was this setting."""
    log_interval_gradient_steps: int = setting(at_least(1))
    loggers: list[str] = setting(logger_names)  # noqa: RUF009 - setting makes a field
    """csv is what reports read."""
    device: str = setting(device_name)
    """``auto`` is CUDA where there is one; ``cuda`` is each rank's own."""
    microbatch_size: int | None = setting(at_least(1))
    """Transitions of one forward and backward pass on each rank, whose gradients add up; null for all of a rank's."""
    stall_warning_seconds: float = setting(within(0.001, 1e9))
    """After this time without a gradient step, the log says what each thread does."""
    precision: str = setting(one_of("fp32", "bf16"))
    """bf16 is autocast; distribution arithmetic stays float32."""
    compile: str = setting(one_of("off", "kernels", "graph"))
    """kernels: the loss, forward and backward, is compiled. graph: also the whole step is recorded as a CUDA graph."""

    def __post_init__(self) -> None:
        if self.compile.lower() == "false":
            self.compile = "off"  # YAML has one value for both words


@dataclass(kw_only=True)
class OnlineConfig:
    """How an agent that learns online makes its data, see :mod:`torchrl_sql.training.online`."""

    num_emulators: int = setting(at_least(1))
    """Emulators that step together, divided among the games."""
    agent_steps_per_gradient_step: float = setting(positive)
    """Of all emulators together: the inverse of the replay ratio."""
    first_agent_steps: int = setting(at_least(1))
    """Steps before learning begins; more, until each game has a whole episode."""
    initial_epsilon: float = setting(probability, default=1.0)
    """Probability of a random legal action until learning begins; 1 as in files of before there was another. Less only
    with ``init.load: all``, from a policy that can play all games."""
    final_epsilon: float = setting(probability)
    """Probability of a random legal action once it has decayed; at most the initial one."""
    epsilon_decay_agent_steps: int = setting(at_least(1))
    """From the initial to the final one, linearly, once learning has begun."""
    capacity_transitions_per_game: int | None = setting(at_least(1))
    """The learner sees the newest episodes that hold at most so many; null for all. All stay in the store."""
    commit_interval_gradient_steps: int = setting(at_least(1))
    """At its multiples, episodes that have ended are committed and shown to the learner."""
    shard_frames: int = setting(at_least(20))
    """Frames per file of the store, a multiple of 20; each commit writes the last file again."""
    offline_store: str | None = setting(path)
    """Another store of the same games, whose transitions are mixed in; null for none."""
    offline_fraction: float = setting(probability)
    """Their share of each batch, rounded to transitions."""
    sticky_action_probability: float = setting(probability)
    max_env_frames_per_episode: int = setting(at_least(1))
    """Emulator frames (four per agent step) after which a played episode is truncated."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """The evaluation protocol (every report states it)."""

    num_episodes_per_game: int = setting(within(1, MAX_EPISODES))
    epsilon: float = setting(probability)
    """Probability of a uniformly random legal action."""
    sticky_action_probability: float = setting(probability)
    max_env_frames_per_episode: int = setting(at_least(1))
    seed: int = setting(within(0, MAX_SEED))


@dataclass(kw_only=True)
class RunConfig:
    """One run: everything that decides what it computes."""

    name: str = setting(folder_name)
    """Of the agent; runs that differ in their seeds only share it."""
    run_dir: str = setting(path)
    """Folder of checkpoints, logs and reports; expanded like ``data.store``."""
    seed: int = setting(within(0, MAX_SEED))
    num_threads: int | None = setting(within(1, 1024))
    """CPU threads of torch in training and evaluation; null for torch's own choice."""
    collection: CollectionConfig = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    method: MethodConfig = MISSING
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    online: OnlineConfig | None = None
    """null for learning from a store, as in files of before there was anything else."""

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_together(self)

    @property
    def games(self) -> tuple[str, ...]:
        """Names of the games; their order is the meaning of ``game_id``."""
        return self.data.games

    def deciding_settings(self) -> dict[str, Any]:
        """Settings that decide what is learned from given data, by key; all but the seed."""
        values = asdict(self)
        keys = ["num_gradient_steps", "target_update_interval_gradient_steps", "precision"]
        keys += ["microbatch_size"] * (self.method.name == "cpc")  # whose negatives are those of a microbatch
        values["trainer"] = {key: values["trainer"][key] for key in keys}
        values["data"]["games"] = list(self.games)
        del values["data"]["store"], values["data"]["prefetch"]
        sections = ("data", "model", "method", "init", "optim", "trainer", "online")
        return {f"{section}.{key}": value for section in sections for key, value in (values[section] or {}).items()}

    def to_yaml(self) -> str:
        """The resolved configuration, as :func:`torchrl_sql.config.load_run_config` reads it."""
        return f"format: {CONFIG_FORMAT}\n{OmegaConf.to_yaml(OmegaConf.create(asdict(self)))}"


def _check_together(config: RunConfig) -> None:
    """The rules between settings."""

    def require(holds: bool, key: str, must: str) -> None:
        if not holds:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key} must be {must}, got {value!r}")

    data, method, trainer = config.data, config.method, config.trainer
    require(
        data.mixture in ("games", "transitions")
        if isinstance(data.mixture, str)
        else isinstance(data.mixture, tuple)
        and len(data.mixture) == len(data.games)
        and all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in data.mixture)
        and sum(data.mixture) > 0,
        "data.mixture",
        f"games, transitions or a list of {len(data.games)} weights >= 0, one per game",
    )
    if type(method) is not METHOD_SETTINGS.get(method.name, MethodConfig):
        raise ConfigError(f"method.name comes with the choice method=NAME, got {method.name!r} for another method")
    if type(config.model) is not method.model:
        raise ConfigError(f"model must be one of {method.model.choices} with method.name={method.name}")
    if isinstance(method, QLearningConfig):
        scalar = method.target == "mse"
        require(
            (method.num_atoms is None) == scalar,
            "method.num_atoms",
            f"{'null (scalar heads)' if scalar else 'at least 2'} with method.target={method.target}",
        )
        require(method.value_prior_std is None or not scalar, "method.value_prior_std", "null with scalar heads")
        require(method.v_min < method.v_max, "method.v_min", f"less than method.v_max={method.v_max}")
    require(config.init.policy is not None or config.init.sha256 is None, "init.sha256", "null without init.policy")
    if method.name == "cpc":
        require(
            data.n_steps >= FRAME_STACK,
            "data.n_steps",
            f"at least {FRAME_STACK} with method.name=cpc (stacks that share frames tell one another)",
        )
    require(
        config.optim.warmup_gradient_steps < trainer.num_gradient_steps,
        "optim.warmup_gradient_steps",
        f"less than trainer.num_gradient_steps={trainer.num_gradient_steps}",
    )
    interval = trainer.checkpoint_interval_gradient_steps
    for key in ("milestone_interval_gradient_steps", "evaluation_interval_gradient_steps"):
        steps = getattr(trainer, key)
        require(
            steps is None or steps % interval == 0,
            f"trainer.{key}",
            f"null or a multiple of trainer.checkpoint_interval_gradient_steps={interval}",
        )
    require(
        trainer.microbatch_size is None or data.batch_size % trainer.microbatch_size == 0,
        "trainer.microbatch_size",
        f"null or a divisor of data.batch_size={data.batch_size}",
    )
    if config.online is not None:
        _check_online(config, config.online, require)


def _check_online(config: RunConfig, online: OnlineConfig, require: Callable[[bool, str, str], None]) -> None:
    """The rules of learning online."""
    everything = {"first_fraction": 1.0, "last_fraction": 1.0, "every_kth_episode": 1, "transitions_per_game": None}
    for key, value in (everything | {"replacement": True}).items():
        require(getattr(config.data, key) == value, f"data.{key}", f"{value} online, where all data is one's own")
    require(
        online.initial_epsilon == 1 or config.init.load == "all",
        "online.initial_epsilon",
        "1 without init.load=all, as an untrained network has nothing to act by",
    )
    require(
        online.final_epsilon <= online.initial_epsilon,
        "online.final_epsilon",
        f"at most online.initial_epsilon={online.initial_epsilon}",
    )
    num_games = len(config.games)
    require(
        online.num_emulators % num_games == 0, "online.num_emulators", f"a multiple of the number of games, {num_games}"
    )
    require(online.shard_frames % 20 == 0, "online.shard_frames", "a multiple of 20, the frames of a chunk")
    require(
        online.commit_interval_gradient_steps >= config.trainer.log_interval_gradient_steps,
        "online.commit_interval_gradient_steps",
        f"at least trainer.log_interval_gradient_steps={config.trainer.log_interval_gradient_steps}",
    )
    require(
        (online.offline_store is None) == (online.offline_fraction == 0),
        "online.offline_fraction",
        "0 without online.offline_store, greater with one",
    )
    num_offline = round(online.offline_fraction * config.data.batch_size)
    require(
        online.offline_store is None or 0 < num_offline < config.data.batch_size,
        "online.offline_fraction",
        f"such that a batch of data.batch_size={config.data.batch_size} has a transition of either kind",
    )


def check_ranks(config: RunConfig, num_ranks: int) -> None:
    """Checks that the batch divides among processes, and each one's share into microbatches.

    Args:
        config (RunConfig): a checked run.
        num_ranks (int): processes that train it together.

    Raises:
        ConfigError: if it does not.
    """
    if config.online is not None and num_ranks > 1:
        raise ConfigError(f"a run with online settings must be of one process, e.g. of cluster=gpus1, got {num_ranks}")
    batch_size, microbatch_size = config.data.batch_size, config.trainer.microbatch_size
    if batch_size % num_ranks:
        raise ConfigError(f"data.batch_size must be a multiple of the {num_ranks} processes, got {batch_size}")
    share = batch_size // num_ranks
    if microbatch_size is not None and share % microbatch_size:
        raise ConfigError(
            f"trainer.microbatch_size must be null or a divisor of each process's batch of {share}, "
            f"got {microbatch_size}"
        )
