"""Against data sets that the real library writes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys

import ale_py
import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from torchrl_sql.data import AtariFrameStorage, FrameStore
from torchrl_sql.data.importers import ImportFailedError, import_minari
from torchrl_sql.data.importers.minari import MinariSource

minari = pytest.importorskip("minari", reason="the optional package minari is not installed")
pytest.importorskip("h5py", reason="h5py, which minari writes through, is not installed")

FRAMES = gymnasium.spaces.Box(0, 255, (84, 84), np.uint8)
STACKS = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a data set with minari; returns its id."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(episodes, *, observation_space=FRAMES, num_actions=6, name="pong/test-v0", jpeg=False, env=None):
        buffers = [
            minari.data_collector.EpisodeBuffer(
                observations=np.asarray(observations),
                actions=list(actions),
                rewards=list(rewards),
                terminations=[False] * (len(actions) - 1) + [ending == "terminated"],
                truncations=[False] * (len(actions) - 1) + [ending == "truncated"],
            )
            for observations, actions, rewards, ending in episodes
        ]
        minari.create_dataset_from_buffers(
            name,
            buffers,
            env=env,
            observation_space=observation_space,
            action_space=gymnasium.spaces.Discrete(num_actions),
            jpeg_encoding=jpeg,
            **dict.fromkeys(("author", "author_email", "algorithm_name", "code_permalink", "description"), "test"),
        )
        return name

    return write


pytestmark = [
    pytest.mark.filterwarnings("ignore:`eval_env` is set to None:UserWarning"),
    pytest.mark.filterwarnings("ignore:env_spec is None:UserWarning"),
]


def played(lab, endings=("terminated", "truncated", "cut"), num_actions=6):
    """(observations [T + 1], actions, rewards, ending) of 5, 6, 7, ... steps."""
    rng, episodes = np.random.default_rng(0), []
    for number, ending in enumerate(endings):
        num_steps = 5 + number
        frames = lab.make_episode(100 * (number + 1), num_steps, final=True).frames
        episodes.append((frames, rng.integers(0, num_actions, num_steps), rng.normal(0, 3, num_steps), ending))
    return episodes


def stacked(frames):
    padded = np.concatenate([np.repeat(frames[:1], 3, 0), frames])
    return np.stack([padded[k : k + 4] for k in range(len(frames))])


def check(store, episodes, lab, full_actions, run):
    """Every transition, one by one."""
    expected = [
        lab.Episode(
            frames[: len(actions)] if ending == "terminated" else frames,
            full_actions[actions],
            np.asarray(rewards, np.float32),
            ending == "terminated",
        )
        for frames, actions, rewards, ending in episodes
    ]
    transitions = list(lab.reference(expected, 1, 0.99))
    batch = AtariFrameStorage(store, "Pong")[:]
    assert len(batch) == len(transitions) == sum(len(e.actions) for e in expected)
    np.testing.assert_array_equal(batch["observation"].numpy(), np.stack([t["observation"] for t in transitions]))
    np.testing.assert_array_equal(batch["action"].numpy(), [t["action"] for t in transitions])
    np.testing.assert_allclose(batch["next", "reward"].numpy()[:, 0], [t["reward"] for t in transitions])
    np.testing.assert_array_equal(batch["next", "terminated"].numpy()[:, 0], [t["terminated"] for t in transitions])
    np.testing.assert_array_equal(store.recording("Pong", run).rewards, np.concatenate([e.rewards for e in expected]))


PONG = np.array([0, 1, 3, 4, 11, 12])


def test_frames_with_minimal_actions(lab, store, write):
    episodes = played(lab)
    (summary,) = import_minari(write(episodes), store.path, game="Pong")
    check(store, episodes, lab, PONG, "pong-test-v0")
    manifest = store.recording("Pong").manifest
    assert (manifest.source, manifest.rewards) == ("Minari data set pong/test-v0", "raw")
    assert (summary.num_rows_read, summary.num_transitions, summary.dropped) == (18, 18, {})
    assert (summary.num_episodes, summary.num_truncated, summary.num_cut) == (2, 1, 1)
    assert summary.mean_clipped_return == pytest.approx(sum(np.clip(e[2], -1, 1).sum() for e in episodes[:2]) / 2)


@pytest.mark.parametrize(
    ("shape", "convert"),
    [((4, 84, 84), stacked), ((84, 84, 1), lambda f: f[..., None]), ((1, 84, 84), lambda f: f[:, None])],
)
def test_stacks_and_channels_with_full_actions(lab, store, write, shape, convert):
    episodes = played(lab, num_actions=18)
    space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
    converted = [(convert(frames), *rest) for frames, *rest in episodes]
    import_minari(write(converted, observation_space=space, num_actions=18), store.path, game="Pong", run="mine")
    check(store, episodes, lab, np.arange(18), "mine")


def test_emulator_frames_and_the_game_of_the_environment(tmp_path, store, write):
    """84x84 frames of gymnasium's preprocessing; the environment says which game it was."""
    pytest.importorskip("cv2", reason="AtariPreprocessing needs OpenCV")
    gymnasium.register_envs(ale_py)
    env = gymnasium.wrappers.AtariPreprocessing(gymnasium.make("ALE/Pong-v5", frameskip=1))
    observations, actions, rewards = [env.reset(seed=0)[0].copy()], [], []
    env.action_space.seed(0)
    for _ in range(60):
        actions.append(int(env.action_space.sample()))
        observation, reward, *_ = env.step(actions[-1])
        observations.append(observation.copy())
        rewards.append(reward)
    name = write([(observations, actions, rewards, "truncated")], name="atari/pong/mine-v3", env=env)
    env.close()
    import_minari(tmp_path / "minari" / name, store.path)
    run = store.recording("Pong", "atari-pong-mine-v3")
    np.testing.assert_array_equal(run.open_frames()[:61].read().result(), observations)
    np.testing.assert_array_equal(run.actions, PONG[actions])
    assert np.ptp(run.open_frames()[10].read().result()) > 100


