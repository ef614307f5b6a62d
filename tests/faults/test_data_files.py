"""A data file that was cut short, in every format that is read: it is named, or the folder it belongs to is."""

import bz2
import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_rectify import DomainPairs, ImageData, ManifoldData, TokenData, TranslationData, TransportData
from tests.faults.conftest import cut


def write_idx(path, array):
    """The MNIST family's format: magic number with type and rank, sizes, bytes."""
    header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def fashion(folder):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{name}-images-idx3-ubyte", np.full((size, 28, 28), 7))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(size) % 10)
    return raw / "train-images-idx3-ubyte", ImageData("fashion_mnist", root=str(folder), batch_size=4, val_size=10)


def usps(folder):
    pixels = b" ".join(b"%d:0.5" % (i + 1) for i in range(256))
    for name in ("usps.bz2", "usps.t.bz2"):
        (folder / name).write_bytes(bz2.compress(b"".join(b"%d %s\n" % (1 + i % 10, pixels) for i in range(40))))
    return folder / "usps.bz2", ImageData("usps", root=str(folder), batch_size=4, val_size=10)


def pictures(folder, suffix):
    rng = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "val") for name in "ab"):
        (folder / part / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / name / f"{i}.{suffix}")
    return folder / "train" / "a" / f"3.{suffix}"


def image_folder(folder, suffix="png"):
    damaged = pictures(folder, suffix)
    return damaged, ImageData("image_folder", root=str(folder), batch_size=2, val_size=2, image_size=16)


def photographs(folder):
    return image_folder(folder, "jpg")


def domain(folder):
    damaged = pictures(folder, "png")
    return damaged, DomainPairs("image_folder", "digits_turned", source_root=str(folder), batch_size=2, val_size=2)


def points(folder, suffix="npy"):
    for side in "xy":
        rows = np.random.default_rng(0).normal(size=(200, 2))
        if suffix == "npy":
            np.save(folder / f"{side}.npy", rows)
        else:
            np.savetxt(folder / f"{side}.csv", rows, delimiter=",")
    files = {side: str(folder / f"{side}.{suffix}") for side in "xy"}
    return folder / f"x.{suffix}", TransportData(**files, batch_size=20, val_size=20)


def table(folder):
    return points(folder, "csv")


def manifold(folder):
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(200, 3)))
    np.save(folder / "y.npy", np.zeros(200))
    return folder / "x.npy", ManifoldData(x=folder / "x.npy", y=folder / "y.npy", batch_size=20)


def sentences(folder):
    lines = b"".join(b"wort %d\n" % i for i in range(300))
    for language in ("de", "en"):
        (folder / f"train.{language}.gz").write_bytes(gzip.compress(lines))
    parts = dict.fromkeys(("train", "val", "test"), str(folder / "train"))
    return folder / "train.en.gz", TranslationData(dataset="files", **parts, vocab_size=60)


def words(folder):
    (folder / "train.txt.gz").write_bytes(gzip.compress(b"".join(b"a word %d\n" % i for i in range(3000))))
    parts = dict.fromkeys(("train", "val", "test"), str(folder / "train.txt"))
    return folder / "train.txt.gz", TokenData("files", **parts, batch_size=4)


NAMED = {  # what the message must hold
    fashion: "FashionMNIST/raw.*(damaged).*Put|Put FashionMNIST there, in place of what may be damaged",
    usps: r"usps\.bz2.*cut short or damaged.*Put a good copy of USPS",
    image_folder: r"'.*/train/a/3\.png' to be a whole image",
    photographs: r"'.*/train/a/3\.jpg' to be a whole image",
    domain: r"'.*/train/a/3\.png' to be a whole image",
    points: r"`x` to be a whole \.npy file.*x\.npy'",
    table: r"`x` to be a file of numbers.*x\.csv'",
    manifold: r"`x` to be a whole \.npy file.*x\.npy'",
    sentences: r"train\.en\.gz",
    words: r"train\.txt\.gz",
}


def read_all(data):
    data.prepare_data()
    data.setup("fit")
    for _ in data.train_dataloader():
        pass


@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_a_file_that_was_cut_short_is_named(make, tmp_path):
    _, data = make(tmp_path)
    read_all(data)  # whole, it is read
    for share in (0.6, 0.0):
        again = tmp_path / f"{share}"
        again.mkdir()
        damaged, data = make(again)
        size = int(share * damaged.stat().st_size)
        if damaged.suffix == ".csv":  # behind a first number of a line: a shorter file could be a whole one
            size = damaged.read_bytes().rindex(b",", 0, size) - 1 if share else 0
        cut(damaged, size)
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)Expected.*({NAMED[make]})"):
            read_all(data)


def test_images_that_vanish_while_training_are_named(tmp_path):
    damaged, data = image_folder(tmp_path)
    data.prepare_data()
    data.setup("fit")
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=r"train/a/3\.png"):
        torch.stack([images.sum() for images, _ in data.train_dataloader()])
