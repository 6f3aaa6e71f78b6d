"""A report at the paper's scale: 40 games, three sizes, cloning, three seeds, five checkpoints."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from torchrl_sql.games import TRAIN_40
from torchrl_sql.report import Analysis, Clip, summary_text, write_report
from torchrl_sql.report import html as page_module
from torchrl_sql.report.findings import findings
from torchrl_sql.report.score_tables import aggregate_table, seed_table


@pytest.fixture(scope="module")
def analysis(paper_scale_report):
    return Analysis(paper_scale_report)


@pytest.fixture(scope="module")
def page(paper_scale_report, tmp_path_factory):
    return write_report(Analysis(paper_scale_report), tmp_path_factory.mktemp("paper") / "report.html")


def read(page, name):
    with (page.parent / "report_files" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_kind_of_plot_is_there_and_games_share_them(page):
    files = {path.stem for path in (page.parent / "report_files").glob("*.svg")}
    assert {name for name in files if not name.startswith("curve_")} == {
        "aggregates", "performance_profile", "scores_by_game_1", "scores_by_game_2", "calibration",
        "scores_along_axis", *(f"scores_along_axis_by_game_{number}" for number in range(1, 5)),
        "learning_curve", *(f"learning_curve_by_game_{number}" for number in range(1, 5)),
    }  # fmt: skip
    assert files == {path.stem for path in (page.parent / "report_files").glob("*.png")}


def test_page_stays_small(page):
    assert page.stat().st_size < 8e6


def test_which_games_are_aggregated(page, analysis):
    assert "on 38 of 40 games" in aggregate_table(analysis, "human").caption
    assert "on 40 of 40 games" in aggregate_table(analysis, "dqn").caption
    assert "Carnival and Pooyan have no published human score" in page.read_text()
    records = {(r["policy"], r["aggregate"]): r for r in read(page, "aggregate_human_normalised")}
    assert records["Scaled QL 31M", "IQM"]["num_parameters"] == "31210000"
    assert records["Scaled QL 31M", "IQM"]["num_games"] == "38"


def test_tables_hold_every_game_agent_checkpoint_and_seed(page, analysis):
    scores = read(page, "score_table")
    assert {(r["policy"], r["game"]) for r in scores} >= {
        (agent.label, game) for agent in analysis.data.agents for game in TRAIN_40
    }
    assert {r["policy"] for r in scores} > {"DQN", "Human", "Random"}  # DQN stands in for data of clipped rewards
    curves = read(page, "learning_curves")
    assert len(curves) == 4 * 5 * 41  # greedy agents, checkpoints, games and all
    assert len(read(page, "seeds")) == 3 * 5 * 41
    assert [row[0].text for row in seed_table(analysis).rows] == ["IQM, seed 0", "IQM, seed 1", "IQM, seed 2"]


def test_findings_speak_of_the_family_once_and_of_published_agents(analysis):
    found = [text for _, text in findings(analysis)]
    (sizes,) = (text for text in found if "by parameters" in text)
    assert sizes.index("31M") < sizes.index("60M") < sizes.index("79M")
    assert sizes.endswith("the last is higher than the first.")
    assert not any("IQM" in text and "than Scaled QL" in text for text in found)
    assert len([text for text in found if text.startswith("Human-normalised IQM over 38")]) == 3  # cloning 2, sizes 1
    (areas,) = (text for text in found if "areas" in text)  # cloning that samples has no learning curve
    assert "over 1,250,000 to 6,250,000 gradient steps: Scaled QL 79M" in areas and "is higher than BC greedy" in areas
    games = [game for game in analysis.published_games if game != "Carnival"]
    (published,) = (text for text in found if "JOWA's rerun" in text)
    assert published.startswith(f"Over the {len(games)} games shared with published agents, Scaled QL 79M has")
    assert "data and protocols differ" in published


def test_terminal_table_has_one_line_a_game_and_fits(paper_scale_report):
    lines = summary_text(Analysis(paper_scale_report)).splitlines()
    assert max(len(line) for line in lines) <= 110
    assert len([line for line in lines if line.split()[:1] == ["Breakout"]]) == 1


def test_clips_beyond_the_budget_are_named(paper_scale_report, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_CLIP_BYTES", 250)
    data = dataclasses.replace(
        paper_scale_report,
        clips=[
            Clip(game=game, caption="c", data=bytes(100), mime="video/mp4") for game in ("Amidar", "Boxing", "Krull")
        ],
        curves=(),
    )
    text = write_report(Analysis(data), tmp_path / "report.html").read_text()
    assert text.count("<video ") == 2
    assert "Clips of Krull are not in this page" in text
