"""Does a learned attacker train a robust classifier, and at what cost? The tables of this package's l2l study.

A small convolutional network on 8,000 images of Fashion-MNIST, ten epochs, l-infinity balls of epsilon 0.1 and 0.2:
standard training, FGSM, two hand-made steps, PGD-10 and TRADES beside the learned attacker of arXiv:1811.01213 in the
authors' recipe and in ours. The last epoch counts; nothing is chosen by a result. Each network is judged on the first
1,000 test images by ``robust_report``: PGD-20 beside the worst case of PGD-50 with restarts, margin loss, APGD and
Square, and the signs of masked gradients. Time is that of the process inside training epochs, one thread.

    python benchmarks/papers/l2l.py --data FOLDER [--seeds 0 1] [--jobs 2]

Each run leaves a file and its report below ``--work``, so that an interrupted study goes on; the result is written
after every run. Two processes may share the work (``--seeds``, ``--methods``), and ``--finished`` writes what they have
run.
"""

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from image_batches import Batches
from single_runs import keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

from lightning_rectify._lightning import Callback, Trainer, seed_everything
from lightning_rectify.callbacks.robustness import RobustReport, robust_report
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.l2l import L2LDefense

NAME = "l2l"
FOLDERS = ("fashion-mnist", ".")
SOURCE_SEED = 100  # of the two networks whose images are transferred
_COLD = {"warm_start": False, "attacker_args": {"gain": 1.0}, "attacker_lr": 1e-3}
#: method -> arguments of ``L2LDefense``; multiples of epsilon end in ``_epsilons``
METHODS: dict[str, dict[str, Any]] = {
    "standard": {"attack": "none"},
    "FGSM": {"attack": "fgsm"},
    "FGSM-RS": {"attack": "fgsm", "random_start": 1.0, "step_size_epsilons": 1.25},
    "FGSM, memory": {"attack": "fgsm", "memory": True},
    "2-step sign": {"attack": "pgd", "train_steps": 2, "random_start": 0.0, "step_size_epsilons": 1.0},
    "PGD-10": {"attack": "pgd", "train_steps": 10},
    "TRADES-10": {"attack": "trades", "train_steps": 10},
    "naive L2L": {"variant": "naive"},
    "gradient L2L, released recipe": {"order": "alternate", "gradient_scale": "batch_max", **_COLD},
    "gradient L2L, alternate, sample std": {"order": "alternate", **_COLD},
    "gradient L2L, joint, sample std": _COLD,
    "gradient L2L": {},
    "2-step L2L": {"steps": 2},
}
AT_TWICE = ("FGSM", "gradient L2L", "2-step sign", "2-step L2L", "PGD-10")  # also run at epsilon 0.2
PGD = "PGD-10"


@dataclass(frozen=True)
class Study:
    """What all runs of a study share."""

    dataset: str = "fashion_mnist"
    train_images: int = 8000
    test_images: int = 1000
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    steps: tuple[int, ...] = (1, 10, 20, 50)
    restarts: tuple[int, ...] = (1, 5)
    apgd_steps: int = 100
    queries: int = 5000

    def plain(self) -> dict[str, Any]:
        """As a JSON file has it."""
        return {**asdict(self), "steps": list(self.steps), "restarts": list(self.restarts)}


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    epsilon: float
    seed: int

    def path(self, work: Path) -> Path:
        """Where its result lies."""
        stem = self.method.lower().replace(", ", "_").replace(" ", "-")
        return work / f"{stem}_e{self.epsilon:g}_s{self.seed}.json"


# -- data, network, training -------------------------------------------------------------------------------------------


def prepare(study: Study, root: str | None, work: Path) -> None:
    """Leave pixels in 0 to 1 as tensors in the work folder."""
    if (work / "data.pt").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    data = ImageData(
        study.dataset, root, train_size=study.train_images, val_size=0, augment=False, normalization="unit", seed=0
    )
    data.setup("fit")
    data.setup("test")
    batches = list(data.test_dataloader())
    test = [torch.cat(part)[: study.test_images] for part in zip(*batches, strict=True)]
    torch.save({"train": data.training_images(), "test": tuple(test)}, work / "data.pt")


