from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.envs import SKILLS, AtariVector, Behaviour, Emulator, SkillMixture, collect, weak_skills
from torchrl_sql.envs.behaviours import FIRE, LEFT, LEFTFIRE, NOOP, RIGHT, RIGHTFIRE, UP, describe
from torchrl_sql.games import GAMES

SHORT = Emulator(max_env_frames=400)


def make_store(path, *, num_steps, calls=1, game="Breakout", num_envs=3):
    """Collects in ``calls`` calls of growing targets, re-opening the writer each time."""
    store = FrameStore.create(path)
    policy = SkillMixture(game)
    for call in range(1, calls + 1):
        with store.writer(game, source="test", behaviours=policy.behaviour_names) as writer:
            collect(writer, policy, game, num_steps * call // calls, SHORT, seed=1, num_envs=num_envs)
    return store


def files(path):
    return {
        file.relative_to(path): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def test_collection_in_several_calls_ends_in_the_same_files(tmp_path):
    make_store(tmp_path / "once", num_steps=900)
    make_store(tmp_path / "often", num_steps=900, calls=3, num_envs=2)
    assert files(tmp_path / "once") == files(tmp_path / "often")


def test_stored_transitions_equal_what_the_policy_saw(tmp_path):
    store = make_store(tmp_path / "store", num_steps=400)
    run = store.recording("Breakout")
    storage = AtariFrameStorage(store)
    first_step = 0
    for index, episode in enumerate(run.episodes):
        rng = np.random.default_rng([1, list(GAMES).index("Breakout"), index])
        vector = AtariVector("Breakout", 1, SHORT)
        observation = vector.reset(np.array([int(rng.integers(2**31 - 1))]))
        batch = storage.get(np.arange(first_step, first_step + episode["num_steps"]))
        for t in range(episode["num_steps"]):
            np.testing.assert_array_equal(batch["observation"][t].numpy(), observation[0])
            observation, reward, terminated, truncated = vector.step(batch["action"][t : t + 1].numpy())
            assert batch["next", "reward"][t].item() == np.clip(reward[0], -1, 1)
            assert batch["next", "terminated"][t].item() == terminated[0]
            assert batch["next", "truncated"][t].item() == truncated[0]
            if not terminated[0]:
                np.testing.assert_array_equal(batch["next", "observation"][t].numpy(), observation[0])
        assert terminated[0] or truncated[0]
        first_step += episode["num_steps"]
    assert first_step == run.num_steps >= 400


def test_enough_steps_means_nothing_is_played(tmp_path):
    store = make_store(tmp_path / "store", num_steps=300)
    before = files(store.path)
    policy = SkillMixture("Breakout")
    with store.writer("Breakout", source="test", behaviours=policy.behaviour_names) as writer:
        collect(writer, policy, "Breakout", 300, seed=1)
    assert files(store.path) == before


def breakout_frame(*, ball: int | None, paddle: int) -> np.ndarray:
    frame = np.zeros((84, 84), dtype=np.uint8)
    frame[12:78, :4] = frame[12:78, 80:] = 142
    frame[76, paddle : paddle + 8] = 110
    if ball is not None:
        frame[50:52, ball] = 110
    return frame


def test_breakout_skill_follows_the_ball():
    skill = SKILLS["Breakout"].act
    assert skill(breakout_frame(ball=60, paddle=20)) == RIGHT
    assert skill(breakout_frame(ball=10, paddle=40)) == LEFT
    assert skill(breakout_frame(ball=24, paddle=20)) == NOOP
    assert skill(breakout_frame(ball=None, paddle=20)) == NOOP


def test_every_breakout_policy_serves_when_no_ball_is_in_play():
    for seed in range(3):
        _, act = SkillMixture("Breakout").start_episode(np.random.default_rng(seed))
        assert all(act(breakout_frame(ball=None, paddle=20)) == FIRE for _ in range(50))
        assert len({act(breakout_frame(ball=40, paddle=39)) for _ in range(300)}) > 1


def pong_frame(*, ball: int | None, paddle: int) -> np.ndarray:
    """Rows of the ball and of the paddle's upper end."""
    frame = np.full((84, 84), 87, np.uint8)
    frame[paddle : paddle + 7, 74:76] = 147
    if ball is not None:
        frame[ball : ball + 2, 40] = 236
    return frame


def test_pong_skill_brings_the_paddle_to_the_balls_height():
    skill = SKILLS["Pong"].act
    assert skill(pong_frame(ball=20, paddle=50)) == RIGHT and skill(pong_frame(ball=70, paddle=50)) == LEFT
    assert skill(pong_frame(ball=52, paddle=50)) == NOOP
    assert skill(pong_frame(ball=None, paddle=50)) == NOOP


def enduro_frame(*, car: int, ahead: int | None = None) -> np.ndarray:
    """A straight road from column 20 to 60, as by day; columns of the player's car and of one ahead."""
    frame = np.full((84, 84), 40, np.uint8)
    frame[44:62, [20, 60]] = 110
    frame[57:61, car - 4 : car + 5] = 192
    if ahead is not None:
        frame[50:53, ahead - 2 : ahead + 3] = 90
    return frame


def test_enduro_skill_keeps_to_the_middle_and_away_from_cars():
    skill = SKILLS["Enduro"].act
    assert skill(enduro_frame(car=40)) == FIRE
    assert skill(enduro_frame(car=30)) == RIGHTFIRE and skill(enduro_frame(car=50)) == LEFTFIRE
    assert skill(enduro_frame(car=40, ahead=43)) == LEFTFIRE and skill(enduro_frame(car=40, ahead=37)) == RIGHTFIRE
    assert skill(enduro_frame(car=40, ahead=52)) == FIRE
    assert skill(np.zeros((84, 84), np.uint8)) == FIRE


def test_qbert_skill_hops_on_most_cubes():
    emulator = AtariVector("Qbert", 1, Emulator(sticky_action_probability=0.0, max_env_frames=4_000))
    frames, score, ended = emulator.reset(np.array([0])), 0.0, False
    while not ended:
        frames, reward, terminated, truncated = emulator.step(np.array([SKILLS["Qbert"].act(frames[0, -1])]))
        score, ended = score + reward[0], terminated[0] or truncated[0]
    assert score >= 500  # 25 for each of 21 cubes; the best constant action scores 150 in as many frames
    assert SKILLS["Qbert"].act(np.zeros((84, 84), np.uint8)) == NOOP


def actions_of(behaviour: Behaviour, *, game="Freeway", num_steps=4000, seed=0) -> np.ndarray:
    _, act = SkillMixture(game, [behaviour]).start_episode(np.random.default_rng(seed))
    frame = np.zeros((84, 84), dtype=np.uint8)
    return np.array([act(frame) for _ in range(num_steps)])


def test_noise_has_the_stated_frequencies():
    def behaviour(**changes):
        return Behaviour(
            **{"name": "c", "skill_probability": (0, 0), "noise": "uniform", "repeat_probability": (0, 0)} | changes
        )

    uniform = actions_of(behaviour())
    assert set(uniform) == {0, 2, 5}
    np.testing.assert_allclose([(uniform == a).mean() for a in (0, 2, 5)], 1 / 3, atol=0.03)
    skilled = actions_of(behaviour(skill_probability=(0.7, 0.7)))
    assert (skilled == UP).mean() == pytest.approx(0.7 + 0.1, abs=0.03)
    repeated = actions_of(behaviour(repeat_probability=(0.5, 0.5)))
    assert (repeated[1:] == repeated[:-1]).mean() == pytest.approx(0.5 + 0.5 / 3, abs=0.03)


def test_components_are_equally_likely():
    policy = SkillMixture("Assault")
    drawn = np.array([policy.start_episode(np.random.default_rng(seed))[0] for seed in range(1500)])
    np.testing.assert_allclose(np.bincount(drawn) / 1500, 1 / 3, atol=0.04)
    assert policy.behaviour_names == ("skilled", "weak", "random")


def test_without_inertia_an_action_follows_itself_by_chance_only():
    (_, noisy, _) = weak_skills(0.0)
    actions = actions_of(replace(noisy, skill_probability=(0.0, 0.0)))
    assert (actions[1:] == actions[:-1]).mean() == pytest.approx(1 / 3, abs=0.03)
    assert "repeated with a probability of up to 0%" in describe("Freeway", weak_skills(0.0))


def test_description_states_script_reflex_and_ranges():
    text = describe("Breakout", weak_skills())
    assert text.startswith("The script: Moves the paddle under the ball. Always: Fires when no ball is seen")
    assert "33% of episodes (skilled): follows the script at 40% to 80% of the steps" in text
    assert "(random): plays actions from a distribution" in text
    assert "Always" not in describe("Freeway", weak_skills())


def test_a_game_without_skill_is_refused():
    with pytest.raises(ValueError, match=r"scripted skill \(.*Freeway.*\), got 'Tennis'"):
        SkillMixture("Tennis")
