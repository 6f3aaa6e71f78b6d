"""MGDT end to end: data, training with an interruption, evaluation."""

from __future__ import annotations

import pytest
import torch

from torchrl_sql.cli import main
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.modules import DecisionTransformerPolicy
from torchrl_sql.training.checkpoint import list_checkpoints, load_checkpoint
from torchrl_sql.training.policy import load_policy

PLAY = ["evaluation.num_episodes_per_game=1", "evaluation.max_env_frames_per_episode=160"]


@pytest.mark.parametrize(("method", "decodings"), [("mgdt", ["expert", "expert_128"]), ("bc_transformer", ["greedy"])])
def test_a_run_trains_continues_and_plays(tiny_overrides, tmp_path, method, decodings):
    def train(run_dir, *more):
        words = [*tiny_overrides(run_dir), f"method={method}", "model=mgdt_small", "optim=lamb", *PLAY, *more]
        assert main(["train", *words]) == 0
        return load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])["trainer"]["loss"]

    through = train(tmp_path / "through")
    train(tmp_path / "again")
    for checkpoint in list_checkpoints(tmp_path / "again" / "checkpoints")[1:]:
        checkpoint.unlink()
    continued = train(tmp_path / "again")
    assert all(torch.equal(through[name], continued[name]) for name in through)  # dropout and LAMB's state included

    for decoding in [None, *decodings[1:]]:
        assert main(["evaluate", str(tmp_path / "through"), *(["--decoding", decoding] if decoding else [])]) == 0
    rows = read_episodes(tmp_path / "through" / "scores.csv")
    assert {(row.game, row.decoding) for row in rows} == {(g, d) for g in ("Breakout", "Freeway") for d in decodings}
    assert {row.length_agent_steps for row in rows} == {40}
    policy = load_policy(tmp_path / "through" / "policy.safetensors")
    assert isinstance(policy, DecisionTransformerPolicy) and policy.decoding == decodings[0]
