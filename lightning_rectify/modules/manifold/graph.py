"""An explicit graph of ReLU units and the affine values between them: what every count of a network is taken from.

A *node* is an input coordinate or the output of one ReLU unit; nodes are numbered, the inputs first. An
:class:`Affine` is a column of values that are affine in the nodes, held as sparse triples; :meth:`ReluGraph.relu` makes
each of its values a unit. Affine maps cost nothing by themselves: they become the weights of the units that read them.
All numbers are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least


@dataclass(frozen=True, eq=False)
class Affine:
    r"""K values :math:`v_k = b_k + \sum_j A_{kj}\, u_j`, affine in the nodes u of a graph.

    ``+``, ``-``, ``*`` by a number or a column of numbers, ``[index]`` and the methods below give new values of the
    same graph.

    Attributes:
        graph: the graph whose nodes are meant.
        rows: row k of each entry of A, ascending, int64, shape (E,).
        cols: node j of each entry, int64, shape (E,); no pair (k, j) comes twice.
        values: the entries, none of them zero, float64, shape (E,).
        bias: b, float64, shape (K,).
    """

    graph: "ReluGraph"
    rows: Tensor
    cols: Tensor
    values: Tensor
    bias: Tensor

    def __len__(self) -> int:
        return self.bias.numel()

    def __add__(self, other: "Affine | Tensor | float") -> "Affine":
        if not isinstance(other, Affine):
            return Affine(self.graph, self.rows, self.cols, self.values, self.bias + other)
        if len(self) != len(other):
            raise ValueError(f"Expected argument `other` to hold {len(self)} values but got {len(other)}.")
        return _collected(
            self.graph,
            torch.cat([self.rows, other.rows]),
            torch.cat([self.cols, other.cols]),
            torch.cat([self.values, other.values]),
            self.bias + other.bias,
        )

    def __mul__(self, factor: Tensor | float) -> "Affine":
        column = torch.as_tensor(factor, dtype=torch.float64).expand(len(self))
        values = self.values * column[self.rows]
        keep = values != 0
        return Affine(self.graph, self.rows[keep], self.cols[keep], values[keep], self.bias * column)

    def __neg__(self) -> "Affine":
        return self * -1.0

    def __sub__(self, other: "Affine | Tensor | float") -> "Affine":
        return self + (-other)

    def __getitem__(self, index: Tensor | slice | int) -> "Affine":
        chosen = torch.arange(len(self))[index].reshape(-1)
        return self.mixed(torch.arange(len(chosen)), chosen, torch.ones(len(chosen)), len(chosen))

    def mixed(self, rows: Tensor, cols: Tensor, values: Tensor, size: int) -> "Affine":
        """The product of a sparse matrix and this column.

        Args:
            rows: row of each entry of the matrix, int64, shape (E,).
            cols: column of each entry, in [0, K), shape (E,).
            values: the entries, shape (E,).
            size: number of rows of the matrix.

        Returns:
            ``size`` values.
        """
        values = values.to(torch.float64)
        pointer = torch.searchsorted(self.rows, torch.arange(len(self) + 1))
        owner, entry = _ranges(pointer[cols], pointer[cols + 1] - pointer[cols])
        bias = torch.zeros(size, dtype=torch.float64).index_add_(0, rows, values * self.bias[cols])
        return _collected(self.graph, rows[owner], self.cols[entry], values[owner] * self.values[entry], bias)

    def times(self, matrix: Tensor) -> "Affine":
        """The product of a dense matrix, shape (M, K), and this column; M values."""
        rows, cols = matrix.nonzero(as_tuple=True)
        return self.mixed(rows, cols, matrix[rows, cols], matrix.shape[0])

    def summed(self, groups: Tensor, size: int, weights: Tensor | None = None) -> "Affine":
        """Sums of the values by group.

        Args:
            groups: group of each value, int64 in [0, size), shape (K,).
            size: number of groups.
            weights: factor of each value, shape (K,); 1 if left out.

        Returns:
            ``size`` values.
        """
        return self.mixed(groups, torch.arange(len(self)), torch.ones(len(self)) if weights is None else weights, size)

    def relu(self) -> "Affine":
        """The ReLU of each value: K new units of the graph."""
        return self.graph.relu(self)

    def absolute(self) -> "Affine":
        """The absolute values, as ReLU(v) + ReLU(-v): two units each."""
        return self.relu() + (-self).relu()

    def held(self, bound: float | None = None) -> "Affine":
        """The same values on new units, so that only these have to wait for later.

        Args:
            bound: at least the largest absolute value: one unit, ReLU(v + bound) - bound. Without it two,
                ReLU(v) - ReLU(-v).
        """
        if bound is None:
            return self.relu() - (-self).relu()
        return (self + bound).relu() - bound


def concatenated(parts: Sequence[Affine]) -> Affine:
    """The values of all parts, one after the other; all of one graph.

    Raises:
        ValueError: if there are no parts.
    """
    if not parts:
        raise ValueError("Expected argument `parts` to hold at least one Affine but got none.")
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    rows = torch.cat([part.rows + start for part, start in zip(parts, starts, strict=False)])
    cols, values = torch.cat([part.cols for part in parts]), torch.cat([part.values for part in parts])
    return Affine(parts[0].graph, rows, cols, values, torch.cat([part.bias for part in parts]))


@dataclass(eq=False)
class ReluGraph:
    """ReLU units over some inputs; each unit reads inputs and earlier units.

    Args:
        inputs: number of input coordinates, at least 1.

    Raises:
        ValueError: if ``inputs`` is below 1.

    Example:
        >>> graph = ReluGraph(1)
        >>> size = graph.input().absolute()
        >>> len(size), graph.nodes, size.values.tolist()
        (1, 3, [1.0, 1.0])
    """

    inputs: int
    units: list[Affine] = field(default_factory=list, init=False, repr=False)
    levels: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Start with the inputs at level 0."""
        check_least(1, inputs=self.inputs)
        self.levels = torch.zeros(self.inputs, dtype=torch.int64)

    @property
    def nodes(self) -> int:
        """Number of inputs and units so far."""
        return self.levels.numel()

    def input(self) -> Affine:
        """The inputs as values."""
        return self._nodes(0, self.inputs)

    def constant(self, values: Tensor) -> Affine:
        """Values that read nothing, shape (K,)."""
        none = torch.zeros(0, dtype=torch.int64)
        return Affine(self, none, none, torch.zeros(0, dtype=torch.float64), values.to(torch.float64))

    def relu(self, values: Affine) -> Affine:
        """Make each value a unit; its level is one above the highest that it reads.

        Args:
            values: K values of this graph.

        Returns:
            The outputs of the K new units.

        Raises:
            ValueError: if the values belong to another graph.
        """
        if values.graph is not self:
            raise ValueError("Expected argument `values` to belong to this graph but got values of another one.")
        read = torch.zeros(len(values), dtype=torch.int64)
        read = read.scatter_reduce(0, values.rows, self.levels[values.cols], "amax")
        start = self.nodes
        self.units.append(values)
        self.levels = torch.cat([self.levels, read + 1])
        return self._nodes(start, len(values))

    def _nodes(self, start: int, count: int) -> Affine:
        index = torch.arange(count)
        ones = torch.ones(count, dtype=torch.float64)
        return Affine(self, index, index + start, ones, torch.zeros(count, dtype=torch.float64))


def _collected(graph: ReluGraph, rows: Tensor, cols: Tensor, values: Tensor, bias: Tensor) -> Affine:
    """Sort the entries, add up those of one place and drop zeros."""
    keys, inverse = torch.unique(rows * graph.nodes + cols, return_inverse=True)
    totals = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, values)
    keys, totals = keys[totals != 0], totals[totals != 0]
    return Affine(graph, keys // graph.nodes, keys % graph.nodes, totals, bias)


def _ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of the ranges [start, start + count), and which range each is of."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    before = torch.cumsum(counts, 0) - counts
    return owner, starts[owner] + torch.arange(len(owner)) - before[owner]
