r"""The density of a plan: entropy in the objective, log-densities of pairs, and what tells whether they are right.

With entropy weight eps the game looks for the minimiser of

.. math:: E\, c(X, Y) + \varepsilon\, E \log p(X, Y),

p the plan's density with respect to volume. With exact marginals this differs from :math:`\varepsilon\,
\mathrm{KL}(\gamma \,\|\, \mu \otimes \nu)` by a constant, so that the plan is the entropic one of eps (Peyre and Cuturi
2019, arXiv:1803.00567, section 4.1). Without entropy the best plan is concentrated on a graph and has no density.

The multipliers then also carry :math:`\varepsilon \log \mu`: their slope must reach the largest gradient of the cost
*plus* eps times the score of the marginals, else the marginals widen (measured in a prototype: variance 0.73 where 0.49
was right, at eps = 4 and an eta for the cost alone). ``eta="auto"`` adds that. A derivation of ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_least
from lightning_rectify.modules.spot.estimator import PlanEstimator, Samples, as_samples
from lightning_rectify.modules.spot.ode import ODEPair
from lightning_rectify.nn.modes import evaluating

_NUMBERS = 2**22  # tangents held at one time
_MOST = 4096  # pairs that validation looks at for a density


class PlanDensity(PlanEstimator):
    """A plan that has a density if its generator is an ODE; says so clearly if it is not."""

    entropy: float

    def make_density(self, entropy: float) -> None:
        """Set the weight of the entropy; called by the subclass's constructor once the generator is there.

        Args:
            entropy: eps, in units of the cost, at least 0.

        Raises:
            ValueError: for another number, or for entropy with a generator that has no density.
        """
        check_least(0, entropy=entropy)
        if entropy and not self.has_density:
            raise ValueError(
                f"Expected argument `entropy` to be 0 for a generator without density (only 'ode' has one) but got "
                f"{entropy!r}."
            )
        self.entropy = float(entropy)

    @property
    def has_density(self) -> bool:
        """Whether :meth:`log_prob` can be asked."""
        return isinstance(self.generator.network, ODEPair)

    def generate(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """For training: pairs, flat and joined, (B, P + Q), and log-densities (B,) where entropy has a weight.

        Both in standardized units. Random directions of the trace are drawn from this rank's generator of noise.
        """
        network = self.generator.network
        if not self.entropy or not isinstance(network, ODEPair):
            return self.generator(latents), None
        return network.flow(latents, generator=self.noise_generator)

    def compilable(self) -> nn.Module:
        """The part of the generator that ``compile`` compiles: of an ODE the field, not the solver around it."""
        network = self.generator.network
        return network.field if isinstance(network, ODEPair) else self.generator

    # -- answers -------------------------------------------------------------------------------------------------------

    def log_prob(self, x: Samples, y: Samples, probes: int | None = None, seed: int = 0) -> Tensor:
        """Log-densities of pairs under the plan, in nats, per volume in the units of the data.

        Of the generator's moving average; without gradients. It is the density of the *relaxed* plan, whose marginals
        are only nearly those of the data: look at the marginal gaps of :meth:`cost` beside it.

        Args:
            x: points, shape (N, *shape_x).
            y: their partners, shape (N, *shape_y).
            probes: None for the exact trace, at P + Q times the cost of a sample; else so many random directions a
                point, at least 1: unbiased in the log-density.
            seed: of the directions.

        Returns:
            Shape (N,), on the module's device.

        Raises:
            ValueError: for a generator without density, shapes that do not fit, or ``probes`` below 1.
        """
        network = self._ode("log_prob")
        left, right = as_samples("x", x), as_samples("y", y)
        self._check_pairs(left, right)
        check_least(1, probes=probes)
        sides = self._standardized((left.to(self.scale), right.to(self.scale)))
        joined = torch.cat([side.flatten(1) for side in sides], dim=1)
        generator = torch.Generator().manual_seed(seed)
        found = []
        with evaluating(network):
            for part in joined.split(self._rows(network, probes)):
                if probes is None:
                    directions = torch.eye(network.size).to(part)
                else:
                    signs = torch.randint(2, (len(part), probes, network.size), generator=generator)
                    directions = (2.0 * signs - 1.0).to(part) / probes**0.5
                found.append(network.inverse(part, directions)[1])
        return torch.cat(found) - network.size * self.scale.log()

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The same as :meth:`sample_pairs`, under the name that distributions have it."""
        return self.sample_pairs(count, seed)

    def round_trip_error(self, count: int = 1000, seed: int = 0) -> float:
        """The largest difference between latents and what comes back of them, over ``count`` draws of N(0, I).

        Solver and rounding alone make it: with exact ones it is 0. A density is no better than that.

        Raises:
            ValueError: for a generator without density, or a count below 1.
        """
        network = self._ode("round_trip_error")
        check_least(1, count=count)
        latents = torch.randn(count, network.size, generator=torch.Generator().manual_seed(seed)).to(self.scale)
        worst = 0.0
        with evaluating(network):
            for part in latents.split(self._rows(network, None)):
                directions = torch.eye(network.size).to(part)
                back = network.inverse(network.flow(part, directions)[0], directions)[0]
                worst = max(worst, float((back - part).abs().max()))
        return worst

    def mass(self, points: int = 161, reach: float = 7.0) -> float:
        """The integral of the density over a grid: 1 but for the solver's error. For numbers x and y only.

        Args:
            points: of the grid on each axis, at least 2.
            reach: from the middle to each end, in standard deviations of the plan's own samples, above 0.

        Raises:
            ValueError: for a generator without density, points with more than one number, or an argument outside its
                range.
        """
        axes = self.grid(points, reach)
        x, y = torch.meshgrid(*axes, indexing="ij")
        density = self.log_prob(x.reshape(-1, 1), y.reshape(-1, 1)).double().exp()
        return float(density.sum() * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))

    def grid(self, points: int, reach: float) -> tuple[Tensor, Tensor]:
        """Axes of a grid around the plan's samples, shape (points,) each; arguments as of :meth:`mass`."""
        network = self._ode("mass")
        if network.sizes != [1, 1]:
            raise ValueError(
                f"Expected `shape_x` and `shape_y` of a plan with a grid to be 1 but got {list(self.shape_x)} and "
                f"{list(self.shape_y)}."
            )
        if points < 2 or not reach > 0:
            raise ValueError(
                f"Expected arguments `points` and `reach` to be at least 2 and above 0 but got {points!r}, {reach!r}."
            )
        sides = [side.double().cpu() for side in self.sample_pairs(_MOST)]
        ends = [(float(side.mean()), reach * float(side.std())) for side in sides]
        first, second = (torch.linspace(m - r, m + r, points, dtype=torch.float64) for m, r in ends)
        return first, second

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse data whose truth is that of another weight of entropy."""
        super().setup(stage)
        theirs = getattr(self._truth(), "entropy", None)
        if theirs is not None and theirs != self.entropy:
            raise ValueError(
                f"Expected argument `entropy` of the datamodule to be that of {type(self).__name__}, {self.entropy!r}, "
                f"but got {theirs!r}."
            )

    def _measure(self, x: Tensor, y: Tensor) -> None:
        super()._measure(x, y)
        if self._eta == "auto" and self.entropy:
            self.eta.add_(self.entropy * max(largest_score(x), largest_score(y)))

    def _log_metrics(self, stage: str) -> None:
        looks = bool(self._seen) and not self.trainer.sanity_checking and self.has_density
        super()._log_metrics(stage)
        if looks:
            values = {f"{stage}/{name}": value for name, value in self._density_metrics().items()}
            self.log_dict(values, rank_zero_only=False)

    def _density_metrics(self) -> dict[str, float]:
        count = min(self.eval_samples, _MOST)
        pairs = self.sample_pairs(count, self.eval_seed)
        found = {
            "entropy": -float(self.log_prob(*pairs).double().mean()),
            "round_trip": self.round_trip_error(count, self.eval_seed),
        }
        if self._ode("mass").sizes == [1, 1]:
            found["mass"] = self.mass()
        truth: Any = self._truth()
        if hasattr(truth, "plan_log_prob"):
            x, y = truth.sample_plan(count, seed=self.eval_seed)
            found["plan_kl"] = float((truth.plan_log_prob(x, y) - self.log_prob(x, y).cpu().double()).mean())
        return found

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _ode(self, asked: str) -> ODEPair:
        network: Any = self.averaged("generator")
        if not isinstance(network.network, ODEPair):
            raise ValueError(
                f"Expected argument `generator` to be 'ode' where `{asked}` is asked for but got a generator without "
                f"density, {type(network.network).__name__}."
            )
        return network.network

    def _check_pairs(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y) or tuple(x.shape[1:]) != self.shape_x or tuple(y.shape[1:]) != self.shape_y:
            raise ValueError(
                f"Expected arguments `x` and `y` to be as many points of shapes {list(self.shape_x)} and "
                f"{list(self.shape_y)} but got shapes {list(x.shape)} and {list(y.shape)}."
            )

    def _rows(self, network: ODEPair, probes: int | None) -> int:
        width = network.field.last.in_features
        return max(_NUMBERS // ((probes or network.size) * width), 1)


def largest_score(points: Tensor) -> float:
    r"""The largest gradient of the log-density of a Gaussian with the points' moments, at the points.

    .. math:: \max_n \lVert \Sigma^{-1} (x_n - m) \rVert_2

    Directions with less than 1e-4 of the largest variance are left out: there a density hardly exists.

    Args:
        points: shape (N, ...), N at least 2.

    Example:
        >>> round(largest_score(torch.tensor([[-2.0], [0.0], [2.0]])), 3)  # variance 4
        0.5
    """
    flat = points.detach().flatten(1).double()
    centred = flat - flat.mean(dim=0)
    covariance = centred.T @ centred / max(len(flat) - 1, 1)
    return float((centred @ torch.linalg.pinv(covariance, rtol=1e-4, hermitian=True)).norm(dim=1).max())
