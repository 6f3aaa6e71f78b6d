from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensordict import TensorDict

import torchrl_sql
from torchrl_sql.config import compose_run_config
from torchrl_sql.games import GAMES
from torchrl_sql.modules import NetworkPolicy
from torchrl_sql.training import export_policy, load_agent, train
from torchrl_sql.training import policy as policy_module
from torchrl_sql.training.checkpoint import CheckpointError, list_checkpoints
from torchrl_sql.training.policy import POLICY_FILE


def states(seed=0, num_states=16):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        observation=torch.randint(256, (num_states, 4, 84, 84), dtype=torch.uint8, generator=generator),
        game_id=torch.randint(2, (num_states,), generator=generator),
        batch_size=num_states,
    )


@pytest.mark.parametrize(
    "changes",
    [[], ["method=cql_mse"], ["model.center_input=true"]],
)
def test_a_trained_run_leaves_its_policy_and_it_acts_as_the_network(make_config, changes):
    folder = train(make_config(*changes))
    policy = torchrl_sql.load_policy(folder / POLICY_FILE)
    network, config, _ = load_agent(folder)
    with torch.no_grad():
        ours, theirs = policy(states()), NetworkPolicy(network, config.games)(states())
    assert not policy.training
    assert torch.equal(ours["action_value"], theirs["action_value"])
    for game_id, action in zip(ours["game_id"].tolist(), ours["action"].tolist(), strict=True):
        assert action in GAMES[config.games[game_id]].minimal_actions


@pytest.mark.parametrize("changes", [[], ["method=bc"], ["model.per_game_heads=false"]], ids=str)
def test_a_compact_policy_is_small_and_acts_with_rounded_weights(make_config, tmp_path, changes):
    folder = train(make_config(*changes))
    export_policy(folder, tmp_path / "small.safetensors", compact=True)
    assert (tmp_path / "small.safetensors").stat().st_size < 0.6 * (folder / POLICY_FILE).stat().st_size
    small = torchrl_sql.load_policy(tmp_path / "small.safetensors")
    network, config, _ = load_agent(folder)
    for parameter in network.parameters():
        parameter.data = parameter.half().float()
    with torch.no_grad():
        ours, theirs = small(states()), NetworkPolicy(network, config.games)(states())
    assert torch.equal(ours["action"], theirs["action"])
    given = dict(small.actor.named_buffers())
    assert all(torch.equal(buffer, given[name]) for name, buffer in network.named_buffers())


def test_any_checkpoint_can_be_exported(make_config, tmp_path):
    folder = train(make_config())
    older = list_checkpoints(folder / "checkpoints")[0]
    export_policy(str(older), str(tmp_path / "older.safetensors"))
    assert (tmp_path / "older.safetensors").stat().st_mode == older.stat().st_mode
    policy = torchrl_sql.load_policy(str(tmp_path / "older.safetensors"))
    weights = load_agent(older).network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in policy.actor.state_dict().items())
    final = torchrl_sql.load_policy(folder / POLICY_FILE).actor.state_dict()
    assert any(not torch.equal(value, final[name]) for name, value in weights.items())


def test_a_policy_that_does_not_fit_on_the_disk_leaves_nothing(make_config, small_disk):
    folder, disk = train(make_config()), small_disk(2**16)
    with pytest.raises(OSError, match="No space left on device"):
        export_policy(folder, disk / POLICY_FILE)
    assert list(disk.iterdir()) == []


def test_older_checkpoints_make_room_for_the_policy(make_config, small_disk):
    disk = small_disk(32 * 2**20)
    trained = train(make_config(name="elsewhere"))
    shutil.copytree(trained / "checkpoints", disk / "run" / "checkpoints")
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 2**16))
    train(make_config(f"run_dir={disk / 'run'}"))  # trained, but its policy is missing
    assert torchrl_sql.load_policy(disk / "run" / POLICY_FILE) is not None
    assert [path.name for path in list_checkpoints(disk / "run" / "checkpoints")][-1] == "step_000000012.pt"
    assert len(list_checkpoints(disk / "run" / "checkpoints")) < 3


@pytest.fixture(scope="module")
def policy_bytes(tmp_path_factory, tiny_overrides):
    folder = train(compose_run_config(tiny_overrides(tmp_path_factory.mktemp("policy") / "run")))
    return (folder / POLICY_FILE).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_damage_is_refused_by_name_or_changes_nothing(policy_bytes, tmp_path, data):
    content = bytearray(policy_bytes)
    header_end = 8 + int.from_bytes(content[:8], "little")
    part = data.draw(st.sampled_from(["length", "header", "weights", "cut", "longer"]))
    if part == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif part == "longer":
        content += data.draw(st.binary(min_size=1, max_size=9))
    else:
        first, last = {"length": (0, 7), "header": (8, header_end - 1), "weights": (header_end, len(content) - 1)}[part]
        content[data.draw(st.integers(first, last))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / POLICY_FILE
    path.write_bytes(content)
    try:
        policy = torchrl_sql.load_policy(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert part == "header"  # a blank, for instance
    path.write_bytes(policy_bytes)
    expected = torchrl_sql.load_policy(path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("change", ["config", "weights"])
def test_an_intact_file_of_something_else_is_named(policy_bytes, tmp_path, change):
    path = tmp_path / POLICY_FILE
    path.write_bytes(policy_bytes)
    metadata, weights = policy_module._read(path)
    if change == "config":
        del metadata["config"]
    else:
        weights.popitem()
    metadata["sha256"] = policy_module._digest(metadata, weights)
    save_file(weights, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is intact, but does not hold what such a run writes"):
        torchrl_sql.load_policy(path)


def test_the_three_lines_of_the_readme(make_config):
    folder = train(make_config())
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torchrl_sql\n.*?)```", readme, flags=re.S)
    names = {"states": states()}
    exec(compile(code.replace("runs/NAME", str(folder)), "README.md", "exec"), names)
    assert names["actions"].shape == (16,)


def test_other_files_are_refused(tmp_path):
    path = Path(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="no policy at"):
        torchrl_sql.load_policy(path)
    path.write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"x.safetensors must be a safetensors file"):
        torchrl_sql.load_policy(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"must be of format 'torchrl_sql policy 3', got None"):
        torchrl_sql.load_policy(path)
    save_file({"w": torch.zeros(1)}, path, metadata={"format": "torchrl_sql policy 1"})
    with pytest.raises(CheckpointError, match=r"was written by an earlier version of torchrl_sql"):
        torchrl_sql.load_policy(path)
