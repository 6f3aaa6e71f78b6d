from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchrl_sql.modules import ContrastivePredictor, MaskedAutoencoder
from torchrl_sql.modules.encoders import ENCODERS


def frames(num_states=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_states, 4, 84, 84), dtype=torch.uint8, generator=generator)


GAME_ID = torch.tensor([0, 1, 0])


class Blocks(nn.Module):
    """A map of 3 x 3 places, each of which sees its own 28 x 28 pixels only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 28, 28)

    def forward(self, x):
        return self.layer(x)


def autoencoder(encoder=None, **options):
    torch.manual_seed(0)
    return MaskedAutoencoder(encoder or Blocks(), **{"width": 64, "num_layers": 1, **options})


@settings(max_examples=20, deadline=None)
@given(st.floats(0.06, 0.94), st.integers(1, 4))
def test_the_share_of_hidden_places_is_that_of_each_state(share, num_states):
    _, _, masked = autoencoder(mask_share=share)(frames(num_states), torch.zeros(num_states, dtype=torch.int64))
    assert masked.sum(-1).tolist() == [round(9 * share)] * num_states


def test_of_nine_places_eight_are_hidden_and_of_a_hundred_ninety():
    for encoder, hidden, places in (
        (Blocks(), 8, 9),
        (ENCODERS["resnet_small"].build(num_groups=4, last_norm_scale=1), 90, 100),
    ):
        _, _, masked = autoencoder(encoder)(frames(), GAME_ID)
        assert masked.shape == (3, places) and masked.sum(-1).tolist() == [hidden] * 3


def test_hidden_places_are_drawn_anew_and_any_can_be():
    network = autoencoder(mask_share=0.5)
    drawn = torch.stack([network(frames(), GAME_ID)[2] for _ in range(40)]).flatten(0, 1)
    assert len(drawn.unique(dim=0)) > 40
    assert ((drawn.float().mean(0) - 4 / 9).abs() < 0.2).all()


def test_the_decoder_sees_nothing_of_hidden_places():
    network = autoencoder()
    tokens = torch.randn(2, 9, 6, requires_grad=True)
    masked = torch.ones(2, 9, dtype=torch.bool)
    masked[:, 4] = False
    network.decode(tokens, masked).square().sum().backward()
    reached = tokens.grad.abs().sum(-1) > 0
    assert torch.equal(reached, ~masked)


def test_frames_reach_the_reconstruction_through_visible_places_only_and_the_target_not_at_all():
    network = autoencoder()
    x = (frames().float() / 255).requires_grad_()
    reconstruction, target, masked = network(x, GAME_ID)
    assert not target.requires_grad and torch.equal(target, x.detach())
    reconstruction.square().sum().backward()
    touched = x.grad.abs().amax(1).unfold(1, 28, 28).unfold(2, 28, 28).amax((-2, -1)) > 0
    assert torch.equal(touched.flatten(1), ~masked)


def test_each_token_paints_its_own_patch():
    network = autoencoder()
    with torch.no_grad():
        network.pixels.weight.zero_()
        network.pixels.bias.copy_(torch.arange(4 * 28 * 28.0))
        painted = network.decode(torch.zeros(1, 9, 6), torch.ones(1, 9, dtype=torch.bool))
    patch = torch.arange(4 * 28 * 28.0).reshape(4, 28, 28)
    assert torch.equal(painted[0], patch.repeat(1, 3, 3))


def test_patches_of_a_map_that_does_not_divide_the_frame_stand_over_right_and_below():
    network = autoencoder(ENCODERS["resnet_small"].build(num_groups=4, last_norm_scale=1))
    assert network.patch == (9, 9)  # of 10 x 10 places
    reconstruction, target, _ = network(frames(), GAME_ID)
    assert reconstruction.shape == target.shape == (3, 4, 84, 84)


def test_the_target_lacks_the_games_mean():
    mean = torch.stack([torch.full((84, 84), 0.25), torch.full((84, 84), 0.5)])
    _, target, _ = autoencoder(input_mean=mean)(torch.full((3, 4, 84, 84), 255, dtype=torch.uint8), GAME_ID)
    assert target.amax((1, 2, 3)).tolist() == target.amin((1, 2, 3)).tolist() == [0.75, 0.5, 0.75]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.95, 1.0])
def test_some_places_must_be_hidden_and_some_seen(share):
    with pytest.raises(ValueError, match=r"mask_share must hide 1 to 8 of the map's 9 places, got"):
        autoencoder(mask_share=share)


@pytest.mark.parametrize("width", [0, 100])
def test_a_width_that_heads_do_not_divide_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be a positive multiple of 64, got {width}"):
        autoencoder(width=width)


def predictor(**options):
    torch.manual_seed(0)
    return ContrastivePredictor(Blocks(), **{"width": 5, "pooling": "average", **options})


def test_scores_are_bilinear_in_both_states():
    network = predictor()
    now, later = frames(3), frames(6)[3:]
    scores = network(now, GAME_ID, later)
    with torch.no_grad():
        phi = [network.layers(network.features(states, GAME_ID)) for states in (now, later)]
        expected = [[(a @ network.bilinear.weight.T @ b).item() for b in phi[1]] for a in phi[0]]
    torch.testing.assert_close(scores.detach(), torch.tensor(expected))


@pytest.mark.parametrize("network", [autoencoder(), predictor()], ids=["mae", "cpc"])
def test_shapes_that_do_not_fit_are_refused(network):
    arguments = [frames()[:, :3], GAME_ID, frames()][: len(network.in_keys)]
    with pytest.raises(
        ValueError, match=r"observation must be \[B, 4, 84, 84\] and game_id \[B\], got \(3, 3, 84, 84\)"
    ):
        network(*arguments)
