from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, dqn_replay, import_dqn_replay, summary_table
from torchrl_sql.games import GAMES


def new_log(dopamine, root, *, game="Pong", run=1, capacity=10, seed=0, **kwargs):
    folder = root / game / str(run) / "replay_logs"
    return dopamine.Log(folder, capacity, len(GAMES[game].minimal_actions), seed, **kwargs)


@pytest.fixture
def log(dopamine, tmp_path):
    """Rows: A 0-3 (1 step), B 4-13 (7), C 14-18 (2), D 19-30 (9); logged at 9, 19, 29 and, finally, 31."""
    log = new_log(dopamine, tmp_path / "dqn")
    for num_steps in (1, 7, 2, 9):
        log.play(num_steps)
    log.log_final()
    assert log.logged == [(0, 9), (9, 19), (19, 29), (29, 31)]
    return log


@pytest.fixture
def small_store(tmp_path):
    return FrameStore.create(tmp_path / "store", chunk_frames=2, shard_frames=8)


def test_three_checkpoints_by_hand(dopamine, lab, log, tmp_path, small_store):
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    run = small_store.run("Pong", "1")
    # B is around the last row of checkpoint 1, so it comes after C; D's end is not there.
    assert run.episodes["num_steps"].tolist() == [1, 2, 7, 7]
    assert run.episodes["terminated"].tolist() == [True, True, True, False]
    a, b, c, d = log.episodes
    frames = run.open_frames()[: run.num_frames].read().result()
    np.testing.assert_array_equal(frames, np.concatenate([a.frames, c.frames, b.frames, d.frames[:7]]))
    full = np.array([0, 1, 3, 4, 11, 12])  # Pong: NOOP, FIRE, RIGHT, LEFT, RIGHTFIRE, LEFTFIRE.
    np.testing.assert_array_equal(run.actions, full[np.concatenate([a.actions, c.actions, b.actions, d.actions[:7]])])
    np.testing.assert_array_equal(run.rewards, np.concatenate([a.rewards, c.rewards, b.rewards, d.rewards[:7]]))
    assert run.manifest.rewards == "clipped" and run.manifest.source == "DQN-Replay, Pong run 1, checkpoints 0-2"
    assert (summary.num_rows_read, summary.num_transitions, summary.num_episodes) == (30, 17, 4)
    assert summary.dropped == {"past the cursor": 1, "padding": 12}
    assert (summary.num_truncated, summary.num_cut) == (0, 1)
    assert summary.mean_clipped_return == (a.rewards.sum() + b.rewards.sum() + c.rewards.sum()) / 3
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", [0, 1, 2]), lab)


def test_final_flush_completes_the_open_episode(dopamine, lab, log, tmp_path, small_store):
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    assert (summary.num_rows_read, summary.num_transitions, summary.num_cut) == (40, 19, 0)
    assert summary.dropped == {"past the cursor": 1 + 8, "padding": 12}
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", range(4)), lab)


def test_add_count_modulo_capacity(dopamine, log, tmp_path, small_store):
    """As :meth:`log_final` writes it; the checkpoint's number then tells the lap."""
    for k in (1, 2):
        rewrite(lambda a: a % 10)(log.folder / f"add_count_ckpt.{k}.gz")
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(4)))
    other = FrameStore.create(tmp_path / "other", chunk_frames=2, shard_frames=8)
    import_dqn_replay(tmp_path / "dqn", other.path, games="Pong", checkpoints="0,2")
    dopamine.check_same(dopamine.stored(other, "Pong"), dopamine.expected(log, "Pong", [0, 2]))


def test_final_flush_alone_and_first_checkpoint_missing(dopamine, log, tmp_path, small_store):
    """Without the checkpoint before, how the first episode began is unknown."""
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="1-2")
    assert summary.dropped == {"episode start missing": 5, "padding": 6}
    assert small_store.run("Pong").episodes["num_steps"].tolist() == [2, 7]
    with pytest.raises(ImportFailedError, match="checkpoints 3: there is no episode in it"):
        import_dqn_replay(tmp_path / "dqn", tmp_path / "other", games="Pong", checkpoints="3")
    assert FrameStore.open(tmp_path / "other").games == ()


