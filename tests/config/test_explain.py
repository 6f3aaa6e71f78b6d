from __future__ import annotations

import pytest

from torchrl_sql.cli import main
from torchrl_sql.config import ConfigError, compose_run_config, configs_dir
from torchrl_sql.config.explain import explain, settings, values_of


def test_every_setting_of_every_method_is_known():
    keys = {setting.key for setting in settings()}
    for method in ("bc", "cql_c51"):
        config = compose_run_config(["scale=cpu", f"method={method}", "data.store=s"])
        for section in ("data", "model", "method", "optim", "trainer", "evaluation", "collection"):
            assert {f"{section}.{name}" for name in vars(getattr(config, section))} <= keys
    assert "seed" in keys and "method.cql_alpha" in keys


def test_a_setting_is_explained_with_bound_meaning_and_sourced_values():
    text = explain("method.cql_alpha")
    assert text.startswith("method.cql_alpha  (float, at least 0)\n  Weight of the CQL penalty, dimensionless.")
    assert "method/cql_c51.yaml: cql_alpha: 0.1         # [nearest code" in text
    assert "optim.learning_rate" in explain("optim") and "scale/paper.yaml: learning_rate: 2.0e-4" in explain("optim")


def test_an_unknown_key_suggests_close_ones():
    with pytest.raises(
        ConfigError, match=r"no setting or section 'optim\.learnin_rate'; did you mean optim.learning_rate"
    ):
        explain("optim.learnin_rate")


def test_every_value_in_the_files_belongs_to_a_setting():
    shown = {key for setting in settings() for key in [setting.key] if list(values_of(setting.key))}
    assert {"optim.eps", "trainer.loggers", "num_threads", "collection.seed", "evaluation.epsilon"} <= shown


def test_the_command_lists_choices_and_prints_files(capsys):
    assert main(["config"]) == 0
    assert "scale=       cpu, gpu, paper" in capsys.readouterr().out
    assert main(["config", "scale/cpu"]) == 0
    assert capsys.readouterr().out == (configs_dir() / "scale" / "cpu.yaml").read_text()
    assert main(["config", "../pyproject"]) == 1
    assert "there is no ../pyproject" in capsys.readouterr().err
