"""What a game's memory says, against what its pictures show."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from torchrl_sql.envs import Emulator
from torchrl_sql.envs.labels import LABELS, record_labelled_states

HALF_COLUMN, ROW = 84 / 160, 84 / 210  # pixels of a frame per column and per row of the screen


@cache
def states(game, *, seed=0, episodes=6, states=80):
    emulator = Emulator(max_env_frames=2_400)
    return record_labelled_states(
        game, num_episodes=episodes, states_per_episode=states, emulator=emulator, seed=seed
    )  # fmt: skip


def seen(frames, rows, columns, least, axis):
    """Mean row or column of the pixels brighter than ``least`` in a part of each frame; NaN without any."""
    places = [np.nonzero(frame[slice(*rows), slice(*columns)] > least)[axis] for frame in frames]
    return np.array([place.mean() if len(place) else np.nan for place in places])


def edges(frames):
    """How far pixels are from the middle brightness of their frame's field."""
    field = frames.astype(int)
    return np.abs(field - np.median(field[:, 15:77], axis=(1, 2), keepdims=True))


PLACES = [  # game, label, rows and columns to look at, least brightness, axis, pixels per unit of the label
    ("Breakout", "ball x", (38, 75), (5, 79), 0, 1, HALF_COLUMN),
    ("Breakout", "ball y", (38, 75), (5, 79), 0, 0, ROW),
    ("Breakout", "player x", (76, 77), (5, 79), 0, 1, HALF_COLUMN),
    ("Pong", "ball x", (15, 77), (12, 72), 20, 1, HALF_COLUMN),
    ("Pong", "ball y", (15, 77), (12, 72), 20, 0, ROW),
    ("Pong", "player y", (15, 77), (73, 76), 20, 0, ROW),
    ("Pong", "enemy y", (15, 77), (8, 11), 20, 0, ROW),
    ("Freeway", "player y", (8, 80), (23, 26), 200, 0, -ROW),
    ("SpaceInvaders", "player x", (75, 78), (5, 79), 60, 1, HALF_COLUMN),
    ("Assault", "player x", (72, 73), (0, 84), 140, 1, HALF_COLUMN),
    ("Assault", "mother ship x", (6, 9), (0, 84), 50, 1, HALF_COLUMN),
]


@pytest.mark.parametrize(("game", "label", "rows", "columns", "least", "axis", "pixels"), PLACES)
def test_things_are_where_the_memory_says(game, label, rows, columns, least, axis, pixels):
    played = states(game)
    frames = played.observation[:, -1]
    place = seen(edges(frames) if game == "Pong" else frames, rows, columns, least, axis)
    values = played.labels[label]
    offset = place - pixels * values
    known = np.isfinite(offset)
    off = np.abs(offset[known] - np.median(offset[known]))
    # Other things pass through the same part of the picture, now and then.
    assert known.sum() > 100 and np.std(values[known]) > 5
    assert np.mean(off < 3) > 0.8, np.mean(off < 3)


def test_cars_pass_the_lanes_that_they_are_named_after():
    played = states("Freeway")
    frames = played.observation[:, -1].astype(int)
    moving = np.abs(frames - np.median(frames, axis=0)) > 8
    for lane in range(1, 6):
        row = round((27 + 16 * (10 - lane) + 5) * ROW)
        place = seen(moving, (row, row + 1), (28, 56), 0, 1)
        offset = place - HALF_COLUMN * played.labels[f"car {lane} x"]
        known = np.isfinite(offset)
        assert known.sum() > 50 and np.mean(np.abs(offset[known] - np.median(offset[known])) < 3) > 0.8, lane


def test_invaders_are_as_far_and_as_many_as_the_memory_says():
    played = states("SpaceInvaders")
    frames = played.observation[:, -1, 12:60] > 60
    first = np.array([np.nonzero(frame.any(0))[0].min() for frame in frames])
    offset = first - HALF_COLUMN * played.labels["invaders x"]
    assert np.mean(np.abs(offset - np.median(offset)) < 3) > 0.8
    lowered = played.labels["invaders y"] > np.median(played.labels["invaders y"])
    top = np.array([np.nonzero(frame.any(1))[0].min() for frame in frames])
    assert top[lowered].mean() > top[~lowered].mean()
    lit = frames.sum((1, 2))
    assert np.corrcoef(lit, played.labels["invaders left"])[0, 1] > 0.9


