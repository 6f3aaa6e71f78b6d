"""Films show what the emulator shows, in files small enough for a page."""

from __future__ import annotations

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from torchrl_sql.cli import main
from torchrl_sql.envs import Emulator, replay_episode
from torchrl_sql.evaluation.films import film, write_film
from torchrl_sql.evaluation.policies import RandomPolicy
from torchrl_sql.evaluation.rollout import rollout
from torchrl_sql.training import export_policy

GAMES = ("Breakout", "Freeway")
SHORT = Emulator(max_env_frames=80)


@pytest.fixture(scope="module")
def episodes():
    """20 agent steps of each of two games."""
    wanted = [(game, 0) for game in GAMES]
    played = {one.game: one for one in rollout(RandomPolicy(GAMES), GAMES, wanted, SHORT, record=lambda *_: True)}
    return [[played[game]] for game in GAMES]


def screens(episode):
    return [screen for _, screen, _ in replay_episode(episode.game, episode.episode_seed, episode.actions, SHORT)]


def frames_of(path):
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.asarray(image.convert("RGB"))


def test_games_stand_side_by_side_and_a_gif_has_their_very_colours(episodes, tmp_path):
    write_film(tmp_path / "a" / "two.gif", film(episodes, SHORT), fps=15)
    left, right = (screens(place[0]) for place in episodes)
    frames = list(frames_of(tmp_path / "a" / "two.gif"))
    assert all(frame.shape == (210, 160 + 4 + 160, 3) for frame in frames)
    np.testing.assert_array_equal(frames[0][:, :160], left[0])
    np.testing.assert_array_equal(frames[0][:, 164:], right[0])
    np.testing.assert_array_equal(frames[-1][:, :160], left[-1])
    np.testing.assert_array_equal(frames[-1][:, 164:], right[-1])
    assert (frames[0][:, 160:164] == 255).all()
    assert (tmp_path / "a" / "two.gif").stat().st_size < 60_000


def test_fewer_pictures_per_second_and_episodes_in_a_row(episodes):
    (left,), (right,) = episodes
    pictures = list(film([[left, left], [right]], SHORT, fps=5))
    assert len(pictures) == 14  # every third of 40
    np.testing.assert_array_equal(np.asarray(pictures[7])[:, :160], screens(left)[1])  # the 21st step
    np.testing.assert_array_equal(np.asarray(pictures[13])[:, 164:], screens(right)[18])  # the last one stays


def test_more_colours_than_a_gif_has_become_the_nearest(tmp_path):
    ramp = np.zeros((1, 600, 3), np.uint8)
    ramp[0, :, 0], ramp[0, :, 1] = np.arange(600) % 256, np.arange(600) // 256 * 100
    write_film(tmp_path / "ramp.gif", [Image.fromarray(ramp)], fps=15)
    (frame,) = frames_of(tmp_path / "ramp.gif")
    kept = np.unique(frame[0], axis=0).astype(int)
    assert len(kept) == 255 and {*map(tuple, kept)} < {*map(tuple, ramp[0])}
    distances = np.abs(ramp[0].astype(int)[:, None] - kept).sum(-1)
    np.testing.assert_array_equal(np.abs(frame[0].astype(int) - ramp[0]).sum(-1), distances.min(1))


def test_an_mp4_has_every_picture(episodes, tmp_path):
    write_film(tmp_path / "two.mp4", film(episodes, SHORT), fps=15)
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "two.mp4"), "-f", "null", "-"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert "324x210" in said and "15 fps" in said and re.findall(r"frame= *(\d+)", said)[-1] == "20"


@pytest.mark.parametrize(
    ("name", "fps", "message"), [("a.png", 15, "must be a .gif or .mp4"), ("a.gif", 4, "divisor of 15")]
)
def test_bad_films_are_refused(episodes, tmp_path, name, fps, message):
    with pytest.raises(ValueError, match=message):
        write_film(tmp_path / name, film(episodes, SHORT, fps=fps), fps=fps)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def policy(make_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    export_policy(make_run(steps=(3,)), path)
    return path


def test_enjoy_films_a_policy_file(policy, tmp_path, capsys):
    words = ["enjoy", str(policy), "--game", "Freeway,Breakout", "--seconds", "1", "--out", str(tmp_path / "it.gif")]
    assert main([*words, "--episodes", "2", "--seed", "3", "--fps", "5"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"(\w+), episode (\d): return \d+ in 15 agent steps", out) == [
        ("Freeway", "0"), ("Breakout", "0"), ("Freeway", "1"), ("Breakout", "1"),
    ]  # fmt: skip
    assert f"{tmp_path / 'it.gif'}: 0.0" in out and next(frames_of(tmp_path / "it.gif")).shape == (210, 324, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["POLICY"], "there is no display for a window: give --out FILE.gif or FILE.mp4"),
        (["POLICY", "--out", "a.png"], "must be a .gif or .mp4, got a.png"),
        (
            ["POLICY", "--out", "OUT", "--game", "Pong"],
            "must be of the policy's games (Breakout, Freeway) or variations of them, got Pong",
        ),
        (["POLICY", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        *((["POLICY", "--seconds", bad], f"--seconds must be in (0, inf), got {bad}") for bad in ("0.0", "inf", "nan")),
        (["POLICY", "--out", "OUT", "--seed", "-1"], "seed must be in [0, 9,223,372,036,854,775,807], got -1"),
        (["random", "--out", "OUT"], "random needs"),
        (["constant", "--out", "OUT", "--game", "Freeway"], "constant must be one agent, got 3"),
    ],
)
def test_enjoy_says_what_is_wrong(policy, tmp_path, monkeypatch, words, message, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert (
        main(
            ["enjoy", *(word.replace("POLICY", str(policy)).replace("OUT", str(tmp_path / "a.gif")) for word in words)]
        )
        == 1
    )
    assert message in capsys.readouterr().err
