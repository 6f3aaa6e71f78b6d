from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import ReplayBuffer, SliceSampler, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from torchrl_sql.data import AtariFrameStorage, AtariSequenceStorage, FrameStore, GameMixtureSampler, Subset, summarise


def tags(stack: torch.Tensor) -> list[int]:
    """Numbers that lab.make_episode wrote into the frames; -1 for an all-zero frame."""
    array = stack.numpy()
    numbers = np.ascontiguousarray(array[:, 0, :4]).view("<u4")[:, 0].astype(int)
    return [number if frame.any() else -1 for number, frame in zip(numbers.tolist(), array, strict=True)]


def test_one_step_transitions_by_hand(store, lab):
    first, second = lab.make_episodes([(3, True, False), (2, True, True)])  # Frames 0 1 2 | 4 5 6.
    first.rewards[:] = [0.25, 7.0, -3.0]
    lab.write(store, "Pong", [first, second])
    storage = AtariFrameStorage(store)
    assert len(storage) == 5 and storage.num_unsampleable == 0
    batch = storage[:]
    assert [tags(s) for s in batch["observation"]] == [
        [-1, -1, -1, 0],
        [-1, -1, 0, 1],
        [-1, 0, 1, 2],
        [-1, -1, -1, 4],
        [-1, -1, 4, 5],
    ]
    assert [tags(s) for s in batch["next", "observation"]] == [
        [-1, -1, 0, 1],
        [-1, 0, 1, 2],
        [0, 1, 2, -1],  # The frame after the last step was not recorded.
        [-1, -1, 4, 5],
        [-1, 4, 5, 6],
    ]
    assert batch["next", "reward"][:3, 0].tolist() == [0.25, 1.0, -1.0]
    assert batch["next", "terminated"][:, 0].tolist() == [False, False, True, False, True]
    assert batch["next", "done"][:, 0].tolist() == [False, False, True, False, True]
    assert not batch["next", "truncated"].any()
    assert batch["steps_to_next_obs"][:, 0].tolist() == [1] * 5


def test_three_step_returns_by_hand(store, lab):
    (episode,) = lab.make_episodes([(5, True, False)])
    episode.rewards[:] = [1.0, 0.5, -1.0, 0.0, 0.25]
    lab.write(store, "Pong", [episode])
    batch = AtariFrameStorage(store, n_steps=3, gamma=0.5)[:]
    assert batch["next", "reward"][:, 0].tolist() == [1.0, 0.0, -1 + 0.25 / 4, 0.125, 0.25]
    assert batch["steps_to_next_obs"][:, 0].tolist() == [3, 3, 3, 2, 1]
    assert batch["next", "terminated"][:, 0].tolist() == [False, False, True, True, True]
    assert [tags(s) for s in batch["next", "observation"]] == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, -1],
        [2, 3, 4, -1],
        [2, 3, 4, -1],
    ]


def test_episode_cut_without_its_final_frame(store, lab):
    """A step that would bootstrap from the missing frame cannot be drawn; with the frame it can, and is truncated."""
    missing, known = lab.make_episodes([(4, False, False), (4, False, True)])
    lab.write(store, "Pong", [missing, known])
    one = AtariFrameStorage(store)
    assert (len(one), one.num_unsampleable) == (3 + 4, 1)
    assert one[:]["next", "truncated"][:, 0].tolist() == [False] * 6 + [True]
    assert not one[:]["next", "terminated"].any()
    three = AtariFrameStorage(store, n_steps=3)
    assert (len(three), three.num_unsampleable) == (1 + 4, 3)
    assert three[:]["next", "truncated"][:, 0].tolist() == [False, False, True, True, True]
    ten = AtariFrameStorage(store, n_steps=10)
    assert (len(ten), ten.num_unsampleable) == (4, 4)


def newest(storage: AtariFrameStorage) -> list[int]:
    """Number of the newest frame of every transition, in order."""
    return [tags(stack)[-1] for stack in storage[:]["observation"]]


