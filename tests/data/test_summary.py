from __future__ import annotations

import re

import numpy as np
import pytest

from torchrl_sql.data import AtariFrameStorage, Subset, mean_frame, summarise
from torchrl_sql.data.summary import contact_sheet, draw_contact_sheets, draw_lives, format_summaries


@pytest.fixture
def summaries(store, lab):
    """Breakout in two runs with other behaviours; Pong with two cut episodes, one without its final frame."""
    first, second, third = lab.make_episodes([(3, True, False), (2, True, False), (4, True, True)])
    first.rewards[:], second.rewards[:], third.rewards[:] = [1, 0.5, 0], [-2, 0], [1, 1, 1, 1]
    first.actions[:], second.actions[:], third.actions[:] = [0, 1, 1], [17, 1], [0, 0, 0, 0]
    second.behaviour = 1
    lab.write(store, "Breakout", [first, second], run="a", behaviours=("skilled", "random"))
    lab.write(store, "Breakout", [third], run="b", behaviours=("random",), rewards="clipped")
    lab.write(store, "Pong", lab.make_episodes([(5, False, False), (6, False, True), (7, True, False)], 100))
    return list(summarise(store))


def test_summary_by_hand(store, summaries):
    breakout, pong = summaries
    assert (breakout.game, pong.game) == ("Breakout", "Pong")
    assert (breakout.num_transitions, pong.num_transitions) == (9, 18)
    assert breakout.returns.tolist() == [1.5, -2.0, 4.0]
    assert breakout.lengths.tolist() == [3, 2, 4]
    assert breakout.behaviour_names == ("skilled", "random") and breakout.behaviours.tolist() == [0, 1, 1]
    assert breakout.action_counts.tolist() == [5, 3] + [0] * 15 + [1]
    assert (breakout.rewards, pong.rewards) == ("mixed", "raw") and breakout.sources == ("test",)
    num_bytes = sum(f.stat().st_size for f in (store.path / "Pong").rglob("*") if f.is_file())
    assert pong.num_bytes == num_bytes and pong.bytes_per_transition == num_bytes / 18
    assert pong.ratio_to_raw == pytest.approx(7056 * 18 / num_bytes)


def test_pieces_are_no_episodes(store, lab):
    """One episode of return 10, nine pieces of return 1: the mean is 10."""
    with store.writer("Pong", source="test") as writer:
        for e, cut in [
            (lab.make_episode(0, 10), False),
            *[(lab.make_episode(k, 3, terminated=False), True) for k in range(9)],
        ]:
            writer.add_episode(e.frames, e.actions, np.ones(len(e.actions)) / (3 if cut else 1), e.terminated, cut=cut)
    (summary,) = summarise(store)
    assert (summary.returns.tolist(), summary.lengths.tolist(), summary.num_cut) == ([10.0], [10], 9)
    assert (summary.num_transitions, summary.behaviours.tolist()) == (37, [0])
    text = format_summaries([summary], codec="zstd")
    assert "10.00 ± 0.00" in text and "9 whose end the data does not show" in text
    (subset,) = summarise(store, subset=Subset(every_kth_episode=2))
    assert (len(subset.returns), subset.num_cut) == (1, 4)


def test_actions_that_the_game_does_not_know_are_named(store, lab, caplog):
    """Minimal-set indices 0..3 taken for full actions: in Breakout, 2 is UP."""
    e = lab.make_episode(0, 8)
    with store.writer("Breakout", source="test") as writer:
        for actions in ([0, 1, 3, 4] * 2, [0, 1, 2, 3] * 2, [2] * 8):
            writer.add_episode(e.frames, actions, e.rewards, True)
    (warning,) = caplog.messages
    assert "episode 1: not legal in Breakout, act as NOOP: UP 2 of 8 actions" in warning
    assert "find_game('Breakout').minimal_actions" in warning
    assert "not legal in Breakout, act as NOOP: UP 10" in format_summaries(list(summarise(store)), codec="zstd")


def test_unsampleable_as_the_storage_counts_them(store, summaries):
    assert [s.num_unsampleable for s in summaries] == [0, 1]
    assert AtariFrameStorage(store).num_unsampleable == 1


def test_summary_of_a_part_by_hand(store, summaries):
    (breakout,) = summarise(store, ["Breakout", "Qbert"], subset=Subset(transitions_per_game=4))
    assert (breakout.num_transitions, breakout.returns.tolist()) == (4, [1.5, -2.0])
    assert (breakout.lengths.tolist(), breakout.behaviours.tolist()) == ([3, 2], [0, 1])
    assert breakout.action_counts.tolist() == [1, 2] + [0] * 15 + [1]
    (breakout,) = summarise(store, "Breakout-m0", subset=Subset(every_kth_episode=2))
    assert (breakout.num_transitions, breakout.returns.tolist()) == (7, [1.5, 4.0])
    assert breakout.bytes_per_transition == pytest.approx(summaries[0].bytes_per_transition, abs=0.5)
    (pong,) = summarise(store, ["Pong"], subset=Subset(first_fraction=0.5))
    assert (pong.num_transitions, len(pong.returns)) == (8, 2)  # the first 9, but one lacks the frame that follows