def test_checkpoint_left_out_cuts_the_episode(dopamine, log, tmp_path, small_store):
    """Rows 0-8 and 19-28: B is cut; whether rows 19-21 are padding or black frames shows only in the row before."""
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints=[0, 2])
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 2]))
    assert small_store.run("Pong").episodes["num_steps"].tolist() == [1, 2]
    assert summary.num_cut == 1
    assert summary.dropped == {"past the cursor": 1, "padding": 6, "episode start missing": 10}
    assert small_store.run("Pong").manifest.source == "DQN-Replay, Pong run 1, checkpoints 0,2"


def test_lost_lap_is_noticed(dopamine, tmp_path, small_store, caplog):
    """B's first call writes rows 16-19: the cursor never stands at 19 between two calls, so that lap is not logged."""
    log = new_log(dopamine, tmp_path / "dqn")
    for num_steps in (13, 14, 3):  # Rows 0-15, 16-32, 33-38.
        log.play(num_steps)
    assert log.logged == [(0, 9), (19, 29), (29, 39)]
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    assert "_ckpt.1.gz does not continue" in caplog.text
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(3)))
    assert small_store.run("Pong").episodes["num_steps"].tolist() == [6, 3]
    assert summary.dropped == {"past the cursor": 1, "padding": 6, "episode start missing": 14}


def test_time_outs_are_truncated(dopamine, lab, tmp_path, small_store):
    log = new_log(dopamine, tmp_path / "dqn", capacity=50)
    for num_steps in (6, 7, 6, 5, 7):
        log.play(num_steps)
    log.log_final()
    (summary,) = import_dqn_replay(
        tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0", max_episode_steps=7
    )
    assert (summary.num_truncated, summary.num_cut) == (2, 0)
    assert small_store.run("Pong").episodes["terminated"].tolist() == [True, False, True, True, False]
    assert summary.mean_clipped_return == sum(e.rewards.sum() for e in log.episodes) / 5
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", [0], limit=7), lab)


def test_black_frames_are_not_padding(dopamine, lab, tmp_path, small_store):
    log = new_log(dopamine, tmp_path / "dqn", capacity=40)
    log.play(9, black_frames=range(0, 7))
    log.play(20)
    log.log_final()
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    assert summary.dropped == {"past the cursor": 5, "padding": 6}
    run = small_store.run("Pong")
    assert run.episodes["num_steps"].tolist() == [9, 20]
    np.testing.assert_array_equal(run.open_frames()[:9].read().result(), log.episodes[0].frames)


def test_episode_longer_than_a_checkpoint(dopamine, lab, tmp_path, small_store):
    log = new_log(dopamine, tmp_path / "dqn")
    for num_steps in (2, 35, 4, 8):
        log.play(num_steps)
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints=range(len(log.logged)))
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", range(len(log.logged))), lab)


@pytest.mark.parametrize("game", ["Breakout", "Freeway", "MsPacman", "Boxing"])
def test_minimal_actions_become_full_ones(dopamine, tmp_path, small_store, game):
    log = new_log(dopamine, tmp_path / "dqn", game=game, capacity=40)
    log.play(30)
    log.log_final()
    import_dqn_replay(tmp_path / "dqn", small_store.path, games=game, checkpoints="0")
    expected = [GAMES[game].minimal_actions[action] for action in log.episodes[0].actions]
    np.testing.assert_array_equal(small_store.run(game).actions, expected)


def test_several_games_and_runs(dopamine, tmp_path, small_store):
    logs = {}
    for seed, (game, run) in enumerate([("Pong", 1), ("Breakout", 1), ("Pong", 2)]):
        logs[game, run] = new_log(dopamine, tmp_path / "dqn", game=game, run=run, capacity=20, seed=seed)
        for num_steps in (5, 8, 7 + seed, 20):
            logs[game, run].play(num_steps)
    for run, games in ((1, "Pong,Breakout"), (2, ["Pong"])):
        summaries = import_dqn_replay(tmp_path / "dqn", small_store.path, games=games, run=run, checkpoints="0-1")
        assert [s.game for s in summaries] == (games.split(",") if isinstance(games, str) else games)
    for (game, run), log in logs.items():
        expected = dopamine.expected(log, game, [0, 1])
        dopamine.check_same(dopamine.stored(small_store, game, str(run)), expected)
    assert not (small_store.path / ".importing").exists()


