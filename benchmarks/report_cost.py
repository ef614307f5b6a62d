"""The tables of costs, and of the house: each makes a header and rows of a result; ``report.py`` writes them."""

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def lightning_cost(result: Result) -> Table:
    """A line a configuration: the step in plain torch, and what it takes in each Trainer."""
    by_task: dict[str, dict[str, Result]] = {}
    for row in result["rows"]:
        by_task.setdefault(row["task"], {})[row["kind"]] = row
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))

    def cell(row: Result | None) -> str:
        if row is None:
            return ""
        return "{:.3f} ({:.3f} to {:.3f})".format(row["cpu_ratio"], *row["cpu_ratio_quartiles"])

    rows = []
    for task, found in by_task.items():
        first = next(iter(found.values()))
        cells = [cell(found.get(kind)) for kind in kinds]
        rows.append([task, str(first["players"]), f"{first['bare_cpu_ms']:.1f} ms", *cells])
    return ["configuration", "players", "step, plain torch", *(f"{kind}, × plain" for kind in kinds)], rows


def scaling_efficiency(result: Result) -> Table:
    """Work of one process and of two, together and apart."""

    def percent(values: Sequence[float]) -> str:
        return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * value for value in values))

    rows = [
        [
            f"{row['task']}, {row['unit']} a second",
            f"{row['one_per_second']:.0f}",
            f"{row['two_ddp_per_second']:.0f}",
            *(percent(row[key]) for key in ("two_ddp_efficiency", "two_apart_efficiency", "ddp_of_apart")),
        ]
        for row in result["rows"]
    ]
    header = ["training", "one process", "two, `ddp`", "efficiency", "two apart, efficiency", "`ddp` of two apart"]
    return header, rows


def probe_cost(result: Result) -> Table:
    """Bare gradients, and the probe that takes as many."""
    by_kind = {kind: [row for row in result["rows"] if row["kind"] == kind] for kind in ("bare", "probe")}
    names = {"bare": "bare gradients", "probe": "WarmupProbe"}
    rows = [
        [
            names[kind],
            f"{min(row['seconds'] for row in found):.0f} s",
            f"{result['ratio']:.3f}" if kind == "probe" else "1",
            f"{max(row['peak_mb'] for row in found):.0f} MB",
        ]
        for kind, found in by_kind.items()
    ]
    return ["ResNet-20, 1,600 gradients", "CPU time", "× bare", "peak of memory"], rows


def monitor_memory(result: Result) -> Table:
    """A line a monitor, beside the same fit without it."""
    alone = {row["module"]: row for row in result["rows"] if row["monitor"] is None}
    rows = [
        [
            f"{row['monitor']}, {row['module']}",
            f"{row['first_mb']:.0f} to {row['last_mb']:.0f} MB",
            f"{row['slope_kb_per_1000_steps']:+.0f}",
            f"{alone[row['module']]['slope_kb_per_1000_steps']:+.0f}",
        ]
        for row in result["rows"]
        if row["monitor"] is not None
    ]
    return ["monitor", "memory, first look to last", "kB per 1,000 steps", "the same fit without it"], rows


def house(result: Result) -> Table:
    """Files and lines of each room, and of all."""
    limits, columns = result["settings"], ("files", "lines", "long_files", "long_functions")
    counts = {
        row["room"]: [len(row[column]) if column == "long_files" else row[column] for column in columns]
        for row in result["rows"]
    }
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    header = ["room", "files", "lines", f"files over {limits['lines_of_a_file']} lines"]
    header += [f"functions over {limits['lines_of_a_function']} lines"]
    return header, [[room, *(f"{value:,}" for value in found)] for room, found in counts.items()]


def house_imports(result: Result) -> Table:
    """What everybody has, and the slowest names of the package."""
    first, names = result["imports"][:3], result["imports"][3:]
    slowest = sorted(names, key=lambda row: -row["cpu_seconds"])[:3]
    rows = [
        [
            f"`{row['import']}`",
            f"{row['cpu_seconds']:.2f} s",
            f"{row['modules']:,}",
            *("yes" if row[key] else "no" for key in ("torch", "lightning")),
        ]
        for row in (*first, *slowest)
    ]
    return ["import", "CPU", "modules", "with torch", "with Lightning"], rows


TABLES: dict[str, Callable[[Result], Table]] = {
    "lightning_cost": lightning_cost,
    "scaling_efficiency": scaling_efficiency,
    "probe_cost": probe_cost,
    "monitor_memory": monitor_memory,
    "house": house,
    "house.imports": house_imports,
}
