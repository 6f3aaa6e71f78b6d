from __future__ import annotations

from PIL import Image

from torchrl_sql.cli import main
from torchrl_sql.data import FrameStore
from torchrl_sql.games import GAMES


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
    assert "is intact" in capsys.readouterr().out

    file = store / "Pong" / "1" / "actions.u8"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(store)]) == 1
    captured = capsys.readouterr()
    assert "Pong, recording '1'" in captured.out and "CRC32" in captured.out and "1 damaged" in captured.err


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


def test_games_are_needed(tmp_path, capsys):
    assert main(["import", "dqn-replay", str(tmp_path), "--out", str(tmp_path / "store")]) == 1
    assert "--games must be given" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
