"""Bars A1 of the ReLU blocks, and that forward, units and the plain reference agree."""

import itertools

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.blocks import (
    Hat,
    Indicator,
    Monomial,
    Product,
    SignedSquare,
    Square,
    Trapezoid,
)
from tests.reference import manifold as reference

LINE = torch.linspace(0, 1, 4097 * 3, dtype=torch.float64)  # hits the middles between nodes, and points that are not


def agree(block, points, atol=1e-12):
    """Largest difference of the two faces; a few hundred roundings of numbers near 1."""
    fast, units = block(*points.unbind(1)), block.layers()(points).flatten()
    torch.testing.assert_close(units, fast, rtol=0, atol=atol)


@pytest.mark.parametrize("levels", [1, 2, 5, 12])
def test_square(levels):
    error = Square(levels)(LINE) - LINE.square()
    assert error.max() <= 4.0 ** -(levels + 1) * (1 + 1e-6)
    assert error.min() >= -1e-12
    assert error.max() >= 4.0 ** -(levels + 1) * 0.9 or levels == 12  # the bound is the error, where the line hits it
    wide = torch.linspace(-1, 3, 801, dtype=torch.float64)[:, None]
    agree(Square(levels), wide)
    inside = LINE.numpy()
    assert np.abs(Square(levels)(LINE).numpy() - reference.square(inside, levels)).max() <= 1e-12
    assert Square(levels)(torch.zeros(1)).item() == 0.0


def test_square_costs_what_its_units_say():
    """By hand: 3 to the first level, 7 to the second (the carried value starts as a unit of the tent), 8 a level, 3."""
    for levels in (2, 4, 9):
        size = Square(levels).layers().size()
        assert size.total == 8 * levels - 3
        assert (size.depth, size.units, size.largest) == (levels + 1, 3 * levels - 1, 4.0)


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_signed_square(bound):
    v = (2 * LINE - 1) * bound
    block = SignedSquare(6, bound)
    error = block(v) - v.square()
    assert error.min() >= -1e-12
    assert error.max() <= block.error * (1 + 1e-6)
    agree(block, v[::40, None])


@pytest.mark.parametrize("form", ["three_squares", "two_squares"])
@pytest.mark.parametrize(("levels", "bound"), [(2, 1.0), (6, 3.0), (12, 1.0)])
def test_product(form, levels, bound):
    axis = torch.cat([torch.linspace(-bound, bound, 257), torch.zeros(1)]).double()
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    block = Product(levels, bound, form)
    out = block(a, b)
    assert (out - a * b).abs().max() <= block.error * (1 + 1e-6) + 1e-13
    assert out.abs().max() <= bound**2 * (1 + 1e-15)
    assert np.abs(out.numpy() - reference.product(a.numpy(), b.numpy(), levels, bound, form)).max() <= 1e-12 * bound**2
    agree(block, torch.stack([a.flatten(), b.flatten()], 1)[::37], atol=1e-12 * bound**2)


@pytest.mark.parametrize("form", ["three_squares", "two_squares"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_with_zero_is_zero(form, dtype):
    """Exactly, on both faces, and far outside the domain too: it is what closes a gate."""
    other = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=dtype) * 30
    block = Product(7, 1.0, form)
    assert block(other, torch.zeros_like(other)).abs().max() == 0.0
    assert block(torch.zeros_like(other), other).abs().max() == 0.0
    units = block.layers().to(dtype)
    for pair in ((other, torch.zeros_like(other)), (torch.zeros_like(other), other)):
        # sums of a few numbers of size 45 in another order
        assert units(torch.stack(pair, 1)).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-13) * 45


