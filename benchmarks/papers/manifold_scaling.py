"""How does the error of the construction of arXiv:1908.01842 fall with its number of weights, whatever D is?

Networks are built, not trained, for a known function on the circle, the sphere, the torus and a curve that spans all of
R^D, in R^3, R^10, R^100 and R^1000: as in the proof ("paper"), with our changes ("lean", "p1", "telescope",
"telescope_p1"), and with few wide charts (radius 0.8 of the reach instead of 0.6, "wide"). Each is measured by its
largest error at 10,000 points and by the exact count of its non-zero weights and biases.

Beside them, on circle and sphere: a dense network of three layers, trained on fresh points without end (rate tuned on
another seed, three seeds, 3,000 steps); kernel ridge and k-NN on n random points without noise (three seeds), which
store n (D + 1) numbers; and for D = 3 Yarotsky's network on the whole cube, and what is left of it where the manifold
passes. On the cube a grid of N has (N + 1)^D cells, each of at least one weight: at N = 4 and D = 10 that is 1e7.

    python benchmarks/papers/manifold_scaling.py [--jobs 2] [--manifolds circle sphere ...]

Each run leaves a file below ``--work``, so that an interrupted study goes on. Writes the JSON and a figure beside it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from manifold_figure import plot
from manifold_rivals import RATES, ambient, kernel_ridge, mlp, nearest
from manifold_targets import TEST, Target, target
from single_runs import keep, run_all, split, study_parser
from timing import environment, output_path, write_result

from lightning_rectify.modules.manifold import ChartNet

NAME = "manifold_scaling"
MANIFOLDS = ("circle", "sphere", "torus", "moment curve")
DIMS = (3, 10, 100, 1000)
SEEDS = (1, 2, 3)
STEPS = 3000
WIDE = {"radius": 0.8, "cover": 0.92}
#: manifold -> label -> options of ``ChartNet.from_manifold`` and grids
CONSTRUCTIONS: dict[str, dict[str, tuple[dict[str, Any], tuple[int, ...]]]] = {
    "circle": {
        "paper": ({"mode": "paper"}, (4, 8, 16, 32)),
        "paper, r = 0.8": ({"mode": "paper", "radius": 0.8, "cover": 0.57}, (8, 16, 32, 64)),
        "lean": ({"mode": "lean"}, (8, 16, 32, 64)),
        "p1": ({"mode": "p1"}, (32, 64, 128, 256)),
        "telescope": ({"mode": "telescope"}, (4, 8, 16, 32)),
        "telescope_p1": ({"mode": "telescope_p1"}, (8, 16, 32, 64, 128, 256)),
    },
    "sphere": {
        "paper, r = 0.8": ({"mode": "paper", "radius": 0.8}, (4, 8)),
        "lean": ({"mode": "lean"}, (4, 8, 16)),
        "p1": ({"mode": "p1"}, (12, 24, 48, 96)),
        "telescope": ({"mode": "telescope"}, (3, 4, 6, 8, 12, 16)),
        "telescope, wide": ({"mode": "telescope", **WIDE}, (6, 8, 12, 16, 24, 32)),
        "telescope_p1": ({"mode": "telescope_p1"}, (6, 12, 24, 48)),
        "telescope_p1, wide": ({"mode": "telescope_p1", **WIDE}, (8, 16, 32, 64)),
    },
    "torus": {"telescope_p1": ({"mode": "telescope_p1", "cover": 0.85}, (3, 6, 12))},
    "moment curve": {"telescope_p1": ({"mode": "telescope_p1"}, (16, 32, 64))},
}
#: with distances so exact that only D differs: does the error?
SAME: dict[str, dict[str, Any]] = {
    "circle": {"mode": "telescope_p1", "grid": 32},
    "sphere": {"mode": "telescope_p1", "grid": 12, **WIDE},
}


@dataclass(frozen=True)
class Case:
    """One network: which kind, for what, how large (grid, width, or number of points)."""

    kind: str
    manifold: str
    label: str
    ambient_dim: int
    size: int
    seed: int = 0
    quick: bool = False

    @property
    def file(self) -> str:
        words = f"{self.kind}_{self.manifold}_{self.label}_{self.ambient_dim}_{self.size}_s{self.seed}"
        return "".join(c if c.isalnum() else "_" for c in words) + ".json"


def cases(manifolds: Sequence[str], dims: Sequence[int]) -> Iterator[Case]:
    """Constructions first, as they take seconds."""
    for name in manifolds:
        # the curve has an even D
        for dim in [4 if (name, d) == ("moment curve", 3) else d for d in dims]:
            for label, (_, grids) in CONSTRUCTIONS[name].items():
                yield from (Case("construction", name, label, dim, grid) for grid in grids)
            if name in SAME:
                yield Case("same", name, "10 levels in the distances", dim, int(SAME[name]["grid"]))
    for name in [name for name in manifolds if name in SAME]:
        if 3 in dims:
            for grid in (4, 8, 16):
                yield Case("ambient", name, "cube, touched cells", 3, grid)
            for grid in (2, 4, 8):
                yield Case("ambient", name, "cube, all cells", 3, grid)
        for dim, seed in product(dims, SEEDS):
            yield from (Case("kernel ridge", name, "kernel ridge", dim, n, seed) for n in (30, 100, 300, 1000))
            yield from (Case("k-nn", name, "k-NN", dim, n, seed) for n in (100, 1000, 10_000))
    ends_first = sorted(dims, key=lambda dim: dim not in (min(dims), max(dims)))
    for width, dim, name in product((8, 16, 32, 64, 128), ends_first, [name for name in manifolds if name in SAME]):
        yield from (Case("mlp", name, "MLP", dim, width, seed) for seed in SEEDS)


def quick_cases() -> list[Case]:
    return [
        *(Case("construction", "circle", "telescope_p1", d, n, 0, True) for d in (3, 10) for n in (8, 16, 32)),
        *(Case("construction", "sphere", "telescope_p1, wide", 3, grid, 0, True) for grid in (4, 8)),
        *(Case("same", "circle", "10 levels in the distances", dim, 32, 0, True) for dim in (3, 10)),
        Case("ambient", "circle", "cube, touched cells", 3, 3, 0, True),
        Case("kernel ridge", "circle", "kernel ridge", 3, 40, 1, True),
        Case("k-nn", "circle", "k-NN", 3, 40, 1, True),
        Case("mlp", "circle", "MLP", 3, 8, 1, True),
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def run(case: Case, work: Path) -> dict[str, Any]:
    """One line, on one thread."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS and OpenMP of numpy and scikit-learn
    clock = time.process_time()
    problem = target(case.manifold, case.ambient_dim)
    makers: dict[str, Callable[[Case, Target], tuple[Callable[[Tensor], Tensor], dict[str, Any]]]] = {
        "construction": construct, "same": construct, "ambient": on_the_cube, "mlp": trained,
        "kernel ridge": lambda case, problem: counted(*kernel_ridge(problem, case.size, case.seed)),
        "k-nn": lambda case, problem: counted(*nearest(problem, case.size, case.seed)),
    }  # fmt: skip
    predict, found = makers[case.kind](case, problem)
    row = {name: value for name, value in asdict(case).items() if name != "quick"}
    row |= {**found, **errors(predict, problem), "cpu_seconds": time.process_time() - clock}
    return keep(work / case.file, asdict(case), row)


