"""Image data: parts, batches, augmentation, order, ranks, resume."""

import hashlib
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, DistributedSampler
from torchvision.datasets import STL10
from torchvision.transforms import v2

from lightning_rectify._lightning import NAME, LightningModule, ModelCheckpoint, Trainer
from lightning_rectify.data.image_datasets import ArrayImages, FileImages, resize, stratified_take
from lightning_rectify.data.image_sources import SOURCES, in_memory
from lightning_rectify.data.images import ImageData
from lightning_rectify.data.resumable import EpochSampler, ResumableLoader

OnExceptionCheckpoint = import_module(f"{NAME}.callbacks").OnExceptionCheckpoint


def stages(data):
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def random_images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(50) % 5


def write_idx(path, array):
    """The MNIST family's file format: magic number with type and rank, sizes, bytes."""
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion_root(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("train", 60), ("t10k", 20)):
        write_idx(folder / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (size, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(size) % 10)
    return tmp_path


@pytest.fixture
def folder_root(tmp_path):
    rng = np.random.default_rng(0)
    for part, size in (("train", 8), ("val", 3)):
        for label in ("ant", "bee", "cat"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


# -- parts -------------------------------------------------------------------------------------------------------------


def test_digits_parts_are_disjoint_stratified_and_normalised():
    data = stages(ImageData(val_size=0.1, seed=3))
    train, val, test = (data._parts[name] for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1294, 144, 359)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 8)
    for part in (val, test):  # ten classes within one sample of their share, which itself differs by up to 5 %
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 3
    images, labels = train.__getitems__(list(range(len(train))))
    assert images.shape == (1294, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert abs(images.mean().item()) < 0.02  # the constants are those of train and val together
    assert abs(images.std().item() - 1) < 0.02
    together = torch.cat([train.images, val.images, test.images]).flatten(1)
    assert sorted(together.tolist()) == sorted(load_digits().data.tolist())


def test_seed_moves_the_validation_part_but_never_the_test_part():
    first, second = stages(ImageData(seed=0)), stages(ImageData(seed=1))
    assert torch.equal(first._parts["test"].images, second._parts["test"].images)
    assert not torch.equal(first._parts["val"].images, second._parts["val"].images)
    again = stages(ImageData(seed=0))
    assert torch.equal(first._parts["val"].images, again._parts["val"].images)


def test_sizes_of_validation_and_training():
    data = stages(ImageData(val_size=100, train_size=200))
    assert (len(data._parts["train"]), len(data._parts["val"])) == (200, 100)
    counts = data._parts["train"].labels.bincount()
    assert counts.max() - counts.min() <= 2
    data = stages(ImageData(val_size=0))
    assert len(data._parts["train"]) == 1438
    assert data.val_dataloader() == []


def test_stratified_take_splits_every_size():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 21)
    for size in range(31):
        left, taken = stratified_take(labels, size, seed=5)
        assert sorted([*left.tolist(), *taken.tolist()]) == list(range(30))
        assert len(taken) == size
        expected = torch.tensor([7.0, 2.0, 21.0]) * size / 30
        assert (labels[taken].bincount(minlength=3) - expected).abs().max() <= 1


def test_mnist_family_from_its_files(fashion_root):
    data = stages(ImageData("fashion_mnist", root=str(fashion_root), batch_size=9, val_size=10))
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (9, 1, 28, 28)
    assert [len(data._parts[part]) for part in ("train", "val", "test")] == [50, 10, 20]
    assert torch.equal(data._parts["val"].labels.bincount(), torch.ones(10, dtype=torch.int64))
    assert [len(labels) for _, labels in data.test_dataloader()] == [9, 9, 2]
    assert sum(len(labels) for _, labels in data.predict_dataloader()) == 20


def test_image_folder(folder_root):
    data = ImageData("image_folder", root=str(folder_root), batch_size=4, val_size=3, image_size=24, augment=True)
    assert data.num_classes == 3  # known before setup, so that it can be linked to the network
    stages(data)
    loader = data.train_dataloader()
    images, labels = next(iter(loader))
    assert (images.shape, labels.shape, len(loader)) == ((4, 3, 24, 24), (4,), 5)
    assert [len(labels) for _, labels in data.test_dataloader()] == [4, 4, 1]
    assert next(iter(data.val_dataloader()))[0].shape == (3, 3, 24, 24)
    state = torch.random.get_rng_state()
    assert torch.equal(next(iter(data.train_dataloader()))[0], images)
    assert torch.equal(torch.random.get_rng_state(), state)  # neither loader nor augmentation draws from it


def test_small_image_folder_is_not_rescaled(tmp_path):
    """Images that already have the side asked for come out pixel by pixel, and augmented ones are shifted copies."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for i, image in enumerate(pixels):
            path = tmp_path / part / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    data = ImageData("image_folder", root=str(tmp_path), batch_size=4, val_size=0, image_size=32, augment=True)
    data.setup("fit"), data.setup("test")
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (data.source.mean, data.source.std))
    (plain, _) = next(iter(data.test_dataloader()))
    order = [0, 2, 1, 3]  # by class
    expected = (torch.from_numpy(pixels[order]).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)  # float32
    (augmented, _) = next(iter(data.train_dataloader()))
    # Each is a crop of one of the padded originals, perhaps mirrored. Black is the value that padding has there.
    padded = torch.nn.functional.pad(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, [4] * 4)
    crops = [padded[:, :, r : r + 32, c : c + 32] for r in range(9) for c in range(9)]
    candidates = (torch.cat([*crops, *(crop.flip(-1) for crop in crops)]) - mean) / std
    gaps = (augmented[:, None] - candidates[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert gaps.max() < 1e-5


def test_image_folder_with_other_test_classes_is_refused(folder_root):
    (folder_root / "val" / "cat").rename(folder_root / "val" / "dog")
    data = ImageData("image_folder", root=str(folder_root))
    with pytest.raises(ValueError, match=r"same classes.*'cat'.*'dog'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("kmnist", "KMNIST/raw"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "stl10_binary"),
        ("stl10_unlabeled", "stl10_binary"),
        ("usps", "usps.bz2"),
        ("imagenet", "ILSVRC2012"),
        ("image_folder", "train/CLASS/IMAGE"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_missing_data_says_what_belongs_where(tmp_path, dataset, expected, stage):
    data = ImageData(dataset, root=str(tmp_path))
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=rf"argument `root`.*{expected}") as caught:
        data.setup(stage)
    assert str(tmp_path) in str(caught.value)
    assert ("download=True" in str(caught.value)) == (dataset not in ("imagenet", "image_folder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar"}, "`dataset`.*got 'cifar'. Did you mean 'cifar10'"),
        ({"dataset": "cifar10"}, "`root`.*got None"),
        ({"dataset": "imagenet", "root": ".", "download": True}, "`download`"),
        ({"image_size": 0}, "`image_size`.*at least 1.*got 0"),
        ({"normalization": "tanh"}, "`normalization` to be 'dataset', 'symmetric' or 'unit' but got 'tanh'"),
        ({"batch_size": 0}, "`batch_size`.*got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size`.*got 0"),
        ({"num_workers": -1}, "`num_workers`.*got -1"),
        ({"seed": -1}, "`seed`.*got -1"),
        ({"train_size": 0}, "`train_size`.*got 0"),
        ({"val_size": 1.0}, "`val_size`.*got 1.0"),
        ({"val_size": -1}, "`val_size`.*got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"val_size": 1438}, "`val_size`.*1438"), ({"train_size": 1400}, "`train_size`.*1294.*1400")],
)
def test_sizes_beyond_the_data(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**arguments).setup("fit")


def test_a_batch_larger_than_the_data_is_refused():
    data = stages(ImageData(batch_size=300, train_size=200))
    with pytest.raises(ValueError, match=r"`batch_size`.*at most 200.*got 300"):
        data.train_dataloader()


# -- STL-10 with its unlabelled images ---------------------------------------------------------------------------------


@pytest.fixture
def stl10_root(tmp_path, monkeypatch):
    """STL-10 with 20 labelled images, 40 unlabelled and 10 of the test, in its own format; checksums to match."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for part, size in (("train", 20), ("unlabeled", 40), ("test", 10)):
        files = {f"{part}_X.bin": rng.integers(0, 256, (size, 3, 96, 96)), f"{part}_y.bin": np.arange(size) % 10 + 1}
        for name, array in files.items():
            (folder / name).write_bytes(array.astype(np.uint8).tobytes())
            sums[name] = hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
    for names in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, names, [[name, sums[name]] for name, _ in getattr(STL10, names)])
    return tmp_path


