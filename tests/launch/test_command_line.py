"""``torchrl-sql launch`` and its companions, without SLURM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchrl_sql.cli import main
from torchrl_sql.config import list_choices
from torchrl_sql.config.cluster import compose_cluster_config
from torchrl_sql.config.study import find_study, load_study
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.launch.group import PACKAGE, find_groups, find_launch, make_groups
from torchrl_sql.launch.slurm import JobState
from torchrl_sql.launch.status import follow, task_states
from torchrl_sql.studies.plan import plan_study, plan_training

TRAIN = ["scale=cpu", "data.store=store"]
STUDY = """
title: T
common:
  - scale=cpu
  - data.games=[Breakout]
  - collection.num_agent_steps_per_game=300
  - collection.max_env_frames_per_episode=400
  - data.batch_size=8
  - trainer.num_gradient_steps=4
  - trainer.log_interval_gradient_steps=2
  - trainer.checkpoint_interval_gradient_steps=2
  - trainer.loggers=[csv]
  - optim.warmup_gradient_steps=2
  - evaluation.num_episodes_per_game=1
  - evaluation.max_env_frames_per_episode=200
seeds: [0, 1]
data: collect
runs:
  q: {}
  bc: {set: [method=bc], seeds: [1]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run_prints_every_script_and_makes_nothing(here, capsys):
    (here / "mine.yaml").write_text(STUDY)
    before = {*here.iterdir()}
    assert main(["launch", "study", "mine.yaml", "cluster=gpus1", "--dry-run", "--into", "runs/x"]) == 0
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 6 and {*here.iterdir()} == before
    assert [line.partition("=")[2] for line in out.splitlines() if "--dependency" in line] == [
        "afterok:JOB_OF_COLLECT",
        "aftercorr:JOB_OF_TRAIN-Q",
        "afterok:JOB_OF_COLLECT",
        "afterok:JOB_OF_TRAIN-BC",
        "afterany:JOB_OF_EVALUATE-Q-GREEDY:JOB_OF_EVALUATE-BC-GREEDY",
    ]
    assert out.count("#SBATCH --array=0-1%2") == 2
    for name in ("collect", "train-q", "evaluate-q-greedy", "train-bc", "evaluate-bc-greedy", "report"):
        assert f"torchrl_sql_begin {here}/runs/x/launch/{name} 0 0" in out


def test_what_learns_online_in_a_study_takes_one_process_beside_others_that_take_many(here, capsys):
    words = ["study", "transfer_online", "scale=paper", "cluster=gpus8", "--seeds", "0", "--dry-run"]
    assert main(["launch", *words]) == 0
    scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
    processes = {
        re.search(r"launch/(\S+) ", script)[1]: re.search(r"--ntasks-per-node=(\d+)", script)[1] for script in scripts
    }
    many = {group for group, number in processes.items() if number == "8"}
    assert many == {f"train-pre_{method}" for method in ("ql", "bc", "mae", "cpc")}
    assert {"train-ql", "train-scratch", "evaluate-ql-greedy"} < set(processes)

    assert main(["launch", "train", "scale=cpu", "online=cpu", "data.games=Pong", "cluster=gpus8", "--dry-run"]) == 0
    assert "--ntasks-per-node=1\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", list_choices("study"))
def test_every_study_can_be_launched_at_its_largest_scale(here, capsys, name):
    scale = list(yaml.safe_load(find_study(name).read_text()).get("scales", ["cpu"]))[-1]
    cluster = "gpus8" if scale == "paper" else "gpus1"
    assert main(["launch", "study", name, f"scale={scale}", f"cluster={cluster}", "--seeds", "0", "--dry-run"]) == 0
    assert "torchrl_sql_begin" in capsys.readouterr().out and not list(here.iterdir())


def test_evaluations_are_an_array_of_shares(here, capsys):
    assert main(["launch", "evaluate", "runs/a", "runs/b", "--shares", "3", "cluster=gpus1", "--dry-run"]) == 0
    assert "#SBATCH --array=0-5%6" in capsys.readouterr().out


def test_options_may_stand_before_and_after(here, capsys):
    for words in (["--dry-run", "import"], ["import", "--dry-run"]):
        source = ["dqn-replay", "SOURCE", "--games", "train40", "--out", "STORE"]
        assert main(["launch", *words, *source, "cluster=cpu"]) == 0
        assert "cpus-per-task=16" in capsys.readouterr().out


