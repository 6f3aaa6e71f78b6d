"""Stores in the file format of DQN-Replay, and back."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.cli import main
from torchrl_sql.data import FrameStore, export_dqn_replay
from torchrl_sql.data.importers import import_dqn_replay
from torchrl_sql.games import GAMES


def write(store, lab, shapes, *, run="0", rewards="raw", cut_last=False, final=False, labels=()):
    """Episodes of (num_steps, terminated), with Pong's own actions and distinct frames; ``final``: also of what is seen
    after a time-out.
    """
    episodes = lab.make_episodes([(steps, terminated, final and not terminated) for steps, terminated in shapes])
    with store.writer("Pong", run=run, source="test", rewards=rewards, labels=labels) as writer:
        for index, e in enumerate(episodes):
            e.actions[:] = np.array(GAMES["Pong"].minimal_actions)[e.actions % 6]
            e.rewards[:] = np.clip(e.rewards, -1, 1) if rewards == "clipped" else e.rewards
            cut = cut_last and index == len(episodes) - 1 and not e.terminated
            values = dict.fromkeys(labels, float(index))
            writer.add_episode(e.frames, e.actions, e.rewards, e.terminated, cut=cut, labels=values)
    return episodes


def read(folder, name):
    with gzip.open(folder / name) as file:
        return np.load(file)


def test_files_by_hand(lab, tmp_path, small_store):
    """Rows: A 0-4 (2 steps), B 5-8 (1 step), C 9-14 (3). A ring of 8: checkpoints after 7 and 15 rows, no flush."""
    a, b, c = write(small_store, lab, [(2, True), (1, True), (3, True)])
    (folder,) = export_dqn_replay(small_store, tmp_path / "log", num_rows=8)
    assert folder == tmp_path / "log" / "Pong" / "1" / "replay_logs"
    members = [f"$store$_{name}" for name in ("action", "observation", "reward", "terminal")]
    names = {f"{name}_ckpt.{k}.gz" for name in [*members, "add_count", "invalid_range"] for k in (0, 1)}
    assert {file.name for file in folder.iterdir()} == names
    assert [int(read(folder, f"add_count_ckpt.{k}.gz")) for k in (0, 1)] == [7, 15]
    assert read(folder, "invalid_range_ckpt.1.gz").tolist() == [6, 7, 0, 1, 2]
    assert read(folder, "$store$_terminal_ckpt.0.gz").tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    # Row 7 of the second checkpoint is the one before its row 0: B's last padding row.
    assert read(folder, "$store$_terminal_ckpt.1.gz").tolist() == [1, 0, 0, 0, 0, 0, 1, 0]
    frames = read(folder, "$store$_observation_ckpt.1.gz")
    black = np.zeros((1, 84, 84), np.uint8)
    np.testing.assert_array_equal(frames, np.concatenate([b.frames, *3 * [black], c.frames, black]))
    np.testing.assert_array_equal(read(folder, "$store$_reward_ckpt.0.gz")[3:5], a.rewards)


def test_recordings_without_episodes_are_left_out_and_named(lab, tmp_path, small_store, caplog):
    with small_store.writer("Pong", run="0", source="test") as writer:
        writer.commit(metadata={})
    with pytest.raises(ValueError, match="has no episodes to export"):
        export_dqn_replay(small_store, tmp_path / "log")
    write(small_store, lab, [(2, True)], run="1")
    assert export_dqn_replay(small_store, tmp_path / "log") == [tmp_path / "log" / "Pong" / "1" / "replay_logs"]
    assert "Pong, run '0' has no episodes: it is left out" in caplog.messages


def test_an_export_that_failed_leaves_nothing(lab, tmp_path, small_store):
    write(small_store, lab, [(2, True)])

    def fail(done: int, total: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_dqn_replay(small_store, tmp_path / "new" / "log", progress=fail)
    assert not list((tmp_path / "new").iterdir())


def test_games_go_by_one_name(lab, tmp_path, small_store):
    write(small_store, lab, [(2, True)])
    for number, games in enumerate(("Pong", ["Pong-m0"])):
        (log,) = export_dqn_replay(small_store, tmp_path / str(number), games)
        assert log == tmp_path / str(number) / "Pong" / "1" / "replay_logs"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exported_and_imported_a_store_is_what_it_was(dopamine, lab, data):
    """But for labels and the frames after time-outs, as stores of runs that learn online have them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, again = (FrameStore.create(folder / n, chunk_frames=2, shard_frames=8) for n in ("store", "again"))
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=6))
        rewards = data.draw(st.sampled_from(["raw", "clipped"]))
        final, labels = data.draw(st.booleans()), data.draw(st.sampled_from([(), ("epsilon", "agent_step")]))
        cut_last = not final and data.draw(st.booleans())
        write(store, lab, shapes, rewards=rewards, cut_last=cut_last, final=final, labels=labels)
        (log,) = export_dqn_replay(store, folder / "log", num_rows=data.draw(st.integers(12, 60)), gzip_level=1)
        numbers = range(len(list(log.glob("add_count_ckpt.*.gz"))))
        import_dqn_replay(folder / "log", again.path, games="Pong", checkpoints=numbers, rewards=rewards)
        dopamine.check_same(dopamine.stored(again, "Pong"), dopamine.stored(store, "Pong", "0", final=final))
        assert again.recording("Pong").labels == {} and {*store.recording("Pong").labels} == {*labels}
        cut, cut_again = (int(s.recording("Pong").episodes["cut"].sum()) for s in (store, again))
        assert cut == cut_again and again.recording("Pong").manifest.rewards == rewards


