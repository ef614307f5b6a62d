"""Kill training with SIGKILL again and again, go on from the last checkpoint, and compare with a run left in peace.

Each shipped YAML (its networks and data made small) trains through the command line, checkpoints every few steps and at
the end of each epoch, and is killed at a random moment: any moment, or up to two milliseconds after it began to write
a checkpoint. ``newest_checkpoint`` chooses the file to go on from. A chain ends when a run is quicker than its killer;
its weights, optimizer states, schedules and random state are then held against the undisturbed run's, bit for bit.

A second part writes one checkpoint over itself without training, is killed at random, and counts what is torn: the
package's writer, and Lightning's, with the folder of temporary files on the same file system and on another.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 4 --only classifier spot
"""

import argparse
import contextlib
import importlib
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, output_path, parser, write_result

from lightning_rectify._lightning import TorchCheckpointIO, Trainer
from lightning_rectify.checkpoints import AtomicCheckpointIO, newest_checkpoint, what_is_wrong
from lightning_rectify.cli import RectifyCLI

NAME = "faults"
EVERY = 4  # steps between two checkpoints; an epoch's six steps end between them
EPOCHS = 4
PATIENCE = 3600.0  # s; a run takes some, a hundred times more on a machine that is busy
WRITING_FOR = 0.002  # s; what the write and fsync of a checkpoint take
# What a checkpoint says about the run's surroundings, not about what was trained.
SURROUNDINGS = ("callbacks", "loops", "pytorch-lightning_version", "hparams_name", "hyper_parameters")

# Arguments that make each shipped YAML's run small: six batches an epoch.
SMALL: dict[str, list[str]] = {
    "classifier": ["model.network_args={width: 4, norm: batch, dropout: 0.2}", "data.train_size=192"],
    "language_model": [
        "model.vocab_size=60", "model.embedding_size=16", "model.hidden_size=32", "model.cutoffs=[20,40]",
        "data.train_size=192", "data.val_size=100", "data.vocab_size=60", "data.bptt=6",
    ],
    "translation": [
        "model.vocab_size=100", "model.width=32", "model.feedforward=64", "model.encoder_layers=1",
        "model.decoder_layers=1", "model.beam_size=1", "data.train_size=192", "data.val_size=100",
        "data.vocab_size=100", "data.batch_tokens=null",
    ],
    "spectral_gan": [
        "model.generator_width=16", "model.discriminator_width=16", "model.latent_size=16",
        "model.features=lightning_rectify.modules.spectral_gan.RandomFeatures", "model.features.in_channels=1",
        "data.train_size=192", "data.val_size=100",
    ],
    "spot": [
        "model.width=16", "model.critic_width=16", "model.eval_samples=500", "data.epoch_size=192", "data.val_size=100",
    ],
    "spot_adaptation": [
        "model.generator_width=4", "model.critic_width=4", "model.classifier_width=16", "model.source_steps=10",
        "model.plan_steps=1000", "data.train_size=192", "data.val_size=100",
    ],
    "l2l": [
        "model.classifier_args={width: 4, norm: batch}", "model.attacker_args={width: 4, norm: group}",
        "model.random_start=0.5", "model.val_attack_steps=2", "data.train_size=192",
    ],
    "manifold": ["model.dim=2", "data.train_size=192"],
}  # fmt: skip


# -- a process of its own for each run ---------------------------------------------------------------------------------


