"""MGDT end to end: data, training with an interruption, evaluation."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_sql.cli import main
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.modules import DecisionTransformerPolicy, make_decision_transformer
from torchrl_sql.objectives import DecisionTransformerLoss
from torchrl_sql.training.checkpoint import list_checkpoints, load_checkpoint
from torchrl_sql.training.parallel import Replicated, SingleProcess
from torchrl_sql.training.policy import load_policy
from torchrl_sql.training.ranks import Ranks

PLAY = ["evaluation.num_episodes_per_game=1", "evaluation.max_env_frames_per_episode=160"]


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_the_backward_pass_for_nothing_of_several_ranks_draws_no_dropout():
    """A run that continues makes it again, after its random state is restored."""
    network = make_decision_transformer(width=64, num_layers=1, num_steps=2, patch_size=42, dropout=0.5)
    loss = DecisionTransformerLoss(network)
    data = TensorDict(
        observation=torch.zeros(2, 2, 84, 84, dtype=torch.uint8),
        action=torch.zeros(2, 2, dtype=torch.int64),
        return_to_go=torch.zeros(2, 2),
        mask=torch.ones(2, 2, dtype=torch.bool),
        next=TensorDict(reward=torch.zeros(2, 2, 1), terminated=torch.zeros(2, 2, 1, dtype=torch.bool), batch_size=[2]),
        batch_size=[2],
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for call in (SingleProcess(loss), Replicated(loss, Ranks(0, 1, torch.device("cpu")))):
            torch.manual_seed(0)
            results.append([call(data.clone())["loss_action"].item() for _ in range(2)])
    finally:
        torch.distributed.destroy_process_group()
    assert results[0] == results[1] and results[0][0] != results[0][1]


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