def classifier(image_size: int) -> nn.Module:
    """Three convolutions with batch normalization and two linear layers; 115,194 parameters for 28 pixels."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    side = -(-image_size // 4)
    return nn.Sequential(
        *stage(1, 16, 1), *stage(16, 32, 2), *stage(32, 32, 2), nn.Flatten(), nn.Linear(32 * side**2, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


class Epochs(Callback):
    """The process's time inside each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_epoch_start(self, *args: object) -> None:
        self._begin = time.process_time()

    def on_train_epoch_end(self, *args: object) -> None:
        self.seconds.append(time.process_time() - self._begin)


def warm_up_and_cosine(optimizer: Any, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over the first epoch and falls to 0 along a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_module(cell: Cell, study: Study, image_size: int, steps: int) -> L2LDefense:
    """The module of a method, with the study's optimizers; the attacker's learning rate is constant."""
    options = dict(METHODS[cell.method])
    if (times := options.pop("step_size_epsilons", None)) is not None:
        options["step_size"] = times * cell.epsilon
    attacker_lr = options.pop("attacker_lr", 3e-3)
    module = L2LDefense(
        classifier=classifier(image_size), image_size=image_size, epsilon=cell.epsilon,
        classifier_optimizer=partial(
            torch.optim.SGD, lr=study.lr, momentum=study.momentum, weight_decay=study.weight_decay
        ),
        attacker_optimizer=partial(torch.optim.Adam, lr=attacker_lr), lr_scheduler_interval="step", **options,
    )  # fmt: skip
    schedule: Callable[[Any], Any] = partial(warm_up_and_cosine, steps=steps * study.epochs, warmup=steps)
    module.classifier_lr_scheduler = schedule  # type: ignore[assignment]
    return module


def train(cell: Cell, study: Study, work: Path) -> tuple[L2LDefense, list[float]]:
    """The trained module, and the CPU seconds of each epoch."""
    images, labels = torch.load(work / "data.pt", weights_only=True)["train"]
    seed_everything(cell.seed, verbose=False)
    batches = Batches(images, labels, study.batch_size, cell.seed, with_index=True)
    module, epochs = make_module(cell, study, images.shape[-1], len(batches)), Epochs()
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=study.epochs, callbacks=[epochs], **silence)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, epochs.seconds


def sources(study: Study, epsilon: float, work: Path) -> dict[str, nn.Module]:
    """The networks on which images are made for transfer: one trained without attacks, one by PGD-10."""
    found = {}
    for method in ("standard", PGD):
        cell = Cell(method, epsilon, SOURCE_SEED)
        path = cell.path(work).with_suffix(".pt")
        side = torch.load(work / "data.pt", weights_only=True)["test"][0].shape[-1]
        module = make_module(cell, study, side, 1)
        module.load_state_dict(torch.load(path, weights_only=True))
        found["a standard network" if method == "standard" else "a PGD-10 network"] = module
    return found


