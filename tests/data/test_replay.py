from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrl.data import ReplayBufferEnsemble, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs.transforms import RewardScaling, ToTensorImage
from torchrl.objectives import DiscreteCQLLoss, DistributionalDQNLoss, DQNLoss, HardUpdate

from torchrl_sql.data import (
    AtariFrameStorage,
    GameMixtureSampler,
    GameMixtureSamplerWithoutReplacement,
    OfflineAtariReplay,
)
from torchrl_sql.data.transfer import copy_blocks
from torchrl_sql.modules import make_q_actor


def indices(replay: OfflineAtariReplay, num_batches: int) -> list[list[int]]:
    return [replay.sample()["index"].tolist() for _ in range(num_batches)]


@pytest.fixture(scope="module")
def expected(two_games) -> list[list[int]]:
    """The first batches of seed 4, straight from the sampler."""
    storage, sampler = AtariFrameStorage(two_games), GameMixtureSampler(seed=4)
    return [sampler.indices(storage, 12, step).tolist() for step in range(40)]


def test_three_lines(two_games):
    replay = OfflineAtariReplay(two_games.path, batch_size=12, seed=4)
    batch = replay.sample()
    assert batch["observation"].shape == (12, 4, 84, 84)
    assert (batch.exclude("index") == AtariFrameStorage(two_games).get(batch["index"])).all()
    assert replay.games == ("Breakout", "Pong") and len(replay) == 80
    same, info = replay.sample(return_info=True)
    assert info["index"].tolist() == same["index"].tolist()
    assert len(replay.sample(6)) == 6


def test_iterates(two_games, expected):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4)
    assert [batch["index"].tolist() for batch, _ in zip(replay, range(3), strict=False)] == expected[:3]


def test_the_last_part_reaches_the_storage(two_games):
    replay = OfflineAtariReplay(two_games, batch_size=4, games="Pong", last_fraction=0.5)
    assert len(replay) == len(AtariFrameStorage(two_games, "Pong", last_fraction=0.5)) == 30  # the last two episodes


def test_options_reach_storage_and_sampler(two_games):
    options = {"n_steps": 2, "gamma": 0.5, "first_fraction": 0.5, "every_kth_episode": 2, "transitions_per_game": 9}
    mixture = {"mixture": [1.0, 2.0], "temperature": 2.0, "seed": 3}
    for replacement, sampler_class in ((True, GameMixtureSampler), (False, GameMixtureSamplerWithoutReplacement)):
        replay = OfflineAtariReplay(two_games, batch_size=12, replacement=replacement, **options, **mixture)
        storage, sampler = AtariFrameStorage(two_games, **options), sampler_class(**mixture)
        batch = replay.sample()
        assert batch["index"].tolist() == sampler.indices(storage, 12, 0).tolist()
        assert (batch.exclude("index") == storage.get(batch["index"])).all()
        assert len(replay) == 18


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_order_does_not_depend_on_prefetch(two_games, expected, prefetch):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=prefetch)
    assert indices(replay, 30) == expected[:30]
    replay.shutdown()


def test_ranks_read_slices_of_one_batch(two_games, expected):
    ranks = [
        OfflineAtariReplay(two_games, batch_size=12, seed=4, rank=rank, world_size=3, prefetch=rank)
        for rank in range(3)
    ]
    for step in range(5):
        parts = [replay.sample()["index"] for replay in ranks]
        assert [len(part) for part in parts] == [4, 4, 4]
        assert torch.cat(parts).tolist() == expected[step]
    for replay in ranks:
        replay.shutdown()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 10), read_more=st.integers(0, 4), first=st.integers(0, 3), then=st.integers(0, 3))
def test_resume_equals_uninterrupted(two_games, expected, before, read_more, first, then):
    """Only delivered batches count, whatever was read ahead before and after."""
    old = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=first)
    assert indices(old, before) == expected[:before]
    state = old.state_dict()
    indices(old, read_more)
    new = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=then)
    for replay in (new, old):  # The old one goes back.
        replay.load_state_dict(state)
        assert indices(replay, 5) == expected[before : before + 5]
        replay.shutdown()


def test_state_survives_torch_save(two_games, expected, tmp_path):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=2)
    indices(replay, 3)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    replay.dumps(tmp_path / "dump")
    assert not list((tmp_path / "dump").rglob("*.pkl"))
    indices(replay, 3)
    replay.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert indices(replay, 2) == expected[3:5]
    replay.loads(tmp_path / "dump")
    assert indices(replay, 2) == expected[3:5]
    replay.shutdown()


def test_pickle_continues(two_games, expected):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=2)
    indices(replay, 3)
    copy = pickle.loads(pickle.dumps(replay))
    assert indices(copy, 2) == indices(replay, 2) == expected[3:5]
    copy.shutdown()
    replay.shutdown()


