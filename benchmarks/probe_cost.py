"""What does a warmup probe cost, beside the gradients that it takes, in time and in memory?

A probe of a ResNet-20 (16 streams of 100 steps, batches of 64 CIFAR-sized images, default sampling) against a plain
loop over the same loader that computes as many gradients. Each run is a process of its own, so that its peak memory is
its own, and the two take turns. The clock is that of the process, with one thread; imports, data and network are there
before it starts. All that the probe does is inside: its Trainer, its streams, its statistics.

    python benchmarks/probe_cost.py
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from timing import ROOT, environment, output_path, parser, ratio_of, write_result
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify.callbacks.warmup_probe import probe_warmup
from lightning_rectify.modules.classifier.module import ImageClassifier

NAME = "probe_cost"
TARGET_RATIO, TARGET_MEGABYTES = 1.25, 300.0
IMAGES = 5120


def make(batch: int) -> tuple[ImageClassifier, DataLoader[Any]]:
    torch.manual_seed(0)
    module = ImageClassifier("resnet20", num_classes=10, in_channels=3, image_size=32)
    data = TensorDataset(torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,)))
    return module, DataLoader(data, batch_size=batch, shuffle=True)


def bare(module: ImageClassifier, loader: DataLoader[Any], count: int) -> None:
    """So many gradients, and nothing else."""
    done = 0
    while done < count:
        for images, labels in loader:
            cross_entropy(module(images), labels).backward()
            module.zero_grad(set_to_none=True)
            done += 1
            if done == count:
                return


def work(kind: str, batch: int, streams: int, steps: int) -> dict[str, float]:
    """One run in this process: seconds, and the peak of its memory."""
    torch.set_num_threads(1)
    module, loader = make(batch)
    bare(module, loader, 2)
    begin = time.process_time()
    if kind == "bare":
        bare(module, loader, streams * steps)
    else:
        probe_warmup(module, loader, streams=streams, steps=steps, trainer_options={"accelerator": "cpu"})
    seconds = time.process_time() - begin
    # Kilobytes on Linux, bytes on macOS.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def run(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """One run in a process of its own."""
    options = ("--batch", args.batch, "--streams", args.streams, "--steps", args.steps)
    command = [sys.executable, __file__, "--worker", kind, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--batch", type=int, help="images in a batch (default 64; quick: 8)")
    arguments.add_argument("--streams", type=int, help="streams (default 16; quick: 2)")
    arguments.add_argument("--steps", type=int, help="steps of each (default 100; quick: 3)")
    arguments.add_argument("--rounds", type=int, help="runs of each kind (default 3; quick: 1)")
    arguments.add_argument("--worker", choices=("bare", "probe"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    for name, full, quick in (("batch", 64, 8), ("streams", 16, 2), ("steps", 100, 3), ("rounds", 3, 1)):
        setattr(args, name, getattr(args, name) or (quick if args.quick else full))
    if args.worker:
        print(json.dumps(work(args.worker, args.batch, args.streams, args.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "probe": []}
    for index in range(args.rounds):
        for kind in ("bare", "probe") if index % 2 == 0 else ("probe", "bare"):
            runs[kind].append(run(kind, args))
            print(f"{kind:<6} {runs[kind][-1]['seconds']:8.2f} s  {runs[kind][-1]['peak_mb']:7.0f} MB", flush=True)
    ratio = ratio_of([one["seconds"] for one in runs["probe"]], [one["seconds"] for one in runs["bare"]])
    more = max(one["peak_mb"] for one in runs["probe"]) - min(one["peak_mb"] for one in runs["bare"])
    print(
        f"probe / bare: {ratio.median:.3f} (at most {TARGET_RATIO}); memory: {more:+.0f} MB (below {TARGET_MEGABYTES})"
    )
    settings = {
        "network": "resnet20", "batch": args.batch, "streams": args.streams, "steps": args.steps,
        "gradients": args.streams * args.steps, "rounds": args.rounds, "clock": "process time, one thread",
        "targets": {"ratio": TARGET_RATIO, "megabytes": TARGET_MEGABYTES},
    }  # fmt: skip
    rows = [{"kind": kind, "round": i, **one} for kind, found in runs.items() for i, one in enumerate(found)]
    write_result(
        output_path(NAME, args.out, args.quick), NAME, settings, rows, environment=environment(),
        ratio=ratio.median, ratio_quartiles=[ratio.low, ratio.high], more_megabytes=more,
        meets_targets=ratio.median <= TARGET_RATIO and more < TARGET_MEGABYTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
