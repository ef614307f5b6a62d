r"""The variance of the adaptive rate over streams, coordinate by coordinate.

For a coordinate with second moments :math:`v_t^{(s)}` in streams :math:`s = 1..S` the adaptive rate is
:math:`\psi_t^{(s)} = 1/\sqrt{\hat v_t^{(s)}}` (RAdam paper, arXiv:1908.03265, section 3). Its relative variance over
streams, :math:`\mathrm{Var}[\psi_t]/E[\psi_t]^2`, and the variance of its logarithm do not depend on the scale of the
gradient, nor on eps-free bias correction, so coordinates can be compared, and a median taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rectify.optim.variance import log_adaptive_rate_variance, relative_variance, variance_matched_length

_IDEAL_COORDINATES = 4096  # the median's standard error is about 0.7 %


class StreamVariance:
    r"""Runs the second moment of S streams and measures its spread over them.

    Args:
        sizes: sampled coordinates of each of L layers; n together.
        weights: by how many real coordinates each sampled one counts in the median of the whole, one number a layer.
        streams: number of streams S, at least 2.
        steps: T that there will be.
        beta2: decay of the second moment.
        device: of the gradients.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        streams: int,
        steps: int,
        beta2: float,
        device: torch.device,
    ) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        count = sum(sizes)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._layers = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._weights = torch.cat([torch.full((n,), float(w)) for n, w in zip(sizes, weights, strict=True)]).to(
            device, dtype
        )
        self.beta2, self._steps = beta2, steps
        self._v = torch.zeros(streams, count, device=device, dtype=dtype)
        self._excess = torch.zeros(2, count, device=device, dtype=dtype)  # sum of factors, and of how many steps
        self._zeros = torch.zeros(count, device=device, dtype=dtype)
        self._finite = torch.ones((), device=device, dtype=torch.bool)
        self._rows: list[Tensor] = []

    def update(self, stream: int, gradient: Tensor) -> None:
        """Take the next gradient of a stream.

        Args:
            stream: 0 to S - 1.
            gradient: shape (n,).
        """
        square = gradient.to(self._v.dtype).square_()
        self._v[stream].mul_(self.beta2).add_(square, alpha=1.0 - self.beta2)
        self._zeros += square == 0.0
        self._finite &= square.isfinite().all()

    def end_step(self) -> None:
        r"""Measure, after each stream took its next gradient.

        For a coordinate that some streams have seen no gradient of (v = 0, an infinite rate) the variance is infinite;
        one that no stream has seen one of is left out of medians. Both are counted.
        """
        seen = self._v > 0.0
        everywhere, anywhere = seen.all(0), seen.any(0)
        rate = torch.where(seen, self._v, 1.0).rsqrt_()
        variance, mean = torch.var_mean(rate, 0)
        log_variance = rate.log_().var(0)
        found = []
        for values in (variance / mean.square(), log_variance):
            values = torch.where(everywhere, values, torch.inf)
            found.append(self.medians(torch.where(anywhere, values, torch.nan)))
        self._measure_excess(anywhere)
        unseen = (~seen).to(self._v.dtype).mean(0)
        self._rows.append(torch.stack([*found, self.means(unseen)]))

    def medians(self, values: Tensor, level: float = 0.5) -> Tensor:
        """Quantile over the whole, then over each layer; shape (1 + L,). NaN are left out.

        Args:
            values: of the sampled coordinates, shape (n,).
            level: of the quantile.
        """
        whole = weighted_quantile(values, self._weights, level)
        return torch.stack([whole, *(weighted_quantile(values[at], self._weights[at], level) for at in self._layers)])

    def means(self, values: Tensor) -> Tensor:
        """Mean over the whole, then over each layer; shape (1 + L,)."""
        whole = (values * self._weights).sum() / self._weights.sum()
        return torch.stack([whole, *(values[at].mean() for at in self._layers)])

    def curves(self) -> Tensor:
        """At each step the medians of relative variance and of log variance, and the share of unseen coordinates.

        Returns:
            On the CPU, float64, shape (3, T, 1 + L); the whole is at index 0 of the last axis. The share is over
            coordinates and streams: those without a gradient so far.
        """
        return torch.stack(self._rows, dim=1).cpu().double()

    @property
    def finite(self) -> bool:
        """Whether all gradients were; reads the device."""
        return bool(self._finite)

    def _measure_excess(self, anywhere: Tensor) -> None:
        step = len(self._rows) + 1
        if 2 * step <= self._steps:
            return
        variance, mean = torch.var_mean(self._v, 0)
        factor = variance / mean.square() * (variance_matched_length(step, self.beta2) / 2.0)
        self._excess[0] += torch.where(anywhere, factor, 0.0)
        self._excess[1] += anywhere

    def factors(self) -> Tensor:
        r"""How many times fewer degrees of freedom each coordinate's second moment has than theory says.

        The scaled :math:`\chi^2` law with the mean and the variance of v over streams has
        :math:`2 E[v]^2/\mathrm{Var}[v]` degrees of freedom (moments matched, as Satterthwaite did), where theory has
        the variance-matched length n_t: the factor is :math:`n_t \mathrm{Var}[v]/(2 E[v]^2)`, averaged over the second
        half of the steps. It is 1 for Gaussian noise, and below 1 where a mean gradient stands out of it. For
        independent gradients with kurtosis :math:`\kappa = E[g^4]/E[g^2]^2` about zero it is :math:`(\kappa - 1)/2`:
        for Gaussian noise that is there in a share q of the steps, :math:`3/(2q) - 1/2`. Unlike the variance of the
        rate it is finite as soon as one stream has seen a gradient (at most :math:`n_t S / 2`).

        Returns:
            Shape (n,); NaN where no gradient ever was.
        """
        total, count = self._excess
        return torch.where(count > 0.0, total / count, torch.nan)

    def shares(self) -> Tensor:
        """Share of gradients that are exactly zero, and of coordinates all of whose are; shape (2, 1 + L)."""
        draws = self._v.shape[0] * len(self._rows)
        dead = (self._zeros == draws).to(self._v.dtype)
        return torch.stack([self.means(self._zeros / draws), self.means(dead)])