def test_summary_table(dopamine, log, tmp_path, small_store):
    summaries = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    header, line = summary_table(summaries).splitlines()
    assert header.split("  ")[0] == "game"
    mean = sum(e.rewards.sum() for e in log.episodes) / 4
    assert line.split() == ["Pong", "1", "40", "19", "12", "9", "4", "0", "0", f"{mean:.2f}"]
    for name in ("rows read", "transitions", "dropped: padding", "episodes", "mean clipped return"):
        assert name in header


def test_object_stores_are_read_through_fsspec(dopamine, log, lab, tmp_path, small_store):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "dqn"), "/bucket/dqn", recursive=True)
    try:
        import_dqn_replay("memory://bucket/dqn", small_store.path, games="Pong", checkpoints="0-3")
    finally:
        memory.rm("/bucket", recursive=True)
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(4)))


def test_urls_without_fsspec(monkeypatch, tmp_path):
    monkeypatch.setattr(dqn_replay, "fsspec", None)
    message = r"gs://bucket/dqn cannot be read: fsspec is not installed .*pip install 'torchrl-sql\[fsspec\]'"
    with pytest.raises(ImportError, match=message):
        import_dqn_replay("gs://bucket/dqn", tmp_path / "store", games="Pong")
    assert not (tmp_path / "store").exists()


