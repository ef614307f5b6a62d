"""A bridge to AutoAttack's own package, for numbers that others can compare with."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rectify.arguments import check_types
from lightning_rectify.attacks.ball import Norm
from lightning_rectify.attacks.common import Model, attacking, logits_of, modules_of, prepare
from lightning_rectify.attacks.losses import check_labels

_PACKAGES = ("autoattack", "pyautoattack")  # the authors' repository, and the same code on the package index


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    norm: Norm = "linf",
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """AutoAttack of Croce and Hein (arXiv:2003.01690) as its authors wrote it; needs the extra ``attacks``.

    The package itself takes pixels in [0, 1] and leaves the model's modes alone; here the model is treated as in
    :func:`lightning_rectify.attacks.pgd`, other bounds are scaled, and with fewer than ten classes the targeted attacks
    take all the wrong ones. torch's random state is as before.

    Args:
        model: from images (N, C, H, W) in pixel units to logits (N, K); normalization is inside it.
        images: inside ``bounds``, shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,), int64.
        epsilon: radius of the ball in pixel units, at least 0, in linf at most the width of ``bounds``.
        norm: "linf" or "l2".
        version: "standard" (APGD-CE, targeted APGD-DLR, targeted FAB, Square), "plus", "rand", or "custom" with
            ``attacks``.
        attacks: with "custom", which of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square" to run.
        batch_size: images a forward pass.
        seed: of its random numbers.
        bounds: least and largest pixel value.

    Returns:
        Adversarial images (N, C, H, W), detached; inside the ball and the bounds exactly. A sample that no attack
        breaks comes back unchanged.

    Raises:
        ImportError: if AutoAttack is not installed.
        ValueError: for an argument out of its range, naming it.
    """
    check_types(autoattack, locals())
    if (version == "custom") != bool(attacks):
        raise ValueError(
            f"Expected argument `attacks` to be names with version 'custom', and only then, but got {attacks!r} with "
            f"{version!r}."
        )
    if version not in ("standard", "plus", "rand", "custom"):
        raise ValueError(f"Expected argument `version` to be standard, plus, rand or custom but got {version!r}.")
    low, width = bounds[0], bounds[1] - bounds[0]
    tracer = sys.gettrace()  # its check for optimization at inference sets one of its own
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        with attacking(*modules_of(model)), torch.random.fork_rng(devices):
            ball, labels = prepare(images, labels, epsilon, norm, bounds)

            def scaled(unit: Tensor) -> Tensor:
                # Rounding may carry a pixel over its bound by a bit.
                return logits_of(model, (low + unit * width).clamp(*bounds) if bounds != (0.0, 1.0) else unit)

            unit = ((ball.images - low) / width).clamp(0.0, 1.0)
            with torch.no_grad():
                wrong_classes = scaled(unit).shape[1] - 1
            check_labels(labels, wrong_classes + 1)
            attack = _configured(_imported(), scaled, epsilon / width, norm, version, attacks, seed, str(unit.device))
            for name in ("fab", "apgd_targeted"):
                part = getattr(attack, name)
                part.n_target_classes = min(part.n_target_classes, wrong_classes)
            found = _run(attack, unit, labels, batch_size)
            moved = ball.project((low + found.to(unit) * width) if bounds != (0.0, 1.0) else found.to(unit))
            changed = (found.to(unit) != unit).flatten(1).any(1)[:, None, None, None]
            return torch.where(changed, moved, ball.images).detach()
    finally:
        sys.settrace(tracer)


def _imported() -> Any:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name).AutoAttack
        except ImportError:
            continue
    raise ImportError(
        "Expected AutoAttack's package to be installed: pip install 'lightning-rectify[attacks]'. Without it, `apgd` "
        "with the losses ce and dlr_targeted and `square` are the same kinds of attack."
    )


def _configured(
    build: Any,
    model: Model,
    epsilon: float,
    norm: Norm,
    version: str,
    attacks: Sequence[str] | None,
    seed: int,
    device: str,
) -> Any:
    known = inspect.signature(build).parameters
    named = {"norm": "Linf" if norm == "linf" else "L2", "eps": epsilon, "version": version, "seed": seed}
    # The two packages differ in names.
    chosen = {"attacks" if "attacks" in known else "attacks_to_run": list(attacks)} if attacks else {}
    quiet = {"verbose": False} if "verbose" in known else {}
    return build(model, device=device, **named, **chosen, **quiet)


def _run(attack: Any, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    run = attack.run_standard_evaluation
    size = "batch_size" if "batch_size" in inspect.signature(run).parameters else "bs"
    found = run(images, labels, **{size: batch_size})
    return found[0] if isinstance(found, tuple) else found
