"""Does a Transformer need warmup? The RAdam paper's Figures 1 to 3 on Multi30k or any other aligned text.

Encoder-decoders of several depths, with post- and pre-norm, under Adam without warmup, Adam with warmup, Adam-2k
(``FrozenStartAdam``), Adam with a large eps, and RectifiedAdam; several seeds. Of every update the negative
log-likelihood is kept, and what ``AdaptiveRateMonitor`` measured: quantiles of the gradient (without embeddings) and
variance of the adaptive rate. The monitor's alarm for a collapse at update 50 or 100 is held against what became of the
run: it failed if, at the last update that all runs of its shape and seed have, its loss is more than ``GAP`` nats above
the best, and less than ``GAP`` below its own at update 100 (a slower run that goes on learning has not failed).

    python benchmarks/papers/translation.py --data FOLDER [--jobs 2] [--groups paper border ...] [--seeds 1 2 3]

Each run leaves a file below ``--work``, so that an interrupted study goes on.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation import OPTIMIZERS, csv_logger, draw_points, read_points
from single_runs import keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

from lightning_rectify import AdaptiveRateMonitor, TranslationData, Translator
from lightning_rectify._lightning import Callback, Trainer, seed_everything
from lightning_rectify.callbacks.adaptive_rate.alarms import collapsed

NAME = "translation_warmup"
FOLDERS = {"multi30k": ("multi30k", "."), "libreoffice": ("libreoffice-help-de-en", ".")}


@dataclass(frozen=True)
class Cell:
    """One run."""

    width: int
    depth: int
    norm: str
    lr: float
    optimizer: str
    precision: str
    updates: int
    seed: int

    @property
    def name(self) -> str:
        shape = f"{self.width}_{self.depth}_{self.norm}_{self.lr:g}_{self.precision}_{self.updates}"
        return f"{shape}_{self.optimizer.replace(' ', '').replace(',', '_')}_s{self.seed}"


GAP = 0.5
SHAPE = ("width", "depth", "norm", "lr", "precision")
SHOWN_SHAPES = ((256, 6, "post", 1e-3), (512, 6, "post", 3e-4))  # in the figure: width, depth, norm, rate


def grid(group: str, seeds: Sequence[int], precision: str) -> list[Cell]:
    """The runs of a part of the study."""
    every = tuple(OPTIMIZERS)
    two = ("Adam", "RectifiedAdam")
    shapes: list[tuple[int, int, str, float, str, int, Sequence[str]]] = {
        # Adam and RectifiedAdam go on: does Adam escape, and with what BLEU does it end?
        "paper": [
            (256, 6, "post", 1e-3, precision, 400, [name for name in every if name not in two]),
            (256, 6, "post", 1e-3, precision, 1200, two),
        ],
        "paper_512": [(512, 6, "post", 3e-4, precision, 200, every[:5])],
        # the paper's shape in float32, to which the rest compares: it is as fast on CPUs without bf16 instructions
        "fp32": [(256, 6, "post", 1e-3, "32-true", 200, two)],
        "pre_norm": [(256, 6, "pre", 1e-3, "32-true", 200, two)],
        "depth": [(256, depth, "post", 1e-3, "32-true", 200, two) for depth in (2, 3, 4, 5)],
        "lr": [(256, 6, "post", lr, "32-true", 200, two) for lr in (3e-4, 5e-4, 7e-4)],
    }[group]
    return [
        Cell(width, depth, norm, lr, optimizer, kind, updates, seed)
        for seed in seeds
        for width, depth, norm, lr, kind, updates, optimizers in shapes
        for optimizer in optimizers
    ]


GROUPS = ("paper", "paper_512", "fp32", "pre_norm", "depth", "lr")


class Curve(Callback):
    """The negative log-likelihood of every update."""

    def __init__(self) -> None:
        self.nll: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.nll.append(round(float(trainer.callback_metrics["train/nll"]), 4))


def data_of(root: str, dataset: str, seed: int, vocabulary: Path | None, batch_tokens: int) -> TranslationData:
    """The pairs, under one vocabulary for all runs."""
    if dataset == "numbers":
        return TranslationData(batch_tokens=batch_tokens, seed=seed, train_size=500, val_size=50)
    options: dict[str, Any] = {"dataset": "multi30k", "root": root}
    if dataset != "multi30k":
        options = {"dataset": "files", "root": root, "train": "train", "val": "val", "test": "test"}
    return TranslationData(
        **options, vocab_size=8000, vocabulary_file=str(vocabulary), batch_tokens=batch_tokens, seed=seed
    )


def run(cell: Cell, dataset: str, root: str, work: Path, batch_tokens: int) -> dict[str, Any]:
    """Train one model; on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the monitor's findings are counted, not shown
    begin = time.process_time()
    how = OPTIMIZERS[cell.optimizer]
    data = data_of(root, dataset, cell.seed, work / f"{dataset}.model", batch_tokens)
    seed_everything(cell.seed, verbose=False)
    module = Translator(
        vocab_size=data.vocab_size, width=cell.width, heads=4, feedforward=4 * cell.width, encoder_layers=cell.depth,
        decoder_layers=cell.depth, dropout=0.1, norm=cell.norm, optimizer=partial(how.make, lr=cell.lr),
        lr_scheduler=how.schedule(), lr_scheduler_interval="step", val_translations=cell.updates > 1000,
    )  # fmt: skip
    curve, monitor = Curve(), AdaptiveRateMonitor()
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=cell.updates + how.frozen, max_epochs=-1, precision=cell.precision,
            gradient_clip_val=25, use_distributed_sampler=False, callbacks=[curve, monitor], default_root_dir=folder,
            logger=csv_logger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, log_every_n_steps=50, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, data)
        points = read_points(folder, how.frozen)
        trainer.limit_val_batches = 1.0
        final = trainer.validate(module, data, verbose=False)[0]
    nll = curve.nll[how.frozen :]
    row: dict[str, Any] = {**asdict(cell), "nll": nll, "last_20_nll": statistics.fmean(nll[-20:]), "points": points}
    row["collapse"] = ("collapse", "model") in monitor.alarms
    row["val"] = {name: round(float(value), 4) for name, value in final.items()}
    row["cpu_seconds"] = round(time.process_time() - begin, 1)
    return keep(work / f"{dataset}_{cell.name}.json", {"batch_tokens": batch_tokens}, row)


