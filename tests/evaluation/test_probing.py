"""Probes of encoders, from policy files to a table."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from torchrl_sql.cli import main
from torchrl_sql.evaluation.probing import ProbeProtocol, find_policies, probe, read_probes
from torchrl_sql.training.policy import POLICY_FILE, export_policy

TINY = ["--games=Freeway", "--episodes=4", "--states=12", "--max-env-frames=800"]
PROTOCOL = ProbeProtocol(num_episodes=4, states_per_episode=12, max_env_frames=800)
METHODS = {
    "ql": [],
    "bc": ["method=bc"],
    "mae": ["method=mae", "method.decoder_width=64", "method.decoder_layers=1"],
    "cpc": ["method=cpc", "method.width=16", "data.n_steps=4"],
}


@pytest.fixture(scope="module")
def policies(make_run):
    """The folder of a run per method, seed 0, whose weights are those of another seed."""
    folders = {}
    for name, words in METHODS.items():
        folders[name] = make_run(*words, f"name={name}", "model.encoder=resnet_tiny", steps=(3,))
        export_policy(folders[name], folders[name] / POLICY_FILE)
    return folders


def made(*paths, games=("Freeway",), protocol=PROTOCOL):
    return probe(find_policies(paths), games, protocol, made={}, device=torch.device("cpu"))


def of_agent(scores, agent):
    return {score.label: score.r2 for score in scores if score.agent == agent}


def test_encoders_of_all_methods_are_read_at_one_width_beside_one_random_encoder_and_pixels(policies, tmp_path, capsys):
    words = ["probe", *map(str, policies.values()), *TINY, f"--out={tmp_path / 'new'}"]
    assert main(words) == 0
    result = read_probes(tmp_path / "new" / "probes.json")
    assert {score.agent for score in result.scores} == {*METHODS, "random", "pixels"}
    # Each method makes its encoder first, from the run's seed: all begin alike, and that is scored once.
    keys = [(score.agent, score.seed, score.game, score.label) for score in result.scores]
    assert len(set(keys)) == len(keys)
    assert {(s.agent, s.seed) for s in result.scores if s.agent in ("random", "pixels")} == {
        ("random", 0),
        ("pixels", None),
    }
    assert {score.num_features for score in result.scores if score.agent != "pixels"} == {16 * 10 * 10}
    assert {score.num_features for score in result.scores if score.agent == "pixels"} == {4 * 84 * 84}
    cars = {f"car {lane} x" for lane in range(1, 6)}
    assert cars <= {score.label for score in result.scores} <= cars | {"player y", "score"}
    assert any(text.startswith("Freeway: lives is the same in 100%") for text in result.left_out)
    assert [(each["name"], each["seed"], each["gradient_step"]) for each in result.policies] == [
        (name, 0, 3) for name in METHODS
    ]
    assert result.protocol == PROTOCOL and result.made["command"].startswith("torchrl-sql probe")
    assert result.made["versions"]["torch"] in torch.__version__
    with Image.open(tmp_path / "new" / "probes.png") as picture:
        assert picture.width > 300
    printed = capsys.readouterr().out
    assert "Freeway: car 1 x" in printed and "mean of all" in printed and "Not read: Freeway: lives" in printed

    assert main([*words[:-1], f"--out={tmp_path / 'again'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == [score._asdict() for score in result.scores]


def test_before_training_is_the_encoder_with_which_a_run_of_its_seed_begins(make_run):
    run = make_run("name=begun", "seed=5", "model.encoder=resnet_tiny", steps=(5,))  # weights of torch's seed 5
    export_policy(run, run / POLICY_FILE)
    scores = made(run).scores
    assert of_agent(scores, "begun") == of_agent(scores, "random")


def test_other_weights_and_other_seeds_of_the_episodes_read_otherwise(policies):
    scores = made(policies["ql"]).scores
    assert of_agent(scores, "ql") != of_agent(scores, "random")
    other = made(
        policies["ql"], protocol=ProbeProtocol(num_episodes=4, states_per_episode=12, max_env_frames=800, seed=1)
    )
    assert of_agent(scores, "pixels") != of_agent(other.scores, "pixels")


def test_input_is_centred_where_the_run_centres_it(policies, make_run):
    centred, plain = (
        make_run("name=run", "model.encoder=resnet_tiny", f"model.center_input={value}", steps=(3,))
        for value in ("true", "false")
    )
    for run in (centred, plain):
        export_policy(run, run / POLICY_FILE)
    assert of_agent(made(centred).scores, "run") == of_agent(made(policies["ql"]).scores, "ql")
    assert of_agent(made(plain).scores, "run") != of_agent(made(centred).scores, "run")


def test_policies_are_found_in_folders_of_runs_and_of_studies(policies, tmp_path):
    runs = [tmp_path / "study" / name / "seed0" for name in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
        (run / POLICY_FILE).write_bytes((policies["ql"] / POLICY_FILE).read_bytes())
    files = [run / POLICY_FILE for run in runs]
    assert find_policies([tmp_path / "study"]) == files
    assert find_policies([files[1], runs[0], tmp_path / "study"]) == [files[1], files[0]]
    with pytest.raises(ValueError, match=r"must be of different runs, got ql of seed 0 in .*a.* and .*b"):
        made(tmp_path / "study")


@pytest.mark.parametrize("setting", ["encoder=nature", "center_input=false"])
def test_encoders_of_other_shapes_or_inputs_are_not_compared(policies, make_run, setting):
    other = make_run("name=other", "model.encoder=resnet_tiny", f"model.{setting}")
    export_policy(other, other / POLICY_FILE)
    with pytest.raises(ValueError, match=f"(?i)must have the same kind of encoder.* and .*model.{setting}"):
        made(policies["ql"], other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--games=Qbert"], r"games must have labels \(Assault, .*, SpaceInvaders\), got 'Qbert'"),
        (["--games=Quark"], "games must be names of DQN-Replay games"),
        (["--episodes=3"], "episodes must be at least 4, got 3"),
        (["--states=0"], "states_per_episode must be at least 1, got 0"),
        (["--max-env-frames=4"], r"some label must be read, but none can: Freeway: player y is the same in 100%"),
    ],
)
def test_bad_options_are_refused(policies, words, message, capsys, tmp_path):
    assert main(["probe", str(policies["ql"]), *TINY, *words, f"--out={tmp_path}"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "probes.json").exists()


def test_a_network_without_an_encoder_of_stacks_and_folders_without_policies_are_refused(make_run, tmp_path, capsys):
    run = make_run("method=mgdt", "model=mgdt_small", "name=mgdt")
    export_policy(run, run / POLICY_FILE)
    assert main(["probe", str(run), *TINY]) == 1
    assert (
        f"{run / POLICY_FILE} must hold a network with an encoder of stacked frames, got one with "
        in capsys.readouterr().err
    )
    assert main(["probe", str(tmp_path)]) == 1
    assert "found no policy.safetensors" in capsys.readouterr().err
    assert main(["probe", str(run), str(run)]) == 1
    assert "--out must be given" in capsys.readouterr().err


def test_another_file_is_not_taken_for_probes(tmp_path):
    file = tmp_path / "probes.json"
    file.write_text('{"format": "torchrl_sql probes", "version": 1, "protocol": {}}')
    with pytest.raises(ValueError, match="must be a file of torchrl-sql probe"):
        read_probes(file)
