"""Studies: a DAG of ``torchrl-sql`` commands, planned from ``configs/study/NAME.yaml``.

Who starts the commands does not matter to them: :mod:`torchrl_sql.studies.local` does here, ``torchrl-sql launch`` on a
SLURM cluster.
"""