def test_the_car_moves_and_speeds_up_as_the_memory_says():
    played = states("Enduro", states=150)
    frames, x = played.observation[:, -1], played.labels["player x"]
    place = seen(frames, (58, 60), (20, 75), 169, 1)
    bins = [np.nanmedian(place[(low < x) & (x <= high)]) for low, high in ((-30, -12), (-12, -2), (-2, 6), (6, 30))]
    assert sorted(bins) == bins and bins[-1] - bins[0] > 5
    # Faster, more of the road changes from frame to frame.
    change = np.abs(np.diff(played.observation[:, 2:, 25:58].astype(int), axis=1)).mean((1, 2, 3))
    speed = played.labels["speed"]
    assert change[speed > 40].mean() > 1.5 * change[(speed > 2) & (speed < 20)].mean()


@pytest.mark.parametrize("game", LABELS)
def test_labels_change_with_the_state_and_lives_and_score_are_those_of_the_emulator(game):
    played = states(game)
    for name in LABELS[game]:
        assert np.nanstd(played.labels[name]) > 0, name
    for episode in range(6):
        lives, score = (played.labels[name][played.episode == episode] for name in ("lives", "score"))
        assert (np.diff(lives) <= 0).all()
        assert game in ("Enduro", "Pong") or (np.diff(score) >= 0).all()  # cars overtake, and so do opponents
    if game in ("Assault", "Breakout", "SpaceInvaders"):
        assert len(set(played.labels["lives"])) > 1
    assert len(set(played.labels["score"])) > 1


def test_the_score_is_the_sum_of_rewards_that_the_picture_shows():
    played = states("Breakout")
    digits = played.observation[:, -1, 2:6, 16:40].reshape(len(played.episode), -1)
    pictures = {}
    for score, picture in zip(played.labels["score"], digits, strict=True):
        pictures.setdefault(picture.tobytes(), []).append(score)
    agreeing = sum(max(map(scores.count, scores)) for scores in pictures.values())
    assert len(pictures) > 3 and agreeing > 0.95 * len(digits)  # the picture may be a frame late


def test_states_are_stacks_of_an_episode_that_begin_with_black_frames():
    played = states("Breakout", episodes=2, states=10_000)
    for episode in (0, 1):
        stacks = played.observation[played.episode == episode]
        assert len(stacks) > 50 and not stacks[0, :3].any() and stacks[0, 3].any()
        np.testing.assert_array_equal(stacks[1:, :3], stacks[:-1, 1:])


def test_the_seed_decides_everything_and_states_are_drawn_in_order_from_whole_episodes():
    options = {"num_episodes": 2, "states_per_episode": 7, "emulator": Emulator(max_env_frames=800)}
    first, second, other = (record_labelled_states("Pong", seed=seed, **options) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.observation, second.observation)
    assert first.episode.tolist() == [0] * 7 + [1] * 7
    assert (first.observation != other.observation).any()
    for name, label in first.labels.items():
        np.testing.assert_array_equal(label, second.labels[name])


def test_a_variation_has_the_labels_of_its_game():
    played = record_labelled_states(
        "Freeway-m1", num_episodes=1, states_per_episode=5, emulator=Emulator(max_env_frames=200), seed=0
    )
    assert played.game == "Freeway-m1" and [*played.labels] == [*LABELS["Freeway"], "lives", "score"]


def test_other_games_and_numbers_are_refused():
    options = {"emulator": Emulator(), "seed": 0}
    with pytest.raises(ValueError, match=r"games must have labels \(Assault, Breakout, .*\), got 'Qbert'"):
        record_labelled_states("Qbert", num_episodes=1, states_per_episode=1, **options)
    with pytest.raises(ValueError, match="num_episodes must be at least 1, got 0"):
        record_labelled_states("Pong", num_episodes=0, states_per_episode=1, **options)
