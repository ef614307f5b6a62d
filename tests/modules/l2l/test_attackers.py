"""Attackers and classifiers: the released sizes, shapes, warm start."""

import pytest
import torch
from torch import nn

from lightning_rectify._lightning import seed_everything
from lightning_rectify.modules.l2l.attackers import ResidualBlock, build_attacker
from lightning_rectify.modules.l2l.learned import scale_gradient
from lightning_rectify.modules.l2l.networks import PixelClassifier, WideResNet, build_classifier

NAMES = ("strided", "slim", "two_layer", "wide")


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def block_size(i, o):
    """Two PReLUs, two 3x3 convolutions and a 1x1 one where the width changes, all with biases; norms have nothing."""
    return 2 + (9 * i * o + o) + (9 * o * o + o) + (i * o + o if i != o else 0)


def test_wide_has_the_released_size():
    """1,747,852 parameters as released, one of which (``scale_last``) its forward pass never reads."""
    widths = (64, 128, 256, 128, 64)
    stem, head = 9 * 6 * 64 + 2 * 64, 9 * 64 * 3 + 3
    assert stem + sum(map(block_size, widths, widths[1:])) + head == 1_747_852 - 1
    assert count(build_attacker("wide", channels=3)) == 1_747_852 - 1


def test_strided_has_the_size_that_was_measured():
    stem, block, head = 9 * 2 * 16 + 2 * 16, block_size(16, 16), 9 * (8 + 2) * 1 + 1
    up = 16 * 16 * 8 + 2 * 8
    assert stem + block + up + head == 7_117
    assert count(build_attacker("strided", channels=1)) == 7_117


def test_slim_and_two_layer_have_the_released_size():
    slim = 9 * 6 * 128 + 2 * 128 + block_size(128, 256) + block_size(256, 128) + 16 * 128 * 16 + 2 * 16
    slim += 9 * (16 + 6) * 3 + 1  # no bias, and the learnt scale
    assert count(build_attacker("slim", channels=3)) == slim
    two_layer = 9 * 6 * 64 + 2 * 64 + block_size(64, 128) + block_size(128, 64) + 9 * 64 * 3 + 3
    assert count(build_attacker("two_layer", channels=3)) == two_layer


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_every_attacker_gives_a_direction_for_each_pixel_of_any_size(name, norm):
    for gradient, channels, size in ((True, 3, 8), (False, 1, 7)):  # an odd side does not halve
        network = build_attacker(name, channels, gradient, width=8, norm=norm)
        inputs = torch.randn(2, channels * (1 + gradient), size, size + 1)
        output = network(inputs)
        assert output.shape == (2, channels, size, size + 1)
        output.sum().backward()
        # A parameter that the forward pass does not read stops a joint game on several processes.
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_without_batch_norm_a_sample_does_not_see_its_batch(name):
    network = build_attacker(name, 1, width=8, norm="group")
    inputs = torch.randn(5, 2, 8, 8)
    # 1e-5: float32, kernels may differ with the batch.
    assert torch.allclose(network(inputs)[:2], network(inputs[:2]), atol=1e-5)


def test_block_is_normalization_prelu_convolution_twice_beside_a_shortcut():
    block = ResidualBlock(3, 5)
    first, second = (layer for layer in block.residual if isinstance(layer, nn.Conv2d))
    slopes = [layer.weight for layer in block.residual if isinstance(layer, nn.PReLU)]
    x = torch.randn(4, 3, 6, 6)

    def normalized(h):
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        return (h - mean) / (variance + 1e-5).sqrt()

    def prelu(h, slope):
        return torch.where(h > 0, h, slope * h)

    h = second(prelu(normalized(first(prelu(normalized(x), slopes[0]))), slopes[1]))
    # 1e-5: float32 of another order.
    assert torch.allclose(block(x), h + block.shortcut(x), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args"), [("strided", {}), ("slim", {"width": 16}), ("wide", {"width": 8, "skip": True})]
)
def test_a_warm_start_is_a_soft_fgsm(name, args):
    seed_everything(0, verbose=False)
    image, gradient = torch.rand(16, 3, 16, 16), 1e-3 * torch.randn(16, 3, 16, 16)
    inputs = torch.cat([image, scale_gradient(gradient)], dim=1)

    def cosine(warm):
        delta = build_attacker(name, 3, warm_start=warm, **args)(inputs).tanh()
        return nn.functional.cosine_similarity(delta.flatten(1), gradient.sign().flatten(1)).mean().item()

    # A soft sign of normal numbers: tanh(2 g) and sign(g) have cosine 0.96 where g is standard normal; the other
    # weights of the last layer take some. A cold one knows nothing of the sign.
    assert cosine(True) > 0.85
    assert abs(cosine(False)) < 0.5


# -- classifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "width", "millions"), [(16, 8, 11.0), (40, 2, 2.2), (28, 10, 36.5)])
def test_wide_resnets_have_the_papers_size(depth, width, millions):
    """Zagoruyko and Komodakis 2016 (arXiv:1605.07146), Table 4."""
    with torch.device("meta"):
        assert round(count(WideResNet(depth, width)) / 1e6, 1) == millions


def test_wide_resnet_has_its_depth_and_halves_twice():
    network = build_classifier("wrn_16_1", num_classes=7, in_channels=1).eval()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 16 - 3  # the depth counts three shortcuts as well
    assert network.blocks(network.stem(torch.rand(2, 1, 32, 32))).shape == (2, 64, 8, 8)
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_normalization_is_inside():
    network = nn.Flatten()
    images = torch.rand(3, 2, 4, 4)
    mean, std = [0.2, 0.4], [0.5, 0.25]
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(2)], dim=1).flatten(1)
    assert torch.equal(PixelClassifier(network, mean, std)(images), expected)
    assert torch.equal(PixelClassifier(network)(images), images.flatten(1))
    assert torch.allclose(PixelClassifier(network, 0.5, 2.0)(images), (images.flatten(1) - 0.5) / 2)
