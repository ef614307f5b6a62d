"""How each domain's images are read: digits in four layouts, folders of images, and MNIST-M made from photographs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_rectify.data.image_datasets import resize
from lightning_rectify.data.image_sources import SOURCES, folder, in_memory, open_image, open_part

Images = tuple[Tensor, Tensor]

#: name -> channels
DOMAINS = {"digits": 1, "digits_turned": 1, "mnist": 1, "usps": 1, "svhn": 3, "mnist_m": 3, "image_folder": 3}
ANGLE, LOW, HIGH = 20.0, 0.1, 0.8
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_PHOTOS = "a folder of photographs, each at least 28 pixels high and wide"


def read_domain(
    name: str, root: str | None, test: bool, size: int, margin: int = 0, photos: str | None = None
) -> Images:
    """One part of a domain: images, uint8, shape (N, C, S, S), and labels, int64, (N,).

    Args:
        name: of :data:`DOMAINS`.
        root: folder of its data; not used for the embedded digits.
        test: which part.
        size: S, the side images are brought to, bilinear with antialias.
        margin: black pixels on each side, within S.
        photos: of "mnist_m": :func:`blend_with_photos` of MNIST in ``root``; None for the ready files.

    Raises:
        FileNotFoundError: if the data is not there.
        ValueError: for photographs that are none.
    """
    scale = 255.0
    if name in ("digits", "digits_turned"):
        images, labels = _half_of_the_digits(name == "digits_turned", test)
        scale = SOURCES["digits"].scale
    elif name == "image_folder":
        images, labels = _read_folder(root or "", test, size - 2 * margin)
    elif name == "mnist_m" and photos is None:
        images, labels = _read_mnist_m(Path(root or ""), test)
    elif name == "mnist_m":
        images, labels = in_memory(SOURCES["mnist"], root, test)
        images = blend_with_photos(images, read_photos(photos or ""), seed=int(test))
    else:
        images, labels = in_memory(SOURCES[name], root, test)
    images = F.pad(resize(images, size - 2 * margin, scale), [margin] * 4)
    return (turned(images) if name == "digits_turned" else images), labels


def turned(images: Tensor, angle: float = ANGLE, low: float = LOW, high: float = HIGH) -> Tensor:
    """Images turned counter-clockwise, blurred (3x3, 1-2-1) and faded: black becomes ``low``, white ``high``.

    Args:
        images: uint8, shape (N, C, S, S).
        angle: degrees.
        low: in [0, 1].
        high: in [0, 1].

    Returns:
        uint8, the same shape.

    Example:
        >>> turned(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8))[0, 0, 4, 4]
        tensor(204, dtype=torch.uint8)
    """
    radians, channels = math.radians(angle), images.shape[1]
    matrix = torch.tensor([[math.cos(radians), -math.sin(radians), 0.0], [math.sin(radians), math.cos(radians), 0.0]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), False)
    pixels = F.grid_sample(images.float() / 255.0, grid, align_corners=False)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4.0
    kernel = (kernel[:, None] * kernel).expand(channels, 1, 3, 3)
    pixels = F.conv2d(pixels, kernel, padding=1, groups=channels)
    return (255.0 * (low + (high - low) * pixels)).round_().clamp_(0, 255).to(torch.uint8)


def blend_with_photos(digits: Tensor, photos: Sequence[NDArray[np.uint8]], seed: int) -> Tensor:
    r"""MNIST-M's recipe (Ganin and Lempitsky 2015, arXiv:1409.7495): :math:`|\text{photo} - \text{digit}|`.

    Each digit gets one place in one photograph, both uniform; the channels of the photograph are taken as they are.

    Args:
        digits: uint8, shape (N, 1, H, W).
        photos: uint8, (height, width, 3) each, at least H and W.
        seed: of the places.

    Returns:
        uint8, shape (N, 3, H, W).

    Raises:
        ValueError: without photographs that are large enough.
    """
    height, width = digits.shape[-2:]
    large = [photo for photo in photos if photo.shape[0] >= height and photo.shape[1] >= width]
    if not large:
        raise ValueError(f"Expected argument `photos` to be {_PHOTOS}, but got {len(photos)}, none as large.")
    generator = np.random.default_rng(seed)
    choices = generator.integers(len(large), size=len(digits))
    places = generator.random((len(digits), 2))
    blended = np.empty((len(digits), height, width, 3), dtype=np.uint8)
    for i, (choice, place) in enumerate(zip(choices, places, strict=True)):
        photo = large[choice]
        row = int(place[0] * (photo.shape[0] - height + 1))
        column = int(place[1] * (photo.shape[1] - width + 1))
        patch = photo[row : row + height, column : column + width].astype(np.int16)
        blended[i] = np.abs(patch - digits[i, 0].numpy().astype(np.int16)[..., None])
    return torch.from_numpy(blended).permute(0, 3, 1, 2).contiguous()


def read_photos(path: str) -> list[NDArray[np.uint8]]:
    """All images in a folder and below, as RGB, uint8, (height, width, 3), in the order of their names.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise FileNotFoundError(f"Expected argument `photos` to be {_PHOTOS}, but found none in {path!r}.")
    return [np.asarray(open_image(file), dtype=np.uint8) for file in files]


def count_classes(name: str, root: str | None) -> int:
    """Classes K of a domain; of an image folder, those in ``root/train``."""
    return len(open_part(SOURCES["image_folder"], root or "", test=False).classes) if name == "image_folder" else 10


def _half_of_the_digits(turned_ones: bool, test: bool) -> Images:
    """Of the training part one half a domain, so that no image is in both; of the test part all."""
    images, labels = in_memory(SOURCES["digits"], None, test)
    if test:
        return images, labels
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    rows = order[len(order) // 2 :] if turned_ones else order[: len(order) // 2]
    return images[rows], labels[rows]


def _read_folder(root: str, test: bool, size: int) -> Images:
    """An image folder in memory; without classes below ``root/train`` the images lie there themselves, label -1."""
    path = folder(root, test)
    if not path.is_dir():
        raise FileNotFoundError(f"Expected argument `root` to be a folder that holds {path.name} but got {root!r}.")
    if any(entry.is_dir() for entry in path.iterdir()):
        part: Any = open_part(SOURCES["image_folder"], root, test)
        files = [(Path(file), label) for file, label in part.samples]
    else:
        files = [(file, -1) for file in sorted(path.iterdir()) if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise FileNotFoundError(f"Expected argument `root` to hold images in {str(path)!r} but found none.")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (file, _) in enumerate(files):
        images[i] = resize(_decode(file), size)[0]
    return images, torch.tensor([label for _, label in files])


def _read_mnist_m(root: Path, test: bool) -> Images:
    """Its authors' layout: ``mnist_m/mnist_m_train/*.png`` and ``mnist_m/mnist_m_train_labels.txt``; so the test."""
    part = "mnist_m_test" if test else "mnist_m_train"
    list_ = root / "mnist_m" / f"{part}_labels.txt"
    if not list_.is_file():
        raise FileNotFoundError(
            f"Expected argument `root` to be a folder that holds mnist_m/{part}_labels.txt but found none in "
            f"{str(root)!r}; with `photos`, MNIST-M is made from MNIST."
        )
    lines = [line.split() for line in list_.read_text(encoding="utf-8").splitlines() if line.strip()]
    images = torch.cat([_decode(list_.parent / part / name) for name, _ in lines])
    return images, torch.tensor([int(label) for _, label in lines])


def _decode(file: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(file), dtype=np.uint8)).permute(2, 0, 1)[None]
