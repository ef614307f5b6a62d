r"""ReLU building blocks: square, product, monomials, trapezoid, exact P1 hats, indicators.

Each block has two faces that agree to rounding: ``forward``, plain and fast torch, and ``on``, which places its ReLU
units on values of a :class:`ReluGraph`; ``layers()`` is the block alone as an explicit network, from which its cost is
counted. The constructions are those of Chen, Jiang, Liao and Zhao (arXiv:1908.01842, after Yarotsky, arXiv:1610.01145)
unless a docstring says "ours".
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_above, check_choice, check_least, check_types
from lightning_rectify.modules.manifold.graph import Affine, ReluGraph, concatenated
from lightning_rectify.modules.manifold.layered import LayeredNetwork

ProductForm = Literal["three_squares", "two_squares"]
Slope = Literal["bounded", "steep"]


class ReluBlock(nn.Module):
    """A function of ``arity`` numbers that ReLU units compute exactly; all arguments are elementwise."""

    arity = 1

    def on(self, *values: Affine) -> Affine:
        """Place the block's units on ``arity`` columns of K values each; K values."""
        raise NotImplementedError

    def layers(self) -> LayeredNetwork:
        """The block alone: a network from (B, arity) to (B, 1)."""
        values = ReluGraph(self.arity).input()
        return LayeredNetwork(self.on(*[values[k] for k in range(self.arity)]))


class Square(ReluBlock):
    r"""The square on [0, 1] as a sum of sawtooth functions.

    .. math:: f_m(p) = p - \sum_{s=1}^m g_s(p)/4^s, \qquad 0 \le f_m(p) - p^2 \le 4^{-(m+1)}

    with :math:`g_s` the s-fold composition of the tent :math:`g(t) = 2\sigma(t) - 4\sigma(t - 1/2)`. It interpolates
    :math:`p^2` at multiples of :math:`2^{-m}`; :math:`f_m(0) = 0`. Three units a level. Outside its domain it is 0
    below 0 and :math:`(3p - 1)/2` above 1. Yarotsky, proposition 2; ``forward`` computes the interpolation directly.

    Args:
        levels: m, at least 1.

    Raises:
        ValueError: if ``levels`` is below 1.

    Example:
        >>> Square(2)(torch.tensor([0.25, 0.125])).tolist()
        [0.0625, 0.03125]
    """

    def __init__(self, levels: int) -> None:
        check_types(Square, locals())
        check_least(1, levels=levels)
        super().__init__()
        self.levels = levels

    @property
    def error(self) -> float:
        """Largest error on [0, 1], :math:`4^{-(m+1)}`."""
        return 4.0 ** -(self.levels + 1)

    def forward(self, p: Tensor) -> Tensor:
        """The interpolation of p^2; any shape."""
        cells = 2.0**self.levels
        low = (p.detach().clamp(0.0, 1.0) * cells).floor().clamp(max=cells - 1.0) / cells
        inside = low.square() + (2.0 * low + 1.0 / cells) * (p - low)
        return torch.where(p > 1.0, 1.5 * p - 0.5, torch.where(p > 0.0, inside, torch.zeros_like(p)))

    def on(self, *values: Affine) -> Affine:
        """Units on one column of values in [0, 1]."""
        (p,) = values
        rising, bend = p.relu(), (p - 0.5).relu()
        total = rising
        for level in range(1, self.levels + 1):
            tent = rising * 2.0 - bend * 4.0
            # What is left of p after the subtractions is f_level(p) >= 0, so one unit carries it.
            left = total - tent * 4.0**-level
            if level < self.levels:
                rising, bend, total = tent.relu(), (tent - 0.5).relu(), left.relu()
        return left


