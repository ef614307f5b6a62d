"""What does Lightning cost a training step? Each module's embedded configuration beside a loop in plain torch.

The bare loop has the same networks, losses, optimizers and schedules, the same batches, already collated, and the same
random numbers: after all steps both have the same weights, bit for bit, or the script fails. It leaves out what is
Lightning's or serves watching: loops, hooks, logging, metrics, the check for a finite loss.

One fit runs in blocks of steps, and beside each block the bare loop runs the same steps in the same process; every
second pair the other way round. A ratio is taken pair by pair, before its median. Two Trainers are timed:

- "Trainer": the configuration without logger and callbacks;
- "as configured": with its logger and its callbacks, AdaptiveRateMonitor among them.

Validation, checkpoints of epochs, progress bar and data loading are in neither. Time is the process's CPU time (and the
wall clock's, which other processes disturb).

    python benchmarks/lightning_cost.py                    # 25 min on one core
    python benchmarks/lightning_cost.py --tasks classifier spot --kinds Trainer
    python benchmarks/lightning_cost.py --tasks spot --profile     # where the Trainer's time goes, printed
"""

import contextlib
import copy
import cProfile
import gc
import io
import logging
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from plain_loops import plain_steps
from timing import ROOT, environment, output_path, parser, ratio_of, write_result

from lightning_rectify._lightning import NAME as LIGHTNING
from lightning_rectify._lightning import Callback
from lightning_rectify.callbacks import AdaptiveRateMonitor
from lightning_rectify.cli import RectifyCLI

NAME = "lightning_cost"
KINDS = ("Trainer", "as configured")
HELD = 20  # batches kept and gone through in turn
LIMIT = 1.10
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Task:
    """One configuration: ``arguments`` come on top of the file; a round of a game is a step."""

    players: int
    block: int
    arguments: tuple[str, ...] = ()


TASKS = {
    "classifier": Task(1, 20),
    "language_model": Task(1, 10),
    "translation": Task(1, 5),
    "manifold": Task(1, 50),
    "spectral_gan": Task(2, 5),
    "l2l": Task(2, 10),
    "spot": Task(2, 10),
    "spot_density": Task(2, 5),
    # All three players move in the part of the run that the plan is learned in; it is put first.
    "spot_adaptation": Task(3, 5, ("--model.init_args.source_steps=0",)),
}


class Repeated:
    """The batches in turn, ``length`` in all."""

    def __init__(self, batches: list[Any], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.length))


@dataclass
class Blocks:
    """Seconds a step of each pair of blocks, by clock and side."""

    seconds: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {clock: {"bare": [], "trainer": []} for clock in CLOCKS}
    )

    def add(self, side: str, begin: Mapping[str, float], steps: int) -> None:
        for clock, now in CLOCKS.items():
            self.seconds[clock][side].append((now() - begin[clock]) / steps)

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for clock, sides in self.seconds.items():
            ratio = ratio_of(sides["trainer"], sides["bare"])
            found |= {f"{side}_{clock}_ms": 1e3 * statistics.median(values) for side, values in sides.items()}
            found |= {f"{clock}_ratio": ratio.median, f"{clock}_ratio_quartiles": [ratio.low, ratio.high]}
        return found