def test_parts_by_hand(store, lab):
    """Run a: frames 0-3, 5-8, 10-13; run b: 100-104; each episode's last step is usable but for the second one's."""
    shapes = [(4, True, False), (4, False, False), (4, True, False)]
    lab.write(store, "Pong", lab.make_episodes(shapes), run="a")
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)], 100), run="b")

    def part(**kwargs):
        return newest(AtariFrameStorage(store, **kwargs))

    assert part() == [0, 1, 2, 3, 5, 6, 7, 10, 11, 12, 13, 100, 101, 102, 103, 104]
    assert part(first_fraction=0.5) == [0, 1, 2, 3, 5, 6, 100, 101]  # 6 of 12 steps, 2 of 5.
    assert part(last_fraction=0.5) == [10, 11, 12, 13]  # the last 6 of 12 steps have one start, the last 2 of 5 none
    assert part(every_kth_episode=2) == [0, 1, 2, 3, 10, 11, 12, 13, 100, 101, 102, 103, 104]
    assert part(transitions_per_game=8) == [0, 1, 2, 3, 5, 6, 7, 10]
    assert part(first_fraction=0.75, every_kth_episode=2, transitions_per_game=6) == [0, 1, 2, 3, 10, 100]
    storage = AtariFrameStorage(store, first_fraction=0.5)
    assert storage.num_unsampleable == 1  # Of the whole store, as without the restriction.
    # A transition at the edge of the part still has its true successor.
    assert tags(storage[5]["next", "observation"]) == [-1, 5, 6, 7]


def test_parts_of_each_game(two_games):
    storage = AtariFrameStorage(two_games, transitions_per_game=7)
    assert storage.game_offsets.tolist() == [0, 7, 14]
    assert newest(storage) == list(range(1000, 1007)) + list(range(7))
    storage = AtariFrameStorage(two_games, every_kth_episode=2)
    assert storage.game_offsets.tolist() == [0, 20, 60]  # Both runs of Breakout have one episode each.
    copy = pickle.loads(pickle.dumps(storage))
    assert newest(copy) == newest(storage) and copy.subset == storage.subset
    with pytest.raises(ValueError, match="not the data of the checkpoint: num_transitions 14 != 60"):
        AtariFrameStorage(two_games, transitions_per_game=7).load_state_dict(storage.state_dict())


def test_batch_contract(two_games):
    for n_steps in (1, 3):
        batch = AtariFrameStorage(two_games, n_steps=n_steps).get(torch.tensor([0, 5, 79]))
        spec = {key: (tuple(v.shape), v.dtype) for key, v in batch.items(include_nested=True, leaves_only=True)}
        assert spec == {
            "observation": ((3, 4, 84, 84), torch.uint8),
            "action": ((3,), torch.int64),
            "game_id": ((3,), torch.int64),
            "steps_to_next_obs": ((3, 1), torch.int64),
            ("next", "game_id"): ((3,), torch.int64),
            ("next", "observation"): ((3, 4, 84, 84), torch.uint8),
            ("next", "reward"): ((3, 1), torch.float32),
            ("next", "terminated"): ((3, 1), torch.bool),
            ("next", "truncated"): ((3, 1), torch.bool),
            ("next", "done"): ((3, 1), torch.bool),
        }
        assert batch.batch_size == (3,) and batch["next"].batch_size == (3,)


def test_games_define_order_and_game_id(two_games):
    storage = AtariFrameStorage(two_games)
    assert storage.games == ("Breakout", "Pong")
    assert storage.game_offsets.tolist() == [0, 20, 80]
    assert storage[:]["game_id"].tolist() == [0] * 20 + [1] * 60
    turned = AtariFrameStorage(two_games, ["Pong", "Breakout"])
    assert turned.game_offsets.tolist() == [0, 60, 80]
    assert (turned[:60]["action"] == storage[20:]["action"]).all()
    assert len(AtariFrameStorage(two_games.path, "Pong")) == 60
    assert tags(storage[19]["observation"]) == [2004, 2005, 2006, 2007]  # Run b follows run a.


