"""Values at points near an unknown manifold: are charts (after arXiv:1908.01842) as good as what one takes instead?

A function on the sphere, 2,000 points in R^30 and R^300, embedded isometrically and by sines (which fill all D
dimensions), without noise, with noise of the values (0.05), and of points and values (0.05 each). Charts know neither
the dimension nor the noise; the others are tuned on 1,000 validation points that charts do not see:

- charts: ``ManifoldRegressor(dim="auto")``, least squares alone;
- charts, trained: the same, then 30 epochs with anchor and early stopping (which uses the validation points);
- MLP: three ReLU layers, RectifiedAdam, width and rate tuned, the best epoch;
- kernel ridge (Gaussian kernel, width and ridge tuned), k-NN (k and weights tuned), random forest (leaf size tuned):
  scikit-learn's.

Error: root mean square over 5,000 fresh points against the true values. CPU seconds of one thread to fit (the chosen
setting), to tune (all settings), to predict 1,000 points; peak memory of a process of its own. n = 50,000 is about time
and memory: values with noise, the first seed only, the forest untuned; kernel ridge's matrix is 20 GB there and is not
built, as its line says.

    python benchmarks/papers/manifold_points.py [--methods charts mlp ...] [--sizes 2000 50000] [--seeds 11 ...]

Each run leaves a file below ``--work``, so that an interrupted study goes on; the result is written after every run.
No setting of the charts was chosen on these seeds.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsRegressor
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from single_runs import keep, run_all, split, study_parser
from timing import environment, output_path, write_result

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.manifolds import ManifoldData
from lightning_rectify.modules.manifold import ManifoldRegressor
from lightning_rectify.optim import RectifiedAdam

NAME = "manifold_points"
SEEDS = (11, 12, 13, 14, 15)
METHODS = ("charts", "kernel ridge", "k-nn", "random forest", "charts, trained", "mlp")  # the slowest last
NOISES = {"clean": (0.0, 0.0), "values": (0.0, 0.05), "points and values": (0.05, 0.05)}
LARGEST_KERNEL = 8 * 2**30  # bytes
LARGE = 10_000  # points: above, one setting of noise and one seed

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One fit: which data, which method."""

    method: str
    size: int
    ambient_dim: int
    embedding: str
    noise: str
    seed: int
    quick: bool = False

    def data(self) -> ManifoldData:
        points, values = NOISES[self.noise]
        data = ManifoldData(
            "sphere", self.ambient_dim, self.embedding, points, values, train_size=self.size, val_size=1000,
            test_size=5000, batch_size=100 if self.size <= LARGE else 200, seed=self.seed,
        )  # fmt: skip
        data.setup("fit")
        return data

    @property
    def file(self) -> str:
        words = f"{self.method}_{self.size}_{self.ambient_dim}_{self.embedding}_{self.noise}_s{self.seed}"
        return "".join(c if c.isalnum() else "_" for c in words) + ".json"