def counted(predict: Callable[[Tensor], Tensor], weights: int) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    return predict, {"weights": weights}


@torch.no_grad()
def errors(predict: Callable[[Tensor], Tensor], problem: Target, points: Tensor | None = None) -> dict[str, float]:
    x = problem.test_points() if points is None else points
    values = torch.cat([predict(part) for part in x.split(1000)])
    difference = (values - problem.f(x)).abs()
    return {"sup": difference.max().item(), "rmse": difference.square().mean().sqrt().item()}


def construct(case: Case, problem: Target) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    if case.kind == "same":
        options = {**SAME[case.manifold], "distance_levels": 10, "pairing_levels": 9}
    else:
        options = {**CONSTRUCTIONS[case.manifold][case.label][0], "grid": case.size}
    net = ChartNet.from_manifold(problem.manifold, problem.f, **options)
    report = net.report()
    return net, {
        "weights": report.dag.total, "local": report.local, "distance": report.distance,
        "projection": report.projection, "layered": report.layered.total, "depth": report.dag.depth,
        "width": report.dag.width, "largest": report.dag.largest, "charts": report.charts, "radius": report.radius,
        "reach": problem.manifold.reach,
    }  # fmt: skip


def on_the_cube(case: Case, problem: Target) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """With the fewest levels that cost at most a tenth of the error."""
    touched, exact, levels = "touched" in case.label, 14, 3
    wanted = 1.1 * errors(ambient(problem, case.size, exact, True)[0], problem)["sup"]
    while errors(ambient(problem, case.size, levels, True)[0], problem)["sup"] > wanted:
        levels += 1
    return counted(*ambient(problem, case.size, levels, touched))


