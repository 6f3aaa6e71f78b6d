"""What an agent is, one file per method. To add one: CONTRIBUTING.md, "A method"."""

from torchrl_sql.config import ConfigError, MethodConfig
from torchrl_sql.methods.cloning import Cloning
from torchrl_sql.methods.decision_transformer import DecisionTransformer, TransformerCloning
from torchrl_sql.methods.method import Method
from torchrl_sql.methods.pretraining import ContrastivePrediction, MaskedAutoencoding
from torchrl_sql.methods.q_learning import QLearning

__all__ = ["METHODS", "Method", "make_method"]

METHODS: dict[str, type[Method]] = {
    "cql": QLearning,
    "bc": Cloning,
    "mgdt": DecisionTransformer,
    "bc_transformer": TransformerCloning,
    "mae": MaskedAutoencoding,
    "cpc": ContrastivePrediction,
}
"""By ``method.name``."""


def make_method(settings: MethodConfig) -> Method:
    """The method of a run.

    Raises:
        ConfigError: if there is none of this name.
    """
    if settings.name not in METHODS:
        raise ConfigError(f"method.name must be one of {', '.join(METHODS)}, got {settings.name!r}")
    return METHODS[settings.name](settings)
