"""The processes that play games: what they show, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import cv2
import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from torchrl_sql.envs import AtariVector, Emulator, consoles
from torchrl_sql.envs.console import IGNORED_SIGNALS, AreaResize
from torchrl_sql.games import GAMES, find_game


def ales_own(game: str, emulator: Emulator, *, screen: bool) -> AtariVectorEnv:
    return AtariVectorEnv(
        GAMES[game].rom,
        1,
        num_threads=1,
        repeat_action_probability=emulator.sticky_action_probability,
        max_num_frames_per_episode=emulator.max_env_frames,
        full_action_space=True,
        grayscale=not screen,
        img_height=210 if screen else 84,
        img_width=160 if screen else 84,
        stack_num=1 if screen else 4,
        noop_max=0,
        use_fire_reset=False,
        reward_clipping=False,
    )


@pytest.mark.parametrize(
    ("game", "max_env_frames", "screen", "ending"),
    [
        ("Breakout", 108_000, False, "terminated"),
        ("Freeway", 2_000, False, "truncated"),
        ("Pong", 1_602, False, "truncated"),  # the last step has two frames
        ("AirRaid", 400, False, "truncated"),  # 250 lines high
        ("AirRaid", 201, True, "truncated"),
        ("Breakout", 108_000, True, "terminated"),
    ],
)
def test_episodes_equal_those_of_ales_vector_emulator(game, max_env_frames, screen, ending):
    emulator = Emulator(max_env_frames=max_env_frames)
    theirs, ours = ales_own(game, emulator, screen=screen), AtariVector(game, 1, emulator, screen=screen)
    for seed in (0, 3, 2**31 - 1):
        rng = np.random.default_rng(seed)
        expected, found = theirs.reset(seed=np.array([seed]))[0], ours.reset(np.array([seed]))
        ended, action, rewards = False, 0, 0
        while not ended:
            np.testing.assert_array_equal(found, expected)
            action = action if rng.random() < 0.5 else int(rng.choice(GAMES[game].minimal_actions))
            expected, reward, terminated, truncated, _ = theirs.step(np.array([action]))
            found, *rest = ours.step(np.array([action]))
            assert [column.tolist() for column in rest] == [reward.tolist(), terminated.tolist(), truncated.tolist()]
            ended, rewards = bool(terminated[0] or truncated[0]), rewards + int(reward[0])
        np.testing.assert_array_equal(found, expected)
        assert (terminated[0], truncated[0]) == (ending == "terminated", ending == "truncated")
        assert rewards or game not in ("Breakout", "Pong")


def test_every_game_starts_as_in_ales_vector_emulator():
    for game in GAMES:
        theirs, ours = ales_own(game, Emulator(), screen=False), AtariVector(game, 1)
        last = GAMES[game].minimal_actions[-1]
        for seed in (1, 2):  # the second after some play
            expected, found = theirs.reset(seed=np.array([seed]))[0], ours.reset(np.array([seed]))
            for _ in range(6):
                np.testing.assert_array_equal(found, expected, err_msg=f"{game}, seed {seed}")
                # ALE's own takes places in the actions that its game accepts: in Skiing, 3 is LEFT.
                place = [action.value for action in theirs.ale.get_action_set()].index(last)
                expected, found = theirs.step(np.array([place]))[0], ours.step(np.array([last]))[0]


@pytest.mark.parametrize("game", ["Freeway-m1", "Freeway-d1", "Breakout-m12-d1", "Pong-m1-d3"])
def test_variations_equal_gymnasiums(game):
    known = find_game(game)
    actions = np.random.default_rng(0).choice(known.minimal_actions, size=60)
    env = AtariPreprocessing(
        gymnasium.make(
            f"ALE/{known.base}-v5",
            mode=known.mode,
            difficulty=known.difficulty,
            frameskip=1,
            repeat_action_probability=0.0,
            full_action_space=True,
        ),
        noop_max=0,
        frame_skip=4,
        screen_size=84,
        grayscale_obs=True,
    )
    theirs = np.stack([env.reset(seed=0)[0]] + [env.step(action)[0] for action in actions])

    def play(name):
        vector = AtariVector(name, 1, Emulator(sticky_action_probability=0.0))
        return np.stack([vector.reset(np.array([0]))[0, -1]] + [vector.step(a)[0][0, -1] for a in actions[:, None]])

    np.testing.assert_array_equal(play(game), theirs)
    assert (play(known.base) != theirs).any()


@pytest.mark.parametrize("game", ["Freeway-m1", "Breakout-m12-d1", "BeamRider-d1"])
def test_a_variation_begun_anew_after_play_is_that_of_a_console_just_made(game):
    played = AtariVector(game, 1)
    for seed in (3, 4):
        fresh, found = AtariVector(game, 1), played.reset(np.array([seed]))
        expected = fresh.reset(np.array([seed]))
        for action in np.random.default_rng(seed).choice(find_game(game).minimal_actions, (40, 1)):
            np.testing.assert_array_equal(found, expected)
            (expected, *rest), (found, *ours) = fresh.step(action), played.step(action)
            assert [column.tolist() for column in ours] == [column.tolist() for column in rest]


def test_a_step_that_nobody_received_is_not_taken_for_the_next_episodes_beginning():
    vector, fresh = AtariVector("Freeway", 2), AtariVector("Freeway", 2)
    vector.reset(np.array([1, 2]))
    vector.send(np.array([2, 2]))
    with pytest.raises(RuntimeError, match="a step of freeway is under way"):
        vector.send(np.array([2, 2]))
    np.testing.assert_array_equal(vector.reset(np.array([3, 4])), fresh.reset(np.array([3, 4])))
    for _ in range(3):
        np.testing.assert_array_equal(vector.step(np.array([2, 0]))[0], fresh.step(np.array([2, 0]))[0])
    with pytest.raises(RuntimeError, match="nothing was asked of freeway"):
        vector.recv()


def test_every_game_plays_its_last_mode_at_its_last_difficulty():
    for game in GAMES.values():
        if len(game.modes) * len(game.difficulties) > 1:
            vector = AtariVector(f"{game.name}-m{game.modes[-1]}-d{game.difficulties[-1]}", 1)
            seen, ended = vector.reset(np.array([0])).any(), False
            while not seen:  # some begin with a black screen
                assert not ended, vector.game
                observation, _, terminated, _ = vector.step(np.array([0]))
                seen, ended = observation.any(), terminated[0]
            assert vector.game != game.name


pictures = npst.arrays(
    np.uint8,
    st.tuples(st.integers(84, 250), st.integers(84, 160), st.just(3)),
    elements=st.integers(0, 255),
    fill=st.integers(0, 255),
)


@settings(deadline=None, max_examples=50)
@given(pictures, st.integers(20, 84), st.integers(20, 84), st.randoms())
def test_pictures_are_scaled_as_by_opencv(picture, height, width, random):
    noise = np.random.default_rng(random.getrandbits(32)).integers(0, 256, picture.shape, dtype=np.uint8)
    for one in (picture, noise, noise[..., 0]):
        whole = all(old % new == 0 for old, new in zip(one.shape, (height, width), strict=False))
        if not whole:  # then OpenCV sums integers
            expected = cv2.resize(np.ascontiguousarray(one), (width, height), interpolation=cv2.INTER_AREA)
            np.testing.assert_array_equal(AreaResize(one.shape[:2], (height, width))(one), expected)


def process_of(vector: AtariVector) -> subprocess.Popen:
    return vector._consoles[0]._process._process


def test_a_process_that_dies_is_named_and_replaced():
    vector, other = AtariVector("Pong", 1, num_processes=1), AtariVector("Breakout-m4", 1, num_processes=1)
    for one in (vector, other):
        one.reset(np.array([0]))
    process_of(vector).kill()
    message = r"the process that plays pong ended by SIGKILL: .* start the command again"
    with pytest.raises(ChildProcessError, match=message):
        for _ in range(2):  # the first may be sent before it is dead
            vector.step(np.array([0]))
    with pytest.raises(ChildProcessError, match="breakout"):
        other.reset(np.array([0]))
    assert not vector.runs and not other.runs
    vector = AtariVector("Pong", 1, num_processes=1)
    assert vector.reset(np.array([0])).any() and vector.runs


def test_signals_are_for_the_process_that_plays_for_itself():
    vector = AtariVector("Pong", 1, num_processes=1)
    vector.reset(np.array([0]))
    for number in IGNORED_SIGNALS:
        process_of(vector).send_signal(number)
    assert vector.step(np.array([0]))[0].any() and vector.runs


def test_also_while_that_process_starts():
    process = consoles._ConsoleProcess()
    process._process.send_signal(signal.SIGTERM)
    assert process.stop() == 0


FORKS = """
import os, signal, threading, numpy as np
from torchrl_sql.envs import AtariVector, consoles
vector = AtariVector("Pong", 1, num_processes=1)
with consoles._starting:  # as another thread holds it while it starts a process
    pid = os.fork()
    if pid == 0:
        signal.alarm(250)
        seen = AtariVector("Pong", 1, num_processes=1).reset(np.array([0])).any()
        consoles._stop_processes()
        os._exit(0 if seen else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
pid = os.fork()
if pid == 0:  # holds the connections of its parent
    signal.alarm(250)
    signal.pause()
(process,) = consoles._processes[os.getpid()]
assert process.stop() == 0
os.kill(pid, signal.SIGKILL)
"""


def test_forks_neither_wait_for_a_lock_nor_keep_processes_from_ending():
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=300, stdin=subprocess.DEVNULL)
    assert time.monotonic() - began < 200


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_no_process_outlives_the_one_that_started_it(how):
    code = (
        "from torchrl_sql.envs.console import Settings\n"
        "from torchrl_sql.envs.consoles import RemoteConsole\n"
        "consoles = [RemoteConsole(Settings('pong', 0, 0, 0.25, 100, (84, 84), False)) for _ in range(2)]\n"
        "print(*{console._process._process.pid for console in consoles}, flush=True)\n"
        "input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    with parent.stdin, parent.stdout:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert children
        if how == "kill":
            parent.kill()
        else:
            parent.stdin.write(b"\n")
            parent.stdin.flush()
        parent.wait(300)
        deadline = time.monotonic() + 300
        while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)
