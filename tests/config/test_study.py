"""Studies: what is written is what is read, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_sql.config import ConfigError, list_choices
from torchrl_sql.config.study import find_study, load_study

STUDY = """
title: T
common: [scale=cpu]
seeds: [0, 2]
data: collect
runs:
  a: {set: [method.cql_alpha=0.3]}
  b: {set: [method=bc], decode: [greedy, sampled], seeds: [2]}
  c: {from: a, load: encoder}
report: {main: a, against: [b], constant_actions: 5}
"""


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return load_study(file, **options)

    return read


def test_a_study_is_what_its_file_says(read):
    study = read(STUDY)
    assert (study.title, study.common, study.data) == ("T", ["scale=cpu"], "collect")
    assert study.runs["b"].decode == ["greedy", "sampled"] and study.runs["a"].decode == ["greedy"]
    assert study.seeds_of("a") == [0, 2] and study.seeds_of("b") == [2]
    assert (study.runs["c"].from_, study.runs["c"].load) == ("a", "encoder")
    assert study.report.main == "a" and study.report.constant_actions == 5


def test_what_is_written_is_read_again(read):
    study = read(STUDY)
    assert read(study.to_yaml()) == study


def test_folders_of_scores(read):
    folders = read(STUDY).score_folders(Path("s"))
    assert [str(folder) for folder in folders] == [
        "s/a/seed0", "s/a/seed2", "s/b/seed2", "s/c/seed0", "s/c/seed2", "s/constant",
    ]  # fmt: skip


def test_a_run_that_only_prepares_others_is_not_played(read):
    study = read(STUDY.replace("decode: [greedy, sampled]", "decode: []").replace("against: [b]", "against: [c]"))
    assert not [folder for folder in study.score_folders(Path("s")) if folder.parent.name == "b"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "", "title must be given"),
        (
            "cql_alpha=0.3]",
            "cql_alpha=0.3], decode: []",
            r"runs.a.decode must name a .* \(report.main\), got",
        ),
        ("decode: [greedy, sampled]", "decode: []", r"runs.b.decode must name a .* \(report.against\), got"),
        (
            "load: encoder}\nreport: {main: a, against: [b]",
            "load: encoder, decode: []}\nreport: {main: a, pairs: [[b, c]]",
            r"runs.c.decode must name a decoding, .* \(report.pairs\), got none",
        ),
        ("title: T", "titel: T", "titel is not known; is it title"),
        ("title: T", "title: [T]", r"title must be text, got \['T'\]"),
        ("seeds: [0, 2]", "seeds: [0, true]", "seeds must be a list of whole numbers"),
        ("seeds: [0, 2]", "seeds: 0", "seeds must be a list of whole numbers, got 0"),
        ("seeds: [0, 2]", "seeds: [2, 2]", "seeds must be different numbers"),
        ("seeds: [2]", "seeds: []", r"runs.b.seeds must be different numbers from 0, got \[\]"),
        ("common: [scale=cpu]", "common: [on]", "common must be a list of text"),
        ("decode: [greedy, sampled]", "decoding: greedy", "runs.b.decoding is not known; is it decode"),
        ("from: a", "from: d", "runs.c.from must be an earlier run"),
        ("from: a", "from: b", r"runs.c.seeds must be among those of b, got also \[0\]"),
        ("from: a, load: encoder", "from: a", "runs.c.load must be encoder or all"),
        ("  a:", "  ../a:", "runs must have names of letters"),
        ("  a:", "  store:", "other than constant, launch, store, stores, tasks"),
        ("against: [b]", "against: [d]", "report.against must be among the runs"),
        ("against: [b]", "pairs: [a, b]", r"report.pairs must be a list of pairs, got \['a', 'b'\]"),
        ("against: [b]", "pairs: [[a, b], [a, a]]", r"report.pairs must each be two runs, got \['a', 'a'\]"),
        ("against: [b]", "pairs: [[a, b, c]]", "report.pairs must each be two runs"),
        ("against: [b]", "pairs: [[a, d]]", "report.pairs must be among the runs"),
        ("constant_actions: 5", "constant_actions: -1", "report.constant_actions must be at least 0"),
        (STUDY, "- a", "a study must be keys with values"),
        ("title: T", "title: [", "must hold a study"),
    ],
)
def test_mistakes_are_named(read, old, new, message):
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        read(STUDY.replace(old, new, 1))


def test_every_study_of_the_project_can_be_read():
    assert "quickstart" in list_choices("study")
    for name in list_choices("study"):
        plays = name == "dqn_replay_mini"
        assert load_study(find_study(name), store=None if plays else "store").runs


SCALES = """
title: T
common: [optim=adam]
runs:
  a: {set: [method.cql_alpha=0]}
  b: {set: [method=bc]}
scales:
  cpu: {common: [data.n_steps=10], data: collect}
  paper:
    common: [optim=lamb]
    seeds: [1, 2]
    runs:
      a: {set: [method.cql_alpha=0.5, method.gamma=0.9], decode: [sampled]}
      c: {}
"""


def test_the_first_scale_is_the_default(read):
    study = read(SCALES)
    assert (study.common, study.seeds, study.data) == (["scale=cpu", "optim=adam", "data.n_steps=10"], [0], "collect")
    assert study.runs["a"].set == ["method.cql_alpha=0"] and list(study.runs) == ["a", "b"]


def test_a_scale_adds_settings_and_replaces_the_rest(read):
    study = read(SCALES, scale="paper", store="/data/store")
    assert (study.common, study.seeds, study.data) == (["scale=paper", "optim=lamb"], [1, 2], "/data/store")
    assert study.runs["a"].set == ["method.cql_alpha=0.5", "method.gamma=0.9"]
    assert study.runs["a"].decode == ["sampled"] and study.runs["b"].set == ["method=bc"]
    assert list(study.runs) == ["a", "b", "c"]
    assert read(study.to_yaml()) == study  # what is written has no scales


def test_a_scale_without_data_wants_a_store(read):
    with pytest.raises(ConfigError, match=r"data must be given: data\.store=STORE"):
        read(SCALES, scale="paper")


def test_a_study_without_a_scale_takes_any_and_one_with_one_no_other(read):
    assert read(STUDY.replace("[scale=cpu]", "[optim=lamb]"), scale="gpu").common == ["optim=lamb", "scale=gpu"]
    assert read(STUDY, scale="cpu") == read(STUDY)
    for name in ("demo", "quickstart"):
        with pytest.raises(ConfigError, match="yaml: scale must be cpu, this study has no other, got 'gpu'"):
            load_study(find_study(name), scale="gpu")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  cpu:", "  gpu:", "scale must be one of gpu, paper, got 'cpu'"),
        ("common: [data.n_steps=10]", "common: 5", "common must be a list of text, got 5"),
        ("common: [data.n_steps=10]", "comon: []", "comon is not known; is it common"),
        ("  cpu: {", "  cpu: 7\n  gpu: {", "scales.cpu must be keys with values, got 7"),
        ("c: {}", "c: 3", "c must be keys with values, got 3"),
    ],
)
def test_mistakes_in_scales_are_named(read, old, new, message):
    assert old in SCALES
    with pytest.raises(ConfigError, match=message):
        read(SCALES.replace(old, new, 1), scale="paper" if "c:" in old[:2] else "cpu", store="s")


def test_an_unknown_study_is_refused():
    with pytest.raises(ConfigError, match=r"a study must be FILE.yaml or one of .*quickstart"):
        find_study("quikstart")
