from __future__ import annotations

import numpy as np
import pytest

from torchrl_sql.envs import AtariVector, Emulator
from torchrl_sql.envs.lockstep import EmulatorError, Lockstep
from torchrl_sql.envs.slots import Slot
from torchrl_sql.evaluation.rollout import episode_seed

SHORT = Emulator(max_env_frames=80)
"""Twenty agent steps per episode."""


@pytest.fixture
def players():
    made = []

    def make(games=("Breakout", "Freeway"), num_emulators=4, seed=3):
        made.append(Lockstep(games, num_emulators, SHORT, seed=seed))
        return made[-1]

    yield make
    for each in made:
        each.close()


def play(players, num_steps, rng, first=0):
    ended = []
    for step in range(first, first + num_steps):
        ended += players.step(rng.choice([0, 2, 5], len(players)), {"step": step})
    return ended


def test_emulators_take_turns_with_games_and_each_plays_episode_after_episode(players):
    together = players()
    together.begin({"step": -1})
    ended = play(together, 45, np.random.default_rng(0))
    assert together.game_id.tolist() == [0, 1, 0, 1]
    assert [(episode.emulator, episode.number) for episode in ended] == [(i, k) for k in (0, 1) for i in range(4)]
    assert [episode.labels["step"] for episode in ended[::4]] == [-1, 19]  # an episode has 20 steps: 0 to 19
    for episode in ended:
        assert len(episode.actions) == len(episode.rewards) == 20
        assert episode.truncated and not episode.terminated and len(episode.frames) == 21
    assert [len(episode.actions) for episode in together.episodes] == [5] * 4


def test_an_episode_is_what_the_emulator_plays_alone(players):
    together = players(games=("Breakout",), num_emulators=2)
    together.begin({})
    ended = play(together, 20, np.random.default_rng(1))
    alone = AtariVector("Breakout", 1, SHORT)
    seeds = [np.random.SeedSequence([3, 1, 0], spawn_key=(1,)).generate_state(1)[0] & 0x7FFFFFFF]
    frames = [alone.reset(np.array(seeds))[0, -1].copy()]
    rewards = []
    for action in ended[1].actions:
        observation, reward, _, _ = alone.step(np.array([action]))
        frames.append(observation[0, -1].copy())
        rewards.append(float(reward[0]))
    assert rewards == ended[1].rewards
    np.testing.assert_array_equal(np.stack(frames), np.stack(ended[1].frames))


def test_no_seed_is_one_of_evaluation(players, monkeypatch):
    """Assault is the fourth game by name, whose evaluation had the seeds of the fourth emulator."""
    learning, start = [], Slot.start

    def noted(slot, game, seed):
        learning.append(seed)
        start(slot, game, seed)

    monkeypatch.setattr(Slot, "start", noted)
    together = players(games=("Assault",), seed=0)
    together.begin({})
    play(together, 20, np.random.default_rng(1))
    assert len({*learning}) == len(learning) == 8
    assert not {*learning} & {episode_seed(0, "Assault", number) for number in range(100)}


@pytest.mark.parametrize("num_steps", [0, 7, 33])
def test_other_emulators_continue_where_these_are(players, num_steps):
    whole, parts = players(), players()
    whole.begin({"step": -1})
    ended = play(whole, num_steps, np.random.default_rng(2))
    again = parts.play_again([episode.state_dict() for episode in (*ended, *whole.episodes)])
    assert [vars(episode) for episode in map(plain, again)] == [vars(episode) for episode in map(plain, ended)]
    np.testing.assert_array_equal(parts.observation, whole.observation)
    one, other = (play(each, 25, np.random.default_rng(4), num_steps) for each in (whole, parts))
    assert [vars(episode) for episode in map(plain, one)] == [vars(episode) for episode in map(plain, other)]


def plain(episode):
    """With frames that compare."""
    episode.frames = [frame.tobytes() for frame in episode.frames]
    return episode


def test_emulators_that_play_something_else_do_not_continue(players):
    whole, other = players(), players()
    whole.begin({})
    states = [episode.state_dict() for episode in (*play(whole, 22, np.random.default_rng(0)), *whole.episodes)]
    changed = states[0] | {"actions": states[0]["actions"][:-1]}  # 19 steps are not an episode
    with pytest.raises(ValueError, match="is not what it was"):
        other.play_again([changed, *states[1:]])


def test_nor_do_those_that_see_something_else_in_as_many_steps(players):
    whole, other = players(), players(seed=99)
    whole.begin({})
    states = [episode.state_dict() for episode in (*play(whole, 22, np.random.default_rng(0)), *whole.episodes)]
    with pytest.raises(ValueError, match="is not what it was"):
        other.play_again(states)


def test_emulators_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="num_emulators must be a multiple of the 2 games, got 3"):
        Lockstep(["Breakout", "Freeway"], 3, seed=0)


def test_an_emulator_that_fails_is_named(players, monkeypatch):
    together = players()
    together.begin({})
    play(together, 2, np.random.default_rng(0))
    receive = Slot.receive

    def fail(slot):
        receive(slot)
        if slot is together._slots[3]:
            raise RuntimeError("Error in worker")

    monkeypatch.setattr(Slot, "receive", fail)
    with pytest.raises(EmulatorError, match="emulator 3 of Freeway failed at step 2 of its episode 0: Error in worker"):
        play(together, 1, np.random.default_rng(0))


def test_a_process_that_dies_is_an_emulator_that_fails(players):
    together = players()
    together.begin({})
    together._slots[0]._vector._consoles[0]._process._process.kill()
    with pytest.raises(
        EmulatorError, match=r"emulator \d of \w+ failed at step \d of its episode 0: .* ended by SIGKILL"
    ):
        for _ in range(2):  # the first step may be sent before it is dead
            together.step(np.zeros(4, int), {})
