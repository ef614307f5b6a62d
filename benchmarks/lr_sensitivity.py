"""Which optimizer minds the learning rate least? The RAdam paper's Figure 6, with a small CNN on Fashion-MNIST.

SGD, Adam, Adam with linear warmup and RectifiedAdam, each at every learning rate with every seed (or, for Figure 7,
Adam with warmups of several lengths: ``--optimizers Adam "Adam, warmup 100" ... RectifiedAdam``); the learning rate
drops tenfold at 81/186 and 122/186 of the run, the paper's proportions. The score is the accuracy after the last epoch
on a seeded validation part of the training set: nothing is chosen on the test set. A run whose loss stops being finite
counts as chance level and is marked as diverged.

Finished runs are kept: an interrupted study goes on where it stopped when the same command is given again.

    python benchmarks/lr_sensitivity.py --data FOLDER   # holds FashionMNIST/raw or fashion-mnist/FashionMNIST/raw
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import statistics
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import DATA_VARIABLE, environment, output_path, parser, write_result
from torch.optim.lr_scheduler import LambdaLR

from lightning_rectify import ImageClassifier, ImageData, RectifiedAdam
from lightning_rectify._lightning import Callback, LightningModule, Trainer, seed_everything
from lightning_rectify.modules.base import NonFiniteLossError
from lightning_rectify.modules.image_networks import build_network

NAME = "lr_sensitivity"
RATES = (0.1, 0.03, 0.01, 0.003)
SEEDS = (1, 2, 3)
WEIGHT_DECAY = 1e-4
DROPS = (81 / 186, 122 / 186)  # of the run, the paper's epochs 81 and 122 of 186
CHANCE = 0.1
SPLIT_SEED = 0  # the validation part is the same for every run
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, weight_decay=WEIGHT_DECAY),
    "Adam": partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY),
    "Adam with warmup": partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY),
    "RectifiedAdam": partial(RectifiedAdam, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True),
}
WARMUPS = {f"Adam, warmup {steps}": steps for steps in (100, 200, 500, 1000)}  # the paper's Figure 7
OPTIMIZERS |= dict.fromkeys(WARMUPS, OPTIMIZERS["Adam"])
COMPARED = ("SGD", "Adam", "Adam with warmup", "RectifiedAdam")


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    dataset: str
    epochs: int
    batch_size: int
    warmup: int
    val_size: float
    width: int  # channels of the CNN's first stage
    train_size: int | None  # None: all that validation leaves


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    optimizer: str
    lr: float
    seed: int


class TrainLoss(Callback):
    """Mean of the training loss over each epoch, and the number of steps taken."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.current: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.current.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(torch.stack(self.current).mean().item())
        self.current.clear()


