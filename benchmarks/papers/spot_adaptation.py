"""USPS to MNIST and back without target labels: what carries the labels, the plan, the frame, or the classifier itself?

Both ways of adaptation of ``SPOTAdaptation`` beside the source alone, exact transport of features (POT's
``EMDTransport``, or scipy's assignment where POT is not installed) and the classifier's own sure answers without any
plan. In two frames: that of arXiv:1905.00158, where USPS fills its box and MNIST does not, and one frame for both (a
margin of a seventh around USPS). The last weights (their moving average) count; labels of the target are read by the
test alone. The best of ten looks at the test is kept beside it under its own name, as that is what the paper's table
has (97.47 MNIST to USPS, 96.44 USPS to MNIST).

    python benchmarks/papers/spot_adaptation.py --data FOLDER [--seeds 0 1 2] [--methods ...] [--jobs 2]

FOLDER holds mnist/MNIST/raw and usps/usps.bz2. Each run leaves a file below ``--work``, so that an interrupted study
goes on; the result is written after every run, of the runs that its command names. Images are of 16 pixels, USPS' own
size (``--image-size 28`` for the paper's, at four times the cost); the joint method's generator has 128 channels of the
authors' 1,024, and 8,000 rounds of 40,000. A run of "two-stage" takes about 4 minutes of a core, the source alone half
a minute, "joint" about 6.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from single_runs import keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

from lightning_rectify._lightning import Trainer, seed_everything
from lightning_rectify.data.domains import DomainPairs
from lightning_rectify.modules.spot.adaptation import SPOTAdaptation

NAME = "spot_adaptation"
NEVER = 10**9
EXACT = "exact plan of features"
_JOINT = {"method": "joint", "generator_width": 128}
#: method -> arguments of ``SPOTAdaptation``
METHODS: dict[str, dict[str, Any]] = {
    "source alone": {"source_steps": NEVER, "augment": 0.0},
    "source alone, varied": {"source_steps": NEVER},
    EXACT: {"source_steps": NEVER},
    "own sure answers, no plan": {"plan_steps": 1, "carried_weight": 0.0},
    "two-stage, pixels": {"semantic_weight": 0.0, "pseudo_weight": 0.0},
    "two-stage, labels in the cost": {"pseudo_weight": 0.0},
    "two-stage, one after the other": {"alternate": False},
    "two-stage": {},
    "joint, as released": _JOINT,
    "joint, Wasserstein": {**_JOINT, "adversarial": "wasserstein", "penalty_weight": 10.0},
}
BARS = {"usps to mnist": 0.93, "mnist to usps": 0.90}
PAPER = {"usps to mnist": 0.9644, "mnist to usps": 0.9747}


@dataclass(frozen=True)
class Study:
    """What all runs of a study share."""

    image_size: int = 16
    rounds: int = 4000
    joint_rounds: int = 8000
    source_rounds: int = 400
    batch_size: int = 32
    train_images: int | None = None
    looks: int = 10
    exact_points: int = 2000
    embedded: bool = False


@dataclass(frozen=True)
class Cell:
    """One run."""

    direction: str
    frame: str
    method: str
    seed: int

    def path(self, work: Path) -> Path:
        words = "_".join((self.direction, self.frame, self.method))
        return work / f"{''.join(c if c.isalnum() else '_' for c in words)}_s{self.seed}.json"


def make_data(cell: Cell, study: Study, folder: str) -> DomainPairs:
    """The data of a cell; the frame's margin is a seventh of the side, as MNIST's is."""
    options: dict[str, Any] = {"image_size": study.image_size, "batch_size": study.batch_size, "eval_batch_size": 500}
    options |= {"train_size": study.train_images, "watch_test": True, "seed": cell.seed}
    if study.embedded:
        return DomainPairs(**options)
    source, target = cell.direction.split(" to ")
    margin = round(study.image_size / 7) if cell.frame == "one" else 0
    margins = {f"{side}_margin": margin for side, name in (("source", source), ("target", target)) if name == "usps"}
    roots = {"source_root": f"{folder}/{source}", "target_root": f"{folder}/{target}"}
    return DomainPairs(source, target, **roots, **margins, **options)


def make_module(cell: Cell, study: Study) -> SPOTAdaptation:
    """The module of a method."""
    options = dict(METHODS[cell.method])
    if options.get("method") != "joint":
        options = {"source_steps": study.source_rounds, **options}
        # A plan that never comes still wants a number.
        options.setdefault("plan_steps", max(3 * study.rounds // 4 - study.source_rounds, 1))
    return SPOTAdaptation(image_size=study.image_size, **options)


def run(cell: Cell, study: Study, folder: str, work: Path) -> dict[str, Any]:
    """Train and judge one cell, on one thread."""
    torch.set_num_threads(1)
    quiet()
    clock, cpu = time.perf_counter(), time.process_time()
    seed_everything(cell.seed, verbose=False)
    module, data = make_module(cell, study), make_data(cell, study, folder)
    rounds = study.joint_rounds if module.method == "joint" else study.rounds
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=rounds, max_epochs=-1, num_sanity_val_steps=0,
        val_check_interval=max(rounds // study.looks, 1), check_val_every_n_epoch=None, **silence,
    )  # fmt: skip
    trainer.fit(module, data)
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    target, source = trainer.test(module, data, verbose=False)
    row = {
        **asdict(cell),
        "accuracy": target["test/accuracy"],
        "source_accuracy": source["test/source_accuracy"],
        "accuracy_best_of_test": seen["watch/test_accuracy_best_of_test"],
        **{name.removeprefix("val/"): value for name, value in seen.items() if name.startswith("val/")},
    }
    if cell.method == EXACT:
        row |= exact_features(module, data, study)
        row["accuracy_best_of_test"] = None
    row |= {"seconds": round(time.perf_counter() - clock, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    work.mkdir(parents=True, exist_ok=True)
    return keep(cell.path(work), asdict(study), row)


def quiet() -> None:
    """Leave out what Lightning says of hardware and loaders."""
    warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)\..*")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)


def exact_features(module: SPOTAdaptation, data: DomainPairs, study: Study) -> dict[str, Any]:
    """A linear classifier on the source's features, carried by the exact plan between a few thousand of each side."""
    network: Any = module.averaged("classifier").eval()
    part = data._parts["train"]
    count = min(study.exact_points, len(part.x), len(part.y))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return torch.cat([network.features(some.float() / 255.0) for some in images.split(500)])

    x, y, labels = features(part.x[:count]), features(part.y[:count]), part.labels[:count]
    try:
        import ot

        plan = ot.da.EMDTransport(max_iter=10_000_000).fit(Xs=x.double().numpy(), Xt=y.double().numpy())
        carried = torch.from_numpy(plan.transform(Xs=x.double().numpy())).float()
        solver = "POT EMDTransport"
    except ImportError:
        rows, columns = linear_sum_assignment((torch.cdist(x.double(), y.double()) ** 2).numpy())
        carried, solver = torch.empty_like(x), "scipy assignment"
        carried[rows] = y[columns]
    head = nn.Linear(x.shape[1], module.num_classes)
    head.load_state_dict(network.head.state_dict())
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(carried), labels).backward()
        optimizer.step()
    test = data._parts["test_target"]
    right = head(features(test.images)).argmax(dim=1) == test.labels
    return {"accuracy": right.float().mean().item(), "solver": solver}


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a direction, frame and method: each seed's accuracy, their mean, and the best-of-test mean by its name."""
    table = []
    for key in dict.fromkeys((row["direction"], row["frame"], row["method"]) for row in rows):
        group = sorted(
            (row for row in rows if (row["direction"], row["frame"], row["method"]) == key), key=lambda row: row["seed"]
        )
        line: dict[str, Any] = {"direction": key[0], "frame": key[1], "method": key[2], "runs": len(group)}
        line["accuracies"] = [round(row["accuracy"], 4) for row in group]
        line["worst"] = min(line["accuracies"])
        for name in ("accuracy", "accuracy_best_of_test", "source_accuracy", "unsupervised_score", "target_entropy",
                     "target_diversity", "seconds", "cpu_seconds"):  # fmt: skip
            values = [row[name] for row in group if row.get(name) is not None]
            line[name] = statistics.fmean(values) if values else None
        line["meets_bar"] = line["accuracy"] >= BARS[key[0]] if key[0] in BARS else None
        table.append(line)
    return table


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[0, 1, 2])
    arguments.add_argument("--data", help="folder that holds mnist/MNIST/raw and usps/usps.bz2")
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments.add_argument("--directions", nargs="+", choices=list(BARS), default=list(BARS))
    arguments.add_argument("--frames", nargs="+", choices=["paper", "one"], default=["paper", "one"])
    arguments.add_argument("--image-size", type=int, default=Study.image_size)
    arguments.add_argument("--rounds", type=int, default=Study.rounds)
    arguments.add_argument("--joint-rounds", type=int, default=Study.joint_rounds)
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path = output_path(NAME, args.out, args.quick)
    if args.quick:  # the digits that scikit-learn ships
        study = Study(
            rounds=8, joint_rounds=2, source_rounds=2, train_images=64, looks=2, exact_points=30, embedded=True
        )
        cells = [Cell("digits to digits_turned", "paper", method, 0) for method in args.methods]
        folder, work, jobs = "", path.parent / "spot_adaptation_runs", 1
    else:
        study = Study(image_size=args.image_size, rounds=args.rounds, joint_rounds=args.joint_rounds)
        cells = [  # seed by seed, so that a study cut short still compares all methods
            Cell(direction, frame, method, seed)
            for seed in args.seeds
            for frame in args.frames
            for direction in args.directions
            for method in args.methods
        ]
        folder, work, jobs = str(Path(data_folder(args.data, ("mnist",))).parent), args.work, args.jobs
    done, todo = split(cells, lambda cell: (cell.path(work), asdict(study)))
    rows = [row for _, row in done]
    for _, row, left in run_all(partial(run, study=study, folder=folder, work=work), todo, jobs):
        rows.append(row)
        words = f"{row['direction']}, {row['frame']} frame, {row['method']}, seed {row['seed']}"
        print(f"{words}: {100 * row['accuracy']:.2f} %, {row['seconds']:.0f} s, {left}", flush=True)
        save(path, study, rows)
    save(path, study, rows)


def save(path: Path, study: Study, rows: list[dict[str, Any]]) -> None:
    """Write the result file with all that is known so far."""
    methods = list(METHODS)
    rows = sorted(rows, key=lambda r: (r["direction"], r["frame"], methods.index(r["method"]), r["seed"]))
    settings = {**asdict(study), "bars": BARS, "paper_best_of_test": PAPER}
    machine = {**environment(packages=("torchvision", "POT")), "threads": 1}
    write_result(path, NAME, settings, rows, table=summarize(rows), environment=machine)


if __name__ == "__main__":
    main()
