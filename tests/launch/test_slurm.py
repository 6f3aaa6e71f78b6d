"""Batch scripts, and the states that scontrol prints."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from submitit.slurm.slurm import SlurmJobEnvironment

from torchrl_sql.config import ConfigError
from torchrl_sql.config.cluster import compose_cluster_config
from torchrl_sql.launch.group import make_groups
from torchrl_sql.launch.slurm import (
    JobState,
    Place,
    job_states,
    parse_job_states,
    resources,
    script_text,
    split,
    submit,
)
from torchrl_sql.studies.task import Task


@pytest.fixture
def make_group(tmp_path):
    def make(*overrides, kind="train", num_tasks=1, after=None, tolerant=False):
        cluster = compose_cluster_config(["cluster=gpus8", *overrides])
        tasks = [
            Task(
                name=f"{kind}-{i}",
                arguments=[kind],
                group=kind,
                after=[] if after is None else after(i),
                tolerant=tolerant,
            )
            for i in range(num_tasks)
        ]
        (group,) = make_groups(tmp_path / "a run", tasks, command="torchrl-sql launch", cluster=cluster)
        return group

    return make


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_script_of_one_job(make_group, tmp_path):
    text = script_text(make_group("cluster.partition=gpu", "cluster.nodes=4", "cluster.environment.A='b c'"), [0])
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
    ]
    assert "export A='b c'" in text.splitlines()
    assert f"torchrl_sql_begin '{folder}' 0 0" in text.splitlines()
    (command,) = lines(text, "srun")
    assert (
        "--kill-on-bad-exit=1 --export=ALL --cpus-per-task=8 "
        f"$torchrl_sql_block {sys.executable} -u -m torchrl_sql.cli.job" in command
    )
    assert command.endswith(f"""'{folder}' "$torchrl_sql_index\"""")
    assert text.splitlines()[-1] == "torchrl_sql_end $?"
    subprocess.run(["bash", "-n", "-c", text], check=True)


def test_script_of_an_array_in_a_container_after_another_job(make_group):
    group = make_group("cluster.array_parallelism=2", "cluster.python=apptainer exec sql.sif python", num_tasks=3)
    text = script_text(group, [0, 1, 2], dependency="afterok:12")
    assert "#SBATCH --array=0-2%2" in text
    assert "#SBATCH --dependency=afterok:12" in text and "#SBATCH --kill-on-invalid-dep=yes" in text
    assert lines(text, "torchrl_sql_begin")[0].endswith(" 0 0 1 2")
    assert "$torchrl_sql_block apptainer exec sql.sif python -u -m torchrl_sql.cli.job" in text
    assert "%A_%a_%t_log.out" in text


@pytest.mark.parametrize(
    ("kind", "num_gpus"), [("evaluate", 1), ("import", 0), ("collect", 0), ("report", 0), ("train", 1)]
)
def test_only_training_by_several_processes_takes_all_nodes(kind, num_gpus):
    task = Task(name="x", arguments=[kind], group="x", one_process=kind == "train")
    config = resources(compose_cluster_config(["cluster=gpus32"]), task)
    assert (config.nodes, config.tasks_per_node, config.gpus_per_node) == (1, 1, num_gpus)
    assert config.memory is None  # gpus32 asks for all of a node's
    assert resources(compose_cluster_config(["cluster=gpus32", "cluster.memory=8G"]), task).memory == "8G"


def test_submitting_without_slurm(make_group, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="sbatch is not on PATH"):
        submit(make_group(), [0])
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


@pytest.mark.parametrize(
    "state", ["STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT", "RESV_DEL_HOLD", "NEW"]
)
def test_a_job_in_an_odd_state_is_not_over(state):
    assert JobState(state, 0, "", "").is_alive
    for over in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"):
        assert not JobState(over, 0, "", "").is_alive


def test_any_option_of_sbatch_passes_through(make_group):
    options = ["gres='gpu:h100:8'", "gpus_per_node=null", "exclusive=true", "requeue=false", "time='2-00'", "nice=0"]
    group = make_group(*(f"cluster.sbatch.{option}" for option in options))
    found = lines(script_text(group, [0]), "#SBATCH")
    assert {"#SBATCH --gres=gpu:h100:8", "#SBATCH --exclusive", "#SBATCH --time=2-00", "#SBATCH --nice=0"} <= {*found}
    assert not [line for line in found if "gpus-per-node" in line or "requeue" in line or line.endswith("=1440")]


