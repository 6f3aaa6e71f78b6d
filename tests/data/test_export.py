from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage

from torchrl_sql.cli import main
from torchrl_sql.data import AtariFrameStorage, FrameStore, export


@pytest.mark.parametrize("n_steps", [1, 3])
def test_every_transition_comes_back_without_this_package(two_games, tmp_path, monkeypatch, n_steps):
    monkeypatch.setattr(export, "_NUM_TRANSITIONS_AT_ONCE", 7)
    storage = AtariFrameStorage(two_games, ["Pong", "Breakout"], n_steps=n_steps, transitions_per_game=18)
    done = []
    num_bytes = export.export_memmap(storage, tmp_path / "out", progress=lambda *counts: done.append(counts))
    loaded = TensorDict.load_memmap(tmp_path / "out")
    assert (loaded == storage[:]).all() and loaded.batch_size == (36,)
    assert done == [(7, 36), (14, 36), (21, 36), (28, 36), (35, 36), (36, 36)]
    assert json.loads((tmp_path / "out" / "games.json").read_text()) == ["Pong", "Breakout"]
    assert num_bytes == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.memmap"))
    batch = TensorDictReplayBuffer(storage=TensorStorage(loaded), batch_size=5).sample()
    assert (batch.exclude("index") == storage[batch["index"]]).all()


def test_what_is_in_the_way_stays(two_games, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out is there already"):
        export.export_memmap(AtariFrameStorage(two_games), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_exported_into_a_store(two_games):
    with pytest.raises(ValueError, match=r"the new folder must be outside of stores, but .* is one"):
        export.export_memmap(AtariFrameStorage(two_games), two_games.path / "out")
    assert not (two_games.path / "out").exists()


def test_nothing_appears_before_the_end_and_it_can_be_repeated(two_games, tmp_path):
    storage = AtariFrameStorage(two_games)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export_memmap(storage, tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.unfinished-export" / "left").mkdir(parents=True)  # by one that was killed
    (tmp_path / ".out.unfinished-export" / "left.memmap").touch()
    export.export_memmap(storage, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "meta.json", "games.json", "next", "observation.memmap", "action.memmap", "game_id.memmap",
        "steps_to_next_obs.memmap",
    }  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_two_exports_to_one_folder_do_not_disturb_each_other(two_games, tmp_path):
    storage = AtariFrameStorage(two_games, "Pong")

    def begin_another(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match=r"\.out\.unfinished-export is open in another writer"):
            export.export_memmap(storage, tmp_path / "out")

    export.export_memmap(storage, tmp_path / "out", progress=begin_another)
    assert (TensorDict.load_memmap(tmp_path / "out") == storage[:]).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_too_small_a_disk_is_noticed_before(two_games, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    left = tmp_path / ".out.unfinished-export" / "observation.memmap"  # of an attempt that was killed
    left.parent.mkdir()
    left.touch()

    def measured(path):
        assert not left.exists()  # its space is free again
        return usage(10**9, 10**9 - 10**6, 10**6)

    monkeypatch.setattr(shutil, "disk_usage", measured)
    with pytest.raises(OSError, match=r"out needs 4,518,960 bytes for 80 transitions, the disk has 1,000,000 free"):
        export.export_memmap(AtariFrameStorage(two_games), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_transition(tmp_path, lab):
    store = FrameStore.create(tmp_path / "store")
    lab.write(store, "Pong", lab.make_episodes([(1, False, False)]))  # Cut, and its final frame is not there.
    with pytest.raises(ValueError, match="has no transition to export"):
        export.export_memmap(AtariFrameStorage(store), tmp_path / "out")


def test_command_line(two_games, tmp_path, capsys):
    arguments = ["export", str(two_games.path), "--out", str(tmp_path / "out"), "--games", "Pong"]
    assert main([*arguments, "--first-fraction", "0.5", "--every-kth-episode", "1", "--n-steps", "2"]) == 0
    assert "30 transitions of Pong" in capsys.readouterr().out
    expected = AtariFrameStorage(two_games, "Pong", n_steps=2, first_fraction=0.5)[:]
    assert (TensorDict.load_memmap(tmp_path / "out") == expected).all()
    assert main(arguments) == 1
    assert "is there already" in capsys.readouterr().err
