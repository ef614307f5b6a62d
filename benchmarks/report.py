"""Write the tables of README.md and benchmarks/RESULTS.md from the results in benchmarks/results/.

Between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->`` stands what RENDERERS[NAME] makes of the result file named
before the dot of NAME (``lr_sensitivity.spread`` reads lr_sensitivity.json), with its settings and command below.

    python benchmarks/report.py            # rewrite both
    python benchmarks/report.py --check    # exit with 1 if one is not what the results say
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from report_cost import TABLES as COST_TABLES
from report_l2l import TABLES as L2L_TABLES
from report_manifold import TABLES as MANIFOLD_TABLES
from report_spot import TABLES as SPOT_TABLES
from timing import RESULTS, ROOT

Result = dict[str, Any]
BLOCK = re.compile(r"(<!-- table:([\w.]+) -->)(.*?)(<!-- /table:\2 -->)", re.DOTALL)
MARKER = re.compile(r"<!-- /?table:([\w.]+) -->")


class ReportError(Exception):
    """The document or a result file is not as it must be."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def by_model(rows: Sequence[Result], key: str) -> tuple[list[str], dict[str, dict[str, Result]]]:
    """The models in order, and the rows as a grid: ``grid[row[key]][model]``."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    grid: dict[str, dict[str, Result]] = {}
    for row in rows:
        grid.setdefault(row[key], {})[row["model"]] = row
    return models, grid


def optimizer_step(result: Result) -> str:
    models, grid = by_model(result["rows"], "optimizer")

    def cell(row: Result | None) -> str:
        if row is None or row["status"] != "measured":
            return "not installed" if row else ""
        return f"{row['median_ms']:.2f} ms ({row['ratio_to_fused_adam']:.2f}×)"

    header = ["median of a step (× fused Adam)", *models]
    return table(header, ([name, *(cell(cells.get(model)) for model in models)] for name, cells in grid.items()))


def monitor_cost(result: Result) -> str:
    header = ["model", "monitor", "step, plain loop", "step, Trainer", "monitor's hooks", "of the step"]
    return table(
        [*header, "paired blocks", f"hooks, first {result['settings']['first_steps']} steps", "once a fit"],
        (
            [
                row["model"],
                row["monitor"],
                f"{row['step_ms_plain_loop']:.1f} ms",
                f"{row['step_ms_trainer']:.1f} ms",
                f"{row['hooks_ms_per_step']:.2f} ms",
                f"{row['direct_percent']:.2f} %",
                "{:+.2f} % ({:+.2f} to {:+.2f})".format(row["paired_percent"], *row["paired_percent_quartiles"]),
                f"{row['first_steps_seconds']:.2f} s",
                f"{row['once_a_fit_seconds']:.2f} s",
            ]
            for row in result["rows"]
        ),
    )


def lr_sensitivity(result: Result) -> str:
    rates = sorted({row["lr"] for row in result["table"]}, reverse=True)
    cells = {(row["optimizer"], row["lr"]): row for row in result["table"]}

    def cell(row: Result | None) -> str:
        if row is None:
            return ""
        deviation = f" ± {100 * row['sd']:.2f}" if row["sd"] is not None else ""
        diverged = f" ({row['diverged']} of {row['runs']} diverged)" if row["diverged"] else ""
        return f"{100 * row['mean']:.2f}{deviation}{diverged}"

    optimizers = dict.fromkeys(row["optimizer"] for row in result["table"])
    return table(
        ["validation accuracy, %", *(f"lr {rate:g}" for rate in rates)],
        ([name, *(cell(cells.get((name, rate))) for rate in rates)] for name in optimizers),
    )


def lr_sensitivity_spread(result: Result) -> str:
    return table(
        ["means over lr", "range, points", "standard deviation", "worst", "best"],
        (
            [
                row["optimizer"],
                f"{100 * row['range']:.2f}",
                f"{100 * row['sd_over_lr']:.2f}" if row["sd_over_lr"] is not None else "",
                f"{100 * row['worst']:.2f} % at lr {row['worst_lr']:g}",
                f"{100 * row['best']:.2f} % at lr {row['best_lr']:g}",
            ]
            for row in result["sensitivity"]
        ),
    )


def variance_simulation(result: Result) -> str:
    listed = result["settings"]["listed_steps"]
    rows = [row for row in result["rows"] if row["mu"] == 0 and row["t"] in listed]
    return table(
        ["step", "Var ψ, simulated", "theory, exact", "variance-matched", "first order", "r² Var ψ, simulated"],
        (
            [
                str(row["t"]),
                f"{row['variance']:.3e} ± {row['standard_error']:.0e}",
                *(
                    "" if row[key] is None else f"{row[key]:.3e}"
                    for key in ("theory_exact", "theory_variance_matched", "theory_first_order")
                ),
                f"{row['rectified_variance']:.3e}",
            ]
            for row in rows
        ),
    )


def spectral_cost(result: Result) -> str:
    return table(
        ["a discriminator's step", "width", "CPU time", "× plain", "× exact SVD"],
        (
            [
                row["variant"],
                str(row["width"]),
                f"{row['median_ms']:.0f} ms",
                f"{row['ratio_to_plain']:.2f}",
                f"{row['ratio_to_exact_svd']:.2f}",
            ]
            for row in result["rows"]
        ),
    )


def spectral_gan(dataset: str, metric: str, scale: float) -> Callable[[Result], str]:
    """A renderer of one metric on one data set: controls down, widths across, mean and 95 % interval."""

    def cell(row: Result | None) -> str:
        if row is None or row[metric] is None:
            return ""
        low, high = row[f"{metric}_low"], row[f"{metric}_high"]
        bad = f", {row['diverged']} of {row['runs']} diverged" if row["diverged"] else ""
        between = "" if low is None else f" ({short(scale * low)} to {short(scale * high)})"
        return f"{short(scale * row[metric])}{between}{bad}"

    def short(value: float) -> str:
        return f"{value:.{1 if abs(value) < 100 else 0}f}" if abs(value) < 1e5 else f"{value:.0e}"

    def render(result: Result) -> str:
        lines = [row for row in result["table"] if row["dataset"] == dataset]
        widths = sorted({row["width"] for row in lines})
        cells = {(row["control"], row["width"]): row for row in lines}
        title = f"{metric.upper()}{f' × {scale:g}' if scale != 1 else ''}"
        return table(
            [title, *(f"width {width}" for width in widths)],
            (
                [control, *(cell(cells.get((control, width))) for width in widths)]
                for control in dict.fromkeys(row["control"] for row in lines)
            ),
        )

    return render


def translation_warmup(result: Result) -> str:
    updates = sorted({int(key[4:]) for row in result["table"] for key in row if key.startswith("nll_")})

    def cell(values: Sequence[float] | None) -> str:
        return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)

    def bleu(row: Result) -> str:
        found = [val["val/bleu"] for val in row["val"] if "val/bleu" in val]
        return f"{sum(found) / len(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else ""

    return table(
        [
            "network, lr, precision",
            "optimizer",
            *(f"loss at update {update}" for update in updates),
            "BLEU",
            "failed",
            "alarm",
        ],
        (
            [
                "{depth}+{depth} × {width}, {norm}-norm, {lr:g}, {precision}".format(**row),
                row["optimizer"],
                *(cell(row.get(f"nll_{update}")) for update in updates),
                bleu(row),
                f"{row['failed']} of {row['runs']}",
                f"{row['alarms']} of {row['runs']}",
            ]
            for row in result["table"]
        ),
    )


def translation_warmup_paper(result: Result) -> str:
    """The paper's two comparisons, in two shapes."""
    shapes = {(256, 6, "post", 1e-3), (512, 6, "post", 3e-4)}
    rows = [row for row in result["table"] if row["precision"] != "32-true"
            and (row["width"], row["depth"], row["norm"], row["lr"]) in shapes]  # fmt: skip
    return translation_warmup({**result, "table": rows})


