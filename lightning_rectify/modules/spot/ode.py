r"""A generator of pairs whose density is known: the flow of a neural ODE from normal latents to (x, y).

.. math::
    \frac{dw}{dt} = v(w, t), \quad w(0) = z \sim N(0, I_D), \quad w(1) = (x, y), \qquad
    \log p(x, y) = \log N(z; 0, I) - \int_0^1 \mathrm{tr}\, \frac{\partial v}{\partial w}\, dt

(Chen et al. 2018, arXiv:1806.07366, theorem 1; the trace by random probes: Grathwohl et al. 2019, arXiv:1810.01367,
section 3.1). D is the number of numbers in x and y together. arXiv:1905.00158 recovers the density of a plan so; its
authors' code has no such generator: network, solver and steps here are ours.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torchdiffeq
from torch import Tensor, nn

from lightning_rectify.arguments import check_above, check_choice, check_least, check_types

Trace = Literal["exact", "hutchinson"]
#: torchdiffeq's solvers with fixed steps; the others here choose their own
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")


class VelocityField(nn.Module):
    r"""v(w, t), a multilayer perceptron with SiLU between its layers, and the trace of its Jacobian in w.

    Directions are carried through the layers beside the values (forward differentiation, written out), so that the
    trace needs no second derivative: it works without gradients, and one backward pass goes through it. At the start v
    is 0, and the flow the identity.

    Args:
        size: D, numbers in w.
        width: of each hidden layer, at least 1.
        depth: hidden layers, at least 1.
    """

    def __init__(self, size: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.size = size
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([size + 1, *[width] * depth]))
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor, w: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        r"""Velocities, and sums of directional derivatives, :math:`\sum_k e_k^\top \frac{\partial v}{\partial w} e_k`.

        Args:
            t: the time, a scalar.
            w: shape (B, D).
            directions: e, shape (K, D) or (B, K, D): the K = D unit vectors give the trace, a random one with
                independent entries of mean 0 and variance 1 an unbiased estimate. None for no trace.

        Returns:
            Shape (B, D), and shape (B,) or None.
        """
        values = torch.cat([w, t.expand(len(w), 1)], dim=1)
        tangents = None if directions is None else torch.cat([directions, torch.zeros_like(directions[..., :1])], -1)
        for layer in self.hidden:
            values = layer(values)
            gate = torch.sigmoid(values)
            if tangents is not None:
                assert isinstance(layer.weight, Tensor)
                slope = gate * (1.0 + values * (1.0 - gate))
                tangents = slope[:, None] * nn.functional.linear(tangents, layer.weight)
            values = values * gate
        if tangents is None or directions is None:
            return self.last(values), None
        return self.last(values), (directions * nn.functional.linear(tangents, self.last.weight)).sum(dim=(1, 2))


class ODEPair(nn.Module):
    """A generator of pairs with a density, both ways: latents (B, D) to x and y, and back.

    Works in float32 or more: automatic casting to less is off inside. ``torch.export`` cannot follow torchdiffeq, which
    looks at the times it is given; ``torch.compile`` of the field works.

    Args:
        shape_x: of one x.
        shape_y: of one y.
        width: of the field's hidden layers, at least 1.
        depth: hidden layers, at least 1.
        method: torchdiffeq's name of a solver: "euler", "midpoint", "heun2", "heun3", "rk4" with fixed steps, or
            "dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2".
        steps: of a solver with fixed steps, at least 1.
        rtol: relative tolerance of the other solvers, above 0.
        atol: absolute tolerance, above 0.
        trace: what :meth:`flow` and :meth:`inverse` take unless told: "exact" (D directions, for a few dimensions) or
            "hutchinson" (one random direction a point, the same for all times: unbiased in the log-density, not in the
            density).
        adjoint: gradients by the adjoint equation, solved backwards: memory for one step, not for all; their error is
            the solver's (Chen et al. 2018, section 2).

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> pair = ODEPair((1,), (1,))
        >>> joined, log_density = pair.flow(torch.zeros(3, 2))
        >>> joined.shape, round(log_density[0].exp().item() * 2 * math.pi, 4)  # the identity, at the start
        (torch.Size([3, 2]), 1.0)
    """

    def __init__(
        self,
        shape_x: Sequence[int],
        shape_y: Sequence[int],
        width: int = 64,
        depth: int = 2,
        method: str = "rk4",
        steps: int = 8,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        trace: Trace = "exact",
        adjoint: bool = False,
    ) -> None:
        check_types(ODEPair, locals())
        super().__init__()
        known = (*FIXED, *ADAPTIVE)
        check_choice(known, method=method)
        check_choice(("exact", "hutchinson"), trace=trace)
        check_least(1, width=width, depth=depth, steps=steps)
        check_above(0, rtol=rtol, atol=atol)
        self.shape_x, self.shape_y = tuple(shape_x), tuple(shape_y)
        self.sizes = [math.prod(self.shape_x), math.prod(self.shape_y)]
        self.size = sum(self.sizes)
        self.method, self.steps, self.rtol, self.atol = method, steps, rtol, atol
        self.trace, self.adjoint = trace, adjoint
        self.field = VelocityField(self.size, width, depth)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """X and y of latents (B, D)."""
        x, y = self._solve(latents, None, backwards=False)[0].split(self.sizes, dim=1)
        return x.unflatten(1, self.shape_x), y.unflatten(1, self.shape_y)

    def flow(
        self, latents: Tensor, directions: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pairs of latents (B, D), flat and joined, shape (B, D), and their log-densities, in nats, shape (B,).

        Args:
            latents: normal numbers.
            directions: of the trace, as :class:`VelocityField` takes them; None for those of ``trace``.
            generator: of random directions; None for torch's own.
        """
        directions = self._directions(latents, generator) if directions is None else directions
        joined, gained = self._solve(latents, directions, backwards=False)
        return joined, _log_normal(latents) - gained

    def inverse(
        self, joined: Tensor, directions: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, D) of pairs, flat and joined, shape (B, D), and the pairs' log-densities, in nats, shape (B,)."""
        directions = self._directions(joined, generator) if directions is None else directions
        latents, gained = self._solve(joined, directions, backwards=True)
        return latents, _log_normal(latents) + gained

    def _directions(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.trace == "exact":
            return torch.eye(self.size, dtype=like.dtype, device=like.device)
        size = (len(like), 1, self.size)
        return 2.0 * torch.randint(2, size, generator=generator, device=like.device).to(like) - 1.0

    def _solve(self, start: Tensor, directions: Tensor | None, backwards: bool) -> tuple[Tensor, Tensor]:
        """The other end, shape (B, D), and the integral of the trace on the way there, shape (B,)."""

        def speed(t: Tensor, state: Tensor) -> Tensor:
            velocity, trace = self.field(t, state[:, : self.size], directions)
            return velocity if trace is None else torch.cat([velocity, trace[:, None]], dim=1)

        # A time for each step: the grid is the same in both directions, and no step is cut off by rounding.
        count = self.steps + 1 if self.method in FIXED else 2
        first, last = (1.0, 0.0) if backwards else (0.0, 1.0)
        times = torch.linspace(first, last, count, dtype=start.dtype, device=start.device)
        options: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        state = start if directions is None else torch.cat([start, torch.zeros_like(start[:, :1])], dim=1)
        with torch.autocast(start.device.type, enabled=False):
            if self.adjoint:
                weights = tuple(self.field.parameters())
                end = torchdiffeq.odeint_adjoint(speed, state, times, adjoint_params=weights, **options)[-1]
            else:
                end = torchdiffeq.odeint(speed, state, times, **options)[-1]
        return (end, end.new_zeros(len(end))) if directions is None else (end[:, :-1], end[:, -1])


def _log_normal(z: Tensor) -> Tensor:
    """Log-density of N(0, I) at rows, shape (B,)."""
    return -0.5 * (z.square().sum(dim=1) + z.shape[1] * math.log(2.0 * math.pi))
