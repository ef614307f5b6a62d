"""A user's samples: arrays, or files of numbers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rectify.arguments import came

Source = str | os.PathLike[str] | Tensor | NDArray[Any]


def check_source(name: str, source: Any) -> None:
    """Refuse what is neither samples nor the name of a file.

    The data modules annotate such arguments with Any, as jsonargparse would read a file for the value of an argument
    that may be an object (a Tensor), and the command line would get a table's text in place of its name.

    Args:
        name: of the argument, for the message.
        source: what came; None passes.

    Raises:
        ValueError: for another type.
    """
    if source is not None and not isinstance(source, (str, os.PathLike, Tensor, np.ndarray)):
        raise ValueError(
            f"Expected argument `{name}` to be an array, a tensor or the path of a .npy or .csv file but got "
            f"{came(source)}."
        )


def read_samples(name: str, source: Source | None) -> Tensor:
    """Samples as a float32 tensor, shape (N, ...), numbers as (N, 1).

    Args:
        name: of the argument, for the message.
        source: a tensor or array, or a ``.npy`` or ``.csv`` file.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for another file, and samples that are none or not finite.
    """
    data: Any = source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix not in (".npy", ".csv"):
            raise ValueError(
                f"Expected argument `{name}` to be a .npy or .csv file, or an array, but got {str(path)!r}."
            )
        if not path.is_file():
            raise FileNotFoundError(f"Expected argument `{name}` to be a file but found none at {str(path)!r}.")
        data = _read_npy(name, path) if path.suffix == ".npy" else _read_csv(name, path)
    tensor = torch.as_tensor(data).detach().to(torch.float32)
    if tensor.ndim == 0 or len(tensor) == 0:
        raise ValueError(f"Expected argument `{name}` to hold samples, shape (N, ...), but got {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Expected argument `{name}` to be finite but got NaN or infinity among its values.")
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _read_npy(name: str, path: Path) -> NDArray[Any]:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"Expected argument `{name}` to be a whole .npy file of numbers but got {str(path)!r}: {error}"
        ) from error


def _read_csv(name: str, path: Path) -> NDArray[np.float64]:
    with path.open(encoding="utf-8", errors="replace") as file:  # loadtxt is to complain, with the file's name
        first = file.readline()
    if not first:
        raise ValueError(f"Expected argument `{name}` to be a file of numbers but got {str(path)!r}, which is empty.")
    try:
        [float(word) for word in first.split(",")]
        names = 0
    except ValueError:
        names = 1
    try:
        return np.loadtxt(path, delimiter=",", skiprows=names, ndmin=2)
    except ValueError as error:
        raise ValueError(
            f"Expected argument `{name}` to be a file of numbers but got {str(path)!r}: {error}"
        ) from error
