"""Does control of the singular values help a narrow discriminator, and does a slow decay of them?

The narrow-discriminator study: the CNN of arXiv:1812.10912 on Fashion-MNIST and CIFAR-10 at 32 pixels, one generator,
discriminators of several widths under the paper's five controls and three baselines, several seeds. A run is judged by
KID and a Frechet distance on the features of a classifier trained on the same data set (``ImageClassifier``, small
CNN), between generated images and as many test images. The learning rate was chosen on seed 101 and validation images
(``--judged-on val``).

    python benchmarks/papers/spectral_gan.py --data FOLDER [--datasets fashion_mnist cifar10] [--jobs 2]

Each run leaves a file below ``--work``, so that an interrupted study goes on; the result is written after every run.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from image_batches import Batches
from single_runs import keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

from lightning_rectify import ImageClassifier, ImageData, SpectralGAN
from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.modules.spectral_gan import ClassifierFeatures, FeatureExtractor
from lightning_rectify.modules.spectral_gan.metrics import GenerationMetrics
from lightning_rectify.nn import matrix_layers, singular_values, weight_matrix

NAME = "spectral_gan"
#: name in the tables -> control and start of ``SpectralGAN``
CONTROLS: dict[str, tuple[str | int, str]] = {
    "plain": ("plain", "ones"),
    "spectral_norm": ("spectral_norm", "ones"),
    "orthogonal": ("orthogonal", "ones"),
    "1 normalization": (1, "ones"),
    "2 constraint": (2, "ones"),
    "3 lipschitz": (3, "ones"),
    "5 divergence": (5, "spread"),
    "8 d_optimal": (8, "ones"),
}
WIDTHS = (8, 16, 32, 64)
SEEDS = (1, 2, 3)
FOLDERS = {"fashion_mnist": ("fashion-mnist", "."), "cifar10": ("cifar10/imagefolder", "imagefolder", ".")}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided 95 %, by degrees of freedom


@dataclass(frozen=True)
class Study:
    """What all runs of a study share."""

    steps: int
    batch_size: int = 64
    lr: float = 2e-4
    generator_width: int = 64
    latent_size: int = 64
    ema_decay: float = 0.99
    evaluated: int = 2000
    classifier_epochs: int = 4
    judged_on: str = "test"


@dataclass(frozen=True)
class Cell:
    """One run."""

    dataset: str
    width: int
    control: str
    seed: int

    def path(self, work: Path) -> Path:
        """Where its result lies."""
        return work / f"{self.dataset}_w{self.width}_{self.control.replace(' ', '-')}_s{self.seed}.json"


# -- data and judge, once a data set ----------------------------------------------------------------------------------


def prepare(dataset: str, root: str | None, study: Study, work: Path) -> None:
    """Leave images in [-1, 1] as tensors and a trained classifier in the work folder."""
    folder = work / dataset
    if (folder / "classifier.ckpt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = "image_folder" if dataset == "cifar10" else dataset
    data = ImageData(
        name, root, image_size=32, normalization="symmetric", augment=False, val_size=0.1, batch_size=128, seed=0
    )
    data.setup("fit")
    data.setup("test")
    images, labels = data.training_images()
    torch.save({"images": images, "labels": labels}, folder / "train.pt")
    for part, loader in {"val": data.val_dataloader(), "test": data.test_dataloader()}.items():
        batches = list(loader)
        torch.save({"images": torch.cat([batch[0] for batch in batches])}, folder / f"{part}.pt")
    seed_everything(0, verbose=False)
    classifier = ImageClassifier(in_channels=images.shape[1], image_size=32, network_args={"width": 16})
    loader = DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True, drop_last=True)
    trainer = quiet_trainer(max_epochs=study.classifier_epochs)
    trainer.fit(classifier, loader)
    accuracy = trainer.test(classifier, data.test_dataloader(), verbose=False)[0]["test/accuracy"]
    (folder / "classifier.json").write_text(json.dumps({"accuracy": accuracy}))
    trainer.save_checkpoint(folder / "classifier.ckpt")


def quiet_trainer(**options: Any) -> Trainer:
    """A trainer that trains and says nothing."""
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, **silence, **options})


# -- one run ----------------------------------------------------------------------------------------------------------


def run(cell: Cell, study: Study, work: Path) -> dict[str, Any]:
    """Train one GAN and judge it; on one thread."""
    torch.set_num_threads(1)
    begin = time.process_time()
    folder = work / cell.dataset
    train = torch.load(folder / "train.pt", weights_only=True)
    seed_everything(cell.seed, verbose=False)
    control, start = CONTROLS[cell.control]
    gan = SpectralGAN(
        in_channels=train["images"].shape[1],
        generator_width=study.generator_width,
        discriminator_width=cell.width,
        latent_size=study.latent_size,
        control=control,
        spectrum_start=start,
        ema_decay=study.ema_decay,
        generator_optimizer=lambda params: torch.optim.Adam(params, lr=study.lr, betas=(0.5, 0.999), fused=True),
        discriminator_optimizer=lambda params: torch.optim.Adam(params, lr=study.lr, betas=(0.5, 0.999), fused=True),
    )
    gan.to(memory_format=torch.channels_last)  # a tenth to a fifth faster on a CPU, else the same
    loader = DataLoader(
        Batches(train["images"].to(memory_format=torch.channels_last), train["labels"], study.batch_size, cell.seed),
        batch_size=None,
        shuffle=False,
    )
    row: dict[str, Any] = {**asdict(cell), "diverged": False}
    try:
        quiet_trainer(max_steps=study.steps, max_epochs=-1).fit(gan, loader)
    except ArithmeticError:  # NonFiniteLossError: a result, not an accident
        row["diverged"] = True
    row |= judge(gan, cell, study, work)
    row["spectra"] = spectra(gan)
    row["cpu_seconds"] = round(time.process_time() - begin, 1)
    save_image((gan.sample(64, seed=0) + 1) / 2, cell.path(work).with_suffix(".png"), nrow=8)
    return keep(cell.path(work), asdict(study), row)


def extractor(cell: Cell, work: Path) -> FeatureExtractor:
    """The judge: the classifier of the data set."""
    return ClassifierFeatures(checkpoint=work / cell.dataset / "classifier.ckpt")


def judge(gan: SpectralGAN, cell: Cell, study: Study, work: Path) -> dict[str, Any]:
    """Metrics of as many generated images as there are test images, without the counts in their names."""
    test = torch.load(work / cell.dataset / f"{study.judged_on}.pt", weights_only=True)["images"]
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: study.evaluated]
    metrics = GenerationMetrics(extractor(cell, work))
    for part in test[chosen].split(500):
        metrics.update(part, real=True)
    images = gan.sample(len(chosen), seed=1000 + cell.seed)
    if not torch.isfinite(images).all():
        return {}
    for part in images.split(500):
        metrics.update(part, real=False)
    return {name.partition("_classifier")[0]: value for name, value in metrics.compute().items()}


def spectra(gan: SpectralGAN) -> dict[str, list[float]]:
    """Singular values of every layer of the discriminator, at most 33 quantiles of each, falling."""
    found = {}
    for name, layer in matrix_layers(gan.discriminator.eval()).items():
        values = singular_values(weight_matrix(layer))
        places = torch.linspace(0, len(values) - 1, min(len(values), 33)).round().long()
        found[name] = [round(value, 5) for value in values[places].tolist()]
    return found


# -- all runs ---------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds for each data set, width and control; of the two distances with an interval."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["dataset"], row["width"], row["control"]), []).append(row)
    table = []
    for (dataset, width, control), group in sorted(cells.items(), key=lambda item: _order(*item[0])):
        line: dict[str, Any] = {"dataset": dataset, "width": width, "control": control, "runs": len(group)}
        line["diverged"] = sum(row["diverged"] for row in group)
        for metric in ("kid", "fd", "precision", "recall", "density", "coverage"):
            values = [row[metric] for row in group if metric in row]
            line[metric] = statistics.fmean(values) if values else None
            if metric in ("kid", "fd"):
                line[metric], line[f"{metric}_low"], line[f"{metric}_high"] = interval(values)
        table.append(line)
    return table


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Geometric mean and the 95 % interval of Student's t on logarithms: distances spread in proportion to their size.

    Arithmetic where a value is not positive (an unbiased KID of good images can be negative).
    """
    if not values:
        return None, None, None
    positive = min(values) > 0
    logs = [math.log(value) for value in values] if positive else list(values)
    half = T_95[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    mean = statistics.fmean(logs)
    low, middle, high = (math.exp(x) if positive else x for x in (mean - half, mean, mean + half))
    return (middle, low, high) if len(values) > 1 else (middle, None, None)


def _order(dataset: str, width: int, control: str) -> tuple[str, int, int]:
    return dataset, width, list(CONTROLS).index(control)


def plot(table: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KID over width, a panel a data set; below, the spectra at the smallest width but one (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    datasets = sorted({line["dataset"] for line in table})
    figure, axes = plt.subplots(2, len(datasets), figsize=(6.5 * len(datasets), 8), squeeze=False)
    colours = dict(zip(CONTROLS, plt.get_cmap("tab10").colors, strict=False))
    for column, dataset in enumerate(datasets):
        for control in CONTROLS:
            lines = [line for line in table if (line["dataset"], line["control"]) == (dataset, control) and line["kid"]]
            axes[0][column].errorbar(
                [line["width"] for line in lines],
                [line["kid"] for line in lines],
                [
                    [line["kid"] - (line["kid_low"] or line["kid"]) for line in lines],
                    [(line["kid_high"] or line["kid"]) - line["kid"] for line in lines],
                ],
                label=control, marker="o", capsize=3, color=colours[control],
            )  # fmt: skip
            widths = sorted({row["width"] for row in rows if row["dataset"] == dataset})
            shown = widths[-1]
            for row in rows:
                if (row["dataset"], row["control"], row["width"]) == (dataset, control, shown) and row["seed"] == SEEDS[
                    0
                ]:
                    for i, values in enumerate(row["spectra"].values()):
                        places = [k / max(len(values) - 1, 1) for k in range(len(values))]
                        axes[1][column].plot(
                            places, values, color=colours[control], alpha=0.6, label=control if i == 0 else None
                        )
        shift = "KID, geometric mean of the seeds and 95 % interval"
        axes[0][column].set(title=dataset, xscale="log", yscale="log", xlabel="discriminator's width", ylabel=shift)
        axes[0][column].set_xticks(WIDTHS, [str(width) for width in WIDTHS], minor=False)
        axes[0][column].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes[1][column].set(xlabel="place in the spectrum", ylabel=f"singular values at width {shown}", ylim=(0, 3))
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=SEEDS)
    arguments.add_argument("--data", help="folder that holds fashion-mnist/FashionMNIST/raw and cifar10/imagefolder")
    arguments.add_argument("--datasets", nargs="+", choices=list(FOLDERS), default=list(FOLDERS))
    arguments.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    arguments.add_argument("--controls", nargs="+", choices=list(CONTROLS), default=list(CONTROLS))
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--lr", type=float, default=Study.lr)
    arguments.add_argument("--judged-on", choices=["test", "val"], default="test")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    if args.quick:  # the digits that scikit-learn ships
        study = Study(args.steps if args.steps != 1000 else 4, evaluated=100, generator_width=16, classifier_epochs=1)
        datasets, widths, controls, seeds = ["digits"], [8], ["plain", "8 d_optimal"], [1, 2]
        work = output_path(NAME, args.out, True).parent / "spectral_gan_runs"
    else:
        study = Study(args.steps, lr=args.lr, judged_on=args.judged_on)
        datasets, widths, controls, seeds, work = args.datasets, args.widths, args.controls, args.seeds, args.work
    path = output_path(NAME, args.out, args.quick)
    work.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        prepare(dataset, None if dataset == "digits" else data_folder(args.data, FOLDERS[dataset]), study, work)
    # Seed by seed, so that a study cut short still compares all controls.
    grid = [Cell(*cell) for cell in ((d, w, c, s) for s in seeds for w in widths for d in datasets for c in controls)]
    done, todo = split(grid, lambda cell: (cell.path(work), asdict(study)))
    rows = [row for _, row in done]
    for _, row, left in run_all(partial(run, study=study, work=work), todo, 1 if args.quick else args.jobs):
        rows.append(row)
        print(f"{describe(row)}  {left}", flush=True)
        save(path, study, work, rows)
    save(path, study, work, rows)
    plot(summarize(rows), rows, path.with_suffix(".png"))


def save(path: Path, study: Study, work: Path, rows: list[dict[str, Any]]) -> None:
    """Write the result file with all that is known so far."""
    rows = sorted(rows, key=lambda row: (*_order(row["dataset"], row["width"], row["control"]), row["seed"]))
    judges = {
        dataset: json.loads((work / dataset / "classifier.json").read_text())["accuracy"]
        for dataset in sorted({row["dataset"] for row in rows})
    }
    settings = {**asdict(study), "network": "CNN", "loss": "non_saturating", "optimizer": "Adam, betas 0.5 and 0.999"}
    settings["test_accuracy_of_the_judging_classifier"] = judges
    machine = {**environment(packages=("torchvision", "torchmetrics")), "threads": 1}
    write_result(path, NAME, settings, rows, table=summarize(rows), environment=machine)


def describe(row: dict[str, Any]) -> str:
    """One line of the console."""
    scores = f"kid {row['kid']:.4f} fd {row['fd']:.2f}" if "kid" in row else "no finite images"
    return f"{row['dataset']} width {row['width']} {row['control']} seed {row['seed']}: {scores} {row['cpu_seconds']} s"


if __name__ == "__main__":
    main()
