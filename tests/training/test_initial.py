"""Runs that start from another run's policy."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch

from torchrl_sql.config import ConfigError, compose_run_config, load_run_config
from torchrl_sql.methods import make_method
from torchrl_sql.training import load_agent, train
from torchrl_sql.training.build import build_trainer
from torchrl_sql.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from torchrl_sql.training.initial import load_initial
from torchrl_sql.training.policy import POLICY_FILE, export_policy, read_policy_file
from torchrl_sql.training.ranks import Ranks

OTHER_GAMES = "data.games=[Freeway,Breakout]"
"""The source's, in another order."""


@pytest.fixture(scope="module")
def source(tiny_overrides, tmp_path_factory):
    """The policy of a run on Breakout and Freeway."""
    return train(compose_run_config(tiny_overrides(tmp_path_factory.mktemp("source") / "run"))) / POLICY_FILE


def weights_of(path):
    return short(read_policy_file(path)[0].network.state_dict())


def short(weights):
    return {name.removeprefix("module.0.module."): value for name, value in weights.items()}


def build(config):
    """The trainer of a run, with its online network's weights and its target network's."""
    trainer = build_trainer(config)
    trainer.replay.shutdown()
    online = trainer.loss.value_network_params.flatten_keys(".")
    target = trainer.loss.target_value_network_params.flatten_keys(".")
    return trainer, short(dict(online.items())), short(dict(target.items()))


def equal_names(ours, theirs):
    return {
        name for name, value in ours.items()
        if name in theirs and value.shape == theirs[name].shape and torch.equal(value, theirs[name])
    }  # fmt: skip


def test_the_encoder_alone_is_loaded_into_both_networks_and_the_rest_is_new(make_config, source):
    theirs = weights_of(source)
    _, fresh, _ = build(make_config())
    _, online, target = build(make_config(f"init.policy={source}"))
    encoder = {name for name in theirs if name.startswith("encoder.")}
    assert len(encoder) == 24
    assert equal_names(online, theirs) - equal_names(fresh, theirs) >= {"encoder.0.weight"}
    assert encoder <= equal_names(online, theirs)
    others = {"pooling.weight", "heads.weight", "heads.bias", "log_scale"}
    assert others.isdisjoint(equal_names(online, theirs)) and others <= equal_names(online, fresh)
    assert equal_names(online, target) == set(online)


def test_of_all_weights_heads_go_by_the_games_names(make_config, source):
    theirs = weights_of(source)
    _, online, _ = build(make_config(f"init.policy={source}", "init.load=all", OTHER_GAMES))
    learned = {name for name in theirs if not name.startswith(("heads.", "input_mean", "support", "module.2"))}
    assert learned <= equal_names(online, theirs) and {"pooling.weight", "log_scale"} <= learned
    for name in ("heads.weight", "heads.bias"):
        assert torch.equal(online[name][0], theirs[name][1]) and torch.equal(online[name][1], theirs[name][0])
    assert torch.equal(online["input_mean"], theirs["input_mean"].flip(0))


def test_mean_frames_come_with_all_weights_and_only_those_of_new_games_are_of_the_data(
    make_config, source, monkeypatch
):
    monkeypatch.setattr("torchrl_sql.training.build.mean_frame", lambda store, game: np.full((84, 84), 51.0))
    words = ["data.games=[Freeway]", f"init.policy={source}", "init.load=all"]
    one = train(make_config(*words, name="one")) / POLICY_FILE
    theirs = weights_of(source)["input_mean"]
    assert torch.equal(weights_of(one)["input_mean"], theirs[1:])
    _, both, _ = build(make_config(f"init.policy={one}", "init.load=all"))
    assert torch.equal(both["input_mean"][1], theirs[1]) and (both["input_mean"][0] == 51 / 255).all()
    _, encoder, _ = build(make_config(f"init.policy={one}"))
    assert (encoder["input_mean"] == 51 / 255).all()


def test_heads_of_games_that_the_source_does_not_know_are_new_and_named(make_config, source, caplog):
    words = ["data.games=[Freeway]", f"init.policy={source}", "init.load=all"]
    short_source = train(make_config(*words, name="one")) / POLICY_FILE
    with caplog.at_level(logging.INFO, "torchrl_sql.training.initial"):
        _, online, _ = build(make_config(f"init.policy={short_source}", "init.load=all"))
    _, fresh, _ = build(make_config())
    theirs = weights_of(short_source)
    assert torch.equal(online["heads.weight"][1], theirs["heads.weight"][0])
    assert torch.equal(online["heads.weight"][0], fresh["heads.weight"][0])
    assert "new: the head of Breakout" in caplog.messages[-1] and "head of Freeway" not in caplog.messages[-1]


