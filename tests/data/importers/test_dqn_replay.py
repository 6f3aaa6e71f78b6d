"""What an import of DQN-Replay keeps."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, dqn_replay, import_dqn_replay, summary_table
from torchrl_sql.games import GAMES


def test_three_checkpoints_by_hand(dopamine, lab, log, tmp_path, small_store):
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    run = small_store.recording("Pong", "1")
    # B is around the last row of checkpoint 1, so it is stored after C; D's end is not there.
    assert run.episodes["num_steps"].tolist() == [1, 7, 2, 7]
    assert run.episodes["num_later"].tolist() == [0, 1, 0, 0] and run.first_steps().tolist() == [0, 3, 1, 10]
    assert run.episodes["terminated"].tolist() == [True, True, True, False]
    a, b, c, d = log.episodes
    frames = run.open_frames()[: run.num_frames].read().result()
    np.testing.assert_array_equal(frames, np.concatenate([a.frames, c.frames, b.frames, d.frames[:7]]))
    full = np.array([0, 1, 3, 4, 11, 12])  # Pong: NOOP, FIRE, RIGHT, LEFT, RIGHTFIRE, LEFTFIRE.
    np.testing.assert_array_equal(run.actions, full[np.concatenate([a.actions, c.actions, b.actions, d.actions[:7]])])
    np.testing.assert_array_equal(run.rewards, np.concatenate([a.rewards, c.rewards, b.rewards, d.rewards[:7]]))
    assert run.manifest.rewards == "clipped" and run.manifest.source == "DQN-Replay, Pong run 1, checkpoints 0-2"
    assert (summary.num_rows_read, summary.num_transitions, summary.num_episodes) == (30, 17, 3)
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
        path = log.folder / f"add_count_ckpt.{k}.gz"
        with gzip.open(path) as file:
            count = np.load(file)
        with gzip.open(path, "wb") as file:
            np.save(file, count % 10)
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-3")
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(4)))
    other = FrameStore.create(tmp_path / "other", chunk_frames=2, shard_frames=8)
    import_dqn_replay(tmp_path / "dqn", other.path, games="Pong", checkpoints="0,2")
    dopamine.check_same(dopamine.stored(other, "Pong"), dopamine.expected(log, "Pong", [0, 2]))


def test_final_flush_alone_and_first_checkpoint_missing(dopamine, log, tmp_path, small_store):
    """Without the checkpoint before, how the first episode began is unknown."""
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="1-2")
    assert summary.dropped == {"episode start missing": 5, "padding": 6}
    assert small_store.recording("Pong").episodes["num_steps"].tolist() == [2, 7]
    with pytest.raises(ImportFailedError, match="checkpoints 3: there is no episode in it"):
        import_dqn_replay(tmp_path / "dqn", tmp_path / "other", games="Pong", checkpoints="3")
    assert FrameStore.open(tmp_path / "other").games == ()


def test_checkpoint_left_out_cuts_the_episode(dopamine, log, tmp_path, small_store):
    """Rows 0-8 and 19-28: B is cut; whether rows 19-21 are padding or black frames shows only in the row before."""
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints=[0, 2])
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", [0, 2]))
    assert small_store.recording("Pong").episodes["num_steps"].tolist() == [1, 2]
    assert summary.num_cut == 1
    assert summary.dropped == {"past the cursor": 1, "padding": 6, "episode start missing": 10}
    assert small_store.recording("Pong").manifest.source == "DQN-Replay, Pong run 1, checkpoints 0,2"


def test_lost_lap_is_noticed(dopamine, tmp_path, small_store, caplog):
    """B's first call writes rows 16-19: the cursor never stands at 19 between two calls, so that lap is not logged."""
    log = dopamine.new_log(tmp_path / "dqn")
    for num_steps in (13, 14, 3):  # Rows 0-15, 16-32, 33-38.
        log.play(num_steps)
    assert log.logged == [(0, 9), (19, 29), (29, 39)]
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    assert "_ckpt.1.gz does not continue" in caplog.text
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(log, "Pong", range(3)))
    assert small_store.recording("Pong").episodes["num_steps"].tolist() == [6, 3]
    assert summary.dropped == {"past the cursor": 1, "padding": 6, "episode start missing": 14}


def test_time_outs_are_truncated(dopamine, lab, tmp_path, small_store):
    log = dopamine.new_log(tmp_path / "dqn", capacity=50)
    for num_steps in (6, 7, 6, 5, 7):
        log.play(num_steps)
    log.log_final()
    (summary,) = import_dqn_replay(
        tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0", max_episode_steps=7
    )
    assert (summary.num_truncated, summary.num_cut) == (2, 0)
    assert small_store.recording("Pong").episodes["terminated"].tolist() == [True, False, True, True, False]
    assert summary.mean_clipped_return == sum(e.rewards.sum() for e in log.episodes) / 5
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", [0], limit=7), lab)


def test_black_frames_are_not_padding(dopamine, lab, tmp_path, small_store):
    log = dopamine.new_log(tmp_path / "dqn", capacity=40)
    log.play(9, black_frames=range(0, 7))
    log.play(20)
    log.log_final()
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    assert summary.dropped == {"past the cursor": 5, "padding": 6}
    run = small_store.recording("Pong")
    assert run.episodes["num_steps"].tolist() == [9, 20]
    np.testing.assert_array_equal(run.open_frames()[:9].read().result(), log.episodes[0].frames)


def test_episode_longer_than_a_checkpoint(dopamine, lab, tmp_path, small_store):
    log = dopamine.new_log(tmp_path / "dqn")
    for num_steps in (2, 35, 4, 8):
        log.play(num_steps)
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints=range(len(log.logged)))
    dopamine.check_transitions(small_store, "Pong", dopamine.expected(log, "Pong", range(len(log.logged))), lab)


@pytest.mark.parametrize("game", ["Breakout", "Freeway", "MsPacman", "Boxing"])
def test_minimal_actions_become_full_ones(dopamine, tmp_path, small_store, game):
    log = dopamine.new_log(tmp_path / "dqn", game=game, capacity=40)
    log.play(30)
    log.log_final()
    import_dqn_replay(tmp_path / "dqn", small_store.path, games=game, checkpoints="0")
    expected = [GAMES[game].minimal_actions[action] for action in log.episodes[0].actions]
    np.testing.assert_array_equal(small_store.recording(game).actions, expected)


def test_several_games_and_runs(dopamine, tmp_path, small_store):
    logs = {}
    for seed, (game, run) in enumerate([("Pong", 1), ("Breakout", 1), ("Pong", 2)]):
        logs[game, run] = dopamine.new_log(tmp_path / "dqn", game=game, run=run, capacity=20, seed=seed)
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