def test_stl10_with_unlabelled_images(stl10_root):
    options = {"root": str(stl10_root), "batch_size": 5, "image_size": 48, "val_size": 12}
    data = stages(ImageData("stl10_unlabeled", **options))
    train, val, test = (data._parts[part].labels for part in ("train", "val", "test"))
    # 12 of 60 images, a fifth of each class: 8 of the 40 unlabelled ones, 0.4 of the 2 of each class.
    assert (len(val), (val == -1).sum().item()) == (12, 8)
    assert (val + 1).bincount(minlength=11)[1:].max() <= 1
    assert ((train == -1).sum().item(), (train >= 0).sum().item()) == (32, 16)
    assert test.tolist() == list(range(10))
    assert data.num_classes == 10
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.dtype, data.image_size) == ((5, 3, 48, 48), torch.int64, 48)
    labelled = stages(ImageData("stl10", **options | {"val_size": 0}))
    assert sorted(labelled._parts["train"].labels.tolist()) == sorted([*range(10)] * 2)
    assert (labelled.mean, labelled.std) == (data.mean, data.std)
    few = ImageData("stl10_unlabeled", **options | {"train_size": 6})
    few.setup("fit")
    assert (few._parts["train"].labels == -1).sum() == 4


# -- size --------------------------------------------------------------------------------------------------------------


