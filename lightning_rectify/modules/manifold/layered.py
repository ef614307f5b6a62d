"""``LayeredNetwork``: a ReLU network as its explicit sparse layers, with exact counts, composition and export."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice
from lightning_rectify.modules.manifold.graph import Affine, ReluGraph, concatenated

Count = Literal["dag", "layered"]


@dataclass(frozen=True)
class NetworkSize:
    """What a network costs, counted from its units.

    Attributes:
        weights: non-zero weights.
        biases: non-zero biases.
        units: ReLU units.
        depth: affine maps on the longest way from input to output: ReLU layers + 1.
        width: most units in one layer.
        largest: largest absolute value of a weight or bias.
    """

    weights: int
    biases: int
    units: int
    depth: int
    width: int
    largest: float

    @property
    def total(self) -> int:
        """Non-zero weights and biases, the W of the approximation theorems."""
        return self.weights + self.biases

    def as_dict(self) -> dict[str, int | float]:
        """The numbers by name, with ``total``."""
        return {**asdict(self), "total": self.total}


class LayeredNetwork(nn.Module):
    r"""A ReLU network :math:`x \mapsto A_L\,\sigma(A_{L-1}\,\sigma(\dots A_1 x + b_1 \dots) + b_{L-1}) + b_L`.

    It is made from values of a :class:`ReluGraph`, whose units may read any earlier unit (Yarotsky's networks,
    arXiv:1610.01145). Here every layer reads only the one before: a value that must wait passes through units of weight
    1, one for a unit's output (it is not negative), two for an input. Both are counted, see :meth:`size`.

    ``forward`` takes points, shape (B, D), and returns shape (B, K). The weights are buffers in sparse form;
    ``torch.export`` takes the module, with a dynamic batch.

    Args:
        outputs: the K values that the network computes.
        prune: leave out units that no output depends on.

    Raises:
        ValueError: if ``outputs`` is empty.

    Example:
        >>> from lightning_rectify.modules.manifold.blocks import Square
        >>> network = Square(levels=3).layers()
        >>> network(torch.tensor([[0.5], [0.25]])).flatten().tolist()
        [0.25, 0.0625]
        >>> network.size().total, network.size().depth
        (21, 4)
    """

    def __init__(self, outputs: Affine, prune: bool = True) -> None:
        super().__init__()
        if len(outputs) == 0:
            raise ValueError("Expected argument `outputs` to hold at least one value but got none.")
        self.in_features, self.out_features = outputs.graph.inputs, len(outputs)
        self._units, self._levels, self._outputs = _numbered(outputs, prune)
        self.depth = int(self._levels.max().item()) + 1 if len(self._levels) else 1
        for number, layer in enumerate(_strict_layers(self._units, self._levels, self._outputs, self.in_features)):
            for name, tensor in zip(("rows", "cols", "values", "bias"), layer, strict=True):
                self.register_buffer(f"{name}_{number}", tensor)

    def extra_repr(self) -> str:
        """Shape and size for ``print``."""
        size = self.size()
        return f"{self.in_features} -> {self.out_features}, depth={size.depth}, weights={size.total}"

    def layer(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One affine map: rows, columns and values of its entries and its bias; number in [0, depth)."""
        rows, cols, values, bias = (getattr(self, f"{name}_{number}") for name in ("rows", "cols", "values", "bias"))
        return rows, cols, values, bias

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, K) at points (B, D), in the dtype of the buffers."""
        x = x.to(self.bias_0.dtype)  # type: ignore[arg-type]
        # Sparse products are fast, but neither torch.export nor derivatives by x go through all of them.
        indexed = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
        for number in range(self.depth):
            rows, cols, values, bias = self.layer(number)
            if indexed:
                x = bias.repeat(x.shape[0], 1).index_add(1, rows, x[:, cols] * values)
            else:
                shape = (bias.numel(), x.shape[1])
                index = torch.stack([rows, cols])
                matrix = torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)
                x = torch.sparse.mm(matrix, x.t()).t() + bias
            if number < self.depth - 1:
                x = x.relu()
        return x

    def size(self, count: Count = "dag") -> NetworkSize:
        """Exact counts.

        Args:
            count: "dag" counts the units of the graph, whose connections may skip layers; "layered" counts the strict
                layers of this module, pass-through units included.

        Raises:
            ValueError: if ``count`` is unknown.
        """
        check_choice(("dag", "layered"), count=count)
        if count == "layered":
            layers = [self.layer(number) for number in range(self.depth)]
            return _size([(v, b) for _, _, v, b in layers], [len(b) for *_, b in layers[:-1]], self.depth)
        (_, _, values, bias), (_, _, out_values, out_bias) = self._units, self._outputs
        widths = torch.bincount(self._levels)[1:].tolist() if len(self._levels) else []
        return _size([(values, bias), (out_values, out_bias)], widths, self.depth)

    def on(self, values: Affine) -> Affine:
        """This network's units on values of another graph: its outputs there.

        Args:
            values: D values of any graph.

        Raises:
            ValueError: if they are not D.
        """
        if len(values) != self.in_features:
            raise ValueError(f"Expected argument `values` to hold {self.in_features} values but got {len(values)}.")
        graph, node = values.graph, torch.zeros(len(self._levels), dtype=torch.int64)
        for level in range(1, self.depth):
            units = (self._levels == level).nonzero().flatten()
            new = _placed(graph, values, node, _chosen(self._units, units))
            node[units] = torch.arange(len(units)) + graph.nodes
            graph.relu(new)
        return _placed(graph, values, node, self._outputs)

    def to_sequential(self) -> nn.Sequential:
        """The same function as dense ``Linear`` and ``ReLU`` layers, for tools that know no sparse ones."""
        layers: list[nn.Module] = []
        width = self.in_features
        for number in range(self.depth):
            rows, cols, values, bias = self.layer(number)
            linear = nn.Linear(width, bias.numel(), dtype=bias.dtype, device=bias.device)
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[rows, cols] = values
                linear.bias.copy_(bias)
            layers += [linear, nn.ReLU()]
            width = bias.numel()
        return nn.Sequential(*layers[:-1])

    @staticmethod
    def series(*networks: "LayeredNetwork") -> "LayeredNetwork":
        """The networks one after the other; the affine maps that meet become one."""
        values = ReluGraph(networks[0].in_features).input()
        for network in networks:
            values = network.on(values)
        return LayeredNetwork(values)

    @staticmethod
    def parallel(*networks: "LayeredNetwork") -> "LayeredNetwork":
        """The networks on one input, their outputs one after the other."""
        values = ReluGraph(networks[0].in_features).input()
        return LayeredNetwork(concatenated([network.on(values) for network in networks]))

    @staticmethod
    def sum(*networks: "LayeredNetwork") -> "LayeredNetwork":
        """The sum of the networks' outputs on one input."""
        values = ReluGraph(networks[0].in_features).input()
        total = networks[0].on(values)
        for network in networks[1:]:
            total = total + network.on(values)
        return LayeredNetwork(total)