def trained(case: Case, problem: Target) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    steps = 30 if case.quick else STEPS
    lr = tuned_rate(case.manifold, case.ambient_dim, case.size, steps // 3)
    predict, weights = mlp(problem, case.size, lr, case.seed, steps)
    return predict, {"weights": weights, "lr": lr}


@cache
def tuned_rate(manifold: str, ambient_dim: int, width: int, steps: int) -> float:
    """The best of three after a third of the steps on seed 101, by the largest error at validation points."""
    problem = target(manifold, ambient_dim)
    val = problem.place(problem.draw(2000, torch.Generator().manual_seed(102)))
    return min(RATES, key=lambda lr: errors(mlp(problem, width, lr, 101, steps)[0], problem, val)["sup"])


# -- tables ------------------------------------------------------------------------------------------------------------


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """By least squares of the logarithms, of the last three points with an error below 3e-2."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if 0 < b < 3e-2][-3:]
    if len(pairs) < 3:
        return None
    mean_x, mean_y = (sum(values) / 3 for values in zip(*pairs, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in pairs) / sum((a - mean_x) ** 2 for a, _ in pairs)


def needed(weights: Sequence[float], sups: Sequence[float], error: float) -> float | None:
    """Weights for an error, between two sizes on a line of logarithms; None where no size reaches it, or all do."""
    for (w, e), (more, less) in pairwise(zip(weights, sups, strict=True)):
        if e > error >= less:
            return math.exp(math.log(w) + math.log(more / w) * math.log(e / error) / math.log(e / less))
    return None


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a manifold and label: slopes, weights for 1e-2 and 1e-3 in each R^D, how far the errors differ over D."""
    table = []
    for name, label in dict.fromkeys((row["manifold"], row["label"]) for row in rows):
        group = [row for row in rows if (row["manifold"], row["label"]) == (name, label)]
        line: dict[str, Any] = {"manifold": name, "label": label, "kind": group[0]["kind"], "dims": {}}
        by_size: dict[int, list[float]] = {}
        for dim in sorted({row["ambient_dim"] for row in group}):
            sizes = sorted({row["size"] for row in group if row["ambient_dim"] == dim})
            runs = [[row for row in group if (row["ambient_dim"], row["size"]) == (dim, size)] for size in sizes]
            # of several seeds the median
            sups = [sorted(row["sup"] for row in same)[(len(same) - 1) // 2] for same in runs]
            weights = [same[0]["weights"] for same in runs]
            for size, sup in zip(sizes, sups, strict=True):
                by_size.setdefault(size, []).append(sup)
            found = {"1e-2": needed(weights, sups, 1e-2), "1e-3": needed(weights, sups, 1e-3), "best": min(sups)}
            found |= {"worst": max(sups), "smallest": min(weights), "largest": max(weights)}
            found |= {"slope_size": slope(sizes, sups), "slope_weights": slope(weights, sups)}
            if "local" in group[0]:
                found["slope_local"] = slope([same[0]["local"] for same in runs], sups)
                found |= {key: runs[-1][0][key] for key in ("charts", "reach", "distance", "projection", "depth")}
            line["dims"][str(dim)] = found
        line["spread"] = max((max(sups) / min(sups) for sups in by_size.values() if len(sups) > 1), default=None)
        table.append(line)
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME)
    arguments.add_argument("--manifolds", nargs="+", choices=MANIFOLDS, default=list(MANIFOLDS))
    arguments.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="D; the curve takes 4 for 3")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    chosen, work = list(cases(args.manifolds, args.dims)), args.work
    if args.quick:
        chosen, work = quick_cases(), path.parent / f"{NAME}_runs"
    work.mkdir(parents=True, exist_ok=True)
    finished, todo = split(chosen, lambda case: (work / case.file, asdict(case)))
    rows = dict(finished)
    settings = {"test_points": TEST, "seeds": list(SEEDS), "steps": STEPS, "batch_size": 256}

    def write() -> None:
        done = [rows[case] for case in chosen if case in rows]
        found = {**environment(packages=("scikit-learn",)), "threads": 1}
        write_result(path, NAME, settings, done, table=summarize(done), environment=found)

    for case, row, left in run_all(partial(run, work=work), todo, 0 if args.quick else args.jobs, runs_a_process=20):
        rows[case] = row
        print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in row.items()}, left, flush=True)
        write()
    write()
    plot([rows[case] for case in chosen], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
