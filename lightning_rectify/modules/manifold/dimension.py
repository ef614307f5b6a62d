r"""The dimension of the manifold that points lie on: a number, and, as no number can be trusted alone, a curve.

Noise fills all D dimensions. It is seen at scales below its size, curvature above; the manifold's own dimension is the
plateau between. Where neighbours are nearer than the noise there is none, and :class:`DimensionWarning` says so.

Three estimators look at the neighbours of single points and pool what they see; other ones, such as those of
scikit-dimension, go in as ``estimator``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.modules.manifold.dimension_local import Method, Neighborhoods
from lightning_rectify.modules.manifold.geometry import MOST, checked_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEIGHBORS = {"local_pca": 30, "twonn": 2, "mle": 15}
_SCALES = {"local_pca": (8, 16, 32, 64, 128), "twonn": (2, 4, 8, 16, 32, 64), "mle": (2, 4, 8, 16, 32, 64)}
_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
_FINE, _COARSE, _CHANGE = 2, 16, 0.3  # scales that are compared, and the relative change that is too much


class DimensionWarning(UserWarning):
    """The estimated dimension depends on the scale it is looked at: noise, curvature or too few points."""


class Estimator(Protocol):
    """What scikit-dimension's estimators are: ``fit(X)`` with an array (N, D), then ``dimension_``."""

    def fit(self, X: Any) -> Any:
        """Look at points (N, D)."""
        ...


@dataclass(frozen=True)
class DimensionEstimate:
    """An estimate of the intrinsic dimension; ``float(estimate)`` is its value.

    Attributes:
        value: the estimate.
        low: lower end of the bootstrap's confidence interval.
        high: its upper end.
        method: how.
        neighbors: k.
        length: median distance to the k-th neighbour, the scale that was looked at.
    """

    value: float
    low: float
    high: float
    method: str
    neighbors: int
    length: float

    def __float__(self) -> float:
        return self.value

    @property
    def rounded(self) -> int:
        """The nearest integer, at least 1: d of charts."""
        return max(round(self.value), 1)


@dataclass(frozen=True)
class DimensionCurve:
    """Estimates over a scale, from fine to coarse.

    Attributes:
        method: how; the class name of a foreign estimator.
        neighbors: k of each estimate; of a share f of the points it is 2/f, as many of all points lie as near as two of
            the share.
        lengths: median distance to that neighbour, in the data's units.
        values: the estimates.
        low: lower ends of their confidence intervals.
        high: upper ends.
        confidence: of each interval by itself.
    """

    method: str
    neighbors: tuple[int, ...]
    lengths: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    confidence: float

    def change(self, fine: int = _FINE, coarse: int = _COARSE) -> float:
        """Relative change between the scales nearest to ``fine`` and ``coarse`` neighbours: |a - b| / min(a, b)."""
        a, b = (self.values[self._nearest(k)] for k in (fine, coarse))
        return _relative(a, b)

    def figure(self) -> "Figure":
        """The curve over the length scale with its band."""
        from lightning_rectify.modules.manifold.diagnostics_figure import dimension_figure

        return dimension_figure([self])

    def _nearest(self, k: int) -> int:
        return min(range(len(self.neighbors)), key=lambda i: abs(math.log(self.neighbors[i] / k)))


