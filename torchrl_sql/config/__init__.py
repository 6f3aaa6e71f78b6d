"""The schemas of settings: type, meaning and bounds. The values live in ``configs/``. Nothing here imports torch."""

from torchrl_sql.config.schema import (
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    check,
    check_ranks,
    compose_run_config,
    configs_dir,
    load_run_config,
    run_config_from_yaml,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "check",
    "check_ranks",
    "compose_run_config",
    "configs_dir",
    "load_run_config",
    "run_config_from_yaml",
]
