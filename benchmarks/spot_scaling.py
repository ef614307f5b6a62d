"""From how many samples on is SPOT the cheaper way to a transport cost, beside exact, entropic and minibatch solvers?

n samples a side of two Gaussians whose squared cost is known go to ``SPOT.fit_samples``, POT's ``emd2``, POT's
Sinkhorn, geomloss and minibatch OT, each at several settings. A cell is one solver with one setting on one sample, in a
process of its own with a limit of time and memory; what counts are the error to the *population's* cost, CPU seconds
(of one thread: what else runs on the machine does not count) and peak memory. For each n the cheapest setting of each
solver that is within 3 % for every seed is taken; the crossover with a rival is the first n from which on ours is
within 3 % and the rival is not, or takes longer. A setting that did not come to its end within the limits at some n is
not tried at a larger one.

    python benchmarks/spot_scaling.py --peer PYTHON_WITH_POT_AND_GEOMLOSS [--sizes 1000 10000 100000 1000000]

Each cell leaves a file below ``--work``, so that an interrupted study goes on. Without ``--peer`` only ours runs. A
setting is not chosen on the truth by any solver's user: taking the best for all is in favour of those that have more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import ROOT, environment, output_path, parser, write_result

from lightning_rectify.data.transport_truths import TransportProblem, make_problem

NAME = "spot_scaling"
WORKER = Path(__file__).resolve().parent / "peers" / "transport_worker.py"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
PROBLEMS = {"bures2": ("bures2", None), "gaussians8": ("gaussians", 8)}
BAR = 0.03

Cell = dict[str, Any]


def settings(quick: bool) -> list[Cell]:
    """Each solver with each of its settings, the cheap ones first."""
    if quick:
        return [
            {"side": "ours", "steps": 3},
            {"side": "emd2"},
            {"side": "sinkhorn", "reg": 0.1, "method": "sinkhorn", "most": 50},
            {"side": "geomloss", "blur": 0.3, "scaling": 0.5, "backend": "tensorized"},
            {"side": "minibatch", "size": 32},
        ]
    found: list[Cell] = [{"side": "ours", "steps": steps} for steps in (500, 1000, 1500, 3000)]
    found.append({"side": "emd2"})
    for reg, method in ((0.1, "sinkhorn"), (0.03, "sinkhorn"), (0.01, "sinkhorn"), (0.01, "sinkhorn_log")):
        found.append({"side": "sinkhorn", "reg": reg, "method": method, "most": 5000})
    for backend in ("tensorized", "online"):
        for blur in (0.3, 0.1, 0.03):
            found.append({"side": "geomloss", "blur": blur, "scaling": 0.7, "backend": backend})
    found += [{"side": "minibatch", "size": size} for size in (64, 256, 1024, 4096)]
    return found


def draw_samples(problem: TransportProblem, size: int, seed: int, path: Path) -> None:
    """The same points for all."""
    sides = [side(size, np.random.default_rng([seed, size, place])) for place, side in
             enumerate((problem.draw_x, problem.draw_y))]  # fmt: skip
    np.savez(path, x=sides[0], y=sides[1])


def needs(cell: Cell, size: int) -> float:
    """GiB that a solver's matrices surely take; 0 where none is made."""
    numbers = {"emd2": 8, "sinkhorn": 16, "geomloss": 4 if cell.get("backend") == "tensorized" else 0}
    return numbers.get(cell["side"], 0) * size**2 / 2**30