def test_kinds_of_index(two_games):
    storage = AtariFrameStorage(two_games)
    whole = storage[:]
    assert len(whole) == len(storage) == 80
    assert storage[7].batch_size == () and (storage[7] == whole[7]).all()
    assert (storage[-1] == whole[79]).all()
    order = [3, 3, 70, 0]
    for index in (order, torch.tensor(order), np.array(order, np.int32), range(3, 4)):
        assert (storage.get(index) == whole[list(index)]).all()
    assert len(storage.get([])) == 0
    assert 79 in storage and 80 not in storage
    assert storage.contains(torch.tensor([0, 80])).tolist() == [True, False]


@pytest.mark.parametrize("index", [80, -81, [0, 80], torch.tensor([-81]), (np.array([[3], [80]]),)])
def test_index_outside(two_games, index):
    with pytest.raises(IndexError, match=r"index must lie in -80..79, got"):
        AtariFrameStorage(two_games).get(index)


@pytest.mark.parametrize("index", [1.5, [0.5], torch.zeros(2, 2), "3"])
def test_index_of_another_kind(two_games, index):
    with pytest.raises(TypeError, match="index must be integers, a slice or a mask, got"):
        AtariFrameStorage(two_games).get(index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 1), "a transition has one index, got 2"),
        (torch.ones(79, dtype=torch.bool), r"a mask must be bool \[80\], got bool \[79\]"),
        (np.ones((80, 1), bool), r"got bool \[80, 1\]"),
        (True, r"got bool \[\]"),
    ],
)
def test_index_of_another_shape(two_games, index, message):
    with pytest.raises(IndexError, match=message):
        AtariFrameStorage(two_games).get(index)


INTEGERS = st.integers(-80, 79)
ARRAYS = st.lists(INTEGERS, max_size=6).flatmap(
    lambda values: st.sampled_from([(len(values),), (1, len(values)), (len(values), 1), (len(values), 1, 1)]).map(
        lambda shape: torch.tensor(values, dtype=torch.long).reshape(shape)
    )
)
ONES = st.one_of(
    INTEGERS,
    INTEGERS.map(torch.tensor),
    INTEGERS.map(np.int64),
    ARRAYS,
    ARRAYS.map(lambda index: index.to(torch.int32)),
    ARRAYS.map(torch.Tensor.numpy),
    ARRAYS.filter(lambda index: index.ndim == 1 and len(index)).map(torch.Tensor.tolist),
    st.lists(st.booleans(), min_size=80, max_size=80).map(torch.tensor),
    st.lists(st.booleans(), min_size=80, max_size=80).map(np.array),
    st.slices(80).filter(lambda index: (index.step or 1) > 0),
    st.just(...),
)
INDICES = st.one_of(
    ONES,
    ONES.map(lambda index: (index,)),
    ONES.filter(lambda index: index is not ...).map(lambda index: (index, ...)),
    st.just(()),
)


@settings(max_examples=150, deadline=None)
@given(index=INDICES)
def test_takes_every_index_that_a_tensor_storage_takes(two_games, index):
    storage = AtariFrameStorage(two_games)
    oracle = TensorStorage(storage[:])
    expected, batch = oracle.get(index), storage.get(index)
    assert batch.batch_size == expected.batch_size
    for key, value in expected.items(include_nested=True, leaves_only=True):
        assert batch[key].dtype == value.dtype and torch.equal(batch[key], value), key


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_slices_of_torchrl_samplers_stay_within_an_episode(store, lab, replacement, n_steps):
    """Also of episodes that were cut, whose last transition is not ``done``."""
    lab.write(
        store, "Pong", lab.make_episodes([(8, True, False), (9, False, False), (7, False, True), (6, True, True)])
    )
    storage = AtariFrameStorage(store, n_steps=n_steps)
    caching = {"cache_values": True} if replacement else {}
    sampler = SliceSampler(slice_len=4, trajectories=storage.trajectories, replacement=replacement, **caching)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=8, writer=ImmutableDatasetWriter())
    for _ in range(10):
        slices = buffer.sample()["observation"].reshape(2, 4, 4, 84, 84)
        for stacks in slices:
            newest = [tags(stack)[-1] for stack in stacks]
            assert newest == list(range(newest[0], newest[0] + 4))