class SignedSquare(ReluBlock):
    r"""The square on [-M, M]: :math:`M^2 f_m(|v|/M)`, from 0 to :math:`M^2 4^{-(m+1)}` above :math:`v^2`.

    Args:
        levels: m, at least 1.
        bound: M, positive.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, levels: int, bound: float = 1.0) -> None:
        super().__init__()
        check_above(0, bound=bound)
        self.bound, self.square = float(bound), Square(levels)

    @property
    def error(self) -> float:
        """Largest error on [-M, M]."""
        return self.bound**2 * self.square.error

    def forward(self, v: Tensor) -> Tensor:
        """The approximate square; any shape."""
        return self.bound**2 * self.square(v.abs() / self.bound)

    def on(self, *values: Affine) -> Affine:
        """Units on one column of values in [-M, M]."""
        return self.square.on((values[0] * (1.0 / self.bound)).absolute()) * self.bound**2


class Product(ReluBlock):
    r"""The product of two numbers in [-M, M], exactly 0 where one of them is 0, and at most :math:`M^2` there.

    .. math::
        \mathrm{three\ squares:}\; 2M^2\big[f_m(\tfrac{|a+b|}{2M}) - f_m(\tfrac{|a|}{2M}) - f_m(\tfrac{|b|}{2M})\big]
        \qquad
        \mathrm{two:}\; M^2\big[f_m(\tfrac{|a+b|}{2M}) - f_m(\tfrac{|a-b|}{2M})\big]

    The three squares are the papers' form, with an error of at most :math:`M^2 4^{-m}`. The two squares are ours: one
    third cheaper, error at most :math:`M^2 4^{-(m+1)}`.

    Args:
        levels: m, at least 1.
        bound: M, positive.
        form: "three_squares" or "two_squares".

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Product(3)(torch.tensor(0.5), torch.tensor([0.25, 0.0])).tolist()
        [0.125, 0.0]
    """

    arity = 2

    def __init__(self, levels: int, bound: float = 1.0, form: ProductForm = "two_squares") -> None:
        super().__init__()
        check_choice(("three_squares", "two_squares"), form=form)
        check_above(0, bound=bound)
        self.bound, self.form, self.square = float(bound), form, Square(levels)

    @property
    def error(self) -> float:
        """Largest error where both factors are in [-M, M]."""
        return self.bound**2 * self.square.error * (4.0 if self.form == "three_squares" else 1.0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The approximate product; shapes that broadcast."""
        scale = 1.0 / (2.0 * self.bound)
        both = self.square((a + b).abs() * scale)
        if self.form == "two_squares":
            return self.bound**2 * (both - self.square((a - b).abs() * scale))
        # The larger of the two first: then a factor of 0 leaves an exact 0.
        return 2.0 * self.bound**2 * (both - self.square(a.abs() * scale) - self.square(b.abs() * scale))

    def on(self, *values: Affine) -> Affine:
        """Units on two columns of values in [-M, M]."""
        a, b = (column * (1.0 / (2.0 * self.bound)) for column in values)
        parts = [a + b, a - b] if self.form == "two_squares" else [a + b, a, b]
        squares, count = self.square.on(concatenated(parts).absolute()), len(a)
        both, first = squares[:count], squares[count : 2 * count]
        if self.form == "two_squares":
            return (both - first) * self.bound**2
        return (both - first - squares[2 * count :]) * (2.0 * self.bound**2)


