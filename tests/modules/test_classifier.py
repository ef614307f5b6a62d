"""Image classifier: networks, logged numbers, life cycle."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.base import NonFiniteLossError
from lightning_rectify.modules.classifier import ImageClassifier
from lightning_rectify.modules.image_networks import CifarResNet, SmallCNN, build_network
from lightning_rectify.optim import RectifiedAdam

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trainer(**options):
    return Trainer(**{**QUIET, **options})


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "size"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_cifar_resnets_have_the_papers_size(depth, size):
    """He et al. 2015, Table 6: 0.27, 0.46, 0.85 and 1.7 million."""
    n = (depth - 2) // 6
    weights = 3 * 9 * 16  # stem
    norms = 2 * 16
    for channels, previous in ((16, 16), (32, 16), (64, 32)):
        weights += 9 * (previous * channels + (2 * n - 1) * channels * channels)
        norms += 2 * n * 2 * channels
    assert weights + norms + 64 * 10 + 10 == size
    network = build_network(f"resnet{depth}", num_classes=10)
    assert count(network) == size
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert all(layer.bias is None for layer in layers[:-1])


def test_shortcut_of_a_resnet_keeps_every_second_pixel_and_adds_empty_channels():
    network = CifarResNet(8).eval()
    block = network.blocks[1]  # 16 to 32 channels
    for layer in block.residual:
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
    x = torch.rand(2, 16, 32, 32)
    out = block(x)
    assert out.shape == (2, 32, 16, 16)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert not out[:, 16:].any()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, 61)])
def test_small_cnn_takes_any_image(norm, channels, size):
    network = build_network("small_cnn", 7, channels, width=4, norm=norm, dropout=0.5)
    assert network(torch.rand(3, channels, size, size)).shape == (3, 7)


def test_group_norm_does_not_see_the_rest_of_the_batch():
    torch.manual_seed(0)
    network = SmallCNN(5, width=8, norm="group")
    images = torch.rand(6, 1, 8, 8)
    assert torch.allclose(network(images)[:2], network(images[:2]), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_take_grey_and_colour(name, channels):
    network = build_network(name, num_classes=4, in_channels=channels)
    logits = network(torch.rand(2, channels, 32, 32))
    assert logits.shape == (2, 4)  # a tensor in training mode too: no auxiliary heads


def test_torchvision_names_win():
    assert isinstance(build_network("resnet44", 10), CifarResNet)
    assert not isinstance(build_network("resnet50", 10), CifarResNet)  # 6 * 8 + 2, but torchvision's name


@pytest.mark.parametrize(
    ("name", "near"), [("resnet21", "resnet20"), ("smal_cnn", "small_cnn"), ("efficientnet_b9", "efficientnet_b7")]
)
def test_unknown_network_lists_near_matches(name, near):
    with pytest.raises(ValueError, match=rf"`network`.*got '{name}'.*Near matches:.*{near}"):
        build_network(name, 10)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("small_cnn", {"width": 0}, "`width`.*got 0"),
        ("small_cnn", {"norm": "layer"}, "`norm`.*'layer'"),
        ("small_cnn", {"dropout": 1.0}, "`dropout`.*got 1.0"),
        ("small_cnn", {"depth": 3}, "`network_args`.*'small_cnn'.*depth"),
        ("resnet20", {"width": 3}, "`network_args`.*'resnet20'.*width"),
        ("resnet18", {"in_channels": 2}, "`in_channels`.*1 or 3.*got 2"),
    ],
)
def test_wrong_network_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, 10, **{"in_channels": 3, **arguments})


@pytest.mark.parametrize("depth", [2, 21])
def test_wrong_depth(depth):
    with pytest.raises(ValueError, match=f"`depth`.*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
def test_export_with_any_batch_size(name):
    network = build_network(name, 10, 1).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(network, (torch.rand(3, 1, 16, 16),), dynamic_shapes=({0: batch},))
    for size in (1, 2, 9):
        images = torch.rand(size, 1, 16, 16)
        assert torch.allclose(program.module()(images), network(images), atol=1e-5)


# -- module ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "`num_classes`.*got 1"),
        ({"in_channels": 0}, "`in_channels`.*got 0"),
        ({"image_size": 0}, "`image_size`.*got 0"),
        ({"label_smoothing": 1.0}, "`label_smoothing`.*got 1.0"),
        ({"label_smoothing": -0.1}, "`label_smoothing`.*got -0.1"),
        ({"network": "nothing"}, "`network`.*got 'nothing'"),
        ({"network": nn.Flatten(), "network_args": {"width": 3}}, "`network_args`"),
        ({"lr_scheduler_interval": "day"}, "`lr_scheduler_interval`.*'day'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


@pytest.mark.parametrize("argument", [{"num_classes": 11}, {"in_channels": 3}])
def test_a_datamodule_that_does_not_fit_is_refused(argument):
    (name, value), theirs = next(iter(argument.items())), {"num_classes": 10, "in_channels": 1}
    with pytest.raises(ValueError, match=rf"`{name}` of ImageClassifier to be {theirs[name]}.*ImageData.*got {value}"):
        trainer(max_epochs=1).fit(ImageClassifier(**argument), ImageData())


def small(**options):
    seed_everything(0, verbose=False)
    return ImageClassifier(
        network_args={"width": 8, "norm": "group"}, optimizer=partial(RectifiedAdam, lr=0.02), **options
    )


def test_it_learns_and_logs_what_it_says():
    model, data = small(), ImageData(batch_size=64, eval_batch_size=100, augment=False)
    fit = trainer(max_epochs=6)
    before = fit.validate(model, data, verbose=False)[0]
    assert set(before) == {"val/loss", "val/accuracy"}
    assert before["val/accuracy"] < 0.3
    fit.fit(model, data)
    assert set(fit.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert fit.callback_metrics["val/accuracy"] > 0.9
    tested = fit.test(model, data, verbose=False)[0]
    assert set(tested) == {"test/loss", "test/accuracy"}

    predicted = torch.cat(fit.predict(model, data))
    part = data._parts["test"]
    assert tested["test/accuracy"] == pytest.approx((predicted == part.labels).double().mean().item(), abs=1e-6)
    logits = model(part.__getitems__(list(range(len(part))))[0])
    # Batches of 100, 100, 100 and 59: their mean is weighted by size.
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(logits, part.labels).item(), rel=1e-5)


def test_labels_are_smoothed_in_training_only():
    model, data = small(label_smoothing=0.2), ImageData(batch_size=64)
    losses = {}

    def keep(stage):
        return lambda name, value, **_: losses.setdefault(stage + name, value)

    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    images, labels = batch
    for stage, step in (("1", model.training_step), ("2", model.validation_step)):
        model.log = keep(stage)
        step(batch, 0)
    logits = model(images)
    assert torch.allclose(losses["1train/loss"], F.cross_entropy(logits, labels, label_smoothing=0.2))
    assert torch.allclose(losses["2val/loss"], F.cross_entropy(logits, labels))


def test_predict_step_takes_images_alone_and_pairs():
    model, images = small().eval(), torch.rand(4, 1, 8, 8)
    expected = model(images).argmax(dim=1)
    for batch in (images, (images, torch.zeros(4)), [images, torch.zeros(4)]):
        assert torch.equal(model.predict_step(batch, 0), expected)
    assert model(model.example_input_array).shape == (2, 10)


def test_checkpoint_loads_with_the_safe_default(tmp_path):
    model = small(label_smoothing=0.1)
    fit = trainer(max_steps=3)
    fit.fit(model, ImageData(batch_size=64))
    fit.save_checkpoint(tmp_path / "named.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "named.ckpt")
    assert loaded.hparams["network_args"] == {"width": 8, "norm": "group"}
    assert loaded.label_smoothing == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = ImageClassifier(network=network)
    fit = trainer(max_steps=3)
    fit.fit(model, ImageData(batch_size=64))
    fit.save_checkpoint(tmp_path / "object.ckpt")
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "object.ckpt", network=other)
    assert "network" not in loaded.hparams
    assert torch.equal(other[1].weight, network[1].weight)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(tmp_path, norm):
    """Weights, running statistics, moments of the optimizer and schedule."""

    def run(max_steps, ckpt_path=None):
        seed_everything(0, verbose=False)
        model = ImageClassifier(
            network_args={"width": 4, "norm": norm},
            lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            lr_scheduler_interval="step",
        )
        fit = trainer(max_steps=max_steps)
        fit.fit(model, ImageData(batch_size=128, augment=True), ckpt_path=ckpt_path)
        return fit

    whole = run(18)
    run(13).save_checkpoint(tmp_path / "13.ckpt")  # ten steps an epoch
    resumed = run(18, tmp_path / "13.ckpt")
    assert resumed.global_step == 18
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    states = [fit.optimizers[0].state_dict() for fit in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][index][key]) for key, value in state.items())


def test_a_loss_that_is_not_finite_stops_training_before_the_step():
    model = small()
    nn.init.constant_(model.network.head.weight, float("nan"))
    body = [parameter.clone() for parameter in model.network.features.parameters()]
    with pytest.raises(NonFiniteLossError, match="player 'model' is nan at step 0"):
        trainer(max_epochs=1).fit(model, ImageData())
    assert all(torch.equal(a, b) for a, b in zip(body, model.network.features.parameters(), strict=True))
