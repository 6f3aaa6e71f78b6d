"""Learning curves of a report: the areas under them, and what they are against."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain

import numpy as np
import pytest

from tests.builders import episodes
from torchrl_sql.config import compose_run_config
from torchrl_sql.report import Agent, Analysis, ReportData, summary_data, summary_text, write_report
from torchrl_sql.report.agents import find_agents
from torchrl_sql.report.analysis import Line
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.figures.curves import _shifts
from torchrl_sql.report.findings import findings
from torchrl_sql.report.score_tables import area_table
from torchrl_sql.report.tables import all_tables
from torchrl_sql.statistics.scores import RunReturns

OURS, BC, THIRD = (Agent(agent=name.lower(), label=name) for name in ("Ours", "BC", "Third"))
GAMES = ("Breakout", "Freeway")


def curve(agent, scores, *, games=GAMES, num_seeds=3):
    """Rows of an agent that scores ``scores[step]``, and one more with each further seed."""
    return [
        row
        for step, score in scores.items()
        for seed in range(num_seeds)
        for game in games
        for row in episodes(agent, game, [score + seed], seed=seed, gradient_step=step, checkpoint=f"{step} {seed}")
    ]


def make(*rows, agents=(OURS, BC), **changes):
    fields = {"title": "Curves", "introduction": [], "games": GAMES, "agents": agents, "episodes": [*chain(*rows)]}
    return Analysis(ReportData(**(fields | changes)))


OURS_CURVE = {100: 6.0, 200: 12.0, 400: 30.0}  # weights 1/6, 1/2 and 1/3: 1 + 6 + 10 = 17
BC_CURVE = {100: 12.0, 200: 6.0, 400: 30.0}  # 2 + 3 + 10 = 15


def test_areas_by_hand():
    """Seeds 17, 18, 19 and 15, 16, 17, standard error 1 / sqrt(3): reach 4.303 / sqrt(3) = 2.48."""
    analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE))
    table = area_table(analysis)
    assert table.header == ["Agent", "Breakout", "Freeway"]
    assert [[str(cell) for cell in row] for row in table.rows] == [
        ["Ours", *["18.0 [15.5, 20.5]"] * 2],
        ["BC", *["16.0 [13.5, 18.5]"] * 2],
    ]
    assert "mean score over 100 to 400 gradient steps, by the trapezoidal rule over 3 evaluations" in table.caption
    assert "IQM" not in table.caption
    text = "Over the learning curve, 100 to 400 gradient steps, BC is not distinguishable from Ours on "
    assert ("equal", text + "Breakout and Freeway.") in findings(analysis)
    assert not caveats(analysis)[-1].startswith(("No area", "Ours: the area"))


def test_agents_that_end_alike_are_told_apart_by_how_fast_they_learn():
    """Both end at 30, 31 and 32. Areas of 17, 18 and 19 against 0 + 1 + 10 = 11, 12 and 13."""
    analysis = make(curve("ours", OURS_CURVE), curve("bc", {100: 0.0, 200: 2.0, 400: 30.0}))
    found = findings(analysis)
    assert ("equal", "BC is not distinguishable from Ours on Breakout and Freeway.") in found
    text = "Over the learning curve, 100 to 400 gradient steps, Ours scores higher than BC on Breakout and Freeway."
    assert ("for", text) in found
    records = {(record["policy"], record["game"]): record for record in area_table(analysis).records}
    assert records["BC", "Freeway"]["mean_over_steps"] == pytest.approx(12.0)
    assert (records["BC", "Freeway"]["main_agent_is"], records["Ours", "Freeway"]["main_agent_is"]) == ("higher", None)
    against = findings(make(curve("ours", {100: 0.0, 200: 2.0, 400: 30.0}), curve("bc", OURS_CURVE)))
    assert ("against", text.replace("Ours scores higher than BC", "BC scores higher than Ours")) in against


def test_aggregated_areas_by_hand():
    analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE), aggregate=True)
    rows = {row[0].text: row[1] for row in area_table(analysis).rows}
    assert area_table(analysis).header[1] == "IQM"
    ours = ((18 - 1.7) / 28.8 + 18 / 29.6) / 2
    assert rows["Ours"].text == f"{ours:.2f}"
    (found,) = (text for kind, text in findings(analysis) if "areas" in text and kind == "equal")
    assert found.startswith("Human-normalised IQM of the areas under learning curves, over 100 to 400 gradient steps: ")
    assert f"Ours {ours:.2f} [" in found and "is not distinguishable from BC 0.5" in found


def test_one_seed_has_areas_without_a_verdict():
    analysis = make(curve("ours", OURS_CURVE, num_seeds=1), curve("bc", BC_CURVE, num_seeds=1))
    assert [row[1].text for row in area_table(analysis).rows] == ["17.0", "15.0"]
    assert {record["main_agent_is"] for record in area_table(analysis).records} == {None, "unknown"}
    assert not any("learning curve" in text for _, text in findings(analysis))


def test_areas_are_over_the_steps_that_all_compared_have_and_the_page_says_so():
    """Means of 13 and 31, and of 7 and 31, at steps 200 and 400. Third, which nobody compares, lacks step 200."""
    analysis = make(
        curve("ours", OURS_CURVE), curve("bc", {200: 6.0, 300: 99.0, 400: 30.0}), curve("third", {100: 1.0, 400: 1.0}),
        agents=(OURS, BC, THIRD), against=["BC"],
    )  # fmt: skip
    assert analysis.learning.area_steps == [200, 400]
    assert {row[0].text: row[1].text for row in area_table(analysis).rows} == {"Ours": "22.0", "BC": "19.0"}
    said = caveats(analysis)
    both = "gradient steps, where not all that are compared were evaluated in full."
    assert f"Ours: the area under the learning curve leaves out the scores at 100 {both}" in said
    assert f"BC: the area under the learning curve leaves out the scores at 300 {both}" in said
    why = "not evaluated in full at each of the 2 gradient steps that areas are over."
    assert f"No area under the learning curve of Third: {why}" in said
    assert len({line.label for line in analysis.learning_curves}) == 3


def test_an_agent_with_other_evaluations_costs_only_its_own_area():
    analysis = make(
        curve("ours", OURS_CURVE), curve("bc", {100: 1.0, 401: 2.0, 402: 3.0}), curve("third", OURS_CURVE),
        agents=(OURS, BC, THIRD),
    )  # fmt: skip
    assert analysis.learning.area_steps == [100, 200, 400] and [*analysis.learning.areas] == ["Ours", "Third"]
    assert any(text.startswith("No area under the learning curve of BC: ") for text in caveats(analysis))


def test_a_main_agent_without_a_curve_is_said():
    analysis = make(curve("ours", {400: 30.0}), curve("bc", BC_CURVE))
    assert not area_table(analysis).records and "learning_areas" not in all_tables(analysis)
    assert "No areas under learning curves: Ours was evaluated in full at one gradient step only." in caveats(analysis)
    assert not any("area" in text for text in caveats(make(curve("ours", {400: 30.0}), curve("bc", {400: 3.0}))))


def test_an_agent_that_lacks_a_game_has_areas_in_the_others():
    analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE, games=("Freeway",)), aggregate=True)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in area_table(analysis).rows}
    assert rows["BC"] == ["–", "–", "16.0"]
    assert any(
        text.startswith("Over the learning curve") and text.endswith("on Freeway.") for _, text in findings(analysis)
    )
    assert "BC has no episode that counts in Breakout, and is left out of the aggregates." in caveats(analysis)


def test_unequal_numbers_of_episodes_leave_areas_of_means():
    rows = curve("ours", OURS_CURVE)
    more = [dataclasses.replace(row, episode=1) for row in rows if row.gradient_step == 400]
    assert area_table(make(rows + more, curve("bc", BC_CURVE))).rows[0][1].text == "18.0"


def test_random_play_has_no_area_and_needs_no_excuse():
    random = episodes("random", "Breakout", [1.0, 2.0], gradient_step=0)
    analysis = make(curve("ours", OURS_CURVE), random, agents=(OURS, Agent(agent="random", label="random")))
    assert [*analysis.learning.areas] == ["Ours"] and not any("No area" in text for text in caveats(analysis))


def test_scores_before_the_first_step_are_zero_shot_scores_and_begin_the_curve():
    """Ours begins with 3, 4 and 5; BC has no scores at step 0."""
    ours = curve("ours", {0: 3.0} | OURS_CURVE)
    analysis = make(ours, curve("bc", BC_CURVE), against=["BC"])
    assert [list(line.runs) for line in analysis.learning_curves[:2]] == [[0, 100, 200, 400], [100, 200, 400]]
    assert analysis.learning_curves[0].runs[0].run_scores().tolist() == [[3.0, 3.0], [4.0, 4.0], [5.0, 5.0]]
    scores = "Breakout 4.0 [1.5, 6.5], Freeway 4.0 [1.5, 6.5]"
    assert ("note", f"Zero-shot scores of Ours, before its first step: {scores}.") in findings(analysis)
    assert sum("Zero-shot" in text for _, text in findings(analysis)) == 1
    assert area_table(analysis).rows[0][1].text == "18.0"  # BC has no step 0
    text = "Ours: the area under the learning curve leaves out the scores at 0 gradient steps, where not all"
    assert any(caveat.startswith(text) for caveat in caveats(analysis))


# What curves are against


def test_curves_of_agents_that_play_alike_are_against_agent_steps(tmp_path):
    agents = [dataclasses.replace(agent, agent_steps_per_gradient_step=2.5) for agent in (OURS, BC)]
    analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE), agents=agents)
    assert [list(line.runs) for line in analysis.learning_curves] == [[250.0, 500.0, 1000.0]] * 2
    table = all_tables(analysis)["learning_curves"]
    assert table.header[0] == "Game, agent steps since learning began (2.5 per gradient step)"
    assert [row[0].text for row in table.rows][:3] == ["Breakout, 250", "Breakout, 500", "Breakout, 1,000"]
    page = write_report(analysis, tmp_path / "report.html").read_text()
    assert page.count("against agent steps since learning began (2.5 per gradient step)") >= 2
    assert "Area under the learning curve: mean score over 100 to 400 gradient steps" in page


def test_curves_of_agents_that_play_unlike_are_against_gradient_steps_and_the_page_says_so():
    def axis(*paces):
        agents = [
            dataclasses.replace(a, agent_steps_per_gradient_step=p) for a, p in zip((OURS, BC), paces, strict=True)
        ]
        analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE), agents=agents)
        said = [text for text in caveats(analysis) if text.startswith("Learning curves are against gradient steps")]
        return list(analysis.learning_curves[0].runs), all_tables(analysis)["learning_curves"].header[0], said

    places = [100.0, 200.0, 400.0], "Game, gradient steps"
    assert axis(None, None) == (*places, [])
    assert axis(4.0, 8.0)[:2] == axis(4.0, None)[:2] == places
    assert axis(8.0, 4.0)[2] == [
        "Learning curves are against gradient steps; their agents played 4, 8 agent steps in each."
    ]
    assert axis(4.0, None)[2][0].endswith("played 4 agent steps in each, or none.")


def test_an_agents_pace_is_that_of_its_run():
    online = compose_run_config(
        ["scale=cpu", "online=cpu", "data.games=Pong", "name=plays", "online.agent_steps_per_gradient_step=6"]
    )
    offline = compose_run_config(["scale=cpu", "data.games=Pong", "name=reads", "data.store=/nowhere"])
    rows = [row for name in ("plays", "reads") for row in episodes(name, "Pong", [1.0], checkpoint="x")]
    paces = {agent.agent: agent.agent_steps_per_gradient_step for agent in find_agents([online, offline], rows)}
    assert paces == {"plays": 6.0, "reads": None}


def test_terminal_and_json_have_areas():
    analysis = make(curve("ours", OURS_CURVE), curve("bc", BC_CURVE))
    assert "Area under the learning curve" in summary_text(analysis)
    (record, *_) = summary_data(analysis)["tables"]["learning_areas"]
    assert (record["policy"], record["num_evaluations"], record["num_seeds"]) == ("Ours", 3, 3)
    assert record["interval_over"] == "seeds" and math.isclose(record["mean_over_steps"], 18.0)


def test_intervals_at_one_step_are_beside_each_other():
    runs = RunReturns(games=("Pong",), seeds=(0,), values=np.zeros((1, 1, 1)), counts=np.ones((1, 1), np.int64))
    lines = [Line(name, OURS, dict.fromkeys((500.0, 1000.0, 2000.0), runs)) for name in "abc"]
    assert _shifts(lines) == pytest.approx([-45, 0, 45])  # 0.03 of 1,500, less than a third of 0.3 of the least gap
    assert _shifts(lines * 2) == pytest.approx([-62.5, -37.5, -12.5, 12.5, 37.5, 62.5])  # 0.3 of 500 for six lines
    assert _shifts([Line("a", OURS, {500.0: runs})]) == [0]