def translation_warmup_alarms(result: Result) -> str:
    return table(
        ["runs", "by update", "number", "failed", "alarms", "false", "missed"],
        (
            [row["runs_of"]]
            + [str(row[key]) for key in ("by_update", "runs", "failed", "alarms", "false_alarms", "missed")]
            for row in result["alarms"]
        ),
    )


def language_model(result: Result) -> str:
    def cell(value: Any) -> str:
        return f"{value:.1f}" if isinstance(value, float) else "{:.1f} ({:.1f} to {:.1f})".format(*value)

    return table(
        ["model", "runs", "validation perplexity", "test perplexity"],
        (
            [
                row["model"] + (f", k = {row['k']:.3g}" if "k" in row else ""),
                str(row.get("runs", "")),
                cell(row["val_perplexity"]),
                cell(row["test_perplexity"]),
            ]
            for row in result["table"]
        ),
    )


def translation_bleu(result: Result) -> str:
    def cell(values: Sequence[float], digits: int = 1) -> str:
        mean, low, high = (f"{value:.{digits}f}" for value in values)
        return mean if low == high else f"{mean} ({low} to {high})"

    return table(
        ["pair", "precision, processor", "seeds", "BLEU, test", "chrF, test", "length penalty", "training, min"],
        (
            [
                row["pair"],
                f"{row['precision']}, {row['cpu']}",
                ", ".join(str(seed) for seed in row["seeds"]),
                cell(row["test_bleu"], 2),
                cell(row["test_chrf"], 2),
                cell(row["length_penalty"]),
                cell([seconds / 60 for seconds in row["train_seconds"]], 0),
            ]
            for row in result["table"]
        ),
    )


