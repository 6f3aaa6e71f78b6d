"""MAE and CPC end to end: training with an interruption, a policy file that other runs start from, no play."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from torchrl_sql.cli import main
from torchrl_sql.config import ConfigError
from torchrl_sql.report.reconstructions import reconstructions
from torchrl_sql.training import load_agent, load_policy, train
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.checkpoint import list_checkpoints
from torchrl_sql.training.features import FEATURE_METRICS
from torchrl_sql.training.logs import read_scalars
from torchrl_sql.training.policy import POLICY_FILE

METHODS = {"mae": ["method.decoder_width=64", "method.decoder_layers=1"], "cpc": ["method.width=16", "data.n_steps=4"]}


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_is_trained_continued_and_given_to_another_run(make_config, method, capsys):
    def trained(name):
        return train(make_config(f"method={method}", *METHODS[method], name=name))

    through, again = trained("through"), trained("again")
    for checkpoint in list_checkpoints(again / "checkpoints")[1:]:
        checkpoint.unlink()
    trained("again")
    weights = [load_agent(folder).network.state_dict() for folder in (through, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())  # masks included

    trainer = build_trainer(make_config(f"init.policy={through / POLICY_FILE}"))
    trainer.replay.shutdown()
    start = trainer.loss.value_network_params.flatten_keys(".")
    encoder = {name: value for name, value in weights[0].items() if ".encoder." in name}
    assert len(encoder) == 24
    assert all(torch.equal(value, start[f"module.0.{name}"]) for name, value in encoder.items())

    with pytest.raises(ValueError, match=f"method '{method}' prepares an encoder and does not act"):
        load_policy(through / POLICY_FILE)
    assert main(["evaluate", str(through)]) != 0
    assert f"must hold a network that acts, got one of method '{method}'" in capsys.readouterr().err


def test_reconstructions_are_drawn_as_frames_hidden_places_and_what_is_decoded(make_config, tmp_path):
    folder = train(make_config("method=mae", *METHODS["mae"], "trainer.num_gradient_steps=4"))
    assert main(["reconstruct", str(folder), "--states=3"]) == 0
    pixels = np.asarray(Image.open(folder / "reconstructions.png")).reshape(2, 3, 172, 3, 172)[
        :, :, 2:170:2, :, 2:170:2
    ]
    frames, hidden, decoded = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    grey = (hidden == 128) & (frames != 128)
    assert (hidden[~grey] == frames[~grey]).all() and 0.7 < grey.mean() <= 1
    assert decoded.std() > 0 and (decoded != frames).any()
    assert main(["reconstruct", str(folder), "--states=3", f"--out={tmp_path / 'again.png'}"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (folder / "reconstructions.png").read_bytes()


def test_a_page_has_the_reconstructions_of_each_agents_first_trained_run_whose_data_is_there(make_config, tmp_path):
    words = ["method=mae", *METHODS["mae"], "trainer.num_gradient_steps=4"]
    untrained = make_config(*words)
    configs = [make_config(*words, f"seed={seed}", name=f"seed{seed}") for seed in (1, 2)]
    folders = [train(config) for config in configs]
    elsewhere = make_config(*words, "name=elsewhere", "data.store=/nowhere/store", name="seed1")
    others = make_config("name=other", name="seed1")
    runs = [
        (tmp_path / "run", untrained),
        *zip(folders, configs, strict=True),
        (folders[0], elsewhere),
        (folders[0], others),
    ]
    (picture,) = reconstructions(runs)
    assert picture.name == f"reconstructions_{untrained.name}" and "seed 1 (Breakout, Freeway)" in picture.caption
    file = tmp_path / "drawn.png"
    assert main(["reconstruct", str(folders[0]), f"--out={file}"]) == 0
    with Image.open(file) as drawn, Image.open(io.BytesIO(picture.data)) as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))


def test_only_masked_autoencoders_reconstruct(make_config, capsys):
    folder = train(make_config("trainer.num_gradient_steps=4"))
    assert main(["reconstruct", str(folder)]) == 1
    assert "must be a run with method=mae, got cql" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["cql_c51", "bc", "mae", "cpc", "mgdt"])
def test_every_method_logs_what_is_in_its_features(make_config, choice):
    words = METHODS.get(choice, ["model=mgdt_small"] if choice == "mgdt" else [])
    scalars = read_scalars(train(make_config(f"method={choice}", *words, "trainer.num_gradient_steps=4")))
    for name in FEATURE_METRICS:
        assert [step for step, _ in scalars[name]] == [2, 4]
    assert all(1 <= value <= 8 for _, value in scalars["feature_rank"])  # states of a batch


def test_states_that_share_frames_are_refused_for_contrastive_prediction(make_config):
    with pytest.raises(ConfigError, match=r"data.n_steps must be at least 4 with method.name=cpc .*, got 3"):
        make_config("method=cpc", "data.n_steps=3")


def test_the_probe_changes_no_weight(make_config):
    often, seldom = (
        load_agent(train(make_config(f"trainer.log_interval_gradient_steps={steps}", "method=mgdt", "model=mgdt_small",
                                     name=str(steps)))).network.state_dict()
        for steps in (1, 12)
    )  # fmt: skip
    assert all(torch.equal(value, seldom[name]) for name, value in often.items())
