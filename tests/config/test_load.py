"""From words and files to configurations."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchrl_sql.config import ConfigError, compose_run_config, explain, run_config_from_yaml
from torchrl_sql.config.schema import CONFIG_FORMAT

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
        ([*RUN, "data.batch_size=many"], "data.batch_size must be a whole number, got 'many'"),
        ([*RUN, "data.batch_size=nan"], "data.batch_size must be a whole number, got 'nan'"),
        ([*RUN, "optim.learning_rate=fast"], "optim.learning_rate must be a number, got 'fast'"),
        ([*RUN, "data.games=[Breakout"], r"data.games cannot be read, got '\[Breakout'"),
        *(
            (
                [*RUN, f"data.games={games}"],
                r"data.games cannot be read, .* Breakout-m4-d1, several \[A,B\]",
            )
            for games in ("Freeway:mode=1", "Freeway:mode=1,difficulty=0", "[Freeway:mode=1,Pong]", "Freeway=1")
        ),
        ([*RUN, "data.games=null"], r"data.games: games must be names, got None"),
        ([*RUN, "data.games=[1,Pong]"], r"data.games: games must be names, got \[1, 'Pong'\]"),
        ([*RUN, "data.games=Breakout,Pong"], r"data.games must be one value, .*; a list is written data.games=\[A,B\]"),
        ([*RUN, "seed=0,1"], "seed must be one value, got '0,1'$"),
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
        (
            f"format: {CONFIG_FORMAT}\nname: x\nmethod: {{name: bc}}\ndata: {{batch_sise: 3}}",
            "here must hold a run's configuration: there is no setting 'data.batch_sise'",
        ),
        (
            f"format: {CONFIG_FORMAT}\nname: x\nmethod: {{name: bc}}\ndata: {{batch_size: many}}",
            "here must hold a run's configuration: data.batch_size must be a whole number, got 'many'",
        ),
        (f"format: {CONFIG_FORMAT}\nname: x", "here must hold a run's configuration"),
        (f"format: {CONFIG_FORMAT}\nname: x\nmethod: {{name: bc}}", "collection must be given"),
        (EARLIER, r"here was written by an earlier version of torchrl_sql .*; train it again or use that version"),
        (f"format: {CONFIG_FORMAT + 1}\nname: x", r"here was written by a later version of torchrl_sql"),
    ],
)
def test_files_of_other_versions_and_damaged_ones_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        run_config_from_yaml(text, source="here")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_path_arrives_as_it_was_written(text):
    assume(text.strip() and text != "???" and "${" not in text and text[0] not in "'\"")
    try:
        config = compose_run_config([*RUN, f"run_dir={text}"])
    except ConfigError as error:
        assert re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text) and "without control characters" in str(error)
        return
    assert config.run_dir == text
    assert run_config_from_yaml(config.to_yaml(), source="here") == config


@pytest.mark.parametrize("name", ["1e5", "00123", "24:00:00", "0755", "yes", "a#b", "run(1)", "seed=0", "it's", "null"])
def test_a_name_arrives_as_it_was_written_from_words_and_files(name):
    config = compose_run_config([*RUN, f"name={name}"])
    assert config.name == name
    lines = config.to_yaml().splitlines()
    by_hand = "\n".join(f"name: {name}" if line.startswith("name:") else line for line in lines)
    if "#" not in name:  # with a blank before it, a comment in any YAML
        assert run_config_from_yaml(by_hand, source="here").name == name


def values_of(kind):
    """Keys of a type in a run of Q-learning."""
    content = yaml.safe_load(compose_run_config(RUN).to_yaml())
    known = {each.key for each in explain.settings() if each.kind.split(" | ")[0] == kind}
    return sorted(
        key for key in known if key in content or key.partition(".")[2] in (content.get(key.partition(".")[0]) or {})
    )


@pytest.mark.parametrize("key", values_of("int") + values_of("float"))
@pytest.mark.parametrize("value", ["true", "24:00:00", "0x10", "1e400"])
def test_no_number_is_made_of_what_is_none(key, value):
    with pytest.raises(ConfigError, match=key):
        compose_run_config([*RUN, f"{key}={value}"])
    section, _, name = key.rpartition(".")
    by_hand = re.sub(
        rf"^({section}:\n(?:  .*\n)*?  |){name}: .*$",
        rf"\g<1>{name}: {value}",
        compose_run_config(RUN).to_yaml(),
        count=1,
        flags=re.M,
    )
    with pytest.raises(ConfigError):
        run_config_from_yaml(by_hand, source="here")


@pytest.mark.parametrize("key", values_of("bool"))
@pytest.mark.parametrize("value", ["2", "0755", "yes", "null", "on"])
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(ConfigError, match=f"{key} must be true or false, got '{value}'"):
        compose_run_config([*RUN, f"{key}={value}"])


@pytest.mark.parametrize(
    "override",
    [
        "name=",
        "name=///",
        "name=..",
        f"name={'a' * 300}",
        "name='a\nb'",
        "run_dir= ",
        "data.store=",
        "data.prefetch=100000",
        "data.mixture=[true,false]",
        "num_threads=100000",
        "optim.eps=0",
        "optim.learning_rate=1e30",
        "seed=99999999999999999999",
        "trainer.device=cpu:3",
        "trainer.device=cuda:abc",
        "trainer.loggers=[csv,csv]",
        "trainer.stall_warning_seconds=1e11",
        "trainer.compile=true",
    ],
)
def test_values_that_cannot_run_are_refused(override):
    key, _, _ = override.partition("=")
    with pytest.raises(ConfigError, match=f"^{key}"):
        compose_run_config([*RUN, "data.games=[Pong,Freeway]", override])


@pytest.mark.parametrize("value", ["off", "false"])
def test_yamls_word_for_false_is_off(value):
    assert compose_run_config([*RUN, f"trainer.compile={value}"]).trainer.compile == "off"


def test_settings_are_checked_without_loading_torch():
    code = (
        f"import sys; from torchrl_sql.config import compose_run_config as c; c({RUN}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