def factor(step: int, total: int, warmup: int) -> float:
    """Learning rate of a step (0-based) as a share of the base rate: linear warmup, then the two drops."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return ramp * 0.1 ** sum(step >= drop * total for drop in DROPS)


def run(cell: Cell, study: Study, root: str | None) -> dict[str, Any]:
    """Train one cell on one thread and return its row."""
    torch.set_num_threads(1)
    quieten()
    seed_everything(cell.seed, verbose=False)
    data = ImageData(
        dataset=study.dataset,
        **({} if root is None else {"root": root}),
        batch_size=study.batch_size,
        val_size=study.val_size,
        train_size=study.train_size,
        seed=SPLIT_SEED,
    )
    data.setup("fit")  # splits by SPLIT_SEED; the order of the batches is the run's own
    data.seed = cell.seed
    warmup = study.warmup if cell.optimizer == "Adam with warmup" else WARMUPS.get(cell.optimizer, 0)
    trainer = Trainer(
        max_epochs=study.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=study.epochs,  # once, after the last
        callbacks=[loss := TrainLoss()],
    )
    model = ImageClassifier(
        network=build_network("small_cnn", 10, 1, width=study.width).to(memory_format=torch.channels_last),  # faster
        num_classes=10,
        in_channels=1,
        optimizer=partial(OPTIMIZERS[cell.optimizer], lr=cell.lr),
        lr_scheduler=lambda optimizer: LambdaLR(
            optimizer, partial(factor, total=int(trainer.estimated_stepping_batches), warmup=warmup)
        ),
        lr_scheduler_interval="step",
    )
    row: dict[str, Any] = {**asdict(cell), "accuracy": CHANCE, "diverged": False}
    begin = time.perf_counter()
    try:
        trainer.fit(model, data)
    except NonFiniteLossError:
        row["diverged"] = True
    seconds = time.perf_counter() - begin
    row.update(steps=trainer.global_step, train_loss=loss.epochs, seconds_per_epoch=seconds / max(1, len(loss.epochs)))
    if not row["diverged"]:
        row["accuracy"] = trainer.callback_metrics["val/accuracy"].item()
    return row


def quieten() -> None:
    """No banners, hints about workers or other chatter from Lightning: the study prints one line a run."""
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning)\.")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


# -- the grid ---------------------------------------------------------------------------------------------------------


def execute(cells: Sequence[Cell], study: Study, root: str | None, jobs: int) -> Iterator[dict[str, Any]]:
    """The cells' rows as they are finished, ``jobs`` at a time."""
    if jobs == 1:
        yield from (run(cell, study, root) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=leave_with_parent, initargs=(os.getpid(),)) as pool:
        running = [pool.submit(run, cell, study, root) for cell in cells]
        try:
            for finished in as_completed(running):
                yield finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def leave_with_parent(parent: int) -> None:
    """End this worker when the study itself is gone (a killed parent would leave it waiting for ever)."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finished_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run of the same study left.

    Raises:
        SystemExit: if the file holds a study with other settings.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["settings"] != settings:
        raise SystemExit(
            f"{path.name} holds a study with other settings:\n  there {earlier['settings']}\n  here  {settings}\n"
            "Give its settings to go on with it, another --out to keep it, or --fresh to replace it."
        )
    return earlier["rows"]


def summarize(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Mean and deviation over seeds of each (optimizer, lr), and how far each optimizer's means lie apart."""
    rows = list(rows)
    table, spread = [], []
    for optimizer in OPTIMIZERS:
        means: dict[float, float] = {}
        for lr in sorted({row["lr"] for row in rows if row["optimizer"] == optimizer}, reverse=True):
            cell = [row for row in rows if row["optimizer"] == optimizer and row["lr"] == lr]
            scores = [row["accuracy"] for row in cell]
            means[lr] = statistics.fmean(scores)
            table.append(
                {
                    "optimizer": optimizer,
                    "lr": lr,
                    "mean": means[lr],
                    "sd": statistics.stdev(scores) if len(scores) > 1 else None,
                    "runs": len(scores),
                    "diverged": sum(row["diverged"] for row in cell),
                }
            )
        if means:
            best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
            spread.append(
                {
                    "optimizer": optimizer,
                    "range": means[best] - means[worst],
                    "sd_over_lr": statistics.stdev(means.values()) if len(means) > 1 else None,
                    "best_lr": best,
                    "best": means[best],
                    "worst_lr": worst,
                    "worst": means[worst],
                }
            )
    return table, spread


