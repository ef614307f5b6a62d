import math

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch import nn

from lightning_rectify.modules.spectral_gan._blocks import ConditionalNorm
from lightning_rectify.modules.spectral_gan.networks import (
    CNNDiscriminator,
    CNNGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    build_networks,
)

GENERATORS, DISCRIMINATORS = [CNNGenerator, ResNetGenerator], [CNNDiscriminator, ResNetDiscriminator]

# -- the same networks in numpy, float64, from the papers' layer lists -------------------------------------------------


def array(tensor):
    return tensor.detach().double().numpy()


def relu(x):
    return np.maximum(x, 0)


def linear(x, layer):
    return x @ array(layer.weight).T + array(layer.bias)


def conv(x, layer, stride=1):
    """Cross-correlation; padding 1 for 3x3 and 4x4 kernels, 0 for 1x1."""
    weight, pad = array(layer.weight), 0 if layer.weight.shape[-1] == 1 else 1
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    out = [[sum(correlate2d(c, k, "valid") for c, k in zip(image, w, strict=True)) for w in weight] for image in x]
    return np.array(out)[:, :, ::stride, ::stride] + array(layer.bias)[:, None, None]


def deconv(x, layer, stride):
    """Each input pixel paints its kernel; then one pixel is cut off on every side."""
    weight = array(layer.weight)  # in, out, k, k
    (b, _, h, w), k = x.shape, weight.shape[-1]
    out = np.zeros((b, weight.shape[1], (h - 1) * stride + k, (w - 1) * stride + k))
    for i in range(h):
        for j in range(w):
            patch = np.einsum("bi,iokl->bokl", x[:, :, i, j], weight)
            out[:, :, i * stride : i * stride + k, j * stride : j * stride + k] += patch
    return out[:, :, 1:-1, 1:-1] + array(layer.bias)[:, None, None]


def batch_norm(x, axes, scale, shift):
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * scale + shift


def class_table(norm, labels):
    return (array(table.weight)[labels.numpy()][:, :, None, None] for table in (norm.scale, norm.shift))


def numpy_cnn_generator(net, z, labels):
    """With batch norm in training mode; the first over the flat features."""
    x = linear(z.double().numpy(), net.stem).reshape(len(z), -1, net.bottom, net.bottom)
    for i, norm in enumerate(net.norms):
        axes = 0 if i == 0 else (0, 2, 3)
        if labels is not None:
            scale, shift = class_table(norm, labels)
        else:
            scale, shift = (array(p).reshape(*(x.shape[1:] if i == 0 else (-1, 1, 1))) for p in norm.norm.parameters())
        x = relu(batch_norm(x, axes, scale, shift))
        x = deconv(x, [*net.ups, net.head][i], stride=2 if i < 3 else 1)
    return np.tanh(x)


def numpy_resnet_generator(net, z, labels):
    def norm_of(x, norm, labels):
        if labels is not None:
            return batch_norm(x, (0, 2, 3), *class_table(norm, labels))
        return batch_norm(x, (0, 2, 3), *(array(p)[:, None, None] for p in norm.norm.parameters()))

    def double(x):
        return x.repeat(2, axis=2).repeat(2, axis=3)

    x = relu(linear(z.double().numpy(), net.stem)).reshape(len(z), -1, net.bottom, net.bottom)
    for block in net.blocks:
        y = conv(double(relu(norm_of(x, block.norms[0], labels))), block.convs[0])
        y = conv(relu(norm_of(y, block.norms[1], labels)), block.convs[1])
        x = y + conv(double(x), block.shortcut)
    return np.tanh(conv(norm_of(relu(x), net.norm, None), net.head))


def numpy_cnn_discriminator(net, images, labels):
    x = array(images)
    for i, layer in enumerate(module for module in net.features if isinstance(module, nn.Conv2d)):
        x = conv(x, layer, stride=(1, 2, 1, 2, 1, 2, 1)[i])
        x = np.where(x > 0, x, 0.2 * x)
    return numpy_score(net, x.reshape(len(x), -1), labels)


