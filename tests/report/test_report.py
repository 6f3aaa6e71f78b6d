from __future__ import annotations

import base64
import csv
import dataclasses
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.builders import episodes, returns
from torchrl_sql.games import GAMES, TRAIN_40
from torchrl_sql.report import (
    Agent,
    Clip,
    Curve,
    GameData,
    ReportData,
    format_score_table,
    write_report,
)
from torchrl_sql.report.analysis import Analysis
from torchrl_sql.report.caveats import caveats
from torchrl_sql.report.context_tables import learning_curve_table, protocol_table
from torchrl_sql.report.figures.aggregates import scaling_plot
from torchrl_sql.report.figures.curves import thinned
from torchrl_sql.report.findings import findings
from torchrl_sql.report.score_tables import (
    aggregate_table,
    comparison_table,
    published_table,
    reference_table,
    score_table,
    seed_table,
)
from torchrl_sql.report.table import to_text
from torchrl_sql.report.text import format_score, format_size, name_games

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
            game_data("Freeway", returns(7.0), constant_actions={"UP": returns(24.0), "DOWN": returns(0.0)}),
        ],
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
    return write_report(make(), tmp_path_factory.mktemp("run") / "deep" / "report.html")


# Numbers computed by hand


def test_score_table_by_hand():
    table = score_table(Analysis(make()))
    assert table.header == (
        "Game", "Ours", "BC greedy", "Behaviour mean", "Best behaviour", "Best constant", "Random", "Human"
    )  # fmt: skip
    breakout, freeway = ({name: cell for name, cell in zip(table.header, row, strict=True)} for row in table.rows)
    assert [cell.text for cell in breakout.values()] == ["Breakout", "10.0", "10.0", "4.0", "7.0", "–", "1.7", "30.5"]
    assert [cell.text for cell in freeway.values()] == ["Freeway", "20.5", "2.5", "7.0", "–", "24.0", "0.0", "29.6"]
    assert breakout["Ours"].detail == ("[7.5, 12.5]", "n = 9")  # 10 +- 4.303 / sqrt(3)
    assert breakout["Behaviour mean"].detail == ("[2.9, 5.1]", "n = 16")  # 4 +- 2.131 * 2 / 4
    assert breakout["Best behaviour"].detail == ("[no interval]", "n = 16", "good")
    assert freeway["Best constant"].detail[-1] == "always UP"
    assert (freeway["Ours"].strong, freeway["BC greedy"].strong, freeway["Best constant"].strong) == (
        True,
        False,
        False,
    )
    record = next(r for r in table.records if r["policy"] == "Ours" and r["game"] == "Breakout")
    assert record["human_normalised"] == pytest.approx((10 - 1.7) / (30.5 - 1.7))
    assert (record["num_episodes"], record["num_seeds"], record["interval_over"]) == (9, 3, "seeds")


def test_aggregate_and_seed_tables_by_hand():
    analysis = Analysis(make())
    human = aggregate_table(analysis, "human")
    assert [row[0].text for row in human.rows] == ["Ours", "BC greedy", "Behaviour mean"]
    ours = ((10 - 1.7) / 28.8 + 20.5 / 29.6) / 2
    behaviour = ((4 - 1.7) / 28.8 + 7 / 29.6) / 2
    assert [cell.text for cell in human.rows[0][1:]] == [f"{ours:.2f}"] * 3 + [f"{1 - ours:.2f}"]
    assert human.rows[2][1] == (f"{behaviour:.2f}", ("[no interval]",), False)
    seeds = seed_table(analysis)
    assert [row[0].text for row in seeds.rows][::3] == ["Breakout, seed 0", "Freeway, seed 0", "IQM, seed 0"]
    assert seeds.rows[1][1].text == "10.0"
    assert seeds.rows[7][1].text == f"{ours:.2f}"


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
    assert found["BC greedy is not distinguishable from Ours on Breakout."] == "neutral"
    assert found["The best constant action scores higher than Ours on Freeway."] == "against"
    assert found["Ours scores higher than BC greedy on Freeway."] == "for"
    assert found["Each of the 3 seeds of Ours is above the behaviour mean in every game."] == "for"
    assert found["Ours reaches the published human score on none of the games."] == "neutral"


def test_a_seed_below_the_behaviour_is_named():
    rows = [r for r in make().episodes if not (r.agent == "ours" and r.game == "Freeway" and r.seed == 1)]
    rows += episodes("ours", "Freeway", [6, 6], seed=1)
    found = [text for kind, text in findings(Analysis(make(episodes=rows))) if kind == "against"]
    assert "Not every seed of Ours is above the behaviour mean: Freeway (seed 1: 6.0 against 7.0)." in found


