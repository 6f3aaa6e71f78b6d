import re
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrl_sql.config import compose_run_config
from torchrl_sql.methods import make_method
from torchrl_sql.modules import ENCODERS, ImpalaCNN, NatureCNN, ResNet, SmallResNet, encoders, make_q_actor


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (SmallResNet(), (32, 10, 10)),
        (ResNet((2, 2, 2, 2), bottleneck=False), (512, 3, 3)),
        (ResNet((1, 1, 1, 1), bottleneck=True), (2048, 3, 3)),
        (ENCODERS["resnet34_11x11"].build(), (512, 11, 11)),
        (ENCODERS["resnet_small_3x3"].build(), (32, 3, 3)),
        (ENCODERS["resnet_medium"].build(), (64, 10, 10)),
        (NatureCNN(), (64, 7, 7)),
        (ImpalaCNN(), (32, 11, 11)),
    ],
    ids=["small", "resnet18", "bottleneck", "resnet34_11x11", "small_3x3", "resnet_medium", "nature", "impala"],
)
def test_feature_map(encoder, shape):
    encoder(torch.rand(2, 4, 84, 84)).sum().backward()
    with torch.no_grad():
        features = encoder(torch.rand(2, 4, 84, 84))
    assert features.shape == (2, *shape)
    assert features.min() >= 0  # every encoder ends in a rectifier
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("depths", "bottleneck", "torchvision_parameters"),
    [((2, 2, 2, 2), False, 11_689_512), ((3, 4, 6, 3), False, 21_797_672), ((3, 4, 6, 3), True, 25_557_032)],
    ids=["resnet18", "resnet34", "resnet50"],
)
def test_trunks_are_torchvisions(depths, bottleneck, torchvision_parameters):
    """Same parameters as torchvision's models, less the classifier, plus the stem's fourth input channel."""
    features = 2048 if bottleneck else 512
    expected = torchvision_parameters - (features + 1) * 1000 + 64 * 7 * 7
    assert sum(p.numel() for p in ResNet(depths, bottleneck=bottleneck).parameters()) == expected


def test_a_sample_does_not_depend_on_its_batch():
    encoder = ResNet((1, 1, 1, 1), bottleneck=False).train()
    x = torch.rand(3, 4, 84, 84)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_slice_is_a_sequential_of_the_same_layers(name):
    encoder = ENCODERS[name].build(num_groups=32)
    stem, rest = encoder[:2], encoder[2:]
    assert type(stem) is nn.Sequential and [*stem, *rest] == [*encoder]
    assert encoder[0] is stem[0] and encoder[-1] is rest[-1]
    x = torch.rand(1, 4, 84, 84)
    torch.testing.assert_close(rest(stem(x)), encoder(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet_small", "resnet50"])
def test_blocks_start_as_their_shortcuts_with_a_last_norm_scale_of_zero(name):
    encoder = ENCODERS[name].build(num_groups=32, last_norm_scale=0.0)
    blocks = [layer for layer in encoder if hasattr(layer, "residual")]
    x = encoder[: -len(blocks)](torch.rand(2, 4, 84, 84))
    for block in blocks:
        torch.testing.assert_close(block(x), block.shortcut(x).relu())
        x = block(x)
    # The other norms are at one, and the branch can still grow.
    assert blocks[0].residual[1].weight.eq(1).all() and blocks[0].residual[-1].weight.requires_grad


def test_a_network_too_narrow_to_be_normalized_is_refused():
    with pytest.raises(ValueError, match="normalized layers must have at least 4 channels, got 2: give a larger width"):
        SmallResNet(width=2)


def test_a_module_is_an_encoder():
    stem = SmallResNet()[:3]
    network = make_q_actor(2, encoder=stem, num_embeddings=1, num_atoms=5).module[0].module
    assert network.encoder is stem
    assert network.heads.weight.shape == (2, 5 * 18, 16)  # one embedding of 16 channels, no hidden layer


def test_the_contributors_recipe_adds_an_encoder():
    """The code block of CONTRIBUTING.md, as if it stood in modules/encoders.py, is all that training needs."""
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = re.search(r"### An encoder\n.*?```python\n(.*?)```", page, re.DOTALL).group(1)
    assert len(recipe.splitlines()) <= 8
    known = {*ENCODERS}
    try:
        exec(recipe, {**vars(encoders)})
        config = compose_run_config(
            [
                "scale=cpu",
                "data.store=store",
                "data.games=[Pong,Freeway]",
                "model.encoder=stem",
                "model.num_embeddings=null",
            ]
        )
        actor = make_method(config.method).network(config.model, config.games)
        assert actor.module[0].module.heads.weight.shape == (2, 51 * 18, 64)
    finally:
        for name in {*ENCODERS} - known:
            del ENCODERS[name]