Entries = tuple[Tensor, Tensor, Tensor, Tensor]  # rows, cols, values, bias


def _size(maps: list[tuple[Tensor, Tensor]], widths: list[int], depth: int) -> NetworkSize:
    largest = max((part.abs().max().item() for pair in maps for part in pair if part.numel()), default=0.0)
    return NetworkSize(
        weights=sum(int((values != 0).sum()) for values, _ in maps),
        biases=sum(int((bias != 0).sum()) for _, bias in maps),
        units=sum(widths),
        depth=depth,
        width=max(widths, default=0),
        largest=largest,
    )


def _chosen(entries: Entries, index: Tensor) -> Entries:
    """Some rows of a sparse affine map, in the order of ``index``."""
    rows, cols, values, bias = entries
    place = torch.full((len(bias),), -1)
    place[index] = torch.arange(len(index))
    keep = place[rows] >= 0
    return place[rows[keep]], cols[keep], values[keep], bias[index]


def _numbered(outputs: Affine, prune: bool) -> tuple[Entries, Tensor, Entries]:
    """The graph's units as one sparse map, their levels, and the outputs; nodes numbered anew without dead units."""
    graph, inputs = outputs.graph, outputs.graph.inputs
    units = concatenated(graph.units) if graph.units else graph.constant(torch.zeros(0))
    alive = torch.full((graph.nodes,), not prune)
    alive[outputs.cols] = True
    for level in range(int(graph.levels.max()), 0, -1) if prune else ():
        readers = alive[inputs:] & (graph.levels[inputs:] == level)
        alive[units.cols[readers[units.rows]]] = True
    alive[:inputs] = True
    number = torch.cumsum(alive, 0) - 1
    rows, cols, values, bias = _chosen(
        (units.rows, units.cols, units.values, units.bias), alive[inputs:].nonzero().flatten()
    )
    kept = (rows, number[cols], values, bias)
    return kept, graph.levels[alive][inputs:], (outputs.rows, number[outputs.cols], outputs.values, outputs.bias)


