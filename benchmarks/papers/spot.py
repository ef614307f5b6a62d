"""Does the transport game of arXiv:1905.00158 find the plans whose cost is known, and what of it is needed?

Gaussians (Bures cost) in 2, 8, 32 and 64 dimensions, a mixture on the line and shifted Gaussians; constraints of the
critics, eta, steps of the critics, the moving average and the rate's decay, one changed at a time. A run is judged by
the signed error of its cost, the normalised regret, L2-UVP (where the plan is a map) and both marginal gaps beside
their floors, all with the generator's moving average on 20,000 pairs. Exact transport between samples (POT's ``emd2``,
if POT is installed, else scipy's assignment) is in the same table: its error, time and memory. Densities by the ODE
generator are held against the entropic plans of Gaussians in closed form: KL from the truth, mass, round trip.

    python benchmarks/papers/spot.py [--rows bars constraints eta ...] [--seeds 11 12 13] [--jobs 2]

Each run leaves a file below ``--work``, so that an interrupted study goes on; the result is written after every run.
No setting was chosen on these seeds.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from single_runs import keep, run_all, split, study_parser
from timing import output_path, write_result

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.transport import TransportData, draw
from lightning_rectify.data.transport_plans import GaussianPlanData
from lightning_rectify.data.transport_truths import make_problem
from lightning_rectify.modules.spot import SPOT
from lightning_rectify.modules.spot.eta import huber_cost

NAME = "spot"
SEEDS = (11, 12, 13)
ADAM = {"optimizer": "adam"}
# entropic plans: the numbers N(0, 1) and N(2, 0.49), and the points of bures2
PLANS: dict[str, dict[str, Any]] = {
    "numbers": {},
    "plane": {
        "mean_x": [-1.0, 0.0], "cov_x": [[1.0, 0.5], [0.5, 1.0]],
        "mean_y": [1.0, 1.0], "cov_y": [[1.5, -0.6], [-0.6, 0.8]],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        group: what it belongs to.
        name: unique.
        problem: of ``make_problem``, with ``dim`` and ``cost``; or of PLANS, with "entropy" among the options.
        steps: of the generator.
        options: of ``SPOT``, but "optimizer": "rmsprop" or "adam" (1e-3, betas 0.5 and 0.9).
        train_size: points a side, or fresh ones.
        exact: no game: exact transport between so many samples a side.
    """

    group: str
    name: str
    problem: str = "bures2"
    dim: int | None = None
    cost: str = "squared"
    steps: int = 1500
    options: dict[str, Any] = field(default_factory=dict)
    train_size: int | None = None
    exact: int = 0


def cases() -> list[Case]:
    """All lines: those of the bars, and one thing changed at a time."""
    eight = {"problem": "gaussians", "dim": 8}
    found = [
        Case("bars", "bures2", options={"eta": 10.0}),
        Case("bars", "bures2, eta auto"),
        Case("bars", "gaussians 8", **eight, steps=2000, options={"eta": 10.0}),
        Case("bars", "mixture1, squared", "mixture1", options={"eta": 10.0}),
        Case("bars", "mixture1, absolute", "mixture1", cost="euclidean", steps=1200, options={"eta": 3.0}),
        Case("bars", "shift, squared", "shift", options={"eta": 15.0}),
        Case("bars", "shift, Euclidean", "shift", cost="euclidean", steps=1200, options={"eta": 3.0}),
    ]
    for constraint in ("gradient_penalty", "groupsort"):
        options = {"eta": 10.0, "constraint": constraint}
        found += [
            Case("constraints", f"bures2, {constraint}, Adam", options={**options, **ADAM}),
            Case("constraints", f"bures2, {constraint}", options=options),
            Case("constraints", f"gaussians 8, {constraint}, Adam", **eight, steps=2000, options={**options, **ADAM}),
        ]
    found.append(
        Case("constraints", "bures2, clip 0.1, Adam", options={"eta": 300.0, "constraint": "clip", "clip": 0.1, **ADAM})
    )
    found += [Case("eta", f"bures2, eta {eta:g}", options={"eta": eta}) for eta in (3.0, 5.0, 7.0, 20.0, 60.0)]
    found += [
        Case("parts", "bures2, Adam", options={"eta": 10.0, **ADAM}),
        Case("parts", "bures2, 1 critic step, Adam", options={"eta": 10.0, "critic_steps": 1, **ADAM}),
        Case("parts", "bures2, no decay", options={"eta": 10.0, "decay_steps": 0}),
        Case("parts", "bures2, no average", options={"eta": 10.0, "ema_decay": 0.0}),
        Case("parts", "bures2, no shared trunk", options={"eta": 10.0, "share": "none"}),
        Case("parts", "bures2, not standardized", options={"eta": 10.0, "standardize": False}),
        Case("parts", "bures2, 300 points", options={"eta": 10.0}, train_size=300),
        Case("parts", "bures2, 2000 points", options={"eta": 10.0}, train_size=2000),
    ]
    for dim in (32, 64):
        for constraint in ("spectral", "gradient_penalty", "groupsort"):
            wide = {"constraint": constraint, "width": 256, "critic_width": 256}
            name = f"gaussians {dim}, {constraint}"
            found.append(Case("dimensions", name, "gaussians", dim, steps=3000, options=wide))
    found += [
        Case("exact", f"{problem} {dim or ''}, exact, n = {n}".replace(" ,", ","), problem, dim, exact=n)
        for problem, dim in (("bures2", None), ("gaussians", 8), ("gaussians", 32), ("gaussians", 64))
        for n in (200, 1000, 2000)
    ]
    return found + densities()


