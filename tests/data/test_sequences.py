from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sql.data import (
    AtariFrameStorage,
    AtariSequenceStorage,
    FrameStore,
    GameMixtureSampler,
    GameMixtureSamplerWithoutReplacement,
    OfflineAtariReplay,
)


def reference(episodes, num_steps):
    """Every window in order, one step at a time; a step is what it holds, or None for padding."""
    for e in episodes:
        if e.cut:
            continue  # nobody knows what would have followed
        rewards = [min(max(float(r), -1.0), 1.0) for r in e.rewards]
        for start in range(len(e.actions)):
            window = []
            for t in range(start, start + num_steps):
                if t >= len(e.actions):
                    window.append(None)
                    continue
                last = t == len(e.actions) - 1
                window.append(
                    {
                        "observation": e.frames[t],
                        "action": int(e.actions[t]),
                        "reward": rewards[t],
                        "return_to_go": sum(rewards[t:]),
                        "terminated": last and e.terminated,
                        "truncated": last and not e.terminated,
                        "done": last,
                    }
                )
            yield window


def check(batch, windows):
    assert len(batch) == len(windows)
    for row, window in zip(batch, windows, strict=True):
        for k, step in enumerate(window):
            assert bool(row["mask"][k]) == (step is not None)
            if step is None:
                step = {"observation": np.zeros((84, 84)), "action": 0, "reward": 0, "return_to_go": 0}
                step |= {"terminated": False, "truncated": False, "done": False}
            assert np.array_equal(row["observation"][k].numpy(), step["observation"])
            assert row["action"][k].item() == step["action"]
            assert row["next", "reward"][k].item() == pytest.approx(step["reward"], abs=1e-6)
            assert row["return_to_go"][k].item() == pytest.approx(step["return_to_go"], abs=1e-4)
            for key in ("terminated", "truncated", "done"):
                assert bool(row["next", key][k]) == step[key]


def test_windows_by_hand(store, lab):
    first, second = lab.make_episodes([(3, True, False), (2, False, True)])
    first.rewards[:], second.rewards[:] = [0.25, 7.0, -3.0], [2.0, 0.5]
    lab.write(store, "Pong", [first, second])
    storage = AtariSequenceStorage(store, num_steps=2)
    batch = storage[:]
    assert batch["action"].tolist() == [
        [first.actions[0], first.actions[1]],
        [first.actions[1], first.actions[2]],
        [first.actions[2], 0],
        [second.actions[0], second.actions[1]],
        [second.actions[1], 0],
    ]
    assert batch["mask"].tolist() == [[True, True], [True, True], [True, False], [True, True], [True, False]]
    assert batch["next", "reward"][..., 0].tolist() == [[0.25, 1], [1, -1], [-1, 0], [1, 0.5], [0.5, 0]]
    assert batch["return_to_go"].tolist() == [[0.25, 0], [0, -1], [-1, 0], [1.5, 0.5], [0.5, 0]]
    assert batch["next", "terminated"][:3, :, 0].tolist() == [[False, False], [False, True], [True, False]]
    assert batch["next", "truncated"][3:, :, 0].tolist() == [[False, True], [True, False]]
    assert batch["observation"].shape == (5, 2, 84, 84) and batch["observation"].dtype == torch.uint8
    assert not batch["observation"][2, 1].any() and batch["game_id"].tolist() == [0] * 5


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_steps=st.integers(1, 6))
def test_returns_are_sums_and_no_window_crosses_an_episode(lab, data, num_steps):
    episodes = lab.make_episodes(data.draw(lab.shapes))
    for episode in episodes:
        episode.cut = not episode.terminated and data.draw(st.booleans())
    windows = list(reference(episodes, num_steps))
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore.create(Path(folder) / "store", chunk_frames=3, shard_frames=6)
        lab.write(store, "Pong", episodes)
        storage = AtariSequenceStorage(store, num_steps=num_steps)
        assert len(storage) == len(windows)
        assert storage.num_unsampleable == sum(len(e.actions) for e in episodes) - len(windows)
        if windows:
            check(storage[:], windows)
            order = data.draw(st.permutations(range(len(windows))))
            check(storage[order], [windows[i] for i in order])


def test_a_part_of_the_data_ends_windows_and_not_returns(store, lab):
    (episode,) = lab.make_episodes([(10, True, False)])
    episode.rewards[:] = 1
    lab.write(store, "Pong", [episode])
    batch = AtariSequenceStorage(store, num_steps=3, first_fraction=0.4)[:]
    assert batch["mask"].sum(1).tolist() == [3, 3, 2, 1]
    assert batch["return_to_go"].tolist() == [[10, 9, 8], [9, 8, 7], [8, 7, 0], [7, 0, 0]]
    assert not batch["next", "done"].any()


def test_the_same_samplers_draw_windows(two_games):
    storage = AtariSequenceStorage(two_games, transitions_per_game=8)
    for kind in (GameMixtureSampler, GameMixtureSamplerWithoutReplacement):
        whole = storage[kind(seed=3).indices(storage, 12, 5)]
        parts = [storage[kind(seed=3, rank=rank, world_size=3).indices(storage, 12, 5)] for rank in range(3)]
        assert (torch.cat(parts) == whole).all()


def test_windows_agree_with_transitions(two_games):
    """What a window says of its first step is what the transition of one step says."""
    windows, transitions = AtariSequenceStorage(two_games), AtariFrameStorage(two_games)
    assert len(windows) == len(transitions) == 80
    window, transition = windows[:], transitions[:]
    assert torch.equal(window["observation"][:, 0], transition["observation"][:, -1])
    for key in ("action", ("next", "reward"), ("next", "terminated"), ("next", "truncated")):
        assert torch.equal(window[key][:, 0], transition[key])
    assert torch.equal(window["game_id"], transition["game_id"])


def test_pickled_storages_show_the_same_and_states_tell_them_apart(two_games):
    storage = AtariSequenceStorage(two_games, num_steps=3)
    again = pickle.loads(pickle.dumps(storage))
    assert (again[[7, 70]] == storage[[7, 70]]).all()
    again.load_state_dict(storage.state_dict())
    with pytest.raises(ValueError, match="num_steps"):
        AtariSequenceStorage(two_games, num_steps=4).load_state_dict(storage.state_dict())


def test_a_replay_buffer_of_windows_reads_ahead_and_continues(two_games):
    def replay(**kwargs):
        return OfflineAtariReplay(two_games, batch_size=6, window_steps=3, seed=1, **kwargs)

    plain = replay()
    expected = [plain.sample() for _ in range(5)]
    assert expected[0]["observation"].shape == (6, 3, 84, 84)
    ahead, later = replay(prefetch=2), replay()
    for batch in expected[:3]:
        assert (ahead.sample() == batch).all()
    later.load_state_dict(ahead.state_dict())
    assert (later.sample() == expected[3]).all()
    halves = [replay(rank=rank, world_size=2).sample() for rank in range(2)]
    assert (torch.cat(halves) == expected[0]).all()
    ahead.shutdown()


def test_refuses_windows_without_steps(two_games):
    for num_steps in (0, True, 2.0):
        with pytest.raises(ValueError, match="num_steps must be an integer >= 1"):
            AtariSequenceStorage(two_games, num_steps=num_steps)
    with pytest.raises(IndexError, match=r"0\.\.79"):
        AtariSequenceStorage(two_games)[80]
