"""Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL.

Public names live in :mod:`torchrl_sql.data`, :mod:`torchrl_sql.modules`, :mod:`torchrl_sql.objectives`,
:mod:`torchrl_sql.envs`, :mod:`torchrl_sql.games` and :mod:`torchrl_sql.training`; here is only :func:`load_policy`,
for those who want a trained network to act. Nothing is imported before it is used, so that the command line answers at
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_sql.training.policy import load_policy

__all__ = ["load_policy"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "load_policy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchrl_sql.training.policy import load_policy

    return load_policy
