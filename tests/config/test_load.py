"""From words and files to configurations."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchrl_sql.config import ConfigError, compose_run_config, run_config_from_yaml

RUN = ["scale=cpu", "data.store=store"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "scale must be given: scale=NAME with one of cpu, gpu, paper"),
        (
            ["scale=gpv", "data.store=store"],
            "scale must be one of cpu, gpu, paper, paper_mgdt, got 'gpv'; did you mean gpu?",
        ),
        ([*RUN, "method=cql_c52"], "method must be one of .*, got 'cql_c52'; did you mean cql_c51"),
        (["scale=paper"], r"data.store must be given, e.g. data.store=\.\.\."),
        ([*RUN, "method.alhpa=1"], "there is no setting 'method.alhpa' here"),
        ([*RUN, "trainer.num_steps=1"], "no setting 'trainer.num_steps' here; did you mean trainer.num_gradient_steps"),
        ([*RUN, "model.cql_alpha=1"], "there is no setting 'model.cql_alpha' here; did you mean method.cql_alpha?"),
        ([*RUN, "method=bc", "method.cql_alpha=1"], "there is no setting 'method.cql_alpha' here"),
        ([*RUN, "+optim.learnin_rate=1"], "no setting .*; did you mean optim.learning_rate"),
        ([*RUN, "+seed=1"], r"settings must be key=value, .*: seed=1, got '\+seed'"),
        ([*RUN, "++seed=1"], r"settings must be key=value, .*: seed=1, got '\+\+seed'"),
        ([*RUN, "~seed"], "settings must be key=value, got '~seed'"),
        ([*RUN, "~seed=0"], "settings must be key=value, .*: seed=0, got '~seed'"),
        ([*RUN, "+method=bc"], r"there is no setting '\+method' here; did you mean method\?"),
        ([*RUN, "data@x=store"], "settings must be key=value, got 'data@x=store'"),
        ([*RUN, "data.batch_size=many"], "data.batch_size: Value 'many' of type 'str' could not be converted"),
        ([*RUN, "data.games=[Breakout"], r"data.games cannot be read, got '\[Breakout'"),
        ([*RUN, "data.games=Breakout,Pong"], r"data.games must be one value, .*; a list is written data.games=\[A,B\]"),
        ([*RUN, "trainer.loggers=csv"], r"trainer.loggers must be a list, written trainer.loggers=\[A,B\], got 'csv'"),
        ([*RUN, "seed"], "settings must be key=value, got 'seed'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_may_be_meant(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_run_config(overrides)


def test_games_and_weights_become_tuples():
    config = compose_run_config([*RUN, "data.games=[Pong,Breakout]", "data.mixture=[1,3]"])
    assert config.games == ("Pong", "Breakout") and config.data.mixture == (1, 3)
    assert compose_run_config([*RUN, "data.games=heldout5"]).games[0] == "Alien"


def test_the_name_follows_the_method():
    assert [compose_run_config([*RUN, f"method={name}"]).name for name in ("cql_hl_gauss", "bc")] == ["cql", "bc"]
    assert compose_run_config([*RUN, "name=x"]).run_dir == "runs/x"


EARLIER = "name: x\nobjective: {name: cql}\nmodel: {num_atoms: 51}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "here must hold a run's configuration"),
        ("[1]", "here must hold a run's configuration"),
        ("format: 2\nname: x", "here must hold a run's configuration"),
        ("format: 2\nname: x\nmethod: {name: bc}", "collection must be given"),
        (EARLIER, r"here was written by an earlier version of torchrl_sql .*; train it again or use that version"),
        ("format: 3\nname: x", r"here was written by a later version of torchrl_sql"),
    ],
)
def test_files_of_other_versions_and_damaged_ones_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        run_config_from_yaml(text, source="here")


def test_settings_are_checked_without_loading_torch():
    code = (
        f"import sys; from torchrl_sql.config import compose_run_config as c; c({RUN}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