def test_urls_without_the_driver(monkeypatch, tmp_path):
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # As if it were not installed.
    with pytest.raises(ImportError, match=r"gs://bucket/dqn cannot be read: .*gcsfs.*'torchrl-sql\[fsspec\]'"):
        import_dqn_replay("gs://bucket/dqn", tmp_path / "store", games="Pong")
    assert not (tmp_path / "store").exists()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"games": "Pongg"}, "did you mean Pong"),
        ({"checkpoints": "9-0"}, "checkpoints must be ascending numbers"),
        ({"checkpoints": "0-x"}, "checkpoints must be like '0-9' or '0-3,5', got '0-x'"),
        ({"checkpoints": ""}, "checkpoints must be like"),
        ({"checkpoints": [3, 3]}, "checkpoints must be ascending"),
        ({"checkpoints": [-1]}, "checkpoints must be ascending"),
        ({"run": 0}, "run must be >= 1, got 0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments(log, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        import_dqn_replay(tmp_path / "dqn", tmp_path / "store", **{"games": "Pong", **arguments})
    assert not (tmp_path / "store").exists()


def test_missing_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_dqn_replay(tmp_path / "nowhere", tmp_path / "store", games="Pong")
    assert not (tmp_path / "store").exists()


def rewrite(change):
    """A damage that changes one array and writes it again."""

    def damage(path: Path) -> None:
        with gzip.open(path) as file:
            array = np.load(file)
        with gzip.open(path, "wb") as file:
            np.save(file, change(array), allow_pickle=True)

    return damage


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return rewrite(change)


def rezip(change):
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


OBSERVATION, ACTION = "$store$_observation_ckpt.1.gz", "$store$_action_ckpt.1.gz"
REWARD, TERMINAL = "$store$_reward_ckpt.1.gz", "$store$_terminal_ckpt.1.gz"
DAMAGES = [
    (OBSERVATION, os.unlink, r"lacks \$store\$_observation_ckpt\.1\.gz$"),
    ("invalid_range_ckpt.1.gz", os.unlink, r"lacks invalid_range_ckpt\.1\.gz$"),
    (OBSERVATION, lambda p: os.truncate(p, p.stat().st_size - 20), "is truncated: Compressed file ended"),
    (OBSERVATION, lambda p: os.truncate(p, 40), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: os.truncate(p, 0), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: p.write_bytes(b"not gzip at all"), "is damaged: Not a gzipped file"),
    (OBSERVATION, lambda p: p.write_bytes(p.read_bytes() + b"tail"), "is (truncated|damaged)"),
    (OBSERVATION, lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)), "is damaged: CRC check failed"),
    (OBSERVATION, rezip(lambda data: data[:-10]), "is damaged: it ends before the array"),
    (OBSERVATION, rezip(lambda data: data + b"x"), "is damaged: it goes on after the array"),
    (OBSERVATION, rezip(lambda data: b"PK" + data), "is damaged: the magic string is not correct"),
    (OBSERVATION, rezip(lambda data: data[:6] + b"\x03" + data[7:]), r"is damaged: it has \.npy version \(3, 0\)"),
    (ACTION, rezip(lambda data: data[:-4]), "is damaged: it ends before the array"),
    (OBSERVATION, rewrite(lambda a: a[:, :, :80]), r"must be uint8 \[10, 84, 84\], got uint8 \[10, 84, 80\]"),
    (OBSERVATION, rewrite(lambda a: a.astype(np.float32)), r"must be uint8 \[10, 84, 84\], got float32"),
    (OBSERVATION, rewrite(lambda a: a[:9]), r"got uint8 \[9, 84, 84\]"),
    (OBSERVATION, rewrite(np.asfortranarray), "Fortran order"),
    (ACTION, rewrite(lambda a: a.astype(np.int64)), r"must be int32 \[10\], got int64 \[10\]"),
    (ACTION, rewrite(lambda a: a.astype(object)), "is damaged: it holds Python objects"),
    (REWARD, rewrite(lambda a: a[:, None]), r"must be float32 \[10\], got float32 \[10, 1\]"),
    (TERMINAL, rewrite(lambda a: a[:5]), r"must be uint8 \[10\], got uint8 \[5\]"),
    (ACTION, put(3, 6), r"row 3 must be in 0\.\.5, the minimal actions of Pong, got 6"),
    (ACTION, put(9, -1), r"row 9 must be in 0\.\.5, the minimal actions of Pong, got -1"),
    (REWARD, put(2, 7.0), r"row 2 must be clipped to \[-1, 1\], got 7\.0"),
    (REWARD, put(2, np.nan), r"row 2 must be clipped to \[-1, 1\], got nan"),
    (TERMINAL, put(0, 2), "row 0 must be 0 or 1, got 2"),
    (TERMINAL, put(5, 1), "row 5 must be padding .* but is terminal"),
    (TERMINAL, put(3, 0), "an episode has more than 9 steps .it starts at row 4 of .*_ckpt.0.gz."),
    (OBSERVATION, put(5, 1), "row 5 must be padding"),
    (ACTION, put(5, 1), "row 5 must be padding"),
    (REWARD, put(5, 1), "row 5 must be padding"),
    ("add_count_ckpt.1.gz", rewrite(lambda a: a[None]), r"must be one integer, got int64 \[1\]"),
    ("add_count_ckpt.1.gz", rewrite(lambda a: a - 1), r"cursor at row 8, but invalid_range is \[8, 9, 0, 1, 2\]"),
    ("invalid_range_ckpt.1.gz", rewrite(lambda a: a[:4]), "but invalid_range is"),
    ("invalid_range_ckpt.1.gz", rewrite(lambda a: a * 1.0), r"must be integers \[horizon \+ 4\], got float64"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_files_are_named_and_other_games_go_on(
    dopamine, log, tmp_path, small_store, lab, name, damage, message
):
    other = new_log(dopamine, tmp_path / "dqn", game="Breakout", capacity=10)
    for num_steps in (3, 4, 3, 8, 2):
        other.play(num_steps)
    with small_store.writer("Pong", run="mine", source="test") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    shutil.copytree(log.folder, tmp_path / "good")
    damage(log.folder / name)
    arguments = {"games": "Pong,Breakout", "checkpoints": "0-1", "max_episode_steps": 9}
    with pytest.raises(ImportFailedError, match=message) as error:
        import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    assert set(error.value.failures) == {"Pong"}
    assert name in str(error.value) or f"_ckpt.{name[-4]}.gz" in str(error.value)
    assert [s.game for s in error.value.summaries] == ["Breakout"]
    assert [(run.game, run.name) for run in small_store.runs] == [("Breakout", "1"), ("Pong", "mine")]
    after = lab.tree(small_store.path)
    assert {path: after[path] for path in before} == before
    dopamine.check_same(dopamine.stored(small_store, "Breakout"), dopamine.expected(other, "Breakout", [0, 1]))

    shutil.rmtree(log.folder)
    shutil.copytree(tmp_path / "good", log.folder)  # Downloaded again: the import goes on and completes.
    assert len(import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)) == 2
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 1]))


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d[0] == OBSERVATION and "damaged" in d[2]])
def test_gzip_damages_without_zlib_ng(log, monkeypatch, damage):
    monkeypatch.setattr(dqn_replay, "_open_gzip", gzip.GzipFile)
    monkeypatch.setattr(dqn_replay, "_damage_errors", (ValueError, gzip.BadGzipFile, zlib.error))
    name, damage_file, message = damage
    damage_file(log.folder / name)
    folder = dqn_replay._Folder(str(log.folder))
    with pytest.raises(ValueError, match=message), dqn_replay._open_array(folder, name) as array:
        array.read_all()


