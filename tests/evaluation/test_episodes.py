from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sql.evaluation.episodes import CalibrationPoint, EpisodeResult, read_calibration, read_episodes
from torchrl_sql.evaluation.tables import TableWriter, columns, files_of, part_of

EPISODE = EpisodeResult(
    agent="scaled_ql", seed=1, game="Breakout", episode=0, episode_seed=17, episode_return=12.5, length_agent_steps=310,
    terminated=True, truncated=False, gradient_step=5000, epsilon=0.001, sticky=0.25, max_env_frames=9000,
    decoding="greedy", evaluation_seed=3, checkpoint="sha256:00ff",
)  # fmt: skip
LINE = "scaled_ql,1,Breakout,0,17,12.5,310,true,false,5000,0.001,0.25,9000,greedy,3,sha256:00ff\n"
POINT = CalibrationPoint(
    agent="scaled_ql", gradient_step=5000, seed=1, game="Breakout", episode_seed=17, agent_step=50,
    predicted_value=1.25, discounted_return=0.5, truncated=False,
)  # fmt: skip
HEADER = ",".join(columns(EpisodeResult)) + "\n"


def write(path, rows, kind=EpisodeResult):
    with TableWriter(path, kind) as writer:
        writer.append(rows)
    return path


def test_files_are_plain_csv(tmp_path):
    assert write(tmp_path / "scores.csv", [EPISODE]).read_text() == HEADER + LINE
    assert write(tmp_path / "calibration.csv", [POINT], CalibrationPoint).read_text() == (
        "agent,gradient_step,seed,game,episode_seed,agent_step,predicted_value,discounted_return,truncated\n"
        "scaled_ql,5000,1,Breakout,17,50,1.25,0.5,false\n"
    )
    assert read_calibration(tmp_path / "calibration.csv") == [POINT]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.csv", "scores.csv"]


def test_parts_are_merged_sorted_and_without_duplicates(tmp_path):
    table = tmp_path / "scores.csv"
    rows = [dataclasses.replace(EPISODE, episode=episode) for episode in range(12)]
    write(table, [rows[11], rows[3]])
    write(part_of(table, 1, 2), [rows[10], rows[3]])
    write(part_of(table, 9, 10), [rows[0]])
    assert [path.name for path in files_of(table)] == [
        "scores.csv",
        "scores.part-10-of-10.csv",
        "scores.part-2-of-2.csv",
    ]
    assert read_episodes(table) == [rows[0], rows[3], rows[10], rows[11]]
    table.unlink()
    assert read_episodes(table) == [rows[0], rows[3], rows[10]]
    assert part_of(table, 0, 1) == table


def test_different_results_of_one_episode_are_refused(tmp_path):
    table = write(tmp_path / "scores.csv", [EPISODE])
    write(part_of(table, 0, 2), [dataclasses.replace(EPISODE, episode_return=1.0)])
    with pytest.raises(ValueError, match=r"part-1-of-2.csv and .*scores.csv hold different results of one thing"):
        read_episodes(table)


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="found neither it nor parts of it"):
        read_episodes(tmp_path / "scores.csv")


@pytest.mark.parametrize("cut", [1, 5, len(LINE) - 1])
def test_half_written_line_is_left_out_with_a_warning_and_dropped_by_the_next_writer(tmp_path, cut, caplog):
    table = write(tmp_path / "scores.csv", [EPISODE])
    with table.open("a") as file:
        file.write(LINE.replace(",0,17", ",1,18")[:cut])
    assert read_episodes(table) == [EPISODE]
    assert "scores.csv ends in a half-written line, which is left out" in caplog.text
    other = dataclasses.replace(EPISODE, episode=2)
    write(table, [other])
    assert table.read_text().count("\n") == 3
    caplog.clear()
    assert read_episodes(table) == [EPISODE, other] and not caplog.text


def test_half_written_header_is_written_again(tmp_path):
    (tmp_path / "scores.csv").write_text(HEADER[:20])
    assert read_episodes(write(tmp_path / "scores.csv", [EPISODE])) == [EPISODE]


def test_two_writers_of_one_file_are_refused(tmp_path):
    with (
        TableWriter(tmp_path / "scores.csv", EpisodeResult),
        pytest.raises(BlockingIOError, match="another evaluation"),
    ):
        TableWriter(tmp_path / "scores.csv", EpisodeResult)
    TableWriter(tmp_path / "scores.csv", EpisodeResult).close()


finite = st.floats(allow_nan=False, allow_infinity=False)
probability = st.floats(0, 1)


@st.composite
def episodes(draw):
    terminated = draw(st.booleans())
    return EpisodeResult(
        agent=draw(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)),
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
        evaluation_seed=draw(st.integers()),
        checkpoint=draw(st.sampled_from(["", 'a "quoted", name'])),
    )


@given(st.lists(episodes(), max_size=5, unique_by=lambda row: row.key), st.integers(0, 5))
def test_reading_gives_back_what_was_written_in_parts(tmp_path_factory, rows, split):
    table = tmp_path_factory.mktemp("episodes") / "scores.csv"
    write(table, rows[:split])
    write(table, rows[split:])
    assert read_episodes(table) == sorted(rows, key=lambda row: row.key)


@pytest.mark.parametrize("text", ["", "agent,se"])
def test_a_table_whose_writer_has_not_written_the_header_yet_has_no_rows(tmp_path, text):
    (tmp_path / "scores.csv").write_text(text)
    assert read_episodes(tmp_path / "scores.csv") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", r"scores.csv: header must be agent,seed,.*, got an empty line"),
        ("game,return\n", r"header must be agent,seed,.*, got game,return"),
        (LINE.replace("12.5", "nan"), r"scores.csv, line 3: episode_return must be finite, got nan"),
        (LINE.replace("12.5", "many"), r"line 3: episode_return must be float, got 'many'"),
        (LINE.replace("true", "1"), r"line 3: terminated must be bool, got '1'"),
        (LINE.replace("true", "false"), r"line 3: an episode must be terminated or truncated"),
        (LINE.replace("0.25", "25"), r"line 3: sticky must be a probability, got 25.0"),
        (LINE.replace("greedy", "argmax"), r"line 3: decoding must be one of greedy, sampled, .*, got 'argmax'"),
        (LINE.replace(",310", ""), r"line 3: expected 16 values, got 15"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text if text.count(",") < 5 else HEADER + LINE + text)
    with pytest.raises(ValueError, match=message):
        read_episodes(path)
    if text.startswith("game"):
        with pytest.raises(ValueError, match=message):
            TableWriter(path, EpisodeResult)


def test_other_bytes_are_refused(tmp_path):
    (tmp_path / "scores.csv").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(ValueError, match=r"scores.csv must be a CSV table in UTF-8"):
        read_episodes(tmp_path / "scores.csv")


@pytest.mark.parametrize(
    "change",
    [
        {"agent": ""},
        {"agent": "two\nlines"},
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


@pytest.mark.parametrize("change", [{"predicted_value": float("nan")}, {"agent_step": -1}])
def test_impossible_predictions_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(POINT, **change)