# What the data set says of itself


def spec(*wrappers, **kwargs):
    """Of an environment with wrappers, as gymnasium writes it."""
    return EnvSpec(
        "ALE/Pong-v5",
        entry_point="ale_py.env:AtariEnv",
        kwargs={"game": "pong", "frameskip": 1, **kwargs},
        additional_wrappers=tuple(WrapperSpec(name, f"somewhere:{name}", arguments) for name, arguments in wrappers),
    )


PREPROCESSING = ("AtariPreprocessing", {"frame_skip": 4, "terminal_on_life_loss": False})


@pytest.fixture
def write_with(tmp_path, write):
    """Writes a data set that says it comes from an environment, without making that."""

    def write_with(env, episodes):
        name = write(episodes)
        metadata = tmp_path / "minari" / name / "data" / "metadata.json"
        fields = json.loads(metadata.read_text())
        metadata.write_text(json.dumps(fields | ({} if env is None else {"env_spec": env.to_json()})))
        return name

    return write_with


def clipped(episodes):
    return [(frames, actions, np.clip(rewards, -1, 1), ending) for frames, actions, rewards, ending in episodes]


@pytest.mark.parametrize(
    ("env", "given", "expected"),
    [
        (spec(PREPROCESSING), None, "raw"),
        (spec(PREPROCESSING, ("ClipReward", {"min_reward": -1, "max_reward": 1})), None, "clipped"),
        (spec(PREPROCESSING, ("ClipReward", {"min_reward": -1, "max_reward": 1})), "clipped", "clipped"),
        (spec(PREPROCESSING, ("TransformReward", {"func": None})), "clipped", "clipped"),
        (spec(("MaxAndSkipObservation", {"skip": 4}), ("FrameStackObservation", {"stack_size": 4})), None, "raw"),
        (spec(("ResizeObservation", {}), frameskip=4, mode=0, difficulty=None), None, "raw"),
        (None, None, "raw"),
        (None, "clipped", "clipped"),
    ],
)
def test_rewards_are_what_the_environment_or_the_user_says(lab, store, write_with, caplog, env, given, expected):
    import_minari(write_with(env, clipped(played(lab))), store.path, game="Pong", rewards=given)
    assert store.recording("Pong").manifest.rewards == expected
    assert ("does not say how it was recorded" in caplog.text) == (env is None and given is None)


