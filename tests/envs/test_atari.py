from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_sql.envs import AtariEnv, AtariVector, Emulator


def play(vector: AtariVector, seeds: list[int], actions: np.ndarray) -> np.ndarray:
    observations = [vector.reset(np.array(seeds)).copy()]
    for action in actions:
        observations.append(vector.step(action)[0].copy())
    return np.stack(observations, axis=1)  # [N, T + 1, 4, 84, 84]


def test_frames_equal_gymnasiums_preprocessing():
    actions = np.random.default_rng(0).choice([0, 1, 3, 4], size=60)
    env = AtariPreprocessing(
        gymnasium.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=True),
        noop_max=0,
        frame_skip=4,
        screen_size=84,
        grayscale_obs=True,
    )
    expected = [env.reset(seed=0)[0]] + [env.step(action)[0] for action in actions]
    ours = play(AtariVector("Breakout", 1, Emulator(sticky_action_probability=0.0)), [0], actions[:, None])[0, :, -1]
    np.testing.assert_array_equal(ours, np.stack(expected))


def test_stack_is_zero_padded_at_reset_and_slides_by_one():
    stacks = play(AtariVector("Pong", 1), [3], np.full((6, 1), 2))[0]
    assert not stacks[0, :3].any() and stacks[0, 3].any()
    for t in range(6):
        np.testing.assert_array_equal(stacks[t + 1, :3], stacks[t, 1:])


def test_an_episode_depends_on_its_seed_alone():
    actions = np.random.default_rng(1).integers(0, 18, size=(40, 3))
    together = play(AtariVector("Breakout", 3), [5, 6, 7], actions)
    alone = play(AtariVector("Breakout", 1), [6], actions[:, 1:2])
    np.testing.assert_array_equal(together[1], alone[0])


def test_illegal_actions_act_as_noop():
    # In Freeway only NOOP, UP and DOWN are legal; UPRIGHT (6) would move the chicken if it reached the emulator.
    noop = play(AtariVector("Freeway", 1), [0], np.zeros((30, 1), dtype=int))
    illegal = play(AtariVector("Freeway", 1), [0], np.full((30, 1), 6))
    up = play(AtariVector("Freeway", 1), [0], np.full((30, 1), 2))
    np.testing.assert_array_equal(noop, illegal)
    assert (noop != up).any()


def test_partial_reset_leaves_the_others_and_nothing_is_reset_by_itself():
    vector = AtariVector("Breakout", 2, Emulator(max_env_frames=40))
    vector.reset(np.array([0, 1]))
    for _ in range(10):
        observation, _, terminated, truncated = vector.step(np.array([1, 1]))
    assert truncated.all() and not terminated.any()
    last = observation[1].copy()
    observation = vector.reset(np.array([7]), np.array([True, False]))
    assert not observation[0, :3].any()
    np.testing.assert_array_equal(observation[1], last)
    with pytest.raises(ValueError, match=r"copies must be reset before a step, got \[1\] without an episode"):
        vector.step(np.array([1, 1]))
    vector.reset(np.array([8]), np.array([False, True]))
    observation, _, _, _ = vector.step(np.array([1, 1]))
    assert not observation[:, :2].any() and observation[:, 2:].any(axis=(2, 3)).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sticky_action_probability": -0.1}, r"sticky_action_probability must be in \[0, 1\], got -0.1"),
        ({"sticky_action_probability": 1.5}, r"sticky_action_probability must be in \[0, 1\], got 1.5"),
        ({"max_env_frames": 0}, "max_env_frames must be at least 1, got 0"),
    ],
)
def test_emulators_that_cannot_be_had_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Emulator(**setting)


def test_parts_of_frames_are_refused():
    with pytest.raises(TypeError, match=r"max_env_frames must be an integer, got 100\.5"):
        Emulator(max_env_frames=100.5)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], [-1, 2], [1, 2**31], 1])
def test_seeds_that_cannot_be_had_are_refused(seeds):
    with pytest.raises(ValueError, match=r"seeds must be 2 numbers in 0\.\.2\^31-1, one per copy that is reset, got"):
        AtariVector("Breakout", 2).reset(np.array(seeds))


@pytest.mark.parametrize("actions", [[1, -1], [1, 18], [1], [[1], [3]], [1.0, 3.0], 3])
def test_actions_that_cannot_be_had_are_refused_and_play_goes_on(actions):
    vector, same = (AtariVector("Breakout", 2) for _ in range(2))
    for each in (vector, same):
        each.reset(np.array([3, 4]))
    with pytest.raises(ValueError, match=r"actions must be integers \[2\] in 0..17, got"):
        vector.step(np.array(actions))
    for _ in range(3):
        for ours, expected in zip(vector.step(np.array([1, 3])), same.step(np.array([1, 3])), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_seed_given_at_reset_is_used_and_other_words_are_refused():
    env = TransformedEnv(AtariEnv("Breakout", 2))

    def play():
        return env.reset(seed=5), env.rollout(20, lambda td: td.set("action", torch.tensor([1, 3])))

    for first, again in zip(play(), play(), strict=True):
        assert (first == again).all()
    with pytest.raises(TypeError, match="options"):
        env.reset(options={})


def test_unknown_game():
    with pytest.raises(ValueError, match="did you mean Breakout"):
        AtariVector("Breakut", 1)


class TestAtariEnv:
    def test_specs(self):
        env = AtariEnv("Breakout", 2, Emulator(max_env_frames=200))
        env.set_seed(0)
        check_env_specs(env)

    def test_rollout_equals_the_arrays_and_resets_finished_copies(self):
        env = AtariEnv("Breakout", 2, Emulator(max_env_frames=80), game_id=4)
        env.set_seed(0)
        rollout = env.rollout(30, break_when_any_done=False)
        assert (rollout["game_id"] == 4).all()
        assert rollout["next", "truncated"].squeeze(-1)[0].nonzero().flatten().tolist() == [19]
        assert not rollout["observation"][0, 20, :3].any()
        seeds = np.random.default_rng(0).integers(0, 2**31 - 1, size=2)
        # Not the 20th step: at the frame limit ALE leaves out the last frame of the maximum.
        ours = play(AtariVector("Breakout", 2), seeds.tolist(), rollout["action"][:, :19].numpy().T)
        np.testing.assert_array_equal(rollout["next", "observation"][:, :19].numpy(), ours[:, 1:])

    def test_same_seed_same_rollout(self):
        rollouts = []
        for _ in range(2):
            env = AtariEnv("Pong", 2, Emulator(max_env_frames=60))
            env.set_seed(3)
            torch.manual_seed(0)
            rollouts.append(env.rollout(40, break_when_any_done=False))
        assert (rollouts[0] == rollouts[1]).all()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_it_writes_and_reads_on_any_device(self):
        rollouts = []
        for device in ("cpu", "cuda"):
            env = AtariEnv("Breakout", 2, Emulator(max_env_frames=60), device=device)
            env.set_seed(3)
            rollouts.append(env.rollout(30, lambda td: td.set("action", td["game_id"] + 1), break_when_any_done=False))
        check_env_specs(env)
        assert rollouts[1].device.type == "cuda" and (rollouts[0] == rollouts[1].cpu()).all()
