"""Past the paper: which attacker reaches PGD-10's worst-case accuracy at no more than half its time?

The setting of ``l2l.py``: its network, its 8,000 training images of Fashion-MNIST, ten epochs, epsilon 0.1 and 0.2, the
last epoch. Three stages. All candidates of ``l2l_candidates.py`` are trained once at epsilon 0.2, where PGD-10 leads
most, and judged on 2,000 other images of the training part. The best of the learned and of the hand-made ones that
take at most half of PGD-10's time go on to both epsilons and both seeds, judged on the same images; so do PGD-10 and
the 2-step attacker. Only then is the test part looked at, for the best of each kind: a candidate is as good as PGD-10
if the mean of its worst-case accuracy over the seeds is at most one standard error below.

Time is that of the process inside training epochs, over the time of PGD-10's steps on the same network and batches,
some of which run after each epoch: what the machine does besides cancels.

    python benchmarks/papers/l2l_search.py --data FOLDER [--jobs 2]

Each run leaves a file and its networks below ``--work``, so that an interrupted search goes on; the result is written
after every run.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from l2l import FOLDERS, Study
from l2l_candidates import CANDIDATES, PGD, TWO_STEP
from l2l_search_runs import Cell, Search, on_test, prepare, run
from single_runs import Row, keep, run_all, split, study_parser
from timing import data_folder, environment, output_path, write_result

NAME = "l2l_search"
HALF = 0.5
SCREEN, BOTH = 0.2, (0.2, 0.1)


# -- the three stages --------------------------------------------------------------------------------------------------


class Finished:
    """Results by file: what is there is read, what is not is made, ``jobs`` runs at a time (0: in this process)."""

    def __init__(self, search: Search, work: Path, path: Path, jobs: int) -> None:
        self.search, self.work, self.path, self.jobs = search, work, path, jobs
        self.rows: dict[Cell, Row] = {}
        self.test: dict[Cell, Row] = {}

    def get(self, cells: Sequence[Cell], test: bool = False) -> list[Row]:
        """The rows of runs on validation or test images, in this order."""
        rows, known = self.test if test else self.rows, self.search.plain(test)
        done, todo = split(cells, lambda cell: (place(cell, self.work, test), known))
        rows |= dict(done)
        for cell, row, left in run_all(partial(make, search=self.search, work=self.work, test=test), todo, self.jobs):
            rows[cell] = row
            print(f"{describe(row)}  {left}", flush=True)
            save(self)
        save(self)
        return [rows[cell] for cell in cells]


def place(cell: Cell, work: Path, test: bool) -> Path:
    """A run's file."""
    path = cell.path(work)
    return path.with_stem(f"{path.stem}_test") if test else path


def make(cell: Cell, search: Search, work: Path, test: bool) -> Row:
    """Run a candidate, or judge a finished one on test images, and keep what was found."""
    return keep(place(cell, work, test), search.plain(test), (on_test if test else run)(cell, search, work))


