"""Ways to train a robust classifier, at equal epochs and at equal time.

Fashion-MNIST whole, with the network of ``l2l.py`` and epsilon 0.1, and CIFAR-10 with a ResNet-8 and epsilon 8/255:
standard training, FGSM from a random start or with a memory (half of epsilon from where an image's last attack ended),
PGD-10, TRADES-10, and the learned attacker in one and in two steps. At equal time a method trains for as many epochs
as fit in the CPU time of PGD-10's, and its learning rate's schedule stretches over them. The seconds an epoch that this
takes are measured first, all methods in interleaved rounds on one thread. The last epoch counts; nothing is chosen by a
result. Each network is judged by ``robust_report``.

    python benchmarks/papers/l2l_compare.py --data FOLDER [--images 60000 10000] [--epochs 10 5]

CIFAR-10 is read as an image folder, cifar10/imagefolder/train/CLASS/* and .../test/CLASS/*. Each run leaves a file and
its report below ``--work``, so that an interrupted study goes on; the result is written after every run. Two processes
may share the work (``--datasets``, ``--methods``, ``--seeds``), and ``--finished`` writes what they have run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import l2l
from image_batches import Batches
from l2l import METHODS, Epochs, Study, quiet, row_of, warm_up_and_cosine
from l2l_cost import Stopwatch
from single_runs import keep, kept, study_parser
from timing import data_folder, environment, interleave, output_path, write_result

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.callbacks.robustness import robust_report
from lightning_rectify.data.image_datasets import stratified_take
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.l2l import L2LDefense
from lightning_rectify.modules.l2l.networks import build_classifier

NAME = "l2l_compare"
PGD, MEMORY = "PGD-10", "FGSM, memory"
COMPARED = ("standard", "FGSM-RS", MEMORY, "gradient L2L", "2-step L2L", PGD, "TRADES-10")
BUDGETS = ("epochs", "time")
#: channels, height and width; pixels of a random crop's frame; epsilon; mean and standard deviation inside the network
DATASETS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"channels": 1, "side": 28, "pad": 0, "epsilon": 0.1, "folders": l2l.FOLDERS},
    "cifar10": {
        "channels": 3, "side": 32, "pad": 4, "epsilon": 8 / 255, "folders": ("cifar10/imagefolder", "imagefolder", "."),
        "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616],
    },
    "digits": {"channels": 1, "side": 8, "pad": 0, "epsilon": 0.1, "folders": ()},
}  # fmt: skip
STUDIES = {
    "fashion_mnist": Study(train_images=60_000, restarts=(1, 3), apgd_steps=50, queries=1000),
    "cifar10": Study("cifar10", train_images=50_000, restarts=(1, 3), apgd_steps=50, queries=500),
    "digits": Study("digits", 192, 32, epochs=1, batch_size=64, steps=(1, 20), restarts=(1,), apgd_steps=3, queries=5),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    dataset: str
    method: str
    budget: str
    seed: int

    def path(self, work: Path) -> Path:
        """Where its result lies."""
        stem = self.method.lower().replace(",", "").replace(" ", "-")
        return work / f"{self.dataset}_{stem}_{self.budget}_s{self.seed}.json"


# -- data, network, training -------------------------------------------------------------------------------------------


def prepare(study: Study, root: str | None, work: Path) -> Path:
    """Leave pixels in 0 to 1 as tensors in the work folder, for this data set and number of images."""
    path = work / f"{study.dataset}_{study.train_images}_{study.test_images}.pt"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    name = "image_folder" if study.dataset == "cifar10" else study.dataset
    data = ImageData(
        name, root, train_size=study.train_images, val_size=0, augment=False, normalization="unit", seed=0,
        image_size=DATASETS[study.dataset]["side"],
    )  # fmt: skip
    data.setup("fit")
    data.setup("test")
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    first = torch.arange(min(study.test_images, len(labels)))
    if name == "image_folder":  # sorted by class
        first = stratified_take(labels, study.test_images, 0)[1]
    parts = {"train": data.training_images(), "test": (images[first], labels[first])}
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return path


def cropped(images: Tensor, generator: torch.Generator, pad: int) -> tuple[Tensor, Tensor]:
    """Each image cropped out of a black frame of ``pad`` pixels, and mirrored or not; and where it was put, (B, 3)."""
    count, _, side, _ = images.shape
    framed = nn.functional.pad(images, [pad] * 4)
    corner = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    along = torch.arange(side)
    rows, columns = corner[0] + along, corner[1] + torch.where(mirrored, side - 1 - along, along)
    sample = torch.arange(count)[:, None, None]
    images = framed[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return images, torch.cat([corner[0] - pad, corner[1] - pad, mirrored.long()], dim=1)


def augmentation(study: Study) -> Any:
    """What a batch of the data set goes through."""
    pad = DATASETS[study.dataset]["pad"]
    return partial(cropped, pad=pad) if pad else None


def make_module(cell: Cell, study: Study, steps: int) -> L2LDefense:
    """The module of a method, with the study's optimizers; the attacker's learning rate is constant."""
    about = DATASETS[cell.dataset]
    side, channels, epsilon = about["side"], about["channels"], about["epsilon"]
    options = dict(METHODS[cell.method])
    if (times := options.pop("step_size_epsilons", None)) is not None:
        options["step_size"] = times * epsilon
    network = build_classifier("resnet8", 10, channels) if channels == 3 else l2l.classifier(side)
    sgd = partial(torch.optim.SGD, lr=study.lr, momentum=study.momentum, weight_decay=study.weight_decay)
    module = L2LDefense(
        classifier=network, in_channels=channels, image_size=side, epsilon=epsilon, mean=about.get("mean"),
        std=about.get("std"), classifier_optimizer=sgd, attacker_optimizer=partial(torch.optim.Adam, lr=3e-3),
        lr_scheduler_interval="step", **options,
    )  # fmt: skip
    schedule = partial(warm_up_and_cosine, steps=steps * study.epochs, warmup=steps)
    module.classifier_lr_scheduler = schedule  # type: ignore[assignment]
    return module


def trainer(**options: Any) -> Trainer:
    """One that says and writes nothing."""
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, **silence, **options)


def run(cell: Cell, study: Study, data: Path, work: Path) -> dict[str, Any]:
    """Train one network, for ``study.epochs`` epochs, and judge it."""
    parts = torch.load(data, weights_only=True)
    seed_everything(cell.seed, verbose=False)
    batches = Batches(*parts["train"], study.batch_size, cell.seed, augmentation(study), with_index=True)
    module, epochs = make_module(cell, study, len(batches)), Epochs()
    trainer(max_epochs=study.epochs, callbacks=[epochs]).fit(module, DataLoader(batches, batch_size=None))
    begin = time.process_time()
    report = robust_report(
        module, parts["test"], module.epsilon, steps=study.steps, restarts=study.restarts,
        apgd_steps=study.apgd_steps, queries=study.queries, max_images=None, batch_size=250, seed=cell.seed,
        progress=False,
    )  # fmt: skip
    report.save(cell.path(work).with_suffix(""))
    return {
        **asdict(cell),
        **row_of(report),
        "epochs": study.epochs,
        "epoch_cpu_seconds": statistics.median(epochs.seconds),
        "train_cpu_seconds": sum(epochs.seconds),
        "report_cpu_seconds": round(time.process_time() - begin, 1),
        "passes_against_pgd": module.passes.against_pgd(10),
    }


def measure(study: Study, data: Path, work: Path, steps: int = 3, rounds: int = 4) -> dict[str, float]:
    """CPU seconds an epoch of each method, from interleaved rounds of some steps; measured once.

    A method that came later is measured beside PGD-10, whose seconds stay.
    """
    path = work / f"{study.dataset}_{study.train_images}_seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [method for method in COMPARED if method not in known]
    if not missing:
        return known
    images, labels = torch.load(data, weights_only=True)["train"]
    some, watch = slice(steps * study.batch_size), Stopwatch(torch.device("cpu"))
    made = {}
    for method in dict.fromkeys([PGD, *missing]):
        module = make_module(Cell(study.dataset, method, "epochs", 0), study, steps)
        some_batches = Batches(images[some], labels[some], study.batch_size, 0, augmentation(study), with_index=True)
        loader = DataLoader(some_batches, batch_size=None)

        def fit(module: L2LDefense = module, loader: Any = loader) -> None:
            trainer(max_steps=steps, max_epochs=-1, callbacks=[watch]).fit(module, loader)

        made[method] = fit
    timings = interleave(made, rounds=rounds, warmup=1, clock=watch)
    batches = len(images) // study.batch_size
    pgd = known.get(PGD, timings.median(PGD) / steps * batches)
    # By rounds: the machine may have been slower in one than in another.
    seconds = {PGD: pgd} | known | {method: pgd * timings.ratio(method, PGD).median for method in missing}
    path.write_text(json.dumps(seconds))
    return seconds


def stretched(study: Study, method: str, budget: str, seconds: dict[str, float]) -> Study:
    """The study with the epochs of a method: those of PGD-10, or as many as fit in its time."""
    if budget == "epochs":
        return study
    return replace(study, epochs=max(1, round(study.epochs * seconds[PGD] / seconds[method])))


# -- all runs ----------------------------------------------------------------------------------------------------------


def summarize(
    rows: Sequence[dict[str, Any]], studies: dict[str, Study], seconds: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Mean over seeds for each data set, budget and method."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        dataset, method = row["dataset"], row["method"]
        study = studies[dataset]
        same = stretched(study, method, "time", seconds[dataset]) == study  # both budgets are this one run
        for budget in BUDGETS if same else (row["budget"],):
            groups.setdefault((dataset, budget, method), []).append(row)
    table = []
    order = sorted(groups, key=lambda key: (key[0] != "fashion_mnist", BUDGETS.index(key[1]), COMPARED.index(key[2])))
    for dataset, budget, method in order:
        group, times = groups[dataset, budget, method], seconds[dataset]
        line: dict[str, Any] = {"dataset": dataset, "budget": budget, "method": method, "runs": len(group)}
        keys = ("clean", "pgd_20", "worst", "worst_standard_error", "epochs", "epoch_cpu_seconds", "train_cpu_seconds")
        line |= {key: statistics.fmean(row[key] for row in group) for key in keys}
        line["ratio_to_pgd"] = times[method] / times[PGD]
        line["worst_seeds"] = [row["worst"] for row in group]
        line["failed_checks"] = sorted({name for row in group for name in row["failed_checks"]})
        table.append(line)
    return table


def cells_of(name: str, args: argparse.Namespace) -> list[Cell]:
    """The runs on a data set, seed by seed, so that a study cut short still compares all methods."""
    return [
        Cell(name, method, budget, seed) for seed in args.seeds for budget in args.budgets for method in args.methods
    ]


def look(cell: Cell, study: Study, work: Path) -> tuple[Path, dict[str, Any]]:
    """A run's file, and the settings it hangs on."""
    return cell.path(work), study.plain()