def test_checkpoint_of_other_data_is_refused(two_games):
    replay = OfflineAtariReplay(two_games, batch_size=12)
    with pytest.raises(ValueError, match="is not the data of the checkpoint"):
        OfflineAtariReplay(two_games, batch_size=12, games="Pong").load_state_dict(replay.state_dict())


BATCHES = {"n_steps": 3, "gamma": 0.9, "seed": 4, "mixture": "transitions", "temperature": 2.0, "batch_size": 12}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 2}, "n_steps 2 != 3"),
        ({"gamma": 0.99}, "gamma 0.99 != 0.9"),
        ({"seed": 5}, "seed must be 4 as in the state"),
        ({"mixture": "games"}, "mixture must be 'transitions' as in the state"),
        ({"temperature": 1.0}, "temperature must be 2.0 as in the state"),
        ({"batch_size": 24}, "batch_size must be 12 as in the state"),
        ({"replacement": False}, "sampler must be 'GameMixtureSampler' as in the state"),
        ({"transitions_per_game": 10}, "num_transitions 20 != "),
    ],
)
def test_checkpoint_of_other_batches_is_refused(two_games, tmp_path, prefetch, change, message):
    replay = OfflineAtariReplay(two_games, **BATCHES)
    indices(replay, 2)
    replay.dumps(tmp_path / "dump")
    other = OfflineAtariReplay(two_games, prefetch=prefetch, **{**BATCHES, **change})
    first = OfflineAtariReplay(two_games, **{**BATCHES, **change}).sample()["index"].tolist()
    for load, state in ((other.load_state_dict, replay.state_dict()), (other.loads, tmp_path / "dump")):
        with pytest.raises(ValueError, match=message):
            load(state)
    assert indices(other, 1) == [first]  # Nothing was changed.
    other.shutdown()


def test_other_batch_sizes_of_a_call_do_not_change_what_follows(two_games, expected):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4)
    replay.sample(6)
    new = OfflineAtariReplay(two_games, batch_size=12, seed=4)
    new.load_state_dict(replay.state_dict())
    assert indices(new, 3) == indices(replay, 3) == expected[1:4]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_loop_without_replacement_ends_after_an_epoch(two_games, prefetch):
    replay = OfflineAtariReplay(
        two_games, batch_size=16, replacement=False, mixture="transitions", seed=1, prefetch=prefetch
    )
    for _ in range(3):
        drawn = torch.cat([batch["index"] for batch in replay])
        assert sorted(drawn.tolist()) == list(range(80))
    replay.shutdown()


@pytest.mark.parametrize("prefetch", [None, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [16, 12])  # 80 transitions: 5 batches each epoch, or 7, 7 and 6
def test_so_does_a_loop_over_a_buffer_of_torchrl(two_games, batch_size, prefetch):
    storage, sampler = AtariFrameStorage(two_games), GameMixtureSampler(replacement=False, mixture="transitions")
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=batch_size, prefetch=prefetch)
    epochs = [[batch["index"] for batch in islice(buffer, 20)] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == {16: [5, 5, 5], 12: [7, 7, 6]}[batch_size]
    drawn = torch.cat([index for epoch in epochs for index in epoch])
    assert sorted(drawn.tolist()) == sorted([*range(80)] * 3)
    buffer.shutdown()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_sampling_after_shutdown_raises(two_games, prefetch):
    replay = OfflineAtariReplay(two_games, batch_size=12, prefetch=prefetch)
    replay.sample()
    replay.shutdown()
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=r"cannot be sampled after shutdown\(\)"):
        replay.sample()
    assert threading.active_count() == before
    replay.shutdown()


def test_transforms(two_games):
    replay = OfflineAtariReplay(
        two_games, batch_size=4, prefetch=2, transform=RewardScaling(0.0, 2.0, in_keys=[("next", "reward")])
    )
    plain = OfflineAtariReplay(two_games, batch_size=4)
    replay.append_transform(ToTensorImage(in_keys=["observation"], from_int=True, shape_tolerant=True))
    batch, same = replay.sample(), plain.sample()
    assert torch.equal(batch["next", "reward"], same["next", "reward"] * 2)
    assert batch["observation"].dtype == torch.float32
    replay.shutdown()


@pytest.mark.parametrize(
    ("loss_class", "num_atoms", "options"),
    [
        (DistributionalDQNLoss, 51, {"gamma": 0.99}),
        (DQNLoss, None, {"action_space": "categorical"}),
        (DiscreteCQLLoss, None, {"action_space": "categorical"}),
    ],
)
def test_torchrl_losses_take_batches_of_several_games(two_games, loss_class, num_atoms, options):
    replay = OfflineAtariReplay(two_games, batch_size=6)
    loss = loss_class(make_q_actor(replay.games, encoder="resnet_tiny", num_atoms=num_atoms), **options)
    HardUpdate(loss, value_network_update_interval=1000)
    assert next(iter(loss(replay.sample()).values())).isfinite().all()


