"""Does the rectifier hold the variance of the adaptive learning rate constant? The RAdam paper's simulation (Figure 9).

Trajectories of independent gradients N(mu, 1) feed Adam's second moment; the variance over trajectories of
psi = sqrt((1 - beta2^t) / v_t) and of r_t psi is set beside the theory, which is for mu = 0: exact and first-order
variance at the paper's length rho_t, and exact variance at the variance-matched length.

    python benchmarks/variance_simulation.py
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import output_path, parser, write_result
from torch import Tensor

from lightning_rectify.optim.variance import (
    adaptive_rate_variance,
    rectification,
    sma_length,
    sma_limit,
    variance_matched_length,
)

NAME = "variance_simulation"
MEANS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
LISTED = (5, 6, 10, 100, 1000, 6000)  # the steps of the table
PAPER_THRESHOLD = 4.0  # so that step 5 is rectified, as in the paper's Algorithm 2


def recorded_steps(steps: int) -> list[int]:
    """Every step up to 20, then 40 a factor of ten, and the listed ones."""
    dense = {round(10 ** (k / 40)) for k in range(math.ceil(40 * math.log10(steps)) + 1)}
    return sorted(t for t in dense | set(range(1, 21)) | set(LISTED) | {steps} if t <= steps)


def simulate(trajectories: int, steps: int, beta2: float, seed: int) -> tuple[list[int], Tensor, Tensor]:
    """Variance of psi over trajectories, and its standard error, at the recorded steps.

    Returns:
        The steps, the variances (means x steps), their standard errors (same shape).
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(MEANS, dtype=torch.float64).unsqueeze(1)
    moment = torch.zeros(len(MEANS), trajectories, dtype=torch.float64)
    record = recorded_steps(steps)
    wanted = set(record)
    variances, errors = [], []
    for t in range(1, steps + 1):
        gradient = torch.randn(moment.shape, generator=generator) + mean
        moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if t in wanted:
            variance, error = variance_with_error(torch.sqrt(-math.expm1(t * math.log(beta2)) / moment))
            variances.append(variance)
            errors.append(error)
    return record, torch.stack(variances, dim=1), torch.stack(errors, dim=1)


def variance_with_error(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance of each row and its standard error, from the row's own fourth moment."""
    n = sample.shape[1]
    variance = sample.var(dim=1)
    fourth = (sample - sample.mean(dim=1, keepdim=True)).pow(4).mean(dim=1)
    return variance, ((fourth - variance**2 * (n - 3) / (n - 1)).clamp(min=0) / n).sqrt()


def theory(t: int, beta2: float) -> dict[str, float | None]:
    """The theory's numbers for one step, for gradients N(0, 1)."""
    rho, matched = sma_length(float(t), beta2), variance_matched_length(float(t), beta2)
    values = {
        "rho": rho,
        "rectification": rectification(float(t), beta2, threshold=PAPER_THRESHOLD),
        "theory_exact": adaptive_rate_variance(rho, "exact"),
        "theory_first_order": adaptive_rate_variance(rho, "first_order"),
        "theory_variance_matched": adaptive_rate_variance(matched, "exact"),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no infinity


def rows_of(record: Sequence[int], variances: Tensor, errors: Tensor, beta2: float) -> list[dict[str, Any]]:
    rows = []
    for i, mean in enumerate(MEANS):
        for j, t in enumerate(record):
            expected = theory(t, beta2)
            variance = variances[i, j].item()
            rows.append(
                {
                    "mu": mean,
                    "t": t,
                    "variance": variance,
                    "standard_error": errors[i, j].item(),
                    "rectified_variance": (expected["rectification"] or 0.0) ** 2 * variance,
                    **expected,
                }
            )
    return rows


def plot(rows: Sequence[dict[str, Any]], floor: float, path: Path) -> None:
    """Measured variance without and with the rectifier over the step, one line a mean, theory in black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (plain, rectified) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for mean in MEANS:
        line = [row for row in rows if row["mu"] == mean and row["t"] >= 3]
        plain.plot([row["t"] for row in line], [row["variance"] for row in line], label=f"mu = {mean:g}")
        late = [row for row in line if row["rectification"]]
        rectified.plot([row["t"] for row in late], [row["rectified_variance"] for row in late], label=f"mu = {mean:g}")
    zero = [row for row in rows if row["mu"] == 0 and row["t"] >= 3]
    plain.plot([row["t"] for row in zero], [row["theory_exact"] for row in zero], "k-", lw=1, label="theory, exact")
    first = [row for row in zero if row["theory_first_order"] is not None]
    times, values = [row["t"] for row in first], [row["theory_first_order"] for row in first]
    plain.plot(times, values, "k--", lw=1, label="theory, first order")
    rectified.axhline(floor, color="k", lw=1, label="theory, minimum")
    for axes, title in ((plain, "Var[psi]"), (rectified, "r² Var[psi]")):
        axes.set(xscale="log", yscale="log", xlabel="step", title=title)
        axes.grid(alpha=0.3)
    plain.legend(fontsize=8)
    rectified.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--trajectories", type=int, help="default 5000, the paper's (quick: 500)")
    arguments.add_argument("--steps", type=int, help="default 6000, the paper's (quick: 100)")
    arguments.add_argument("--beta2", type=float, default=0.999)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    trajectories = args.trajectories or (500 if args.quick else 5000)
    steps = args.steps or (100 if args.quick else 6000)
    record, variances, errors = simulate(trajectories, steps, args.beta2, args.seed)
    rows = rows_of(record, variances, errors, args.beta2)
    floor = adaptive_rate_variance(sma_limit(args.beta2), "exact")
    settings = {
        "trajectories": trajectories,
        "steps": steps,
        "beta2": args.beta2,
        "seed": args.seed,
        "threshold": PAPER_THRESHOLD,
        "listed_steps": [t for t in LISTED if t <= steps],
        "minimum_variance": floor,
    }
    path = output_path(NAME, args.out, args.quick)
    write_result(path, NAME, settings, rows)
    plot(rows, floor, path.with_suffix(".png"))
    for row in rows:
        if row["mu"] == 0 and row["t"] in LISTED:
            print(
                f"t {row['t']:5d}  Var psi {row['variance']:.4e} +- {row['standard_error']:.1e}"
                f"  theory {row['theory_exact']:.4e}  r^2 Var {row['rectified_variance']:.4e} (minimum {floor:.4e})"
            )


if __name__ == "__main__":
    main()