def shape_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in SHAPE)


def loss_at(row: dict[str, Any], update: int) -> float:
    """Mean over the last 20 updates: batches of one length each make a single one noisy."""
    return statistics.fmean(row["nll"][max(0, update - 20) : update])


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each run whether it failed and whether the monitor raised its alarm, by the package's own rule."""
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault((*shape_of(row), row["seed"]), []).append(row)
    for group in shapes.values():
        update = min(len(row["nll"]) for row in group)
        best = min(loss_at(row, update) for row in group)
        for row in group:
            for earlier in ("collapse", "collapse_alarm", "gradient_1_over_50"):  # of an older rule
                row.pop(earlier, None)
            row["failed"] = loss_at(row, update) > max(best + GAP, loss_at(row, 100) - GAP)
            seen = {int(step): (at["gradient_median"], at["gradient_q95"]) for step, at in row["points"].items()}
            looks = [step for step in (50, 100) if step in seen]
            row["gradient_fall"] = {str(step): seen[1][0] / max(seen[step][0], 1e-30) for step in looks}
            row["collapse_at"] = next((step for step in looks if collapsed(seen[1], seen[step], step)), None)


def count_alarms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """False and missed alarms; the thresholds were chosen on runs of the first line alone."""

    def chosen_on(row: dict[str, Any]) -> bool:
        return row["depth"] == 6 and (row["width"], row["lr"]) in {(shape[0], shape[3]) for shape in SHOWN_SHAPES}

    parts = {"where thresholds were chosen": [row for row in rows if chosen_on(row)],
             "all others": [row for row in rows if not chosen_on(row)]}  # fmt: skip
    lines = []
    for name, part in parts.items():
        for look in (50, 100) if part else ():
            raised = [row["collapse_at"] is not None and row["collapse_at"] <= look for row in part]
            failed = [row["failed"] for row in part]
            lines.append(
                {
                    "runs_of": name,
                    "by_update": look,
                    "runs": len(part),
                    "failed": sum(failed),
                    "alarms": sum(raised),
                    "false_alarms": sum(alarm and not bad for alarm, bad in zip(raised, failed, strict=True)),
                    "missed": sum(bad and not alarm for alarm, bad in zip(raised, failed, strict=True)),
                }
            )
    return lines


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a shape and optimizer: means over seeds, with the smallest and the largest."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = (*SHAPE, "updates", "optimizer")
    for row in rows:
        cells.setdefault((*shape_of(row), row["updates"], row["optimizer"]), []).append(row)
    table = []
    for key, group in cells.items():
        line: dict[str, Any] = {**dict(zip(keys, key, strict=True)), "runs": len(group)}
        for update in (50, 100, 200, 400, 1200):
            values = [loss_at(row, update) for row in group if len(row["nll"]) >= update]
            if values:
                line[f"nll_{update}"] = [statistics.fmean(values), min(values), max(values)]
        line["gradient_fall"] = [row["gradient_fall"] for row in group]
        line["failed"] = sum(row["failed"] for row in group)
        line["alarms"] = sum(row["collapse_at"] is not None for row in group)
        line["val"] = [row["val"] for row in group]
        table.append(line)
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves of the loss, quantiles of the gradient and the variance of the adaptive rate; a column a shape.

    Loss: mean over the last 20 updates, every seed. Below, for the smallest seed: the median of abs(g) with the band
    between its 5 % and its 95 % quantile for Adam and RectifiedAdam, and the variance of the logarithm of the rate.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    precision = rows[0]["precision"]
    drawn = [shape for shape in SHOWN_SHAPES if any(shape_of(row) == (*shape, precision) for row in rows)]
    shapes = [(*shape, precision) for shape in drawn] or [shape_of(rows[0])]
    figure, axes = plt.subplots(3, len(shapes), figsize=(6.5 * len(shapes), 10), squeeze=False, sharex="col")
    colours = dict(zip(OPTIMIZERS, ("C3", "C1", "C2", "C5", "C0", "C4"), strict=True))
    for column, shape in enumerate(shapes):
        group = [row for row in rows if shape_of(row) == shape]
        first = min(row["seed"] for row in group)
        for row in group:
            colour, name = colours[row["optimizer"]], row["optimizer"]
            updates = range(min(20, len(row["nll"])), len(row["nll"]) + 1)
            label = name if row["seed"] == first else None
            axes[0][column].plot(updates, [loss_at(row, i) for i in updates], color=colour, lw=1, label=label)
            if row["seed"] == first:
                band = 0.15 if name in ("Adam", "RectifiedAdam") else 0.0
                draw_points(axes[1:, column], row["points"], colour, None, band)
        width, depth, norm, lr, _ = shape
        title = f"{depth}+{depth} layers, {norm}-norm, width {width}, lr {lr:g}"
        axes[0][column].set(title=title, ylabel="training loss, nats a token")
        axes[1][column].set_ylim(bottom=1e-9)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[1, 2, 3])
    arguments.add_argument("--data", help="folder that holds multi30k or libreoffice-help-de-en")
    arguments.add_argument("--dataset", choices=list(FOLDERS), default="multi30k")
    arguments.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments.add_argument("--precision", default="bf16-mixed", help="of paper and paper_512; others: 32-true")
    arguments.add_argument("--finished", action="store_true", help="run nothing, write what has been run")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    batch_tokens = 1000
    if args.quick:
        dataset, root, work = "numbers", "", path.parent / NAME
        cells = [Cell(32, 1, "post", 1e-3, name, "32-true", 6, 1) for name in ("Adam", "RectifiedAdam")]
    else:
        dataset, root, work = args.dataset, data_folder(args.data, FOLDERS[args.dataset]), args.work
        cells = [cell for group in args.groups for cell in grid(group, args.seeds, args.precision)]
    work.mkdir(parents=True, exist_ok=True)
    data_of(root, dataset, 1, work / f"{dataset}.model", batch_tokens).prepare_data()
    done, todo = split(cells, lambda cell: (work / f"{dataset}_{cell.name}.json", {"batch_tokens": batch_tokens}))
    rows = [row for _, row in done]
    if args.finished:
        cells, todo = [cell for cell, _ in done], []
    job = partial(run, dataset=dataset, root=root, work=work, batch_tokens=batch_tokens)
    for cell, row, left in run_all(job, todo, 1 if args.quick else args.jobs):
        rows.append(row)
        said = f"nll {row['last_20_nll']:.3f}, alarm {row['collapse']}, {row['cpu_seconds']} s"
        print(f"{cell.name}: {said}, {left}", flush=True)
    settings = {"dataset": dataset, "batch_tokens": batch_tokens, "vocabulary": 8000, "dropout": 0.1, "clip": 25}
    machine = {**environment(packages=("torchmetrics", "sentencepiece")), "threads": 1}
    shapes, optimizers = list(dict.fromkeys(shape_of(asdict(cell)) for cell in cells)), list(OPTIMIZERS)
    rows.sort(key=lambda row: (shapes.index(shape_of(row)), optimizers.index(row["optimizer"]), row["seed"]))
    judge(rows)
    write_result(path, NAME, settings, rows, table=summarize(rows), alarms=count_alarms(rows), environment=machine)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