def test_paths_after_the_kind_are_expanded_too(here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    for words in (["--into", "~/x", "train"], ["train", "--into", "~/x"]):
        assert main(["launch", "--dry-run", *words, *TRAIN, "cluster=cpu"]) == 0
        assert f"torchrl_sql_begin {here}/home/x/launch/train 0 0" in capsys.readouterr().out


def test_help_of_a_kind(here, capsys):
    with pytest.raises(SystemExit) as end:
        main(["launch", "train", "--help"])
    assert end.value.code == 0 and "torchrl-sql launch study quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *TRAIN], "cluster must be given once"),
        (["train", *TRAIN, "--gpus", "cluster=cpu"], "settings must be key=value, got '--gpus'"),
        (["train", *TRAIN, "loss.alhpa=1", "cluster=cpu"], "loss"),
        (["train", *TRAIN, "data.batch_size=9", "cluster=gpus8"], "data.batch_size must be a multiple of the 8"),
        (
            ["train", *TRAIN, "data.batch_size=16", "trainer.microbatch_size=4", "cluster=gpus8"],
            "trainer.microbatch_size must be null or a divisor of each process's batch of 2, got 4",
        ),
        (["evaluate", "cluster=cpu"], "launch evaluate needs runs"),
        (["train", *TRAIN, "--shares", "0", "cluster=cpu"], "--shares belongs to launch evaluate"),
        (["train", *TRAIN, "--shares", "2", "cluster=cpu"], "--shares belongs to launch evaluate"),
        (["train", *TRAIN, "--seeds", "0,1", "cluster=cpu"], "--seeds belongs to launch study"),
        (["evaluate", "runs/a", "--shares", "0", "cluster=cpu"], "--shares must be at least 1, got 0"),
        (["study", "cluster=cpu"], "launch study needs the study's name"),
        (["study", "absent", "cluster=cpu"], "a study must be FILE.yaml or one of"),
        (["train", *TRAIN, "cluster=cpu", "--into", "100%j"], "must hold no %"),
        (["train", *TRAIN, "cluster=cpu", "--into", "a\nb"], "must be a path, without control characters"),
        (["train", *TRAIN, "cluster=cpu", "--into", "a:b"], "must hold no %"),
        (["train", *TRAIN, "cluster=cpu", "--into", "a$"], "must hold no %"),
        (["train", *TRAIN, "cluster=cpu", "--into", "a\\b"], "must hold no %"),
        (["train", *TRAIN, "cluster=cpu", "--into", "$UNSET/a"], "the environment variable $UNSET is not set"),
    ],
)
def test_refusals_come_before_anything_is_made(here, capsys, words, message):
    assert main(["launch", *words]) == 1
    assert message in capsys.readouterr().err and not list(here.iterdir())


def test_a_study_s_commands_are_understood_before_anything_is_made(here, capsys):
    (here / "mine.yaml").write_text(
        STUDY.replace("data: collect", "data: import dqn-replay SOURCE --games Breakout --nope")
    )
    with pytest.raises(SystemExit):
        main(["launch", "study", "mine.yaml", "cluster=cpu"])
    assert "unrecognized arguments: --nope" in capsys.readouterr().err and len(list(here.iterdir())) == 1


def put_on_path(here, name, script, monkeypatch):
    program = here / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.fixture
def group(here, monkeypatch):
    """A group of two runs whose job 12 SLURM has forgotten."""
    put_on_path(here, "scontrol", "echo 'Invalid job id specified' >&2; exit 1", monkeypatch)
    tasks = plan_training([*TRAIN, "seed=0,1"], here / "runs" / "a")
    cluster = compose_cluster_config(["cluster=cpu"])
    (group,) = make_groups(here / "runs" / "a", tasks, command="torchrl-sql x", cluster=cluster)
    group.create()
    group.add_submission("12", [0, 1])
    return group


def test_record_has_what_is_needed_to_repeat_the_run(group):
    content = json.loads((group.folder / "launch.json").read_text())
    assert content["command"] == "torchrl-sql x" and content["versions"]["torch"]
    config = group.folder / "task_1" / "config.yaml"
    assert content["tasks"][1]["arguments"] == ["train", "--config", str(config)]
    assert "seed: 1" in config.read_text()
    assert (group.folder / "git.diff").is_file() and "git_commit" in content
    assert find_groups(group.root) == [group]


