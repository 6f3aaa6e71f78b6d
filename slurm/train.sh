#!/bin/bash
# A training run (or one of several: sbatch --array=0-2%2 slurm/train.sh scale=... seed=0,1,2).
#   sbatch slurm/train.sh scale=paper data.store=/data/store
# Give your cluster's partition, account and sizes here, or to sbatch. One task per GPU.
#SBATCH --job-name=torchrl-sql
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=1440
# A job that has not stopped 60 s after this signal is taken to hang: keep it above.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# Modules and the virtual environment (or container: TORCHRL_SQL_PYTHON) of the nodes.
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# The text, not the path: a container's Python is not where the host's bash could read it.
source <(${TORCHRL_SQL_PYTHON:-python} -c 'import torchrl_sql as t; print(open(t.__path__[0] + "/launch/job.sh").read())')
torchrl_sql_main train "$@"
