"""Spectrum control of any network: W = U diag(e) V^T in its layers, with penalties, projections and the way back.

The method of the GAN spectrum paper (arXiv:1812.10912, Jiang et al., ICLR 2019). Call ``spectral_control`` before the
optimizer is built (it replaces the weights by new parameters) and ``project`` once before training. A step is then: the
forward passes, the loss with ``spectral_penalty`` added and its backward pass, all within ``rebuilt_once``; the
optimizer's step; ``project``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_rectify.arguments import check_choice, check_types
from lightning_rectify.nn._factors import (
    Settings,
    at_least_float32,
    factor_tensors,
    factors_of,
    full_precision,
    gram_distance,
)
from lightning_rectify.nn._layers import (
    ORTHOGONAL_MARK,
    bake_layer,
    check_layers,
    factorize,
    has_spectral_norm,
    mark_orthogonal,
    upright,
)
from lightning_rectify.nn._matrices import MATRIX_LAYERS
from lightning_rectify.nn.controls import BASELINES, Control, resolve_controls
from lightning_rectify.nn.singular_values import weight_matrix

__all__ = [
    "bake",
    "controlled_layers",
    "matrix_layers",
    "orthogonality_error",
    "project",
    "rebuilt_once",
    "spectral_control",
    "spectral_penalty",
    "spectrum",
]

Start = Literal["weight", "ones", "spread"]
Module = TypeVar("Module", bound=nn.Module)


def spectral_control(
    module: Module,
    control: str | int | Control | Sequence[str | int | Control] = "d_optimal",
    *,
    start: Start = "weight",
    orthogonality: float = 10.0,
    retraction: int = 0,
    exclude: str | Sequence[str] = (),
) -> Module:
    r"""Put the spectra of a network's layers under control, in place.

    Every Linear and (transposed) convolution gets :math:`W = U\,\mathrm{diag}(e)\,V^\top` with trainable U, e and V
    (:class:`SpectralFactors`); embeddings and normalization layers stay as they are, and so do biases. W is the weight
    seen as a matrix with one row an output channel, so a first convolution of 3 x 3 x 3 inputs has 27 controlled values
    and, with more than 27 channels, further singular values that are 0. arXiv:1812.10912; the numbers are those of the
    authors' code. Layers under one call share their controls by identity, also in a deep copy.

    Args:
        module: any network; changed in place.
        control: what to do with the spectra. A preset by name or by its number in the authors' code: "normalization"
            (1), "constraint" (2), "lipschitz" (3), "divergence" (5, with the constraint), "d_optimal" (8, with
            normalization); a :class:`Control`; or a sequence of these. Or a baseline: "plain" (nothing),
            "spectral_norm" (torch's, one power iteration a forward) or "orthogonal" (orthogonal start, penalty
            ``orthogonality`` * :math:`\|WW^\top - I\|_F^2`, of :math:`W^\top W` where that is smaller; the authors
            split such a layer instead). Baselines take no ``start`` and no ``retraction``.
        start: "weight" decomposes the layer's own weight and reproduces it; "ones" is the paper's start, random
            orthonormal U and V and e = 1; "spread" the same with e at the quantiles of the control's reference law
            (:meth:`Control.quantiles`; else that of :class:`Divergence`), as equal values hold the divergence up.
        orthogonality: weight of :math:`\|U^\top U - I\|_F^2 + \|V^\top V - I\|_F^2` summed over layers, at least 0.
        retraction: 0, or take U and V back to orthonormal matrices (QR) at every so many calls of :func:`project`;
            there is no orthogonality penalty then. Ours.
        exclude: names of layers to leave out, or of modules with all that is in them; shell patterns such as
            "*.shortcut" are understood.

    Returns:
        The same module.

    Raises:
        ValueError: if an argument is out of its range, an ``exclude`` matches nothing, no layer is left, or a layer's
            weight is parametrized already, not initialized (lazy) or shared with another layer.

    Example:
        >>> critic = spectral_control(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)), start="ones")
        >>> {name: tuple(spectrum(layer).shape) for name, layer in controlled_layers(critic).items()}
        {'0': (4,), '2': (1,)}
    """
    check_types(spectral_control, locals())
    baseline = control if isinstance(control, str) and control in BASELINES else None
    controls = () if baseline else resolve_controls(control)
    check_choice(("weight", "ones", "spread"), start=start)
    if not 0.0 <= orthogonality < math.inf:
        raise ValueError(f"Expected argument `orthogonality` to be a finite number >= 0 but got {orthogonality!r}.")
    if isinstance(retraction, bool) or not isinstance(retraction, int) or retraction < 0:
        raise ValueError(f"Expected argument `retraction` to be an integer >= 0 but got {retraction!r}.")
    layers = matrix_layers(module, exclude)
    check_layers(module, layers)
    settings = Settings(controls, float(orthogonality), retraction)
    for layer in layers.values():
        if baseline is None:
            factorize(layer, settings, start)
        elif baseline == "spectral_norm":
            parametrizations.spectral_norm(layer)  # knows where a transposed convolution has its output channels
        elif baseline == "orthogonal":
            mark_orthogonal(layer, float(orthogonality))
    return module


def project(module: nn.Module) -> None:
    """Apply the controls' projections to the spectra of all controlled layers, in place and outside the graph.

    Call it once before training and after each optimizer step (the authors' code: before each forward, which is the
    same). With ``retraction=k``, every k-th call takes U and V back to orthonormal matrices, by QR with a positive
    diagonal. Deterministic: ranks that hold the same factors still do afterwards.

    Args:
        module: a network after :func:`spectral_control`; without controlled layers nothing happens.
    """
    for layer in controlled_layers(module).values():
        factors = factors_of(layer)
        assert factors is not None
        factors.project(*factor_tensors(layer))


def spectral_penalty(module: nn.Module) -> Tensor:
    r"""What to add to the loss for the controls of a network.

    .. math:: \lambda \sum_l \big(\|U_l^\top U_l - I\|_F^2 + \|V_l^\top V_l - I\|_F^2\big) + \sum_c R_c(e_1, \dots, e_L)

    with :math:`\lambda` the ``orthogonality`` (no such term with a retraction) and :math:`R_c` the penalty of control c
    over all its layers; and the penalty of the baseline "orthogonal". arXiv:1812.10912. In float32 or higher, also
    under autocast. It needs no forward pass; under DistributedDataParallel add it to the loss on every rank.

    Args:
        module: a network after :func:`spectral_control`.

    Returns:
        A scalar; a zero on the module's device if nothing is controlled.
    """
    terms: list[Tensor] = []
    groups: dict[int, tuple[Control, list[Tensor]]] = {}  # by identity: equal controls of two networks are two
    for layer in module.modules():
        if (factors := factors_of(layer)) is not None:
            u, e, v = factor_tensors(layer)
            settings = factors.settings
            if settings.orthogonality and not settings.retraction:
                terms.append(settings.orthogonality * (gram_distance(u) + gram_distance(v)))
            for control in settings.controls:
                groups.setdefault(id(control), (control, []))[1].append(at_least_float32(e))
        elif weight := getattr(layer, ORTHOGONAL_MARK, 0.0):
            terms.append(weight * gram_distance(upright(weight_matrix(layer))))
    for control, spectra in groups.values():
        with full_precision(spectra[0]):
            terms.append(control.penalty(spectra))
    if not terms:
        anchor = next(module.parameters(), None)
        return torch.zeros((), device=None if anchor is None else anchor.device)
    return torch.stack(terms).sum()


@torch.no_grad()
def orthogonality_error(layer: nn.Module) -> Tensor:
    r"""How far a layer's factors are from orthonormal: :math:`\|U^\top U - I\|_F^2 + \|V^\top V - I\|_F^2`.

    Of a layer under the baseline "orthogonal": :math:`\|WW^\top - I\|_F^2`, of :math:`W^\top W` where that is smaller.

    Args:
        layer: one of :func:`controlled_layers`, or a layer of the baseline.

    Returns:
        A detached scalar, without the penalty's weight.

    Raises:
        ValueError: if the layer is neither.
    """
    if hasattr(layer, ORTHOGONAL_MARK):
        return gram_distance(upright(weight_matrix(layer)))
    u, _, v = factor_tensors(layer)
    return gram_distance(u) + gram_distance(v)


@torch.no_grad()
def spectrum(layer: nn.Module) -> Tensor:
    """The controlled singular values of a layer, as its factor e says: ``|e|``, descending.

    The singular values of the weight itself (``singular_values(weight_matrix(layer))``) differ as far as U and V are
    not orthonormal.

    Args:
        layer: one of :func:`controlled_layers`.

    Returns:
        Shape (r,), detached.

    Raises:
        ValueError: if the layer is not controlled.
    """
    return factor_tensors(layer)[1].detach().abs().sort(descending=True).values


def controlled_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that have factors, by name and in the network's order.

    Args:
        module: any network; those of the baselines have none.

    Returns:
        Name to layer; the name is that of ``named_modules``.
    """
    return {name: layer for name, layer in module.named_modules() if factors_of(layer) is not None}