def studies_of(args: argparse.Namespace) -> dict[str, Study]:
    """The study of each data set, with the epochs and images asked for.

    Raises:
        SystemExit: if there are neither one nor as many numbers as data sets.
    """
    studies = {name: STUDIES[name] for name in args.datasets}
    for option, field in (("epochs", "epochs"), ("images", "train_images")):
        values = getattr(args, option) or []
        if len(values) not in (0, 1, len(studies)):
            raise SystemExit(f"--{option}: expected one number, or one for each data set, but got {values}.")
        for i, name in enumerate(studies if values else ()):
            studies[name] = replace(studies[name], **{field: values[i % len(values)]})
    return studies


def save(path: Path, studies: dict[str, Study], rows: list[dict[str, Any]], seconds: dict[str, Any]) -> None:
    """Write the result file with all that is known so far."""
    settings = {
        "epsilon": {name: DATASETS[name]["epsilon"] for name in studies},
        "study": {name: study.plain() for name, study in studies.items()},
        "seconds_an_epoch": seconds,
        "networks": "fashion_mnist: 3 convolutions, 2 linear layers; cifar10: ResNet-8",
        "optimizer": "SGD, one epoch of warmup, cosine to 0; the attacker's Adam with a constant rate",
        "augmentation": "cifar10: crop and mirror; fashion_mnist: none",
    }
    if "cifar10" in studies:
        settings["cifar10"] = "as JPEG of quality 75"
    machine = {**environment(packages=("torchvision",)), "threads": 1}
    write_result(path, NAME, settings, rows, table=summarize(rows, studies, seconds), environment=machine)


