"""``torchrl-sql launch`` and its companions, without SLURM."""

from __future__ import annotations

import json

import pytest

from torchrl_sql.cli import main
from torchrl_sql.config.cluster import compose_cluster_config
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.launch.group import find_launch, find_stages, new_stage
from torchrl_sql.launch.plan import plan_training
from torchrl_sql.launch.slurm import JobState
from torchrl_sql.launch.status import follow, task_states

TINY = [
    "scale=cpu",
    "data.store=store",
    "collection.num_agent_steps_per_game=300",
    "collection.max_env_frames_per_episode=400",
    "data.games=[Breakout]",
    "data.batch_size=8",
    "trainer.num_gradient_steps=4",
    "trainer.log_interval_gradient_steps=2",
    "trainer.checkpoint_interval_gradient_steps=2",
    "trainer.loggers=[csv]",
    "optim.warmup_gradient_steps=2",
    "evaluation.num_episodes_per_game=1",
    "evaluation.max_env_frames_per_episode=200",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run_prints_every_script_and_makes_nothing(here, capsys):
    words = [
        "launch",
        "chain",
        "scale=cpu",
        "data.store=store",
        "seed=0,1",
        "cluster=gpus1",
        "--dry-run",
        "--shares",
        "3",
    ]
    assert main([*words, "--into", "runs/x"]) == 0
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 4 and not list(here.iterdir())
    assert [line for line in out.splitlines() if "--dependency" in line] == [
        f"#SBATCH --dependency=afterok:JOB_OF_{stage}" for stage in ("COLLECT", "TRAIN", "EVALUATE")
    ]
    assert out.count("#SBATCH --array=0-1%2") == 1 and out.count("#SBATCH --array=0-5%6") == 1
    for kind in ("collect", "train", "evaluate", "report"):
        assert f"torchrl_sql_begin {here}/runs/x/launch/{kind} 0 0" in out


def test_options_may_stand_before_and_after(here, capsys):
    for words in (["--dry-run", "import"], ["import", "--dry-run"]):
        source = ["dqn-replay", "SOURCE", "--games", "train40", "--out", "STORE"]
        assert main(["launch", *words, *source, "cluster=cpu"]) == 0
        assert "cpus-per-task=16" in capsys.readouterr().out


def test_help_of_a_kind(here, capsys):
    with pytest.raises(SystemExit) as end:
        main(["launch", "train", "--help"])
    assert end.value.code == 0 and "torchrl-sql launch sweep scale=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "scale=cpu", "data.store=store"], "cluster must be given once"),
        (["train", "scale=cpu", "data.store=store", "seed=0,1", "cluster=cpu"], "launch train takes one"),
        (["sweep", "scale=cpu", "data.store=store", "cluster=cpu"], "launch sweep several"),
        (
            ["train", "scale=cpu", "data.store=store", "--gpus", "cluster=cpu"],
            "settings must be key=value, got '--gpus'",
        ),
        (["train", "scale=cpu", "data.store=store", "loss.alhpa=1", "cluster=cpu"], "no setting 'loss.alhpa'"),
        (
            ["train", "scale=cpu", "data.store=store", "data.batch_size=9", "cluster=gpus8"],
            "data.batch_size must be a multiple of the 8 processes, got 9",
        ),
        (
            [
                "train",
                "scale=cpu",
                "data.store=store",
                "data.batch_size=16",
                "trainer.microbatch_size=4",
                "cluster=gpus8",
            ],
            "trainer.microbatch_size must be null or a divisor of each process's batch of 2, got 4",
        ),
        (["evaluate", "cluster=cpu"], "launch evaluate needs runs"),
        (
            ["train", "scale=cpu", "data.store=store", "--import", "x", "cluster=cpu"],
            "--import belongs to launch chain",
        ),
        (
            ["train", "scale=cpu", "data.store=store", "--shares", "2", "cluster=cpu"],
            "--shares belongs to launch evaluate",
        ),
    ],
)
def test_refusals_come_before_anything_is_made(here, capsys, words, message):
    assert main(["launch", *words]) == 1
    assert message in capsys.readouterr().err and not list(here.iterdir())


@pytest.fixture
def stage(here):
    """A stage of two runs whose job 12 SLURM has forgotten."""
    (here / "bin").mkdir()
    program = here / "bin" / "scontrol"
    program.write_text("#!/bin/sh\necho 'Invalid job id specified' >&2\nexit 1\n")
    program.chmod(0o755)
    planned = plan_training(["scale=cpu", "data.store=store", "seed=0,1"], here / "runs" / "a")
    cluster = compose_cluster_config(["cluster=cpu"])
    tasks = [p.task for p in planned]
    stage = new_stage(here / "runs" / "a", "train", tasks, command="torchrl-sql x", stop_seconds=60, cluster=cluster)
    stage.create([p.config for p in planned])
    stage.add_submission("12", [0, 1])
    return stage