@pytest.mark.parametrize("exponents", [(1,), (2, 0, 1), (0, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("form", ["three_squares", "two_squares"])
def test_monomial(exponents, form):
    g = torch.Generator().manual_seed(1)
    v = torch.rand(400, len(exponents), generator=g, dtype=torch.float64) * 2 - 1
    block = Monomial(exponents, 5, form)
    exact = torch.stack([v[:, k] ** power for k, power in enumerate(exponents)]).prod(0)
    assert (block(*v.unbind(1)) - exact).abs().max() <= block.error + 1e-13
    agree(block, v)


@pytest.mark.parametrize("dim", [1, 2])
def test_trapezoids_sum_to_one(dim):
    n = 7
    g = torch.Generator().manual_seed(2)
    z = torch.cat([torch.rand(2000, dim, generator=g, dtype=torch.float64), torch.tensor([[0.0] * dim, [1.0] * dim])])
    total = torch.zeros(len(z), dtype=torch.float64)
    for cell in itertools.product(range(n + 1), repeat=dim):
        total += torch.stack([Trapezoid()(3 * (n * z[:, k] - cell[k])) for k in range(dim)]).prod(0)
    assert (total - 1).abs().max() <= 1e-12
    agree(Trapezoid(), torch.linspace(-4, 4, 321, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_hats_interpolate_on_kuhn_simplices(dim):
    n, rng = 3, np.random.default_rng(0)
    values = rng.normal(size=(n + 2,) * dim)
    points = rng.uniform(0, n, size=(60, dim))
    hat, t = Hat(dim), torch.from_numpy(points)
    total = sum(
        values[node] * hat(*[t[:, k] - node[k] for k in range(dim)])
        for node in itertools.product(range(n + 1), repeat=dim)
    )
    expected = [reference.kuhn_interpolant(values, point) for point in points]
    np.testing.assert_allclose(total.numpy(), expected, rtol=0, atol=1e-13)  # a sum of at most d + 1 products
    agree(hat, torch.from_numpy(rng.uniform(-2, 2, size=(500, dim))))


@pytest.mark.parametrize("slope", ["steep", "bounded"])
@pytest.mark.parametrize(("low", "high"), [(0.5, 1.0), (0.04, 0.0576), (0.0575, 0.0576), (0.0, 2.0)])
def test_indicator(slope, low, high):
    block = Indicator(low, high, slope)
    assert low - 1e-12 <= block.low < high
    a = torch.cat([torch.linspace(0, low, 200), torch.linspace(low, high, 400), torch.linspace(high, 50, 200)]).double()
    assert (block(a[a <= block.low]) == 1).all()
    assert (block(a[a >= high]) == 0).all()
    units = block.layers()
    assert units(a[a >= high][:, None]).abs().max() == 0.0  # no leak, in floats
    # rounding of numbers of size high / (high - low), up to 600 here
    agree(block, a[:, None], atol=1e-12)
    if slope == "bounded":
        paper = reference.clip_indicator(a.numpy(), high, block.clips)
        assert np.abs(block(a).numpy() - paper).max() <= 1e-11
        assert units.size().largest <= max(2.0, 2 / high)


def test_gradients_are_those_of_the_interpolation():
    p = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (slope,) = torch.autograd.grad(Square(4)(p).sum(), p)
    (units,) = torch.autograd.grad(Square(4).layers()(p[:, None]).sum(), p)
    assert torch.equal(slope, units)
    assert (slope - 2 * p).abs().max() <= 2.0**-4  # the slope of a chord


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square(0), r"`levels` to be at least 1 but got 0"),
        (lambda: Product(3, form="one"), r"`form` to be 'three_squares' or 'two_squares' but got 'one'"),
        (lambda: Product(3, bound=-1.0), r"`bound` to be a finite number above 0 but got -1.0"),
        (lambda: Monomial((0, 0), 3), r"`exponents` .* got \(0, 0\)"),
        (lambda: Hat(0), r"`dim` to be at least 1 but got 0"),
        (lambda: Indicator(1.0, 1.0), r"`low` to be in \[0, high=1.0\) but got 1.0"),
        (lambda: Indicator(0.0, 1.0, "soft"), r"`slope` .* got 'soft'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
