"""Imports of DQN-Replay that are stopped, the memory they take, and random logs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrl_sql.data import FrameStore
from torchrl_sql.data.importers import ImportFailedError, dqn_replay, import_dqn_replay


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
        step += 3
    assert step > 50 and num_states == {None, 1, 10, 19}


def test_repeating_an_import_does_not_make_an_older_copy_the_state_that_is_listed(log, tmp_path, small_store):
    arguments = {"games": "Pong", "checkpoints": "0-3"}
    import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    manifest = small_store.path / "Pong" / "1" / "manifest.json"
    older, source = manifest.read_bytes(), small_store.recording("Pong").manifest.source
    with small_store.writer("Pong", run="1", source=source, rewards="clipped") as writer:
        writer.add_episode(np.zeros((2, 84, 84), np.uint8), [0, 0], [0.0, 0.0], terminated=True)
    manifest.write_bytes(older)
    listed = (small_store.path / "recordings.txt").read_text()
    with pytest.raises(ImportFailedError, match=r"manifest\.json is not the one that recordings\.txt lists"):
        import_dqn_replay(tmp_path / "dqn", small_store.path, **arguments)
    assert (small_store.path / "recordings.txt").read_text() == listed


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
        log = dopamine.new_log(tmp_path / "dqn", game=game, capacity=4000, seed=seed)
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
        deadline = time.monotonic() + 300
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
    log = dopamine.new_log(tmp_path / "dqn", capacity=20_000)
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
    log = dopamine.new_log(folder / "dqn", capacity=capacity, looks_at_every_row=draw(st.booleans()))
    for num_steps in draw(st.lists(st.integers(1, 30), min_size=2, max_size=12)):
        log.play(min(num_steps, limit))
    # A flush right after a checkpoint, with the ring's last row unwritten, would read as one of a later lap: refused.
    if draw(st.booleans()) and (0, log.add_count) not in log.logged:
        log.log_final()
    assume(log.logged)
    numbers = range(len(log.logged))
    chosen = draw(st.one_of(st.just(set(numbers)), st.sets(st.sampled_from(numbers), min_size=1)))
    return log, {"games": "Pong", "checkpoints": sorted(chosen), "max_episode_steps": limit}


def reads_as_a_start_that_it_is_not(log):
    """Whether all that is left is a flush, whose count is within its lap, that begins within an episode."""
    last_lap = log.add_count - log.add_count % log.capacity
    return log.flushed == 0 < last_lap and not any(e.first_row - 3 == last_lap for e in log.episodes)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_episodes_across_any_borders(dopamine, lab, data):
    """The store holds what was played, transition by transition, and every row is accounted for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, arguments = data.draw(logs(dopamine, folder))
        checkpoints = arguments["checkpoints"]
        expected = dopamine.expected(log, "Pong", checkpoints, limit=arguments["max_episode_steps"])
        if reads_as_a_start_that_it_is_not(log):
            with pytest.raises(ImportFailedError, match="must be padding"):
                import_dqn_replay(folder / "dqn", folder / "store", **arguments)
            return
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


def test_padding_that_two_laps_have_in_the_same_rows_does_not_join_them(dopamine, tmp_path):
    """Without checkpoint 4 nothing but its number tells that the last one is a lap later than it seems."""
    log = dopamine.new_log(tmp_path / "dqn", capacity=8, looks_at_every_row=True)
    for num_steps in (1, 1, 13, 2, 4, 6):
        log.play(num_steps)
    log.log_final()
    (_, end), (begin, _) = log.logged[3], log.logged[5]
    assert (end, begin) == (31, 37)  # rows 29, 30 and 37, 38, which lie in rows 5 and 6 of the ring, are padding
    store = FrameStore.create(tmp_path / "store")
    import_dqn_replay(tmp_path / "dqn", store.path, games="Pong", checkpoints=[3, 5])
    expected = dopamine.expected(log, "Pong", [3, 5])
    dopamine.check_same(dopamine.stored(store, "Pong"), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_import_stopped_anywhere_continues(dopamine, lab, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, arguments = data.draw(logs(dopamine, folder))
        assume(not reads_as_a_start_that_it_is_not(log))
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
