"""One tiny run of each command on real emulator data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import torchrl_sql
from torchrl_sql.cli import main
from torchrl_sql.data import FrameStore
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.training.checkpoint import list_checkpoints

TINY = [
    "collection.num_agent_steps_per_game=400",
    "collection.max_env_frames_per_episode=600",
    "data.games=[Breakout,Freeway]",
    "data.batch_size=8",
    "trainer.num_gradient_steps=6",
    "trainer.log_interval_gradient_steps=3",
    "trainer.checkpoint_interval_gradient_steps=3",
    "optim.warmup_gradient_steps=2",
    "evaluation.num_episodes_per_game=2",
    "evaluation.max_env_frames_per_episode=400",
]

QUICK = [*TINY, "trainer.evaluation_interval_gradient_steps=3"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a finished tiny quickstart."""
    folder = tmp_path_factory.mktemp("runs") / "quick start"  # a blank in the path must not matter
    assert main(["quickstart", "--out", str(folder), "--seed", "3", "--jobs", "2", *QUICK]) == 0
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_quickstart_makes_what_it_promises(quickstart):
    page = (quickstart / "report.html").read_text()
    assert "Breakout" in page and "Freeway" in page and re.search("data:(image/gif|video/mp4);base64,", page)
    assert not re.search(r'(src|href)="https?://', page.replace('href="https://arxiv.org', ""))
    store = FrameStore.open(quickstart / "store")
    assert store.games == ("Breakout", "Freeway")
    assert all(store.recording(game).num_steps >= 400 for game in store.games)
    rows = read_episodes(quickstart / "constant" / "scores.csv")
    for name in ("scaled_ql", "bc"):
        run = quickstart / name / "seed3"
        assert (run / "config.yaml").is_file() and list_checkpoints(run / "checkpoints")
        rows += read_episodes(run / "scores.csv")
    counted = {}
    for row in rows:
        place = row.agent, row.decoding, row.game, row.gradient_step
        counted[place] = counted.get(place, 0) + 1
        assert row.seed == (0 if row.agent.startswith("constant_") else 3)  # which needs no training
        assert row.sticky == 0.25 and row.epsilon == 0.001
    assert all(number == 2 for number in counted.values())
    agents = {(agent, decoding) for agent, decoding, *_ in counted}
    assert {step for agent, *_, step in counted if agent == "scaled_ql"} == {3, 6}
    assert {("scaled_ql", "greedy"), ("bc", "greedy"), ("bc", "sampled"), ("constant_UP", "greedy")} <= agents
    assert {path.stem for path in (quickstart / "scaled_ql" / "seed3" / "clips").iterdir()} == {
        f"{game}-scaled_ql-greedy-seed3-6" for game in ("Breakout", "Freeway")
    }


def test_quickstart_again_only_writes_the_report_again(quickstart, capsys):
    before = contents(quickstart)
    assert main(["quickstart", "--out", str(quickstart), "--seed", "3", *QUICK]) == 0
    after = contents(quickstart)
    changed = {path.relative_to(quickstart) for path in after if after[path] != before.get(path)}
    assert {path.parts[0] for path in changed} <= {"report.html", "report_files", "tasks"}
    assert {path.stem for path in changed if path.parts[0] == "tasks"} == {"report"}
    out = capsys.readouterr().out
    assert "7 of 8 tasks" in out and f"Report: {quickstart / 'report.html'}" in out
    assert "Scaled QL" in out and "BC sampled" in out


def test_quickstart_of_other_settings_deletes_nothing_without_consent(quickstart, capsys):
    before = contents(quickstart)
    for changes in (["--seed", "4"], ["--seed", "3", "--fresh"]):
        assert main(["quickstart", "--out", str(quickstart), *changes, *QUICK]) == 1
        assert "Give --yes to delete this" in capsys.readouterr().err
    assert main(["quickstart", "--out", str(quickstart), "--fresh", "--yes", *QUICK, "method.alhpa=1"]) == 1
    assert "alhpa" in capsys.readouterr().err and contents(quickstart) == before


def test_collect_train_evaluate_report_inspect(tmp_path, capsys):
    store, run = tmp_path / "store", tmp_path / "run"
    common = ["scale=cpu", "data.store=store", *TINY, f"data.store={store}", "data.games=[Freeway]"]
    assert main(["collect", *common]) == 0
    assert main(["collect", *common, "collection.codec=lz4"]) == 1
    assert f"{store} is in zstd, wanted lz4: set collection.codec=zstd" in capsys.readouterr().err
    assert main(["inspect", str(store)]) == 0
    out = capsys.readouterr().out
    assert " MB in zstd, " in out
    assert re.search(r"Freeway +\d+", out) and "skilled" in out and "rewards: raw" in out

    assert main(["train", *common, f"run_dir={run}", "name=small", "method.cql_alpha=0.5"]) == 0
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert main(["evaluate", str(run), "--decoding", "sampled", "--episodes", "1"]) == 0
    assert [(row.agent, row.decoding, row.gradient_step) for row in read_episodes(run / "scores.csv")] == [
        ("small", "greedy", 6),
        ("small", "sampled", 6),
    ]
    assert main(["report", str(run)]) == 0
    assert "small sampled" in (run / "report.html").read_text()