def describe(row: dict[str, Any]) -> str:
    """One line of the console."""
    failed = f"  failed: {', '.join(row['failed_checks'])}" if row["failed_checks"] else ""
    return (
        f"{row['dataset']}, equal {row['budget']}: {row['method']} seed {row['seed']}, {row['epochs']} epochs: clean "
        f"{100 * row['clean']:.1f} worst {100 * row['worst']:.1f} %, {row['epoch_cpu_seconds']:.1f} s an epoch{failed}"
    )


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[0], jobs=None)
    arguments.add_argument("--data", help="folder that holds fashion-mnist/FashionMNIST/raw and cifar10/imagefolder")
    arguments.add_argument("--datasets", nargs="+", choices=list(DATASETS)[:2], default=list(DATASETS)[:2])
    arguments.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED))
    arguments.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    arguments.add_argument(
        "--epochs", nargs="+", type=int, help="of PGD-10; one number, or one a data set (default 10)"
    )
    arguments.add_argument("--images", nargs="+", type=int, help="to train on, the same way (default: all)")
    arguments.add_argument("--finished", action="store_true", help="run nothing: write what has been run")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    quiet()
    path, work = output_path(NAME, args.out, args.quick), args.work
    if args.quick:  # the digits that scikit-learn ships
        work, args.datasets, args.methods = path.parent / f"{NAME}_runs", ["digits"], ["FGSM-RS", "2-step L2L", PGD]
    studies = studies_of(args)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, float]] = {}
    done = 0
    for name, study in studies.items():
        root = data_folder(args.data, DATASETS[name]["folders"]) if DATASETS[name]["folders"] else None
        data = prepare(study, root, work)
        seconds[name] = measure(study, data, work, **({"steps": 1, "rounds": 1} if args.quick else {}))
        for cell in cells_of(name, args):
            own = stretched(study, cell.method, cell.budget, seconds[name])
            if own == study:  # as PGD-10's is: one run for both budgets
                cell = replace(cell, budget="epochs")
            if any(cell == Cell(row["dataset"], row["method"], row["budget"], row["seed"]) for row in rows):
                continue
            if row := kept(*look(cell, own, work)):
                rows.append(row)
            elif not args.finished:
                rows.append(keep(*look(cell, own, work), run(cell, own, data, work)))
                print(describe(rows[-1]), flush=True)
                done += 1
            save(path, studies, rows, seconds)
    print(f"{done} of {len(rows)} runs done now")


if __name__ == "__main__":
    main()
