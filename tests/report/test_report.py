from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from tests.builders import episodes, returns
from torchrl_sql.games import TRAIN_40
from torchrl_sql.report import (
    Agent,
    Analysis,
    Clip,
    Curve,
    GameData,
    ReportData,
    summary_data,
    summary_text,
    write_report,
)
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.context_tables import curve_table, protocol_table
from torchrl_sql.report.figures.curves import line_plots, thinned, training_plots
from torchrl_sql.report.figures.look import colour, marker
from torchrl_sql.report.findings import findings
from torchrl_sql.report.score_tables import (
    aggregate_table,
    comparison_table,
    published_table,
    score_table,
    seed_table,
)
from torchrl_sql.report.table import Cell
from torchrl_sql.report.text import format_score, format_size, name_games, two_digits

OURS = Agent(agent="ours", label="Ours")
BC = Agent(agent="bc", label="BC greedy")


def game_data(game, behaviour, **changes):
    fields = {
        "behaviour_text": f"How {game} was played.", "num_transitions": 1000, "num_episodes": 16,
        "bytes_per_transition": 150.0, "behaviours": {}, "action_counts": [10] * 18,
    }  # fmt: skip
    return GameData(game=game, behaviour=behaviour, **(fields | changes))


def gif():
    file = io.BytesIO()
    first, *rest = (Image.new("P", (8, 10), color) for color in (0, 1, 2))
    first.save(file, "GIF", save_all=True, append_images=rest)
    return file.getvalue()


