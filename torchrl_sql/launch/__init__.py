"""Jobs on SLURM clusters: groups of tasks, submission, and what keeps a job right through every fault.

``torchrl-sql launch`` and ``slurm/*.sh`` are the ways in; :mod:`torchrl_sql.launch.job` is what runs on the nodes,
``job.sh`` the batch script around it.
"""