def make_source(which: tuple[str, float], study: Study, work: Path) -> dict[str, Any]:
    """Train one of them, named by method and epsilon, once."""
    torch.set_num_threads(1)
    method, epsilon = which
    cell = Cell(method, epsilon, SOURCE_SEED)
    path = cell.path(work).with_suffix(".pt")
    if not path.exists():
        quiet()
        module, _ = train(cell, study, work)
        torch.save(module.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return {}


def run(cell: Cell, study: Study, work: Path) -> dict[str, Any]:
    """Train one network and judge it; on one thread."""
    torch.set_num_threads(1)
    quiet()
    module, seconds = train(cell, study, work)
    begin = time.process_time()
    test = torch.load(work / "data.pt", weights_only=True)["test"]
    report = robust_report(
        module, test, cell.epsilon, steps=study.steps, restarts=study.restarts, apgd_steps=study.apgd_steps,
        queries=study.queries, max_images=study.test_images, batch_size=250, seed=cell.seed, progress=False,
        transfer_from=sources(study, cell.epsilon, work),
    )  # fmt: skip
    report.save(cell.path(work).with_suffix(""))
    row = {
        **asdict(cell),
        **row_of(report),
        "epoch_cpu_seconds": statistics.median(seconds),
        "report_cpu_seconds": round(time.process_time() - begin, 1),
        "passes_against_pgd": module.passes.against_pgd(10),
    }
    return keep(cell.path(work), study.plain(), row)


def row_of(report: RobustReport) -> dict[str, Any]:
    """What the tables need of a report."""
    steps = {int(count): i for i, count in enumerate(report.steps)}
    middle = min(steps, key=lambda count: abs(count - 20))
    return {
        "clean": report.clean_accuracy,
        "pgd_20": float(report.steps_accuracy[steps[middle]]),
        "worst": report.robust_accuracy,
        "worst_standard_error": report.standard_error(report.robust_accuracy),
        "own_attack": report.own_attack_accuracy,
        "unbounded": report.unbounded_accuracy,
        "steps": dict(zip(map(str, report.steps.tolist()), report.steps_accuracy.tolist(), strict=True)),
        "epsilons": dict(
            zip((f"{value:g}" for value in report.epsilons), report.epsilons_accuracy.tolist(), strict=True)
        ),
        "attacks": {attack.name: attack.worst for attack in report.attacks},
        "alone": {attack.name: attack.alone for attack in report.attacks if attack.alone is not None},
        "failed_checks": [check.name for check in report.failed],
        "checks": {check.name: check.value for check in report.checks},
    }


def quiet() -> None:
    """Trainers say nothing."""
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)


# -- all runs ----------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds for each method and epsilon, and its time over PGD-10's at that epsilon."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["epsilon"], row["method"]), []).append(row)
    table = []
    for (epsilon, method), group in sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1]))):
        pgd = groups.get((epsilon, PGD))
        seconds = statistics.fmean(row["epoch_cpu_seconds"] for row in group)
        line: dict[str, Any] = {"epsilon": epsilon, "method": method, "runs": len(group), "epoch_cpu_seconds": seconds}
        line["ratio_to_pgd"] = (
            seconds / statistics.fmean(row["epoch_cpu_seconds"] for row in pgd) if pgd is not None else None
        )
        for key in ("clean", "pgd_20", "worst"):
            values = [row[key] for row in group]
            line[key] = statistics.fmean(values)
            line[f"{key}_seeds"] = values
        own = [row["own_attack"] for row in group if row["own_attack"] is not None]
        line["own_attack"] = statistics.fmean(own) if own else None
        line["failed_checks"] = sorted({name for row in group for name in row["failed_checks"]})
        table.append(line)
    return table


def _order(method: str) -> int:
    return list(METHODS).index(method)