class Monomial(ReluBlock):
    r"""The product of powers :math:`\prod_k v_k^{a_k}` of numbers in [-1, 1], a chain of :math:`|a| - 1` products.

    Each approximate product is again in [-1, 1], so errors add up: at most :math:`(|a| - 1)` times that of one product.

    Args:
        exponents: :math:`a`, not negative, with a sum of at least 1.
        levels: of each product, at least 1.
        form: as in :class:`Product`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, exponents: tuple[int, ...], levels: int, form: ProductForm = "two_squares") -> None:
        super().__init__()
        if not exponents or min(exponents) < 0 or sum(exponents) < 1:
            raise ValueError(
                f"Expected argument `exponents` to be >= 0 with a sum of at least 1 but got {exponents!r}."
            )
        self.factors = [k for k, power in enumerate(exponents) for _ in range(power)]
        self.arity, self.product = len(exponents), Product(levels, 1.0, form)

    @property
    def error(self) -> float:
        """Largest error where all factors are in [-1, 1]."""
        return (len(self.factors) - 1) * self.product.error

    def forward(self, *v: Tensor) -> Tensor:
        """The approximate monomial; shapes that broadcast."""
        total = v[self.factors[0]]
        for factor in self.factors[1:]:
            total = self.product(total, v[factor])
        return total

    def on(self, *values: Affine) -> Affine:
        """Units on one column a variable, values in [-1, 1]."""
        total = values[self.factors[0]]
        for factor in self.factors[1:]:
            total = self.product.on(total, values[factor])
        return total


class Trapezoid(ReluBlock):
    r""":math:`\psi(t) = \sigma(t+2) - \sigma(t+1) - \sigma(t-1) + \sigma(t-2)`: 1 for |t| <= 1, 0 for |t| >= 2.

    arXiv:1908.01842, proof of theorem 1. :math:`\sum_{m=0}^N \psi(3(Nz - m)) = 1` for z in [0, 1].
    """

    def forward(self, t: Tensor) -> Tensor:
        """The trapezoid; any shape."""
        return (2.0 - t.abs()).clamp(0.0, 1.0)

    def on(self, *values: Affine) -> Affine:
        """Four units on one column of values."""
        (t,) = values
        return (t + 2.0).relu() - (t + 1.0).relu() - (t - 1.0).relu() + (t - 2.0).relu()


class Hat(ReluBlock):
    r"""The P1 nodal function on Kuhn's triangulation of the unit grid, exactly; ours for this construction.

    .. math:: \varphi(t) = \sigma\big(1 - \max(0, t_1, \dots, t_d) - \max(0, -t_1, \dots, -t_d)\big)

    1 at t = 0, 0 at all other points with integer coordinates, affine on each Kuhn simplex; the hats of all grid points
    sum to 1. 2d + 1 units. (Kuhn 1960; He et al., arXiv:1807.03973, for finite elements as ReLU networks.)

    Args:
        dim: d, at least 1.

    Raises:
        ValueError: if ``dim`` is below 1.
    """

    def __init__(self, dim: int) -> None:
        check_types(Hat, locals())
        check_least(1, dim=dim)
        super().__init__()
        self.arity = dim

    def forward(self, *t: Tensor) -> Tensor:
        """The hat of d coordinates; shapes that broadcast."""
        high, low = t[0].clamp(min=0.0), t[0].clamp(max=0.0)
        for coordinate in t[1:]:
            high, low = torch.maximum(high, coordinate), torch.minimum(low, coordinate)
        return (1.0 - high + low).clamp(min=0.0)

    def on(self, *values: Affine) -> Affine:
        """Units on d columns of values."""
        high, low = values[0].relu(), (-values[0]).relu()
        for coordinate in values[1:]:
            high, low = high + (coordinate - high).relu(), low + (-coordinate - low).relu()
        return (-(high + low) + 1.0).relu()


class Indicator(ReluBlock):
    r"""Falls from 1 to 0: 1 for a <= lo, exactly 0 for a >= hi, affine between.

    "steep": :math:`\sigma(\frac{hi-a}{hi-lo}) - \sigma(\frac{lo-a}{hi-lo})`, two units with weights that grow as the
    ramp narrows. "bounded" (arXiv:1908.01842, chart determination): a clip of slope 2 composed
    :math:`k = \lceil\log_2(hi/(hi-lo))\rceil` times, no weight above 2 but those of the output, 1/hi. It rises from
    :math:`s = \sigma(hi - a)` by :math:`s \mapsto 2\sigma(s) - 2\sigma(s - hi/2)`, the mirror image of the paper's
    clip, so that zero stays zero in floats; its ramp starts at :math:`(1 - 2^{-k})\,hi \ge lo`. For a >= 0.

    Args:
        low: lo, in [0, hi).
        high: hi, positive.
        slope: "steep" or "bounded".

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Indicator(0.5, 1.0)(torch.tensor([0.5, 0.75, 1.0])).tolist()
        [1.0, 0.5, 0.0]
    """

    def __init__(self, low: float, high: float, slope: Slope = "steep") -> None:
        super().__init__()
        check_choice(("bounded", "steep"), slope=slope)
        check_above(0, high=high)
        self.high, self.slope = float(high), slope
        if not 0.0 <= low < high:
            raise ValueError(f"Expected argument `low` to be in [0, high={high!r}) but got {low!r}.")
        # The small reduction keeps a ratio that is a power of two from one clip too many.
        self.clips = max(math.ceil(math.log2(high / (high - low)) - 1e-9), 0) if slope == "bounded" else 0
        self.low = high * (1.0 - 2.0**-self.clips) if slope == "bounded" else low

    def forward(self, a: Tensor) -> Tensor:
        """The indicator; any shape."""
        return ((self.high - a) / (self.high - self.low)).clamp(0.0, 1.0)

    def on(self, *values: Affine) -> Affine:
        """Units on one column of values >= 0."""
        (a,) = values
        if self.slope == "steep":
            scaled = a * (-1.0 / (self.high - self.low))
            width = self.high - self.low
            return (scaled + self.high / width).relu() - (scaled + self.low / width).relu()
        rising = (-a + self.high).relu()
        for _ in range(self.clips):
            rising = rising.relu() * 2.0 - (rising - self.high / 2.0).relu() * 2.0
        return rising * (1.0 / self.high)