def densities() -> list[Case]:
    """Plans by the ODE generator: the weight of the entropy, and one thing changed at a time."""
    ode: dict[str, Any] = {"generator": "ode", "entropy": 1.0, "ode": {"steps": 4}}
    changes: dict[str, dict[str, Any]] = {
        "eps 1": {},
        "eps 0.1": {"entropy": 0.1},
        "eps 0.3": {"entropy": 0.3},
        "eps 4": {"entropy": 4.0},
        "eps 4, eta of the cost alone": {"entropy": 4.0, "eta": 14.6},
        "eps 1, eta 10": {"eta": 10.0},
        "eps 1, Adam": ADAM,
        "eps 1, gradient_penalty, Adam": {"constraint": "gradient_penalty", **ADAM},
        "eps 1, dopri5": {"ode": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}},
        "eps 1, euler": {"ode": {"method": "euler", "steps": 16}},
        "eps 1, hutchinson": {"ode": {"steps": 4, "trace": "hutchinson"}},
        "eps 1, adjoint": {"ode": {"steps": 4, "adjoint": True}},
    }
    found = [Case("density", f"numbers, {name}", "numbers", options={**ode, **more}) for name, more in changes.items()]
    for eps in (0.5, 2.0):
        found.append(Case("density", f"plane, eps {eps:g}", "plane", options={**ode, "entropy": eps}))
    return found


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3, betas=(0.5, 0.9))


def run(job: tuple[Case, int], work: Path) -> dict[str, Any]:
    """One line for one seed, on one thread."""
    case, seed = job
    torch.set_num_threads(1)
    clock, cpu = time.perf_counter(), time.process_time()
    row = exact(case, seed) if case.exact else play(case, seed)
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - clock, 1)}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # of the process, torch included
    row = {"group": case.group, "name": case.name, "seed": seed, **row}
    return keep(path_of(job, work), asdict(case), row)