def test_slices_by_the_done_flag(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(8, True, False)] * 3))
    buffer = TensorDictReplayBuffer(
        storage=AtariFrameStorage(store), sampler=SliceSampler(slice_len=4, end_key=("next", "done")), batch_size=12
    )
    newest = np.array([tags(stack)[-1] for stack in buffer.sample()["observation"]]).reshape(3, 4)
    assert (np.diff(newest, axis=1) == 1).all()


def test_time_order_by_hand(store, lab):
    """Stored A C D B F E; played A B C D E F."""
    a, c, d, b, f, e = episodes = lab.make_episodes([(3, True, False)] * 6)
    with store.writer("Pong", source="test") as writer:
        for episode, num_later in zip(episodes, (0, 0, 0, 2, 0, 1), strict=True):
            writer.add_episode(
                episode.frames, episode.actions, episode.rewards, episode.terminated, num_later=num_later
            )
        with pytest.raises(ValueError, match=r"num_later must lie in 0\.\.6, got 7"):
            writer.add_episode(a.frames, a.actions, a.rewards, True, num_later=7)
    played = [a, b, c, d, e, f]
    recording, storage = store.recording("Pong"), AtariFrameStorage(store)
    np.testing.assert_allclose(recording.episode_returns(), [x.rewards.sum() for x in played], rtol=1e-5)
    assert recording.first_steps().tolist() == [0, 9, 3, 6, 15, 12]
    assert newest(storage) == [0, 1, 2, 12, 13, 14, 4, 5, 6, 8, 9, 10, 20, 21, 22, 16, 17, 18]
    assert storage[:]["action"].tolist() == np.concatenate([x.actions for x in played]).tolist()
    assert newest(AtariFrameStorage(store, first_fraction=0.5)) == [0, 1, 2, 12, 13, 14, 4, 5, 6]
    assert newest(AtariFrameStorage(store, every_kth_episode=2)) == [0, 1, 2, 4, 5, 6, 20, 21, 22]
    (summary,) = summarise(store, subset=Subset(transitions_per_game=4))
    assert summary.action_counts.tolist() == np.bincount([*a.actions, b.actions[0]], minlength=18).tolist()


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("member", ["actions.u8", "rewards.f32", "frames/c/2/0/0"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(store, lab, member, n_steps):
    """Not SIGBUS. 4,500 steps: the flat files have a second page, behind the cut."""
    for run in ("0", "1"):
        with store.writer("Pong", run=run, source="test") as writer:
            writer.add_episode(
                np.random.default_rng(0).integers(0, 256, (24, 84, 84), np.uint8), [0] * 24, [1] * 24, True
            )
            for _ in range(3):
                writer.add_episode(np.zeros((1500, 84, 84), np.uint8), [0] * 1500, [1.0] * 1500, True)
    storage = AtariFrameStorage(store, n_steps=n_steps)
    index = [4000, 20, len(storage) // 2 + 20, len(storage) - 10]  # Two of each recording; every file is mapped.
    before = storage.get(index)
    file = store.path / "Pong" / "1" / member
    os.truncate(file, 10)
    with pytest.raises(ValueError, match=f"{file}.*was cut while it was in use, or the disk cannot read it"):
        storage.get(index)
    assert (storage.get(index[:2]) == before[:2]).all()  # The other recording is read as before.


@pytest.mark.parametrize(("member", "value"), [("actions.u8", b"\x12"), ("rewards.f32", b"\x00\x00\xc0\x7f")])
def test_values_that_no_writer_accepts_are_named(store, lab, member, value):
    lab.write(store, "Pong", lab.make_episodes([(9, True, False)]))
    file = store.path / "Pong" / "0" / member
    data = file.read_bytes()
    file.write_bytes(data[: 5 * len(value)] + value + data[6 * len(value) :])
    storage = AtariFrameStorage(store, n_steps=2)
    assert len(storage.get([0, 1, 2, 7, 8])) == 5
    message = f"{file} is damaged: row 5 is (18|nan)"
    for use in (lambda: storage.get([0, 5]), lambda: list(summarise(store)), lambda: AtariSequenceStorage(store)[:]):
        with pytest.raises(ValueError, match=message):
            use()


def test_no_descriptor_is_held(two_games):
    """All of DQN-Replay is 300 recordings; a process may have 1,024 files open."""
    storage = AtariFrameStorage(two_games)
    storage[:3]
    before = len(os.listdir("/proc/self/fd"))
    storages = [AtariFrameStorage(two_games) for _ in range(5)]
    assert all((other[:] == storage[:]).all() for other in storages)
    assert len(os.listdir("/proc/self/fd")) == before


def test_read_only(two_games):
    storage = AtariFrameStorage(two_games)
    with pytest.raises(RuntimeError, match="read-only"):
        storage.set(0, storage[0])
    with pytest.raises(RuntimeError, match="read-only"):
        ReplayBuffer(storage=storage).empty()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 0}, "n_steps must be an integer >= 1, got 0"),
        ({"n_steps": 2.0}, "n_steps must be an integer >= 1, got 2.0"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"first_fraction": 0.0}, r"first_fraction must lie in \(0, 1\], got 0.0"),
        ({"first_fraction": 1.1}, "first_fraction must lie in"),
        ({"last_fraction": 0.0}, r"last_fraction must lie in \(0, 1\], got 0.0"),
        ({"every_kth_episode": 0}, "every_kth_episode must be an integer >= 1, got 0"),
        ({"transitions_per_game": 0}, "transitions_per_game must be an integer >= 1, got 0"),
        ({"transitions_per_game": 1e3}, "transitions_per_game must be an integer >= 1, got 1000.0"),
        ({"transitions_per_game": 21}, "transitions_per_game must be at most the 20 that Breakout has here, got 21"),
        ({"games": "Seaquest"}, "game 'Seaquest' is not in the store .* which holds Breakout, Pong"),
        ({"games": ["Pong", "Brekout"]}, "did you mean Breakout"),
        ({"games": []}, "at least one game"),
    ],
)
def test_bad_arguments(two_games, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AtariFrameStorage(two_games, **kwargs)


def test_empty_store(store):
    with pytest.raises(ValueError, match="holds no games"):
        AtariFrameStorage(store)


@pytest.mark.parametrize("buffer_class", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("prefetch", [None, 1])
def test_inside_torchrl_buffers(two_games, buffer_class, prefetch):
    storage = AtariFrameStorage(two_games)
    buffer = buffer_class(storage=storage, sampler=GameMixtureSampler(seed=3), batch_size=6, prefetch=prefetch)
    for step in range(3):
        batch, info = buffer.sample(return_info=True)
        expected = GameMixtureSampler(seed=3).indices(storage, 6, step)
        assert info["index"].tolist() == expected.tolist()
        assert (batch["observation"] == storage.get(expected)["observation"]).all()
    assert len(buffer) == 80
    assert buffer[4]["action"] == storage[4]["action"]
    assert len(buffer_class(storage=storage, batch_size=5).sample()) == 5  # TorchRL's RandomSampler.
    buffer.shutdown()


def test_state_tells_other_data(two_games, store, lab, tmp_path):
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)]))
    mine = AtariFrameStorage(store)
    mine.dumps(tmp_path / "state")
    mine.loads(tmp_path / "state")
    with pytest.raises(ValueError, match="is not the data of the checkpoint"):
        AtariFrameStorage(two_games).load_state_dict(mine.state_dict())
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)], 100))
    mine.loads(tmp_path / "state")
    with pytest.raises(ValueError, match="is not the data of the checkpoint"):
        AtariFrameStorage(store).loads(tmp_path / "state")


