"""The tables of the manifold studies: each makes a header and rows of a result; ``report.py`` writes them."""

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_NOISES = ("clean", "values", "points and values")
_METHODS = ("charts", "charts, trained", "mlp", "kernel ridge", "k-nn", "random forest")


def point_clouds(result: Result) -> Table:
    """Errors at n = 2,000: settings down, methods across."""
    lines = [line for line in result["table"] if line["size"] == min(row["size"] for row in result["table"])]
    methods = [method for method in _METHODS if any(line["method"] == method for line in lines)]
    cells = {(d["ambient_dim"], d["embedding"], d["noise"], d["method"]): d for d in lines}
    settings = sorted({key[:3] for key in cells}, key=lambda key: (key[0], key[1], _NOISES.index(key[2])))

    def cell(line: Result | None) -> str:
        if line is None or line["rmse"] is None:
            return "" if line is None else line["status"]
        deviation = "" if line["rmse_sd"] is None else f" ± {_short(line['rmse_sd'])}"
        return f"{_short(line['rmse'])}{deviation} ({line['runs']})"

    rows = [
        [f"D = {dim}, {embedding}, noise: {'none' if noise == 'clean' else noise}"]
        + [cell(cells.get((dim, embedding, noise, method))) for method in methods]
        for dim, embedding, noise in settings
    ]
    return [f"RMSE (runs), n = {lines[0]['size']:,}", *methods], rows


def point_cloud_costs(result: Result) -> Table:
    """Time and memory in the largest R^D, for each size."""
    dim = max(line["ambient_dim"] for line in result["table"])
    lines = [line for line in result["table"] if line["ambient_dim"] == dim]
    rows = []
    for size in sorted({line["size"] for line in lines}):
        for method in _METHODS:
            group = [line for line in lines if (line["size"], line["method"]) == (size, method)]
            measured = [line for line in group if line["status"] == "measured"]
            if group and not measured:
                rows.append([f"{size:,}, {method}", group[0]["status"], "", "", "", ""])
            if measured:
                mean = {key: _mean(measured, key) for key in ("fit_seconds", "tune_seconds", "predict_ms_per_1000")}
                tune = mean["tune_seconds"]
                rows.append(
                    [
                        f"{size:,}, {method}",
                        f"{mean['fit_seconds']:.3g} s",
                        "" if tune is None else f"{tune:.3g} s",
                        f"{mean['predict_ms_per_1000']:.3g} ms",
                        f"{_mean(measured, 'peak_above_data_mib'):.0f} MiB",
                        ", ".join(_short(line["rmse"]) for line in measured) if size > 10_000 else "",
                    ]
                )
    return [
        f"n, method (D = {dim})",
        "fit",
        "all settings tried",
        "1,000 points",
        "memory",
        "RMSE, each embedding",
    ], rows


def scaling(result: Result) -> Table:
    """Slopes and weights for an error, each R^D."""
    dims = sorted({int(dim) for line in result["table"] for dim in line["dims"]} - {4})

    def cells(line: Result, key: str) -> list[str]:
        found = {3 if dim == "4" else int(dim): values for dim, values in line["dims"].items()}
        return [_weights(found[dim], key) if dim in found else "" for dim in dims]

    rows = []
    for line in result["table"]:
        if line["kind"] == "same":
            continue
        first = next(iter(line["dims"].values()))
        slopes = [first["slope_size"] if "charts" in first else None, first.get("slope_local")]
        rows.append(
            [
                f"{line['manifold']}, {line['label']}",
                *("" if slope is None else f"{slope:.2f}" for slope in slopes),
                " / ".join(cells(line, "1e-2")),
                " / ".join(cells(line, "1e-3")),
            ]
        )
    named = " / ".join(str(dim) for dim in dims)
    header = ["manifold, network", "slope, N", "slope, local weights", f"weights for 1e-2, D = {named}"]
    return [*header, f"for 1e-3, D = {named}"], rows


def same_error(result: Result) -> Table:
    """The error and the part of the network that D is paid with, where only D differs."""
    rows = []
    for line in result["rows"]:
        if line["kind"] == "same" or line["manifold"] in ("torus", "moment curve"):
            rows.append(
                [
                    f"{line['manifold']}, N = {line['size']}",
                    str(line["ambient_dim"]),
                    f"{line['sup']:.4g}",
                    *(f"{line[key]:,}" for key in ("charts", "local", "distance", "projection", "weights")),
                ]
            )
    return ["network", "D", "largest error", "charts", "local", "distances", "projections", "weights in all"], rows


def detector(result: Result) -> Table:
    """One line a detector and pair."""
    rows = []
    for line in result["table"]:
        name = line["detector"]
        if name in ("gate", "plane"):
            name += f", {line['charts']} charts"
        elif line["charts"]:
            name = f"1-NN of {line['charts']} images"
        held = f"{100 * line['held_digits']:.1f} / {100 * line['held_others']:.1f} %" if "held_digits" in line else ""
        low, high = line["auroc_range"]
        rows.append(
            [
                f"{line['pair']}: {name}",
                f"{line['auroc']:.3f} ({low:.3f} to {high:.3f})",
                f"{100 * line['let_in_at_95']:.1f} %",
                held,
                f"{line['stored']:,}",
            ]
        )
    return ["known, unknown: detector", "AUROC", "let in at 95 %", "gate holds known / unknown", "numbers stored"], rows


TABLES: dict[str, Callable[[Result], Table]] = {
    "manifold_points": point_clouds,
    "manifold_points.cost": point_cloud_costs,
    "manifold_scaling": scaling,
    "manifold_scaling.dimension": same_error,
    "manifold_detector": detector,
}


def _short(value: float) -> str:
    return f"{value:.4f}" if value >= 5e-4 else f"{value:.0e}"


def _mean(lines: Sequence[Result], key: str) -> float | None:
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) / len(values) if values else None


def _weights(found: Result, key: str) -> str:
    """As "2.1e4"; "< " where the smallest size is better already, "-" where no size reaches it."""
    if found[key] is not None:
        return f"{found[key]:.1e}".replace("e+0", "e")
    return f"< {found['smallest']:.1e}".replace("e+0", "e") if found["worst"] <= float(key) else "-"