def play(case: Case, seed: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    options = dict(case.options)
    if options.pop("optimizer", "rmsprop") == "adam":
        options |= {"generator_optimizer": adam, "critic_optimizer": adam}
    if case.problem in PLANS:
        return density(case, options)
    problem = make_problem(case.problem, case.dim, case.cost)
    plan = SPOT(shape_x=problem.dim, cost=case.cost, eval_samples=20_000, **options)
    data = TransportData(
        case.problem, case.dim, case.cost, batch_size=128 * plan.critic_steps,
        epoch_size=128 * plan.critic_steps * 100, train_size=case.train_size,
    )  # fmt: skip
    if case.train_size is not None:  # drawn with replacement, as the batch is larger than a small sample
        x, y = draw(problem, case.train_size, [0, 2**62 + 3])
        repeats = -(-2 * data.batch_size // case.train_size)
        data = TransportData(x=x.repeat(repeats, 1), y=y.repeat(repeats, 1), batch_size=data.batch_size, val_size=2)
    quiet_trainer(max_steps=case.steps, max_epochs=-1, limit_val_batches=0).fit(plan, data)
    judge = TransportData(case.problem, case.dim, case.cost, val_size=4000)
    found = quiet_trainer().validate(plan, judge, verbose=False)[0]
    row = {name.removeprefix("val/"): value for name, value in found.items()}
    row |= {"eta": float(plan.eta), "truth": problem.truth.cost if problem.truth else None}
    if problem.truth is not None and problem.truth.map is not None and case.cost == "squared":
        x, _ = draw(problem, 100_000, [0, 2**62 + 5])
        distances = (problem.truth.map(x) - x).norm(dim=1)
        row["huber_error"] = huber_cost(distances, row["eta"]).mean().item() / problem.truth.cost - 1.0
    return row


def density(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """A plan by the ODE generator against the entropic plan."""
    gaussians = {"entropy": options["entropy"], **PLANS[case.problem]}
    plan = SPOT(shape_x=len(PLANS[case.problem].get("mean_x", [0.0])), eval_samples=20_000, **options)
    size = 128 * plan.critic_steps
    data = GaussianPlanData(**gaussians, batch_size=size, epoch_size=100 * size)
    quiet_trainer(max_steps=case.steps, max_epochs=-1, limit_val_batches=0).fit(plan, data)
    found = quiet_trainer().validate(plan, GaussianPlanData(**gaussians, val_size=4000), verbose=False)[0]
    assert data.truth is not None
    row = {name.removeprefix("val/"): value for name, value in found.items()}
    return row | {"eta": float(plan.eta), "truth": data.truth.cost}


def exact(case: Case, seed: int) -> dict[str, Any]:
    """Optimal transport between two samples, whose cost overestimates that of the populations."""
    problem = make_problem(case.problem, case.dim, case.cost)
    assert problem.truth is not None
    x, y = draw(problem, case.exact, [seed, 2**62 + 6])
    matrix = (torch.cdist(x.double(), y.double()) ** (2 if case.cost == "squared" else 1)).numpy()
    try:
        import ot

        cost, solver = float(ot.emd2([], [], matrix, numItermax=10_000_000)), "POT emd2"
    except ImportError:
        cost, solver = float(matrix[linear_sum_assignment(matrix)].mean()), "scipy assignment"
    truth = problem.truth
    regret = (cost - truth.cost) / (truth.independent_cost - truth.cost)
    return {
        "cost": cost, "truth": truth.cost, "cost_error": cost / truth.cost - 1.0, "regret": regret, "solver": solver
    }  # fmt: skip


def quiet_trainer(**options: Any) -> Trainer:
    """A trainer that trains and says nothing."""
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, **silence, **options})


def path_of(job: tuple[Case, int], work: Path) -> Path:
    case, seed = job
    return work / f"{''.join(c if c.isalnum() else '_' for c in case.name)}_s{seed}.json"


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a case: the worst over the seeds of what a bar is set on, the mean of the rest."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        line: dict[str, Any] = {"group": group[0]["group"], "name": name, "runs": len(group)}
        line["cost_errors"] = [round(row["cost_error"], 5) for row in sorted(group, key=lambda row: row["seed"])]
        line["worst_cost_error"] = max(line["cost_errors"], key=abs)
        uvps = [row["l2_uvp"] for row in group if "l2_uvp" in row]
        line["worst_l2_uvp"] = max(uvps) if uvps else None
        for key, off in (("plan_kl", 0.0), ("mass", 1.0), ("round_trip", 0.0)):
            values = [row[key] for row in group if key in row]
            line[f"worst_{key}"] = max(values, key=lambda value, off=off: abs(value - off)) if values else None
        for key in ("regret", "eta", "huber_error", "marginal_gap_x", "marginal_floor_x", "marginal_gap_y",
                    "marginal_floor_y", "seconds", "cpu_seconds", "peak_mib"):  # fmt: skip
            values = [row[key] for row in group if row.get(key) is not None]
            line[key] = statistics.fmean(values) if values else None
        table.append(line)
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=SEEDS)
    groups = list(dict.fromkeys(case.group for case in cases()))
    arguments.add_argument("--rows", nargs="+", choices=groups, default=groups)
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    chosen, seeds, work, jobs = [case for case in cases() if case.group in args.rows], args.seeds, args.work, args.jobs
    if args.quick:
        chosen = [
            Case("bars", "bures2", steps=4, options={"eta": 10.0}),
            Case("exact", "bures2, exact, n = 50", exact=50),
            Case("density", "numbers", "numbers", steps=2, options={"generator": "ode", "entropy": 1.0}),
        ]
        seeds, work, jobs = [1], path.parent / "spot_runs", 1
    work.mkdir(parents=True, exist_ok=True)
    every = [(case, seed) for seed in seeds for case in chosen]  # seed by seed: a study cut short has all lines
    done, todo = split(every, lambda each: (path_of(each, work), asdict(each[0])))
    rows = [row for _, row in done]
    settings = {"seeds": seeds, "rows": args.rows, "pairs": 20_000}
    if rows:
        write_result(path, NAME, settings, rows, table=summarize(rows))
    # A fresh process a run, so that its peak memory is its own.
    for _, row, left in run_all(partial(run, work=work), todo, jobs, runs_a_process=1):
        rows.append(row)
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, left, flush=True)
        write_result(path, NAME, settings, rows, table=summarize(rows))


if __name__ == "__main__":
    main()
