"""One solver on one sample, in a process of its own: time of the solve, and what memory it took.

    python transport_worker.py '{"side": "emd2", "file": "samples.npz", ...}'

Prints one line of JSON. Imports and reading the file are not counted; making the matrix of costs is. Linux only: the
peak of memory is read from /proc.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def emd2(x: Numbers, y: Numbers, options: dict[str, Any]) -> Callable[[], float]:
    """POT's network simplex: exact between the samples."""
    import ot

    def solve() -> float:
        matrix = ot.dist(x, y)
        return float(ot.emd2(ot.unif(len(x)), ot.unif(len(y)), matrix, numItermax=1_000_000_000))

    return solve


def sinkhorn(x: Numbers, y: Numbers, options: dict[str, Any]) -> Callable[[], float]:
    """POT's Sinkhorn: E c of the entropic plan, the weight of the entropy in parts of the mean cost."""
    import ot

    def solve() -> float:
        matrix = ot.dist(x, y)
        weights = ot.unif(len(x)), ot.unif(len(y))
        plan = ot.sinkhorn(
            *weights, matrix, options["reg"] * float(matrix.mean()), method=options["method"],
            numItermax=options["most"], stopThr=1e-6, warn=False,
        )  # fmt: skip
        plan *= matrix
        return float(plan.sum())

    return solve


def geomloss(x: Numbers, y: Numbers, options: dict[str, Any]) -> Callable[[], float]:
    """geomloss' debiased divergence, twice (its cost is |x - y|^2 / 2); blur in parts of the data's deviation."""
    import torch
    from geomloss import SamplesLoss

    torch.set_num_threads(options["threads"])
    scale = float(np.sqrt((x.var(axis=0).sum() + y.var(axis=0).sum()) / 2.0))
    loss = SamplesLoss(
        "sinkhorn",
        p=2,
        blur=options["blur"] * scale,
        scaling=options["scaling"],
        debias=True,
        backend=options["backend"],
    )
    sides = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    loss(sides[0][:16], sides[1][:16])  # KeOps compiles its formulas once, and keeps them
    return lambda: 2.0 * float(loss(*sides))


def minibatch(x: Numbers, y: Numbers, options: dict[str, Any]) -> Callable[[], float]:
    """The mean of exact costs between small parts, until its standard error is 0.5 %: what minibatch OT minimises."""
    import ot

    def solve() -> float:
        generator, costs, weights = np.random.default_rng(0), [], ot.unif(options["size"])
        while len(costs) < 1000:
            rows, columns = (generator.choice(len(side), options["size"]) for side in (x, y))
            costs.append(float(ot.emd2(weights, weights, ot.dist(x[rows], y[columns]))))
            if len(costs) >= 20 and np.std(costs) / len(costs) ** 0.5 < 0.005 * np.mean(costs):
                break
        return float(np.mean(costs))

    return solve


def ours(x: Numbers, y: Numbers, options: dict[str, Any]) -> Callable[[], float]:
    """``SPOT.fit_samples`` and the cost of 20,000 generated pairs."""
    import warnings

    import torch

    from lightning_rectify.modules.spot import SPOT

    torch.set_num_threads(options["threads"])
    warnings.simplefilter("ignore")

    def solve() -> float:
        plan = SPOT.fit_samples(x, y, steps=options["steps"], seed=options["seed"], accelerator="cpu")
        pairs = plan.sample_pairs(20_000)
        return float(plan.cost_function(*pairs).double().mean())

    return solve


SIDES = {"emd2": emd2, "sinkhorn": sinkhorn, "geomloss": geomloss, "minibatch": minibatch, "ours": ours}


def status(name: str) -> float:
    """What the kernel says of this process, in MiB. Not getrusage's peak, which exec inherits from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def main() -> None:
    options = json.loads(sys.argv[1])
    samples = np.load(options["file"])
    solve = SIDES[options["side"]](samples["x"], samples["y"], options)
    # Address space: a solver that asks for too much fails at once, and the machine goes on. Libraries have theirs.
    limit = int(status("VmSize") * 2**20) + (options["memory_gib"] << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of imports: forget it
    begin, cpu = time.perf_counter(), time.process_time()
    cost = solve()
    found = {"cost": cost, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    found["peak_mib"] = status("VmHWM")
    found["own_mib"] = found["peak_mib"] - before  # what it took besides python, its libraries and the samples
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