def test_variations_are_games_from_the_store_to_the_page(tmp_path, capsys):
    store, run = tmp_path / "store", tmp_path / "run"
    common = ["scale=cpu", *TINY, f"data.store={store}", "data.games=[Freeway,Breakout-m4-d0]"]
    assert main(["collect", *common]) == 0
    assert sorted(path.name for path in store.iterdir() if path.is_dir()) == ["Breakout-m4", "Freeway"]
    assert main(["train", *common, f"run_dir={run}", "name=small"]) == 0
    # Freeway-m1 is played as Freeway; Breakout is not a variation of Breakout-m4.
    assert main(["evaluate", str(run), "--games", "Breakout"]) == 1
    assert "(Freeway, Breakout-m4) or variations of them, got ['Breakout']" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--games", "Freeway-m9"]) == 1
    assert "mode of Freeway must be one of 0, 1, 2, 3, 4, 5, 6, 7, got 'Freeway-m9'" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--games", "Freeway,Breakout-m4"]) == 0
    assert main(["evaluate", str(run), "--games", "Freeway-m1-d1", "--video"]) == 0
    assert {row.game for row in read_episodes(run / "scores.csv")} == {"Freeway", "Breakout-m4", "Freeway-m1-d1"}
    assert [path.name.partition("-small")[0] for path in (run / "clips").iterdir()] == ["Freeway-m1-d1"]
    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    assert "Not shown, though episodes are in the tables: Freeway-m1-d1." in capsys.readouterr().out
    assert main(["report", str(run), "--games", "Freeway,Breakout-m4,Freeway-m1-d1", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    scores = {(row["policy"], row["game"]) for row in page["tables"]["score_table"] if row["mean_return"] is not None}
    played = [("small", game) for game in ("Freeway", "Breakout-m4", "Freeway-m1-d1")]
    published = [("Random", "Freeway"), ("Human", "Freeway")]  # scores of the game are not its variations'
    assert {*played, *published} <= scores and not {policy for policy, game in scores if "-" in game} & {
        "Random",
        "Human",
    }


def test_train_prints_its_configuration(capsys):
    assert main(["train", "--print-config", "scale=paper", "model.encoder=resnet101", "data.store=/data/dqn"]) == 0
    out = capsys.readouterr().out
    assert "encoder: resnet101" in out and "store: /data/dqn" in out and "batch_size: 512" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "scale=cpu", "data.store=store", "method.alhpa=1"], "there is no setting 'method.alhpa'"),
        (["train", "scale=cpu", "data.store=store", "data.store=nowhere", "run_dir=nowhere"], "nowhere"),
        (
            ["train", "scale=cpu", "data.store=store", "data.games=[Breakout"],
            "data.games cannot be read, got '[Breakout'",
        ),
        (["quickstart", "run_dir=x"], "a study decides run_dir itself, see --out"),
        (["train", "--config", "/x", "seed=1"], "--config takes no settings beside the file's own, got 'seed=1'"),
        (["evaluate", "nowhere"], "nowhere must be"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["train", "--config", "nowhere"], "nowhere does not exist"),
        (["train", "--config", "file"], "file must hold a run's configuration, keys with values, got 'text'"),
        (["collect", "scale=cpu", "data.games=Pong", "data.store=file"], "file is there already, as a file"),
        (["study", "quickstart", "--out", "store/x", "--dry-run"], "the folder of a study must be outside of stores"),
        (["quickstart", "--jobs", "0", "--dry-run"], "--jobs must be at least 1, got 0"),
        (["evaluate", "noop", "--games", "Pong", "--out", "store"], "--out must be outside of stores"),
        (["config", "study/../scale/cpu"], "there is no study/../scale/cpu among the choices"),
        (["train", "--config", "A" * 300], f"{'A' * 300} cannot be used: File name too long"),
        (["collect", "scale=cpu", "data.games=Pong", "data.store=store/inner"], "a store must be outside of stores"),
        (["evaluate", "constant_"], "constant_ must be constant_ and an action (NOOP, FIRE, "),
        (["evaluate", "constantly"], "constantly must be a checkpoint, the folder of a trained run or"),
        (
            ["train", "scale=cpu", "data.store=store", "data.batch_size=null"],
            "data.batch_size must have a value, got null",
        ),
        (["study", "broken.yaml"], "broken.yaml must hold a study: while parsing"),
        (["study", "comparison", "data.store=store"], "game 'Assault' is not in the store "),
        (["study", "comparison", "data.store=file"], "file is not a store"),
        (
            ["launch", "study", "comparison", "data.store=store", "cluster=gpus1"],
            "game 'Assault' is not in the store ",
        ),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "broken.yaml").write_text("runs: [")
    FrameStore.create("store")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"torchrl-sql {arguments[0]}: ") and message in err and "Traceback" not in err
    assert err.count("\n") == 1 and "Errno" not in err