def triangle_weights(old, new):
    """Rows of the float64 matrix that brings a signal of length ``old`` to ``new``: a triangle on pixel centres.

    It is one old pixel wide on each side, or one new pixel where these are larger (antialias), and sums to 1.
    """
    width = max(1.0, old / new)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.clip(1 - np.abs(centres[:, None] - np.arange(old)) / width, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [(8, 32), (28, 32), (96, 48), (16, 5), (1, 3), (3, 1)])
def test_resize_is_the_bilinear_formula(old, new):
    images = torch.randint(0, 256, (3, 2, old, old), dtype=torch.uint8, generator=torch.Generator().manual_seed(old))
    exact = triangle_weights(old, new) @ images.double().numpy() @ triangle_weights(old, new).T
    gap = np.abs(resize(images, new).double().numpy() - exact)
    assert gap.max() <= 0.5 + 1e-3  # rounded to bytes; 1e-3 for sums of up to 16 float32 products of size 255
    pillow = [Image.fromarray(image.numpy()).resize((new, new), Image.Resampling.BILINEAR) for image in images[:, 0]]
    # Pillow rounds after each of the two directions: up to a whole step away.
    assert np.abs(np.array(pillow) - exact[:, 0]).max() <= 1.01


def test_digits_at_32_lose_no_shade():
    data, small = (stages(ImageData(image_size=side, normalization="unit", seed=2)) for side in (32, 8))
    assert (data.image_size, small.image_size) == (32, 8)
    for part in ("train", "val", "test"):
        images, labels = data._parts[part].__getitems__(range(len(data._parts[part])))
        originals, same_labels = small._parts[part].__getitems__(range(len(images)))
        assert torch.equal(labels, same_labels)
        assert images.shape == (len(labels), 1, 32, 32)
        assert (images.min(), images.max()) == (0, 1)
        exact = triangle_weights(8, 32) @ originals.double().numpy() @ triangle_weights(8, 32).T
        assert np.abs(images.double().numpy() - exact).max() <= 0.5 / 255 + 1e-6  # half a byte, and float32
        # To four times the side, each old pixel has the same total weight: rounding alone moves an image's mean.
        means = images.double().mean(dim=(1, 2, 3)) - originals.double().mean(dim=(1, 2, 3))
        assert means.abs().max() < 0.2 / 255  # of 1,024 roundings, partly alike in flat parts


