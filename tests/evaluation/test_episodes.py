from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.evaluation.episodes import COLUMNS, EpisodeResult, read_episodes, write_episodes

EPISODE = EpisodeResult(
    agent="scaled_ql", seed=1, game="Breakout", episode=0, episode_seed=17, episode_return=12.5, length_agent_steps=310,
    terminated=True, truncated=False, gradient_step=5000, epsilon=0.001, sticky=0.25, max_env_frames=9000,
    decoding="greedy",
)  # fmt: skip
LINE = "scaled_ql,1,Breakout,0,17,12.5,310,true,false,5000,0.001,0.25,9000,greedy\n"


def test_file_is_plain_csv(tmp_path):
    path = write_episodes(tmp_path / "scores.csv", [EPISODE])
    assert path.read_text() == ",".join(COLUMNS) + "\n" + LINE
    assert [p.name for p in tmp_path.iterdir()] == ["scores.csv"]


finite = st.floats(allow_nan=False, allow_infinity=False)
probability = st.floats(0, 1)


@st.composite
def episodes(draw):
    terminated = draw(st.booleans())
    return EpisodeResult(
        agent=draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)),
        seed=draw(st.integers()),
        game=draw(st.sampled_from(["Breakout", "Pong"])),
        episode=draw(st.integers(0)),
        episode_seed=draw(st.integers()),
        episode_return=draw(finite),
        length_agent_steps=draw(st.integers(1)),
        terminated=terminated,
        truncated=draw(st.booleans()) if terminated else True,
        gradient_step=draw(st.integers(0)),
        epsilon=draw(probability),
        sticky=draw(probability),
        max_env_frames=draw(st.integers(1)),
        decoding=draw(st.sampled_from(["greedy", "sampled"])),
    )


@given(st.lists(episodes(), max_size=5))
def test_reading_gives_back_what_was_written(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("episodes") / "scores.csv"
    write_episodes(path, table)
    assert read_episodes(path) == table


def test_failed_write_keeps_the_old_table(tmp_path):
    path = write_episodes(tmp_path / "scores.csv", [EPISODE])

    def interrupted():
        yield EPISODE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(path, interrupted())
    assert read_episodes(path) == [EPISODE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"scores.csv: header must be agent,seed,.*, got an empty file"),
        ("game,return\n", r"header must be agent,seed,.*, got game,return"),
        (LINE.replace("12.5", "nan"), r"scores.csv, line 3: episode_return must be finite, got nan"),
        (LINE.replace("12.5", "many"), r"line 3: episode_return must be float, got 'many'"),
        (LINE.replace("true", "1"), r"line 3: terminated must be bool, got '1'"),
        (LINE.replace("true", "false"), r"line 3: an episode must be terminated or truncated"),
        (LINE.replace("0.25", "25"), r"line 3: sticky must be a probability, got 25.0"),
        (LINE.replace("greedy", "argmax"), r"line 3: decoding must be 'greedy' or 'sampled', got 'argmax'"),
        (LINE.replace(",310", ""), r"line 3: expected 14 values, got 13"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text if text.count(",") < 5 else ",".join(COLUMNS) + "\n" + LINE + text)
    with pytest.raises(ValueError, match=message):
        read_episodes(path)


@pytest.mark.parametrize(
    "change",
    [
        {"agent": ""},
        {"length_agent_steps": 0},
        {"max_env_frames": 0},
        {"episode": -1},
        {"gradient_step": -1},
        {"epsilon": 1.5},
    ],
)
def test_impossible_episodes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(EPISODE, **change)