def test_checkpoints_in_the_wrong_order(log, tmp_path, small_store):
    rewrite(lambda a: a - 10)(log.folder / "add_count_ckpt.2.gz")
    with pytest.raises(ImportFailedError, match=r"_ckpt\.2\.gz: add_count 19 is not after that of .*_ckpt\.1\.gz"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")


def test_padding_in_the_oldest_row(dopamine, tmp_path, small_store):
    """B's first padding row is row 9 of checkpoint 1: its scalars are checked at once, its frame at the end."""
    log = new_log(dopamine, tmp_path / "dqn")
    log.play(6)
    log.play(12)
    assert log.logged == [(0, 9), (9, 19)]
    for member in ("observation", "action"):
        name = f"$store$_{member}_ckpt.1.gz"
        good = (log.folder / name).read_bytes()
        put(9, 1)(log.folder / name)
        with pytest.raises(ImportFailedError, match=rf"{member}_ckpt\.1\.gz: row 9 must be padding"):
            import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
        (log.folder / name).write_bytes(good)
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 1]))


def test_no_pickle_is_ever_loaded(log, tmp_path, small_store):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    rewrite(lambda a: np.array(Bomb(), dtype=object))(log.folder / "add_count_ckpt.1.gz")
    with pytest.raises(ImportFailedError, match="it holds Python objects"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


def test_missing_game_folder(log, tmp_path, small_store):
    with pytest.raises(ImportFailedError, match=r"No such file or directory: .*Seaquest/1/replay_logs") as error:
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Seaquest,Pong", checkpoints="0-1")
    assert [s.game for s in error.value.summaries] == ["Pong"]


def test_runs_in_the_way_are_left_alone(log, tmp_path, small_store, lab):
    with small_store.writer("Pong", run="1", source="my own agent") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    with pytest.raises(ImportFailedError, match="Pong/1 is there already, from my own agent"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    assert lab.tree(small_store.path) == before
    (small_store.path / "Pong" / "1" / "manifest.json").unlink()
    with pytest.raises(ImportFailedError, match="Pong/1 is in the way: it has files but no manifest"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")


def test_full_disk_leaves_the_old_store(dopamine, log, tmp_path, small_store, lab):
    with small_store.writer("Pong", run="mine", source="test") as writer:
        lab.add(writer, lab.make_episodes([(5, True, False)]))
    before = lab.tree(small_store.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ImportFailedError, match=r"(?i)Pong: .*(file too large|file size limit)"):
            import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: data for path, data in lab.tree(small_store.path).items() if ".importing" not in path} == before
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(4)))


def test_no_permission(dopamine, lab, public_folder, read_only):
    log = new_log(dopamine, public_folder / "dqn")
    while not log.logged:
        log.play(4)
    store = FrameStore.create(public_folder / "store", chunk_frames=2, shard_frames=8)
    lab.write(store, "Breakout", lab.make_episodes([(5, True, False)]))
    before = lab.tree(store.path)
    with read_only(store.path), pytest.raises(ImportFailedError, match=r"Pong: .*Permission denied: .*/store/"):
        import_dqn_replay(public_folder / "dqn", store.path, games="Pong", checkpoints="0")
    assert lab.tree(store.path) == before


