"""What ``manifold_scaling.py`` compares the construction with, each tuned on validation points of its own."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from manifold_targets import Target
from torch import Tensor, nn

from lightning_rectify.modules.manifold import Manifold, TangentCharts
from lightning_rectify.modules.manifold.fitting import ChartFunction
from lightning_rectify.modules.manifold.graph import ReluGraph
from lightning_rectify.modules.manifold.layered import LayeredNetwork
from lightning_rectify.modules.manifold.local import TaylorNet
from lightning_rectify.optim import RectifiedAdam

RATES = (1e-3, 3e-3, 1e-2)
Predict = Callable[[Tensor], Tensor]


# -- a dense network ---------------------------------------------------------------------------------------------------


def mlp(target: Target, width: int, lr: float, seed: int, steps: int) -> tuple[Predict, int]:
    """Three hidden ReLU layers by RectifiedAdam and a cosine schedule, 256 fresh points a step: it cannot overfit.

    Returns:
        The function and its number of weights and biases.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    ambient_dim = target.manifold.ambient_dim
    layers: list[nn.Module] = [nn.Linear(ambient_dim, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(width, 1))
    optimizer = RectifiedAdam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = target.place(target.draw(256, generator))
        optimizer.zero_grad()
        (network(x.float())[:, 0] - target.f(x).float()).square().mean().backward()
        optimizer.step()
        schedule.step()
    weights = sum(parameter.numel() for parameter in network.parameters())
    return lambda x: network(x.float())[:, 0].double(), weights


# -- kernel ridge and nearest neighbours -------------------------------------------------------------------------------


def kernel_ridge(target: Target, size: int, seed: int) -> tuple[Predict, int]:
    """Gaussian kernel on random points without noise, width and ridge chosen; it stores n (D + 1) numbers."""
    from sklearn.kernel_ridge import KernelRidge

    grid = product((0.03, 0.1, 0.3, 1.0, 3.0), (1e-12, 1e-9, 1e-6))
    return _scikit(target, size, seed, [KernelRidge(kernel="rbf", gamma=g, alpha=a) for g, a in grid])


def nearest(target: Target, size: int, seed: int) -> tuple[Predict, int]:
    """Neighbours on random points without noise, their number chosen; it stores n (D + 1) numbers."""
    from sklearn.neighbors import KNeighborsRegressor

    return _scikit(target, size, seed, [KNeighborsRegressor(k, weights="distance") for k in (1, 2, 3, 5, 10)])


def _scikit(target: Target, size: int, seed: int, models: list[Any]) -> tuple[Predict, int]:
    generator = torch.Generator().manual_seed(seed)
    x, val = (target.place(target.draw(count, generator)) for count in (size, 1000))
    fits = [model.fit(x.numpy(), target.f(x).numpy()) for model in models]
    best = min(fits, key=lambda model: float(abs(model.predict(val.numpy()) - target.f(val).numpy()).max()))
    return lambda points: torch.from_numpy(best.predict(points.numpy())), size * (x.shape[1] + 1)


# -- Yarotsky's network on the whole cube ------------------------------------------------------------------------------


class Cube(Manifold):
    """[-1, 1]^D as a manifold of its own dimension, with one chart: what a net does that knows of no manifold."""

    def __init__(self, dim: int) -> None:
        self.dim = self.ambient_dim = dim
        self.reach = float("inf")

    def points(self, spacing: float) -> tuple[Tensor, float]:
        """Not needed: the one chart covers all."""
        raise NotImplementedError

    def tangent(self, x: Tensor) -> Tensor:
        """All directions."""
        return torch.eye(self.dim, dtype=x.dtype).expand(len(x), -1, -1)

    def lift(self, centers: Tensor, bases: Tensor, y: Tensor) -> Tensor:
        """The coordinates themselves."""
        return centers[:, None] + y

    @property
    def lift_radius(self) -> float:
        """No bound."""
        return float("inf")


def ambient(target: Target, grid: int, levels: int, touched: bool) -> tuple[Predict, int]:
    """The network of arXiv:1610.01145 for f on the cube, degree 2: it does not see that x lies on a manifold.

    Args:
        target: with an f that is smooth on the whole cube.
        grid: N; (N + 1)^D cells.
        levels: of the products.
        touched: leave out the cells that no test point lies in; the error on the manifold is the same.

    Returns:
        The function and its number of weights and biases, counted.
    """
    dim = target.manifold.ambient_dim
    eye, zero = torch.eye(dim, dtype=torch.float64)[None], torch.zeros(1, dim, dtype=torch.float64)
    charts = TangentCharts(zero, eye, 1.0, 0.0)
    # the chart is the cube [-1, 1]^D and not a ball in it: coefficients at all nodes
    function = ChartFunction(Cube(dim), charts, target.f, None)
    nodes = torch.cartesian_prod(*[torch.arange(grid + 1) for _ in range(dim)]).double() / grid
    exponents = TaylorNet(zero[:, None], dim, grid, 2, 1, "two_squares", True).exponents
    factorials = torch.tensor([2.0 if max(a) == 2 else 1.0 for a in exponents], dtype=torch.float64)
    coefficients = function.derivatives(nodes, 2) / factorials
    if touched:
        z = 0.5 + 0.5 * target.test_points()
        used = torch.zeros(len(nodes), dtype=torch.bool)
        for part in z.split(500):
            used |= ((part[:, None] - nodes).abs().amax(2) < 2.0 / (3.0 * grid)).any(0)
        coefficients = coefficients * used[None, :, None]
    net = TaylorNet(coefficients, dim, grid, 2, levels, "two_squares", True)
    size = LayeredNetwork(net.on(ReluGraph(dim).input() * 0.5 + 0.5)).size().total
    return lambda x: net(0.5 + 0.5 * x, torch.zeros(len(x), dtype=torch.int64)).detach(), size
