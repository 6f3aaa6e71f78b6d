"""A chain of dependent jobs, and a user's own batch script, on a real SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from torchrl_sql.cli import main
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.launch.group import find_launch, find_stages
from torchrl_sql.launch.status import task_states

pytestmark = pytest.mark.slurm


def test_chain_holds_through_a_crash(slurm, profile, settings, make_run, capfd):
    """Collect, train, evaluate, report: what waits for a job waits for all of its lives."""
    root = slurm.folder / "chain"
    own = [
        f"data.store={root}/store",
        "trainer.num_gradient_steps=120",
        "trainer.checkpoint_interval_gradient_steps=40",
    ]
    own += ["collection.num_agent_steps_per_game=300", "collection.max_env_frames_per_episode=400"]
    own += ["evaluation.num_episodes_per_game=1", "evaluation.max_env_frames_per_episode=200"]
    words = [word for word in settings if word.split("=")[0] not in {override.split("=")[0] for override in own}]
    assert main(["launch", "chain", *words, *own, f"cluster={profile}", "--into", str(root)]) == 0
    train = next(stage for stage in find_stages(root) if stage.kind == "train")
    run = make_run(train)
    run.wait_for_step(40)
    run.signal(signal.SIGKILL, rank=1)
    assert run.wait_for_end() == "COMPLETED", run.log()
    assert run.restarts == 1
    report = make_run(next(stage for stage in find_stages(root) if stage.kind == "report"))
    assert report.wait_for_end() == "COMPLETED", report.log()
    assert {row.game for row in read_episodes(root / "scores.csv")} == {"Breakout", "Freeway"}
    assert "Freeway" in (root / "report.html").read_text()
    capfd.readouterr()
    assert main(["status", str(root)]) == 0
    assert capfd.readouterr().out.count("COMPLETED") == 4


def test_what_waits_for_a_failed_job_does_not_wait_for_ever(slurm, profile, settings):
    root = slurm.folder / "broken-chain"
    broken = [*settings, f"data.store={root}/store", "data.games=[Breakout]", "cluster.python=/bin/false"]
    words = [word for word in broken if not word.startswith("data.") or word in broken[-3:]]
    options = [f"cluster={profile}", "cluster.max_crashes=1", "--into", str(root)]
    assert main(["launch", "chain", *words, *options]) == 0
    slurm.wait_for(lambda: not alive(root), 30, "the end of the chain")
    states = [state.state for stage in find_stages(root) for state in task_states(stage)]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]


def alive(root):
    return [state for stage in find_stages(root) for state in task_states(stage) if state.is_alive]


def test_batch_script_of_ones_own(slurm, settings, make_run, uninterrupted, same, capfd, monkeypatch):
    """``sbatch slurm/train.sh``, with a crash; its launch is found by the job's id."""
    monkeypatch.chdir(slurm.folder)
    script = f"{slurm.root}/slurm/train.sh"
    sizes = [
        "--partition=low",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--mem=1500M",
    ]
    own = {"PYTHONPATH": str(slurm.root), "TORCHRL_SQL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", "--time=5", "--signal=USR2@20", *sizes, script, *settings]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def launched():
        try:
            return find_launch(job)
        except ValueError:
            return None

    (stage,) = find_stages(slurm.wait_for(launched, 30, f"the launch of job {job}"))
    run = make_run(stage)
    run.wait_for_step(80)
    run.signal(signal.SIGKILL, rank=0)
    capfd.readouterr()
    assert main(["logs", job, "--follow"]) == 0
    assert run.state == "COMPLETED", run.log()
    assert "trained at gradient step 240 of 240" in capfd.readouterr().out
    assert run.restarts == 1 and len(list((slurm.folder / "runs").glob("quickstart-*"))) == 1
    same(run.result(), uninterrupted)
