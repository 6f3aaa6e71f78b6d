#!/bin/bash
# Plays a trained network in the emulator.
#   sbatch slurm/evaluate.sh runs/NAME --episodes 100
# Eight jobs that share the episodes: for k in {1..8}; do sbatch slurm/evaluate.sh runs/NAME --share $k/8; done
# Give your cluster's partition, account and sizes here, or to sbatch.
#SBATCH --job-name=torchrl-sql-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1440
# A job that has not stopped 60 s after this signal is taken to hang: keep it above.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# Modules and the virtual environment (or container: TORCHRL_SQL_PYTHON) of the node.
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# The text, not the path: a container's Python is not where the host's bash could read it.
source <(${TORCHRL_SQL_PYTHON:-python} -c 'import torchrl_sql as t; print(open(t.__path__[0] + "/launch/job.sh").read())')
torchrl_sql_main evaluate "$@"
