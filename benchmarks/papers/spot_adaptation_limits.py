"""What limits the labels that a plan carries from MNIST to USPS (and back)? One thing of the data changed at a time.

The two-stage method of ``spot_adaptation.py`` with its settings, on data that differs in what could be the reason:

- as they are: the paper's frame; USPS' digits fill their box, MNIST's leave a seventh of the side free on each side.
- one frame: a margin around USPS, so that a digit has one size in both.
- one share of classes: of each class as many of MNIST's images as USPS has. A balanced plan must give every target
  image a source image's mass: with other shares of classes some of it goes to another digit, at least the total
  variation between the two (its row has it, as the ceiling of a plan; the classifier it teaches may do better).
- both.

Each row has the accuracy on the target's test images, the recall of each digit, and the commonest confusions.
"One share" reads the target's labels: it is a question put to the data, not a method.

    python benchmarks/papers/spot_adaptation_limits.py --data FOLDER [--seeds 0 1] [--jobs 2]

About 4 minutes of a core a run; what has been run is not run again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from single_runs import keep, run_all, split, study_parser
from spot_adaptation import BARS, Cell, Study, make_data, make_module, quiet
from timing import data_folder, environment, output_path, write_result

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.domain_sources import read_domain
from lightning_rectify.data.domains import DomainPairs

NAME = "spot_adaptation_limits"
CHANGES = {
    "as they are": ("paper", False), "one frame": ("one", False), "one share of classes": ("paper", True),
    "both": ("one", True),
}  # fmt: skip
CLASSES = 10


@dataclass(frozen=True)
class Run:
    """One row: a direction, what is changed, and a seed."""

    direction: str
    change: str
    seed: int

    @property
    def file(self) -> str:
        words = f"{self.direction}_{self.change}"
        return f"{''.join(c if c.isalnum() else '_' for c in words)}_s{self.seed}.json"


def shares(labels: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=CLASSES) / len(labels)


def with_shares(images: Tensor, labels: Tensor, wanted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """As many images as the scarcest class allows, of each class its share."""
    counts = torch.bincount(labels, minlength=CLASSES)
    each = ((counts / wanted).min() * wanted).floor().long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == k][: int(each[k])] for k in range(CLASSES)])
    return images[chosen], labels[chosen]


def data_of(run: Run, study: Study, folder: str) -> tuple[DomainPairs, float]:
    """The data, and the total variation between the classes of its two sides."""
    frame, alike = CHANGES[run.change]
    cell = Cell(run.direction, frame, "two-stage", run.seed)
    data = make_data(cell, study, folder)
    if study.embedded:
        return data, 0.0
    source, target = run.direction.split(" to ")
    margin = round(study.image_size / 7) if frame == "one" else 0
    sides = {
        name: read_domain(name, f"{folder}/{name}", False, study.image_size, margin if name == "usps" else 0)
        for name in (source, target)
    }
    wanted = shares(sides["usps"][1])
    if alike:
        sides["mnist"] = with_shares(*sides["mnist"], wanted, run.seed)
        data = replace_side(data, source, target, sides["mnist"], study, run.seed)
    gap = 0.5 * (shares(sides[source][1]) - shares(sides[target][1])).abs().sum().item()
    return data, gap


def replace_side(
    data: DomainPairs, source: str, target: str, mnist: tuple[Tensor, Tensor], study: Study, seed: int
) -> DomainPairs:
    """The same pair with other MNIST images to train on."""
    options: dict[str, Any] = {"image_size": study.image_size, "batch_size": study.batch_size, "eval_batch_size": 500}
    options |= {"train_size": study.train_images, "seed": seed, "source_margin": data.margins["source"]}
    options |= {"target_margin": data.margins["target"]}
    if source == "mnist":
        return DomainPairs(mnist, target, target_root=data.roots["target"], **options)
    return DomainPairs(source, mnist, source_root=data.roots["source"], **options)


def run_one(run: Run, study: Study, folder: str, work: Path) -> dict[str, Any]:
    """Train and judge, on one thread."""
    torch.set_num_threads(1)
    quiet()
    seed_everything(run.seed, verbose=False)
    module = make_module(Cell(run.direction, CHANGES[run.change][0], "two-stage", run.seed), study)
    data, gap = data_of(run, study, folder)
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(
        accelerator="cpu", devices=1, max_steps=study.rounds, max_epochs=-1, num_sanity_val_steps=0,
        limit_val_batches=0, **silence,
    ).fit(module, data)  # fmt: skip
    confusion = confusions(module, *test_of(run, data, study, folder))
    right = confusion.diagonal()
    wrong = confusion.clone().fill_diagonal_(0)
    worst = wrong.flatten().topk(5).indices.tolist()
    row = {
        **asdict(run),
        "accuracy": (right.sum() / confusion.sum()).item(),
        "recall": [round(value, 4) for value in (right / confusion.sum(dim=1).clamp(min=1)).tolist()],
        "common": [[i // CLASSES, i % CLASSES, int(wrong.flatten()[i])] for i in worst],
        "class_gap": gap,
        "test_images": int(confusion.sum()),
    }
    return keep(work / run.file, asdict(study), row)


def test_of(run: Run, data: DomainPairs, study: Study, folder: str) -> tuple[Tensor, Tensor]:
    """The target's own test part, whatever was trained on."""
    if study.embedded:
        test = data._parts["test_target"]
        return test.images, test.labels
    target = run.direction.split(" to ")[1]
    return read_domain(target, f"{folder}/{target}", True, study.image_size, data.margins["target"])


