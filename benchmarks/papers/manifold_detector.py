"""Is the gate alone (arXiv:1908.01842's chart determination) a detector of images that are not what it was made from?

Charts are made of digits, without labels; test digits and as many other images of the same size are told apart by one
number an image. MNIST against Fashion-MNIST at 28x28; scikit-learn's digits against Fashion-MNIST brought to 8x8, and
against 8x8 pieces of scikit-learn's two photographs.

- gate: squared distance to the nearest centre, which is what the gate is a function of; ``coverage`` is the same number
  cut off. The share of images that the gate holds (coverage above 0) says what its own threshold does;
- plane: distance from the tangent plane of the nearest chart;
- k-NN: distance to the k-th nearest training image; the same among as many random training images as there are charts;
- PCA: distance from the one plane that holds 95 % of the training images' variance.

Nothing is chosen by images that are no digits: all numbers of charts and neighbours are shown. AUROC, and the share of
the others let in where 95 % of the digits are.

    python benchmarks/papers/manifold_detector.py --data FOLDER [--seeds 1 2 3]

Writes the result after every seed. A minute a seed on an idle core.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timing import data_folder, environment, output_path, parser, write_result

from lightning_rectify.data.image_sources import SOURCES, in_memory
from lightning_rectify.modules.manifold import noisy_charts, plane_distances

NAME = "manifold_detector"
TRAIN = 5000  # at most, and four fifths of what is there: another draw each seed
DIM = 16


def pictures(name: str, root: str | None, test: bool, side: int) -> Tensor:
    """Images (N, side * side) in [0, 1]."""
    images = in_memory(SOURCES[name], root, test)[0].float() / SOURCES[name].scale
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[2] != side:
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return images.flatten(1)


def patches(count: int, side: int, seed: int) -> Tensor:
    """Random pieces of scikit-learn's two photographs in grey, (N, side * side) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    generator, found = torch.Generator().manual_seed(seed), []
    for photo in load_sample_images().images:
        grey = torch.tensor(photo, dtype=torch.float32).mean(2) / 255.0
        windows = grey.unfold(0, side, side).unfold(1, side, side).reshape(-1, side * side)
        found.append(windows[torch.randperm(len(windows), generator=generator)[: (count + 1) // 2]])
    return torch.cat(found)[:count]


def pairs(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor, tuple[int, ...]]]:
    """Name, training digits, test digits, as many other images, numbers of charts."""
    train, test = pictures("digits", None, False, 8), pictures("digits", None, True, 8)
    counts = (32, 128)
    yield "digits, photographs, 8x8", train, test, patches(len(test), 8, seed), counts
    if args.quick:
        return
    fashion = data_folder(args.data, ("fashion-mnist", "."))
    yield "digits, Fashion-MNIST, 8x8", train, test, pictures("fashion_mnist", fashion, True, 8)[: len(test)], counts
    mnist = data_folder(args.data, ("mnist", "."))
    test, other = pictures("mnist", mnist, True, 28), pictures("fashion_mnist", fashion, True, 28)
    yield "MNIST, Fashion-MNIST, 28x28", pictures("mnist", mnist, False, 28), test, other, (*counts, 512)


def nearest(x: Tensor, train: Tensor, k: int) -> Tensor:
    """Distances (N, k), ascending."""
    return torch.cat([torch.cdist(part, train).topk(k, largest=False).values for part in x.split(1000)])


def scores(train: Tensor, x: Tensor, counts: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """A detector's name, its numbers at x (higher: less of a digit), what it stores, and the gate's own answer."""
    dim = train.shape[1]
    for count in counts:
        clock = time.process_time()
        charts = noisy_charts(train, DIM, count)
        seconds = time.process_time() - clock
        shared = {"charts": len(charts), "fit_seconds": seconds}
        gate = charts.squared_distances(x).amin(1)
        held = gate < charts.radius**2
        yield {"detector": "gate", "score": gate, "held": held, "stored": len(charts) * dim, **shared}
        plane = plane_distances(charts, x)
        yield {"detector": "plane", "score": plane, "stored": len(charts) * dim * (DIM + 1), **shared}
        some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]]
        near = nearest(x, some, 1)[:, 0]
        yield {"detector": "1-NN, as many images", "score": near, "charts": count, "stored": count * dim}
    near = nearest(x, train, 10)
    for k in (1, 5, 10):
        yield {"detector": f"{k}-NN", "score": near[:, k - 1], "stored": train.numel()}
    mean = train.mean(0)
    _, values, turn = torch.linalg.svd(train - mean, full_matrices=False)
    rank = int((values.square().cumsum(0) / values.square().sum() < 0.95).sum()) + 1
    off = (x - mean) - (x - mean) @ turn[:rank].t() @ turn[:rank]
    yield {"detector": f"PCA, {rank} directions", "score": off.norm(dim=1), "stored": dim * (rank + 1)}


def measure(
    name: str, data: tuple[Tensor, Tensor, Tensor], counts: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """The lines of one pair and seed, which draws the training images."""
    from sklearn.metrics import roc_auc_score

    train, test, other = data
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    train = train[: min(TRAIN, len(train) * 4 // 5)]
    label = torch.cat([torch.zeros(len(test)), torch.ones(len(other))])
    for found in scores(train, torch.cat([test, other]), counts, seed):
        score = found.pop("score").double()
        limit = score[: len(test)].quantile(0.95)
        row = {"pair": name, "seed": seed, "train": len(train), "test": len(test), **found}
        if "held" in row:
            held = row.pop("held")
            row |= {"held_digits": held[: len(test)].double().mean().item()}
            row |= {"held_others": held[len(test) :].double().mean().item()}
        row["auroc"] = float(roc_auc_score(label, score))
        yield row | {"let_in_at_95": (score[len(test) :] <= limit).double().mean().item()}


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a pair and detector: means over the seeds, and the range of the AUROC."""
    table = []
    for key in dict.fromkeys((row["pair"], row["detector"], row.get("charts")) for row in rows):
        group = [row for row in rows if (row["pair"], row["detector"], row.get("charts")) == key]
        line = {"pair": key[0], "detector": key[1], "charts": key[2], "runs": len(group), "stored": group[0]["stored"]}
        for name in ("auroc", "let_in_at_95", "held_digits", "held_others", "fit_seconds"):
            if name in group[0]:
                line[name] = statistics.fmean(row[name] for row in group)
        line["auroc_range"] = [min(row["auroc"] for row in group), max(row["auroc"] for row in group)]
        table.append(line)
    return table


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--data", help="folder with mnist and fashion-mnist")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = arguments.parse_args()
    torch.set_num_threads(1)
    path = output_path(NAME, args.out, args.quick)
    rows: list[dict[str, Any]] = []
    settings = {"seeds": args.seeds, "dim": DIM, "train": TRAIN}
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name, train, test, other, counts in pairs(args, seed):
            for row in measure(name, (train, test, other), counts, seed):
                rows.append(row)
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        found = environment(packages=("scikit-learn",))
        write_result(path, NAME, settings, rows, table=summarize(rows), environment=found)


if __name__ == "__main__":
    main()