class Turns(Callback):
    """Runs the bare loop between blocks of the fit; the first callback, so that a block holds whole steps.

    The first block of either side warms up. The bare loop starts from a copy of the module as training begins.
    """

    def __init__(self, batches: list[Any], block: int, rounds: int, profile: cProfile.Profile | None = None) -> None:
        self.batches, self.block, self.profile = batches, block, profile
        self.steps = block * (rounds + 1)
        self.blocks = Blocks()
        self.bare: Any = None
        self._bare_step: Callable[[Any], None] = lambda batch: None
        self._random = torch.get_rng_state()
        self._begin: dict[str, float] = {}
        self._done = 0  # steps of the bare loop

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        index, within = divmod(batch_idx, self.block)
        if within:
            return
        if index == 0:
            self._prepare(trainer, pl_module)
            self._run_bare(0)
        else:
            self._between(index)
        gc.collect()  # what one block leaves is not the next one's to clear away
        self._begin = {clock: now() for clock, now in CLOCKS.items()}
        if self.profile is not None and index > 0:
            self.profile.enable()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._between(self.steps // self.block)

    def _between(self, index: int) -> None:
        """Block ``index - 1`` of the fit has ended; the bare loop's same block, and that of the pair which comes.

        Of an even pair the bare loop goes first, of an odd one the fit.
        """
        if self.profile is not None:
            self.profile.disable()
        if index > 1:
            self.blocks.add("trainer", self._begin, self.block)
        if (index - 1) % 2 == 1:
            self._run_bare(index - 1)
        if index % 2 == 0 and index < self.steps // self.block:
            self._run_bare(index)

    def _prepare(self, trainer: Any, module: Any) -> None:
        # Its Trainer stays behind; what makes optimizers is shared, and the command line's cannot be copied.
        shared = {id(value): value for value in vars(module).values() if isinstance(value, partial)}
        self.bare = copy.deepcopy(module, shared)
        # What losses and schedules read of a Trainer; nothing is logged.
        self.bare.trainer = SimpleNamespace(
            global_step=0, global_rank=0, world_size=1, training=False, accumulate_grad_batches=1,
            estimated_stepping_batches=trainer.estimated_stepping_batches,
        )  # fmt: skip
        for name in ("log", "log_dict"):
            setattr(self.bare, name, lambda *args, **kwargs: None)
        self._bare_step = plain_steps(self.bare, clip=trainer.gradient_clip_val)
        self._random = torch.get_rng_state()

    def _run_bare(self, index: int) -> None:
        outside, steps = torch.get_rng_state(), range(self._done, self._done + self.block)
        torch.set_rng_state(self._random)
        gc.collect()
        begin = {clock: now() for clock, now in CLOCKS.items()}
        for step in steps:
            self._bare_step(self.batches[step % len(self.batches)])
        if index > 0:
            self.blocks.add("bare", begin, self.block)
        self._done += self.block
        self._random = torch.get_rng_state()
        torch.set_rng_state(outside)


def command_line(task: str, folder: str, *more: str) -> RectifyCLI:
    """The configuration's module, data and Trainer, for one epoch of training without validation."""
    quiet = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary")]
    length = [
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]
    here = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    path = ROOT / "configs" / f"{task}.yaml"
    return RectifyCLI([f"--config={path}", *quiet, *length, *here, *TASKS[task].arguments, *more], run=False)


def measure(task: str, kind: str, block: int, rounds: int, profile: cProfile.Profile | None = None) -> dict[str, Any]:
    """One row: one fit beside its bare loop.

    Raises:
        RuntimeError: if the two did not come to the same weights.
    """
    more = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"]
    with tempfile.TemporaryDirectory() as folder, quiet():
        cli = command_line(task, folder, *(more if kind == "Trainer" else ()))
        data: Any = cli.datamodule
        data.prepare_data()
        data.setup("fit")
        batches = list(islice(data.train_dataloader(), HELD))
        turns = Turns(batches, block, rounds, profile)
        data.train_dataloader = lambda: Repeated(batches, turns.steps)
        callbacks = cli.trainer.callbacks
        if kind == "Trainer":  # the command line always adds the monitor
            callbacks = [found for found in callbacks if not isinstance(found, AdaptiveRateMonitor)]
        cli.trainer.callbacks = [turns, *callbacks]
        cli.trainer.fit(cli.model, datamodule=data)
    check_equal(task, cli.model, turns.bare)
    row = {"task": task, "players": TASKS[task].players, "kind": kind, "steps": turns.steps, **turns.blocks.row()}
    return {**row, "equal_weights": True}


def check_equal(task: str, module: torch.nn.Module, bare: torch.nn.Module) -> None:
    """Raise unless the two have the same weights, averages and running statistics, bit for bit."""
    ours, theirs = module.state_dict(), bare.state_dict()
    apart = sorted(key for key in ours.keys() | theirs.keys() if not torch.equal(ours[key], theirs[key]))
    if apart:
        raise RuntimeError(
            f"{task}: expected the bare loop to come to the Trainer's weights but got others in {', '.join(apart[:5])}"
            f" ({len(apart)} of {len(ours)})."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's hints; of a fit with another loop inside, some of them are wrong."""
    logger = logging.getLogger(LIGHTNING)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def describe(row: Mapping[str, Any]) -> str:
    """One line of the console."""
    return (
        f"{row['task']:<16} {row['kind']:<14} bare {row['bare_cpu_ms']:8.2f} ms"
        f"  Trainer {row['trainer_cpu_ms']:8.2f} ms"
        f"  CPU {row['cpu_ratio']:.3f} ({row['cpu_ratio_quartiles'][0]:.3f} to {row['cpu_ratio_quartiles'][1]:.3f})"
        f"  wall {row['wall_ratio']:.3f}"
    )


def print_profile(profile: cProfile.Profile, lines: int = 45) -> None:
    """Where the fit's blocks spent their time, by own time and with what they called."""
    for order in ("tottime", "cumulative"):
        out = io.StringIO()
        pstats.Stats(profile, stream=out).sort_stats(order).print_stats(lines)
        print(out.getvalue())


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--tasks", nargs="+", choices=list(TASKS), help="default: all")
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, help="default: both")
    arguments.add_argument("--rounds", type=int, help="pairs of blocks (default 40; quick: 2)")
    arguments.add_argument("--threads", type=int, default=1, help="torch's intra-op threads (default 1)")
    arguments.add_argument("--profile", action="store_true", help="print a profile of the Trainer's side; no result")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    pairs = [(task, kind) for task in args.tasks or TASKS for kind in args.kinds or KINDS]
    if args.quick and not (args.tasks or args.kinds):  # one player and a game, and each Trainer
        pairs = [("classifier", KINDS[0]), ("spot", KINDS[1])]
    rounds = args.rounds or (2 if args.quick else 40)
    rows = []
    for task, kind in pairs:
        profile = cProfile.Profile() if args.profile else None
        rows.append(measure(task, kind, 2 if args.quick else TASKS[task].block, rounds, profile))
        print(describe(rows[-1]), flush=True)
        if profile is not None:
            print_profile(profile)
    if args.profile:
        return
    settings = {"rounds": rounds, "limit": LIMIT, "batches": HELD}
    path = output_path(NAME, args.out, args.quick)
    write_result(path, NAME, settings, rows, environment=environment(packages=("tensorboard",)))


if __name__ == "__main__":
    main()
