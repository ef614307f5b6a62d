"""What is known about each image dataset, and how its two parts are read."""

import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rectify.data.image_datasets import stratified_take

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageSource:
    """One dataset: its constants, and where it lies.

    Attributes:
        num_classes: None if they are counted on disk.
        in_channels: of an image.
        image_size: side of the square images; for images on disk, the side they are brought to by default.
        mean: of each channel over the training part, for pixels in 0 to 1.
        std: the same.
        augment: whether training images are augmented unless the user says otherwise.
        flip: whether a mirror image still is one of its class.
        scale: value of a fully lit pixel.
        torchvision: class in ``torchvision.datasets``; None for the embedded digits.
        path: below ``root``, what must be there.
        options: arguments of the class for the training and for the test part.
        downloads: whether torchvision can fetch it.
    """

    num_classes: int | None
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    flip: bool = False
    scale: float = 255.0
    torchvision: str | None = None
    path: str = ""
    options: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
    downloads: bool = True

    @property
    def on_disk(self) -> bool:
        """Whether images are read from files one by one."""
        return self.torchvision in ("ImageNet", "ImageFolder")


# How the readers of torchvision stumble over a file that is not what it should be.
_DAMAGED = (EOFError, ValueError, AssertionError, LookupError, TypeError, pickle.UnpicklingError, zlib.error)

_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})

SOURCES: dict[str, ImageSource] = {
    "digits": ImageSource(10, 1, 8, (0.306,), (0.377,), scale=16.0, downloads=False),
    "cifar10": ImageSource(
        10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, True,
        torchvision="CIFAR10", path="cifar-10-batches-py",
    ),
    "cifar100": ImageSource(
        100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, True,
        torchvision="CIFAR100", path="cifar-100-python",
    ),
    "mnist": ImageSource(10, 1, 28, (0.1307,), (0.3081,), torchvision="MNIST", path="MNIST/raw"),
    "fashion_mnist": ImageSource(
        10, 1, 28, (0.2860,), (0.3530,), flip=True, torchvision="FashionMNIST", path="FashionMNIST/raw"
    ),
    "kmnist": ImageSource(10, 1, 28, (0.1918,), (0.3483,), torchvision="KMNIST", path="KMNIST/raw"),
    "svhn": ImageSource(
        10, 3, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970),
        torchvision="SVHN", path="train_32x32.mat and test_32x32.mat", options=_SPLIT,
    ),
    "stl10": ImageSource(
        10, 3, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), flip=True,
        torchvision="STL10", path="stl10_binary", options=_SPLIT,
    ),
    # With the constants of the labelled images, so that a network fits both.
    "stl10_unlabeled": ImageSource(
        10, 3, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), flip=True,
        torchvision="STL10", path="stl10_binary", options=({"split": "train+unlabeled"}, {"split": "test"}),
    ),
    "usps": ImageSource(10, 1, 16, (0.2539,), (0.3842,), torchvision="USPS", path="usps.bz2 and usps.t.bz2"),
    "imagenet": ImageSource(
        1000, 3, 224, *_IMAGENET, True, True, torchvision="ImageNet", options=({"split": "train"}, {"split": "val"}),
        path="train, val and ILSVRC2012_devkit_t12.tar.gz", downloads=False,
    ),
    "image_folder": ImageSource(
        None, 3, 224, *_IMAGENET, flip=True, torchvision="ImageFolder", downloads=False,
        path="train/CLASS/IMAGE and test/CLASS/IMAGE (or val/CLASS/IMAGE)",
    ),
}  # fmt: skip


def folder(root: str, test: bool) -> Path:
    """Where an ``image_folder`` keeps its training part, or its test part (``test``, else ``val``)."""
    if not test:
        return Path(root) / "train"
    return next((path for name in ("test", "val") if (path := Path(root) / name).is_dir()), Path(root) / "test")


def open_image(file: str | Path) -> Any:
    """An image file as a PIL image in RGB, all of it decoded.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is damaged, or no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # PIL calls a damaged PNG a syntax error
        raise ValueError(
            f"Expected {str(file)!r} to be a whole image file but got: {error}. Put a good copy in its place."
        ) from error


def open_part(source: ImageSource, root: str, test: bool, download: bool = False) -> Any:
    """The training or the test part as a torchvision dataset.

    Args:
        source: anything but the digits.
        root: folder that holds the data.
        test: which part.
        download: fetch it if it is missing and torchvision can.

    Raises:
        FileNotFoundError: if the data is not there.
        ValueError: if a file is damaged.
    """
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, source.torchvision or "")
    options: dict[str, Any] = {"loader": open_image} if source.on_disk else {}
    try:
        if source.torchvision == "ImageFolder":
            return make(str(folder(root, test)), **options)
        # ImageNet's class is the one that has no argument `download`.
        options |= {"download": True} if download and source.downloads else {}
        return make(root, **source.options[test], **options)
    except _DAMAGED as error:
        raise ValueError(
            f"Expected argument `root` to be a folder that holds {source.path} but a file of it in "
            f"{str(Path(root).absolute())!r} is cut short or damaged ({type(error).__name__}: {error}). Put a good "
            f"copy of {source.torchvision} there."
        ) from error
    except (RuntimeError, OSError) as error:
        if download:
            raise  # no network, a full disk: not for us to explain
        hint = ", or pass `download=True`" if source.downloads else ""
        raise FileNotFoundError(
            f"Expected argument `root` to be a folder that holds {source.path} but found no usable data in "
            f"{str(Path(root).absolute())!r} ({error}). Put {source.torchvision} there, in place of what may be "
            f"damaged{hint}."
        ) from error


def in_memory(source: ImageSource, root: str | None, test: bool) -> tuple[Tensor, Tensor]:
    """Images of one part, uint8 (N, C, H, W), and labels, int64 (N,); a label of -1 means none.

    Args:
        source: a dataset that is not ``on_disk``.
        root: folder that holds the data; not used for the embedded digits.
        test: which part.
    """
    if source.torchvision is None:
        return _digits(test)
    part = open_part(source, root or "", test)
    images = torch.as_tensor(part.data)
    labels = torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets, dtype=torch.int64)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == source.in_channels:  # CIFAR keeps channels last
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), labels


def _digits(test: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits; 359 of them are the test part, the same ones whatever the user's seed.

    A test part that changed with the seed would hold images on which another seed's settings were chosen.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    index = stratified_take(labels, size=round(0.2 * len(labels)), seed=0)[test]
    return images[index], labels[index]