def test_a_variation_starts_with_the_head_of_its_game(make_config, source, caplog):
    config = make_config(f"init.policy={source}", "init.load=all", "data.games=[Pong,Freeway-m1,Freeway]")
    network = make_method(config.method).network(config.model, config.games)
    with caplog.at_level(logging.INFO, "torchrl_sql.training.initial"):
        load_initial(network, config, Ranks(0, 1, torch.device("cpu")))
    ours, theirs = short(network.state_dict()), weights_of(source)
    for name in ("heads.weight", "heads.bias", "input_mean"):  # of Breakout and Freeway
        assert torch.equal(ours[name][1], theirs[name][1]) and torch.equal(ours[name][2], theirs[name][1])
    assert not ours["input_mean"][0].any()
    assert caplog.messages[-1].endswith("new: the head of Pong, the mean frame of Pong")


def test_a_source_of_another_kind_gives_its_encoder(make_config, source):
    _, online, _ = build(make_config(f"init.policy={source}", "method=cql_mse"))
    theirs = weights_of(source)
    assert "encoder.0.weight" in equal_names(online, theirs)


def test_transformers_start_from_transformers(make_config):
    words = ["method=mgdt", "model=mgdt_small"]
    trained = train(make_config(*words, "trainer.num_gradient_steps=4", name="transformer")) / POLICY_FILE
    trainer = build_trainer(make_config(*words, f"init.policy={trained}", "init.load=all", "data.games=[Freeway]"))
    trainer.replay.shutdown()
    ours, theirs = trainer.loss.state_dict(), read_policy_file(trained)[0].network.state_dict()
    assert theirs and all(torch.equal(ours[f"actor_network_params.{name}"], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.encoder=resnet_tiny"], "init.load=encoder needs model.encoder=resnet_small as in .*, got resnet_t"),
        (["model.num_groups=1"], r"needs model.num_groups=32 as in .*, got 1: the same weights would compute"),
        (["model.center_input=false"], "needs model.center_input=True as in .*, got False"),
        (["init.load=all", "model.pooling=average"], "needs model.pooling=spatial_embedding as in .*, got average"),
        (["init.load=all", "model.feature_norm=false"], "needs model.feature_norm=True as in .*, got False"),
        (["init.load=all", "model.logit_scale=null"], r"needs model.logit_scale=learned as in .*, got 1\.0"),
        (["model.num_groups=2"], r"needs model.num_groups=32 as in .*, got 2"),
        (["init.load=all", "model.learn_logit_scale=false"], r"needs model.logit_scale=learned as in .*, got 30\.0"),
        (
            ["init.load=all", "model.num_embeddings=4"],
            r"network of the same sizes, got others: .*\(\[4, .* here, \[8, .* there\), .*; give this run the model "
            "settings",
        ),
        (
            ["init.load=all", "method=cql_mse"],
            "takes the heads of Breakout, Freeway, which must be of the same kind, got q here and q of 51 atoms on "
            r"\[-10, 10\] in",
        ),
        (
            ["init.load=all", "method.v_min=-5"],
            r"got q of 51 atoms on \[-5, 10\] here and q of 51 atoms on \[-10, 10\]",
        ),
        (["init.load=all", "method=bc"], "got logits here and q of 51 atoms"),
        (
            ["method=mgdt", "model=mgdt_small"],
            "init.load must be all between networks that have no encoder .*mgdt here",
        ),
        (["init.load=all", "method=mgdt", "model=mgdt_small"], r"position \(\[76, 64\] here, absent there\)"),
        (["init.sha256=abc"], "init.sha256 must be that of .*, got abc: it is another policy"),
    ],
)
def test_what_does_not_fit_is_refused_with_names_and_nothing_is_loaded(make_config, source, changes, message):
    config = make_config(f"init.policy={source}", *changes)
    network = make_method(config.method).network(config.model, config.games)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        load_initial(network, config, Ranks(0, 1, torch.device("cpu")))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_groups_that_the_channels_cannot_have_make_no_difference(make_config, source):
    build(make_config(f"init.policy={source}", "model.num_groups=16"))  # of at most 8, a quarter of 32 channels


def test_a_run_that_is_refused_leaves_no_folder(make_config, source, tmp_path):
    with pytest.raises(ConfigError, match=r"needs model\.num_groups"):
        train(make_config(f"init.policy={source}", "model.num_groups=1", f"run_dir={tmp_path / 'refused'}"))
    assert not (tmp_path / "refused").exists()


def test_a_compact_policy_gives_its_encoder_but_not_its_incomplete_heads(make_config, source, tmp_path):
    export_policy(source.parent, tmp_path / "small.safetensors", compact=True)
    words = [f"init.policy={tmp_path}/small.safetensors"]
    build(make_config(*words, "init.load=encoder"))
    with pytest.raises(ConfigError, match=r"small.safetensors is a compact policy, which has those of legal actions"):
        build(make_config(*words, "init.load=all"))