def test_the_code_of_a_launch_is_its_own(group):
    """Package and settings, whole: an import from there finds nothing of the checkout."""
    code = "import torchrl_sql.config, sys; print(torchrl_sql.config.configs_dir(), torchrl_sql.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(group.code)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(group.code / "torchrl_sql" / name) for name in ("configs", "__init__.py")]
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and "configs" not in path.parts:
            assert (group.code / "torchrl_sql" / path.relative_to(PACKAGE)).read_bytes() == path.read_bytes()


def test_groups_are_in_the_order_of_their_launch_whatever_the_clock_says(here):
    (here / "mine.yaml").write_text(STUDY)
    tasks = [*plan_training([*TRAIN, "seed=0,1"], here / "runs" / "a")]
    later = [type(task)(name="e", arguments=["evaluate", "x"], group="evaluate") for task in tasks[:1]]
    cluster = compose_cluster_config(["cluster=cpu"])
    groups = make_groups(here / "runs" / "a", [*tasks, *later], command="", cluster=cluster)
    groups[0].created, groups[1].created = "2030-01-01", "2020-01-01"  # the clock was set back
    for group in reversed(groups):
        group.create()
    assert [group.name for group in find_groups(here / "runs" / "a")] == ["train", "evaluate"]


def test_a_job_id_leads_to_its_launch(group):
    for job in ("12", "12_1"):
        assert find_launch(job).resolve() == group.root
    with pytest.raises(ValueError, match="belongs to job 13"):
        find_launch("13")


def test_a_launch_whose_folder_is_named_like_a_job_is_found(group, here):
    group.root.rename(here / "77")
    assert find_launch("77").resolve() == here / "77"