def test_one_seed_has_no_verdict_anywhere():
    data = make(episodes=[row for row in make().episodes if row.seed == 0])
    kinds = {kind for kind, _ in findings(Analysis(data))}
    assert kinds == {"open", "neutral"}
    assert all(row[4].text != "–" for row in comparison_table(Analysis(data)).rows)
    text = " ".join(format_score_table(data).split())
    assert "nothing here is a verdict about its method" in text
    assert "? One training seed of Ours" in text
    assert re.search(r"\? [^?]*: Ours 0\.46 \[0\.\d\d, 0\.\d\d\] is without a verdict beside BC greedy 0\.15", text)


def test_findings_compare_with_the_agents_asked_for():
    third = Agent(agent="third", label="Third")
    rows = [
        *make().episodes,
        *(dataclasses.replace(row, agent="third") for row in make().episodes if row.agent == "bc"),
    ]
    data = make(agents=[OURS, BC, third], episodes=rows, main="BC greedy", against=["Third"])
    texts = [text for _, text in findings(Analysis(data))]
    assert any(
        text.startswith("Human-normalised IQM over 2 games: BC greedy") and "beside Third" not in text for text in texts
    )
    assert not any("Ours" in text for text in texts)
    assert [row[0].text for row in comparison_table(Analysis(data)).rows][:2] == ["Ours", "Third"]


def test_scores_and_lists_read_well():
    assert [format_score(v) for v in (9.44, -20.96, 312.4, 49100.0)] == ["9.4", "-21.0", "312", "49,100"]
    assert [format_size(v) for v in (79_456_000, 3_420_000, 850_000)] == ["79M", "3.4M", "850k"]
    assert name_games(["A", "B"], 5) == "A and B"
    assert name_games(["A", "B", "C"], 5) == "A, B and C"
    assert name_games(list("ABCD"), 5) == "4 of 5 games (A, B, C, D)"
    assert name_games(list("ABCD"), 4) == "all 4 games"
    assert name_games(list("ABCDEFGHI"), 40) == "9 of 40 games"


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
    analysis = Analysis(make(episodes=rows))
    assert {label: list(curve.runs) for label, curve in analysis.learning_curves.items()} == {"Ours": [50, 100]}
    records = {(r["gradient_step"], r["game"]): r["point"] for r in learning_curve_table(analysis).records}
    assert (records[50, "Breakout"], records[50, "Freeway"], records[100, "Freeway"]) == (3.0, 5.5, 10.5)
    assert records[50, "all"] == pytest.approx(((3 - 1.7) / 28.8 + 5.5 / 29.6) / 2)
    assert any(
        note.startswith("Ours: the learning curve leaves out the checkpoints at 70 gradient")
        for note in caveats(analysis)
    )


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


def test_sampled_play_and_ablations_are_no_sizes():
    ours = dataclasses.replace(OURS, num_parameters=10**6, group="cql")
    sampled = dataclasses.replace(ours, label="Ours sampled", decoding="sampled", num_parameters=2 * 10**6)
    ablation = dataclasses.replace(BC, num_parameters=3 * 10**6)
    rows = make().episodes
    rows += [dataclasses.replace(row, decoding="sampled") for row in rows if row.agent == "ours"]
    analysis = Analysis(make(agents=[ours, sampled, ablation], episodes=rows))
    assert scaling_plot(analysis) is None and not any("by size" in text for _, text in findings(analysis))


def test_captions_of_games_without_published_scores(monkeypatch):
    analysis = Analysis(single_seed(["Carnival"]))
    bare = dataclasses.replace(GAMES["Carnival"], random_score=None, human_score=None, dqn_score=None)
    assert "; published scores: Random, DQN. The agent" in score_table(analysis).caption
    monkeypatch.setitem(GAMES, "Carnival", bare)
    caption = score_table(Analysis(single_seed(["Carnival"]))).caption
    assert caption.startswith("Mean raw return per episode and its 95% interval, number of episodes. The agent with")


def test_games_in_aggregates():
    table = reference_table(Analysis(single_seed(["Carnival", "Pong"])))
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["Carnival", "701", "–", "4,785", "no", "yes"],
        ["Pong", "-20.7", "14.6", "16.6", "yes", "yes"],
    ]


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


# What limits the numbers is said


def single_seed(games, **changes):
    rows = [r for game in games for r in episodes("ours", game, [1, 2]) + episodes("bc", game, [1, 2])]
    return make(**({"games": games, "episodes": rows, "game_data": (), "curves": (), "clips": ()} | changes))


def test_caveats_name_the_games_without_reference_scores():
    found = " ".join(caveats(Analysis(single_seed(list(TRAIN_40)))))
    assert "Human-normalised aggregates cover 38 of the 40 games shown: Carnival and Pooyan have no published" in found
    assert "DQN-normalised aggregates cover all 40 games shown." in found
    assert "do not cover the variation between training runs" in found