def matrix_layers(module: nn.Module, exclude: str | Sequence[str] = ()) -> dict[str, nn.Module]:
    """The layers that :func:`spectral_control` would take: Linear and (transposed) convolutions, by name.

    Args:
        module: any network, controlled or not.
        exclude: as in :func:`spectral_control`.

    Returns:
        Name to layer, in the network's order.

    Raises:
        ValueError: if an entry of ``exclude`` matches no module.
    """
    check_types(matrix_layers, locals())
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    unused = set(patterns)
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        parts = name.split(".")
        above = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        hits = {pattern for pattern in patterns if any(fnmatchcase(part, pattern) for part in above)}
        unused -= hits
        if isinstance(layer, MATRIX_LAYERS) and not hits:
            found[name] = layer
    if unused:
        raise ValueError(f"Expected argument `exclude` to name modules of the network but got {sorted(unused)}.")
    return found


@contextmanager
def rebuilt_once(module: nn.Module) -> Iterator[None]:
    """Within this context each controlled layer of a network rebuilds its weight once, not at each forward.

    For a step with several forward passes, D(real) and D(fake). The weight is rebuilt nevertheless where that is
    needed: after :func:`project`, an optimizer step or any other change of a factor, after a backward pass (which frees
    the weight's graph) and when the grad mode changes. So two losses that were computed from one weight must go through
    one backward pass, or the first must keep the graph. Other networks, and torch's spectral_norm, are not concerned;
    in a graph that torch.compile or torch.export traces, nothing is kept.

    Args:
        module: a network after :func:`spectral_control`.

    Yields:
        Nothing.
    """
    caches = [factors.cache for layer in module.modules() if (factors := factors_of(layer)) is not None]

    def forget(*_: object) -> None:
        for cache in caches:
            cache.drop()

    # torch's fused optimizers change parameters without counting it, so the cache cannot see their steps itself.
    handle = register_optimizer_step_post_hook(forget)
    for cache in caches:
        cache.depth += 1
    try:
        yield
    finally:
        handle.remove()
        for cache in caches:
            cache.depth -= 1
            if not cache.depth:
                cache.drop()


def bake(module: Module, inplace: bool = False) -> Module:
    """The same network with plain layers and plain weights, for inference and for use without this package.

    Controlled layers get U diag(e) V^T as their weight, those with torch's spectral_norm the normalized weight (of
    evaluation mode, without a further power iteration). Its state dict loads into the network as it was before
    :func:`spectral_control`.

    Args:
        module: a network after :func:`spectral_control`.
        inplace: change ``module`` itself; else a deep copy.

    Returns:
        The plain network; its outputs equal the controlled one's up to rounding.
    """
    module = module if inplace else deepcopy(module)
    for layer in list(module.modules()):
        layer.__dict__.pop(ORTHOGONAL_MARK, None)
        if factors_of(layer) is not None or has_spectral_norm(layer):
            bake_layer(layer)
    return module