def test_record_has_what_is_needed_to_repeat_the_run(stage):
    content = json.loads((stage.folder / "launch.json").read_text())
    assert content["command"] == "torchrl-sql x" and content["versions"]["torch"]
    assert content["tasks"][1]["arguments"] == ["train", "scale=cpu", "data.store=store", "seed=1"]
    assert "seed: 1" in (stage.folder / "task_1" / "config.yaml").read_text()
    assert (stage.folder / "git.diff").is_file() and "git_commit" in content
    assert find_stages(stage.folder.parents[1]) == [stage]


def test_a_job_id_leads_to_its_launch(stage):
    for job in ("12", "12_1"):
        assert find_launch(job).resolve() == stage.folder.parents[1]
    with pytest.raises(ValueError, match="belongs to job 13"):
        find_launch("13")


def test_status_of_jobs_that_slurm_has_forgotten(stage, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{stage.folder.parents[3]}/bin:/usr/bin:/bin")
    stage.task_folder(0).write("done", "0.2")
    stage.task_folder(0).write("life", "0.2")
    assert main(["status", "12"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:6] == ["train", "0", "seed=0", "12_0", "COMPLETED", "2"]
    assert lines[2][:6] == ["train", "1", "seed=1", "12_1", "ENDED", "0"]
    stage.task_folder(1).write("FATAL", "ValueError: no such game")
    assert main(["status", "runs/a"]) == 0
    assert "FAILED" in (out := capsys.readouterr().out) and "ValueError: no such game" in out
    assert main(["cancel", "12"]) == 1
    assert "nothing of 12 is pending or running" in capsys.readouterr().err


def test_resume_submits_what_is_unfinished(stage, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{stage.folder.parents[3]}/bin:/usr/bin:/bin")
    stage.task_folder(0).write("done", "0.0")
    stage.task_folder(1).write("FATAL", "ValueError: x")
    assert main(["resume", "runs/a", "--dry-run", "cluster.timeout_minutes=9"]) == 0
    out = capsys.readouterr().out
    assert "torchrl_sql_begin " + str(stage.folder) + " 1 1" in out and "--time=9" in out and "array" not in out
    assert stage.task_folder(1).text("FATAL") is not None  # a dry run changes nothing
    sbatch = stage.folder.parents[3] / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 34\n")
    sbatch.chmod(0o755)
    assert main(["resume", "runs/a"]) == 0
    assert "train: job 34, 1 tasks" in capsys.readouterr().out
    (again,) = find_stages(stage.folder.parents[1])
    assert [(s.job, s.tasks) for s in again.submissions] == [("12", [0, 1]), ("34", [1])]
    assert stage.task_folder(1).text("FATAL") is None
    assert (stage.folder / "34_submission.sh").read_text() == out.replace("--time=9", "--time=1440")


def test_resume_checks_the_batch_against_new_processes(stage, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{stage.folder.parents[3]}/bin:/usr/bin:/bin")
    assert main(["resume", "runs/a", "--dry-run", "cluster.tasks_per_node=7"]) == 1
    assert "data.batch_size must be a multiple of the 7 processes" in capsys.readouterr().err


def test_logs(stage, monkeypatch, capsys):
    monkeypatch.setattr("torchrl_sql.launch.status._FOLLOW_SECONDS", 0)
    monkeypatch.setenv("PATH", f"{stage.folder.parents[3]}/bin:/usr/bin:/bin")
    assert main(["logs", "12"]) == 1
    assert "12 has no log of task 0, rank 0" in capsys.readouterr().err
    (stage.folder / "12_1_0_log.out").write_text("step 5\n")
    assert main(["logs", "12", "--task", "1"]) == 0
    assert main(["logs", "12", "--task", "1", "--follow"]) == 0
    assert capsys.readouterr().out == "step 5\nstep 5\n"


def test_status_asks_slurm_once_a_job(stage, monkeypatch):
    asked = []
    monkeypatch.setattr("torchrl_sql.launch.status.job_states", lambda job: asked.append(job) or {})
    assert [state.state for state in task_states(stage)] == ["ENDED", "ENDED"]
    assert asked == ["12"]


def test_following_asks_slurm_seldom_and_outlives_its_hiccups(stage, monkeypatch):
    log = stage.folder / "12_0_0_log.out"
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
    assert "".join(follow(stage, 0, rank=0)) == "x" * 64
    assert asked == [0, 20, 40, 60, 61, 62, 63, 64]


@pytest.mark.slow
def test_a_chain_here(here, capfd):
    store = f"data.store={here}/store"
    assert main(["launch", "chain", *TINY, store, "cluster=cpu", "--local", "--into", "runs/x"]) == 0
    run = here / "runs" / "x"
    assert len(read_episodes(run / "scores.csv")) == 1
    assert "Breakout" in (run / "report.html").read_text()
    assert [stage.unfinished for stage in find_stages(run)] == [[]] * 4
    assert "Breakout" in (run / "launch" / "evaluate" / "local0_0_0_log.out").read_text()
    assert main(["resume", "runs/x", "--local"]) == 0
    assert "runs/x is finished" in capfd.readouterr().out
