"""What a discriminator's spectra are held to: projections and penalties on the factor e of W = U diag(e) V^T.

The controls of the GAN spectrum paper (arXiv:1812.10912), as small objects that can be put together. The formulas and
weights are those of the authors' code (``--udvmode`` 1, 2, 3, 5, 8), with its loss weights 10 * 0.1 multiplied in. All
penalties speak of ``|e|``, where the authors' code takes the logarithm of ``e`` itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rectify.arguments import check_above, check_least, check_types

_SMALLEST = 1e-7  # values are clamped here before a logarithm, as in the spacings of the authors' code
_GRID = 20_001  # points on [0, 1] for the quantiles of a law given by its log-density


class Control:
    """Base of all controls: a projection of each spectrum, a penalty on all of them, either or both.

    A subclass overrides :meth:`project`, :meth:`penalty` or both; a control must keep no tensors of its own.
    """

    def project(self, e: Tensor) -> None:
        """Move one layer's spectrum into the allowed set, in place and outside the graph; by default nothing.

        Args:
            e: signed singular values of one layer, shape (r,).
        """

    def penalty(self, spectra: Sequence[Tensor]) -> Tensor:
        """What to add to the loss for the spectra of the whole network; by default zero.

        Args:
            spectra: signed singular values, one tensor of shape (r,) for each controlled layer; at least one.

        Returns:
            A scalar.
        """
        return spectra[0].new_zeros(())

    def quantiles(self, count: int) -> Tensor | None:
        """Where this control would have a spectrum start under ``start="spread"``; by default it does not say.

        Args:
            count: number of singular values.

        Returns:
            Shape (count,), float64, descending, in (0, 1]; or None.
        """
        return None


@dataclass(frozen=True)
class SpectralNormalization(Control):
    r"""Each layer's largest singular value is 1: :math:`e \leftarrow e / \max_k |e_k|`.

    Mode 1 of the authors' code: a projection, so no gradient flows through the maximum. A spectrum of zeros is left.
    """

    def project(self, e: Tensor) -> None:
        """Divide by the largest absolute value."""
        largest = e.abs().max()
        e.div_(torch.where(largest > 0, largest, 1.0))


@dataclass(frozen=True)
class SpectralConstraint(Control):
    r"""Each singular value is at most a bound: :math:`e_k \leftarrow \min(\max(e_k, -b), b)`.

    Mode 2 of the authors' code, there with b = 1.

    Args:
        bound: b, positive.

    Raises:
        ValueError: if ``bound`` is not positive.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        check_types(SpectralConstraint, vars(self))
        check_above(0, bound=self.bound)

    def project(self, e: Tensor) -> None:
        """Clip to [-bound, bound]."""
        e.clamp_(-self.bound, self.bound)


@dataclass(frozen=True)
class LipschitzRegularizer(Control):
    r"""The product of all layers' norms is drawn to at most 1: :math:`w\,[\sum_l \log \max_k |e_{l,k}|]_+`.

    Mode 3 of the authors' code. There only the CNN discriminator has the term (the ResNet runs under this name train
    with no penalty); here it is the same for every network. The sum goes over all controlled layers, shortcuts of
    residual blocks too: a surrogate there, not a bound on the network.

    Args:
        weight: w, at least 0.

    Raises:
        ValueError: if ``weight`` is negative or not finite.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(LipschitzRegularizer, vars(self))
        check_least(0, weight=self.weight)

    def penalty(self, spectra: Sequence[Tensor]) -> Tensor:
        """One hinge for the whole network."""
        logs = torch.stack([e.abs().max().clamp_min(_SMALLEST).log() for e in spectra])
        return self.weight * torch.relu(logs.sum())


@dataclass(frozen=True)
class DOptimal(Control):
    r"""Slow decay: :math:`-w \sum_l \frac{1}{r_l} \sum_k \log |e_{l,k}|`, the log-determinant of D-optimal designs.

    The penalty of mode 8 of the authors' code; it needs :class:`SpectralNormalization` or another bound beside it, as
    it grows all values. ``|e|`` is clamped at 1e-7.

    Args:
        weight: w, at least 0.

    Raises:
        ValueError: if ``weight`` is negative or not finite.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(DOptimal, vars(self))
        check_least(0, weight=self.weight)

    def penalty(self, spectra: Sequence[Tensor]) -> Tensor:
        """Mean within a layer, sum over layers."""
        means = torch.stack([e.abs().clamp_min(_SMALLEST).log().mean() for e in spectra])
        return -self.weight * means.sum()


