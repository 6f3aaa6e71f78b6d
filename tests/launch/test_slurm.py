"""Batch scripts, and the states that scontrol prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchrl_sql.config.cluster import compose_cluster_config
from torchrl_sql.launch.group import Task, new_stage
from torchrl_sql.launch.plan import plan_training
from torchrl_sql.launch.slurm import JobState, job_states, parse_job_states, resources, script_text, submit


@pytest.fixture
def make_stage(tmp_path):
    def make(*overrides, kind="train", num_tasks=1):
        cluster = compose_cluster_config(["cluster=gpus8", *overrides])
        tasks = [Task(label=f"seed={i}", arguments=[kind]) for i in range(num_tasks)]
        return new_stage(
            tmp_path / "a run", kind, tasks, command="torchrl-sql launch", stop_seconds=60, cluster=cluster
        )

    return make


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_script_of_one_job(make_stage, tmp_path):
    text = script_text(make_stage("cluster.partition=gpu", "cluster.nodes=4", "cluster.environment.A='b c'"), [0])
    folder = f"{tmp_path}/a run/launch/train"
    assert lines(text, "#SBATCH") == [
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --job-name='a run'",
        "#SBATCH --mem=0",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output='{folder}/%j_0_log.out'",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=1440",
        "#SBATCH --wckey=submitit",
    ]
    assert "export A='b c'" in text.splitlines()
    assert f"torchrl_sql_begin '{folder}' 0 0" in text.splitlines()
    (command,) = lines(text, "srun")
    assert "--kill-on-bad-exit=1 --cpus-per-task=8 env --block-signal=USR2 " + sys.executable in command
    assert text.splitlines()[-1] == "torchrl_sql_end $?"
    subprocess.run(["bash", "-n", "-c", text], check=True)


def test_script_of_an_array_in_a_container_after_another_job(make_stage):
    stage = make_stage("cluster.array_parallelism=2", "cluster.python=apptainer exec sql.sif python", num_tasks=3)
    text = script_text(stage, [0, 1, 2], after="12")
    assert "#SBATCH --array=0-2%2" in text
    assert "#SBATCH --dependency=afterok:12" in text and "#SBATCH --kill-on-invalid-dep=yes" in text
    assert lines(text, "torchrl_sql_begin")[0].endswith(" 0 0 1 2")
    assert "env --block-signal=USR2 apptainer exec sql.sif python -u -m submitit" in text
    assert "%A_%a_%t_log.out" in text


@pytest.mark.parametrize(("kind", "num_gpus"), [("evaluate", 1), ("import", 0), ("collect", 0), ("report", 0)])
def test_only_training_takes_all_nodes(kind, num_gpus):
    config = resources(compose_cluster_config(["cluster=gpus32"]), kind)
    assert (config.nodes, config.tasks_per_node, config.gpus_per_node) == (1, 1, num_gpus)
    assert config.memory is None  # gpus32 asks for all of a node's
    assert resources(compose_cluster_config(["cluster=gpus32", "cluster.memory=8G"]), kind).memory == "8G"


def test_submitting_without_slurm(make_stage, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="sbatch is not on PATH"):
        submit(make_stage(), [0])
    with pytest.raises(OSError, match="scontrol is not on PATH"):
        job_states("1")


def test_states_of_a_job_and_of_an_array():
    text = (
        "JobId=9 ArrayJobId=7 ArrayTaskId=1 JobName=x JobState=RUNNING Reason=None Restarts=2 NodeList=n[1-2] "
        "Command=/a b/c.sh\n"
        "JobId=7 ArrayJobId=7 ArrayTaskId=2-3,5%2 JobName=x JobState=PENDING Reason=JobArrayTaskLimit Restarts=0 "
        "NodeList=\n"
    )
    waiting = JobState("PENDING", 0, "JobArrayTaskLimit", "")
    assert parse_job_states(text) == {1: JobState("RUNNING", 2, "None", "n[1-2]"), 2: waiting, 3: waiting, 5: waiting}
    (state,) = parse_job_states("JobId=7 JobState=CANCELLED Reason=None Restarts=0 NodeList=n1\n").values()
    assert state.state == "CANCELLED" and not state.is_alive and waiting.is_alive
    assert parse_job_states("") == {}


@pytest.mark.parametrize(("message", "code"), [("slurm_load_jobs error: Invalid job id specified", 1)])
def test_a_job_that_slurm_has_forgotten(message, code, tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert job_states("1") == {}
    program.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(OSError, match="Unable to contact"):
        job_states("1")


def test_training_is_planned_with_resolved_settings(tmp_path):
    (planned,) = plan_training(["scale=cpu", "data.store=store", "seed=3"], tmp_path / "run")
    assert planned.task.run_dir == str(tmp_path / "run") and planned.name == "cql"
    assert f"run_dir: {tmp_path / 'run'}" in planned.config and "seed: 3" in planned.config
