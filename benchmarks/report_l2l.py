"""The tables of the L2L studies: each makes a header and rows of a result; ``report.py`` writes them."""

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_DATASETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG)", "digits": "digits"}
_BUDGETS = {"epochs": "equal epochs", "time": "equal time"}


def study(result: Result) -> Table:
    """One line a method and epsilon: accuracies in percent, time over PGD-10's, what the report complains of."""
    rows = [
        [
            f"{line['epsilon']:g}, {line['method']}",
            _percent(line["clean"], line["clean_seeds"]),
            _percent(line["pgd_20"], line["pgd_20_seeds"]),
            _percent(line["worst"], line["worst_seeds"]),
            "" if line["own_attack"] is None else f"{100 * line['own_attack']:.1f}",
            _ratio(line["ratio_to_pgd"]),
            _checks(line["failed_checks"]),
        ]
        for line in result["table"]
    ]
    return ["epsilon, training", "clean, %", "PGD-20", "worst case", "own attack", "time, × PGD-10", "fails"], rows


def bars(result: Result) -> Table:
    """The acceptance bars of the study, met or not."""
    return ["bar", "met"], [[name, "yes" if met else "**no**"] for name, met in result["meets_bars"].items()]


def compare(result: Result) -> Table:
    """One line a data set, budget and method."""
    rows = [
        [
            f"{_DATASETS[line['dataset']]}, {_BUDGETS[line['budget']]}: {line['method']}",
            f"{line['epochs']:g}",
            f"{100 * line['clean']:.1f}",
            _error(line),
            f"{line['epoch_cpu_seconds']:.3g} s",
            _ratio(line["ratio_to_pgd"]),
            f"{line['train_cpu_seconds'] / 60:.1f} min",
            str(line["runs"]),
            _checks(line["failed_checks"]),
        ]
        for line in result["table"]
    ]
    header = [
        "data, budget: training",
        "epochs",
        "clean, %",
        "worst case",
        "an epoch",
        "× PGD-10",
        "all",
        "runs",
        "fails",
    ]
    return header, rows


def cost(result: Result) -> Table:
    """One line a variant, with its target where it has one."""
    targets, met = result["settings"]["targets"], result["meets_targets"]
    rows = []
    for line in result["rows"]:
        low, high = line["ratio_to_pgd_quartiles"]
        name = line["variant"]
        target = f"{targets[name]:g}: {'met' if met[name] else '**missed**'}" if name in met else ""
        rows.append(
            [
                name,
                f"{line['step_ms']:.0f} ms",
                f"{line['epoch_seconds']:.0f} s",
                f"{line['ratio_to_pgd']:.3f} ({low:.3f} to {high:.3f})",
                f"{line['predicted_ratio']:.3f}",
                target,
            ]
        )
    return ["training", "a step", "an epoch", "× PGD-10", "in counted passes", "at most"], rows


def search(result: Result) -> Table:
    """What the candidates came to on images of the training part; PGD-10 and those at no more than its half in time."""
    half = result["settings"]["half"]
    rows = [
        [
            f"{line['epsilon']:g}, {line['name']}",
            _percent(line["worst"], line["worst_seeds"]),
            f"{100 * line['clean']:.1f}",
            f"{line['ratio_to_pgd']:.2f}" + ("" if line["ratio_to_pgd"] <= half else " (above half)"),
            _checks(line["failed_checks"]),
        ]
        for line in result["table"]
    ]
    return ["epsilon, attacker", "worst case, %: mean (seeds)", "clean", "time, × PGD-10", "fails"], rows


def search_test(result: Result) -> Table:
    """The chosen ones on the test part, beside PGD-10."""
    found = {(line["epsilon"], line["name"]): line for line in result["verdict"]}
    rows = []
    for line in result["test_table"]:
        against = found.get((line["epsilon"], line["name"]))
        rows.append(
            [
                f"{line['epsilon']:g}, {line['name']}",
                f"{100 * line['clean']:.1f}",
                f"{_percent(line['worst'], line['worst_seeds'])} ± {100 * line['worst_standard_error']:.1f}",
                "" if against is None else f"{100 * against['behind_pgd']:+.1f}",
                "" if against is None else f"{against['ratio_to_pgd']:.2f}",
                "" if against is None else ("yes" if against["found"] else "no"),
            ]
        )
    header = ["epsilon, attacker", "clean, %", "worst case: mean (seeds) ± one network's standard error"]
    return [*header, "points behind PGD-10", "time, × PGD-10", "as good in half the time"], rows


TABLES: dict[str, Callable[[Result], Table]] = {
    "l2l": study,
    "l2l.bars": bars,
    "l2l_compare": compare,
    "l2l_cost": cost,
    "l2l_search": search,
    "l2l_search.test": search_test,
}


def _percent(mean: float, seeds: Sequence[float]) -> str:
    """As "66.6 (66.5, 66.7)"; without the seeds where there is one."""
    each = f" ({', '.join(f'{100 * value:.1f}' for value in seeds)})" if len(seeds) > 1 else ""
    return f"{100 * mean:.1f}{each}"


def _error(line: Result) -> str:
    return f"{100 * line['worst']:.1f} ± {100 * line['worst_standard_error']:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _checks(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)
