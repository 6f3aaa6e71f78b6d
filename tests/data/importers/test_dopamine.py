"""Logs that are not quite DQN-Replay: of plain Dopamine, of newer versions, of two agents, with odd last flushes."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, import_dqn_replay, summary_table


def check(dopamine, lab, store, log, checkpoints, **limit):
    expected = dopamine.expected(log, "Pong", checkpoints, **limit)
    dopamine.check_same(dopamine.stored(store, "Pong"), expected)
    dopamine.check_transitions(store, "Pong", expected, lab)


# Plain Dopamine: the whole ring at any cursor, several times per lap


@pytest.fixture
def plain(dopamine, tmp_path):
    """A ring of 100 rows; episodes of 9 steps and 3 rows of padding; a checkpoint every 48 rows."""
    log = dopamine.new_log(tmp_path / "dqn", capacity=100, is_plain=True)
    for _ in range(6):
        for _ in range(4):
            log.play(9)
        log.log(log.add_count)
    assert log.logged == [(0, 48), (0, 96), (44, 144), (92, 192), (140, 240), (188, 288)]
    return log


@pytest.mark.parametrize(
    ("checkpoints", "num_episodes", "dropped"),
    [
        ([2, 3], 12, {"episode start missing": 4, "padding": 36, "in an earlier checkpoint": 44, "past the cursor": 8}),
        ([0, 1, 2, 3, 4, 5], 24, None),  # each once
        ([1, 2], 12, None),  # the ring was not full yet
        ([0, 5], 12, None),  # rows between them are missing
        ([2], 8, {"episode start missing": 4, "padding": 24}),
    ],
)
def test_overlapping_rings_give_each_episode_once(
    dopamine, lab, plain, tmp_path, small_store, checkpoints, num_episodes, dropped
):
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints=checkpoints)
    assert summary.num_episodes == num_episodes and summary.num_rows_read == 100 * len(checkpoints)
    check(dopamine, lab, small_store, plain, checkpoints)
    if dropped is not None:
        assert {reason: n for reason, n in summary.dropped.items() if n} == dropped


def test_rings_of_two_runs_are_told_apart(dopamine, plain, tmp_path, small_store):
    other = dopamine.new_log(tmp_path / "other", capacity=100, is_plain=True, seed=1)
    for _ in range(12):
        other.play(9)
    other.log(other.add_count)
    for file in other.folder.glob("*_ckpt.0.gz"):
        shutil.copy(file, plain.folder / file.name.replace("ckpt.0", "ckpt.3"))
    with pytest.raises(ImportFailedError, match=r"_ckpt\.3\.gz: .*holds .* rows of .*_ckpt\.2\.gz, but they differ"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="2-3")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_checkpoints_of_plain_dopamine(dopamine, lab, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = dopamine.new_log(folder / "dqn", capacity=data.draw(st.integers(8, 40)), is_plain=True)
        for _ in range(data.draw(st.integers(1, 5))):
            for num_steps in data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)):
                log.play(num_steps)
            log.log(log.add_count)
        numbers = range(len(log.logged))
        chosen = sorted(data.draw(st.one_of(st.just(set(numbers)), st.sets(st.sampled_from(numbers), min_size=1))))
        assume(chosen[0] == 0 or log.logged[chosen[0]][1] >= log.capacity)  # else it is not known what was written
        store = FrameStore.create(folder / "store", chunk_frames=2, shard_frames=8)
        if not dopamine.expected(log, "Pong", chosen):
            with pytest.raises(ImportFailedError, match="there is no episode in it"):
                import_dqn_replay(folder / "dqn", store.path, games="Pong", checkpoints=chosen)
            return
        (summary,) = import_dqn_replay(folder / "dqn", store.path, games="Pong", checkpoints=chosen)
        check(dopamine, lab, store, log, chosen)
        assert summary.num_rows_read == log.capacity * len(chosen)


# Newer Dopamine: time-outs are not terminal


@pytest.fixture
def newer(dopamine, tmp_path):
    """Five episodes of 8, 8, 5, 8, 5 steps; those of 8 are time-outs."""
    log = dopamine.new_log(tmp_path / "dqn", capacity=60)
    for num_steps in (8, 8, 5, 8, 5):
        log.play(num_steps, is_terminal=num_steps == 5)
    log.log_final()
    return log


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ENDS = {
    "array": lambda rows: saved(np.array(sorted(rows))),
    "empty protocol 4": lambda rows: pickle.dumps({int(row) for row in rows}, protocol=4),
    "NumPy's integers": pickle.dumps,
    "newest protocol": lambda rows: pickle.dumps(rows, protocol=5),
}


@pytest.mark.parametrize("form", ENDS)
def test_time_outs_are_read_from_the_list_of_ends(dopamine, lab, newer, tmp_path, small_store, form):
    ends = newer.folder / "episode_end_indices_ckpt.0.gz"
    ends.write_bytes(gzip.compress(ENDS[form](newer.ends)))
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    assert (summary.num_episodes, summary.num_truncated, summary.num_cut, summary.num_transitions) == (5, 3, 0, 34)
    assert summary.dropped == {"padding": 15, "past the cursor": 11}
    check(dopamine, lab, small_store, newer, [0], limit=8)
    assert summary.mean_clipped_return == sum(e.rewards.sum() for e in newer.episodes) / 5


@pytest.mark.parametrize("change", ["others", "none"])
def test_an_import_is_tied_to_the_list_of_ends(newer, tmp_path, small_store, change):
    ends = newer.folder / "episode_end_indices_ckpt.0.gz"
    ends.write_bytes(gzip.compress(pickle.dumps(newer.ends)))
    arguments = {"games": "Pong", "checkpoints": "0"}
    import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    if change == "others":
        ends.write_bytes(gzip.compress(pickle.dumps(set(sorted(newer.ends)[1:]))))
    else:
        ends.unlink()
    with pytest.raises(ImportFailedError, match="part 0 had other contents"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)


def test_time_outs_without_a_list_are_told_by_their_length(dopamine, lab, newer, tmp_path, small_store):
    (summary,) = import_dqn_replay(
        tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0", max_episode_steps=8
    )
    assert (summary.num_episodes, summary.num_truncated, summary.num_transitions) == (5, 3, 34)
    check(dopamine, lab, small_store, newer, [0], limit=8)


def test_a_time_limit_that_was_not_given_is_not_passed_over(newer, tmp_path, small_store, caplog):
    """Two merged episodes hold three stretches of padding: a warning says so, and what to give."""
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    assert "3 times inside episodes" in caplog.text and "--max-episode-steps" in caplog.text
    with pytest.raises(ImportFailedError, match=r"more than 7 steps .*max_episode_steps \(--max-episode-steps\)"):
        import_dqn_replay(tmp_path / "dqn", tmp_path / "other", games="Pong", checkpoints="0", max_episode_steps=7)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    "contents", [pickle.dumps({Bomb()}), pickle.dumps([1, 2]), pickle.dumps({60}), b"", saved(np.zeros((2, 2)))]
)
def test_bad_lists_of_ends_are_named_and_never_executed(newer, tmp_path, small_store, contents):
    (newer.folder / "episode_end_indices_ckpt.0.gz").write_bytes(gzip.compress(contents))
    if contents == pickle.dumps({Bomb()}):  # Its only number-like token is none: a list without ends.
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
        return
    with pytest.raises(ImportFailedError, match=r"episode_end_indices_ckpt\.0\.gz is damaged, or no list of rows"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")


# The last flush


def test_a_flush_without_a_row_since_the_last_checkpoint_adds_nothing(dopamine, lab, tmp_path, small_store):
    """53 steps were played, 53 are imported: the second checkpoint ends with the cursor where the flush finds it."""
    log = dopamine.new_log(tmp_path / "dqn", capacity=30)
    for num_steps in (20, 33):
        log.play(num_steps)
    assert log.logged == [(0, 29), (29, 59)] and log.add_count == 59
    log.log_final()
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-2")
    assert (summary.num_transitions, summary.num_episodes, summary.num_cut) == (53, 2, 0)
    check(dopamine, lab, small_store, log, [0, 1, 2])


def test_a_lap_lost_before_the_flush_is_seen_in_the_rows(dopamine, lab, tmp_path, small_store, caplog):
    """Rows 9-15 of the lost lap were written over: A is cut at 6 steps, C is the only whole episode."""
    log = dopamine.new_log(tmp_path / "dqn")
    for num_steps in (13, 1, 4):  # Rows 0-15, 16-19, 20-26: the call at 16 jumps over row 19.
        log.play(num_steps)
    assert log.logged == [(0, 9)]
    log.log_final()
    (summary,) = import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0-1")
    assert "_ckpt.1.gz does not continue" in caplog.text
    assert small_store.recording("Pong").episodes["num_steps"].tolist() == [6, 4]
    assert small_store.recording("Pong").episodes["cut"].tolist() == [True, False]
    assert summary.num_cut == 1
    check(dopamine, lab, small_store, log, [0, 1])


# Two sources


@pytest.fixture
def agents(dopamine, tmp_path):
    logs = {}
    for seed, name in enumerate("ab"):
        logs[name] = dopamine.new_log(tmp_path / name, seed=seed)
        for num_steps in (1, 7, 2, 9):
            logs[name].play(num_steps)
    return logs


def test_another_source_is_not_taken_for_the_one_that_is_there(agents, lab, tmp_path, small_store):
    arguments = {"games": "Pong", "checkpoints": "0-1"}
    done = import_dqn_replay(tmp_path / "a", small_store.path, **arguments)
    before = lab.tree(small_store.path)
    with pytest.raises(
        ImportFailedError, match=r"Pong/1 is there already, from another DQN-Replay.*: part 0 had other"
    ):
        import_dqn_replay(tmp_path / "b", small_store.path, **arguments)
    assert lab.tree(small_store.path) == before
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.gz"):  # The same contents in another place, compressed in another way.
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 9))
    assert import_dqn_replay(tmp_path / "moved", small_store.path, **arguments) == done


def test_another_source_does_not_continue_an_import(agents, dopamine, tmp_path, small_store):
    file = agents["a"].folder / "$store$_observation_ckpt.1.gz"
    good = file.read_bytes()
    file.write_bytes(good[:-20])
    arguments = {"games": "Pong", "checkpoints": "0-1"}
    with pytest.raises(ImportFailedError, match="is truncated"):
        import_dqn_replay(tmp_path / "a", small_store.path, **arguments)
    with pytest.raises(
        ImportFailedError, match=r"unfinished import of another DQN-Replay.*: part 0 had other contents"
    ):
        import_dqn_replay(tmp_path / "b", small_store.path, **arguments)
    file.write_bytes(good)
    assert "Pong" in summary_table(import_dqn_replay(tmp_path / "a", small_store.path, **arguments))
    dopamine.check_same(dopamine.stored(small_store, "Pong"), dopamine.expected(agents["a"], "Pong", [0, 1]))


def test_raw_rewards_must_be_asked_for(dopamine, tmp_path, small_store):
    log = dopamine.new_log(tmp_path / "dqn", capacity=20)
    log.play(10)
    log.rows["reward"][5] = 400.0
    log.log_final()
    with pytest.raises(ImportFailedError, match=r"row 5 must be clipped .*got 400\.0 .*--rewards raw"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0")
    import_dqn_replay(tmp_path / "dqn", small_store.path, games="Pong", checkpoints="0", rewards="raw")
    recording = small_store.recording("Pong")
    assert (recording.manifest.rewards, recording.rewards.max()) == ("raw", 400.0)