@pytest.mark.parametrize("command", ["quickstart", "study", "collect", "train", "evaluate", "enjoy", "report"])
def test_help_explains_each_command(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert f"torchrl-sql {command}" in out and len(out.splitlines()) > 6


def test_console_command_answers_help_without_loading_torch():
    code = (
        "import sys; from torchrl_sql import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in result.stdout and result.stdout.rstrip().endswith("False")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "scale=cpu", "data.stor=x"],
        ["collect", "scale=cpx"],
        ["bench", "data.store=x"],
        ["study", "nosuch"],
        ["evaluate", "nosuch"],
        ["enjoy", "nosuch"],
        ["report", "nosuch"],
        ["inspect", "nosuch"],
        ["verify", "nosuch"],
        ["convert", "nosuch", "--codec", "lz4", "--out", "x"],
        ["export", "nosuch", "--out", "x"],
        ["launch", "train", "scale=cpx", "cluster=cpu"],
    ],
    ids=" ".join,
)
def test_mistakes_are_named_before_torch_is_imported(arguments):
    code = "import sys; from torchrl_sql import cli; print(cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.stdout == "1 False\n" and len(done.stderr.splitlines()) <= 2, done.stderr


def run_shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)


def test_version_and_a_bare_command_need_no_other_words(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"torchrl-sql {torchrl_sql.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert "torchrl-sql quickstart" in capsys.readouterr().out


def test_an_unknown_option_is_answered_by_its_command_with_the_closest_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "runs/x", "--epsiode", "3", "--gmaes=Pong"])
    error = capsys.readouterr().err
    assert "usage: torchrl-sql evaluate" in error
    assert "unrecognized arguments: --epsiode 3 --gmaes=Pong; did you mean --episode or --games?" in error


def test_config_prints_files_of_configs_alone(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert main(["config", str(tmp_path / "mine")]) == 1
    assert f"there is no {tmp_path / 'mine'} among the choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**55, dtype=torch.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
        lambda: np.empty(2**55, np.uint8),
        lambda: (_ for _ in ()).throw(MemoryError()),
    ],
)
def test_too_little_memory_is_one_clear_line(monkeypatch, capsys, allocate):
    monkeypatch.setattr("torchrl_sql.cli._run", lambda args: allocate())
    assert main(["quickstart"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch("torchrl-sql quickstart: there is not enough memory(: .+)?\n", err)


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("torchrl_sql.cli._run", lambda args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["quickstart"])


def test_a_closed_pipe_is_silent():
    done = run_shell(f"{sys.executable} -m torchrl_sql completion bash | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_closed_output_is_no_error():
    done = run_shell(f"{sys.executable} -m torchrl_sql completion bash >&-; echo $?")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path):
    command = [sys.executable, "-m", "torchrl_sql", "collect", "scale=cpu", "data.games=Pong", "data.store=store"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "store").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130 and err.endswith("stopped; the same command continues where it was\n")
    assert "Warning" not in err and "Traceback" not in err


def test_after_a_command_sigterm_is_handled_as_before(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("shtab.complete", lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["completion", "bash"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_completion_script_completes_commands_and_options():
    script = f'eval "$({sys.executable} -m torchrl_sql completion bash)"; '
    complete = "COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
    complete += "_shtab_torchrl_sql; echo ${{COMPREPLY[@]}}"
    done = run_shell(script + complete.format(words="torchrl-sql eval"))
    assert done.stdout.split() == ["evaluate"], done.stderr
    done = run_shell(script + complete.format(words="torchrl-sql evaluate --epis"))
    assert done.stdout.split() == ["--episodes", "--episode"], done.stderr


def test_other_packages_do_not_chat():
    code = "import logging; from torchrl_sql.cli import main; main(['inspect', 'nowhere']); "
    code += "logging.getLogger('matplotlib').info('hello'); logging.getLogger('torchrl_sql.x').info('ours')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "hello" not in done.stderr and done.stderr.endswith("ours\n")