def test_sizes_keep_constants_of_dataset_and_of_images():
    shades = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    for old, new in ((28, 32), (96, 48), (32, 7)):
        assert torch.equal(resize(shades.expand(-1, 1, old, old), new), shades.expand(-1, 1, new, new))
    sixteenths = torch.arange(17, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert torch.equal(resize(sixteenths, 9, scale=16.0)[:, 0, 0, 0], torch.arange(17).mul(255 / 16).round().byte())
    large, small = stages(ImageData(image_size=32)), stages(ImageData())
    assert (large.mean, large.std) == (small.mean, small.std) == ((0.306,), (0.377,))
    images, _ = large.training_images()
    assert abs(images.mean().item()) < 0.02  # as at 8x8: bilinear interpolation keeps the mean


def test_resize_in_chunks_is_resize_at_once(monkeypatch, random_images):
    images, _ = random_images
    whole = resize(images.transpose(2, 3), 8)  # STL-10 lies transposed in memory
    monkeypatch.setattr("lightning_rectify.data.image_datasets._CHUNK", 3 * 16 * 16 * 7)  # seven at a time
    assert torch.equal(resize(images.transpose(2, 3), 8), whole)
    monkeypatch.setattr("lightning_rectify.data.image_datasets._CHUNK", 1)  # at least one at a time
    assert torch.equal(resize(images.transpose(2, 3), 8), whole)


def test_sizes_leave_parts_order_and_frame_in_place(fashion_root):
    options = {"root": str(fashion_root), "batch_size": 9, "val_size": 10, "augment": True, "normalization": "unit"}
    data, small = (stages(ImageData("fashion_mnist", image_size=side, **options)) for side in (32, None))
    assert (data._parts["train"].pad, small._parts["train"].pad) == (4, 3)  # an eighth of the side
    for (images, labels), (_, same_labels) in zip(data.train_dataloader(), small.train_dataloader(), strict=True):
        assert images.shape == (9, 1, 32, 32)
        assert torch.equal(labels, same_labels)
    assert torch.equal(data._parts["test"].images, resize(small._parts["test"].images, 32))


# -- normalisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 32])
@pytest.mark.parametrize("augment", [False, True])
def test_normalisations_in_memory(augment, image_size):
    options = {"augment": augment, "image_size": image_size, "batch_size": 200}
    plain, symmetric, unit = (
        next(iter(stages(ImageData(normalization=name, **options)).train_dataloader()))[0]
        for name in ("dataset", "symmetric", "unit")
    )
    assert torch.equal(symmetric, 2 * unit - 1)  # exact: powers of two
    assert (unit.min(), unit.max(), symmetric.min(), symmetric.max()) == (0, 1, -1, 1)  # not one ulp outside
    torch.testing.assert_close(plain, (unit - 0.306) / 0.377, rtol=0, atol=1e-6)  # float32, values up to 2
    assert torch.equal(plain, next(iter(stages(ImageData(**options)).train_dataloader()))[0])


def test_every_byte_has_its_place_in_the_unit_interval():
    shades = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = ImageData("mnist", root=".", normalization="unit")
    images, _ = data._arrays(shades, torch.zeros(256, dtype=torch.int64)).__getitems__(range(256))
    torch.testing.assert_close(images.flatten(), torch.arange(256) / 255, rtol=0, atol=6e-8)  # an ulp below 1
    assert torch.equal(images.mul(255).round().byte(), shades)
    assert (images[0], images[-1]) == (0, 1)


@pytest.mark.parametrize("normalization", ["dataset", "symmetric", "unit"])
def test_frame_is_black_in_memory_and_on_disk(tmp_path, normalization):
    """White images: all that is not white in an augmented one is the frame."""
    for part in ("train", "test"):
        for i in range(30):
            path = tmp_path / part / "white" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), "white").save(path)
    options = {"root": str(tmp_path), "image_size": 16, "augment": True, "val_size": 0}
    data = ImageData("image_folder", batch_size=30, normalization=normalization, **options)
    data.setup("fit")
    black, white = (torch.tensor(bound).view(3, 1, 1) for bound in data.pixel_range)
    white_images = torch.full((30, 3, 16, 16), 255, dtype=torch.uint8)
    arrays = ImageData("cifar10", root=".", normalization=normalization)._arrays(white_images, torch.zeros(30), True)
    array_range = ImageData("cifar10", root=".", normalization=normalization).pixel_range
    for images, (low, high) in (
        (next(iter(data.train_dataloader()))[0], (black, white)),
        (
            arrays.__getitems__([(0, i) for i in range(30)])[0],
            (torch.tensor(side).view(3, 1, 1) for side in array_range),
        ),
    ):
        # In units of pixels again; 1e-6 for float32 constants of the dataset, the others are exact.
        pixels = (images - low) / (high - low)
        frame, inside = (pixels.abs() < 1e-6), (pixels - 1).abs() < 1e-6
        assert (frame | inside).all()
        assert frame.any()
        if normalization != "dataset":
            assert (images.min(), images.max()) == (low.min(), high.max())
    for images in (data.training_images()[0], data._parts["train"].__getitems__([0, 1])[0]):
        torch.testing.assert_close(images, white.expand_as(images), rtol=0, atol=1e-6)