def test_pickle_is_small_and_pins_the_commit(store, lab):
    lab.write(store, "Pong", lab.make_episodes([(500, True, False)]))
    storage = AtariFrameStorage(store, n_steps=2, gamma=0.9)
    data = pickle.dumps(storage)
    assert len(data) < 2000
    lab.write(store, "Pong", lab.make_episodes([(5, True, False)], 1000))
    copy = pickle.loads(data)
    assert len(copy) == 500
    assert (copy[490:] == storage[490:]).all()


def _read_in_child(storage, queue):
    torch.set_num_threads(1)  # OpenMP's threads, which the sum would use, do not survive a fork
    queue.put((storage[3]["action"].item(), storage[:8]["observation"].sum().item()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes(two_games, method):
    storage = AtariFrameStorage(two_games)
    expected = (storage[3]["action"].item(), storage[:8]["observation"].sum().item())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(storage, queue))
    child.start()
    assert queue.get(timeout=300) == expected
    child.join()


# Properties


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    chunk=st.integers(1, 5),
    chunks_per_shard=st.integers(1, 3),
    n_steps=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_equals_the_reference(lab, data, chunk, chunks_per_shard, n_steps, gamma):
    """For any episodes, chunk sizes and n, in any batch order; so in particular no stack mixes episodes."""
    runs = {
        ("Pong", "0"): lab.make_episodes(data.draw(lab.shapes)),
        ("Pong", "1"): lab.make_episodes(data.draw(lab.shapes), 1000),
        ("Breakout", "0"): lab.make_episodes(data.draw(lab.shapes), 2000),
    }
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore.create(Path(folder) / "s", chunk_frames=chunk, shard_frames=chunk * chunks_per_shard)
        for (game, run), episodes in runs.items():
            lab.write(store, game, episodes, run=run)
        storage = AtariFrameStorage(store, ["Pong", "Breakout"], n_steps=n_steps, gamma=gamma)
        expected = [(game, x) for (game, _), episodes in runs.items() for x in lab.reference(episodes, n_steps, gamma)]
        assert len(storage) == len(expected)
        assert storage.num_unsampleable == sum(len(e.actions) for r in runs.values() for e in r) - len(expected)
        if not expected:
            return
        order = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=40))
        batch = storage.get(torch.tensor(order))
        rows = [expected[i] for i in order]
        assert [storage.games[g] for g in batch["game_id"].tolist()] == [game for game, _ in rows]
        for key, value in (
            ("observation", batch["observation"]),
            ("next_observation", batch["next", "observation"]),
            ("action", batch["action"]),
            ("steps_to_next_obs", batch["steps_to_next_obs"][:, 0]),
            ("terminated", batch["next", "terminated"][:, 0]),
            ("truncated", batch["next", "truncated"][:, 0]),
        ):
            np.testing.assert_array_equal(value.numpy(), np.stack([x[key] for _, x in rows]), err_msg=key)
        np.testing.assert_array_equal(
            batch["next", "done"].numpy(), (batch["next", "terminated"] | batch["next", "truncated"]).numpy()
        )
        np.testing.assert_allclose(
            batch["next", "reward"][:, 0].numpy(), [x["reward"] for _, x in rows], rtol=1e-6, atol=1e-6
        )


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    n_steps=st.integers(1, 4),
    first_fraction=st.floats(0.01, 1.0),
    last_fraction=st.floats(0.01, 1.0),
    every_kth_episode=st.integers(1, 3),
)
def test_part_equals_the_reference(lab, data, n_steps, first_fraction, last_fraction, every_kth_episode):
    """For any episodes: the transitions of the whole, in the same order, without those that the conditions exclude."""
    episodes = [lab.make_episodes(data.draw(lab.shapes), 1000 * run) for run in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore.create(Path(folder) / "s", chunk_frames=4, shard_frames=8)
        for run in range(2):
            lab.write(store, "Pong", episodes[run], run=str(run))
        expected = []
        for run in range(2):
            total = sum(len(episode.actions) for episode in episodes[run])
            limit, start = round(first_fraction * total), total - round(last_fraction * total)
            before = 0
            for number, episode in enumerate(episodes[run]):
                steps = list(lab.reference([episode], n_steps, 1.0))
                if number % every_kth_episode == 0 and before >= start:
                    expected += [x["observation"] for t, x in enumerate(steps) if before + t < limit]
                before += len(episode.actions)
        options = {"n_steps": n_steps, "every_kth_episode": every_kth_episode}
        options |= {"first_fraction": first_fraction, "last_fraction": last_fraction}
        storage = AtariFrameStorage(store, **options)
        assert len(storage) == len(expected)
        if expected:
            np.testing.assert_array_equal(storage[:]["observation"].numpy(), np.stack(expected))
            count = data.draw(st.integers(1, len(expected)))
            few = AtariFrameStorage(store, transitions_per_game=count, **options)
            np.testing.assert_array_equal(few[:]["observation"].numpy(), np.stack(expected[:count]))