#: sides of translation_speed.py as the tables name them
SIDES = {
    "ours": "`Transformer`, fp32", "torch": "torch.nn.Transformer, fp32", "joeynmt": "JoeyNMT, fp32",
    "ours_bf16": "`Transformer`, bf16", "torch_bf16": "torch.nn.Transformer, bf16",
}  # fmt: skip


def times(row: Result, peer: str) -> str:
    """A ratio by rounds: median and quartiles."""
    found = row.get(f"times_{peer}")
    return "" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def translation_speed(result: Result) -> str:
    peers = ("joeynmt", "torch", "torch_bf16")
    return table(
        ["training", "target tokens/s", "× JoeyNMT", "× torch.nn.Transformer, fp32", "× the same, bf16"],
        (
            [SIDES[row["side"]], f"{row['tokens_per_second']:.0f}", *(times(row, peer) for peer in peers)]
            for row in result["rows"]
        ),
    )


def translation_speed_profile(result: Result) -> str:
    kinds = list(result["rows"][0]["profile_ms"])
    return table(
        ["an update, ms", *kinds],
        ([SIDES[row["side"]], *(f"{row['profile_ms'][kind]:.0f}" for kind in kinds)] for row in result["rows"]),
    )


def translation_speed_search(result: Result) -> str:
    return table(
        ["beam of 5", "sentences/s", "× JoeyNMT", "BLEU", "loss of a batch"],
        (
            [
                SIDES[row["side"]],
                f"{row['sentences_per_second']:.0f}",
                times(row, "joeynmt"),
                f"{row['bleu']:.2f}",
                f"{row['loss']:.6f}",
            ]
            for row in result["searches"]
        ),
    )


def spot_adaptation(frame: str) -> Callable[[Result], str]:
    """A renderer of one frame: methods down, directions across, last weights and, by its name, the best of the test."""

    def cell(row: Result | None) -> list[str]:
        if row is None:
            return ["", ""]
        low, high = (100 * bound(row["accuracies"]) for bound in (min, max))
        between = f" ({low:.1f} to {high:.1f})" if row["runs"] > 1 else ""
        best = row["accuracy_best_of_test"]
        return [f"{100 * row['accuracy']:.1f}{between}, {row['runs']}", "" if best is None else f"{100 * best:.1f}"]

    def render(result: Result) -> str:
        rows = [row for row in result["table"] if row["frame"] == frame]
        directions = list(dict.fromkeys(row["direction"] for row in rows))
        cells = {(row["method"], row["direction"]): row for row in rows}
        header = ["target accuracy, %: mean (worst to best seed), runs"]
        header += [text for name in directions for text in (f"{name}, last weights", "best of the test")]
        lines = [
            [method, *(text for name in directions for text in cell(cells.get((method, name))))]
            for method in dict.fromkeys(row["method"] for row in rows)
        ]
        paper = result["settings"]["paper_best_of_test"]
        known = [text for name in directions for text in ("", f"{100 * paper[name]:.2f}" if name in paper else "")]
        return table(header, [*lines, ["the paper's table (28 pixels)", *known]])

    return render


def faults(result: Result) -> str:
    """Killed runs of each module, then what killed writers leave."""
    header = ["module", "kills", "while writing", "half-written files left", "broken checkpoints", "checkpoints lost"]
    modules = table(
        [*header, "runs held against an undisturbed one", "states that differ"],
        (
            [row["module"], *(f"{row[key]}" for key in ("kills", "kills_while_writing", "partial_files_left"))]
            + [f"{row[key]}" for key in ("broken_files", "checkpoints_lost", "runs_compared")]
            + [f"{len(row['states_that_differ'])} of {row['states_compared']}"]
            for row in result["rows"]
        ),
    )
    writers = table(
        ["writer of one file, again and again", "kills", "files torn"],
        (
            [row["writer"], f"{row['kills']}", f"{row['files_torn']}"]
            for row in result["writers"]
            if row["status"] == "measured"
        ),
    )
    return f"{modules}\n\n{writers}"