@pytest.mark.parametrize(
    ("env", "given", "message"),
    [
        (
            spec(("AtariPreprocessing", {"terminal_on_life_loss": True})),
            "raw",
            "AtariPreprocessing ends them with each",
        ),
        (spec(("EpisodicLifeEnv", None)), "raw", "EpisodicLifeEnv ends them with each life"),
        (spec(("AtariPreprocessing", {"frame_skip": 1})), None, "steps must be of 4 emulator frames, got 1"),
        (spec(PREPROCESSING, frameskip=4), None, "steps must be of 4 emulator frames, got 16"),
        (spec(frameskip=(2, 5)), None, r"steps must be of 4 emulator frames, got \[2, 5\]"),
        (spec(PREPROCESSING, mode=1), None, "mode must be 0, as in Pong, got 1"),
        (spec(PREPROCESSING, difficulty=1), None, "difficulty must be 0, as in Pong, got 1"),
        (spec(PREPROCESSING, ("ClipReward", {"min_reward": -9, "max_reward": 9})), None, r"clipped to \[-1, 1\], got"),
        (spec(PREPROCESSING, ("ClipReward", {})), "raw", "rewards are clipped by its environment, cannot take them as"),
        (
            spec(PREPROCESSING, ("TransformReward", {"func": None})),
            None,
            r"what TransformReward did is unknown .*--rew",
        ),
    ],
)
def test_other_steps_episodes_and_rewards_are_refused(lab, store, write_with, env, given, message):
    with pytest.raises(ValueError, match=f"pong/test-v0: .*{message}"):
        import_minari(write_with(env, played(lab)), store.path, game="Pong", rewards=given)
    assert store.games == ()


@pytest.mark.parametrize("given", [None, "Pong-m1-d2"])
def test_the_environments_mode_and_difficulty_make_a_variation(lab, store, write_with, given):
    data_set = write_with(spec(PREPROCESSING, mode=1, difficulty=2), played(lab))
    import_minari(data_set, store.path, game=given)
    assert store.games == ("Pong-m1-d2",)


def test_an_environment_without_mode_and_difficulty_is_no_variation(lab, store, write_with):
    with pytest.raises(ValueError, match=r"pong/test-v0: mode must be 1, as in Pong-m1, got 0"):
        import_minari(write_with(spec(PREPROCESSING), played(lab)), store.path, game="Pong-m1")
    assert store.games == ()


def test_rewards_that_are_not_clipped_are_not_taken_as_clipped(lab, store, write):
    with pytest.raises(ImportFailedError, match=r"pong/test-v0, episode 0: rewards must be within \[-1, 1\].* got "):
        import_minari(write(played(lab)), store.path, game="Pong", rewards="clipped")


def test_a_data_set_recorded_anew_is_another(lab, tmp_path, store, write):
    """Same id, same number of steps, other frames."""
    import_minari(write(played(lab)), store.path, game="Pong")
    before = lab.tree(store.path)
    shutil.rmtree(tmp_path / "minari")
    others = [(frames[::-1].copy(), *rest) for frames, *rest in played(lab)]
    with pytest.raises(
        ImportFailedError, match="is there already, from another Minari data set pong/test-v0: part main"
    ):
        import_minari(write(others), store.path, game="Pong")
    assert lab.tree(store.path) == before


def test_jpeg_is_reported(lab, store, write, caplog):
    import_minari(write(played(lab), jpeg=True), store.path, game="Pong")
    assert "may hold its frames as JPEG" in caplog.text
    assert store.recording("Pong").num_steps == 18


def test_lossless_is_not_reported(lab, store, write, caplog):
    import_minari(write(played(lab)), store.path, game="Pong")
    assert "JPEG" not in caplog.text


def test_stopped_and_called_again(lab, tmp_path, store, write, monkeypatch):
    name = write(played(lab, ["terminated", "cut"] * 4))
    whole = FrameStore.create(tmp_path / "whole", chunk_frames=4, shard_frames=8)
    import_minari(name, whole.path, game="Pong")
    monkeypatch.setattr("torchrl_sql.data.importers.minari._COMMIT_INTERVAL_STEPS", 12)
    convert = MinariSource._convert

    for stop in (1, 3, 6):

        def stopped(self, data, stop=stop):
            if data.id == stop:
                raise OSError("stopped")
            return convert(self, data)

        monkeypatch.setattr(MinariSource, "_convert", stopped)
        with pytest.raises(ImportFailedError, match="stopped"):
            import_minari(name, store.path, game="Pong")
        assert store.games == ()
    monkeypatch.setattr(MinariSource, "_convert", convert)
    summaries = import_minari(name, store.path, game="Pong")
    assert lab.tree(store.path) == lab.tree(whole.path)
    assert import_minari(name, store.path, game="Pong") == summaries