@dataclass
class Child:
    """A forked process: all is imported already, so that a run costs no start of Python.

    Attributes:
        said: the lines that it has written to its pipe.
    """

    pid: int
    pipe: int
    said: list[str] = field(default_factory=list)
    _rest: bytes = b""

    def listen(self, until: float, word: str | None = None) -> bool:
        """Read lines until that time of the monotonic clock.

        Returns:
            Whether the child lives: False if it ended; True at the time, or as soon as it says ``word``.
        """
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.pipe], [], [], left)[0]:
                return True
            if not (data := os.read(self.pipe, 65536)):
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.said += (new := [line.decode() for line in lines])
            if word in new:
                return True
        return True

    def kill(self) -> None:
        """SIGKILL; what it said before is read."""
        os.kill(self.pid, signal.SIGKILL)
        self.listen(time.monotonic() + 60)
        self.end()

    def wait(self) -> int:
        """As :meth:`end`, with its lines read; one that does not end is killed."""
        if self.listen(time.monotonic() + PATIENCE):
            os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> int:
        """Wait for its end; its exit status, or minus the signal that ended it."""
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(work: Callable[[Callable[[str], None]], None], folder: Path) -> Child:
    """Run ``work(say)`` in a child that stands in ``folder``; what it prints is in ``log.txt`` there."""
    sys.stdout.flush()
    pipe, theirs = os.pipe()
    if (pid := os.fork()) != 0:
        os.close(theirs)
        return Child(pid, pipe)
    status = 1
    try:
        os.close(pipe)
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        work(lambda line: os.write(theirs, f"{line}\n".encode()) and None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


# -- training, killed --------------------------------------------------------------------------------------------------


class TellingIO(AtomicCheckpointIO):
    """Says when a file begins to be written, and which step is safe on disk."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.say(f"step {checkpoint['global_step']}")

    def replace(self, path: Path, data: memoryview) -> None:
        self.say("writing")
        super().replace(path, data)


class TellingCLI(RectifyCLI):
    """The command line, whose checkpoints go through :class:`TellingIO`."""

    say: Callable[[str], None]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = TellingIO(type(self).say)
        return trainer


def train(say: Callable[[str], None], stem: str, epochs: int, resume: Path | None) -> None:
    """Fit, from a checkpoint if there is one, and leave ``final.ckpt``."""
    warnings.simplefilter("ignore")
    TellingCLI.say = staticmethod(say)
    arguments = [f"--{'.init_args.'.join(word.split('.', 1))}" for word in SMALL[stem]]
    trainer = TellingCLI([
        "fit", f"--config={ROOT / 'configs' / f'{stem}.yaml'}", *arguments, "--data.init_args.batch_size=32",
        f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0", "--test_after_fit=false",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}",
        f"--trainer.callbacks.every_n_train_steps={EVERY}", "--adaptive_rate.figure=false",
        *([f"--ckpt_path={resume}"] if resume else []),
    ]).trainer  # fmt: skip
    trainer.strategy.checkpoint_io = TorchCheckpointIO()  # says nothing
    trainer.save_checkpoint("final")
    say("modules " + " ".join(sys.modules))


def import_what_it_imported(child: Child) -> None:
    """So that the next child need not."""
    (line,) = (line for line in child.said if line.startswith("modules "))
    for name in line.split()[1:]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


@dataclass
class Tally:
    """What has been seen of one module."""

    kills: Counter[str] = field(default_factory=Counter)  # by kind
    partial_left: int = 0  # kills that left a file half written under its temporary name
    from_the_start: int = 0  # kills before the first checkpoint
    broken: int = 0  # files named as checkpoints that are not whole
    lost: int = 0  # kills after which a checkpoint that had been written was not there to go on from
    chains: int = 0
    longest: int = 0  # most kills in a chain
    different: list[str] = field(default_factory=list)  # paths of states that are not bit-equal


def chain(stem: str, folder: Path, epochs: int, seconds: float, kills: int, dice: random.Random, tally: Tally) -> None:
    """Kill and resume at most ``kills`` times, until a run has come to its end."""
    done, safe = 0, 0
    while True:
        resume = newest_checkpoint(folder)
        child = fork(lambda say, resume=resume: train(say, stem, epochs, resume), folder)
        kind = dice.choice(("any moment", "while writing")) if done < kills else "never"
        alive = live(child, kind, seconds, dice)
        if not alive:
            if status := child.end():
                raise RuntimeError(f"{stem} ended with {status}: {(folder / 'log.txt').read_text()[-3000:]}")
            break
        child.kill()
        done += 1
        tally.kills[kind] += 1
        safe = max([safe, *(int(line.split()[1]) for line in child.said if line.startswith("step "))])
        inspect(folder, safe, tally)
    tally.chains += 1
    tally.longest = max(tally.longest, done)


def live(child: Child, kind: str, seconds: float, dice: random.Random) -> bool:
    """Wait for the moment to kill; whether the child is still alive then."""
    if kind == "never":
        return child.listen(time.monotonic() + PATIENCE)
    if kind == "any moment":
        return child.listen(time.monotonic() + dice.uniform(0, seconds))
    for _ in range(dice.randint(1, 6)):  # which of its writes
        if not child.listen(time.monotonic() + PATIENCE, "writing"):
            return False
    return child.listen(time.monotonic() + dice.uniform(0, WRITING_FOR))


def inspect(folder: Path, safe: int, tally: Tally) -> None:
    """Look at what a kill has left."""
    tally.partial_left += bool([*folder.rglob("*.partial")])
    tally.broken += sum(what_is_wrong(path) is not None for path in folder.rglob("*.ckpt"))
    chosen = newest_checkpoint(folder)
    step = torch.load(chosen, weights_only=True)["global_step"] if chosen else 0
    tally.lost += step < safe
    tally.from_the_start += chosen is None
    for path in folder.rglob("*.partial"):  # so that the next kill's is counted anew
        path.unlink()


def disturb(stem: str, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """One row: a module's runs, killed ``kills`` times in all."""
    dice, tally = random.Random(f"{seed} {stem}"), Tally()
    with tempfile.TemporaryDirectory() as name:
        calm = Path(name) / "calm"
        calm.mkdir()
        seconds = []
        for _ in range(2):  # the first has modules to import
            begin = time.monotonic()
            child = fork(lambda say: train(say, stem, epochs, None), calm)
            if child.wait():
                raise RuntimeError(f"{stem} did not train: {(calm / 'log.txt').read_text()[-3000:]}")
            seconds.append(time.monotonic() - begin)
            import_what_it_imported(child)
        expected = trained(calm / "final")
        while (left := kills - tally.kills.total()) > 0:
            folder = Path(name) / f"chain{tally.chains}"
            folder.mkdir()
            chain(stem, folder, epochs, seconds[-1], left, dice, tally)
            tally.different += differences(expected, trained(folder / "final"))
    return {
        "module": stem,
        "steps": expected["/global_step"],
        "run_seconds": seconds[-1],
        "kills": tally.kills.total(),
        "kills_while_writing": tally.kills["while writing"],
        "partial_files_left": tally.partial_left,
        "kills_before_the_first_checkpoint": tally.from_the_start,
        "checkpoints_lost": tally.lost,
        "broken_files": tally.broken,
        "runs_compared": tally.chains,
        "most_kills_of_a_run": tally.longest,
        "states_compared": len(expected),
        "numbers_compared": sum(value.numel() for value in expected.values() if isinstance(value, torch.Tensor)),
        "states_that_differ": sorted(set(tally.different)),
    }


def trained(path: Path) -> dict[str, Any]:
    """All that was trained, and the random state, by path in the checkpoint."""
    saved = torch.load(path, weights_only=True)
    return dict(flat({key: value for key, value in saved.items() if key not in SURROUNDINGS}))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}/{index}")
    else:
        yield path, value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Paths that are on one side only or not bit for bit equal."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return [path for path in a.keys() | b.keys() if path not in a or path not in b or not equal(a[path], b[path])]


