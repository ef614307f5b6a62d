"""The parametrization W = U diag(e) V^T of one layer: rebuilding, its inverse, projection, loading plain weights."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_rectify.nn._matrices import from_matrix, in_double, is_transposed, to_matrix
from lightning_rectify.nn.controls import Control

Factors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Settings:
    """What one call of ``spectral_control`` chose; its layers share the object, also after a deepcopy."""

    controls: tuple[Control, ...]
    orthogonality: float
    retraction: int


class SpectralFactors(nn.Module):
    r"""Parametrization of a weight by its factors, :math:`W = U\,\mathrm{diag}(e)\,V^\top` (arXiv:1812.10912).

    W is the weight as a matrix (out, in / groups * K), K the number of kernel positions, and r the smaller of its
    sides. U (out, r) and V (in / groups * K, r) are free parameters which a penalty or a retraction keeps orthonormal;
    then ``|e|`` (r,) are the singular values of W. In the layer's state dict U, e and V are
    ``parametrizations.weight.original0`` to ``original2``, and ``parametrizations.weight.0.projections`` counts the
    calls of ``project``. The authors' code stores U and V transposed.

    Args:
        layer: the layer whose ``weight`` is to be parametrized.
        settings: controls and weights, shared with the other layers of the network.
        start: U, e and V to begin with, if not those of the weight.
    """

    projections: Tensor

    def __init__(self, layer: nn.Module, settings: Settings, start: Factors | None = None) -> None:
        super().__init__()
        self._start = start  # until registration has taken it: saves the decomposition of a weight that is thrown away
        self.settings = settings
        self.shape = torch.Size(layer.weight.shape)  # type: ignore[arg-type]
        self.transposed = is_transposed(layer)
        self.groups: int = getattr(layer, "groups", 1)
        self.cache = RebuildCache()
        # A buffer: a resumed run must retract at the steps at which the uninterrupted run does.
        self.register_buffer("projections", torch.zeros((), dtype=torch.int64))

    def forward(self, u: Tensor, e: Tensor, v: Tensor) -> Tensor:
        """The weight in the layer's shape and the factors' dtype, computed in float32 or higher.

        Args:
            u: shape (out, r).
            e: shape (r,).
            v: shape (in / groups * K, r).

        Returns:
            The weight, in the layer's own shape.
        """
        if self.cache.depth and not torch.compiler.is_compiling():
            return self.cache.get(self._rebuild, (u, e, v))
        return self._rebuild(u, e, v)

    def _rebuild(self, u: Tensor, e: Tensor, v: Tensor) -> Tensor:
        with full_precision(u):
            matrix = (at_least_float32(u) * at_least_float32(e)) @ at_least_float32(v).T
        return from_matrix(matrix.to(u.dtype), self.shape, self.transposed, self.groups)

    def right_inverse(self, weight: Tensor) -> Factors:
        """The singular value decomposition of a weight, in float64 and rounded to the weight's dtype.

        The first call, which registration makes, returns the start instead if there is one.

        Args:
            weight: in the layer's own shape.

        Returns:
            U (out, r), e (r,) descending and V (in / groups * K, r).
        """
        if self._start is not None:
            start, self._start = self._start, None
            return start
        matrix = to_matrix(in_double(weight), self.transposed, self.groups)
        u, e, vh = torch.linalg.svd(matrix, full_matrices=False)
        return tuple(factor.to(weight).contiguous() for factor in (u, e, vh.mT))

    @torch.no_grad()
    def project(self, u: Tensor, e: Tensor, v: Tensor) -> None:
        """Retract U and V where it is their turn, then apply the controls' projections to e; in place."""
        self.cache.drop()
        self.projections += 1
        every = self.settings.retraction
        # With every = 1 the device need not be asked for the count.
        if every == 1 or (every > 1 and self.projections.item() % every == 0):
            for factor in (u, v):
                factor.copy_(orthonormalized(at_least_float32(factor)))
        for control in self.settings.controls:
            control.project(e)