@pytest.mark.parametrize(
    ("kind", "gpu"),
    [("train", "gres=gpu:h100:8"), ("bench", "gres=gpu:h100:8"), ("evaluate", "gres=gpu:h100:1"), ("collect", None)],
)
def test_sizes_are_for_training_and_bench_only(make_group, kind, gpu):
    options = ["gres='gpu:h100:8'", "gpus_per_node=null", "ntasks-per-core=1", "exclusive=true", "mem=0", "nice=0"]
    group = make_group(*(f"cluster.sbatch.{option}" for option in options), kind=kind)
    found = {line.removeprefix("#SBATCH --") for line in lines(script_text(group, [0]), "#SBATCH")}
    sizes = {"ntasks-per-core=1", "exclusive", "mem=0"}
    assert "nice=0" in found and found & sizes == (sizes if kind in ("train", "bench") else set())
    assert {line for line in found if "gpu" in line} == ({gpu} if gpu else set())


@pytest.mark.parametrize(
    ("gres", "one"),
    [
        ("gpu:8", "gpu:1"),
        ("gpu", "gpu:1"),
        ("gpu:nvidia_a100-sxm4-80gb:8", "gpu:nvidia_a100-sxm4-80gb:1"),
        ("gpu:a100-40g:8(S:0-1)", "gpu:a100-40g:1"),
        ("tmpfs:100G,gpu:h100:8", "gpu:h100:1"),
        ("tmpfs:100G", "gpu:1"),
    ],
)
def test_one_gpu_is_of_the_kind_of_many(make_group, gres, one):
    group = make_group(f"cluster.sbatch.gres='{gres}'", "cluster.sbatch.gpus_per_node=null", kind="evaluate")
    assert lines(script_text(group, [0]), "#SBATCH --g") == [f"#SBATCH --gres={one}"]


def test_evaluation_takes_one_gpu_of_nodes_that_have_eight(make_group):
    text = script_text(make_group("cluster.sbatch.gres='gpu:h100:8'", kind="evaluate"), [0])
    assert lines(text, "#SBATCH --g") == ["#SBATCH --gpus-per-node=1"]
    text = script_text(make_group("cluster.sbatch.gpus-per-node=null", kind="evaluate"), [0])
    assert lines(text, "#SBATCH --g") == ["#SBATCH --gres=gpu:1"]


@pytest.mark.parametrize(
    ("option", "argument"), [("cpus-per-task=3", "--cpus-per-task=3"), ("cpus_per_task=null", None)]
)
def test_processes_get_the_cpus_that_the_job_has(make_group, option, argument):
    text = script_text(make_group(f"cluster.sbatch.{option}"), [0])
    assert re.findall(r"--cpus-per-task\S*", text) == [argument] * (0 if argument is None else 2)


def test_a_dependency_of_ones_own_is_one_more(make_group):
    group = make_group("cluster.sbatch.dependency='singleton'")
    assert "#SBATCH --dependency=afterok:12,singleton" in script_text(group, [0], dependency="afterok:12")
    assert "#SBATCH --dependency=singleton" in script_text(group, [0])


@pytest.mark.parametrize("option", ["array=1-3", "output=mine.out"])
def test_options_that_the_launch_needs_are_not_for_others(make_group, option):
    with pytest.raises(ConfigError, match=f"must leave {option.split('=')[0]} to the launch"):
        make_group(f"cluster.sbatch.{option}")


def test_the_signal_is_the_one_that_processes_handle(make_group, monkeypatch):
    monkeypatch.setattr(SlurmJobEnvironment, "USR_SIG", "USR1")  # as SUBMITIT_PREEMPT_SIGNAL does
    assert lines(script_text(make_group(), [0]), "#SBATCH --signal") == ["#SBATCH --signal=USR2@120"]


@pytest.fixture
def places(make_group):
    """An array of three training tasks, submitted as job 12."""
    group = make_group(num_tasks=3)
    group.folder.mkdir(parents=True)
    group.add_submission("12", [0, 1, 2])
    return {f"train-{index}": Place(group.submissions[0], index) for index in range(3)}


def test_each_element_waits_for_its_own(make_group, places):
    group = make_group(kind="evaluate", num_tasks=3, after=lambda i: [f"train-{i}"])
    assert split(group, [0, 1, 2], places) == [([0, 1, 2], "aftercorr:12")]
    assert split(group, [0, 2], places) == [([0], "afterok:12_0"), ([2], "afterok:12_2")]
    assert split(group, [0, 1, 2], {"train-1": places["train-1"]}) == [([0, 2], None), ([1], "afterok:12_1")]
    assert split(group, [1], {}) == [([1], None)]


def test_elements_that_wait_for_one_job_are_one_array(make_group, places):
    group = make_group(kind="evaluate", num_tasks=2, after=lambda i: ["train-0"])
    assert split(group, [0, 1], places) == [([0, 1], "afterok:12_0")]


def test_a_report_waits_for_the_end_of_all_whatever_it_is(make_group, places):
    group = make_group(kind="report", after=lambda i: ["train-0", "train-1", "train-2", "done-already"], tolerant=True)
    assert split(group, [0], places) == [([0], "afterany:12")]
