"""How long a run takes on a cluster: arithmetic (:mod:`plan`) and the measurements it needs (:mod:`measure`)."""

from torchrl_sql.bench.plan import Measurements, Plan, format_measurements, format_plans, plan

__all__ = ["Measurements", "Plan", "format_measurements", "format_plans", "plan"]