def verdict(table: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether each acceptance bar of the study holds, as far as its runs are there; means over the seeds."""
    lines = {(line["epsilon"], line["method"]): line for line in table}
    found: dict[str, bool] = {}

    def bar(name: str, needed: Sequence[tuple[float, str]], holds: Callable[..., bool]) -> None:
        if all(key in lines for key in needed):
            found[name] = bool(holds(*(lines[key] for key in needed)))

    gradient, two = (0.1, "gradient L2L"), (0.1, "2-step L2L")
    alternate, joint = (0.1, "gradient L2L, alternate, sample std"), (0.1, "gradient L2L, joint, sample std")
    bar(
        "standard: clean >= .87, PGD-20 <= .03",
        [(0.1, "standard")],
        lambda a: a["clean"] >= 0.87 and a["pgd_20"] <= 0.03,
    )
    bar("FGSM: PGD-20 >= .64", [(0.1, "FGSM")], lambda a: a["pgd_20"] >= 0.64)
    bar("PGD-10: clean >= .77, PGD-20 >= .67", [(0.1, PGD)], lambda a: a["clean"] >= 0.77 and a["pgd_20"] >= 0.67)
    bar("gradient L2L: clean >= .80, PGD-20 >= .63", [gradient], lambda a: a["clean"] >= 0.8 and a["pgd_20"] >= 0.63)
    bar("gradient L2L: within .06 of PGD-10", [gradient, (0.1, PGD)], lambda a, b: b["pgd_20"] - a["pgd_20"] <= 0.06)
    bar("2-step L2L: PGD-20 >= .65", [two], lambda a: a["pgd_20"] >= 0.65)
    bar("2-step L2L: within .05 of PGD-10", [two, (0.1, PGD)], lambda a, b: b["pgd_20"] - a["pgd_20"] <= 0.05)
    bar("epsilon .2: 2-step L2L PGD-20 >= .48, FGSM + .05", [(0.2, "2-step L2L"), (0.2, "FGSM")],
        lambda a, b: a["pgd_20"] >= max(0.48, b["pgd_20"] + 0.05))  # fmt: skip
    bar("naive L2L: PGD-20 <= .20, flagged", [(0.1, "naive L2L")],
        lambda a: a["pgd_20"] <= 0.2 and "collapse" in a["failed_checks"])  # fmt: skip
    bar("released recipe: PGD-20 >= .56", [(0.1, "gradient L2L, released recipe")], lambda a: a["pgd_20"] >= 0.56)
    bar("sample std over batch max: + .01", [alternate, (0.1, "gradient L2L, released recipe")],
        lambda a, b: a["pgd_20"] - b["pgd_20"] >= 0.01)  # fmt: skip
    bar("time of gradient L2L <= .45 of PGD-10", [gradient, (0.1, PGD)], lambda a, _: a["ratio_to_pgd"] <= 0.45)
    bar("time of 2-step L2L <= .65 of PGD-10", [two, (0.1, PGD)], lambda a, _: a["ratio_to_pgd"] <= 0.65)
    bar("time of joint <= .75 of alternate", [joint, alternate],
        lambda a, b: a["epoch_cpu_seconds"] <= 0.75 * b["epoch_cpu_seconds"])  # fmt: skip
    ours = [row for row in rows if row["epsilon"] == 0.1 and row["method"] in (gradient[1], two[1])]
    if ours and all({"10", "50"} <= row["steps"].keys() for row in ours):
        found["default recipes: PGD-10 to 50 <= .03"] = all(
            row["steps"]["10"] - row["steps"]["50"] <= 0.03 for row in ours
        )
    if ours and all("0.4" in row["epsilons"] for row in ours):
        found["default recipes: <= .02 at 4 epsilon"] = all(row["epsilons"]["0.4"] <= 0.02 for row in ours)
    return found


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Worst case over time, a panel an epsilon; a bar from seed to seed, hollow where a check failed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    epsilons = sorted({line["epsilon"] for line in table})
    methods = list(dict.fromkeys(line["method"] for line in table))
    looks = {method: (f"C{i % 10}", "os"[i // 10]) for i, method in enumerate(methods)}
    figure = Figure(figsize=(4.2 * len(epsilons) + 2.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(epsilons), squeeze=False, sharey=True)[0]
    for ax, epsilon in zip(panels, epsilons, strict=True):
        for line in table:
            if line["epsilon"] != epsilon or line["ratio_to_pgd"] is None:
                continue
            color, marker = looks[line["method"]]
            seeds = [100 * worst for worst in line["worst_seeds"]]
            ax.plot([line["ratio_to_pgd"]] * len(seeds), seeds, "_-", color=color, lw=1, ms=7)
            face = "white" if line["failed_checks"] else color
            ax.plot(line["ratio_to_pgd"], 100 * line["worst"], marker, color=color, mfc=face, ms=8)
        ax.set(xlabel="time of an epoch, x PGD-10", title=f"epsilon {epsilon:g}", xlim=(0, None))
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy under the worst of all attacks, %")
    marks = [Line2D([], [], ls="", marker=looks[name][1], color=looks[name][0], ms=8, label=name) for name in methods]
    marks.append(Line2D([], [], ls="", marker="o", color="grey", mfc="white", ms=8, label="hollow: a check failed"))
    figure.legend(handles=marks, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[0, 1])
    arguments.add_argument("--data", help="folder that holds fashion-mnist/FashionMNIST/raw")
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments.add_argument("--epsilons", nargs="+", type=float, default=[0.1, 0.2])
    arguments.add_argument("--epochs", type=int, default=Study.epochs)
    arguments.add_argument("--queries", type=int, default=Study.queries, help="of the Square attack")
    arguments.add_argument("--finished", action="store_true", help="run nothing: write what has been run")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    if args.quick:  # the digits that scikit-learn ships
        study = Study("digits", 256, 32, epochs=1, batch_size=64, steps=(1, 20), restarts=(1,), apgd_steps=3, queries=5)
        work = output_path(NAME, args.out, True).parent / "l2l_runs"
        cells = [Cell(method, 0.1, 0) for method in ("standard", PGD, "gradient L2L", "2-step L2L")]
    else:
        study, work = Study(epochs=args.epochs, queries=args.queries), args.work
        cells = [  # seed by seed, so that a study cut short still compares all methods
            Cell(method, epsilon, seed)
            for seed in args.seeds
            for epsilon in args.epsilons
            for method in args.methods
            if epsilon == args.epsilons[0] or method in AT_TWICE
        ]
    if not args.finished:
        prepare(study, None if args.quick else data_folder(args.data, FOLDERS), work)
    path = output_path(NAME, args.out, args.quick)
    done, todo = split(cells, lambda cell: (cell.path(work), study.plain()))
    if args.finished:
        todo = []
    rows, jobs = [row for _, row in done], 1 if args.quick else args.jobs
    wanted = [(m, e) for e in sorted({cell.epsilon for cell in todo}) for m in ("standard", PGD)]
    for _ in run_all(partial(make_source, study=study, work=work), wanted, jobs):
        pass
    for _, row, left in run_all(partial(run, study=study, work=work), todo, jobs):
        rows.append(row)
        print(f"{describe(row)}  {left}", flush=True)
        save(path, study, rows)
    save(path, study, rows)
    plot(summarize(rows), path.with_suffix(".png"))


def save(path: Path, study: Study, rows: list[dict[str, Any]]) -> None:
    """Write the result file with all that is known so far."""
    rows = sorted(rows, key=lambda row: (row["epsilon"], _order(row["method"]), row["seed"]))
    settings = {
        **study.plain(), "network": "3 convolutions (16, 32, 32), 2 linear layers", "transfer_seed": SOURCE_SEED,
        "optimizer": "SGD, one epoch of warmup, cosine to 0; the attacker's Adam with a constant rate",
    }  # fmt: skip
    machine = {**environment(packages=("torchvision",)), "threads": 1}
    table = summarize(rows)
    write_result(path, NAME, settings, rows, table=table, meets_bars=verdict(table, rows), environment=machine)


def describe(row: dict[str, Any]) -> str:
    """One line of the console."""
    failed = f"  failed: {', '.join(row['failed_checks'])}" if row["failed_checks"] else ""
    return (
        f"{row['method']} epsilon {row['epsilon']:g} seed {row['seed']}: clean {100 * row['clean']:.1f} PGD-20 "
        f"{100 * row['pgd_20']:.1f} worst {100 * row['worst']:.1f} %, {row['epoch_cpu_seconds']:.2f} s an epoch{failed}"
    )


if __name__ == "__main__":
    main()