def test_missing_and_damaged_policies_are_named(make_config, source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no policy at .*nowhere"):
        build(make_config(f"init.policy={tmp_path}/nowhere"))
    damaged = bytearray(source.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged: its checksum does not match"):
        build(make_config(f"init.policy={tmp_path}/damaged.safetensors"))


@pytest.mark.parametrize(
    "changes", [["trainer.compile=graph"], ["optim.name=adamw", "optim.weight_decay=0.1", "method=bc"]], ids=str
)
def test_a_frozen_encoder_stays_bit_for_bit_and_the_rest_is_trained(make_config, source, changes):
    with torch.compiler.set_stance("force_eager"):  # a captured step without the minutes of compiling
        folder = train(make_config(f"init.policy={source}", "init.freeze=true", *changes))
    theirs, ours = weights_of(source), short(load_agent(folder).network.state_dict())
    trained = {"pooling.weight", "heads.weight", "heads.bias"}
    encoder = {name for name in ours if name.startswith("encoder.")}
    assert encoder <= equal_names(ours, theirs) and trained.isdisjoint(equal_names(ours, theirs))
    (path,) = list_checkpoints(folder / "checkpoints")[-1:]
    assert len(load_checkpoint(path)["trainer"]["optimizer"]["state"]) == len(ours) - len(encoder) - len(
        [name for name in ours if "input_mean" in name or "support" in name]
    )


def test_only_encoders_can_be_frozen(make_config):
    with pytest.raises(ConfigError, match=r"init.freeze must be false with a network that has no encoder"):
        build_trainer(make_config("method=mgdt", "model=mgdt_small", "init.freeze=true"))


def test_a_continued_run_is_the_same_though_its_source_is_gone(make_config, source, tmp_path):
    (tmp_path / "kept").mkdir()
    kept = shutil.copy(source, tmp_path / "kept" / POLICY_FILE)
    words = [f"init.policy={kept}", "init.load=all", "init.freeze=true"]
    through = load_agent(train(make_config(*words, name="through"))).network.state_dict()
    folder = train(make_config(*words, name="again"))
    for checkpoint in list_checkpoints(folder / "checkpoints")[1:]:
        checkpoint.unlink()
    (folder / POLICY_FILE).unlink()
    (tmp_path / "kept" / POLICY_FILE).unlink()
    train(make_config(f"init.policy={tmp_path}/moved", *words[1:], name="again"))
    again = load_agent(folder).network.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in through.items())


def test_the_digest_of_the_source_goes_where_the_weights_go(make_config, source):
    digest = read_policy_file(source)[1]["sha256"]
    folder = train(make_config(f"init.policy={source}"))
    assert load_run_config(folder / "config.yaml").init.sha256 == digest
    assert load_agent(folder).config.init.sha256 == digest
    assert read_policy_file(folder / POLICY_FILE)[0].config.init.sha256 == digest


def test_a_run_is_not_continued_from_another_start(make_config, source):
    words = ["trainer.num_gradient_steps=4"]
    train(make_config(f"init.policy={source}", *words))
    with pytest.raises(ConfigError, match=r"init.sha256: [0-9a-f]{64} there, None now"):
        train(make_config(*words))
    with pytest.raises(ConfigError, match=r"init.sha256: [0-9a-f]{64} there, abc now"):
        train(make_config(f"init.policy={source}", "init.sha256=abc", *words))


def test_a_run_whose_start_was_given_with_its_digest_continues(make_config, source):
    words = [f"init.policy={source}", f"init.sha256={read_policy_file(source)[1]['sha256']}"]
    folder = train(make_config(*words))
    assert train(make_config(*words)) == folder
    assert load_run_config(folder / "config.yaml").init.source == read_policy_file(source)[0].config.name


def test_a_digest_of_nothing_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"init.sha256 must be null without init.policy, got 'abc'"):
        make_config("init.sha256=abc")


def test_nor_from_another_policy_in_its_place(make_config, source, tmp_path):
    other = train(make_config("seed=5", name="other")) / POLICY_FILE
    train(make_config(f"init.policy={source}"))
    with pytest.raises(ConfigError, match=r"init.sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        train(make_config(f"init.policy={other}"))


def test_two_ranks_start_from_the_policy_that_rank_0_reads(tiny_overrides, run_ranks, source, tmp_path):
    words = [f"init.policy={source}", "init.freeze=true", "trainer.num_gradient_steps=4"]

    def job(name):
        return {"name": name, "overrides": [*tiny_overrides(tmp_path / name), *words], "signals": []}

    said = run_ranks([{"name": "0", "world_size": 2, "jobs": [job("two")]}])
    assert said[-1]["codes"] == [0, 0], said
    train(compose_run_config([*tiny_overrides(tmp_path / "one"), *words]))
    ours, theirs = (short(load_agent(tmp_path / name).network.state_dict()) for name in ("two", "one"))
    encoder = {name for name in ours if name.startswith("encoder.")}
    assert encoder <= equal_names(ours, weights_of(source))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)
