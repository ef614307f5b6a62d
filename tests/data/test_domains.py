"""Domain pairs: each layout, MNIST-M's recipe, what is held out, where labels of the target are, order and ranks."""

import bz2
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from lightning_rectify.data.domain_sources import blend_with_photos, read_domain, read_photos, turned
from lightning_rectify.data.domains import DomainImages, DomainPairs
from lightning_rectify.data.resumable import EpochSampler


def ready(**options):
    data = DomainPairs(**options)
    data.setup("fit")
    return data


def bits(count, side, seed=0, channels=1):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, channels, side, side), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path):
    """A folder as torchvision lays MNIST out, of 40 and 20 images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = bits(count, 28, count)[:, 0]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return tmp_path


@pytest.fixture
def usps(tmp_path, monkeypatch):
    """A folder as torchvision lays USPS out, of 30 and 10 images; its checksums are those of the real files."""
    from torchvision import datasets

    split = {}
    for part, (name, count) in {"train": ("usps.bz2", 30), "test": ("usps.t.bz2", 10)}.items():
        lines = []
        for i, image in enumerate(bits(count, 16, count)[:, 0] / 127.5 - 1.0):
            pixels = " ".join(f"{j}:{value:.4f}" for j, value in enumerate(image.flatten(), start=1))
            lines.append(f"{i % 10 + 1} {pixels}")
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
        url, file, _ = datasets.USPS.split_list[part]
        split[part] = [url, file, None]
    monkeypatch.setattr(datasets.USPS, "split_list", split)
    return tmp_path


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_mnist_and_usps_as_torchvision_lays_them_out(mnist, usps):
    data = ready(source="usps", target="mnist", root=str(mnist), image_size=28, source_margin=4, val_size=5)
    x, labels, y = data._parts["train"].__getitems__(list(range(25)))
    assert x.shape == y.shape == (25, 1, 28, 28)
    assert x[..., :4].abs().max() == x[..., -4:].abs().max() == 0 < x[..., 4:-4].max()
    assert len(data._parts["train"].x) == 25
    assert len(data._parts["train"].y) == 35
    assert set(labels.tolist()) <= set(range(10))
    pixels = set((255 * y).round().byte().flatten().tolist())
    assert len(pixels) > 200  # the whole range of bytes
    images, truth = read_domain("mnist", str(mnist), True, 28)
    assert torch.equal(images, torch.from_numpy(bits(20, 28, 20)))  # bringing 28 pixels to 28 changes nothing
    assert truth.tolist() == [i % 10 for i in range(20)]


def test_mnist_m_is_the_absolute_difference(mnist, tmp_path):
    digits = torch.from_numpy(bits(50, 28))
    flat = np.full((40, 30, 3), (10, 100, 250), dtype=np.uint8)
    blended = blend_with_photos(digits, [flat], seed=0)
    expected = (torch.tensor([10, 100, 250]).view(1, 3, 1, 1) - digits.int()).abs()
    assert torch.equal(blended.int(), expected)
    with pytest.raises(ValueError, match=r"`photos`.*at least 28 pixels.*got 1"):
        blend_with_photos(digits, [flat[:20]], seed=0)
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(bits(1, 60, 3, 3)[0].transpose(1, 2, 0)).save(folder / "deep" / "a.png")
    assert [photo.shape for photo in read_photos(str(folder))] == [(60, 60, 3)]
    data = ready(source="mnist", target="mnist_m", root=str(mnist), photos=str(folder), image_size=28, val_size=5)
    assert data.in_channels == 3
    x, _, y = data._parts["train"].__getitems__([0, 1])
    assert torch.equal(x[:, 0], x[:, 2])  # grey, in three channels
    assert not torch.equal(y[:, 0], y[:, 2])


def test_patches_are_uniform_over_the_photograph():
    """The corner's value is its place: a ramp along each axis."""
    ramp = np.zeros((32, 36, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(32)[:, None], np.arange(36)
    blended = blend_with_photos(torch.zeros(4000, 1, 28, 28, dtype=torch.uint8), [ramp], seed=1)
    rows, columns = blended[:, 0, 0, 0].bincount(minlength=5), blended[:, 1, 0, 0].bincount(minlength=9)
    assert len(rows) == 5
    assert len(columns) == 9
    # Five standard deviations of a binomial count: 4000 draws of 1/5 and 1/9.
    assert (rows - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5
    assert (columns - 444.4).abs().max() < 5 * (4000 / 9 * 8 / 9) ** 0.5


def test_mnist_m_as_its_authors_lay_it_out(mnist):
    folder = mnist / "mnist_m"
    for part, count in (("train", 12), ("test", 6)):
        (folder / f"mnist_m_{part}").mkdir(parents=True)
        lines = []
        for i, image in enumerate(bits(count, 32, count, 3)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"mnist_m_{part}" / f"{i}.png")
            lines.append(f"{i}.png {i % 10}\n")
        (folder / f"mnist_m_{part}_labels.txt").write_text("".join(lines))
    images, labels = read_domain("mnist_m", str(mnist), False, 32)
    assert torch.equal(images, torch.from_numpy(bits(12, 32, 12, 3)))
    assert labels.tolist() == [i % 10 for i in range(12)]
    with pytest.raises(FileNotFoundError, match=r"mnist_m_train_labels.txt.*`photos`"):
        read_domain("mnist_m", str(mnist / "nothing"), False, 32)


def test_folders_of_images_with_and_without_classes(tmp_path):
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "source" / part / kind
            folder.mkdir(parents=True)
            for i in range(6):
                shade = 200 if kind == "dog" else 50
                Image.fromarray(np.full((20, 24, 3), shade + i, dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "target" / "train").mkdir(parents=True)
    for i in range(9):
        Image.fromarray(np.full((18, 18, 3), 100 + i, dtype=np.uint8)).save(tmp_path / "target" / "train" / f"{i}.jpg")
    (tmp_path / "target" / "test").mkdir()
    Image.fromarray(np.full((18, 18, 3), 9, dtype=np.uint8)).save(tmp_path / "target" / "test" / "only.png")
    data = ready(
        source="image_folder", target="image_folder", source_root=str(tmp_path / "source"),
        target_root=str(tmp_path / "target"), val_size=2,
    )  # fmt: skip
    assert data.num_classes == 2
    train = data._parts["train"]
    assert torch.equal(train.labels, (train.x[:, 0, 0, 0] >= 200).long())
    assert len(train.y) == 7
    _, labels = next(iter(data.test_dataloader()[0]))
    assert labels.tolist() == [-1]


def test_turned_is_scipys_rotation_then_a_blur():
    image = np.zeros((16, 16))
    image[4:12, 6:9] = 1.0
    found = turned(torch.from_numpy(np.uint8(255 * image))[None, None], 20.0, 0.1, 0.8)[0, 0].numpy() / 255
    rotated = ndimage.rotate(image, 20.0, reshape=False, order=1)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = 0.1 + 0.7 * ndimage.convolve(rotated, kernel, mode="constant")
    # Half a byte's step, and a whole one for bytes in between.
    assert np.abs(found - expected).max() < 1.5 / 255


# -- parts -------------------------------------------------------------------------------------------------------------


def test_embedded_domains_share_no_training_image():
    a, _ = read_domain("digits", None, False, 16)
    b, _ = read_domain("digits_turned", None, False, 16)
    assert (len(a), len(b)) == (719, 719)
    turned_a = {image.numpy().tobytes() for image in turned(a)}
    # A few digits of the set are equal to the last bit.
    assert len(turned_a & {image.numpy().tobytes() for image in b}) <= 2


def test_labels_of_the_target_are_in_the_test_part_alone():
    data = ready(val_size=100, watch_test=True)
    source, target, watched = data.val_dataloader()
    assert all(labels.min() >= 0 for _, labels in source)
    assert all((labels == -1).all() for _, labels in target)
    assert all(labels.min() >= 0 for _, labels in watched)
    assert len(ready(val_size=100).val_dataloader()) == 2
    assert next(iter(data.test_dataloader()[0]))[1].min() >= 0
    assert len(next(iter(data._parts["train"].__getitems__([0, 1])))) == 2


def test_training_validation_and_test_are_apart():
    images = torch.arange(100).view(-1, 1, 1, 1).expand(100, 1, 16, 16).to(torch.uint8)
    data = ready(source=(images, torch.arange(100) % 10), target=images + 100, val_size=0.2, batch_size=10)
    for side, start in (("source", 0), ("target", 100)):
        train = data._parts["train"].x if side == "source" else data._parts["train"].y
        found = [train, *(data._parts[f"{part}_{side}"].images for part in ("val", "test"))]
        values = [sorted(part[:, 0, 0, 0].tolist()) for part in found]
        assert list(map(len, values)) == [60, 20, 20]
        assert sorted(value for part in values for value in part) == list(range(start, start + 100))
    labels = data._parts["train"].labels
    assert torch.equal(labels, data._parts["train"].x[:, 0, 0, 0].long() % 10)


def test_floats_are_pixels_and_come_out_again():
    images = torch.rand(30, 3, 16, 16)
    data = ready(source=(images, torch.zeros(30, dtype=torch.int64)), target=images, val_size=5, batch_size=4)
    back = data._parts["train"].x.float() / 255
    distance = torch.cdist(back.flatten(1), images.flatten(1), p=float("inf")).min(dim=1).values
    assert distance.max() <= 0.5 / 255 + 1e-6  # half a byte's step


def test_epochs_run_through_both_sides_in_new_orders():
    x, y = (torch.arange(n).view(-1, 1, 1, 1).to(torch.uint8) for n in (5, 12))
    data = DomainImages(x, torch.arange(5), y, seed=3)
    orders = []
    for epoch in (0, 1):
        source, labels, target = data.__getitems__([(epoch, i) for i in range(12)])
        assert torch.equal((255 * source).round().long().flatten(), labels)
        assert sorted((255 * target).round().long().flatten().tolist()) == list(range(12))
        assert sorted(labels[:5].tolist()) == sorted(labels[5:10].tolist()) == list(range(5))
        orders.append(labels.tolist())
    assert orders[0] != orders[1]


def test_two_ranks_see_what_one_sees():
    data = ready(train_size=64, val_size=50)._parts["train"]
    keys = list(EpochSampler(data, shuffle=False))
    halves = [list(EpochSampler(data, 2, rank, shuffle=False)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(keys)
    whole = data.__getitems__(keys[:8])
    parts = [data.__getitems__(half[:4]) for half in halves]
    for i in range(3):
        assert torch.equal(torch.stack([parts[0][i], parts[1][i]], dim=1).flatten(0, 1), whole[i])


# -- wrong arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "digit"}, r"`source`.*one of digits.*got 'digit'. Did you mean 'digits'"),
        ({"source": "mnist"}, r"`source_root`.*folder of mnist.*None"),
        ({"source": torch.zeros(3, 1, 16, 16)}, r"`source`.*images and labels"),
        ({"source_margin": 8}, r"`source_margin`.*below half.*16.*got 8"),
        ({"val_size": 1.0}, r"`val_size`.*\[0, 1\).*got 1.0"),
        ({"batch_size": 0}, r"`batch_size`.*at least 1.*got 0"),
        ({"seed": -1}, r"`seed`.*at least 0.*got -1"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DomainPairs(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_size": 700}, r"`val_size` and `train_size`.*719.*got 0.1 and 700"),
        ({"source": (torch.rand(9, 2, 4, 4), torch.zeros(9))}, r"`source`.*\(N, 1 or 3, S, S\).*got \(9, 2, 4, 4\)"),
        ({"source": (2 * torch.ones(9, 1, 4, 4), torch.zeros(9))}, r"`source`.*pixels in \[0, 1\]"),
        ({"source": (torch.rand(9, 1, 4, 4), torch.zeros(8))}, r"`source`.*label an image, 9.*got \(8,\)"),
        ({"source": (torch.rand(99, 1, 8, 8), torch.zeros(99))}, r"one shape.*\(1, 8, 8\) and \(1, 16, 16\)"),
        ({"source": (torch.rand(99, 1, 16, 16), -torch.ones(99))}, r"`source`.*label for each image"),
    ],
)
def test_data_that_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ready(**options)


def test_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"`batch_size`.*at most 64.*got 65"):
        ready(train_size=64, batch_size=65).train_dataloader()
