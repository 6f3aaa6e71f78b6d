"""A small study, and tasks that are quick to run."""

from __future__ import annotations

import sys

import pytest

from torchrl_sql.config.study import load_study
from torchrl_sql.studies.local import Start

STUDY = """
title: A study
common: [scale=cpu, "data.games=[Breakout,Freeway]", method.cql_alpha=0.3]
seeds: [0, 1]
data: collect
runs:
  q: {}
  bc: {set: [method=bc], decode: [greedy, sampled], seeds: [1]}
report: {main: q, constant_actions: 5}
"""


@pytest.fixture
def make_study(tmp_path):
    """Reads a study's text, with changes."""

    def make(*changes):
        text = STUDY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.yaml").write_text(text)
        return load_study(tmp_path / "study.yaml")

    return make


@pytest.fixture
def start(tmp_path):
    """Starts tasks whose one argument beside the command is a Python program."""

    def start(task):
        return Start([sys.executable, "-c", task.arguments[1]], {}, tmp_path / "logs" / f"{task.name}.log")

    return start