def run(cell: Cell, size: int, seed: int, samples: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One cell; where there is no answer, ``failed`` says why."""
    if (wanted := needs(cell, size)) > args.memory:
        return {"failed": f"needs {wanted:,.0f} GiB for its matrices"}
    python = sys.executable if cell["side"] == "ours" else args.peer
    options = {**cell, "file": str(samples), "seed": seed, "threads": args.threads, "memory_gib": args.memory}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(names, str(args.threads))
    path = {"PYTHONPATH": str(ROOT)} if cell["side"] == "ours" else {}
    try:
        done = subprocess.run(
            [python, str(WORKER), json.dumps(options)], capture_output=True, text=True, timeout=args.limit,
            env={**os.environ, **threads, **path},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {args.limit:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        # the kind of error alone: a message may hold this machine's paths
        kind = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1].split(":")[0]
        return {"failed": kind[:80]}
    found = json.loads(lines[-1])
    return found if np.isfinite(found["cost"]) else {"failed": "the cost is not finite"}


def label(cell: Cell) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, (int, float)) else str(value) for key, value in cell.items()
    )


def summarize(rows: Sequence[dict[str, Any]], bar: float = BAR) -> list[dict[str, Any]]:
    """A line a problem, size and solver: the fastest setting that is within the bar for all seeds, else the nearest."""
    table = []
    for problem, size, side in dict.fromkeys((row["problem"], row["size"], row["side"]) for row in rows):
        mine = [row for row in rows if (row["problem"], row["size"], row["side"]) == (problem, size, side)]
        best: dict[str, Any] | None = None
        for setting in dict.fromkeys(row["setting"] for row in mine):
            group = [row for row in mine if row["setting"] == setting]
            if any("failed" in row for row in group):
                continue
            errors = [row["cost_error"] for row in group]
            line = {"setting": setting, "seeds": len(group), "worst_cost_error": max(errors, key=abs)}
            line |= {key: statistics.fmean(row[key] for row in group) for key in ("seconds", "cpu_seconds")}
            line |= {key: max(row[key] for row in group) for key in ("peak_mib", "own_mib")}
            line["reached"] = abs(line["worst_cost_error"]) <= bar
            key = (not line["reached"], line["cpu_seconds"] if line["reached"] else abs(line["worst_cost_error"]))
            if best is None or key < best["key"]:
                best = {**line, "key": key}
        reasons = sorted({row["failed"] for row in mine if "failed" in row})
        line = {"problem": problem, "size": size, "side": side, **(best or {"reached": False}), "failures": reasons}
        line.pop("key", None)
        table.append(line)
    return table


def crossovers(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each problem and rival the first size from which on ours is the cheaper way to be within the bar, or None."""
    found = []
    for problem in dict.fromkeys(line["problem"] for line in table):
        lines = {(line["size"], line["side"]): line for line in table if line["problem"] == problem}
        sizes = sorted({size for size, _ in lines})
        for rival in dict.fromkeys(side for _, side in lines if side != "ours"):
            first = None
            for size in reversed(sizes):
                if not _wins(lines[size, "ours"], lines[size, rival]):
                    break
                first = size
            found.append({"problem": problem, "rival": rival, "from_size": first})
            print(f"{problem}: cheaper than {rival} from {'no size' if first is None else f'{first:,}'}", flush=True)
    return found


def _wins(ours: dict[str, Any], rival: dict[str, Any]) -> bool:
    return ours["reached"] and not (rival["reached"] and rival["cpu_seconds"] <= ours["cpu_seconds"])


def parse() -> argparse.Namespace:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--peer", help="a python that has POT and geomloss")
    arguments.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    arguments.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--limit", type=float, default=900.0, help="seconds a cell")
    arguments.add_argument("--memory", type=int, default=12, help="GiB a cell")
    arguments.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder of the single cells")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    work = path.parent / f"{NAME}_cells" if args.quick else args.work
    if args.quick:
        args.sizes, args.seeds, args.problems, args.limit = [200], [1], ["bures2"], 60.0
    work.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in settings(args.quick) if args.peer or cell["side"] == "ours"]
    chosen = {
        "sizes": args.sizes,
        "seeds": args.seeds,
        "bar": BAR,
        "limit_seconds": args.limit,
        "limit_gib": args.memory,
    }
    machine = {**environment(), "threads": args.threads, **versions(args.peer)}
    rows: list[dict[str, Any]] = []
    beyond: dict[tuple[str, str], int] = {}
    for size in args.sizes:  # the small ones first: a study cut short has whole sizes
        for problem in args.problems:
            rows += of_one_size(problem, size, cells, work, args, beyond)
            table = summarize(rows)
            write_result(path, NAME, chosen, rows, table=table, crossovers=crossovers(table), environment=machine)


def of_one_size(
    problem: str,
    size: int,
    cells: Sequence[Cell],
    work: Path,
    args: argparse.Namespace,
    beyond: dict[tuple[str, str], int],
) -> list[Any]:
    """All cells of a problem and size; those that are done are read.

    ``beyond`` has, by problem and setting, the size from which on there is no answer within the limits.
    """
    known = make_problem(*PROBLEMS[problem])
    assert known.truth is not None
    rows = []
    with TemporaryDirectory() as name:
        for seed in args.seeds:
            samples = Path(name) / f"{seed}.npz"
            for cell in cells:
                row = {"problem": problem, "size": size, "seed": seed, "side": cell["side"], "setting": label(cell)}
                if (last := beyond.get((problem, label(cell)), size)) < size:
                    rows.append({**row, "failed": f"no answer at n = {last:,}"})
                    continue
                stem = "".join(c if c.isalnum() else "_" for c in f"{problem} {size} {seed} {label(cell)}")
                done = work / f"{stem}.json"
                limits = {"limit": args.limit, "memory": args.memory, "threads": args.threads}
                found = json.loads(done.read_text()) if done.exists() else {}
                if found.get("limits") != limits:
                    if not samples.exists():
                        draw_samples(known, size, seed, samples)
                    found = {"limits": limits, "found": run(cell, size, seed, samples, args)}
                    done.write_text(json.dumps(found))
                row |= found["found"]
                if "failed" in row:
                    beyond.setdefault((problem, label(cell)), size)
                if "cost" in row:
                    row["cost_error"] = row["cost"] / known.truth.cost - 1.0
                rows.append(row)
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    return rows


def versions(peer: str | None) -> dict[str, str]:
    """Versions of the peers, as their own python has them."""
    if peer is None:
        return {}
    code = (
        "import json\nfrom importlib import metadata\nfound = {}\n"
        "for name in ('pot', 'geomloss', 'pykeops', 'numpy', 'torch'):\n"
        "    try:\n        found['peer ' + name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
    )
    return json.loads(subprocess.run([peer, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
