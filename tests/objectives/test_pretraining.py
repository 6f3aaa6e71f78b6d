"""The losses of masked auto-encoding and contrastive prediction, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_sql.objectives import ContrastivePredictionLoss, MaskedAutoencodingLoss


class Table(nn.Module):
    """Gives its weight, whatever it reads."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))

    def forward(self, observation):
        return self.weight


class Painter(Table):
    """Paints its weight; the target is what it reads."""

    def forward(self, observation):
        return self.weight.expand_as(observation), observation


LN2 = math.log(2)
SCORES = [[0.0, LN2, 2 * LN2], [0.0, 0.0, 0.0], [LN2, 0.0, 3 * LN2]]
"""Weights of softmaxes: 1, 2, 4; 1, 1, 1; 2, 1, 8."""


def contrast(scores=SCORES, game_id=(0, 0, 1), terminated=(False, False, False), **options):
    network = TensorDictModule(Table(scores), in_keys=["observation"], out_keys=["scores"])
    loss = ContrastivePredictionLoss(network, **options)
    following = TensorDict(terminated=torch.tensor(terminated).unsqueeze(-1), batch_size=[3])
    batch = TensorDict(observation=torch.zeros(3), game_id=torch.tensor(game_id), next=following, batch_size=[3])
    return network.module.weight, loss(batch)


def test_the_positive_is_the_states_own_next_state_and_the_negatives_are_all_others():
    _, result = contrast(reduction="none")
    assert result["loss_cpc"].tolist() == pytest.approx([math.log(7), math.log(3), math.log(11 / 8)])
    _, mean = contrast()
    assert mean["loss_cpc"].item() == pytest.approx((math.log(7) + math.log(3) + math.log(11 / 8)) / 3)


def test_states_of_other_games_are_negatives_unless_only_the_same_game_counts():
    _, result = contrast(reduction="none", same_game=True)
    assert result["loss_cpc"].tolist() == pytest.approx([math.log(3), math.log(2), 0.0])


def test_a_terminal_state_has_no_next_one_and_is_nobodys_negative():
    _, result = contrast(reduction="none", terminated=(False, True, False))
    assert result["loss_cpc"].tolist() == pytest.approx([math.log(5), 0.0, math.log(10 / 8)])


@pytest.mark.parametrize(
    ("terminated", "accuracy"),
    [((False, False, False), 1 / 3), ((False, False, True), 0.0), ((True, True, False), 1.0), ((True,) * 3, 0.0)],
)
def test_the_accuracy_counts_states_that_have_a_next_one(terminated, accuracy):
    scores = [[0.0, 1.0, 2.0], [0.0, -1.0, -1.0], [1.0, 0.0, 3.0]]
    _, result = contrast(scores, terminated=terminated)
    assert result["accuracy"].item() == pytest.approx(accuracy)


def test_gradients_are_probabilities_minus_what_is_right_and_none_reach_what_is_no_candidate():
    scores, result = contrast(same_game=True)
    result["loss_cpc"].backward()
    expected = torch.tensor([[1 / 3 - 1, 2 / 3, 0.0], [1 / 2, 1 / 2 - 1, 0.0], [0.0, 0.0, 0.0]]) / 3
    torch.testing.assert_close(scores.grad, expected)


def test_scores_must_be_of_all_pairs():
    with pytest.raises(ValueError, match=r"scores must be \[3, 3\], got \[3, 2\]"):
        contrast([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])


def paint(value, frames, **options):
    network = TensorDictModule(Painter(value), in_keys=["observation"], out_keys=["reconstruction", "target"])
    loss = MaskedAutoencodingLoss(network, **options)
    return network.module.weight, loss(TensorDict(observation=frames, batch_size=[len(frames)]))


FRAMES = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]).unsqueeze(1)  # [2, 1, 1, 2]


def test_the_error_is_the_mean_square_over_all_pixels():
    _, result = paint(0.5, FRAMES, reduction="none")
    assert result["loss_mae"].tolist() == [0.25, 0.25]
    _, result = paint(0.0, FRAMES, reduction="none")
    assert result["loss_mae"].tolist() == [0.5, 1.0]
    assert paint(0.0, FRAMES)[1]["loss_mae"].item() == 0.75


def test_a_reconstruction_of_another_shape_is_refused():
    network = TensorDictModule(
        lambda frames: (frames[:, :1] / 255, frames / 255),
        in_keys=["observation"],
        out_keys=["reconstruction", "target"],
    )
    batch = TensorDict(observation=torch.zeros(2, 4, 84, 84, dtype=torch.uint8), batch_size=2)
    with pytest.raises(ValueError, match=r"reconstruction must have the target's shape, \[2, 4, 84, 84\], got"):
        MaskedAutoencodingLoss(network)(batch)


def test_painting_the_mean_leaves_all_variance_unexplained():
    _, result = paint(0.75, FRAMES)
    assert result["unexplained"].item() == pytest.approx(1.0)  # mean 3/4, variance 3/16


def test_nothing_flows_into_the_target():
    frames = FRAMES.clone().requires_grad_()
    weight, result = paint(0.0, frames)
    result["loss_mae"].backward()
    assert weight.grad.item() == pytest.approx(-2 * 0.75) and frames.grad is None


@pytest.mark.parametrize("kind", [MaskedAutoencodingLoss, ContrastivePredictionLoss])
def test_a_network_without_keys_is_refused(kind):
    with pytest.raises(TypeError, match="actor_network must be a TensorDictModule, got Table"):
        kind(Table(1.0))
    with pytest.raises(ValueError, match="reduction must be"):
        kind(TensorDictModule(Table(1.0), in_keys=["x"], out_keys=["scores"]), reduction="median")
