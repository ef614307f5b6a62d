"""Many runs of one study: each leaves a file, and what has left one is not run again."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from timing import ROOT, parser

Row = dict[str, Any]
Cell = TypeVar("Cell")


def study_parser(
    description: str | None, name: str, seeds: Sequence[int] | None = None, jobs: int | None = 2
) -> argparse.ArgumentParser:
    """The arguments of every benchmark, and those of many runs: ``--seeds``, ``--jobs`` and ``--work``.

    Args:
        description: of the study.
        name: its result's.
        seeds: the default; None for a study that has none.
        jobs: the default; None for a study that runs one after another.
    """
    built = parser(description, name)
    if seeds is not None:
        built.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    if jobs is not None:
        built.add_argument("--jobs", type=int, default=jobs, help="processes, one thread each")
    built.add_argument("--work", type=Path, default=ROOT / "runs" / name, help="folder of the single runs")
    return built


def keep(path: Path, known: Mapping[str, Any], row: Row) -> Row:
    """Write a finished run, with what it hangs on; whole or not at all.

    Args:
        path: its file.
        known: settings that must be equal for the row to be taken up again, as JSON has them.
        row: what the run found.
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"known": known, "row": row}))
    part.replace(path)
    return row


def kept(path: Path, known: Mapping[str, Any]) -> Row | None:
    """The row that an earlier call kept with the same settings, if there is one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["row"] if found.get("known") == known else None


def split(
    cells: Iterable[Cell], look: Callable[[Cell], tuple[Path, Mapping[str, Any]]]
) -> tuple[list[tuple[Cell, Row]], list[Cell]]:
    """The cells that an earlier call has run with the same settings, with their rows; and those that are left.

    Prints how many these are.

    Args:
        cells: descriptions of single runs.
        look: from a cell to its file and its settings.
    """
    done, todo = [], []
    for cell in cells:
        row = kept(*look(cell))
        if row is None:
            todo.append(cell)
        else:
            done.append((cell, row))
    print(f"{len(todo)} of {len(done) + len(todo)} runs to do", flush=True)
    return done, todo


def run_all(
    job: Callable[[Cell], Row], todo: list[Cell], jobs: int, runs_a_process: int = 4, start: str = "spawn"
) -> Iterator[tuple[Cell, Row, str]]:
    """Run what is left, some at a time; yields each cell with its row and a word on how long the rest takes.

    Args:
        job: picklable; computes (and keeps) one row.
        todo: the cells, in the order in which they begin.
        jobs: processes; with 0 all runs are in this one.
        runs_a_process: then a fresh one takes over: what torch and the allocator keep of each run adds up to gigabytes.
        start: how processes start.
    """
    begin = time.perf_counter()

    def told(results: Iterable[tuple[Cell, Row]]) -> Iterator[tuple[Cell, Row, str]]:
        for count, (cell, row) in enumerate(results, start=1):
            left = (time.perf_counter() - begin) / count * (len(todo) - count)
            yield cell, row, f"about {left / 60:.0f} min left"

    if jobs == 0 or not todo:
        yield from told((cell, job(cell)) for cell in todo)
        return
    with get_context(start).Pool(jobs, maxtasksperchild=runs_a_process) as pool:
        yield from told(pool.imap_unordered(_Pair(job), todo))


class _Pair:
    """The cell beside its row, as rows come back in any order."""

    def __init__(self, job: Callable[[Any], Row]) -> None:
        self.job = job

    def __call__(self, cell: Cell) -> tuple[Cell, Row]:
        return cell, self.job(cell)
