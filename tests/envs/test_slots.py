"""Emulators that take turns play what they would play alone."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.envs.slots import Slots

SHORT = Emulator(max_env_frames=40)


def alone(game, seed):
    """Frames and rewards of ten steps of FIRE."""
    vector = AtariVector(game, 1, SHORT)
    frames, rewards = [vector.reset(np.array([seed]))[0]], []
    for _ in range(10):
        observation, reward, _, _ = vector.step(np.array([1]))
        frames.append(observation[0])
        rewards.append(float(reward[0]))
    return np.stack(frames), rewards


def play(slots, keys):
    """Plays (game, seed) pairs, two at a time, each next one in the slot that is free."""
    waiting, played, order = list(keys), {}, []

    def start(slot=None):
        game, seed = waiting.pop(0)
        slots.start((game, seed), game, seed, slot=slot)

    start(), start()
    while (slot := slots.next()) is not None:
        frames, rewards = played.setdefault(slot.episode, ([], []))
        rewards += [slot.reward] * bool(frames)
        frames.append(slot.observation.copy())
        order.append(slot.episode)
        if not slot.truncated:
            slots.send(slot, 1)
        elif waiting:
            start(slot)
    return {key: (np.stack(frames), rewards) for key, (frames, rewards) in played.items()}, order


def test_slots_play_as_emulators_alone_and_change_games():
    keys = [("Breakout", 1), ("Freeway", 2), ("Freeway", 3), ("Breakout", 4), ("Breakout", 1)]
    with Slots(SHORT) as slots:
        played, _ = play(slots, keys)
        assert len(slots) == 0
    for game, seed in keys:
        frames, rewards = alone(game, seed)
        if keys.count((game, seed)) == 1:
            np.testing.assert_array_equal(played[game, seed][0], frames)
            assert played[game, seed][1] == rewards
    np.testing.assert_array_equal(played["Breakout", 1][0], np.concatenate([alone("Breakout", 1)[0]] * 2))


def test_the_one_that_waits_longest_is_next():
    with Slots(SHORT) as slots:
        played, order = play(slots, [("Freeway", 1), ("Freeway", 2)])
    firsts = [order.index(key) for key in played]
    lasts = [len(order) - 1 - order[::-1].index(key) for key in played]
    turns = order[max(firsts) : min(lasts)]  # while both play
    assert all(one != other for one, other in pairwise(turns))


def test_emulators_are_kept_and_one_left_in_the_middle_of_a_step_plays_on_as_new(monkeypatch):
    monkeypatch.setattr("torchrl_sql.envs.slots._kept", {})  # whatever was played before
    with Slots(SHORT) as slots:
        slots.start(0, "Freeway", 5)
        slot = slots.next()
        vector = slot._vector
        slots.send(slot, 1)
    assert slot.game is None
    with Slots(SHORT) as slots:
        slots.start(0, "Freeway", 6)
        slot = slots.next()
        assert slot._vector is vector
        np.testing.assert_array_equal(slot.observation, alone("Freeway", 6)[0][0])
    with Slots(Emulator(max_env_frames=80)) as slots:  # other settings, another emulator
        slots.start(0, "Freeway", 6)
        assert slots.next()._vector is not vector


@pytest.mark.parametrize("when", ["send", "recv"])
def test_a_signal_between_a_step_and_its_record_neither_hangs_nor_leaves_a_used_emulator(when, monkeypatch):
    emulator = Emulator(max_env_frames=120)  # no other test's

    def interrupted():
        original = getattr(AtariVector, when)

        def call(self, *args):
            original(self, *args)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Slots(emulator) as slots:
            slots.start(0, "Freeway", 5)
            slot = slots.next()
            monkeypatch.setattr(AtariVector, when, call)
            slots.send(slot, 1)
            slots.next()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    monkeypatch.undo()
    with Slots(emulator) as slots:
        slots.start(0, "Freeway", 6)
        slot = slots.next()
        slots.send(slot, 0)
        frame = slots.next().observation
    vector = AtariVector("Freeway", 1, emulator)
    vector.reset(np.array([6]))
    np.testing.assert_array_equal(frame, vector.step(np.array([0]))[0][0])