def plot(table: Sequence[dict[str, Any]], study: Study, path: Path) -> None:
    """One line an optimizer: mean accuracy over the learning rate, bars of one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    for index, optimizer in enumerate(OPTIMIZERS):
        line = [row for row in table if row["optimizer"] == optimizer]
        if line:
            shift = 1.02 ** (index - 1.5)  # so that bars do not hide one another
            axes.errorbar(
                [row["lr"] * shift for row in line],
                [100 * row["mean"] for row in line],
                [100 * (row["sd"] or 0.0) for row in line],
                marker="o",
                capsize=3,
                label=optimizer,
            )
    rates = sorted({row["lr"] for row in table})
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %")
    axes.set_title(f"{study.dataset}, small CNN, {study.epochs} epochs", fontsize=10)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def data_root(data: str | None) -> str:
    """The folder that torchvision wants: the one that holds ``FashionMNIST/raw``.

    Raises:
        SystemExit: if there is none.
    """
    data = data or os.environ.get(DATA_VARIABLE)
    if data is None:
        raise SystemExit(f"Fashion-MNIST is not part of the project: give --data FOLDER or set {DATA_VARIABLE}.")
    for root in (Path(data), Path(data) / "fashion-mnist"):
        if (root / "FashionMNIST" / "raw").is_dir():
            return str(root)
    raise SystemExit("--data: expected a folder that holds FashionMNIST/raw or fashion-mnist/FashionMNIST/raw.")


def parse() -> argparse.Namespace:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--data", help=f"folder of the data (default: environment variable {DATA_VARIABLE})")
    arguments.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(COMPARED))
    arguments.add_argument("--lr", nargs="+", type=float, help="default .1 .03 .01 .003")
    arguments.add_argument("--seeds", nargs="+", type=int, help="default 1 2 3")
    arguments.add_argument("--epochs", type=int, help="default 6 (quick: 1)")
    arguments.add_argument("--warmup", type=int, default=500, help="steps of Adam's linear warmup")
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--width", type=int, default=8, help="channels of the CNN's first stage")
    arguments.add_argument("--train-size", type=int, help="train on so many images (default: all 54,000)")
    arguments.add_argument("--jobs", type=int, help="processes, one thread each (default 2; quick: 1)")
    arguments.add_argument("--fresh", action="store_true", help="forget what an earlier run left in the result file")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    if args.quick:  # the digits that scikit-learn ships
        study = Study("digits", args.epochs or 1, args.batch_size, args.warmup, 0.1, args.width, 512)
        rates, seeds, root = tuple(args.lr or RATES[:2]), tuple(args.seeds or SEEDS[:1]), None
    else:
        study = Study("fashion_mnist", args.epochs or 6, args.batch_size, args.warmup, 0.1, args.width, args.train_size)
        rates, seeds, root = tuple(args.lr or RATES), tuple(args.seeds or SEEDS), data_root(args.data)
    path = output_path(NAME, args.out, args.quick)
    settings = {**asdict(study), "network": "small CNN", "weight_decay": WEIGHT_DECAY, "split_seed": SPLIT_SEED}
    rows = [] if args.fresh or args.quick else finished_rows(path, settings)
    done = {(row["optimizer"], row["lr"], row["seed"]) for row in rows}
    # Seed by seed, so that a study cut short still compares all optimizers.
    grid = [Cell(name, lr, seed) for seed in seeds for lr in rates for name in args.optimizers]
    todo = [cell for cell in grid if (cell.optimizer, cell.lr, cell.seed) not in done]
    jobs = args.jobs or (1 if args.quick else 2)
    print(f"{len(todo)} of {len(grid)} runs to do, {study.epochs} epochs each, {jobs} at a time", flush=True)
    begin = time.perf_counter()
    with contextlib.closing(execute(todo, study, root, jobs)) as results:
        for count, row in enumerate(results, start=1):
            rows.append(row)
            save(path, settings, rows)
            left = (time.perf_counter() - begin) / count * (len(todo) - count)
            print(f"{describe(row)}  about {left / 60:.0f} min left", flush=True)
    table, spread = save(path, settings, rows)
    plot(table, study, path.with_suffix(".png"))
    for line in spread:
        print(
            f"{line['optimizer']:<17} range over lr {100 * line['range']:.2f} points, "
            f"worst {100 * line['worst']:.2f} % at lr {line['worst_lr']:g}, best {100 * line['best']:.2f} %"
        )


def save(
    path: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the result file with all that is known so far."""
    order = list(OPTIMIZERS)
    rows = sorted(rows, key=lambda row: (order.index(row["optimizer"]), -row["lr"], row["seed"]))
    table, spread = summarize(rows)
    machine = {**environment(packages=("torchvision",)), "threads": 1}
    write_result(path, NAME, settings, rows, table=table, sensitivity=spread, environment=machine)
    return table, spread


def describe(row: dict[str, Any]) -> str:
    """One line of the console."""
    score = "diverged" if row["diverged"] else f"{100 * row['accuracy']:.2f} %"
    return (
        f"{row['optimizer']:<17} lr {row['lr']:<6g} seed {row['seed']}  {score:>9}  "
        f"{row['seconds_per_epoch']:.1f} s an epoch"
    )


if __name__ == "__main__":
    main()