def test_read_error_is_raised_and_the_batch_stays_due(two_games, expected, monkeypatch):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=2)
    indices(replay, 1)
    replay.load_state_dict(replay.state_dict())  # Nothing read ahead.
    with monkeypatch.context() as patch:
        patch.setattr(AtariFrameStorage, "get", lambda self, index: (_ for _ in ()).throw(OSError("disk gone")))
        with pytest.raises(OSError, match="disk gone"):
            replay.sample()
    assert replay.state_dict()["_sampler"]["step"] == 1
    assert indices(replay, 3) == expected[1:4]
    replay.shutdown()


def test_cannot_be_written(two_games):
    replay = OfflineAtariReplay(two_games, batch_size=4)
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        replay.extend(replay.sample())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 10, "world_size": 3}, "batch_size must be a positive multiple of world_size 3, got 10"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": None}, "batch_size must be a positive multiple of world_size 1, got None"),
        ({"batch_size": 8.0}, "batch_size must be a positive multiple of world_size 1, got 8.0"),
        ({"batch_size": 4, "world_size": 0}, "rank must lie in 0..world_size-1, got rank 0 of world_size 0"),
        ({"batch_size": 4, "prefetch": -1}, "prefetch must be an integer >= 0, got -1"),
        ({"batch_size": 4, "prefetch": None}, "prefetch must be an integer >= 0, got None"),
        ({"batch_size": 4, "window_steps": 0}, "window_steps must be at least 1, got 0"),
        ({"batch_size": 4, "window_steps": 2, "n_steps": 3}, "n_steps has no meaning with window_steps, .* got 3"),
        ({"batch_size": 4, "window_steps": 2, "gamma": 0.5}, "gamma has no meaning with window_steps, .* got 0.5"),
    ],
)
def test_bad_arguments(two_games, kwargs, message):
    with pytest.raises(ValueError, match=message):
        OfflineAtariReplay(two_games, **kwargs)


def test_other_batch_size_with_prefetch(two_games):
    replay = OfflineAtariReplay(two_games, batch_size=12, prefetch=1)
    with pytest.raises(ValueError, match="batch_size must be 12 as read ahead, got 6"):
        replay.sample(6)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_nothing_of_an_earlier_sampler_or_storage_is_delivered(two_games, prefetch):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=prefetch)
    pong, sampler = AtariFrameStorage(two_games, "Pong"), GameMixtureSampler(seed=5)
    replay.sample()
    sampler.sample(replay.storage, 12)
    replay.set_sampler(sampler)
    assert indices(replay, 1) == [sampler.indices(replay.storage, 12, 1).tolist()]
    replay.set_storage(pong)
    batch = replay.sample()
    assert batch["index"].tolist() == sampler.indices(pong, 12, 2).tolist()
    assert (batch.exclude("index") == pong[batch["index"]]).all() and (replay[:3] == pong[:3]).all()
    replay.shutdown()


