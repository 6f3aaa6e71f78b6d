"""What commands with settings share."""

from __future__ import annotations

OVERRIDES_HELP = (
    "settings as group=choice or key=value, e.g. scale=cpu method=cql_hl_gauss seed=1; "
    "the keys are explained in torchrl_sql/config/schema.py and the files of configs/"
)