def test_normalisations_on_disk(folder_root):
    options = {"root": str(folder_root), "image_size": 24, "augment": True, "val_size": 3, "batch_size": 21}
    batches = []
    for name in ("dataset", "symmetric", "unit"):
        data = stages(ImageData("image_folder", normalization=name, **options))
        batches.append([next(iter(loader))[0] for loader in (data.train_dataloader(), data.test_dataloader())])
    mean, std = (torch.tensor(constants).view(3, 1, 1) for constants in (data.mean, data.std))
    for plain, symmetric, unit in zip(*batches, strict=True):
        torch.testing.assert_close(symmetric, 2 * unit - 1, rtol=0, atol=2e-7)  # rounded once more or less, below 1
        torch.testing.assert_close(plain, (unit - mean) / std, rtol=0, atol=2e-6)  # float32, values up to 3
        assert 0 <= unit.min() < unit.max() <= 1
        assert -1 <= symmetric.min() < symmetric.max() <= 1


def test_pixel_range_bounds_what_batches_hold():
    assert ImageData(normalization="unit").pixel_range == ((0.0,), (1.0,))
    assert ImageData("cifar10", root=".", normalization="symmetric").pixel_range == ((-1.0,) * 3, (1.0,) * 3)
    low, high = ImageData("cifar10", root=".").pixel_range
    assert low == pytest.approx([-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616])
    assert high == pytest.approx([0.5086 / 0.2470, 0.5178 / 0.2435, 0.5535 / 0.2616])


class Attacked(LightningModule):
    """Takes one step of the sign of the gradient, in validation and test."""

    def __init__(self):
        super().__init__()
        self.layer, self.moved = torch.nn.Linear(64, 10), []

    def validation_step(self, batch, batch_idx):
        assert torch.is_inference_mode_enabled()  # or the test shows nothing
        images, labels = batch
        with torch.inference_mode(False), torch.enable_grad():
            images.requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)
            (slope,) = torch.autograd.grad(loss, images)
        self.moved.append((images + 0.1 * slope.sign()).clamp(0, 1).sub(images).abs().max().item())

    test_step = validation_step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_and_test_batches_can_be_attacked(num_workers):
    data = ImageData(batch_size=72, num_workers=num_workers, normalization="unit")
    model = Attacked()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.moved == pytest.approx([0.1] * 7)  # two batches of 144 images, five of 359
    clean = ImageData(normalization="unit")
    clean.setup("test")
    assert torch.equal(data._parts["test"].images, clean._parts["test"].images)


# -- all training images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_images_in_memory(num_workers):
    options = {"augment": True, "batch_size": 100, "train_size": 250, "num_workers": num_workers}
    data = ImageData(normalization="symmetric", **options)
    with pytest.raises(RuntimeError, match=r"`setup\('fit'\)`.*`training_images`"):
        data.training_images()
    data.setup("fit")
    loader = data.train_dataloader()
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        images, labels = data.training_images()
    assert not images.is_inference()
    assert torch.equal(torch.random.get_rng_state(), state)
    part = data._parts["train"]
    assert torch.equal(images, part.images.float() / 8 - 1)  # exact: sixteenths
    assert torch.equal(labels, part.labels)
    assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (250, 1, 8, 8))
    again = ImageData(normalization="symmetric", **options)
    again.setup("fit")
    images.zero_(), labels.zero_()  # copies: training does not see it
    for batch, same in zip(loader, again.train_dataloader(), strict=True):
        assert torch.equal(batch[0], same[0])
        assert torch.equal(batch[1], same[1])