# -- writing alone, killed ---------------------------------------------------------------------------------------------

WRITERS = {
    "package": (AtomicCheckpointIO, False),
    "package, temporary files elsewhere": (AtomicCheckpointIO, True),
    "Lightning": (TorchCheckpointIO, False),
    "Lightning, temporary files elsewhere": (TorchCheckpointIO, True),
}


def other_file_system(folder: Path) -> Path | None:
    """A writable folder that is not on the folder's file system: shared memory, on Linux."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and memory.stat().st_dev != folder.stat().st_dev:
        return memory
    return None


def write_forever(say: Callable[[str], None], writer: type[TorchCheckpointIO], temporary: str, megabytes: int) -> None:
    tempfile.tempdir = temporary
    numbers = torch.zeros(megabytes, 250_000)  # 1 MB a row
    for count in range(1, 10**9):
        writer().save_checkpoint({"count": count, "numbers": numbers.fill_(count)}, "last.ckpt")
        say(f"count {count}")


def tear(name: str, kills: int, megabytes: int, seed: int) -> dict[str, Any]:
    """One row of the writers: what is left of a file that is written over and over when the writer is killed."""
    writer, elsewhere = WRITERS[name]
    dice, found = random.Random(f"{seed} {name}"), Counter[str]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        other = other_file_system(folder)
        if elsewhere and other is None:
            return {"writer": name, "status": "not run: there is no second file system"}
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=other if elsewhere else folder))
        for _ in range(kills):
            child = fork(lambda say: write_forever(say, writer, home, megabytes), folder)
            if not child.listen(time.monotonic() + 60, "count 2"):
                raise RuntimeError(f"{name} did not write: {(folder / 'log.txt').read_text()[-3000:]}")
            child.listen(time.monotonic() + dice.uniform(0, 0.5))
            child.kill()
            found["torn"] += what_is_wrong(folder / "last.ckpt") is not None
            for path in (path for place in (folder, Path(home)) for path in place.iterdir()):
                if path.is_file() and path.name not in ("log.txt", "last.ckpt"):
                    found["left behind"] += 1
                    path.unlink()
    return {
        "writer": name,
        "status": "measured",
        "megabytes": megabytes,
        "kills": kills,
        "files_torn": found["torn"],
        "kills_that_left_a_temporary_file": found["left behind"],
    }


# -- the two parts -----------------------------------------------------------------------------------------------------


def describe(row: Mapping[str, Any]) -> str:
    return (
        f"{row['module']:<16} {row['kills']:3d} kills ({row['kills_while_writing']} while writing, "
        f"{row['partial_files_left']} left a half-written file), lost {row['checkpoints_lost']}, broken "
        f"{row['broken_files']}; {row['runs_compared']} runs of {row['steps']} steps compared, "
        f"{len(row['states_that_differ'])} states differ"
    )


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, NAME)
    made.add_argument("--only", nargs="+", choices=list(SMALL), help="modules (default all; quick: classifier)")
    made.add_argument("--kills", type=int, help="of each module (default 15; quick: 3)")
    made.add_argument("--writer-kills", type=int, help="of each writer (default 30; quick: 1)")
    made.add_argument("--epochs", type=int, help=f"of six steps each (default {EPOCHS}; quick: 2)")
    made.add_argument("--seed", type=int, default=0, help="of the moments")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    torch.set_num_threads(1)
    stems = args.only or (["classifier"] if args.quick else list(SMALL))
    kills, epochs = args.kills or (3 if args.quick else 15), args.epochs or (2 if args.quick else EPOCHS)
    rows = []
    for stem in stems:
        rows.append(disturb(stem, kills, epochs, args.seed))
        print(describe(rows[-1]), flush=True)
    writers = []
    for name in WRITERS:
        writers.append(tear(name, args.writer_kills or (1 if args.quick else 30), 8 if args.quick else 64, args.seed))
        print(writers[-1], flush=True)
    settings = {"seed": args.seed, "epochs": epochs, "checkpoint_every_n_steps": EVERY, "writing_ms": 1e3 * WRITING_FOR}
    write_result(output_path(NAME, args.out, args.quick), NAME, settings, rows, writers=writers)


if __name__ == "__main__":
    main()
