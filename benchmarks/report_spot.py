"""The tables of the transport studies: each makes a header and rows of a result; ``report.py`` writes them."""

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_SIDES = ("ours", "emd2", "sinkhorn", "geomloss", "minibatch")


def plans(groups: Sequence[str]) -> Callable[[Result], Table]:
    """A maker for some groups of lines: errors of cost and map, the regret, what it took."""

    def make(result: Result) -> Table:
        rows = [
            [
                line["name"],
                ", ".join(f"{100 * error:+.2f}" for error in line["cost_errors"]),
                _number(line["worst_l2_uvp"], ".2f"),
                _percent(line["regret"]),
                "" if line["eta"] is None else f"{line['eta']:.3g}",
                _percent(line["huber_error"]),
                f"{line['cpu_seconds']:.0f} s",
                f"{line['peak_mib']:.0f} MiB",
            ]
            for line in result["table"]
            if line["group"] in groups
        ]
        return [
            "plan",
            "cost error, %, each seed",
            "worst L2-UVP, %",
            "regret, %",
            "eta",
            "error that eta alone would make, %",
            "CPU",
            "peak memory, torch included",
        ], rows

    return make


def densities(result: Result) -> Table:
    """Plans with a density: distance to the entropic plan, mass, round trip."""
    rows = [
        [
            line["name"],
            str(line["runs"]),
            _number(line["worst_plan_kl"], ".3f"),
            _number(line["worst_mass"], ".4f"),
            _number(line["worst_round_trip"], ".1e"),
            f"{line['cpu_seconds']:.0f} s",
        ]
        for line in result["table"]
        if line["group"] == "density"
    ]
    return ["plan", "seeds", "worst KL to the entropic plan", "mass on a grid", "worst round trip", "CPU"], rows


def scaling(result: Result) -> Table:
    """A line a problem and size, each solver's cheapest setting within the bar; else how near it came, or why not."""
    cells = {(line["problem"], line["size"], line["side"]): line for line in result["table"]}
    sides = [side for side in _SIDES if any(key[2] == side for key in cells)]

    def cell(line: Result | None) -> str:
        if line is None:
            return ""
        if "setting" not in line:
            return "; ".join(line["failures"])
        taken = f"{line['cpu_seconds']:.3g} s, {line['own_mib']:.0f} MiB"
        return taken if line["reached"] else f"not within: {100 * line['worst_cost_error']:+.0f} %"

    rows = [
        [f"{problem}, n = {size:,}", *(cell(cells.get((problem, size, side))) for side in sides)]
        for problem, size in dict.fromkeys((line["problem"], line["size"]) for line in result["table"])
    ]
    return [f"to a cost within {result['settings']['bar']:.0%}: CPU time, memory", *sides], rows


def scaling_crossovers(result: Result) -> Table:
    """From how many samples on ours is the cheaper way, by problem and rival."""
    sides = list(dict.fromkeys(line["rival"] for line in result["crossovers"]))
    by_problem: dict[str, dict[str, int | None]] = {}
    for line in result["crossovers"]:
        by_problem.setdefault(line["problem"], {})[line["rival"]] = line["from_size"]
    rows = [
        [problem, *("at none" if found[side] is None else f"{found[side]:,}" for side in sides)]
        for problem, found in by_problem.items()
    ]
    return ["ours is within the bar and cheaper from n =", *(f"than {side}" for side in sides)], rows


def limits(result: Result) -> Table:
    """What was changed, and what came of it."""
    rows = [
        [
            f"{line['direction']}, {line['change']}",
            ", ".join(f"{100 * value:.1f}" for value in line["accuracies"]),
            f"{100 * line['class_gap']:.1f}",
            " ".join(f"{100 * value:.0f}" for value in line["recall"]),
        ]
        for line in result["table"]
    ]
    return ["data", "target accuracy, %, each seed", "classes apart, %", "recall of 0 to 9, %"], rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


TABLES: dict[str, Callable[[Result], Table]] = {
    "spot": plans(("bars",)),
    "spot.changes": plans(("constraints", "eta", "parts")),
    "spot.dimensions": plans(("dimensions", "exact")),
    "spot.density": densities,
    "spot_scaling": scaling,
    "spot_scaling.crossovers": scaling_crossovers,
    "spot_adaptation_limits": limits,
}