def make(**changes):
    """Two games, three seeds: BC is as good in Breakout, always UP is better in Freeway."""
    rows = []
    for seed in (0, 1, 2):
        for agent, breakout, freeway in (("ours", [7, 9, 11], [19, 20]), ("bc", [6, 9, 12], [1, 2])):
            rows += episodes(agent, "Breakout", [value + seed for value in breakout], seed=seed)
            rows += episodes(agent, "Freeway", [value + seed for value in freeway], seed=seed)
    fields = {
        "title": "Two games",
        "introduction": ["What was run."],
        "games": ["Breakout", "Freeway"],
        "agents": [OURS, BC],
        "episodes": rows,
        "game_data": [
            game_data("Breakout", returns(4.0, 2.0), behaviours={"good": returns(7.0), "lazy": returns(1.0)}),
            game_data("Freeway", returns(7.0)),
        ],
        "constant_actions": {"Freeway": {"UP": returns(24.0), "DOWN": returns(0.0)}},
        "curves": [
            Curve(agent=a, label=a, metric="TD loss (nats)", seed=0, gradient_steps=[0, 50, 100], values=[3, 2, 1.5])
            for a in ("ours", "bc")
        ],
        "clips": [Clip(game="Breakout", caption="Seed 0.", data=gif())],
        "settings": {"Objective": {"gamma": 0.99, "optim": {"lr": 1e-3}}},
        "caveats": ["One data set."],
        "versions": {"torch": "2.13.0"},
    }
    return ReportData(**(fields | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_report(Analysis(make()), tmp_path_factory.mktemp("run") / "deep" / "report.html")


# Numbers computed by hand


def shown(table):
    """``{row: {column: cell}}``."""
    return {row[0].text: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def test_score_table_by_hand():
    table = score_table(Analysis(make()))
    rows = shown(table)
    assert {policy: [cell.text for cell in row.values()] for policy, row in rows.items()} == {
        "Ours": ["10.0", "20.5"], "BC greedy": ["10.0", "2.5"], "Behaviour mean": ["4.0", "7.0"],
        "Best behaviour": ["7.0", "–"], "Best constant": ["–", "24.0"], "Random": ["1.7", "0.0"],
        "Human": ["30.5", "29.6"],
    }  # fmt: skip
    assert [*rows][3:] == ["Best behaviour", "Best constant", "Random", "Human"]
    assert rows["Ours"]["Breakout"].detail == "[7.5, 12.5]"  # 10 +- 4.303 / sqrt(3)
    assert rows["Behaviour mean"]["Breakout"].detail == "[2.9, 5.1]"  # 4 +- 2.131 * 2 / 4
    assert rows["Best behaviour"]["Breakout"].detail == "[no interval] good"
    assert rows["Best constant"]["Freeway"].detail == "[no interval] always UP"
    assert rows["Human"]["Freeway"].detail == ""
    strong = {policy: rows[policy]["Freeway"].strong for policy in ("Ours", "BC greedy", "Best constant")}
    assert strong == {"Ours": True, "BC greedy": False, "Best constant": False}
    record = next(r for r in table.records if r["policy"] == "Ours" and r["game"] == "Breakout")
    assert record["human_normalised"] == pytest.approx((10 - 1.7) / (30.5 - 1.7))
    assert (record["num_episodes"], record["num_seeds"], record["interval_over"]) == (9, 3, "seeds")


def test_aggregate_and_seed_tables_by_hand():
    analysis = Analysis(make(aggregate=True))
    human = shown(aggregate_table(analysis, "human"))
    assert list(human) == ["Ours", "BC greedy", "Behaviour mean"]
    ours = ((10 - 1.7) / 28.8 + 20.5 / 29.6) / 2
    behaviour = ((4 - 1.7) / 28.8 + 7 / 29.6) / 2
    assert [cell.text for cell in human["Ours"].values()] == [f"{ours:.2f}"] * 3 + [f"{1 - ours:.2f}"]
    assert human["Behaviour mean"]["IQM"] == (f"{behaviour:.2f}", "[no interval]", False)
    seeds = shown(seed_table(analysis))
    assert [*seeds][::3] == ["Breakout, seed 0", "Freeway, seed 0", "IQM, seed 0"]
    assert seeds["Breakout, seed 1"]["Ours"].text == "10.0"
    assert seeds["IQM, seed 1"]["Ours"].text == f"{ours:.2f}"


def test_few_games_are_aggregated_only_when_asked_for():
    assert not aggregate_table(Analysis(make()), "human").rows
    text = summary_text(Analysis(make()))
    assert "IQM" not in text and "! 2 games, too few for aggregates over games" in text
    asked = summary_text(Analysis(make(aggregate=True)))
    assert "Human-normalised IQM over 2 games: Ours 0.49" in asked
    five = single_seed(["Breakout", "Freeway", "Pong", "Boxing", "Qbert"])
    assert aggregate_table(Analysis(five), "human").rows


def test_comparison_and_findings_concede_where_others_are_as_good_or_better():
    analysis = Analysis(make())
    rows = {row[0].text: [cell.text for cell in row[1:5]] for row in comparison_table(analysis).rows}
    assert rows == {
        "BC greedy": ["Freeway", "Breakout", "–", "–"],
        "Behaviour mean": ["Breakout, Freeway", "–", "–", "–"],
        "Best behaviour": ["Breakout", "–", "–", "–"],
        "Best constant": ["–", "–", "Freeway", "–"],
    }
    found = {text: kind for kind, text in findings(analysis)}
    assert found["BC greedy is not distinguishable from Ours on Breakout."] == "equal"
    assert found["The best constant action scores higher than Ours on Freeway."] == "against"
    assert found["Ours scores higher than BC greedy on Freeway."] == "for"
    assert found["Each of the 3 seeds of Ours is above the behaviour mean in every game."] == "for"
    assert found["Ours reaches the published human score on none of the games."] == "note"


def test_a_seed_below_the_behaviour_is_named():
    rows = [r for r in make().episodes if not (r.agent == "ours" and r.game == "Freeway" and r.seed == 1)]
    rows += episodes("ours", "Freeway", [6, 6], seed=1)
    found = [text for kind, text in findings(Analysis(make(episodes=rows))) if kind == "against"]
    assert "Not every seed of Ours is above the behaviour mean: Freeway (seed 1: 6.0 against 7.0)." in found


def test_one_seed_has_no_verdict_anywhere():
    data = make(episodes=[row for row in make().episodes if row.seed == 0], aggregate=True)
    kinds = {kind for kind, _ in findings(Analysis(data))}
    assert kinds == {"open", "note"}
    assert all(row[4].text != "–" for row in comparison_table(Analysis(data)).rows)
    text = " ".join(summary_text(Analysis(data)).split())
    assert "! One training seed of Ours, BC greedy: nothing here is a verdict about a method of one seed." in text
    assert re.search(r"\? [^?]*: Ours 0\.46 \[0\.\d\d, 0\.\d\d\] is without a verdict beside BC greedy 0\.15", text)


def test_random_play_has_no_training_seed_and_is_compared_all_the_same():
    """Ours scores 9, 10, 11 in Breakout; random play 1 and 3 in its two episodes."""
    rows = [row for row in make().episodes if row.agent == "ours"]
    for game, values in (("Breakout", [1.0, 3.0]), ("Freeway", [0.0, 1.0])):
        rows += episodes("random", game, values, gradient_step=0)
    analysis = Analysis(make(agents=[OURS, Agent(agent="random", label="random")], episodes=rows, aggregate=True))
    found = {text: kind for kind, text in findings(analysis)}
    assert found["Ours scores higher than random on Breakout and Freeway."] == "for"
    assert any(kind == "for" and "is higher than random" in text for text, kind in found.items())
    said = caveats(analysis)
    assert any(text.startswith("random: no training, so no training seeds.") for text in said)
    assert not any("One training seed" in text or "different numbers of gradient steps" in text for text in said)
    assert not any(record["policy"] == "random" for record in seed_table(analysis).records)
    assert comparison_table(analysis).rows[0][5] == ("1.00", "[no interval]", False)
    summary_text(Analysis(make(agents=[Agent(agent="random", label="random"), OURS], episodes=rows)))


def test_findings_compare_with_the_agents_asked_for():
    third = Agent(agent="third", label="Third")
    rows = [
        *make().episodes,
        *(dataclasses.replace(row, agent="third") for row in make().episodes if row.agent == "bc"),
    ]
    data = make(agents=[OURS, BC, third], episodes=rows, main="BC greedy", against=["Third"], aggregate=True)
    texts = [text for _, text in findings(Analysis(data))]
    assert any(
        text.startswith("Human-normalised IQM over 2 games: BC greedy") and "beside Third" not in text for text in texts
    )
    assert not any("Ours" in text for text in texts)
    assert [row[0].text for row in comparison_table(Analysis(data)).rows][:2] == ["Ours", "Third"]


def test_findings_judge_all_that_the_main_agent_is_compared_with_and_further_pairs():
    """Third scores 100 more than Ours, who is above BC in Freeway; it and BC are a pair too."""
    third = Agent(agent="third", label="Third")
    rows = [*make().episodes]
    rows += [
        dataclasses.replace(row, agent="third", episode_return=row.episode_return + 100)
        for row in make().episodes
        if row.agent == "ours"
    ]
    fields = {"agents": [OURS, BC, third], "episodes": rows, "against": ["BC greedy", "Third"]}
    found = {text: kind for kind, text in findings(Analysis(make(**fields)))}
    assert found["Ours scores higher than BC greedy on Freeway."] == "for"
    assert found["Third scores higher than Ours on Breakout and Freeway."] == "against"
    assert not any("Third" in text and "BC" in text for text in found)
    of_pair = {kind: text for kind, text in findings(Analysis(make(**fields, pairs=[("BC greedy", "Third")])))
               if "Third" in text and "BC" in text}  # fmt: skip
    assert of_pair == {"against": "Third scores higher than BC greedy on Breakout and Freeway."}
    pairs = [("Third", "BC greedy")]
    aggregated = [*findings(Analysis(make(**fields, pairs=pairs, aggregate=True)))]
    assert any(kind == "for" and ": Third" in text and "is higher than BC greedy" in text for kind, text in aggregated)
    with pytest.raises(ValueError, match=r"among the labels of the agents .*'Fourth'"):
        make(**fields, pairs=[("Third", "Fourth")])


def test_scores_and_lists_read_well():
    assert [format_score(v) for v in (9.44, -20.96, 312.4, 49100.0)] == ["9.4", "-21.0", "312", "49,100"]
    assert [format_size(v) for v in (79_456_000, 3_420_000, 850_000)] == ["79M", "3.4M", "850k"]
    assert name_games(["A", "B"], 5) == "A and B"
    assert name_games(["A", "B", "C"], 5) == "A, B and C"
    assert name_games(list("ABCD"), 5) == "4 of 5 games (A, B, C, D)"
    assert name_games(list("ABCD"), 4) == "all 4 games"
    assert name_games(list("ABCDEFGHI"), 40) == "9 of 40 games"


def test_zero_has_no_sign():
    assert (two_digits(-0.001), two_digits(-0.01), format_score(-0.04), format_score(-0.06)) == (
        "0.00", "-0.01", "0.0", "-0.1"
    )  # fmt: skip


def test_learning_curve_by_hand():
    """Two seeds; step 50 was evaluated in full, step 70 for one seed only, and step 100 last."""
    rows = [r for r in make().episodes if r.agent == "bc"]
    for step, values in ((50, [2.0, 4.0]), (100, [8.0, 10.0])):
        for seed in (0, 1):
            rows += episodes("ours", "Breakout", values, seed=seed, gradient_step=step)
            rows += episodes("ours", "Freeway", [seed + step / 10], seed=seed, gradient_step=step)
    rows += episodes("ours", "Breakout", [99.0], seed=0, gradient_step=70) + episodes(
        "ours", "Freeway", [99.0], seed=0, gradient_step=70
    )
    analysis = Analysis(make(episodes=rows, aggregate=True))
    assert {line.label: list(line.runs) for line in analysis.learning_curves} == {"Ours": [50, 100]}
    table = curve_table(analysis, analysis.learning_curves, name="learning_curves", axis="gradient steps")
    records = {(r["x"], r["game"]): r for r in table.records}
    points = [records[key]["point"] for key in ((50, "Breakout"), (50, "Freeway"), (100, "Freeway"))]
    assert points == [3.0, 5.5, 10.5]
    assert records[50, "Freeway"]["high_95"] == pytest.approx(5.5 + 12.7062 / 2, abs=1e-3)  # seeds score 5 and 6
    assert records[50, "IQM"]["point"] == pytest.approx(((3 - 1.7) / 28.8 + 5.5 / 29.6) / 2)
    assert shown(table)["Freeway, 100"]["Ours"].text == "10.5"
    assert any(
        note.startswith("Ours: the learning curve leaves out the checkpoints at 70 gradient")
        for note in caveats(analysis)
    )
    plots = line_plots(analysis, analysis.learning_curves, name="learning_curve", axis="gradient steps")
    assert [plot.name for plot in plots] == ["learning_curve", "learning_curve_by_game_1"]
    assert len(plots[1].figure.axes) == 2  # a panel per game


def test_an_interrupted_checkpoint_is_named():
    rows = [r for r in make().episodes if r.agent == "bc"]
    for step, lengths in ((50, (2, 1)), (70, (2, 2)), (100, (2, 2))):
        for seed in (0, 1):
            rows += episodes("ours", "Breakout", [1.0] * lengths[seed], seed=seed, gradient_step=step)
            rows += episodes("ours", "Freeway", [1.0] * 2, seed=seed, gradient_step=step)
    found = [note for note in caveats(Analysis(make(episodes=rows))) if "checkpoint" in note]
    assert len(found) == 1 and "at the checkpoints 50 (1 to 2); if" in found[0] and "the long ones" in found[0]
    rows = [r for r in rows if r.gradient_step != 50 and (r.gradient_step == 100 or r.episode == 0)]
    found = [note for note in caveats(Analysis(make(episodes=rows))) if "checkpoint" in note]
    assert found == ["Ours: episodes per game and seed differ between checkpoints: 1 at 70, 2 at 100."]


def family(*places, games=("Breakout", "Freeway")):
    """Agents that score ten times their place plus 0, 1 and 2 in the three seeds, and BC, which scores 1."""
    agents = [Agent(agent=f"ours{x}", label=f"Ours {x}", x=x, family="Ours") for x in places]
    rows = [row for row in make().episodes if row.agent == "bc"]
    for x in places:
        for seed in range(3):
            for game in games:
                rows += episodes(f"ours{x}", game, [10 * x + seed], seed=seed)
    return agents, rows


def test_a_family_is_a_line_along_the_axis():
    agents, rows = family(1, 0.5, 3)
    data = make(agents=[*agents, BC], episodes=rows, x="data.first_fraction", aggregate=True)
    analysis = Analysis(data)
    (line,) = analysis.lines
    assert line.label == "Ours" and list(line.runs) == [0.5, 1, 3]
    assert [agent.label for agent in analysis.against] == ["BC greedy"]
    table = curve_table(analysis, analysis.lines, name="scores_along_axis", axis="data.first_fraction")
    cells = {row: columns["Ours"] for row, columns in shown(table).items()}
    assert (cells["Breakout, 0.5"].text, cells["Breakout, 3"].text) == ("6.0", "31.0")  # seeds 5, 6, 7: 6 +- 2.484
    assert cells["Breakout, 0.5"].detail == "[3.5, 8.5]"
    assert {plot.name for plot in line_plots(analysis, analysis.lines, name="a", axis="x")} == {"a", "a_by_game_1"}
    (found,) = (text for kind, text in findings(analysis) if "by data.first_fraction" in text)
    assert "at first_fraction=0.5, " in found and found.endswith("the last is higher than the first.")


@pytest.mark.parametrize(
    ("axis", "places"),
    [
        ("parameters", (34e3, 86e3, 103e3, 153e3, 247e3, 498e3, 502e3, 1.01e6, 2.09e6)),  # of the study scaling
        ("parameters", (31e6, 60e6, 60.5e6, 79e6)),
        ("parameters", (1e6,)),
        ("optim.learning_rate", (2.5e-4, 3.125e-4, 3.75e-4, 5e-4)),
        ("optim.eps", (1e-5, 3.125e-4, 1e-3, 1e-2)),
    ],
)
def test_places_close_to_each_other_leave_room_for_their_labels(axis, places):
    agents, rows = family(*places)
    analysis = Analysis(make(agents=agents, episodes=rows, x=axis, aggregate=True))
    for plot in line_plots(analysis, analysis.lines, name="a", axis=axis):
        plot.figure.draw_without_rendering()
        for axes in plot.figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert all(before.x1 < after.x0 for before, after in pairwise(boxes))
            assert {axes.get_xticks()[0], axes.get_xticks()[-1]} == {places[0], places[-1]}


def test_each_family_s_ends_are_compared_game_by_game_where_nothing_is_aggregated():
    """Ours grows along the axis; of the other family the larger agent is as good in one game, worse in another."""
    agents, rows = family(1, 2)
    others = [
        dataclasses.replace(agent, agent=f"mse{agent.x}", label=f"mse {agent.x}", family="mse") for agent in agents
    ]
    for agent, freeway in zip(others, (30, 10), strict=True):
        for seed in range(3):
            rows += episodes(agent.agent, "Breakout", [5 + seed], seed=seed)
            rows += episodes(agent.agent, "Freeway", [freeway + seed], seed=seed)
    analysis = Analysis(make(agents=[*agents, *others], episodes=rows, main="Ours 2", x="parameters"))
    found = {text: kind for kind, text in findings(analysis) if text.startswith("By parameters, ")}
    assert found == {
        "By parameters, Ours 2 scores higher than Ours 1 on Breakout and Freeway.": "for",
        "By parameters, mse 1 is not distinguishable from mse 2 on Breakout.": "note",
        "By parameters, mse 1 scores higher than mse 2 on Freeway.": "note",
    }
    analysis = Analysis(make(agents=[*agents, *others], episodes=rows, main="Ours 2", x="parameters", aggregate=True))
    kinds = {text.split(": ")[1].split()[0]: kind for kind, text in findings(analysis) if "by parameters: " in text}
    assert kinds == {"Ours": "for", "mse": "note"}


def test_others_are_compared_at_the_place_of_the_main_agent():
    agents, rows = family(1, 2)
    bc = [
        dataclasses.replace(agent, label=f"BC {agent.x}", decoding="sampled", x=agent.x / 8, family="BC")
        for agent in agents
    ]
    rows += [dataclasses.replace(row, decoding="sampled") for row in rows if row.agent != "bc"]
    analysis = Analysis(make(agents=[*agents, *bc], episodes=rows, main="Ours 2", x="parameters"))
    assert [agent.label for agent in analysis.against] == ["BC 2"]
    assert [line.label for line in analysis.lines] == ["Ours", "BC"]


def of_family(name, *places):
    """Greedy agents of another family, which score what a :func:`family` does."""
    agents, rows = family(*places)
    agents = [dataclasses.replace(each, agent=f"{name}{each.x}", label=f"{name} {each.x}", family=name)
              for each in agents]  # fmt: skip
    return agents, [
        dataclasses.replace(row, agent=row.agent.replace("ours", name)) for row in rows if row.agent != "bc"
    ]


def test_sizes_of_an_unfinished_study_are_not_compared_by_their_rank():
    """The smallest network of the main family has no scores yet, or no seed of it has all games."""
    bc, of_bc = of_family("cloning", 1, 2, 3)
    mgdt, of_mgdt = of_family("mgdt", 20, 30)
    agents, rows = family(1, 2, 3)
    rows += of_bc + of_mgdt

    def compared(agents, rows):
        analysis = Analysis(make(agents=agents, episodes=rows, main="Ours 2", x="parameters"))
        said = [text for text in caveats(analysis) if "is not compared with" in text]
        return [agent.label for agent in analysis.against], analysis.unmatched, " ".join(said)

    text = "Ours 2 is not compared with {}: their sizes are more or fewer than its own family's; --against "
    text += "names others to compare it with."
    assert compared([*agents, *bc], rows) == (["cloning 2"], [], "")
    assert compared([*agents, *bc, *mgdt], rows) == (["cloning 2"], ["mgdt"], text.format("mgdt"))
    assert compared([*agents[1:], *bc, *mgdt], rows) == (["mgdt 20"], ["cloning"], text.format("cloning"))
    assert compared([agents[1], *bc, *mgdt], rows) == ([], ["cloning", "mgdt"], text.format("cloning, mgdt"))
    assert compared([*agents, bc[0], BC], rows) == (["BC greedy"], ["cloning"], text.format("cloning"))
    partly = [row for row in rows if (row.agent, row.game, row.seed == 0) not in (
        ("ours1", "Breakout", True), ("ours1", "Freeway", False))]  # fmt: skip
    assert compared([*agents, *bc], partly) == (["cloning 2"], [], "")


def test_at_a_setting_those_of_the_same_value_are_compared():
    agents, rows = family(0.5, 1)
    bc, of_bc = of_family("cloning", 0.2, 0.5)
    mgdt, of_mgdt = of_family("mgdt", 0.2, 1)
    fields = {"agents": [*agents, *bc, *mgdt], "episodes": rows + of_bc + of_mgdt, "x": "data.first_fraction"}
    analysis = Analysis(make(**fields, main="Ours 1"))
    assert ([agent.label for agent in analysis.against], analysis.unmatched) == (["mgdt 1"], ["cloning"])
    text = "Ours 1 is not compared with cloning: none there has its data.first_fraction; --against names"
    assert any(said.startswith(text) for said in caveats(analysis))
    analysis = Analysis(make(**fields, main="Ours 1", against=["cloning 0.5"]))
    assert not any("is not compared with" in said for said in caveats(analysis))


def test_five_families_look_different():
    agents, rows = family(1, 2)
    names = ["Ours", *"ABCD"]
    kinds = ["greedy", "sampled", "expert", "expert_128", "greedy"]
    others = [
        dataclasses.replace(agent, agent=f"{name}{agent.x}", label=f"{name} {agent.x}", decoding=kind, family=name)
        for name, kind in zip(names[1:], kinds[1:], strict=True)
        for agent in agents
    ]
    ours = [row for row in rows if row.agent != "bc"]
    rows += [
        dataclasses.replace(row, agent=row.agent.replace("ours", name), decoding=kind)
        for name, kind in zip(names[1:], kinds[1:], strict=True)
        for row in ours
    ]
    analysis = Analysis(make(agents=[*agents, *others], episodes=rows, x="parameters"))
    styles = {(colour(line.agent, analysis), marker(line.agent, analysis)) for line in analysis.lines}
    assert len(analysis.lines) == len(styles) == 5 and len({ink for ink, _ in styles}) == 5


def test_one_place_makes_no_line():
    agents, rows = family(2)
    assert Analysis(make(agents=[*agents, BC], episodes=rows, x="parameters")).lines == []


# An agent that lacks games


def test_an_agent_that_lacks_a_game_is_left_out_of_aggregates_only():
    rows = [row for row in make().episodes if not (row.agent == "bc" and row.game == "Freeway")]
    analysis = Analysis(make(episodes=rows, aggregate=True))
    assert list(shown(aggregate_table(analysis, "human"))) == ["Ours", "Behaviour mean"]
    assert shown(score_table(analysis))["BC greedy"]["Breakout"].text == "10.0"
    assert "Freeway" not in analysis.game_means["BC greedy"]
    said = "BC greedy has no episode that counts in Freeway, and is left out of the aggregates."
    assert said in caveats(analysis)
    assert said in " ".join(summary_text(analysis).split())
    found = [text for _, text in findings(analysis)]
    assert "BC greedy is not distinguishable from Ours on Breakout." in found
    assert not any("IQM" in text for text in found)


def test_aggregates_are_over_the_games_of_the_main_agent():
    rows = [row for row in make().episodes if not (row.agent == "ours" and row.game == "Freeway")]
    analysis = Analysis(make(episodes=rows, aggregate=True))
    human = shown(aggregate_table(analysis, "human"))
    assert list(human) == ["Ours", "BC greedy", "Behaviour mean"]
    assert human["Ours"]["IQM"].text == f"{(10 - 1.7) / 28.8:.2f}"
    assert "Human-normalised aggregates cover 1 of the 2 games shown." in caveats(analysis)


def test_agents_without_a_game_in_common_have_no_comparison():
    rows = [row for row in make().episodes if (row.agent == "bc") == (row.game == "Freeway")]
    analysis = Analysis(make(episodes=rows))
    row = comparison_table(analysis).rows[0]
    assert [cell.text for cell in row] == ["BC greedy", "–", "–", "–", "–", "–"]
    summary_text(analysis)


def test_a_step_can_be_chosen_and_must_have_been_evaluated():
    rows = make().episodes + [dataclasses.replace(r, gradient_step=50, episode_return=1.0) for r in make().episodes]
    rows += episodes("random", "Breakout", [1.0], gradient_step=0)
    agents = [OURS, BC, Agent(agent="random", label="random")]
    analysis = Analysis(make(episodes=rows, agents=agents, step=50))
    assert (analysis.selection["Ours"].step, analysis.selection["random"].step) == (50, 0)
    assert shown(score_table(analysis))["Ours"]["Freeway"].text == "1.0"
    assert not any("the last checkpoint that was" in text for text in caveats(analysis))
    with pytest.raises(ValueError, match=r"--step must be one at which Ours was evaluated \(50, 100\), got 70"):
        Analysis(make(episodes=rows, agents=agents, step=70))


def test_captions_of_games_without_published_scores():
    assert "; published scores: Random, DQN. The agent" in score_table(Analysis(single_seed(["Carnival"]))).caption
    caption = score_table(Analysis(single_seed(["Breakout-d1"]))).caption
    assert caption.startswith("Mean raw return per episode with 95% intervals over the episodes of one seed. The agent")


def test_protocol_names_every_seeds_checkpoint():
    rows = [dataclasses.replace(r, checkpoint=f"{r.agent}{r.seed}.pt sha256:0") for r in make().episodes]
    records = protocol_table(Analysis(make(episodes=rows))).records
    assert [(r["agent"], r["seed"], r["checkpoint"]) for r in records] == [
        (agent.label, seed, f"{agent.agent}{seed}.pt sha256:0") for agent in (OURS, BC) for seed in range(3)
    ]


def test_long_training_curves_are_means_of_blocks():
    curve = Curve(agent="a", label="a", metric="m", seed=0, gradient_steps=list(range(300)), values=[1, 3] * 150)
    steps, values = thinned(curve)
    assert (len(steps), steps[0], steps[-1], set(values)) == (150, 0.5, 298.5, {2.0})
    short = dataclasses.replace(curve, gradient_steps=[0, 5], values=[1, 3])
    assert [list(x) for x in thinned(short)] == [[0, 5], [1, 3]]


def test_twelve_agents_are_told_apart_and_leave_room_for_their_curves():
    names = [f"agent_{chr(ord('a') + index)}" for index in range(12)]
    curves = [
        Curve(agent=name, label=name, metric="TD loss", seed=0, gradient_steps=[1, 2, 3], values=[3, 2, 1])
        for name in names
    ]
    agents = [Agent(agent=name, label=name) for name in names]
    rows = [row for name in names for row in episodes(name, "Pong", [1, 2])]
    data = make(games=["Pong"], agents=agents, episodes=rows, curves=curves, game_data=(), clips=())
    analysis = Analysis(data)
    looks = {(colour(agent, analysis), marker(agent, analysis)) for agent in analysis.agents}
    assert len(looks) == len(names)
    (plot,) = training_plots(analysis)
    plot.png()  # lays it out
    (axes,) = plot.figure.axes
    inches = axes.get_position().height * plot.figure.get_figheight()
    assert inches > 1 and len(plot.figure.legends[0].texts) == len(names)


# What limits the numbers is said


def single_seed(games, **changes):
    rows = [r for game in games for r in episodes("ours", game, [1, 2]) + episodes("bc", game, [1, 2])]
    return make(**({"games": games, "episodes": rows, "game_data": (), "curves": (), "clips": ()} | changes))


def test_caveats_name_the_games_without_reference_scores():
    found = " ".join(caveats(Analysis(single_seed(list(TRAIN_40)))))
    assert "Human-normalised aggregates cover 38 of the 40 games shown: Carnival and Pooyan have no published" in found
    assert "DQN-normalised aggregates" not in found
    assert "do not cover the variation between training runs" in found


def test_caveats_state_unequal_protocols_and_counts():
    rows = episodes("ours", "Breakout", [1, 2, 3], terminated=False, truncated=True) + episodes(
        "bc", "Breakout", [1], sticky=0.0, gradient_step=7
    )
    clipped = game_data("Breakout", returns(4.0), rewards="clipped")
    data = single_seed(["Breakout"], episodes=rows, game_data=[clipped], aggregate=True)
    found = " ".join(caveats(Analysis(data)))
    assert "between 1 and 3 episodes" in found
    assert "3 of 4 episodes were cut at the frame limit" in found
    assert "not evaluated alike: sticky-action probabilities 0, 0.25. Compare with care." in found
    assert "different numbers of gradient steps: 7, 100" in found
    assert "The data of Breakout holds clipped rewards" in found
    assert "With 1 game the IQM" in found
    assert "Behaviour mean" not in shown(score_table(Analysis(data)))


def test_a_training_metric_that_is_no_number_is_named():
    curve = Curve(
        agent="ours", label="Ours", metric="TD loss", seed=3, gradient_steps=[10, 20], values=[1, float("nan")]
    )
    assert "TD loss of Ours, seed 3, is not finite at step 20." in caveats(Analysis(make(curves=[curve])))


def test_a_missing_interval_is_explained():
    rows = [dataclasses.replace(row, episode_return=7.0) if row.agent == "ours" else row for row in make().episodes]
    why = [text for text in caveats(Analysis(make(episodes=rows))) if text.startswith("No interval of ")]
    assert len(why) == 1 and "Ours" in why[0] and "nothing is known of their spread" in why[0]


def test_unequal_seeds_are_stated():
    rows = [r for r in make().episodes if not (r.agent == "bc" and r.seed > 0)]
    assert any("over 1 to 3 training seeds" in note for note in caveats(Analysis(make(episodes=rows))))


def test_games_without_human_score_are_shown_but_not_aggregated(tmp_path):
    data = single_seed(["Carnival"], aggregate=True)
    assert not aggregate_table(Analysis(data), "human").rows
    assert aggregate_table(Analysis(data), "dqn").rows
    assert "Carnival" in write_report(Analysis(data), tmp_path / "report.html").read_text()


def test_published_agents_only_where_games_overlap():
    assert not published_table(Analysis(make())).rows
    table = published_table(Analysis(single_seed(["Assault", "Pong", "Zaxxon"])))
    assert [row[0].text for row in table.rows] == ["Assault", "Zaxxon", "Human-normalised IQM (2)"]
    assert table.rows[0][table.header.index("Scaled QL 80M (JOWA's rerun)")].text == "2,292"


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"episodes": []},
            "an agent must have a training seed .* gradient step, among Breakout",
        ),
        ({"games": ["Pong"], "game_data": (), "clips": (), "main": "Ours"}, "Ours must have a training seed .* Pong;"),
        ({"games": ["Breakut"], "game_data": ()}, "got 'Breakut'; did you mean Breakout"),
        ({"agents": []}, r"among the labels of the agents \[\], got \[\]"),
        ({"main": "Other"}, r"among the labels of the agents \['Ours', 'BC greedy'\], got \['Other'\]"),
        ({"against": ["Other"]}, r"got \['Other'\]"),
        ({"agents": [OURS, dataclasses.replace(BC, label="Ours")]}, "distinct labels"),
        ({"games": ["Freeway"]}, r"game_data names \['Breakout'\]"),
        ({"game_data": [game_data("Freeway", returns(1.0))] * 2}, "one per game"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_report(Analysis(make(**changes)), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="finite numbers"):
        returns(float("nan"))
    with pytest.raises(ValueError, match="18 entries, got 4"):
        game_data("Pong", returns(1.0), action_counts=[1] * 4)
    with pytest.raises(ValueError, match="as many values as gradient steps, got 1 and 2"):
        Curve(agent="a", label="a", metric="loss", seed=0, gradient_steps=[0, 1], values=[1])


# The files


def test_every_plot_and_table_is_a_file(written):
    page = written
    files = {path.name for path in (page.parent / "report_files").iterdir()}
    names = [
        "scores",
        "curve_0_td_loss__nats",
    ]
    assert {f"{name}.{kind}" for name in names for kind in ("png", "svg")} <= files
    tables = ["score_table", "comparison", "seeds", "data", "protocol", "settings_objective"]
    assert {f"{name}.{kind}" for name in [*tables, "settings_versions"] for kind in ("csv", "tex")} <= files
    for path in (page.parent / "report_files").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    with (page.parent / "report_files" / "score_table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = next(row for row in rows if row["policy"] == "Best constant")
    assert (best["game"], float(best["mean_return"]), best["detail"]) == ("Freeway", 24.0, "always UP")
    assert next(row for row in rows if row["policy"] == "Random")["low_95"] == ""
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report_files"]


def test_page_is_self_contained_and_its_references_resolve(written):
    text = written.read_text()
    references = re.findall(r"""(?:src|srcset|href)="([^"]*)\"""", text)
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert text.count("<script>") == 1 and "<script " not in text and "@import" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    targets = {reference[1:] for reference in references if reference.startswith("#")}
    targets |= {target[1:] for target in re.findall(r"url\(([^)]*)\)", text)}
    assert targets <= set(ids)


def test_page_offers_every_file_for_download(written):
    """The links hold the very bytes that lie beside the page."""
    links = re.findall(r'<a download="([^"]+)" href="data:[a-z+/-]+;base64,([^"]+)"', written.read_text())
    files = {path.name: path.read_bytes() for path in (written.parent / "report_files").iterdir()}
    assert {name: base64.b64decode(data) for name, data in links} == files
    assert len(links) == len(files)


def test_page_says_what_it_was_given(written):
    text = written.read_text()
    for expected in ("What was run.", "How Freeway was played.", "One data set.", "optim.lr", "2.13.0", "Seed 0."):
        assert expected in text
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]+"', text)) == 2
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", text))
    assert text.count("<th scope=") == text.count("<th ")


def test_text_from_outside_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\" onload='x' $\\frac{"
    data = single_seed(
        ["Breakout"], title=evil, introduction=[evil], settings={evil: {evil: evil}}, caveats=[evil],
        agents=[dataclasses.replace(OURS, label=evil), BC], clips=[Clip(game="Breakout", caption=evil, data=gif())],
    )  # fmt: skip
    page = write_report(Analysis(data), tmp_path / "report.html").read_text()
    seen = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.update([tag, *(name for name, _ in attrs)])

    Parser().feed(page)
    assert "svg" in seen
    assert "onload" not in seen and page.count("<script>") == 1
    assert page.count("&lt;script&gt;") >= 8


def test_report_is_reproducible(written, tmp_path):
    again = write_report(Analysis(make()), tmp_path / "report.html")
    assert again.read_bytes() == written.read_bytes()
    for path in (written.parent / "report_files").iterdir():
        assert path.read_bytes() == (tmp_path / "report_files" / path.name).read_bytes(), path.name


# The terminal


def test_tables_for_the_terminal_and_for_papers():
    table = score_table(Analysis(make()))
    lines = table.to_text().splitlines()
    assert re.match(r"Ours +10\.0\* \[7\.5, 12\.5\] +20\.5\* \[18\.0, 23\.0\]$", lines[2])
    assert re.match(r"Ours +10\.0\* +20\.5\*$", table.to_text(details=False).splitlines()[2])
    latex = table.to_latex().splitlines()
    assert latex[0].startswith("% Mean raw return") and "marked *" in latex[0]
    assert latex[1:3] == [r"\begin{tabular}{lll}", r"\toprule"] and latex[-2:] == [r"\bottomrule", r"\end{tabular}"]
    cells = [cell.strip() for cell in latex[5].rstrip("\\ ").split("&")]
    assert cells == ["Ours", "10.0* [7.5, 12.5]", "20.5* [18.0, 23.0]"]
    special = dataclasses.replace(table, rows=[[Cell("a_b & 50%"), Cell("1"), Cell("2")]])
    assert r"a\_b \& 50\%" in special.to_latex()


def test_json_has_every_table_caveat_and_finding():
    analysis = Analysis(make(made={"command": "torchrl-sql report", "commit": "abc"}))
    data = json.loads(json.dumps(summary_data(analysis), allow_nan=False))
    assert [data[key] for key in ("title", "games")] == ["Two games", ["Breakout", "Freeway"]]
    assert data["agents"] == ["Ours", "BC greedy"]
    assert data["made"]["commit"] == "abc" and "One data set." in data["caveats"]
    assert {"kind": "for", "text": "Ours scores higher than BC greedy on Freeway."} in data["findings"]
    scores = {(row["policy"], row["game"]): row for row in data["tables"]["score_table"]}
    assert scores["Ours", "Freeway"]["mean_return"] == 20.5
    assert scores["Best constant", "Freeway"]["low_95"] is None


def test_terminal_summary_has_tables_and_findings():
    text = summary_text(Analysis(make()))
    for expected in (
        "marked *",
        "Freeway, seed 1",
        "no interval",
        "= BC greedy is not distinguishable from Ours on Breakout",
    ):
        assert expected in text
    assert "- The best constant action scores higher than Ours on Freeway." in text
    assert text.index("! Intervals are Student") < text.index("+ Ours scores higher")
