"""How much do two processes on two cores train, one thread each, beside one process with one thread?

The translator of configs/translation.yaml and a ResNet-20 on digits train in the Trainer with the same batch on each
process: alone ("one"), twice side by side without a word ("two apart", what the machine itself allows: cores share
memory and clock), and together with ``strategy="ddp"`` over gloo ("two, ddp"). Efficiency is the work of two over twice
the work of one, in the same round; rounds are interleaved. The clock is the wall's: run it on a machine that does
nothing else, with at least two cores.

    python benchmarks/scaling_efficiency.py
"""

import logging
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from timing import Ratio, environment, output_path, parser, ratio_of, write_result

NAME = "scaling_efficiency"
RANKS = 2
WAYS = ("one", "two apart", "two, ddp")
UNITS = {"translator": "target tokens", "classifier": "images"}


# -- on each process ---------------------------------------------------------------------------------------------------


def serve(rank: int, store: str | None, quick: bool, pipe: Connection) -> None:
    """Join the other process if there is a store to meet at, then train whenever asked to."""
    if store is not None:  # as torchrun starts processes
        os.environ |= {
            "TORCHELASTIC_RUN_ID": NAME, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
            "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }  # fmt: skip
    import torch

    import lightning_rectify._lightning  # noqa: F401  (reads the rank, and sets its loggers' level, at import)

    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # a Trainer a sample, each with the same advice
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    while True:
        try:
            task, steps = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((*train(task, store is not None, steps, quick), ""))
        except Exception:
            pipe.send((0, 0.0, traceback.format_exc()))


def train(task: str, together: bool, steps: int, quick: bool) -> tuple[int, float]:
    """Work and seconds of ``steps`` training steps after a first one, on this process."""
    from lightning_rectify._lightning import Callback, Trainer, seed_everything
    from lightning_rectify.text import PAD

    class Clock(Callback):
        """From the end of the first step to that of the last."""

        work, begin, end = 0, 0.0, 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.end = time.perf_counter()
            if not self.begin:
                self.begin = self.end
                return
            self.work += int((batch.target[:, 1:] != PAD).sum()) if task == "translator" else len(batch[0])

    seed_everything(1, verbose=False)
    module, data = build(task, quick)
    clock = Clock()
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    where = {"devices": RANKS, "strategy": "ddp"} if together else {"devices": 1, "strategy": "auto"}
    Trainer(
        accelerator="cpu", max_steps=steps + 1, max_epochs=-1, limit_val_batches=0, callbacks=[clock],
        use_distributed_sampler=together, **where, **silence,
    ).fit(module, datamodule=data)  # fmt: skip
    return clock.work, clock.end - clock.begin


def build(task: str, quick: bool) -> tuple[Any, Any]:
    """Module and data of one task."""
    from lightning_rectify import ImageClassifier, ImageData, TranslationData, Translator

    if task == "classifier":
        size = {"train_size": 192} if quick else {}
        data = ImageData(image_size=8 if quick else 32, batch_size=16 if quick else 64, **size)
        network = "small_cnn" if quick else "resnet20"
        return ImageClassifier(network=network, image_size=data.image_size), data
    shape: dict[str, Any] = {"width": 32, "feedforward": 64, "encoder_layers": 1, "decoder_layers": 1} if quick else {}
    sizes: dict[str, Any] = {"train_size": 400, "val_size": 50, "test_size": 50} if quick else {}
    data = TranslationData(vocab_size=400, batch_tokens=300 if quick else 1000, **sizes)
    return Translator(vocab_size=400, **shape), data


# -- the process that asks ---------------------------------------------------------------------------------------------


class Processes:
    """Two that were never told of each other, and two that gloo joined; who is not asked sleeps."""

    def __init__(self, quick: bool) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")
        self.processes: list[Any] = []
        self.pipes: dict[bool, list[Connection]] = {False: [], True: []}
        for joined in (False, True):
            for rank in range(RANKS):
                here, there = context.Pipe()
                process = context.Process(
                    target=serve, args=(rank, store if joined else None, quick, there), daemon=True
                )
                process.start()
                there.close()
                self.pipes[joined].append(here)
                self.processes.append(process)

    def rate(self, task: str, way: str, steps: int) -> float:
        """Work a second of all processes that train."""
        pipes = self.pipes[way == "two, ddp"][: 1 if way == "one" else RANKS]
        for pipe in pipes:
            pipe.send((task, steps))
        answers = [pipe.recv() for pipe in pipes]
        if failed := [text for *_, text in answers if text]:
            raise SystemExit(failed[0])
        return sum(work for work, *_ in answers) / max(seconds for _, seconds, _ in answers)

    def close(self) -> None:
        for pipe in (*self.pipes[False], *self.pipes[True]):
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def measure(processes: Processes, task: str, rounds: int, steps: int) -> dict[str, Any]:
    """One row of the result: rates, and efficiencies round by round."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        processes.rate(task, way, 1)  # untimed: data are read, kernels chosen
    for index in range(rounds):
        for way in WAYS if index % 2 == 0 else reversed(WAYS):
            rates[way].append(processes.rate(task, way, steps))
        print(task, {way: round(values[-1]) for way, values in rates.items()}, flush=True)
    row: dict[str, Any] = {"task": task, "unit": UNITS[task]}
    for way, values in rates.items():
        key = way.replace(", ", "_").replace(" ", "_")
        row[f"{key}_per_second"] = sorted(values)[len(values) // 2]
        if way != "one":
            row[f"{key}_efficiency"] = spread(ratio_of([value / RANKS for value in values], rates["one"]))
    row["ddp_of_apart"] = spread(ratio_of(rates["two, ddp"], rates["two apart"]))
    return row


def spread(found: Ratio) -> list[float]:
    """Median and quartiles."""
    return [found.median, found.low, found.high]


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--rounds", type=int, help="samples of each way (default 7; quick: 2)")
    arguments.add_argument("--steps", type=int, help="timed training steps a sample (default 15; quick: 2)")
    args = arguments.parse_args()
    rounds, steps = args.rounds or (2 if args.quick else 7), args.steps or (2 if args.quick else 15)
    processes = Processes(args.quick)
    rows = [measure(processes, task, rounds, steps) for task in UNITS]
    processes.close()
    settings = {"processes": RANKS, "rounds": rounds, "steps": steps, "clock": "wall", "backend": "gloo"}
    found = {**environment(), "threads": 1}
    write_result(output_path(NAME, args.out, args.quick), NAME, settings, rows, environment=found)


if __name__ == "__main__":
    main()