class RebuildCache:
    """One rebuilt weight, for as long as nothing that it was made of has changed.

    It is let go when a factor is changed in place or replaced, when the grad mode changes, and when a gradient has
    passed through it, since its graph is freed then. Copies start empty: a weight with a graph cannot be copied.
    """

    def __init__(self) -> None:
        self.depth = 0  # open `rebuilt_once` blocks
        self._weight: Tensor | None = None
        self._made_of: tuple[Any, ...] = ()

    def get(self, rebuild: Any, factors: Factors) -> Tensor:
        if any(factor.is_inference() for factor in factors):  # these do not count their changes
            return rebuild(*factors)
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        made_of = (mode, *((id(factor), factor._version) for factor in factors))
        if self._weight is None or self._made_of[:-1] != made_of:
            self._weight = rebuild(*factors)
            # The factors themselves go along: an id means nothing once its tensor is gone.
            self._made_of = (*made_of, factors)
            if self._weight.requires_grad:
                self._weight.register_hook(self._used)
        return self._weight

    def drop(self) -> None:
        self._weight, self._made_of = None, ()

    def _used(self, gradient: Tensor) -> None:
        self.drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RebuildCache":
        return RebuildCache()


class _GramDistance(torch.autograd.Function):
    """``||A^T A - I||_F^2``; autograd alone would multiply by the large matrix once more on the way back."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:  # a separate setup_context costs 50 us a call
        gram = a.T @ a
        gram.diagonal().sub_(1.0)
        ctx.save_for_backward(a, gram)
        return gram.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        a, gram = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: the saved matrix has no graph
            gram = a.T @ a - torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        return (4.0 * gradient) * (a @ gram)


def gram_distance(a: Tensor) -> Tensor:
    """``||A^T A - I||_F^2`` of a matrix, in float32 or higher."""
    with full_precision(a):
        distance: Tensor = _GramDistance.apply(at_least_float32(a))
    return distance


def orthonormalized(a: Tensor) -> Tensor:
    """The Q of the QR decomposition with positive diagonal of R, so that an orthonormal matrix stays what it is."""
    q, r = torch.linalg.qr(a)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)


def semi_orthogonal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A uniformly random matrix with orthonormal columns (rows, if those are fewer), from torch's CPU generator."""
    q = orthonormalized(torch.randn(max(shape), min(shape), dtype=torch.float64))
    return (q if shape[0] >= shape[1] else q.T).to(like).contiguous()


def factors_of(layer: nn.Module) -> SpectralFactors | None:
    """The layer's parametrization, if it is ours."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return first if isinstance(first, SpectralFactors) else None


def factor_tensors(layer: nn.Module) -> Factors:
    """U, e and V of a layer; ValueError if it has none."""
    if factors_of(layer) is None:
        raise ValueError(f"Expected argument `layer` to be a layer under spectral control but got {layer!r}.")
    held: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return held.original0, held.original1, held.original2


def load_plain_weight(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """State dict hook of a controlled layer: a plain ``weight`` becomes U, e and V."""
    factors, stem = factors_of(layer), f"{prefix}parametrizations.weight."
    weight = state_dict.get(f"{prefix}weight")
    if factors is None or weight is None or f"{stem}original0" in state_dict:
        return
    if weight.shape != factors.shape:
        error_msgs.append(
            f"size mismatch for {prefix}weight: the checkpoint has {tuple(weight.shape)}, the layer "
            f"{tuple(factors.shape)}."
        )
        return
    del state_dict[f"{prefix}weight"]
    for index, factor in enumerate(factors.right_inverse(weight)):
        state_dict[f"{stem}original{index}"] = factor
    state_dict[f"{stem}0.projections"] = torch.zeros_like(factors.projections)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the tensor's device: in bfloat16 an orthonormal U would be off by 1e-3."""
    kind = tensor.device.type
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.6 cannot follow it.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if its precision is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
