"""What commands with settings share."""

from __future__ import annotations

OVERRIDES_HELP = (
    "settings as group=choice or key=value, e.g. experiment=quickstart model=resnet50 objective.cql_alpha=0.5; "
    "the keys are explained in torchrl_sql/config.py and the files of configs/"
)