def test_a_buffer_of_torchrl_can_be_given_another_storage(two_games):
    buffer = TensorDictReplayBuffer(storage=AtariFrameStorage(two_games), sampler=GameMixtureSampler(), batch_size=6)
    pong = AtariFrameStorage(two_games, "Pong")
    buffer.set_storage(pong, collate_fn=pong.collate)
    batch = buffer.sample()
    assert (batch.exclude("index") == pong[batch["index"]]).all()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_ahead_in_threads_of_its_own(two_games, expected):
    replay = OfflineAtariReplay(two_games, batch_size=12, seed=4, prefetch=2)
    indices(replay, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # ends a child that waits for threads which it does not have
        right = indices(replay, 3) == expected[2:5]
        replay.shutdown()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert indices(replay, 3) == expected[2:5]
    replay.shutdown()


def blocks(batch):
    """The memory behind each entry."""
    return {key: value.untyped_storage() for key, value in batch.items(True, True)}


@pytest.mark.parametrize(("n_steps", "num_frames"), [(1, 5), (3, 8)])
def test_the_stacks_of_a_batch_are_views_of_one_block_that_is_copied_once(two_games, n_steps, num_frames):
    batch = OfflineAtariReplay(two_games, batch_size=6, n_steps=n_steps).sample()
    copied = []
    sent = copy_blocks(batch, lambda block: copied.append(block) or block.clone())
    for each in (batch, sent):
        memory = blocks(each)
        assert memory["observation"].data_ptr() == memory["next", "observation"].data_ptr()
        assert memory["observation"].nbytes() == 6 * num_frames * 84 * 84
    assert all(block.is_contiguous() and block.ndim == 1 for block in copied)
    assert len(copied) == len({memory.data_ptr() for memory in blocks(batch).values()}) == len(blocks(batch)) - 2
    assert {key: value.stride() for key, value in sent.items(True, True)} == {
        key: value.stride() for key, value in batch.items(True, True)
    }
    assert (sent == batch).all()
    sent["observation"].zero_()  # the copy is a copy, and its stacks share their frames
    assert batch["observation"].any()
    if n_steps == 1:
        assert not sent["next", "observation"][:, :3].any() and sent["next", "observation"][:, 3].any()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_delivered_on_a_device_with_the_entries_asked_for(two_games, prefetch):
    keys = ["observation", "action", ("next", "observation"), ("next", "reward")]
    plain = OfflineAtariReplay(two_games, batch_size=6)
    sent = OfflineAtariReplay(two_games, batch_size=6, prefetch=prefetch, device="cpu", keys=keys)
    for _ in range(3):
        expected, batch = plain.sample(), sent.sample()
        assert batch.device == torch.device("cpu")
        assert set(batch.keys(True, True)) == set(keys)
        assert all(torch.equal(batch[key], expected[key]) for key in keys)
    again = pickle.loads(pickle.dumps(sent))
    assert torch.equal(again.sample()["observation"], plain.sample()["observation"])
    sent.shutdown()


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"prefetch": 1}])
def test_entries_asked_for_are_delivered_and_absent_ones_refused(two_games, options):
    keys = ["action", ("next", "reward"), "index"]
    replay = OfflineAtariReplay(two_games, batch_size=6, keys=keys, **options)
    assert set(replay.sample().keys(True, True)) == set(keys)
    replay.shutdown()
    every = OfflineAtariReplay(two_games, batch_size=6).sample()
    replay = OfflineAtariReplay(two_games, batch_size=6, keys=["index", "next"], **options)
    assert (replay.sample() == every.select("index", "next")).all()
    replay.shutdown()
    replay = OfflineAtariReplay(two_games, batch_size=6, keys=["action"], **options)
    batch, info = replay.sample(return_info=True)
    assert set(batch.keys(True, True)) == {"action"}
    assert torch.equal(batch["action"], AtariFrameStorage(two_games)[info["index"]]["action"])
    replay.shutdown()
    replay = OfflineAtariReplay(two_games, batch_size=6, keys=[*keys, "observations"], **options)
    with pytest.raises(KeyError, match=r"keys must be entries of the batch .* got \['observations'\]"):
        replay.sample()
    replay.shutdown()


def test_another_kind_of_sampler_is_refused_with_the_buffer_that_takes_it(two_games):
    replay = OfflineAtariReplay(two_games, batch_size=6)
    replay.set_sampler(SamplerWithoutReplacement())
    with pytest.raises(TypeError, match=r"TensorDictReplayBuffer\(storage=AtariFrameStorage\(...\), sampler=...\)"):
        replay.sample()


def test_an_ensemble_continues(two_games):
    def ensemble():
        buffers = [OfflineAtariReplay(two_games, batch_size=12, games=game, seed=4) for game in ("Breakout", "Pong")]
        return ReplayBufferEnsemble(*buffers, batch_size=8, sample_from_all=True)

    first, second = ensemble(), ensemble()
    assert first.sample().shape == (2, 4)
    second.load_state_dict(first.state_dict())
    assert (second.sample() == first.sample()).all()


def test_frames_are_read_in_place(two_games):
    storage = OfflineAtariReplay(two_games, batch_size=6).storage
    reader = storage._reader
    zeros = np.zeros(2, np.int64)
    out = np.full((2, 3, 84, 84), 7, np.uint8)
    result = reader.read(zeros, zeros, zeros, zeros + 2, length=3, out=out)
    assert result is out and not out[:, 2].any()
    assert np.array_equal(out, reader.read(zeros, zeros, zeros, zeros + 2, length=3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_gpu_gets_the_same_batches_and_never_keeps_the_host_waiting(two_games, prefetch, n_steps):
    plain = OfflineAtariReplay(two_games, batch_size=32, n_steps=n_steps)
    replay = OfflineAtariReplay(two_games, batch_size=32, n_steps=n_steps, prefetch=prefetch, device="cuda")
    assert (replay.sample().cpu() == plain.sample()).all()
    busy = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(60):
        busy @ busy
    end.record()
    began = time.perf_counter()
    batches = [replay.sample() for _ in range(8)]
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    assert seconds < start.elapsed_time(end) / 1e3 / 2  # the device was still at the products
    for batch in batches:
        assert (batch.cpu() == plain.sample()).all()
    replay.shutdown()