def test_sources_travel_to_other_processes(lab, write):
    source = pickle.loads(pickle.dumps(MinariSource(write(played(lab)), "Pong")))
    assert source.count_rows() == 18


# Bad input


def test_unknown_sources_and_games(lab, store, write):
    with pytest.raises(FileNotFoundError, match="nobody/made-v0 is neither a folder"):
        import_minari("nobody/made-v0", store.path, game="Pong")
    name = write(played(lab))
    with pytest.raises(ValueError, match="pong/test-v0 comes from an environment it does not name: give the argument"):
        import_minari(name, store.path)
    with pytest.raises(ValueError, match="did you mean Pong"):
        import_minari(name, store.path, game="Pongg")
    with pytest.raises(ValueError, match=r"must be Discrete\(18\) or, as Breakout's minimal set, Discrete\(4\)"):
        import_minari(name, store.path, game="Breakout")
    assert store.games == ()


def test_colour_screens_are_refused(store, write):
    space = gymnasium.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    name = write([(np.zeros((3, 210, 160, 3), np.uint8), [0, 1], [0.0, 0.0], "cut")], observation_space=space)
    with pytest.raises(ValueError, match=r"observations must be uint8 \[84, 84\].*\(210, 160, 3\), uint8"):
        import_minari(name, store.path, game="Pong")


def test_float_frames_are_refused(store, write):
    space = gymnasium.spaces.Box(0, 1, (84, 84), np.float32)
    name = write([(np.zeros((3, 84, 84), np.float32), [0, 1], [0.0, 0.0], "cut")], observation_space=space)
    with pytest.raises(ValueError, match=r"observations must be uint8 .*\(84, 84\), float32"):
        import_minari(name, store.path, game="Pong")


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ((np.zeros((3, 84, 84), np.uint8), [0, 6], [0.0, 0.0], "cut"), r"actions must be 2 numbers in 0\.\.5"),
        (
            (np.zeros((4, 84, 84), np.uint8), [0, 1], [0.0, 0.0], "cut"),
            r"observations must be 3 frames or stacks, got uint8 \[4, 84",
        ),
        ((np.zeros((3, 84, 84), np.uint8), [0, 1], [0.0, np.nan], "cut"), "rewards must be finite"),
        ((np.zeros((3, 84, 84), np.uint8), [0, 1], [0.0], "cut"), "only the last of its 1 steps may be terminated"),
    ],
)
def test_damaged_episodes_are_named(lab, store, write, episode, message):
    name = write([played(lab)[0], episode])
    with pytest.raises(ImportFailedError, match=f"pong/test-v0, episode 1: {message}"):
        import_minari(name, store.path, game="Pong")
    assert store.games == ()


def test_damaged_files_are_named(lab, tmp_path, store, write):
    name = write(played(lab))
    data = tmp_path / "minari" / name / "data"
    os.truncate(data / "main_data.hdf5", 5000)
    with pytest.raises(ImportFailedError, match="pong/test-v0, episode 0 cannot be read"):
        import_minari(name, store.path, game="Pong")
    (data / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data/metadata\.json does not describe a Minari data set"):
        import_minari(name, store.path, game="Pong")
    (data / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"data/metadata\.json does not describe a Minari data set"):
        import_minari(data.parent, store.path, game="Pong")
    assert store.games == ()


def test_stacks_that_do_not_move_by_one_frame(lab, store, write):
    frames, *rest = played(lab)[0]
    name = write([(stacked(frames)[:, ::-1], *rest)], observation_space=STACKS)
    with pytest.raises(ImportFailedError, match="episode 0: each stack must be the one before, moved by one frame"):
        import_minari(name, store.path, game="Pong")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-sql\[minari\]'"):
        import_minari("pong/test-v0", tmp_path / "store", game="Pong")