def best(rows: Sequence[dict[str, Any]], learned: bool, count: int) -> list[str]:
    """The candidates of a kind that take at most half of PGD-10's time, by mean worst case on validation images."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["learned"] == learned and row["name"] != PGD:
            groups.setdefault(row["name"], []).append(row)
    quick = {name: group for name, group in groups.items() if _mean(group, "ratio_to_pgd") <= HALF}
    return sorted(quick, key=lambda name: -_mean(quick[name], "worst"))[:count]


def go(finished: Finished, names: Sequence[str], seeds: Sequence[int], stages: int) -> None:
    """Run the stages."""
    screened = finished.get([Cell(name, SCREEN, seeds[0]) for name in names])
    if stages < 2:
        return
    chosen = [best(screened, learned, finished.search.keep) for learned in (True, False)]
    entrants = list(dict.fromkeys([PGD, TWO_STEP, *chosen[0], *chosen[1]]))
    rows = finished.get([Cell(name, epsilon, seed) for seed in seeds for epsilon in BOTH for name in entrants])
    if stages < 3:
        return
    winners = [best(rows, learned, 1) for learned in (True, False)]
    finalists = [PGD, *winners[0], *winners[1]]
    cells = [Cell(name, epsilon, seed) for epsilon in BOTH for seed in seeds for name in finalists]
    finished.get(cells, test=True)


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Mean over seeds for each candidate and epsilon; best worst case first."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["epsilon"], row["name"]), []).append(row)
    table = []
    for (epsilon, name), group in groups.items():
        line: dict[str, Any] = {"epsilon": epsilon, "name": name, "runs": len(group)}
        line |= {key: _mean(group, key) for key in ("clean", "pgd_20", "worst", "worst_standard_error")}
        line["worst_seeds"] = [row["worst"] for row in group]
        if "ratio_to_pgd" in group[0]:
            line |= {"ratio_to_pgd": _mean(group, "ratio_to_pgd"), "learned": group[0]["learned"]}
        line["failed_checks"] = sorted({check for row in group for check in row["failed_checks"]})
        table.append(line)
    return sorted(table, key=lambda line: (line["epsilon"], -line["worst"]))


def verdict(test: Sequence[dict[str, Any]], validated: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each candidate on the test part: how far below PGD-10, in standard errors, at what share of its time."""
    times = {(line["epsilon"], line["name"]): line["ratio_to_pgd"] for line in validated}
    lines = {(line["epsilon"], line["name"]): line for line in test}
    found = []
    for (epsilon, name), line in lines.items():
        rival = lines.get((epsilon, PGD))
        if rival is None or name == PGD:
            continue
        gap, error = rival["worst"] - line["worst"], rival["worst_standard_error"]
        ratio = times[epsilon, name]
        found.append(
            {
                "epsilon": epsilon, "name": name, "behind_pgd": gap, "standard_errors": gap / max(error, 1e-9),
                "ratio_to_pgd": ratio, "found": bool(gap <= error and ratio <= HALF),
            }
        )  # fmt: skip
    return found


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def save(finished: Finished) -> None:
    """Write the result file with all that is known so far."""
    search = finished.search
    settings = {
        **search.plain(test=True), "keep": search.keep, "half": HALF, "candidates": len(CANDIDATES),
        "chosen_on": f"{search.val_images} images of the training part", "error": "of one network's test accuracy",
    }  # fmt: skip
    rows, tested = list(finished.rows.values()), list(finished.test.values())
    table, test = summarize(rows), summarize(tested)
    machine = {**environment(packages=("torchvision",)), "threads": 1}
    write_result(
        finished.path, NAME, settings, rows, table=table, test_rows=tested, test_table=test,
        verdict=verdict(test, table), environment=machine,
    )  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    """One line of the console."""
    part = f"{row['ratio_to_pgd']:.2f} of PGD-10's time" if "ratio_to_pgd" in row else "test"
    failed = f"  failed: {', '.join(row['failed_checks'])}" if row["failed_checks"] else ""
    return (
        f"{row['name']} epsilon {row['epsilon']:g} seed {row['seed']}: clean {100 * row['clean']:.1f} PGD-20 "
        f"{100 * row['pgd_20']:.1f} worst {100 * row['worst']:.1f} %, {part}{failed}"
    )


def parse() -> argparse.Namespace:
    arguments = study_parser(__doc__, NAME, seeds=[0, 1])
    arguments.add_argument("--data", help="folder that holds fashion-mnist/FashionMNIST/raw")
    arguments.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    arguments.add_argument("--epochs", type=int, default=Study.epochs)
    arguments.add_argument("--val-images", type=int, default=Search.val_images)
    arguments.add_argument("--test-images", type=int, default=Search.test_images, help="of 10,000")
    arguments.add_argument("--keep", type=int, default=Search.keep, help="of each kind, for the second stage")
    arguments.add_argument("--stages", type=int, choices=(1, 2, 3), default=3, help="stop after the first or second")
    return arguments.parse_args()


def main() -> None:
    args = parse()
    path, work, names, seeds = output_path(NAME, args.out, args.quick), args.work, args.candidates, args.seeds
    study = Study(epochs=args.epochs)
    search = Search(study, args.val_images, args.test_images, args.keep)
    if args.quick:  # the digits that scikit-learn ships
        study = Study("digits", 192, 32, epochs=2, batch_size=64, steps=(1, 20), restarts=(1, 2), apgd_steps=4)
        search = Search(study, 32, 32, keep=1, references=1, restarts=(1,), queries=5)
        work, seeds = path.parent / f"{NAME}_runs", [0]
        names = [PGD, TWO_STEP, "sign 1", "sign .5, memory", "linear, 2-step"]
        args.jobs = 0
    root = None if args.quick else data_folder(args.data, FOLDERS)
    prepare(search, root, work)
    finished = Finished(search, work, path, args.jobs)
    go(finished, names, seeds, args.stages)
    for line in verdict(summarize(finished.test.values()), summarize(finished.rows.values())):
        print(f"{line['name']}, epsilon {line['epsilon']:g}: {100 * line['behind_pgd']:.1f} points behind PGD-10, "
              f"{line['ratio_to_pgd']:.2f} of its time: {'found' if line['found'] else 'not found'}")  # fmt: skip


if __name__ == "__main__":
    main()