def test_caveats_state_unequal_protocols_and_counts():
    rows = episodes("ours", "Breakout", [1, 2, 3], terminated=False, truncated=True) + episodes(
        "bc", "Breakout", [1], sticky=0.0, gradient_step=7
    )
    clipped = game_data("Breakout", returns(4.0), rewards="clipped")
    data = single_seed(["Breakout"], episodes=rows, game_data=[clipped])
    found = " ".join(caveats(Analysis(data)))
    assert "between 1 and 3 episodes" in found
    assert "3 of 4 episodes were cut at the frame limit" in found
    assert "not evaluated alike: sticky-action probabilities 0, 0.25. Compare with care." in found
    assert "different numbers of gradient steps: 7, 100" in found
    assert "The data of Breakout holds clipped rewards" in found
    assert "With 1 games the IQM" in found
    assert "Behaviour mean" not in score_table(Analysis(data)).header


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
    data = single_seed(["Carnival"])
    assert aggregate_table(Analysis(data), "human") is None
    assert aggregate_table(Analysis(data), "dqn") is not None
    assert "Carnival" in write_report(data, tmp_path / "report.html").read_text()


def test_published_agents_only_where_games_overlap():
    assert published_table(Analysis(make())) is None
    assert any("published multi-game agents" in note for note in caveats(Analysis(make())))
    table = published_table(Analysis(single_seed(["Assault", "Pong", "Zaxxon"])))
    assert [row[0].text for row in table.rows] == ["Assault", "Zaxxon", "Human-normalised IQM (2)"]
    assert table.rows[0][table.header.index("Scaled QL 80M (JOWA's run)")].text == "2,292"


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": []}, "an agent must have been evaluated in each of Breakout, Freeway"),
        ({"games": ["Breakout", "Pong"], "game_data": ()}, "must have been evaluated in each of Breakout, Pong"),
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
        write_report(make(**changes), tmp_path / "report.html")
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
        "scores_Breakout",
        "scores_Freeway",
        "aggregates",
        "aggregates_dqn",
        "curve_0_td_loss__nats",
        "actions_Breakout",
    ]
    assert {f"{name}.{kind}" for name in names for kind in ("png", "svg")} <= files
    tables = ["score_table", "comparison", "aggregate_human_normalised", "aggregate_dqn_normalised", "seeds", "data"]
    tables += ["games_in_aggregates"]
    assert {f"{name}.csv" for name in [*tables, "protocol", "settings_objective", "settings_versions"]} <= files
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
    assert "<script" not in text and "@import" not in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    targets = {reference[1:] for reference in references if reference.startswith("#")}
    targets |= {target[1:] for target in re.findall(r"url\(([^)]*)\)", text)}
    assert targets <= set(ids)


def test_page_offers_every_file_for_download(written):
    """The links hold the very bytes that lie beside the page."""
    links = re.findall(r'<a download="([^"]+)" href="data:[a-z+/]+;base64,([^"]+)"', written.read_text())
    files = {path.name: path.read_bytes() for path in (written.parent / "report_files").iterdir()}
    assert {name: base64.b64decode(data) for name, data in links} == files
    assert len(links) == len(files)


def test_page_says_what_it_was_given(written):
    text = written.read_text()
    for expected in ("What was run.", "How Freeway was played.", "One data set.", "optim.lr", "2.13.0", "Seed 0."):
        assert expected in text
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]+"', text)) == 7
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", text))
    assert text.count("<th scope=") == text.count("<th ")


def test_text_from_outside_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\" onload='x' $\\frac{"
    data = single_seed(
        ["Breakout"], title=evil, introduction=[evil], settings={evil: {evil: evil}}, caveats=[evil],
        agents=[dataclasses.replace(OURS, label=evil), BC], clips=[Clip(game="Breakout", caption=evil, data=gif())],
    )  # fmt: skip
    page = write_report(data, tmp_path / "report.html").read_text()
    seen = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.update([tag, *(name for name, _ in attrs)])

    Parser().feed(page)
    assert "svg" in seen
    assert not seen & {"script", "onload"}
    assert page.count("&lt;script&gt;") >= 8


def test_report_is_reproducible(written, tmp_path):
    again = write_report(make(), tmp_path / "report.html")
    assert again.read_bytes() == written.read_bytes()
    for path in (written.parent / "report_files").iterdir():
        assert path.read_bytes() == (tmp_path / "report_files" / path.name).read_bytes(), path.name


# The terminal


def test_text_table_aligns_columns_and_details():
    text = to_text(score_table(Analysis(make())))
    lines = text.splitlines()
    assert len({len(line) for line in lines if line.startswith("-")}) == 1
    assert re.match(r"Breakout +10\.0\* +10\.0\* +4\.0 +7\.0 +– +1\.7 +30\.5$", lines[2])
    assert "[2.9, 5.1]" in lines[3]


def test_terminal_summary_has_tables_and_findings():
    text = format_score_table(make())
    for expected in (
        "marked *",
        "IQM, seed 1",
        "no interval",
        "= BC greedy is not distinguishable from Ours on Breakout",
    ):
        assert expected in text
    assert "- The best constant action scores higher than Ours on Freeway." in text
    assert text.index("! Intervals are Student") < text.index("+ Ours scores higher")
