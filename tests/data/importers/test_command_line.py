from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchrl_sql.cli import main, run
from torchrl_sql.data import FrameStore, importers
from torchrl_sql.games import GAMES

ROOT = Path(__file__).parents[3]


def play(dopamine, root, game):
    log = dopamine.Log(root / game / "1" / "replay_logs", 10, len(GAMES[game].minimal_actions), 0)
    for num_steps in (1, 7, 2, 9):
        log.play(num_steps)
    return log


def test_import_verify_inspect(dopamine, tmp_path, capsys):
    source, store = tmp_path / "dqn", tmp_path / "store"
    play(dopamine, source, "Pong")
    arguments = ["import", "dqn-replay", str(source), "--games", "Pong", "--checkpoints", "0-1", "--out", str(store)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Pong" in out and "padding" in out
    num_steps = FrameStore.open(store).recording("Pong").num_steps
    assert main(["inspect", str(store)]) == 0
    assert f"{num_steps:,} transitions" in capsys.readouterr().out
    assert main(["inspect", str(store), "--contact-sheet", str(tmp_path / "sheet.png")]) == 0
    assert f"Frames: {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (12 * 84, 16 + 8 * 84)
    assert main(["inspect", str(store), "--contact-sheet", str(tmp_path / "sheet.txt")]) == 1
    assert "--contact-sheet must name a .png file" in capsys.readouterr().err
    assert main(["verify", str(store)]) == 0
    assert capsys.readouterr().out == f"{store} is intact\n"

    file = store / "Pong" / "1" / "actions.u8"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(store)]) == 1
    captured = capsys.readouterr()
    assert "Pong, recording '1'" in captured.out and "CRC32" in captured.out and "1 damaged" in captured.err


@pytest.mark.parametrize(("content", "error"), [("/proc/self/mem", OSError), ("/dev/null", ValueError)])
def test_an_import_says_whether_its_failure_may_pass(dopamine, tmp_path, content, error):
    """Reading a process's memory at 0 is an input/output error, as of a file system that has its troubles."""
    source = tmp_path / "dqn"
    log = play(dopamine, source, "Pong")
    file = sorted(log.folder.glob("*observation*"))[0]
    file.unlink()
    file.symlink_to(content)
    with pytest.raises(error, match="1 of 1 games could not be imported"):
        run(
            [
                "import",
                "dqn-replay",
                str(source),
                "--games",
                "Pong",
                "--checkpoints",
                "0-1",
                "--out",
                str(tmp_path / "s"),
            ]
        )


def test_import_in_another_codec(dopamine, tmp_path, capsys):
    source, store = tmp_path / "dqn", tmp_path / "store"
    play(dopamine, source, "Pong")
    arguments = ["import", "dqn-replay", str(source), "--games", "Pong", "--checkpoints", "0-1", "--out", str(store)]
    assert main([*arguments, "--codec", "lz4"]) == 0
    assert FrameStore.open(store).encoding.codec == "lz4"
    assert main(arguments) == 0
    assert main([*arguments, "--codec", "zstd"]) == 1
    assert f"{store} is in lz4 already, got --codec zstd" in capsys.readouterr().err


@pytest.mark.parametrize("codec", [[], ["--codec", "lz4"]])
@pytest.mark.parametrize(
    ("folder", "message"), [("none", "does not exist"), (".", "1 of 1 games could not be imported")]
)
def test_nothing_is_left_of_an_import_that_brought_nothing(tmp_path, capsys, codec, folder, message):
    source, store = tmp_path / folder, tmp_path / "store"
    arguments = ["import", "dqn-replay", str(source), "--games", "Pong", "--checkpoints", "0-1", "--out", str(store)]
    assert main([*arguments, *codec]) == 1
    assert message in capsys.readouterr().err
    assert not store.exists()
    FrameStore.create(store)
    assert main(arguments) == 1
    assert FrameStore.open(store).games == ()  # somebody's own empty store stays


def test_verify_names_illegal_actions(store, lab, capsys):
    e = lab.make_episode(0, 4)
    with store.writer("Breakout", source="test") as writer:
        writer.add_episode(e.frames, [0, 2, 2, 5], e.rewards, True)
    assert main(["verify", str(store.path)]) == 0
    assert "Breakout, run '0': not legal in this game, act as NOOP: UP 2, DOWN 1" in capsys.readouterr().out


def test_a_failed_game_is_named_and_the_others_are_there(dopamine, tmp_path, capsys):
    source, store = tmp_path / "dqn", tmp_path / "store"
    play(dopamine, source, "Pong")
    broken = play(dopamine, source, "Qbert").folder / "$store$_action_ckpt.1.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    arguments = [
        "import",
        "dqn-replay",
        str(source),
        "--games",
        "Pong,Qbert",
        "--checkpoints",
        "0-1",
        "--out",
        str(store),
    ]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "Pong" in captured.out and "Qbert" not in captured.out
    assert "1 of 2 games could not be imported" in captured.err and broken.name in captured.err
    assert FrameStore.open(store).games == ("Pong",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dqn-replay"], "the following arguments are required: --games"),
        (["dqn-replay", "--games", "Pong", "--run", "one"], "argument --run: invalid int value: 'one'"),
        (["minari", "--checkpoints", "0-1"], "unrecognized arguments: --checkpoints 0-1"),
        (["torchrl-memmap", "--games", "Pong", "--gamma", "1"], "unrecognized arguments: --gamma 1"),
        (["rlds"], "invalid choice: 'rlds' (choose from 'dqn-replay', 'minari', 'torchrl-memmap')"),
    ],
)
def test_options_are_those_of_the_format(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["import", arguments[0], str(tmp_path), "--out", str(tmp_path / "store"), *arguments[1:]])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_every_format_is_documented():
    text = (ROOT / "docs" / "data.md").read_text()
    assert all(f"import {name} " in text for name in importers.formats())


def test_the_recipe_for_an_importer(tmp_path, monkeypatch, lab):
    """CONTRIBUTING's code is a module beside the others; the command line knows its format then."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("### An importer\n")[1].split("\n### ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "npz.py").write_text(code)
    monkeypatch.setattr(importers, "__path__", [*importers.__path__, str(tmp_path / "new")])
    (tmp_path / "mine" / "Pong").mkdir(parents=True)
    episodes = lab.make_episodes([(5, True, False), (3, True, False)])
    for index, e in enumerate(episodes):
        file = tmp_path / "mine" / "Pong" / f"{index}.npz"
        np.savez(file, frames=e.frames, actions=e.actions, rewards=e.rewards)
    arguments = ["import", "npz", str(tmp_path / "mine"), "--games", "Pong", "--out", str(tmp_path / "store")]
    try:
        assert main(arguments) == 0
    finally:
        sys.modules.pop("torchrl_sql.data.importers.npz", None)
    recording = FrameStore.open(tmp_path / "store").recording("Pong")
    np.testing.assert_array_equal(recording.rewards, np.concatenate([e.rewards for e in episodes]))
    np.testing.assert_array_equal(recording.actions, np.concatenate([e.actions for e in episodes]))
    frames = recording.open_frames()[: recording.num_frames].read().result()
    np.testing.assert_array_equal(frames, np.concatenate([e.frames for e in episodes]))