def _strict_layers(units: Entries, levels: Tensor, outputs: Entries, inputs: int) -> list[Entries]:
    """One sparse affine map a layer, with pass-through units where a value waits."""
    depth = int(levels.max()) + 1 if len(levels) else 1
    born = torch.cat([torch.zeros(inputs, dtype=torch.int64), levels])
    last = born.scatter_reduce(0, units[1], levels[units[0]], "amax")  # the level of the last reader
    last[outputs[1]] = depth
    # Where a node's value stands in the layer before; an input that waits is two units, and the value their difference.
    place, minus = torch.arange(len(born)), torch.full((len(born),), -1)
    layers = []
    for level in range(1, depth + 1):
        own = (born == level).nonzero().flatten()
        rows, cols, values, bias = _chosen(units, own - inputs) if level < depth else outputs
        waits = ((born < level) & (last > level)).nonzero().flatten()
        signed = waits[waits < inputs]
        split = minus[cols] >= 0
        second = len(own) + len(waits)  # the negative halves come last
        held, half = torch.arange(len(waits)), torch.arange(len(signed))
        ones = torch.ones(len(waits) + len(signed), dtype=torch.float64)
        if level == 1:
            ones[len(waits) :] = -1.0
        index = [rows, rows[split], len(own) + held, second + half]
        onto = [place[cols], minus[cols[split]], place[waits], (place if level == 1 else minus)[signed]]
        bias = torch.cat([bias, torch.zeros(len(waits) + len(signed), dtype=torch.float64)])
        layers.append(_sorted(torch.cat(index), torch.cat(onto), torch.cat([values, -values[split], ones]), bias))
        place, minus = torch.full_like(place, -1), torch.full_like(minus, -1)
        place[own], place[waits], minus[signed] = torch.arange(len(own)), len(own) + held, second + half
    return layers


def _sorted(rows: Tensor, cols: Tensor, values: Tensor, bias: Tensor) -> Entries:
    order = torch.argsort(rows * (int(cols.max()) + 1 if cols.numel() else 1) + cols)
    return rows[order], cols[order], values[order], bias


def _placed(graph: ReluGraph, values: Affine, node: Tensor, entries: Entries) -> Affine:
    """A sparse map over [inputs, units] as values of another graph, where ``node`` says which node a unit became."""
    rows, cols, weights, bias = entries
    inputs = len(values)
    direct = cols < inputs
    mixed = values.mixed(rows[direct], cols[direct], weights[direct], len(bias)) + bias
    rest = ~direct
    nodes = Affine(graph, rows[rest], node[cols[rest] - inputs], weights[rest], torch.zeros_like(bias))
    return mixed + nodes
