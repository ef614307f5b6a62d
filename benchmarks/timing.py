"""The one shared timer of the benchmarks, and the one way they write their results.

A machine that is not ours alone drifts: the same code takes 10 ms now and 14 ms a minute later. Candidates are
therefore timed in interleaved rounds (A B C, A B C, ...), and a ratio of two candidates is computed round by round
before its median is taken, so that what slows a whole round cancels.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "quick"  # git-ignored: a quick run never replaces a real result
DATA_VARIABLE = "LIGHTNING_RECTIFY_DATA"


@dataclass(frozen=True)
class Ratio:
    """One candidate's time divided by another's, over the rounds: the median and the two quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Seconds a call of each candidate, one number a round; ``samples[a][i]`` and ``samples[b][i]`` are neighbours."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median over the rounds, in seconds a call."""
        return statistics.median(self.samples[name])

    def milliseconds(self, name: str) -> dict[str, float]:
        """Median, min and max over the rounds, in milliseconds a call."""
        values = [1e3 * value for value in self.samples[name]]
        return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}

    def ratio(self, name: str, to: str) -> Ratio:
        """How many times longer ``name`` takes than ``to``, computed round by round."""
        return ratio_of(self.samples[name], self.samples[to])

    def fastest(self, names: Sequence[str]) -> str:
        """The name with the smallest median."""
        return min(names, key=self.median)


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median and quartiles of ``above[i] / below[i]``.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"Expected two equally long, non-empty sequences but got {len(above)} and {len(below)}.")
    quotients = sorted(a / b for a, b in zip(above, below, strict=True))
    if len(quotients) == 1:
        return Ratio(quotients[0], quotients[0], quotients[0])
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return Ratio(median, low, high)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time the candidates in interleaved rounds.

    Each round takes every candidate in turn; every second round goes backwards, so that nobody always follows the same
    neighbour (and finds the cache or the clock frequency it leaves behind).

    Args:
        candidates: what to time, by name.
        rounds: samples of each candidate.
        calls: calls a sample; the sample is their mean.
        warmup: untimed calls of each candidate before the first round.
        device: where the work runs; a CUDA device is synchronized around each sample.
        clock: seconds, monotonic.
    """
    synchronize = _synchronizer(torch.device(device))
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            call = candidates[name]
            synchronize()
            begin = clock()
            for _ in range(calls):
                call()
            synchronize()
            samples[name].append((clock() - begin) / calls)
    return Timings(samples)


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def data_folder(given: str | None, candidates: Sequence[str]) -> str:
    """The first of the folders, below ``--data`` or the environment variable, that is there.

    Raises:
        SystemExit: if none is.
    """
    base = given or os.environ.get(DATA_VARIABLE)
    for candidate in candidates if base else ():
        if (folder := Path(str(base)) / candidate).is_dir():
            return str(folder)
    raise SystemExit(f"--data: expected a folder that holds {' or '.join(candidates)} but got {base!r}.")


# -- the environment and the result -----------------------------------------------------------------------------------


def environment(device: torch.device | str = "cpu", packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a reader must know of the machine: versions, threads, processor. No path, no host name.

    Args:
        device: a CUDA device adds its name.
        packages: distributions whose version matters besides torch's and Lightning's; absent ones are left out.
    """
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    device = torch.device(device)
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in ("pytorch-lightning", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's marketing name, as well as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark has: ``--out`` and ``--quick``."""
    built = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--out", type=Path, help=f"result file (default benchmarks/results/{name}.json)")
    built.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that the script runs")
    return built


def output_path(name: str, out: Path | None, quick: bool) -> Path:
    """Where the result goes: ``out`` if given, else results/, or for a quick run a folder that git ignores."""
    return out or (QUICK_RESULTS if quick else RESULTS) / f"{name}.json"


_STAND_FOR = {"--peer": "PEER_PYTHON", "--weights": "CHECKPOINT"}


def command(argv: Sequence[str] | None = None) -> str:
    """The command line that makes the result again, without this machine's paths.

    ``--out`` is kept only where it names a file in results/, ``--work`` never; the value of ``--data`` becomes the
    environment variable it stands for, an interpreter or a checkpoint a word in capitals.
    """
    argv = list(sys.argv if argv is None else argv)
    script = Path(argv[0])
    words = ["python", "/".join(["benchmarks", *(["papers"] if script.parent.name == "papers" else []), script.name])]
    rest = iter(argv[1:])
    for word in rest:
        option, equals, value = word.partition("=")
        if option in ("--out", "--data", "--work", *_STAND_FOR):
            if not equals:
                value = next(rest, "")
            if option in _STAND_FOR:
                words += [option, _STAND_FOR[option]]
            if option == "--data":
                words += ["--data", f'"${DATA_VARIABLE}"']
            elif option == "--out" and Path(value).resolve().parent == RESULTS:
                words += ["--out", shlex.quote(f"benchmarks/results/{Path(value).name}")]
        else:
            words.append(shlex.quote(word))
    return " ".join(words)


def write_result(
    path: Path, name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: object
) -> None:
    """Write one benchmark's JSON in one go, so that an interrupted run leaves a whole file.

    Args:
        path: the file; its folder is made.
        name: the script's name.
        settings: what was chosen.
        rows: what was measured.
        **more: further entries; ``environment`` and ``command`` replace the ones found here.
    """
    result = {
        "name": name,
        "command": command(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "environment": environment(),
        "settings": dict(settings),
        "rows": list(rows),
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    text = json.dumps(result, indent=1, allow_nan=False)
    # a curve is one line
    text = re.sub(r"\[\n\s+([^][{}\"]*?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