def cases(methods: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> list[Case]:
    """Seed by seed, so that a study cut short has all lines; large sizes in one noise and with the first seed only."""
    found = []
    for seed, size, method in product(seeds, sizes, methods):
        large = size > LARGE
        if large and seed != seeds[0]:
            continue
        settings = product((300,) if large else (30, 300), ("orthogonal", "sine"), ("values",) if large else NOISES)
        found += [Case(method, size, *setting, seed) for setting in settings]
    return found


# -- methods: fitted on training points, tuned on validation points ----------------------------------------------------


def charts(case: Case, data: ManifoldData, train: bool) -> tuple[Predict, dict[str, Any]]:
    clock = time.process_time()
    model = ManifoldRegressor(case.ambient_dim, seed=case.seed).fit_points(*data.training_points())
    if train:
        silence = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer: Any = Trainer(
            accelerator="cpu", devices=1, max_epochs=1 if case.quick else 30, num_sanity_val_steps=-1,
            **dict.fromkeys(silence, False),
        )  # fmt: skip
        trainer.fit(model, data)
    model.eval()
    found = {"charts": len(model.network), "dim": model.network.dim, "degree": int(model.network.size)}
    return model, {"fit_seconds": time.process_time() - clock, **found}


def mlp(case: Case, data: ManifoldData) -> tuple[Predict, dict[str, Any]]:
    epochs = 2 if case.quick else max(200 * 2000 // case.size, 20)
    grid = [(64, 3e-3)] if case.quick else list(product((64, 256), (1e-3, 3e-3)))
    return tuned(grid, partial(_mlp, case, epochs=epochs), data)


def _mlp(case: Case, data: ManifoldData, width: int, lr: float, epochs: int) -> Predict:
    (x, y), val = data.training_points(), data._parts["val"]
    loc, scale = y.mean(), y.std()
    seed_everything(case.seed, verbose=False)
    layers = [nn.Linear(case.ambient_dim, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(width, 1))
    optimizer = RectifiedAdam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept = float("inf"), {}
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(data.batch_size):
            optimizer.zero_grad()
            (network(x[rows])[:, 0] - (y[rows] - loc) / scale).square().mean().backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            error = (network(val.x)[:, 0] * scale + loc - val.y).square().mean().item()
        if error < best:
            best, kept = error, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(kept)
    return lambda points: network(points)[:, 0] * scale + loc


def scikit(case: Case, data: ManifoldData) -> tuple[Predict, dict[str, Any]]:
    makers: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
        "kernel ridge": (
            lambda gamma, alpha: KernelRidge(kernel="rbf", gamma=gamma, alpha=alpha),
            list(product((0.1, 0.3, 1.0, 3.0), (1e-6, 1e-4, 1e-2, 1e-1))),
        ),
        "k-nn": (
            lambda k, weights: KNeighborsRegressor(k, weights=weights),
            list(product((3, 5, 10, 20, 40), ("uniform", "distance"))),
        ),
        "random forest": (
            lambda leaf, share: RandomForestRegressor(
                10 if case.quick else 100, min_samples_leaf=leaf, max_features=share, random_state=case.seed, n_jobs=1
            ),
            [(3, 0.1)]
            if case.size > LARGE
            else list(product((1, 3), (1.0, 0.33) if case.ambient_dim < 100 else (0.33, 0.1))),
        ),
    }
    make, grid = makers[case.method]

    def fit(data: ManifoldData, *setting: Any) -> Predict:
        model = make(*setting).fit(*(part.double().numpy() for part in data.training_points()))
        return lambda points: torch.from_numpy(np.asarray(model.predict(points.double().numpy())))

    return tuned(grid[:1] if case.quick else grid, fit, data)


def tuned(
    grid: Sequence[tuple[Any, ...]], fit: Callable[..., Predict], data: ManifoldData
) -> tuple[Predict, dict[str, Any]]:
    """The fit with the least error on the validation points."""
    val, found = data._parts["val"], []
    for setting in grid:
        clock = time.process_time()
        predict = fit(data, *setting)
        seconds = time.process_time() - clock
        with torch.no_grad():
            found.append(((predict(val.x) - val.y).square().mean().item(), seconds, setting, predict))
    _, seconds, setting, predict = min(found, key=lambda entry: entry[0])
    return predict, {"fit_seconds": seconds, "tune_seconds": sum(entry[1] for entry in found), "setting": list(setting)}


# -- one run -----------------------------------------------------------------------------------------------------------


def run(case: Case, work: Path) -> dict[str, Any]:
    """One line, on one thread."""
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS and OpenMP of numpy and scikit-learn
    row = {name: value for name, value in asdict(case).items() if name != "quick"}
    needed = 8 * case.size**2
    if case.method == "kernel ridge" and needed > LARGEST_KERNEL:
        row |= {"status": f"not run: a matrix of {needed / 1e9:.0f} GB"}
    else:
        row |= {"status": "measured", **measure(case)}
    return keep(work / case.file, asdict(case), row)


def measure(case: Case) -> dict[str, Any]:
    data = case.data()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.method.startswith("charts"):
        predict, row = charts(case, data, train=case.method != "charts")
    elif case.method == "mlp":
        predict, row = mlp(case, data)
    else:
        predict, row = scikit(case, data)
    test, times = data._parts["test"], []
    with torch.no_grad():
        error = (predict(test.x) - test.y).square().mean().sqrt().item()
        for start in range(0, 5000, 1000):
            clock = time.process_time()
            predict(test.x[start : start + 1000])
            times.append(time.process_time() - clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["predict_ms_per_1000"] = 1e3 * statistics.median(times)
    row |= {"rmse": error, "peak_mib": peak // 1024, "peak_above_data_mib": (peak - before) // 1024}
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a setting and method: means over the seeds, and the standard deviation of the error."""
    keys = ("size", "ambient_dim", "embedding", "noise", "method")
    table = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        group = [row for row in rows if tuple(row[name] for name in keys) == key]
        line: dict[str, Any] = {**dict(zip(keys, key, strict=True)), "runs": len(group), "status": group[0]["status"]}
        for name in ("rmse", "fit_seconds", "tune_seconds", "predict_ms_per_1000", "peak_mib", "peak_above_data_mib"):
            values = [row[name] for row in group if name in row]
            line[name] = statistics.fmean(values) if values else None
        errors = [row["rmse"] for row in group if "rmse" in row]
        line["rmse_sd"] = statistics.stdev(errors) if len(errors) > 1 else None
        line["dims"] = sorted({row["dim"] for row in group if "dim" in row})
        table.append(line)
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=SEEDS)
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments.add_argument("--sizes", nargs="+", type=int, default=[2000, 50_000], help="training points")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    chosen, work, jobs = cases(args.methods, args.sizes, args.seeds), args.work, args.jobs
    if args.quick:
        chosen = [Case(method, 200, 30, "orthogonal", "values", 1, quick=True) for method in METHODS]
        chosen.append(Case("kernel ridge", 50_000, 30, "orthogonal", "values", 1, quick=True))
        work = path.parent / f"{NAME}_runs"
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before a fork: no pool of threads is lost
    done, todo = split(chosen, lambda case: (work / case.file, asdict(case)))
    rows = [row for _, row in done]
    settings = {
        "seeds": sorted({case.seed for case in chosen}),
        "validation": 1000,
        "test": 5000,
        "clock": "process time",
    }
    write = partial(
        write_result, path, NAME, settings, environment={**environment(packages=("scikit-learn",)), "threads": 1}
    )
    if not todo:
        write(rows, table=summarize(rows))
    # A fresh process a run, so that its peak memory is its own; forked where it can be, as imports take longer than a
    # fit. A quick run stays in this one.
    start = "fork" if sys.platform == "linux" else "spawn"
    for _, row, left in run_all(partial(run, work=work), todo, 0 if args.quick else jobs, 1, start):
        rows.append(row)
        print({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}, left, flush=True)
        write(rows, table=summarize(rows))


if __name__ == "__main__":
    main()
