"""``torchrl-sql evaluate`` on the checkpoints of a small untrained network, in the real emulator."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrl_sql.cli import main
from torchrl_sql.evaluation.episodes import read_calibration, read_episodes
from torchrl_sql.training.checkpoint import load_checkpoint
from torchrl_sql.training.lock import RunLock
from torchrl_sql.training.policy import POLICY_FILE, export_policy


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


def test_a_run_and_all_its_checkpoints(run, tmp_path, capsys):
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "mean return by game" in out and f"Scores: {run / 'scores.csv'}. Next: torchrl-sql report {run}" in out
    rows = read_episodes(run / "scores.csv")
    assert [(row.agent, row.gradient_step, row.game, row.episode) for row in rows] == [
        ("small", 6, game, episode) for game in ("Breakout", "Freeway") for episode in (0, 1)
    ]
    assert {(row.epsilon, row.sticky, row.max_env_frames, row.seed) for row in rows} == {(0.001, 0.25, 240, 0)}
    assert {len(row.checkpoint) for row in rows} == {len("sha256:") + 16}

    # The newest is not played again; shared out, the others end in parts of the same table.
    checkpoints = sorted(map(str, (run / "checkpoints").glob("*.pt")))
    for share in ("1/2", "2/2"):
        assert main(["evaluate", *checkpoints, "--share", share]) == 0
    rows = read_episodes(run / "scores.csv")
    assert [row.gradient_step for row in rows] == [3] * 4 + [6] * 4
    assert len({row.checkpoint for row in rows}) == 2
    assert len((run / "scores.csv").read_text().splitlines()) == 1 + 4
    assert {point.gradient_step for point in read_calibration(run / "calibration.csv")} == {3, 6}


def test_a_run_without_checkpoints_is_evaluated_by_its_policy(run, tmp_path, capsys):
    for name, folders in (("kept", ["checkpoints"]), ("deleted", [])):
        (tmp_path / name).mkdir()
        shutil.copy(run / "config.yaml", tmp_path / name)
        for folder in folders:
            shutil.copytree(run / folder, tmp_path / name / folder)
    export_policy(run, tmp_path / "deleted" / POLICY_FILE)
    assert main(["evaluate", str(tmp_path / "kept")]) == 0
    assert main(["evaluate", str(tmp_path / "deleted")]) == 0
    assert f"small of {tmp_path / 'deleted'} at gradient step 6" in capsys.readouterr().out
    kept, deleted = (read_episodes(tmp_path / name / "scores.csv") for name in ("kept", "deleted"))
    assert kept == deleted and len(kept) == 4
    assert main(["evaluate", str(tmp_path / "deleted" / POLICY_FILE)]) == 0  # the same run
    (tmp_path / "exports").mkdir()
    shutil.copy(tmp_path / "deleted" / POLICY_FILE, tmp_path / "exports")  # no run: it has no configuration
    assert main(["evaluate", str(tmp_path), "--episodes", "3"]) == 0  # both are found in the folder above
    assert not (tmp_path / "exports" / "scores.csv").exists()
    assert {len(read_episodes(tmp_path / name / "scores.csv")) for name in ("kept", "deleted")} == {6}


def test_a_damaged_configuration_is_named_before_anything_is_played(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("scores*", "calibration*"))
    (tmp_path / "run" / "config.yaml").write_bytes(b"\xe0\x00")
    assert main(["evaluate", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'run' / 'config.yaml'} must hold a run's configuration: 'utf-8'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_and_another_folder(run, tmp_path):
    options = ["--games", "Freeway", "--episodes", "1", "--sticky", "0", "--epsilon", "0.5", "--seed", "9"]
    options += ["--max-env-frames", "80", "--decoding", "sampled", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(run), *options]) == 0
    (row,) = read_episodes(tmp_path / "out" / "scores.csv")
    assert (row.game, row.sticky, row.epsilon, row.evaluation_seed, row.max_env_frames, row.length_agent_steps) == (
        "Freeway", 0.0, 0.5, 9, 80, 20,
    )  # fmt: skip
    assert row.decoding == "sampled" and not (tmp_path / "out" / "calibration.csv").exists()


def test_random_and_noop(tmp_path, monkeypatch):
    common = ["--games", "Breakout,Freeway", "--episodes", "1", "--max-env-frames", "400", "--out", str(tmp_path)]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["evaluate", "random", "noop", *common]) == 0
    rows = {(row.agent, row.game): row for row in read_episodes(tmp_path / "scores.csv")}
    assert len(rows) == 4
    assert rows["noop", "Freeway"].episode_return == 0.0
    assert rows["random", "Freeway"].decoding == "sampled" and rows["random", "Freeway"].checkpoint == ""


def test_constant_plays_each_legal_action_of_each_game_as_it_would_alone(tmp_path):
    common = ["--episodes", "1", "--max-env-frames", "80"]
    assert main(["evaluate", "constant", "--games", "Breakout,Freeway", "--out", str(tmp_path / "all"), *common]) == 0
    rows = read_episodes(tmp_path / "all" / "scores.csv")
    assert {(row.agent, row.game) for row in rows} == {
        *((f"constant_{action}", "Breakout") for action in ("NOOP", "FIRE", "RIGHT", "LEFT")),
        *((f"constant_{action}", "Freeway") for action in ("NOOP", "UP", "DOWN")),
    }
    assert {(row.epsilon, row.sticky, row.seed, row.decoding) for row in rows} == {(0.001, 0.25, 0, "greedy")}
    one = ["constant_UP", "--games", "Freeway", "--out", str(tmp_path / "up"), "--video", *common]
    assert main(["evaluate", *one]) == 0
    assert read_episodes(tmp_path / "up" / "scores.csv") == [row for row in rows if row.agent == "constant_UP"]
    assert [path.stem for path in (tmp_path / "up" / "clips").iterdir()] == ["Freeway-constant_UP-greedy-seed0-0"]


def test_a_folder_stands_for_the_runs_in_it_and_scores_reach_their_loggers(make_run, tmp_path, capsys):
    for seed in (0, 1):
        run = make_run(f"seed={seed}", "trainer.loggers=[csv,tensorboard]", steps=(5 + seed,))
        shutil.copytree(run, tmp_path / "study" / "small" / f"seed{seed}")
    assert main(["evaluate", str(tmp_path / "study")]) == 0
    assert "small of" in capsys.readouterr().out
    for seed in (0, 1):
        folder = tmp_path / "study" / "small" / f"seed{seed}"
        rows = read_episodes(folder / "scores.csv")
        assert [(row.seed, row.gradient_step) for row in rows] == [(seed, 5 + seed)] * 4
        mean = sum(row.episode_return for row in rows if row.game == "Freeway") / 2
        assert (folder / "logs/csv/scalars/evaluation/return_Freeway.csv").read_text() == f"{5 + seed},{mean}\n"
        events = EventAccumulator(str(folder / "logs/tensorboard"))
        events.Reload()
        (event,) = events.Scalars("evaluation/return_Freeway")
        assert (event.step, event.value) == (5 + seed, mean)
    # Again, and not under the runs' own protocol: nothing is added.
    assert main(["evaluate", str(tmp_path / "study"), "--decoding", "sampled"]) == 0
    assert main(["evaluate", str(tmp_path / "study")]) == 0
    assert len((folder / "logs/csv/scalars/evaluation/return_Freeway.csv").read_text().splitlines()) == 1


def test_a_run_that_is_trained_keeps_its_logs_to_itself(make_run, capsys):
    run = make_run(steps=(2,))
    with RunLock(run):
        assert main(["evaluate", str(run)]) == 0
    assert "Scores are not added to the run's loggers" in capsys.readouterr().out
    assert len(read_episodes(run / "scores.csv")) == 4 and not (run / "logs").exists()


def test_a_clip_of_a_chosen_episode(run, tmp_path):
    words = ["evaluate", str(run), "--games", "Freeway", "--out", str(tmp_path), "--video", "--seed", "4"]
    assert main([*words, "--episode", "1"]) == 0
    assert [path.stem for path in (tmp_path / "clips").iterdir()] == ["Freeway-small-greedy-seed0-6-episode1"]
    assert [row.episode for row in read_episodes(tmp_path / "scores.csv")] == [0, 1]


def test_sigterm_keeps_what_was_played_and_the_same_command_continues(tmp_path):
    words = ["constant_FIRE", "--games", "Breakout", "--episodes", "40", "--max-env-frames", "400", "--epsilon", "0.1"]
    assert main(["evaluate", *words, "--out", str(tmp_path / "whole")]) == 0
    table = tmp_path / "parts" / "scores.csv"
    command = [sys.executable, "-m", "torchrl_sql", "evaluate", *words, "--out", str(table.parent)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not table.exists() or len(table.read_text().splitlines()) < 3:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130 and "the same command continues" in err
    kept = read_episodes(table)
    assert 2 <= len(kept) < 40
    assert main(["evaluate", *words, "--out", str(table.parent)]) == 0
    whole = read_episodes(tmp_path / "whole" / "scores.csv")
    assert read_episodes(table) == whole and set(kept) < set(whole)


@pytest.fixture(scope="module")
def other_heads(make_run):
    """A run whose checkpoint has the weights of three games, but says two."""
    run, three = make_run(steps=(1,)), make_run("data.games=[Breakout,Freeway,Pong]", steps=(1,))
    (path,) = (run / "checkpoints").glob("*.pt")
    (other,) = (three / "checkpoints").glob("*.pt")
    torch.save(load_checkpoint(other) | {"config": load_checkpoint(path)["config"]}, path)
    return run


def test_weights_of_another_list_of_games_are_refused(other_heads, capsys):
    assert main(["evaluate", str(other_heads)]) == 1
    assert "describes (cql, 2 games, 18 actions), got weights of other names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["RUN", "--games", "Pong"],
            "games must be among those the policy has (Breakout, Freeway) or variations of them, got ['Pong']",
        ),
        (["RUN", "--games", "Pog"], "did you mean Pong"),
        (["RUN", "--episodes", "0"], "num_episodes must be in [1, 1,000,000], got 0"),
        (["RUN", "--seed", "-1", "--out", "OUT/new"], "seed must be in [0, 9,223,372,036,854,775,807], got -1"),
        (["RUN", "--epsilon", "2"], "epsilon must be in [0, 1], got 2.0"),
        (["RUN", "--episode", "1"], "--episode chooses what --video shows; it needs --video"),
        (["RUN", "--video", "--episode", "2"], "must be one of the 2 played per game, from 0, got 2"),
        (
            ["OUT"],
            "must be a checkpoint, the folder of a trained run or one that holds such folders, found no checkpoint",
        ),
        (["RUN", "--share", "3/2"], "a share must be K/N with K from 1 to N, got '3/2'"),
        (["RUN/config.yaml"], "must be a checkpoint of torchrl_sql"),
        (["RUN/nothing.pt"], "nothing.pt must be a checkpoint, the folder of a trained run or"),
        (["random", "--out", "OUT"], "random needs --games and --out"),
        (["constant_UP", "--games", "Pong"], "--out must be given with constant_UP"),
        (["constant_UPP"], "constant_UPP must be constant_ and an action (NOOP, FIRE, UP, "),
    ],
)
def test_bad_input_is_one_clear_line(run, tmp_path, arguments, message, capsys):
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for word in arguments]
    assert main(["evaluate", *words]) == 1
    err = capsys.readouterr().err
    assert err.startswith("torchrl-sql evaluate: ") and message in err and "Traceback" not in err


def test_a_checkpoint_outside_a_run_needs_a_folder(run, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    moved = tmp_path / "a" / "mine.pt"
    moved.write_bytes((run / "checkpoints" / "step_000000006.pt").read_bytes())
    assert main(["evaluate", str(moved)]) == 1
    assert "--out must be given with" in capsys.readouterr().err
    assert main(["evaluate", str(moved), "--episodes", "1", "--out", str(tmp_path / "b")]) == 0
    assert len(read_episodes(tmp_path / "b" / "scores.csv")) == 2


def test_table_of_other_settings_is_refused(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert main(["evaluate", str(run), "--sticky", "0"]) == 1
    assert "scores of different protocols cannot be compared; choose another folder (--out)" in capsys.readouterr().err


def test_a_share_that_holds_as_many_episodes_as_the_run_asks_for_marks_nothing(make_run):
    run = make_run(steps=(2,))
    assert main(["evaluate", str(run), "--episodes", "8", "--share", "1/4"]) == 0  # two of each game, as the run's own
    best = run / "checkpoints" / "best.json"
    assert not best.exists() and not (run / "logs").exists()
    assert main(["evaluate", str(run)]) == 0
    assert best.exists() and (run / "logs").exists()


def test_the_policy_that_the_repository_ships_plays(tmp_path):
    policy = Path(__file__).parents[2] / "examples" / "quickstart_policy.safetensors"
    assert main(["evaluate", str(policy), "--out", str(tmp_path), "--episodes", "1", "--max-env-frames", "400"]) == 0
    played = {row.game: row.length_agent_steps for row in read_episodes(tmp_path / "scores.csv")}
    assert played == {"Breakout": 100, "Enduro": 100, "Freeway": 100}