@torch.no_grad()
def confusions(module: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Counts, shape (10, 10): row the true digit, column the answer of the last weights."""
    network = module.averaged("classifier").eval()
    answers = torch.cat([network(some.float() / 255.0).argmax(dim=1) for some in images.split(500)])
    return torch.bincount(labels * CLASSES + answers, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a direction and change: means over the seeds."""
    table = []
    for direction, change in dict.fromkeys((row["direction"], row["change"]) for row in rows):
        group = [row for row in rows if (row["direction"], row["change"]) == (direction, change)]
        recalls = torch.tensor([row["recall"] for row in group]).mean(dim=0)
        table.append(
            {
                "direction": direction,
                "change": change,
                "runs": len(group),
                "accuracies": [round(row["accuracy"], 4) for row in group],
                "accuracy": sum(row["accuracy"] for row in group) / len(group),
                "recall": [round(value, 3) for value in recalls.tolist()],
                "class_gap": max(row["class_gap"] for row in group),
            }
        )
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[0, 1])
    arguments.add_argument("--data", help="folder that holds mnist/MNIST/raw and usps/usps.bz2")
    arguments.add_argument("--directions", nargs="+", choices=list(BARS), default=list(BARS))
    arguments.add_argument("--changes", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    study, work, jobs, seeds = Study(), args.work, args.jobs, args.seeds
    directions, changes = args.directions, args.changes
    if args.quick:
        study = replace(study, rounds=8, source_rounds=2, embedded=True)
        work, jobs, seeds = path.parent / f"{NAME}_runs", 0, [0]
        directions, changes = ["mnist to usps"], ["as they are"]
    work.mkdir(parents=True, exist_ok=True)
    folder = "" if study.embedded else str(Path(data_folder(args.data, ("mnist",))).parent)
    every = [Run(direction, change, seed) for seed in seeds for change in changes for direction in directions]
    done, todo = split(every, lambda run: (work / run.file, asdict(study)))
    rows = [row for _, row in done]
    settings = {"seeds": seeds, **asdict(study)}
    found = {**environment(), "threads": 1}
    if not todo:
        write_result(path, NAME, settings, rows, environment=found, table=summarize(rows))
    for run, row, left in run_all(partial(run_one, study=study, folder=folder, work=work), todo, jobs):
        rows.append(row)
        print(f"{run.direction}, {run.change}, seed {run.seed}: {100 * row['accuracy']:.2f} %, {left}", flush=True)
        write_result(path, NAME, settings, rows, environment=found, table=summarize(rows))


if __name__ == "__main__":
    main()
