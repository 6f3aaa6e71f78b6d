from __future__ import annotations

import dataclasses
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from torchrl_sql.envs import AtariVector, Emulator, replay_episode
from torchrl_sql.evaluation import clips
from torchrl_sql.evaluation.clips import find_clip, write_clip
from torchrl_sql.evaluation.policies import ConstantPolicy, RandomPolicy
from torchrl_sql.evaluation.protocol import AgentId
from torchrl_sql.evaluation.rollout import Rollout, rollout

SHORT = Emulator(max_env_frames=80)
OURS = AgentId(name="ours", decoding="sampled", training_seed=3, gradient_step=40)


@pytest.fixture(scope="module")
def episode():
    """20 agent steps of Breakout, with values that grow with the action's number and the step."""
    (played,) = rollout(RandomPolicy(["Breakout"]), ["Breakout"], [("Breakout", 0)], SHORT, record=lambda *_: True)
    played.action_values = [np.arange(18, dtype=np.float32) * step for step in range(20)]
    return played


def test_replay_shows_the_same_episode_in_colour(episode):
    views = list(replay_episode("Breakout", episode.episode_seed, episode.actions, SHORT))
    vector = AtariVector("Breakout", 1, SHORT)
    observation = vector.reset(np.array([episode.episode_seed]))
    for (seen, screen, reward), action in zip(views, episode.actions, strict=True):
        np.testing.assert_array_equal(seen, observation[0])
        assert screen.shape == (210, 160, 3) and screen.dtype == np.uint8
        # ITU-R 601 luma of the screen is the emulator's gray, before it is made smaller.
        gray = Image.fromarray(screen).convert("L").resize((84, 84), Image.Resampling.BOX)
        assert np.abs(np.asarray(gray, dtype=int) - observation[0, -1]).mean() < 3
        observation, expected, _, _ = vector.step(np.array([action]))
        assert reward == expected[0]
    assert len(views) == 20 and np.ptp(views[0][1], axis=-1).max() > 50  # colours, not gray


def test_bars_follow_the_values_and_name_the_action(episode):
    views = replay_episode("Breakout", episode.episode_seed, episode.actions, SHORT)
    images = [np.asarray(image) for image in clips._draw(episode, views, "heading", "Q-values")]
    assert len(images) == 20 and images[0].shape == (480, 1008, 3)
    bars = [image[clips._BARS_TOP :, clips._BAR_LEFT : clips._BAR_RIGHT] for image in images]
    colours = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (clips._BAR, clips._CHOSEN)]
    lengths = [max((image == colour).all(-1).sum(1).max() for colour in colours) for image in bars]
    full = clips._BAR_RIGHT - clips._BAR_LEFT
    for step in (1, 10, 19):  # the legal actions are 0, 1, 3, 4: the best is 4 * step above the worst, at most 4 * 19
        assert abs(lengths[step] - full * step / 19) < 4


def test_mp4_is_playable_and_found(episode, tmp_path):
    path = write_clip(episode, tmp_path / "clips", OURS, SHORT)
    assert path.name == "Breakout-ours-sampled-seed3-40.mp4" and [p.name for p in path.parent.iterdir()] == [path.name]
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"]
    said = subprocess.run(decode, capture_output=True, text=True, check=True).stderr
    assert "Video: h264" in said and "yuv420p" in said and "1008x480" in said and "15 fps" in said
    assert re.findall(r"frame= *(\d+)", said)[-1] == "20"
    assert find_clip(path.parent, "Breakout", OURS) == path
    for other in ({"decoding": "greedy"}, {"training_seed": 0}, {"name": "theirs"}, {"gradient_step": 4}):
        assert find_clip(path.parent, "Breakout", dataclasses.replace(OURS, **other)) is None
    assert find_clip(path.parent, "Pong", OURS) is None


def test_without_an_encoder_it_is_a_gif(episode, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "has_video_encoder", lambda: False)
    path = write_clip(episode, tmp_path, OURS, SHORT)
    with Image.open(path) as image:
        assert path.suffix == ".gif" and image.size == (504, 240) and image.n_frames == 20


def test_an_agent_without_values_is_drawn(tmp_path):
    (played,) = rollout(ConstantPolicy(2), ["Freeway"], [("Freeway", 0)], SHORT, record=lambda *_: True)
    assert write_clip(played, tmp_path, OURS, SHORT).stat().st_size > 1_000


def test_a_replay_that_differs_and_an_unrecorded_episode_are_refused(episode, tmp_path):
    wrong = Rollout("Breakout", 0, episode.episode_seed, rewards=[7.0] * 20, actions=episode.actions)
    with pytest.raises(ValueError, match=r"must replay Breakout, seed \d+, as it was played: step 0 gave 7, now 0"):
        write_clip(wrong, tmp_path, OURS, SHORT)
    with pytest.raises(ValueError, match="must be recorded to be drawn, got no actions"):
        write_clip(Rollout("Breakout", 0, 1), tmp_path, OURS, SHORT)
    assert not list(tmp_path.iterdir())