@dataclass(frozen=True)
class Divergence(Control):
    r"""The law of each layer's singular values is drawn to a reference law q.

    .. math:: w \sum_l \frac{1}{r_l-1} \sum_{k=1}^{r_l-1} \Big[-\log q(e_k) - \log(e_{k+1} - e_k + \epsilon)\Big],
              \qquad e_1 \le \dots \le e_{r_l}

    The Kullback-Leibler divergence of the spectrum from q up to a constant, its entropy estimated by the spacings
    (arXiv:1812.10912; mode 5 of the authors' code, which puts :class:`SpectralConstraint` beside it). The reference is
    half-normal, hanging down from 1: :math:`-\log q(e) = (1 - e)^2/s^2` as in the code, without the 1/2 of a normal
    density, so that its standard deviation is :math:`s/\sqrt 2`. Layers with one value are skipped.

    Args:
        weight: w, at least 0. 0.05 is the code's.
        scale: s, positive; not used with a ``reference``.
        reference: log-density of another q, up to a constant: takes (r - 1,) values and returns as many.
        spacing: epsilon, positive. The code's is 1e-7; at equal values its gradient is then 1e7, after which Adam does
            not move e for thousands of steps, so the default is larger.

    Raises:
        ValueError: if ``weight`` is negative, or ``scale`` or ``spacing`` not positive, or one of them not finite.
    """

    weight: float = 0.05
    scale: float = 0.1
    reference: Callable[[Tensor], Tensor] | None = None
    spacing: float = 1e-4

    def __post_init__(self) -> None:
        check_types(Divergence, vars(self))
        check_least(0, weight=self.weight)
        check_above(0, scale=self.scale, spacing=self.spacing)

    def penalty(self, spectra: Sequence[Tensor]) -> Tensor:
        """Mean within a layer, sum over layers."""
        total = spectra[0].new_zeros(())
        for e in spectra:
            if e.numel() > 1:
                ascending = e.abs().sort().values
                gaps = ascending.diff()
                total = total - (self._log_density(ascending[:-1]) + (gaps + self.spacing).log()).mean()
        return self.weight * total

    def quantiles(self, count: int) -> Tensor:
        """Quantiles (k - 1/2) / count of the reference law on [0, 1]; a single value starts at 1."""
        if count == 1:
            return torch.ones(1, dtype=torch.float64)
        levels = (torch.arange(count, 0, -1, dtype=torch.float64) - 0.5) / count
        if self.reference is None:
            within = math.erf(1.0 / self.scale)  # the law's mass on [0, 1]
            return 1.0 - self.scale * torch.erfinv((1.0 - levels) * within)
        grid = torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64)
        log_density = self.reference(grid).detach()
        density = (log_density - log_density[log_density.isfinite()].max()).exp()
        below = torch.cumulative_trapezoid(density, grid)
        index = torch.searchsorted(below, levels * below[-1]).clamp_max(_GRID - 2)
        return grid[index + 1]

    def _log_density(self, e: Tensor) -> Tensor:
        if self.reference is not None:
            return self.reference(e)
        return -((1.0 - e) / self.scale).square()


BASELINES = ("plain", "spectral_norm", "orthogonal")
# The number is the authors' `--udvmode`.
PRESETS: dict[str, tuple[int, tuple[Control, ...]]] = {
    "normalization": (1, (SpectralNormalization(),)),
    "constraint": (2, (SpectralConstraint(),)),
    "lipschitz": (3, (LipschitzRegularizer(),)),
    "divergence": (5, (SpectralConstraint(), Divergence())),
    "d_optimal": (8, (SpectralNormalization(), DOptimal())),
}


def resolve_controls(control: object) -> tuple[Control, ...]:
    """The controls that the argument ``control`` of ``spectral_control`` means; each call makes its own objects.

    Args:
        control: a preset's name or number, a :class:`Control`, or a sequence of these.

    Returns:
        The controls, in order.

    Raises:
        ValueError: for anything else.
    """
    return tuple(_flattened(control))


def _flattened(control: object) -> Iterator[Control]:
    if isinstance(control, Control):
        yield control
    elif isinstance(control, str | int) and not isinstance(control, bool):
        for name, (number, controls) in PRESETS.items():
            if control in (name, number):
                yield from map(copy, controls)  # identity says which layers belong together
                return
        known = ", ".join(f"{name!r} ({number})" for name, (number, _) in PRESETS.items())
        raise ValueError(
            f"Expected argument `control` to be one of {known}, a baseline of {BASELINES} by itself or a Control but "
            f"got {control!r}."
        )
    elif isinstance(control, Sequence) and control:
        for part in control:
            yield from _flattened(part)
    else:
        raise ValueError(
            f"Expected argument `control` to be a name, a number, a Control or a sequence of these but got {control!r}."
        )
