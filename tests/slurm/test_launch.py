"""A study of dependent jobs, and a user's own batch script, on a real SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from torchrl_sql.cli import main
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.launch.group import find_groups, find_launch
from torchrl_sql.launch.status import task_states

pytestmark = pytest.mark.slurm


STUDY = """
title: T
common:
  - scale=cpu
  - data.games=[Breakout,Freeway]
  - collection.num_agent_steps_per_game=300
  - collection.max_env_frames_per_episode=400
  - data.batch_size=8
  - optim.warmup_gradient_steps=2
  - trainer.num_gradient_steps=120
  - trainer.checkpoint_interval_gradient_steps=40
  - trainer.log_interval_gradient_steps=10
  - trainer.loggers=[csv]
  - evaluation.num_episodes_per_game=1
  - evaluation.max_env_frames_per_episode=200
seeds: [0, 1]
data: collect
runs: {q: {}}
"""


@pytest.fixture
def study(slurm, profile):
    """Launches the study above."""

    def launch(name, *words):
        file = slurm.folder / f"{name}.yaml"
        file.write_text(STUDY)
        root = slurm.folder / name
        assert main(["launch", "study", str(file), f"cluster={profile}", "--into", str(root), *words]) == 0
        return root, {group.name: group for group in find_groups(root)}

    return launch


def states(root):
    return {state.task: state.state for group in find_groups(root) for state in task_states(group)}


def alive(root):
    return [state for group in find_groups(root) for state in task_states(group) if state.is_alive]


def test_a_study_holds_through_a_crash_and_a_failed_seed_costs_only_what_depends_on_it(slurm, study, make_run, capfd):
    """What waits for a job waits for all of its attempts; seed 1 never becomes finite."""
    root, groups = study("a-study", "cluster.array_parallelism=2")
    (groups["train-q"].folder / "task_1" / "FATAL").write_text("FloatingPointError: the loss is not finite\n")
    run = make_run(groups["train-q"])
    run.wait_for_step(40, seconds=180)
    run.signal(signal.SIGKILL, rank=1)
    assert run.wait_for_end() == "COMPLETED", run.log()
    assert run.restarts == 1
    report = make_run(groups["report"])
    assert report.wait_for_end(180) == "COMPLETED", report.log()
    assert states(root) == {
        "collect": "COMPLETED",
        "train-q-seed0": "COMPLETED",
        "train-q-seed1": "FAILED",
        "evaluate-q-seed0-greedy": "COMPLETED",
        "evaluate-q-seed1-greedy": "CANCELLED",
        "report": "COMPLETED",
    }
    assert {row.seed for row in read_episodes(root / "q" / "seed0" / "scores.csv")} == {0}
    assert "Freeway" in (root / "report.html").read_text()
    assert main(["resume", str(root)]) == 0  # what failed, what waited for it, and the page about all
    slurm.wait_for(lambda: not alive(root), 240, lambda: f"the end of {states(root)}")
    assert set(states(root).values()) == {"COMPLETED"}
    capfd.readouterr()
    assert main(["resume", str(root)]) == 0
    assert "is finished" in capfd.readouterr().out


def test_what_waits_for_a_failed_job_does_not_wait_for_ever(slurm, study):
    root, _ = study("broken-study", "cluster.python=/bin/false", "cluster.max_crashes=1")
    slurm.wait_for(lambda: not alive(root), 30, "the end of the study")
    assert list(states(root).values()) == ["FAILED", *["CANCELLED"] * 4, "FAILED"]


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

    (group,) = find_groups(slurm.wait_for(launched, 30, f"the launch of job {job}"))
    run = make_run(group)
    run.wait_for_step(80)
    run.signal(signal.SIGKILL, rank=0)
    capfd.readouterr()
    assert main(["logs", job, "--follow"]) == 0
    assert run.state == "COMPLETED", run.log()
    assert "trained at gradient step 240 of 240" in capfd.readouterr().out
    assert run.restarts == 1 and len(list((slurm.folder / "runs").glob("cql-*"))) == 1
    same(run.result(), uninterrupted)


def test_the_page_s_lines_of_setup_run_once_on_each_node(slurm):
    page = (slurm.root / "docs" / "scaling.md").read_text(encoding="utf-8")
    (line,) = set(re.findall(r"setup: \['(srun .*?) (?:rsync|tar) ", page))
    script, output = slurm.folder / "setup.sh", slurm.folder / "setup.out"
    script.write_text(f"#!/bin/bash\n{line} bash -c 'echo node $SLURM_NODEID'\necho end\n")
    command = ["sbatch", "--nodes=2", "--ntasks-per-node=2", f"--output={output}", str(script)]
    subprocess.run(command, env=slurm.environment, check=True, stdout=subprocess.DEVNULL)
    slurm.wait_for(lambda: output.is_file() and "end" in output.read_text(), 60, "the script ends")
    assert sorted(output.read_text().split("\n")[:-1]) == ["end", "node 0", "node 1"]