def numpy_resnet_discriminator(net, images, labels):
    def pool(x):
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4

    x = array(images)
    for i, block in enumerate(net.blocks):
        y = conv(relu(conv(x if i == 0 else relu(x), block.convs[0])), block.convs[2])
        if i == 0:
            x = pool(y) + conv(pool(x), block.shortcut)
        elif i < 3:
            x = pool(y) + pool(conv(x, block.shortcut))
        else:
            x = y + x
    return numpy_score(net, relu(x).sum(axis=(2, 3)), labels)


def numpy_score(net, features, labels):
    score = linear(features, net.head)[:, 0]
    return score if labels is None else score + (features * array(net.classes.weight)[labels.numpy()]).sum(axis=1)


REFERENCE = {
    CNNGenerator: numpy_cnn_generator,
    ResNetGenerator: numpy_resnet_generator,
    CNNDiscriminator: numpy_cnn_discriminator,
    ResNetDiscriminator: numpy_resnet_discriminator,
}


def drawn_anew(net, seed):
    """Every parameter random and of a size that shows, those that start at 0 or 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / fan) ** 0.5)
    return net.double()


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("make", list(REFERENCE))
def test_networks_compute_what_the_layer_lists_say(make, num_classes):
    net = drawn_anew(make(image_size=32, in_channels=2, width=4, num_classes=num_classes), seed=0)
    generator = torch.Generator().manual_seed(1)
    shape = (3, net.latent_size) if make in GENERATORS else (3, 2, 32, 32)
    inputs = torch.randn(shape, generator=generator).double()
    labels = None if num_classes is None else torch.tensor([2, 0, 2])
    ours, theirs = array(net(inputs, labels)), REFERENCE[make](net, inputs, labels)
    assert np.std(theirs) > 0.01
    # Float64 on both sides; a network of a dozen layers loses three or four of sixteen digits.
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11)


# -- sizes -------------------------------------------------------------------------------------------------------------

# By hand: a convolution has in * out * k * k + out parameters, a norm 2 * features.
COUNTS = {
    # 1792, 131200, 147584, 524544, 590080, 2097664, 2359808 and the linear layer's 8193: the paper's 5.86 M
    CNNDiscriminator: 5_860_865,
    # linear 1056768, deconvolutions 2097408, 524416, 131136 and 1731, norms 2 * (8192 + 256 + 128 + 64)
    CNNGenerator: 3_828_739,
    # first block 151680, two of 311680, two of 295168, linear 129
    ResNetDiscriminator: 1_365_505,
    # linear 1052672, three blocks of 3 * 590080 + 1024, last norm 512, convolution 6915
    ResNetGenerator: 6_373_891,
}


@pytest.mark.parametrize(("make", "count"), COUNTS.items())
def test_parameter_counts_of_the_paper(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16, 16, 8, 8, 4, 4)), (48, (48, 24, 24, 12, 12, 6, 6))])
def test_feature_maps_of_the_cnn_discriminator(size, sides):
    with torch.device("meta"):
        net, x = CNNDiscriminator(image_size=size), torch.empty(2, 3, size, size)
        shapes = []
        for layer in net.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                shapes.append(tuple(x.shape[1:]))
    channels = (64, 128, 128, 256, 256, 512, 512)
    assert shapes == [(c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert net.head.in_features == 512 * sides[-1] ** 2


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize(("size", "channels", "num_classes", "norm"), [
    (32, 1, None, "batch"), (48, 3, 4, "batch"), (48, 1, 4, "group"), (32, 3, 4, "none"), (32, 5, None, "group"),
])  # fmt: skip
@pytest.mark.parametrize("width", [8, 1])
def test_a_pair_fits(name, size, channels, num_classes, norm, width):
    generator, discriminator = build_networks(name, size, channels, width, width, 16, num_classes, norm)
    labels = None if num_classes is None else torch.tensor([0, 3, 3])
    images = generator(torch.randn(3, 16), labels)
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (3,)
    assert {net.image_size for net in (generator, discriminator)} == {size}
    assert {net.num_classes for net in (generator, discriminator)} == {num_classes}
    assert generator.latent_size == 16


@pytest.mark.parametrize(("name", "latent", "widths"), [("cnn", 128, (512, 512)), ("resnet", 256, (256, 128))])
def test_sizes_left_out_are_the_papers(name, latent, widths):
    with torch.device("meta"):
        generator, discriminator = build_networks(name)
    assert generator.latent_size == latent
    assert generator.stem.out_features == widths[0] * 16
    assert discriminator.head.in_features == widths[1] * (16 if name == "cnn" else 1)


# -- norms, classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("make", GENERATORS)
def test_only_batch_norm_sees_the_batch(make, norm):
    torch.manual_seed(0)
    net = make(width=16, norm=norm, num_classes=2)
    latents, labels = torch.randn(6, net.latent_size), torch.tensor([0, 1, 1, 0, 1, 0])
    difference = (net(latents, labels)[:2] - net(latents[:2], labels[:2])).abs().max()
    # Kernels may add up in another order for another batch size: float32 rounding of numbers below 1.
    assert (difference < 1e-5) == (norm != "batch")


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("make", GENERATORS)
def test_a_class_moves_its_own_images(make, norm):
    torch.manual_seed(0)
    net = make(width=8, norm=norm, num_classes=3).eval()
    latents, labels = torch.randn(4, net.latent_size), torch.tensor([0, 1, 2, 1])
    before = net(latents, labels)
    torch.testing.assert_close(before, net(latents, torch.zeros_like(labels)), rtol=0, atol=0)  # no class differs yet
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, ConditionalNorm) and part.scale is not None:
                part.scale.weight[1] += 0.5
                part.shift.weight[1] -= 0.1
    moved = (net(latents, labels) - before).flatten(1).abs().amax(dim=1)
    assert moved[[0, 2]].max() == 0
    assert moved[[1, 3]].min() > 0


@pytest.mark.parametrize("channels", [1, 7, 8, 12, 18, 64, 512])
def test_group_norm_has_at_most_eight_channels_a_group(channels):
    norm = ConditionalNorm(channels, None, "group").norm
    assert channels % norm.num_groups == 0
    assert channels // norm.num_groups <= 8


@pytest.mark.parametrize("make", GENERATORS + DISCRIMINATORS)
def test_every_parameter_is_used(make):
    torch.manual_seed(0)
    # No norm: behind a batch norm the gradient of a bias is zero.
    options = {"norm": "none"} if make in GENERATORS else {}
    net = make(width=8, num_classes=2, **options)
    shape = (4, net.latent_size) if make in GENERATORS else (4, 3, 32, 32)
    net(torch.randn(shape), torch.tensor([0, 1, 0, 1])).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


# -- how weights start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", GENERATORS)
def test_generators_start_from_the_papers_normal_law(make):
    torch.manual_seed(0)
    net = make(width=64)
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    # 3e5 numbers and more: the relative standard error of their standard deviation is below 0.2 %.
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert all(layer.bias.abs().max() == 0 for layer in layers)


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_narrow_generators_do_not_start_grey(make, norm):
    torch.manual_seed(0)
    images = make(width=16, norm=norm)(torch.randn(8, 128 if make is CNNGenerator else 256))
    assert images.std(dim=0).mean() > 0.01  # N(0, 0.02^2) without norm: 2e-6


@pytest.mark.parametrize("make", DISCRIMINATORS)
def test_discriminators_start_from_glorots_law(make):
    torch.manual_seed(0)
    net = make(width=64, num_classes=10)
    for name, layer in net.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
            continue
        rows, columns = layer.weight.shape[:2]
        area = layer.weight[0, 0].numel()
        gain = 2.0 if ".convs." in name else 1.0  # squared, of the residual blocks' 3x3
        bound = math.sqrt(gain * 6 / (rows + columns) / area)
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.9 * bound  # of 64 numbers and more one is there but for one case in 800
        assert getattr(layer, "bias", None) is None or layer.bias.abs().max() == 0


# -- export, errors ----------------------------------------------------------------------------------------------------


def test_one_latent_vector_in_training_is_refused_where_its_statistics_would_be_its_own():
    latents = torch.zeros(1, 8)
    with pytest.raises(
        ValueError, match=r"Expected argument `latents` to hold two latent vectors at least.* but got 1"
    ):
        CNNGenerator(width=8, latent_size=8)(latents)
    for generator in (CNNGenerator(width=8, latent_size=8).eval(), CNNGenerator(width=8, latent_size=8, norm="group")):
        assert generator(latents).shape == (1, 3, 32, 32)
    assert ResNetGenerator(width=8, latent_size=8)(latents).shape == (1, 3, 32, 32)  # norms over the whole map


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("make", GENERATORS)
def test_generators_export_with_any_batch(make, num_classes):
    torch.manual_seed(0)
    net = make(width=8, num_classes=num_classes).eval()
    example = (torch.randn(3, net.latent_size), *([torch.tensor([0, 1, 2])] if num_classes else []))
    batch = torch.export.Dim("batch")
    dynamic = ({0: batch}, {0: batch} if num_classes else None)
    exported = torch.export.export(net, example, dynamic_shapes=dynamic[: len(example)]).module()
    for count in (1, 7):
        inputs = (torch.randn(count, net.latent_size), *([torch.arange(count) % 3] if num_classes else []))
        # Same operators on the same numbers; room for kernels that are chosen otherwise.
        torch.testing.assert_close(exported(*inputs), net(*inputs), rtol=1e-5, atol=1e-6)


LATENTS, IMAGES, LABELS = torch.zeros(2, 16), torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_networks("mlp"), "`network` to be 'cnn' or 'resnet' but got 'mlp'"),
        (lambda: build_networks("cnn", generator_width=0), "`generator_width` to be at least 1 but got 0"),
        (lambda: build_networks("cnn", discriminator_width=0), "`discriminator_width` to be at least 1 but got 0"),
        (lambda: build_networks("cnn", latent_size=0), "`latent_size` to be at least 1 but got 0"),
        (lambda: CNNGenerator(image_size=64), "`image_size` to be 32 or 48 but got 64"),
        (lambda: CNNDiscriminator(in_channels=0), "`in_channels` to be at least 1 but got 0"),
        (lambda: ResNetGenerator(num_classes=0), "`num_classes` to be at least 1 but got 0"),
        (lambda: ResNetDiscriminator(width=0), "`width` to be at least 1 but got 0"),
        (lambda: ResNetGenerator(norm="layer"), "`norm` to be 'batch', 'group' or 'none' but got 'layer'"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_bad_inputs(name, num_classes):
    generator, discriminator = build_networks(name, 32, 3, 8, 8, 16, num_classes)
    right, wrong = (None, LABELS) if num_classes is None else (LABELS, None)
    said = "None but got a tensor of shape \\(2,\\)" if num_classes is None else "class numbers below 2 but got None"
    for net, inputs in ((generator, LATENTS), (discriminator, IMAGES)):
        with pytest.raises(ValueError, match=f"`labels` to be {said}"):
            net(inputs, wrong)
    with pytest.raises(ValueError, match=r"`latents` to be of shape \(B, 16\) but got \(2, 17\)"):
        generator(torch.zeros(2, 17), right)
    with pytest.raises(ValueError, match=r"`images` to be of shape \(B, 3, 32, 32\) but got \(2, 3, 48, 48\)"):
        discriminator(torch.zeros(2, 3, 48, 48), right)
    if num_classes is not None:
        with pytest.raises(ValueError, match=r"`labels` to be of shape \(2,\) but got \(1,\)"):
            discriminator(IMAGES, LABELS[:1])