RENDERERS: dict[str, Callable[[Result], str]] = {
    "optimizer_step": optimizer_step,
    "monitor_cost": monitor_cost,
    "lr_sensitivity": lr_sensitivity,
    "lr_sensitivity_20_epochs": lr_sensitivity,
    "lr_sensitivity.spread": lr_sensitivity_spread,
    "variance_simulation": variance_simulation,
    "spectral_cost": spectral_cost,
    "lr_by_warmup": lr_sensitivity,
    "language_model": language_model,
    "faults": faults,
    "translation_warmup": translation_warmup,
    "translation_warmup.paper": translation_warmup_paper,
    "translation_warmup.alarms": translation_warmup_alarms,
    "translation_bleu": translation_bleu,
    "translation_bleu_7500": translation_bleu,
    "translation_speed": translation_speed,
    "translation_speed_default": translation_speed,
    "translation_speed.profile": translation_speed_profile,
    "translation_speed_default.profile": translation_speed_profile,
    "translation_speed.search": translation_speed_search,
    "spot_adaptation.paper": spot_adaptation("paper"),
    "spot_adaptation.one": spot_adaptation("one"),
    "spectral_gan.fashion_mnist_kid": spectral_gan("fashion_mnist", "kid", 1000),
    "spectral_gan.fashion_mnist_fd": spectral_gan("fashion_mnist", "fd", 1),
    "spectral_gan.cifar10_kid": spectral_gan("cifar10", "kid", 1000),
    "spectral_gan.cifar10_fd": spectral_gan("cifar10", "fd", 1),
    **{
        name: (lambda result, make=make: table(*make(result)))
        for name, make in {**COST_TABLES, **L2L_TABLES, **MANIFOLD_TABLES, **SPOT_TABLES}.items()
    },
}


def footer(result: Result) -> str:
    """Where the numbers come from: settings, machine, versions, date, command."""
    found = result["environment"]
    threads = f"{found['threads']} thread" + ("s" if found["threads"] != 1 else "")
    machine = ", ".join([*([found["gpu"]] if "gpu" in found else []), found["cpu"], f"{found['cores']} cores", threads])
    settings = ", ".join(
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in result["settings"].items()
        if value is not None and not isinstance(value, (list, dict))
    )
    packages = ("torch", "pytorch-lightning", "pytorch-optimizer")
    versions = ", ".join(f"{name} {found[name]}" for name in packages if name in found)
    return f"{settings}; {machine}; {versions}; {result['date']}. Made by `{result['command']}`"


def render(name: str, results: Path) -> str:
    """The text between the markers of one table.

    Raises:
        ReportError: if nobody renders that name, or its result file is missing.
    """
    if name not in RENDERERS:
        raise ReportError(f"Marker table:{name}: no such table; known are {', '.join(RENDERERS)}.")
    path = results / f"{name.split('.')[0]}.json"
    if not path.exists():
        raise ReportError(
            f"Marker table:{name}: {path.name} is missing in {results.name}/; "
            f"run python benchmarks/{path.stem}.py first."
        )
    result = json.loads(path.read_text())
    return f"\n{RENDERERS[name](result)}\n\n<sub>{footer(result)}</sub>\n"


def rewrite(text: str, results: Path) -> str:
    """The document with every table made anew.

    Raises:
        ReportError: for a marker without its partner, an unknown name or a missing result.
    """
    paired = [name for match in BLOCK.finditer(text) for name in (match[2], match[2])]
    found = MARKER.findall(text)
    if paired != found:
        odd = next((a for a, b in zip(found, [*paired, *found], strict=False) if a != b), found[-1])
        raise ReportError(f"Marker table:{odd}: expected <!-- table:{odd} --> and then <!-- /table:{odd} -->.")
    return BLOCK.sub(lambda match: match[1] + render(match[2], results) + match[4], text)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    documents = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"]
    arguments.add_argument("--documents", nargs="+", type=Path, default=documents)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    args = arguments.parse_args(argv)
    return max(update(document, args.results, args.check) for document in args.documents)


def update(document: Path, results: Path, check: bool) -> int:
    """Rewrite one document, or only compare it; 1 if something is wrong with it."""
    if not document.exists():
        print(f"{document.name} does not exist.", file=sys.stderr)
        return 1
    before = document.read_text()
    try:
        after = rewrite(before, results)
    except ReportError as error:
        print(f"{document.name}: {error}", file=sys.stderr)
        return 1
    if before != after and check:
        print(f"{document.name} is out of date: run python benchmarks/report.py.", file=sys.stderr)
        return 1
    if before != after:
        document.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
