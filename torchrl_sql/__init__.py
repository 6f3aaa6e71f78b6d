"""Scaled Q-learning (Kumar et al., ICLR 2023) in TorchRL.

Public names live in :mod:`torchrl_sql.data`, :mod:`torchrl_sql.modules`, :mod:`torchrl_sql.objectives`,
:mod:`torchrl_sql.envs`, :mod:`torchrl_sql.games` and :mod:`torchrl_sql.training`; nothing is imported here, so that the
command line answers at once.
"""

__version__ = "0.1.0"
