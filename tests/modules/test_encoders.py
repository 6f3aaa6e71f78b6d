import pytest
import torch

from torchrl_sql.modules import ImpalaCNN, NatureCNN, ResNet, SmallResNet


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (SmallResNet(), (32, 10, 10)),
        (ResNet((2, 2, 2, 2), bottleneck=False), (512, 3, 3)),
        (ResNet((1, 1, 1, 1), bottleneck=True), (2048, 3, 3)),
        (NatureCNN(), (64, 7, 7)),
        (ImpalaCNN(), (32, 11, 11)),
    ],
    ids=["resnet_small", "resnet18", "bottleneck", "nature", "impala"],
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