def intrinsic_dimension(
    points: Tensor,
    *,
    method: Method = "local_pca",
    neighbors: int | None = None,
    queries: int = 2000,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    warn: bool = True,
    most: int = MOST,
) -> DimensionEstimate:
    r"""Estimate the dimension d of the manifold near which points lie, at one scale.

    "local_pca": the largest gap :math:`(s_j + f)/(s_{j+1} + f)` in the spectrum of the local covariance, each as a
    share of its trace, averaged over points; f is a hundredth of :math:`s_1`, so that what is smaller counts as equal.
    Always an integer, the one of the three that noise moves least; it needs several times d neighbours. (Little,
    Maggioni and Rosasco, arXiv:1210.5783, look for such gaps over all scales; floor and averages are ours.)

    "twonn": :math:`\log(r_2/r_1)` is exponential with rate d, and its maximum likelihood estimate is
    :math:`(N - 1)/\sum_i \log(r_2/r_1)_i`, unbiased (Facco et al., Scientific Reports 7, 2017, who fit a line through
    the lower 90 % instead). With k neighbours, :math:`r_k/r_{k/2}` in place of :math:`r_2/r_1` (Denti et al.,
    arXiv:2104.13832), whose score is solved by bisection.

    "mle": Levina and Bickel (NeurIPS 2004): :math:`1/d` is the mean of :math:`\log(r_k/r_j)` over j < k, averaged over
    points before it is inverted (MacKay and Ghahramani's comment, 2005), without which small k are biased upward.

    Equal points count once. The interval is a bootstrap's over 50 pieces of the sample: neighbouring points share
    neighbours, and drawn one by one their intervals are a third too narrow (measured on the sphere, where these hold
    the truth 85 to 93 times of a nominal 95). It is that of chance alone: bias by curvature, edges, noise or few points
    (downward for large d) is not in it.

    Args:
        points: shape (N, D), float.
        method: see above.
        neighbors: k: at least 2, at least 3 for "local_pca"; 30, 2 and 15 if left out, fewer where there are no more.
        queries: points whose neighbours are looked at, drawn by ``seed``; their neighbours are sought among all.
        bootstrap: resamples, at least 0; without any the interval is the value.
        confidence: of the interval, in (0, 1).
        seed: of queries and resamples.
        warn: compare 2 and 16 neighbours, for "twonn" and "mle".
        most: numbers held at once, about.

    Raises:
        ValueError: if an argument is out of its range or fewer than 4 points differ.

    Warns:
        DimensionWarning: if the dimensions by the ratios of 2 and 16 neighbours differ by more than 30 %.

    Example:
        >>> t = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 6.28
        >>> circle = torch.stack([t.cos(), t.sin(), torch.zeros(500)], 1)
        >>> intrinsic_dimension(circle).rounded
        1
    """
    check_types(intrinsic_dimension, locals())
    check_least(0, seed=seed)
    check_least(1, most=most)
    _check(method, queries, bootstrap, confidence)
    least = 3 if method == "local_pca" else 2
    if neighbors is not None and (isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < least):
        raise ValueError(f"Expected argument `neighbors` to be an integer >= {least} but got {neighbors!r}.")
    local = Neighborhoods(points, max(neighbors or _NEIGHBORS[method], _COARSE if warn else 0), queries, seed, most)
    k = min(_NEIGHBORS[method], local.most) if neighbors is None else local.checked(neighbors)
    weights = local.resampled(bootstrap, seed)
    values = local.estimates(method, k, weights)
    if warn and method != "local_pca":
        once, coarse = weights[:1], min(_COARSE, local.most)
        _warn([local.estimates("twonn", scale, once).item() for scale in (_FINE, coarse)], coarse)
    low, high = _interval(values, confidence)
    return DimensionEstimate(values[0].item(), low, high, method, k, local.length(k))


def dimension_curve(
    points: Tensor,
    *,
    method: Method = "twonn",
    neighbors: Sequence[int] | None = None,
    estimator: Estimator | None = None,
    fractions: Sequence[float] | None = None,
    queries: int = 2000,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    warn: bool = True,
    most: int = MOST,
) -> DimensionCurve:
    r"""The estimated dimension as a curve over scale, with confidence bands.

    Our estimators vary the number of neighbours. A foreign ``estimator`` sees shares f of the points, whose neighbours
    are farther apart; its band is normal, from B random shares of which those of share f overlap, so that their
    variance is divided by 1 - f (of all points: the next share's, times that share). Only f below 1 resamples.

    Args:
        points: shape (N, D), float.
        method: see :func:`intrinsic_dimension`.
        neighbors: the scales, ascending; powers of 2 if left out.
        estimator: an object with scikit-dimension's ``fit`` and ``dimension_``, in place of ``method``.
        fractions: its scales, in (0, 1], descending; 1, 1/2, 1/4 and 1/8 if left out.
        queries: see :func:`intrinsic_dimension`.
        bootstrap: resamples; of an ``estimator``, a tenth as many shares, as each is a fit.
        confidence: of each interval by itself.
        seed: of queries, resamples and shares.
        warn: see below.
        most: numbers held at once, about.

    Raises:
        ValueError: if an argument is out of its range.

    Warns:
        DimensionWarning: if the estimates nearest to the scales of 2 and 16 neighbours differ by more than 30 %.

    Example:
        >>> x = torch.randn(800, 3, generator=torch.Generator().manual_seed(0))
        >>> curve = dimension_curve(x / x.norm(dim=1, keepdim=True), neighbors=[2, 8, 32])
        >>> [round(value) for value in curve.values]
        [2, 2, 2]
    """
    check_types(dimension_curve, locals())
    check_least(0, seed=seed)
    check_least(1, most=most)
    _check(method, queries, bootstrap, confidence)
    if estimator is not None:
        if not callable(getattr(estimator, "fit", None)):
            raise ValueError(f"Expected argument `estimator` to have a method `fit` but got {estimator!r}.")
        if neighbors is not None:
            raise ValueError(f"Expected argument `neighbors` to be None with `estimator` but got {neighbors!r}.")
        curve = _foreign_curve(points, estimator, fractions, bootstrap, confidence, seed, most)
    elif fractions is not None:
        raise ValueError(f"Expected argument `fractions` to be None without `estimator` but got {fractions!r}.")
    else:
        wanted = _SCALES[method] if neighbors is None else tuple(neighbors)
        least = 3 if method == "local_pca" else 2
        if not wanted or min(wanted) < least or list(wanted) != sorted(set(wanted)):
            raise ValueError(
                f"Expected argument `neighbors` to be ascending integers >= {least} but got {neighbors!r}."
            )
        local = Neighborhoods(points, max(wanted), queries, seed, most)
        scales = [k for k in wanted if k <= local.most] if neighbors is None else [local.checked(k) for k in wanted]
        weights = local.resampled(bootstrap, seed)
        found = [local.estimates(method, k, weights) for k in scales]
        bands = [_interval(values, confidence) for values in found]
        curve = DimensionCurve(
            method=method,
            neighbors=tuple(scales),
            lengths=tuple(local.length(k) for k in scales),
            values=tuple(values[0].item() for values in found),
            low=tuple(low for low, _ in bands),
            high=tuple(high for _, high in bands),
            confidence=confidence,
        )
    if warn and len(curve.values) > 1:
        ends = [curve._nearest(k) for k in (_FINE, _COARSE)]
        _warn([curve.values[i] for i in ends], curve.neighbors[ends[1]], curve.neighbors[ends[0]])
    return curve