def test_table(summaries):
    lines = format_summaries(summaries, codec="lz4").splitlines()
    assert lines[2].split()[:3] == ["Breakout", "9", "3"] and "1.17 ± 2.46" in lines[2]
    assert "random" in lines[4] and "1.00 ± 3.00" in lines[4]
    assert lines[5].strip() == "actions: NOOP 56%, FIRE 33%, DOWNLEFTFIRE 11%"
    assert "cannot be sampled, as the frame that follows is not stored: 1 transitions" in "\n".join(lines)
    assert re.fullmatch(r"2 games, 27 transitions, [\d.]+ MB in lz4, [\d,.]+ bytes per transition", lines[-1])


def test_games_without_episodes_yet(store, lab):
    for game in ("Breakout", "Pong"):
        with store.writer(game, source="test") as writer:
            writer.commit(metadata={})
    lines = format_summaries(list(summarise(store)), codec="zstd").splitlines()
    assert lines[2].split() == ["Breakout", "0", "0", "-", "-", "0.0", "-"]
    assert lines[-1].startswith("2 games, 0 transitions, ")
    for draw in (contact_sheet, mean_frame):
        with pytest.raises(ValueError, match="holds no frames of Pong yet"):
            draw(store, "Pong")
    with pytest.raises(ValueError, match="holds no frames yet"):
        draw_contact_sheets(store)
    lab.write(store, "Pong", lab.make_episodes([(9, True, False)]))
    sheets = np.asarray(draw_contact_sheets(store, num_columns=3))
    np.testing.assert_array_equal(sheets[16:], contact_sheet(store, "Pong", num_columns=3))


def test_contact_sheet_by_hand(store, lab):
    """Breakout: frames 0..9 in run a and 100..109 in run b, of which every fifth is shown."""
    for run, tag in (("a", 0), ("b", 100)):
        lab.write(store, "Breakout", lab.make_episodes([(10, True, False)], tag), run=run)
    sheet = contact_sheet(store, "Breakout", num_columns=2, num_rows=2)
    assert sheet.shape == (168, 168) and sheet.dtype == np.uint8
    frames = np.concatenate([run.open_frames().read().result() for run in store.recordings_of("Breakout")])
    np.testing.assert_array_equal(sheet, np.block([[frames[0], frames[5]], [frames[10], frames[15]]]))
    assert contact_sheet(store, "Breakout").shape == (8 * 84, 12 * 84)  # More tiles than frames: some twice.
    with pytest.raises(ValueError, match="'Pong' is not in the store"):
        contact_sheet(store, "Pong")


def test_sheets_of_all_games(store, lab):
    with pytest.raises(ValueError, match="holds no frames yet"):
        draw_contact_sheets(store)
    for tag, game in enumerate(("Breakout", "Pong", "Qbert")):
        lab.write(store, game, lab.make_episodes([(40, True, False)], 100 * tag))
    image = np.asarray(draw_contact_sheets(store, num_columns=4))
    block = 16 + 3 * 84  # A label, and three rows for each of three games.
    assert image.shape == (3 * block, 4 * 84)
    for number, game in enumerate(store.games):
        label, frames = np.split(image[number * block : (number + 1) * block], [16])
        assert label.min() < 50 and np.median(label) == 255  # Black on white.
        np.testing.assert_array_equal(frames, contact_sheet(store, game, num_columns=4, num_rows=3))


def test_mean_frame_of_constant_games(store):
    for run, value in (("a", 10), ("b", 30)):
        with store.writer("Pong", run=run, source="test") as writer:
            frames = np.full((20, 84, 84), value, np.uint8)
            writer.add_episode(frames, np.zeros(20, int), np.zeros(20), True)
    mean = mean_frame(store, "Pong", num_samples=4000, seed=1)
    assert mean.dtype == np.float32 and mean.shape == (84, 84)
    assert np.ptp(mean) == 0
    assert abs(mean[0, 0] - 20) < 1
    np.testing.assert_array_equal(mean, mean_frame(store, "Pong", num_samples=4000, seed=1))


def test_a_life_shows_returns_over_steps(store, lab):
    """Forty episodes of three steps whose returns go from 0 to 39: two end in each twentieth of the steps."""
    with store.writer("Pong", source="test") as writer:
        for number in range(40):
            e = lab.make_episode(number, 3)
            writer.add_episode(e.frames, e.actions, [number, 0, 0], True)
    (summary,) = summarise(store)
    assert summary.life.tolist() == [2 * part + 0.5 for part in range(20)]
    assert "first to last steps: 0.50 ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██ 38.50" in format_summaries([summary], codec="zstd")
    picture = np.asarray(draw_lives([summary]).convert("L"))
    rows, columns = np.nonzero(picture[24:180] < 110)  # the line through the means, below the title
    assert picture.shape == (200, 640)
    assert np.corrcoef(rows, columns)[0, 1] < -0.99


def test_returns_of_no_whole_episode_are_not_drawn():
    with pytest.raises(ValueError, match="no whole episodes"):
        draw_lives([])