def weighted_quantile(values: Tensor, weights: Tensor, level: float) -> Tensor:
    """The smallest value below or at which a share ``level`` of the weight is; NaN are left out.

    Args:
        values: shape (n,), infinities allowed; NaN if all are NaN.
        weights: shape (n,), positive.
        level: in (0, 1).
    """
    order = values.argsort()  # NaN last
    values = values[order]
    total = torch.where(values.isnan(), 0.0, weights[order]).cumsum(0)
    return values[torch.searchsorted(total, level * total[-1:]).clamp_(max=len(values) - 1)][0]


class Ideal(NamedTuple):
    """What a probe of Gaussian gradients measures.

    Attributes:
        curves: medians over coordinates of relative variance and log variance, float64, shape (2, T).
        factor: median of the factors.
    """

    curves: Tensor
    factor: float


def ideal_medians(streams: int, steps: int, beta2: float, seed: int = 0) -> Ideal:
    """What :class:`StreamVariance` measures where the theory is true: independent Gaussian gradients.

    Args:
        streams: number of streams S.
        steps: T.
        beta2: decay of the second moment.
        seed: of a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    ideal = StreamVariance([_IDEAL_COORDINATES], [1.0], streams, steps, beta2, torch.device("cpu"))
    for _ in range(steps):
        for stream, gradient in enumerate(torch.randn(streams, _IDEAL_COORDINATES, generator=generator)):
            ideal.update(stream, gradient)
        ideal.end_step()
    return Ideal(ideal.curves()[:2, :, 0], ideal.medians(ideal.factors())[0].item())


def bias(ideal: Tensor, beta2: float) -> Tensor:
    r"""By what to multiply medians over few streams so that, where theory is true, they are the variances themselves.

    The sample variance over S streams is skewed, so its median over coordinates is below its mean: with S = 16 by 6 %
    at a hundred steps and by more where the rate's law has heavy tails (28 % at step 5). The true values for a moving
    average of Gaussian squares are taken at the variance-matched length, which simulations follow within 1 % from
    step 5 on.

    Args:
        ideal: curves of :func:`ideal_medians`, shape (2, T).
        beta2: decay of the second moment.

    Returns:
        Shape (2, T); infinite where the variance is (the first two steps, of the relative one).
    """
    length = variance_matched_length(torch.arange(1, ideal.shape[1] + 1), beta2)
    relative = torch.where(length > 2.0, relative_variance(length.clamp(min=2.1)), torch.inf)
    return torch.stack([relative, log_adaptive_rate_variance(length)]) / ideal