def test_time_outs_of_the_original_limit_need_no_list(dopamine, lab, tmp_path, monkeypatch):
    """27,000 steps are truncated where nothing else is said, so a game that ended just there needs the list."""
    for name, shapes, has_list in (("as the original", [(20, False), (3, True)], False), ("a", [(20, True)], True)):
        monkeypatch.setattr("torchrl_sql.data.replay_log._TIME_LIMIT_STEPS", 20)
        store, again = (FrameStore.create(tmp_path / name / n, chunk_frames=2, shard_frames=8) for n in ("s", "t"))
        write(store, lab, shapes)
        (log,) = export_dqn_replay(store, tmp_path / name / "log", num_rows=40)
        assert (log / "episode_end_indices_ckpt.0.gz").exists() == has_list
        arguments = {"games": "Pong", "checkpoints": "0", "rewards": "raw", "max_episode_steps": 20}
        import_dqn_replay(tmp_path / name / "log", again.path, **arguments)
        dopamine.check_same(dopamine.stored(again, "Pong"), dopamine.stored(store, "Pong", "0"))


def test_what_the_format_cannot_hold_is_refused(lab, tmp_path, small_store):
    e = lab.make_episode(0, 4, terminated=False)
    with small_store.writer("Breakout", source="test") as writer:
        writer.add_episode(e.frames, [0, 2, 2, 1], e.rewards, False)
    with small_store.writer("Pong", source="test") as writer:
        for _ in range(2):
            writer.add_episode(e.frames, [0] * 4, e.rewards, False, cut=True)
    with pytest.raises(ValueError, match="Breakout, run '0': the format has only the actions of Breakout, got UP 2"):
        export_dqn_replay(small_store, tmp_path / "log", ["Breakout"])
    with pytest.raises(ValueError, match="Pong, run '0': 1 episodes whose end was not recorded have others after them"):
        export_dqn_replay(small_store, tmp_path / "log", ["Pong"])
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there is there already"):
        export_dqn_replay(small_store, tmp_path / "there")
    assert not (tmp_path / "log").exists()


def test_the_command(lab, tmp_path, small_store, capsys):
    write(small_store, lab, [(6, True)], run="b")
    write(small_store, lab, [(4, True)], run="a")
    arguments = ["export", str(small_store.path), "--out", str(tmp_path / "log"), "--dqn-replay"]
    assert main([*arguments, "--n-steps", "3"]) == 1
    assert "--dqn-replay writes whole recordings, got --n-steps" in capsys.readouterr().err
    assert main([*arguments, "--games", "Pong"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'log' / 'Pong' / run / 'replay_logs'}: checkpoints 0-0" for run in ("1", "2")
    ]
