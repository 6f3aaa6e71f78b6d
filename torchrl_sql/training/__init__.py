"""Training: the update step, the loop, and runs in their folders.

Names are imported when they are used: who loads a policy does not wait for what only training needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_sql.training.online import OnlineReplay, Pace
    from torchrl_sql.training.policy import export_policy, load_agent, load_policy
    from torchrl_sql.training.run import train
    from torchrl_sql.training.signals import Interrupted, StopSignals
    from torchrl_sql.training.trainer import Trainer

__all__ = [
    "Interrupted",
    "OnlineReplay",
    "Pace",
    "StopSignals",
    "Trainer",
    "export_policy",
    "load_agent",
    "load_policy",
    "train",
]

_MODULES = {
    "Interrupted": "signals",
    "OnlineReplay": "online",
    "Pace": "online",
    "StopSignals": "signals",
    "Trainer": "trainer",
    "export_policy": "policy",
    "load_agent": "policy",
    "load_policy": "policy",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
