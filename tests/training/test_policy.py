from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tensordict import TensorDict

import torchrl_sql
from torchrl_sql.games import GAMES
from torchrl_sql.modules import NetworkPolicy
from torchrl_sql.training import export_policy, load_agent, train
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


def test_any_checkpoint_can_be_exported(make_config, tmp_path):
    folder = train(make_config())
    older = list_checkpoints(folder / "checkpoints")[0]
    export_policy(older, tmp_path / "older.safetensors")
    assert (tmp_path / "older.safetensors").stat().st_mode == older.stat().st_mode
    policy = torchrl_sql.load_policy(str(tmp_path / "older.safetensors"))
    weights = load_agent(older).network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in policy.actor.state_dict().items())
    final = torchrl_sql.load_policy(folder / POLICY_FILE).actor.state_dict()
    assert any(not torch.equal(value, final[name]) for name, value in weights.items())


def test_a_policy_that_does_not_fit_on_the_disk_leaves_nothing(make_config, tmp_path, monkeypatch):
    def failing(weights, path, metadata):
        path.write_bytes(b"torn")
        raise SafetensorError("I/O error: No space left on device")

    folder = train(make_config())
    target = tmp_path / "out" / "policy.safetensors"
    target.parent.mkdir()
    monkeypatch.setattr("torchrl_sql.training.policy.save_file", failing)
    with pytest.raises(OSError, match=r"policy.safetensors could not be written: .*No space left"):
        export_policy(folder, target)
    assert list(target.parent.iterdir()) == []


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
    with pytest.raises(CheckpointError, match=r"must be of format 'torchrl_sql policy 1', got None"):
        torchrl_sql.load_policy(path)