def test_status_of_jobs_that_slurm_has_forgotten(group, capsys):
    group.task_folder(0).write("done", "0.2")
    group.task_folder(0).write("attempt", "0.2")
    assert main(["status", "12"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:6] == ["train", "0", "seed=0", "12_0", "COMPLETED", "2"]
    assert lines[2][:6] == ["train", "1", "seed=1", "12_1", "ENDED", "0"]
    group.task_folder(1).write("FATAL", "ValueError: no such game\n  but others")
    assert main(["status", "runs/a"]) == 0
    assert "FAILED" in (out := capsys.readouterr().out) and out.endswith("ValueError: no such game\n")
    assert main(["cancel", "12"]) == 1
    assert "nothing of 12 is pending or running" in capsys.readouterr().err


def test_resume_submits_what_is_unfinished(group, here, monkeypatch, capsys):
    group.task_folder(0).write("done", "0.0")
    group.task_folder(1).write("FATAL", "ValueError: x")
    assert main(["resume", "runs/a", "--dry-run", "cluster.timeout_minutes=9"]) == 0
    out = capsys.readouterr().out
    assert "torchrl_sql_begin " + str(group.folder) + " 1 1" in out and "--time=9" in out and "array" not in out
    assert group.task_folder(1).text("FATAL") is not None and not (group.root / "launch/.lock").exists()  # dry
    put_on_path(here, "sbatch", "echo Submitted batch job 34", monkeypatch)
    assert main(["resume", "runs/a"]) == 0
    assert "train: job 34, 1 tasks" in capsys.readouterr().out
    (again,) = find_groups(group.root)
    assert [(s.job, s.tasks) for s in again.submissions] == [("12", [0, 1]), ("34", [1])]
    assert group.task_folder(1).text("FATAL") is None
    assert (group.folder / "34_submission.sh").read_text() == out.replace("--time=9", "--time=1440")


def test_one_process_at_a_time_submits_tasks_again(group, here, monkeypatch, capsys):
    """Here, a second one while sbatch takes the first one's job."""
    second = f"[ -e {here}/second ] || {sys.executable} -m torchrl_sql resume runs/a >{here}/second 2>&1"
    put_on_path(here, "sbatch", f"{second}; echo Submitted batch job 34", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    assert main(["resume", "runs/a"]) == 0
    assert "launch is in use by process" in (here / "second").read_text()
    assert [each.job for each in find_groups(group.root)[0].submissions] == ["12", "34"]


def test_a_job_is_submitted_from_another_one_as_from_outside(group, here, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "slurm.conf")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
    put_on_path(here, "sbatch", f"env >{here}/environment; echo Submitted batch job 34", monkeypatch)
    assert main(["resume", "runs/a"]) == 0
    lines = (here / "environment").read_text().splitlines()
    assert [line for line in lines if line.startswith("SLURM_")] == ["SLURM_CONF=slurm.conf"]


def test_what_runs_here_has_no_part_in_an_allocation(here, monkeypatch, capfd):
    """Here, a shell on the second process of two."""
    step = {"PROCID": "1", "NTASKS": "2", "NNODES": "1", "LOCALID": "1", "JOB_ID": "7"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    options = ["--games", "Pong", "--episodes", "2", "--max-env-frames", "100", "--out", "scores"]
    assert main(["launch", "evaluate", "noop", *options, "cluster=cpu", "--local"]) == 0
    assert len(read_episodes(here / "scores" / "scores.csv")) == 2


def test_resume_takes_new_code_only_if_told_to(group, here, monkeypatch, capsys):
    put_on_path(here, "sbatch", "echo Submitted batch job 34", monkeypatch)
    ours = group.code / "torchrl_sql" / "__init__.py"
    ours.write_text("# of the launch")
    assert main(["resume", "runs/a"]) == 0
    assert ours.read_text() == "# of the launch"
    assert main(["resume", "runs/a", "--new-code"]) == 0
    assert ours.read_bytes() == (PACKAGE / "__init__.py").read_bytes()
    (kept,) = group.code.parent.glob("code-before-*")
    assert (kept / "torchrl_sql" / "__init__.py").read_text() == "# of the launch"


def test_resume_checks_the_batch_against_new_processes(group, capsys):
    assert main(["resume", "runs/a", "--dry-run", "cluster.tasks_per_node=7"]) == 1
    assert "data.batch_size must be a multiple of the 7 processes" in capsys.readouterr().err


@pytest.fixture
def launched(here, monkeypatch, capsys):
    """A study of which sbatch took the first two jobs, 1 and 2, and refused the third."""
    (here / "mine.yaml").write_text(STUDY)
    script = f"n=$(cat {here}/n 2>/dev/null || echo 0); [ $n = 2 ] && {{ echo QOSMaxSubmitJob >&2; exit 1; }}\n"
    put_on_path(here, "sbatch", script + f"echo $((n + 1)) >{here}/n; echo Submitted batch job $((n + 1))", monkeypatch)
    assert main(["launch", "study", "mine.yaml", "cluster=cpu"]) == 1
    assert "QOSMaxSubmitJob" in capsys.readouterr().err
    (here / "n").write_text("10")
    return here / "runs" / "mine"


def test_a_partly_submitted_study_is_completed_beside_what_runs(launched, here, monkeypatch, capsys):
    running = "JobId=%s JobState=RUNNING Reason=None Restarts=0 NodeList=n1"
    elements = "\n".join(f"{running % 2} ArrayJobId=2 ArrayTaskId={index}" for index in (0, 1))
    script = f"[ $4 = 1 ] && echo '{running % 1}'; [ $4 = 2 ] && echo '{elements}'; exit 0"
    put_on_path(here, "scontrol", script, monkeypatch)
    assert main(["resume", "runs/mine"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == [
        "evaluate-q-greedy",
        "train-bc",
        "evaluate-bc-greedy",
        "report",
    ]
    scripts = {group.name: group.submissions[-1].job for group in find_groups(launched)}

    def dependency(name):
        text = (launched / "launch" / name / f"{scripts[name]}_submission.sh").read_text()
        return [line.partition("=")[2] for line in text.splitlines() if "--dependency" in line]

    assert dependency("evaluate-q-greedy") == ["aftercorr:2"] and dependency("train-bc") == ["afterok:1"]
    assert dependency("report") == [f"afterany:{scripts['evaluate-q-greedy']}:{scripts['evaluate-bc-greedy']}"]
    # A run fails while the rest waits: what waits for its job would not wait for the one submitted anew.
    script = f"case $4 in 1) echo '{running % 1}';; 2) echo '{elements}';; "
    script += '*) echo "JobId=$4 ArrayTaskId=0-1 JobState=PENDING Restarts=0 NodeList=";; esac'
    put_on_path(here, "scontrol", script, monkeypatch)
    put_on_path(here, "scancel", f"echo $* >{here}/cancelled", monkeypatch)
    assert main(["resume", "runs/mine"]) == 1
    assert "is not over: collect is RUNNING, job 1" in capsys.readouterr().err
    put_on_path(here, "scontrol", script.replace("case $4 in", "case $4 in 12) ;;"), monkeypatch)
    assert main(["resume", "runs/mine"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "train-bc",
        "evaluate-bc-greedy",
        "report",
    ]
    assert (here / "cancelled").read_text() == f"{scripts['evaluate-bc-greedy']} {scripts['report']}\n"
    for command in (["launch", "study", "mine.yaml", "cluster=cpu"], ["study", "mine.yaml"]):
        assert main(command) == 1
        assert "is not over: collect is RUNNING, job 1" in capsys.readouterr().err


def test_one_group_s_task_is_cancelled(launched, here, monkeypatch, capsys):
    script = 'echo "JobId=$4 ArrayTaskId=0-1 JobState=PENDING Restarts=0 NodeList="'
    put_on_path(here, "scontrol", script, monkeypatch)
    put_on_path(here, "scancel", f"echo $* >{here}/cancelled", monkeypatch)
    assert main(["cancel", "runs/mine", "--group", "train-q", "--task", "1"]) == 0
    assert (here / "cancelled").read_text() == "2_1\n"
    assert main(["cancel", "runs/mine", "--group", "train-z"]) == 1
    assert "nothing of runs/mine, group train-z is pending" in capsys.readouterr().err


def test_a_study_launched_again_takes_only_what_is_left(launched, here, monkeypatch, capsys):
    put_on_path(here, "scontrol", "echo 'Invalid job id specified' >&2; exit 1", monkeypatch)
    for group in find_groups(launched):
        for index, task in enumerate(group.tasks):
            if group.name in ("collect", "train-q"):
                task.write_record(seconds=1)
                (launched / task.makes[0]).mkdir(parents=True)
                group.task_folder(index).write("done", "0.0")
    capsys.readouterr()
    assert main(["launch", "study", "mine.yaml", "cluster=cpu"]) == 0
    names = ["evaluate-q-greedy", "train-bc", "evaluate-bc-greedy", "report"]
    assert [group.name for group in find_groups(launched)] == names
    assert (launched / "launch-1" / "collect" / "launch.json").is_file()


def test_a_task_whose_table_another_one_makes_anew_is_launched_too(here, monkeypatch, capsys):
    put_on_path(here, "sbatch", "echo Submitted batch job 1", monkeypatch)
    text = STUDY.replace("seeds: [1]}", "seeds: [1], decode: [%s]}").replace(
        "method=bc", "method=mgdt, model=mgdt_small"
    )
    folder = here / "runs" / "mine"
    (here / "mine.yaml").write_text(text % "greedy, sampled, expert")
    for task in plan_study(load_study(here / "mine.yaml"), folder):
        task.write_record(seconds=1)
        for path in task.makes:
            (folder / path).mkdir(parents=True, exist_ok=True)
    (here / "mine.yaml").write_text(text % "greedy, expert")  # expert comes after another one now
    assert main(["launch", "study", "mine.yaml", "cluster=cpu", "--yes"]) == 0
    names = ["evaluate-bc-greedy", "evaluate-bc-expert", "report"]
    assert [group.name for group in find_groups(folder)] == names


def test_logs(group, monkeypatch, capsys):
    monkeypatch.setattr("torchrl_sql.launch.status._FOLLOW_SECONDS", 0)
    assert main(["logs", "12"]) == 1
    assert "12 has no log of task 0, rank 0" in capsys.readouterr().err
    (group.folder / "12_1_0_log.out").write_text("step 5\n")
    assert main(["logs", "12", "--task", "1"]) == 0
    assert main(["logs", "12", "--task", "1", "--follow"]) == 0
    assert capsys.readouterr().out == "step 5\nstep 5\n"


def test_status_asks_slurm_once_per_job(group, monkeypatch):
    asked = []
    monkeypatch.setattr("torchrl_sql.launch.status.job_states", lambda job: asked.append(job) or {})
    assert [state.state for state in task_states(group)] == ["ENDED", "ENDED"]
    assert asked == ["12"]


def test_following_asks_slurm_seldom_and_outlives_its_hiccups(group, monkeypatch):
    log = group.folder / "12_0_0_log.out"
    log.write_text("")
    asked = []

    class Clock:
        now = 0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += int(seconds)
            log.write_text("x" * self.now)

    clock = Clock()

    def answer(job):
        asked.append(clock.now)
        if clock.now == 20:
            raise OSError("Unable to contact slurm controller")
        return {0: JobState("RUNNING", 0, "None", "n1")} if clock.now < 60 else {}

    monkeypatch.setattr("torchrl_sql.launch.status.time", clock)
    monkeypatch.setattr("torchrl_sql.launch.status.job_states", answer)
    assert "".join(follow(group, 0, rank=0)) == "x" * 64
    assert asked == [0, 20, 40, 60, 61, 62, 63, 64]


def of_job(capsys, *words, **environment):
    """What a batch script of one's own gets: the exit code and the folder that is printed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(f"SLURM_{name}", value)
        code = main(["launch", "--in-job", *words])
    out, err = capsys.readouterr()
    return (code, err) if code else find_groups(Path(out.strip()).parents[1])[0]


def test_every_attempt_of_a_job_has_the_same_folder_and_every_job_another(here, capsys):
    words = ["train", *TRAIN, "seed=3"]
    first = of_job(capsys, *words, JOB_ID="5")
    assert of_job(capsys, *words, JOB_ID="5", RESTART_COUNT="1") == first
    assert of_job(capsys, *words, JOB_ID="5") != first  # ids start anew with a new cluster
    other = of_job(capsys, *words[:-1], "seed=4", JOB_ID="5", RESTART_COUNT="1")
    assert other != first and "seed: 4" in (other.folder / "task_0" / "config.yaml").read_text()
    assert first.submissions[0].job == "5" and first.cluster is None and first.kind == "train"
    assert first.tasks[0].run_dir == str(first.root) and first.stop_seconds == 60


@pytest.mark.parametrize("content", ["", "[]", '{"format": "torchrl_sql launch 2"}'])
def test_records_of_others_are_ignored(here, capsys, caplog, content):
    first = of_job(capsys, "train", *TRAIN, JOB_ID="5")
    other = here / "runs" / "other" / "launch" / "train"
    other.mkdir(parents=True)
    (other / "launch.json").write_text(content)
    assert of_job(capsys, "train", *TRAIN, JOB_ID="5", RESTART_COUNT="1") == first
    assert find_launch("5").resolve() == first.root
    assert "ignored: " + str(other) in caplog.text


def test_an_array_element_takes_its_combination(here, capsys):
    words = ["train", *TRAIN, "seed=0,7"]
    array = {"JOB_ID": "9", "ARRAY_JOB_ID": "8"}
    group = of_job(capsys, *words, **array, ARRAY_TASK_ID="1")
    assert group.submissions[0].job == "8_1" and len(group.tasks) == 1
    assert "seed: 7" in (group.folder / "task_0" / "config.yaml").read_text()
    assert find_launch("8").resolve() == find_launch("8_1").resolve() == group.root
    other = of_job(capsys, *words, **array, ARRAY_TASK_ID="0")
    with pytest.raises(ValueError, match="give one of 8_0, 8_1"):
        find_launch("8")
    assert find_launch("8_0").resolve() == other.root
    assert "array element 2 has no settings" in of_job(capsys, *words, **array, ARRAY_TASK_ID="2")[1]
    assert "sbatch --array=0-1" in of_job(capsys, *words, JOB_ID="5")[1]


def test_other_commands_of_a_job_are_checked(here, capsys):
    group = of_job(capsys, "evaluate", "runs/x", JOB_ID="5")
    assert group.tasks[0].arguments == ["evaluate", "runs/x"] and group.tasks[0].run_dir is None
    with pytest.raises(SystemExit):
        of_job(capsys, "collect", JOB_ID="5")
    assert "are required" in capsys.readouterr().err
    assert "alhpa" in of_job(capsys, "train", *TRAIN, "method.alhpa=1", JOB_ID="5")[1]
    assert len(list((here / "runs").iterdir())) == 1


@pytest.mark.slow
def test_a_study_launched_here(here, capfd):
    (text, _, _) = STUDY.partition("  bc:")
    (here / "mine.yaml").write_text(text)
    assert main(["launch", "study", "mine.yaml", "cluster=cpu", "--local"]) == 0
    study = here / "runs" / "mine"
    assert "Breakout" in (study / "report.html").read_text()
    assert "Breakout" in (study / "launch" / "collect" / "local0_0_0_log.out").read_text()
    assert main(["resume", "runs/mine", "--local"]) == 0
    assert "runs/mine is finished" in capfd.readouterr().out
    assert main(["study", "mine.yaml", "--dry-run"]) == 0  # the record is the same as of a study that ran here
    assert capfd.readouterr().out.count(": done in ") == 5