def test_training_images_on_disk(folder_root):
    options = {"root": str(folder_root), "image_size": 24, "augment": True, "val_size": 3, "batch_size": 4}
    data = ImageData("image_folder", normalization="unit", **options)
    data.setup("fit")
    images, labels = data.training_images()
    assert images.shape == (21, 3, 24, 24)
    assert labels.bincount().tolist() == [7, 7, 7]
    source = data._parts["train"]
    for image, index in zip(images, source.indices, strict=True):
        path, _ = source.images.samples[index]
        pixels = np.array(Image.open(path).resize((24, 24), Image.Resampling.BILINEAR))
        torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_augmented_images_are_crops_of_the_padded_image(random_images):
    images, labels = random_images
    dataset = ArrayImages(images, labels, [0.0] * 3, [1.0] * 3, pad=2, flip=True, seed=1)
    batch, batch_labels = dataset.__getitems__([(4, i) for i in range(50)])
    assert torch.equal(batch_labels, labels)
    padded = torch.nn.functional.pad(images, [2] * 4).float() / 255
    found = set()
    for image, frame in zip(batch, padded, strict=True):
        matches = [
            (row, column, mirror)
            for row in range(5)
            for column in range(5)
            for mirror in (False, True)
            if torch.allclose(image.flip(-1) if mirror else image, frame[:, row : row + 16, column : column + 16])
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {row for row, _, _ in found} == {column for _, column, _ in found} == set(range(5))
    assert {mirror for _, _, mirror in found} == {False, True}


def test_augmentation_is_a_function_of_seed_epoch_and_index(random_images):
    def batch(seed, keys):
        return ArrayImages(*random_images, [0.5] * 3, [0.5] * 3, pad=2, flip=True, seed=seed).__getitems__(keys)[0]

    whole = batch(0, [(2, i) for i in (5, 9, 30)])
    assert torch.equal(whole, torch.cat([batch(0, [(2, i)]) for i in (5, 9, 30)]))
    assert not torch.equal(whole, batch(0, [(3, i) for i in (5, 9, 30)]))
    assert not torch.equal(whole, batch(1, [(2, i) for i in (5, 9, 30)]))
    plain = batch(0, [5, 9, 30])
    assert torch.allclose(plain, (random_images[0][[5, 9, 30]] / 255 - 0.5) / 0.5, atol=1e-6)


def test_file_augmentation_is_a_function_of_the_key_and_leaves_the_generator_alone():
    images = [(torch.rand(3, 20, 20), i % 2) for i in range(6)]
    dataset = FileImages(images, torch.tensor([5, 1, 3]), torch.nn.Identity(), v2.RandomCrop(8), seed=2)
    state = torch.random.get_rng_state()
    first, labels = dataset.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert torch.equal(labels, torch.tensor([1, 1, 1]))
    assert torch.equal(dataset[0, 1][0], first[1])
    assert not torch.equal(dataset[1, 1][0], first[1])
    assert torch.equal(dataset[1][0], images[1][0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("dataset", "pad", "flip"), [("fashion_mnist", 3, True), ("kmnist", 3, False)])
def test_letters_are_not_mirrored(dataset, pad, flip):
    part = ImageData(dataset, root=".", augment=True)._arrays(torch.zeros(1, 1, 28, 28), torch.zeros(1), augment=True)
    assert (part.pad, part.flip) == (pad, flip)


def test_the_papers_augmentation_is_the_default_of_cifar_only():
    assert ImageData("cifar10", root=".").augment
    assert ImageData("imagenet", root=".").augment
    assert not ImageData("mnist", root=".").augment
    assert not ImageData("cifar10", root=".", augment=False).augment


# -- order -------------------------------------------------------------------------------------------------------------


def test_ranks_see_together_what_one_process_sees():
    data = range(53)
    for epoch in (0, 7):
        one = EpochSampler(data, seed=4, drop_last=True)
        two = [EpochSampler(data, num_replicas=2, rank=rank, seed=4, drop_last=True) for rank in (0, 1)]
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        whole = list(BatchSampler(one, 10, drop_last=True))
        halves = [list(BatchSampler(sampler, 5, drop_last=True)) for sampler in two]
        assert len(whole) == len(halves[0]) == len(halves[1]) == 5
        for batch, left, right in zip(whole, *halves, strict=True):
            assert set(batch) == set(left) | set(right)
            assert {key[0] for key in batch} == {epoch}


def test_order_changes_with_epoch_and_seed_but_not_along_the_diagonal():
    def order(seed, epoch):
        sampler = EpochSampler(range(40), seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert sorted(order(0, 0)) == list(range(40))
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert list(EpochSampler(range(3), shuffle=False)) == [(0, 0), (0, 1), (0, 2)]
    assert len(list(EpochSampler(range(7), num_replicas=2, rank=1))) == 4
    with pytest.raises(ValueError, match=r"`seed`.*got -1"):
        EpochSampler(range(3), seed=-1)


# -- resume ------------------------------------------------------------------------------------------------------------


class Keys(torch.utils.data.Dataset):
    """Returns its keys and remembers which of them were loaded."""

    def __init__(self, size):
        self.size, self.loaded = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        self.loaded.append(key)
        return torch.tensor(key)


def keys_loader(num_workers=0, sampler=None, **options):
    data = Keys(23)
    sampler = sampler(data) if sampler else EpochSampler(data, seed=1, drop_last=True)
    return ResumableLoader(data, sampler=sampler, batch_size=4, drop_last=True, num_workers=num_workers, **options)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_loader_goes_on_behind_the_batches_handed_out(options):
    loader = keys_loader(**options)
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    before = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    assert state == {"epoch": 3, "batches": 2}  # whatever the workers have read ahead
    rest = list(batches)

    again = keys_loader(**options)
    again.load_state_dict(state)
    early = iter(again)  # Lightning does so before it sets the epoch
    assert again.state_dict() == state
    again.sampler.set_epoch(3)
    resumed = list(early)
    assert len(again) == len(before) + len(resumed) == 5
    assert all(torch.equal(a, b) for a, b in zip(rest, resumed, strict=True))
    if not options:
        assert len(again.dataset.loaded) == 12  # the skipped ones were never loaded

    for each in (loader, again):
        each.sampler.set_epoch(4)
    following = [list(each) for each in (loader, again)]
    assert len(following[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*following, strict=True))
    assert again.state_dict() == {"epoch": 5, "batches": 0}


def test_loader_goes_on_in_its_epoch_when_others_count_ahead():
    """Lightning calls an epoch that max_steps cut short a whole one."""

    def batches(epoch):
        loader = keys_loader()
        loader.sampler.set_epoch(epoch)
        return torch.stack(list(loader))

    loader = keys_loader()
    loader.load_state_dict({"epoch": 1, "batches": 3})
    loader.sampler.set_epoch(2)
    assert torch.equal(torch.stack(list(loader)), batches(1)[3:])
    assert loader.sampler.epoch == 2
    assert loader.state_dict() == {"epoch": 2, "batches": 0}
    assert torch.equal(torch.stack(list(loader)), batches(1))  # nobody has set another epoch
    loader.sampler.set_epoch(3)
    assert torch.equal(torch.stack(list(loader)), batches(2))


def test_loader_takes_other_samplers_and_batch_samplers():
    loader = keys_loader(sampler=lambda data: DistributedSampler(data, 1, 0, seed=2))
    loader.sampler.set_epoch(2)
    whole = list(loader)
    loader.load_state_dict({"epoch": 2, "batches": 4})
    assert torch.equal(torch.stack(list(loader)), torch.stack(whole[4:]))
    data = Keys(12)
    batches = BatchSampler(EpochSampler(data, seed=0), 3, drop_last=False)
    loader = ResumableLoader(data, batch_sampler=batches)
    batches.sampler.set_epoch(9)
    whole = list(loader)
    loader.load_state_dict({"epoch": 9, "batches": 1})
    assert torch.equal(torch.stack(list(loader)), torch.stack(whole[1:]))


class Linear(LightningModule):
    """Logistic regression with momentum on the digits; remembers its batches, may stop with an error."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.layer, self.fail_at, self.seen = torch.nn.Linear(64, 10), fail_at, []
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise ArithmeticError("stop here")
        images, labels = batch
        self.seen.append((batch_idx, images.double().sum().item()))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def fit(path, model, ckpt_path=None, num_workers=0, **options):
    """Seven batches of augmented digits an epoch, three epochs by default, a checkpoint after every step."""
    save = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    failed = OnExceptionCheckpoint(path, "failed")  # ModelCheckpoint(save_on_exception=True) is not in Lightning 2.5
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, **options}
    trainer = Trainer(**options, callbacks=[save, failed], enable_progress_bar=False, enable_model_summary=False)
    data = ImageData(batch_size=32, train_size=230, augment=True, num_workers=num_workers, seed=1)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "end.ckpt")
    return model


BY_STEPS = {"max_steps": 21, "max_epochs": -1}


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", [{}, BY_STEPS, {"limit_train_batches": 5}, {**BY_STEPS, "limit_train_batches": 5}])
def test_resume_is_bit_equal_from_any_step(tmp_path, num_workers, options):
    whole = fit(tmp_path, Linear(), num_workers=num_workers, **options)
    # With workers: inside an epoch of seven (or five), at an end, inside the next.
    for step in range(1, len(whole.seen)) if num_workers == 0 else (3, 7, 10):
        resumed = fit(tmp_path / "again", Linear(), tmp_path / f"step={step}.ckpt", num_workers, **options)
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("limit", [7, 5])
def test_more_steps_after_the_last_are_bit_equal(tmp_path, limit):
    whole = fit(tmp_path / "whole", Linear(), max_steps=21, max_epochs=-1, limit_train_batches=limit)
    for step in range(1, 21):
        fit(tmp_path / "part", Linear(), max_steps=step, max_epochs=-1, limit_train_batches=limit)
        resumed = fit(
            tmp_path / "again", Linear(), tmp_path / "part" / "end.ckpt", **BY_STEPS, limit_train_batches=limit
        )
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_a_batch_that_failed_is_trained_on_after_the_resume(tmp_path):
    whole = fit(tmp_path / "whole", Linear())
    with pytest.raises(ArithmeticError, match="stop here"):
        fit(tmp_path / "broken", Linear(fail_at=11))
    resumed = fit(tmp_path / "again", Linear(), tmp_path / "broken" / "failed.ckpt")
    assert resumed.seen == whole.seen[11:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_workers_change_nothing():
    batches = []
    for num_workers in (0, 2):
        data = stages(ImageData(augment=True, train_size=300, num_workers=num_workers))
        batches.append(list(data.train_dataloader()))
        batch = (torch.zeros(2, 1), torch.zeros(2))
        assert data.train_dataloader().collate_fn(batch) is batch  # no copy
    assert len(batches[0]) == 2
    for (images, labels), (other, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize(
    ("dataset", "folder"), [("mnist", "mnist"), ("usps", "usps"), ("fashion_mnist", "fashion-mnist")]
)
def test_constants_are_those_of_the_real_data(dataset, folder):
    root = Path(os.environ.get("LIGHTNING_RECTIFY_DATA", "")) / folder
    if "LIGHTNING_RECTIFY_DATA" not in os.environ or not root.is_dir():
        pytest.skip(f"there is no folder {folder} in LIGHTNING_RECTIFY_DATA")
    source = SOURCES[dataset]
    images, _ = in_memory(source, str(root), test=False)
    pixels = images.double() / source.scale
    # Four decimals are written down.
    assert pixels.mean().item() == pytest.approx(source.mean[0], abs=6e-5)
    assert pixels.std().item() == pytest.approx(source.std[0], abs=6e-5)