def test_other_checkpoints_of_a_finished_or_unfinished_import(log, tmp_path, small_store):
    os.rename(log.folder / OBSERVATION, tmp_path / "away")
    (log.folder / OBSERVATION).write_bytes(b"")
    with pytest.raises(ImportFailedError):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    with pytest.raises(
        ImportFailedError, match=r"unfinished import of DQN-Replay, Pong run 1, checkpoints 0-1: finish"
    ):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    os.rename(tmp_path / "away", log.folder / OBSERVATION)
    done = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    shutil.rmtree(tmp_path / "dqn" / "Pong")  # Not needed any more.
    assert import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1") == done
    with pytest.raises(ImportFailedError, match="is there already, from DQN-Replay, Pong run 1, checkpoints 0-1"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")


# Resuming


def test_stopped_at_any_read_or_write_it_continues_to_the_same_bytes(dopamine, log, lab, tmp_path, monkeypatch):
    arguments = {"games": "Pong", "checkpoints": "0-3"}
    whole = FrameStore.create(tmp_path / "whole", chunk_frames=2, shard_frames=8)
    import_dqn_replay(tmp_path / "dqn", whole.path, **arguments)
    expected = lab.tree(whole.path)

    class Stopped(OSError):
        pass

    def import_until(step: int) -> bool:
        """Fails at the given call of the functions that touch the disk, as a kill would; False if there are fewer."""
        calls = iter(range(step))

        def watched(function):
            def call(*args, **kwargs):
                if next(calls, None) is None:
                    raise Stopped
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(dqn_replay._Array, "read_into", watched(dqn_replay._Array.read_into))
            for name in ("rename", "replace", "fsync"):
                patch.setattr(os, name, watched(getattr(os, name)))
            try:
                import_dqn_replay(tmp_path / "dqn", part.path, **arguments)
            except ImportFailedError:
                return True
        return False

    step, num_states = 0, set()
    while True:
        part = FrameStore.create(tmp_path / f"part{step}", chunk_frames=2, shard_frames=8)
        if not import_until(step):
            break
        staged = part.path / ".importing" / "Pong" / "1" / "manifest.json"
        num_states.add(json.loads(staged.read_text())["num_steps"] if staged.exists() else None)
        assert part.games in ((), ("Pong",)) and (not part.games or not staged.exists())
        import_until(step // 2)  # Stopped once more, somewhere else.
        import_dqn_replay(tmp_path / "dqn", part.path, **arguments)
        assert lab.tree(part.path) == expected
        shutil.rmtree(part.path)
        step += 5
    assert step > 60 and num_states == {None, 1, 10, 19}


DRIVER = """
import sys
from torchrl_sql.data.importers import import_dqn_replay
if __name__ == "__main__":
    import_dqn_replay(sys.argv[1], sys.argv[2], games="Pong,Breakout", checkpoints="0-3", workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_and_again(dopamine, lab, tmp_path, workers):
    """A real kill of the parent at some instant; its workers must not outlive it, or they would hold the runs."""
    for seed, game in enumerate(("Pong", "Breakout")):
        log = new_log(dopamine, tmp_path / "dqn", game=game, capacity=4000, seed=seed)
        while len(log.logged) < 4:
            log.play(700)
    arguments = {"games": "Pong,Breakout", "checkpoints": "0-3"}
    settings = {"chunk_frames": 16, "shard_frames": 256}
    whole = FrameStore.create(tmp_path / "whole", **settings)
    import_dqn_replay(tmp_path / "dqn", whole.path, **arguments)
    part = FrameStore.create(tmp_path / "part", **settings)
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, tmp_path / "driver.py", tmp_path / "dqn", part.path, str(workers)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(part.path.glob(".importing/*/1/frames/zarr.json")) and child.poll() is None:
            time.sleep(0.005)
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 20
        while num_running(child.pid):
            assert time.monotonic() < deadline, "workers outlive the process that started them"
            time.sleep(0.05)
    finally:
        if num_running(child.pid):
            os.killpg(child.pid, signal.SIGKILL)
    import_dqn_replay(tmp_path / "dqn", part.path, **arguments)
    assert lab.tree(part.path) == lab.tree(whole.path)


def num_running(process_group: int) -> int:
    """Processes of a group that are not zombies."""
    running = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # It ended meanwhile.
            continue
        running += int(group) == process_group and state != "Z"
    return running


def test_memory_does_not_grow_with_the_checkpoint(dopamine, tmp_path):
    """Peak of what Python and NumPy allocate, for 20,000 rows (141 MB) in episodes of 500 steps (3.5 MB)."""
    log = new_log(dopamine, tmp_path / "dqn", capacity=20_000)
    while not log.logged:
        log.play(500)
    store = FrameStore.create(tmp_path / "store", chunk_frames=16, shard_frames=1024)
    tracemalloc.start()
    try:
        import_dqn_replay(tmp_path / "dqn", store.path, games="Pong", checkpoints="0")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6


# Properties


@st.composite
def logs(draw, dopamine, folder):
    """A log of random episodes, and which of its checkpoints to import."""
    capacity, limit = draw(st.integers(8, 40)), draw(st.sampled_from([27_000, 30, 12]))
    log = new_log(dopamine, folder / "dqn", capacity=capacity, looks_at_every_row=draw(st.booleans()))
    for num_steps in draw(st.lists(st.integers(1, 30), min_size=2, max_size=12)):
        log.play(min(num_steps, limit))
    laps = [(max(k * capacity - 1, 0), (k + 1) * capacity - 1) for k in range((log.add_count + 1) // capacity)]
    # Final flushes of which add_count says too little: after a lost lap, and with no row since the last checkpoint.
    if log.logged == laps and [log.add_count] != [end for _, end in laps[-1:]] and draw(st.booleans()):
        log.log_final()
    assume(log.logged)
    numbers = range(len(log.logged))
    chosen = draw(st.one_of(st.just(set(numbers)), st.sets(st.sampled_from(numbers), min_size=1)))
    return log, {"games": "Pong", "checkpoints": sorted(chosen), "max_episode_steps": limit}


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_episodes_across_any_borders(dopamine, lab, data):
    """The store holds what was played, transition by transition, and every row is accounted for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, arguments = data.draw(logs(dopamine, folder))
        checkpoints = arguments["checkpoints"]
        expected = dopamine.expected(log, "Pong", checkpoints, limit=arguments["max_episode_steps"])
        store = FrameStore.create(folder / "store", chunk_frames=2, shard_frames=8)
        if not expected:
            with pytest.raises(ImportFailedError, match="there is no episode in it"):
                import_dqn_replay(folder / "dqn", store.path, **arguments)
            return
        (summary,) = import_dqn_replay(folder / "dqn", store.path, **arguments)
        dopamine.check_same(dopamine.stored(store, "Pong"), expected)
        dopamine.check_transitions(store, "Pong", expected, lab)
        assert summary.num_rows_read == log.capacity * len(checkpoints)
        assert summary.num_transitions == sum(len(e.actions) for e in expected)
        assert summary.num_truncated + summary.num_cut == sum(not e.terminated for e in expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_import_stopped_anywhere_continues(dopamine, lab, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, arguments = data.draw(logs(dopamine, folder))
        checkpoints = arguments["checkpoints"]
        assume(dopamine.expected(log, "Pong", checkpoints, limit=arguments["max_episode_steps"]))
        whole, part = (
            FrameStore.create(folder / name, chunk_frames=2, shard_frames=8).path for name in ("whole", "part")
        )
        summaries = import_dqn_replay(folder / "dqn", whole, **arguments)
        for stop in sorted(data.draw(st.lists(st.sampled_from(checkpoints), min_size=1, max_size=3))):
            file = log.folder / f"$store$_observation_ckpt.{stop}.gz"
            good = file.read_bytes()
            file.write_bytes(good[:-3])  # Everything can be read, but for the end of the checksum.
            with pytest.raises(ImportFailedError, match="is truncated"):
                import_dqn_replay(folder / "dqn", part, **arguments)
            file.write_bytes(good)
        assert repr(import_dqn_replay(folder / "dqn", part, **arguments)) == repr(summaries)  # NaN is not NaN.
        assert lab.tree(part) == lab.tree(whole)