def _foreign_curve(
    points: Tensor,
    estimator: Estimator,
    fractions: Sequence[float] | None,
    bootstrap: int,
    confidence: float,
    seed: int,
    most: int,
) -> DimensionCurve:
    """See :func:`dimension_curve`."""
    shares = tuple(_FRACTIONS if fractions is None else fractions)
    if not shares or not 0.0 < min(shares) <= max(shares) <= 1.0 or list(shares) != sorted(set(shares), reverse=True):
        raise ValueError(f"Expected argument `fractions` to descend within (0, 1] but got {fractions!r}.")
    points = checked_points(points)
    count = len(points)
    if round(min(shares) * count) < 4:
        raise ValueError(f"Expected argument `fractions` to leave 4 of {count} points but got {min(shares)}.")
    generator = torch.Generator().manual_seed(seed)

    def fitted(share: float) -> float:
        some = torch.randperm(count, generator=generator)[: round(share * count)]
        estimator.fit(points[some.to(points.device)].cpu().numpy())
        return float(estimator.dimension_)  # type: ignore[attr-defined]

    draws = [[fitted(f) for _ in range(1 if f == 1.0 else max(bootstrap // 10, 1))] for f in shares]
    values = [math.fsum(draw) / len(draw) for draw in draws]
    errors = [torch.tensor(draw).std().item() / math.sqrt(1.0 - f) if len(draw) > 1 else 0.0
              for draw, f in zip(draws, shares, strict=True)]  # fmt: skip
    if shares[0] == 1.0 and len(shares) > 1:
        errors[0] = errors[1] * math.sqrt(shares[1])
    width = math.sqrt(2.0) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    scales = [max(round(2.0 / f), 2) for f in shares]
    local = Neighborhoods(points, max(scales), 2000, seed, most)
    return DimensionCurve(
        method=type(estimator).__name__,
        neighbors=tuple(scales),
        lengths=tuple(local.length(min(k, local.most)) for k in scales),
        values=tuple(values),
        low=tuple(value - width * error for value, error in zip(values, errors, strict=True)),
        high=tuple(value + width * error for value, error in zip(values, errors, strict=True)),
        confidence=confidence,
    )


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    if len(values) == 1:
        return values[0].item(), values[0].item()
    tail = 0.5 * (1.0 - confidence)
    return values[1:].quantile(tail).item(), values[1:].quantile(1.0 - tail).item()


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(min(a, b), 1e-300)


def _warn(values: Sequence[float], coarse: int, fine: int = _FINE) -> None:
    if _relative(*values) > _CHANGE:
        warnings.warn(
            f"The dimension is {values[0]:.3g} at the scale of {fine} neighbours and {values[1]:.3g} at {coarse}: "
            "noise shows at small scales, curvature and edges at large ones. Look at the curve over scales, and trust "
            "a plateau only.",
            DimensionWarning,
            stacklevel=3,
        )


def _check(method: str, queries: int, bootstrap: int, confidence: float) -> None:
    check_choice(_NEIGHBORS, method=method)
    for name, value, low in (("queries", queries, 2), ("bootstrap", bootstrap, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"Expected argument `{name}` to be an integer >= {low} but got {value!r}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected argument `confidence` to be in (0, 1) but got {confidence!r}.")
