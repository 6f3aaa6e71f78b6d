from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_examples_run(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    names["replay"].shutdown()
    assert len(blocks) == 4
    assert "not legal" not in caplog.text
    assert names["batch"]["observation"].shape == (32, 4, 84, 84)
    assert names["replay"]._sampler.step == 1 and len(names["some"]) == 10
    assert names["buffer"].sample().batch_size == (32,)
    assert names["slices"].sample().batch_size == (20,)
