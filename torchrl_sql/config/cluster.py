"""What a job asks of a cluster: the schema of ``configs/cluster/*.yaml``, its checks, its composition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from torchrl_sql.config import ConfigError, configs_dir, list_choices
from torchrl_sql.config.load import did_you_mean, unfit
from torchrl_sql.config.schema import at_least, check_bounds, setting


@dataclass(kw_only=True)
class ClusterConfig:
    """One profile of a cluster."""

    partition: str | None = MISSING
    account: str | None = MISSING
    qos: str | None = MISSING
    constraint: str | None = MISSING
    """Features that nodes must have, e.g. ``h100``."""
    exclude: str | None = MISSING
    """Nodes not to use, e.g. ``node[3,7]``."""
    comment: str | None = MISSING
    nodes: int = setting(at_least(1))
    """Nodes of training (and of ``bench``); every other kind of job takes one process on one node, and so does a run
    that learns online."""
    gpus_per_node: int = setting(at_least(0))
    tasks_per_node: int = setting(at_least(1))
    """Processes on each node; one per GPU where there are GPUs."""
    cpus_per_task: int = setting(at_least(1))
    memory: str | None = MISSING
    """Of each node, as SLURM writes it, e.g. ``64G``; 0 is all of it (for training and ``bench``), null the
    partition's default."""
    timeout_minutes: int = setting(at_least(1))
    """The job's time limit. A job that needs longer saves, is requeued and continues, as often as it takes."""
    signal_delay_seconds: int = MISSING
    """How long before the time limit (or preemption) the job is told. A job that has not stopped after half of it is
    taken to hang: it is requeued from its newest checkpoint."""
    max_crashes: int = setting(at_least(1))
    """Crashes without a new checkpoint between them, or times that training was told to stop before it made a new one,
    after which a job is not requeued any more."""
    array_parallelism: int = setting(at_least(1))
    """Elements of an array that run at the same time."""
    python: str | None = MISSING
    """Command that starts Python on the nodes, e.g. ``apptainer exec --nv image.sif python``; null for the interpreter
    that submits."""
    setup: list[str] = MISSING
    """Shell lines that the batch script runs first: modules, a virtual environment."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other options of sbatch, e.g. ``{gres: "gpu:h100:8", reservation: mine, exclusive: true}``; they replace
    those that follow from the fields above, and null leaves one out, e.g. ``{gpus-per-node: null}``. Nodes, processes
    and GPUs are for training and ``bench`` only; a dependency is one more; ``array``, ``output`` are the launch's."""

    @property
    def num_tasks(self) -> int:
        """Processes of a training job."""
        return self.nodes * self.tasks_per_node


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates ``cluster=...`` and ``cluster.key=...`` from the settings of a run."""
    cluster = [override for override in overrides if re.match(r"cluster[.=]", override)]
    return cluster, [override for override in overrides if override not in cluster]


def compose_cluster_config(overrides: Sequence[str]) -> ClusterConfig:
    """Composes and checks a profile.

    Args:
        overrides (sequence of str): ``cluster=NAME`` of ``configs/cluster/`` or ``cluster=FILE.yaml``, whose values
            replace those of ``configs/cluster/base.yaml``; then ``cluster.key=value``.

    Raises:
        ConfigError: naming the key or file, what it must be and what it is.
    """
    chosen = [override.removeprefix("cluster=") for override in overrides if override.startswith("cluster=")]
    known = list_choices("cluster")
    if len(chosen) != 1:
        raise ConfigError(f"cluster must be given once: cluster=FILE.yaml or one of {', '.join(known)}")
    name = chosen[0]
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and name not in known:
        raise ConfigError(f"cluster must be FILE.yaml or one of {', '.join(known)}, got {name!r}")
    try:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            content: Any = compose(f"cluster/{'base' if is_file else name}")["cluster"]
        OmegaConf.set_struct(content, False)
        own = yaml.load(Path(name).read_text(encoding="utf-8"), yaml.BaseLoader) if is_file else {}
        content = OmegaConf.merge(content, _as_written(own or {}))
        content = OmegaConf.merge(content, _changes(o for o in overrides if o.startswith("cluster.")))
    except (OSError, yaml.YAMLError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cluster={name} must be readable YAML: {str(error).splitlines()[0]}") from None
    return cluster_config_from_dict(content)


def override_cluster_config(config: ClusterConfig, overrides: Sequence[str]) -> ClusterConfig:
    """A copy of a profile with changes: ``cluster.timeout_minutes=60``.

    Raises:
        ConfigError: for anything else, unknown keys and values that do not fit.
    """
    if bad := [override for override in overrides if not re.match(r"cluster\.[^=]+=", override)]:
        raise ConfigError(f"settings here must be cluster.KEY=VALUE, got {bad[0]!r}")
    return cluster_config_from_dict(OmegaConf.merge(OmegaConf.create(asdict(config)), _changes(overrides)))


def _changes(overrides: Iterable[str]) -> DictConfig:
    changes = OmegaConf.create()
    for override in overrides:
        key, _, text = override.removeprefix("cluster.").partition("=")
        value = yaml.load(text, yaml.BaseLoader) if text[:1] in ("[", "{", "'", '"') else text
        if key == "setup" and not isinstance(value, list):
            raise ConfigError(f"cluster.setup must be a list, written cluster.setup=[A,B], got {text!r}")
        OmegaConf.update(changes, key, value if key.startswith("environment") else _as_written(value))
    return changes


def _as_written(value: Any) -> Any:
    """A value that was read as text: only null and flags mean more. YAML itself would take 00123 for 83 and 24:00:00
    for 86400; the schema's types make numbers of those that are.
    """
    if isinstance(value, dict):
        return {key: _as_written(each) if key != "environment" else each for key, each in value.items()}
    if isinstance(value, list):
        return [_as_written(each) for each in value]
    return {"null": None, "~": None, "true": True, "false": False}.get(value, value)


def cluster_config_from_dict(content: Any) -> ClusterConfig:
    """The checked profile of these values.

    Raises:
        ConfigError: for missing keys and values that do not fit.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), content)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"cluster.{key} must be given")
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        names = [f"cluster.{each.name}" for each in fields(ClusterConfig)]
        key = f"cluster.{error.full_key}"
        raise ConfigError(f"there is no setting {key!r}{did_you_mean(key, names)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(unfit(f"cluster.{error.full_key or ''}", error)) from None
    assert isinstance(config, ClusterConfig)
    check(config)
    return config


def check(config: ClusterConfig) -> None:
    """Checks the values and the constraints between them.

    Raises:
        ConfigError: naming the key, what it must be and what it is.
    """

    def require(holds: bool, key: str, must: str) -> None:
        if not holds:
            raise ConfigError(f"cluster.{key} must be {must}, got {getattr(config, key)!r}")

    check_bounds(config, "cluster.")
    require(
        config.gpus_per_node in (0, config.tasks_per_node),
        "tasks_per_node",
        f"cluster.gpus_per_node={config.gpus_per_node}, one process per GPU",
    )
    require(
        config.memory is None or re.fullmatch(r"\d+[KMGT]?", config.memory) is not None,
        "memory",
        "null, or a number with K, M, G or T, e.g. 64G",
    )
    limit = 60 * config.timeout_minutes
    require(
        10 <= config.signal_delay_seconds < limit,
        "signal_delay_seconds",
        f"at least 10 and less than cluster.timeout_minutes={config.timeout_minutes} ({limit} s)",
    )
    texts = {f"sbatch.{name}": value for name, value in config.sbatch.items()} | asdict(config)
    for key, value in texts.items():
        if isinstance(value, str) and "\n" in value:
            raise ConfigError(f"cluster.{key} must be one line, got {value!r}")
    for name, value in config.sbatch.items():
        if re.fullmatch(r"[a-z][a-z_-]*", name) is None or not isinstance(value, str | int | float | bool | None):
            raise ConfigError(f"cluster.sbatch must hold long options with one value each, got {name!r}: {value!r}")
        if name in ("array", "output"):
            raise ConfigError(f"cluster.sbatch must leave {name} to the launch, got {name}={value}")
    for name in config.environment:
        if re.fullmatch(r"[A-Za-z_]\w*", name) is None:
            raise ConfigError(f"cluster.environment must hold names of variables, got {name!r}")
