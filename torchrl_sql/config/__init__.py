"""The schemas of settings: type, meaning and bounds. The values live in ``configs/``. Nothing here imports torch."""

from torchrl_sql.config.load import compose_run_config, configs_dir, list_choices, load_run_config, run_config_from_yaml
from torchrl_sql.config.schema import (
    ConfigError,
    DataConfig,
    DecisionTransformerConfig,
    EvaluationConfig,
    InitConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    QLearningConfig,
    QNetworkConfig,
    RunConfig,
    SequenceConfig,
    TransformerConfig,
    check_ranks,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "DecisionTransformerConfig",
    "EvaluationConfig",
    "InitConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "QLearningConfig",
    "QNetworkConfig",
    "RunConfig",
    "SequenceConfig",
    "TransformerConfig",
    "check_ranks",
    "compose_run_config",
    "configs_dir",
    "list_choices",
    "load_run_config",
    "run_config_from_yaml",
]
