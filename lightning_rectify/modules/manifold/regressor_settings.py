"""What ``ManifoldRegressor`` accepts, and what it answers with."""

from typing import Any

from torch import Tensor

from lightning_rectify.arguments import check_choice, check_fraction, check_least
from lightning_rectify.modules.manifold.experts import EXPERTS


class ChartAnswers(dict[str, Tensor]):
    """Tensors by name, a row a point; its length is the number of points, as that of each of its tensors."""

    def __len__(self) -> int:
        return len(next(iter(self.values()))) if any(True for _ in self) else 0


def check(given: dict[str, Any]) -> None:
    """Refuse arguments of ``ManifoldRegressor`` that are out of their range."""
    check_least(0, **{name: given[name] for name in ("seed", "early_stopping", "anchor")})
    check_least(1, **{name: given[name] for name in ("in_features", "outputs", "cells", "hidden", "dispatch")})
    check_least(2, num_classes=given["num_classes"])
    dim, degree, radius = given["dim"], given["degree"], given["radius"]
    if dim != "auto" and (isinstance(dim, str) or not 1 <= dim <= given["in_features"]):
        raise ValueError(
            f"Expected argument `dim` to be 'auto' or in [1, {given['in_features']}], `in_features`, but got {dim!r}."
        )
    if degree != "auto" and (isinstance(degree, str) or degree < 0):
        raise ValueError(f"Expected argument `degree` to be 'auto' or at least 0 but got {degree!r}.")
    if radius != "auto" and (isinstance(radius, str) or not 0.0 < radius < float("inf")):
        raise ValueError(f"Expected argument `radius` to be 'auto' or a positive number but got {radius!r}.")
    check_fraction(dropout=given["dropout"])
    if given["dropout"] > 0 and given["expert"] in ("polynomial", "p1"):
        raise ValueError(f"Expected argument `dropout` to be 0 without expert 'mlp' but got {given['dropout']!r}.")
    words = {
        "expert": tuple(EXPERTS),
        "init": ("least_squares", "construction", "random"),
        "gate": ("frozen", "trained"),
        "outside": ("nearest", "mean"),
    }
    for name, allowed in words.items():
        check_choice(allowed, **{name: given[name]})
    if given["num_classes"] is not None and given["outputs"] != 1:
        raise ValueError(f"Expected argument `outputs` to be 1 with `num_classes` but got {given['outputs']!r}.")
