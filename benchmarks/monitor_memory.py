"""Does a monitor's memory grow with the steps it has watched? Resident memory of long fits, with and without it.

Each fit is a process of its own: a tiny module, a TensorBoard logger, a validation each fifth epoch of six batches. The
slope is a least-squares line through the process's resident memory (after a collection of garbage, every 50 steps)
once the first third is over; beside it stands the slope of the same fit without the monitor, which is Lightning's and
the allocator's own.

    python benchmarks/monitor_memory.py
"""

import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from faults import fork
from timing import output_path, parser, write_result

from lightning_rectify import AdaptiveRateMonitor, RobustnessMonitor, SpectrumMonitor, WarmupProbe
from lightning_rectify._lightning import Callback, LightningDataModule, LightningModule, TensorBoardLogger, Trainer
from lightning_rectify.callbacks import PlanFigure, PlanHistory, SampleGrid, TranslationSamples
from lightning_rectify.data import ImageData, TranslationData, TransportData
from lightning_rectify.modules import SPOT, ImageClassifier, L2LDefense, SpectralGAN, Translator

NAME = "monitor_memory"
EVERY = 50  # steps between two looks
SMALL = {"width": 4, "norm": "group"}
IMAGES = {"train_size": 192, "val_size": 32, "batch_size": 32, "eval_batch_size": 32}


def classifier() -> tuple[LightningModule, LightningDataModule]:
    return ImageClassifier(network_args=SMALL), ImageData(**IMAGES)


def defense() -> tuple[LightningModule, LightningDataModule]:
    module = L2LDefense(classifier_args=SMALL, attacker_args=SMALL, epsilon=0.1, val_attack_steps=1)
    return module, ImageData(normalization="unit", **IMAGES)


def plan() -> tuple[LightningModule, LightningDataModule]:
    module = SPOT(width=16, critic_width=16, critic_steps=1, eta=100.0, decay_steps=0, eval_samples=200)
    return module, TransportData(batch_size=32, epoch_size=192, val_size=100)


def gan() -> tuple[LightningModule, LightningDataModule]:
    module = SpectralGAN(in_channels=1, generator_width=8, discriminator_width=8, latent_size=8)
    return module, ImageData(image_size=32, normalization="symmetric", **IMAGES)


def translator() -> tuple[LightningModule, LightningDataModule]:
    module = Translator(
        vocab_size=100, width=16, heads=2, feedforward=32, encoder_layers=1, decoder_layers=1, beam_size=1
    )
    return module, TranslationData(train_size=192, val_size=8, vocab_size=100, batch_size=32)


MODULES: dict[str, Callable[[], tuple[LightningModule, LightningDataModule]]] = {
    "classifier": classifier,
    "l2l": defense,
    "spot": plan,
    "spectral_gan": gan,
    "translation": translator,
}
# name -> the module it watches, and the callback at a rate that makes it work often
MONITORS: dict[str, tuple[str, Callable[[], Callback]]] = {
    "AdaptiveRateMonitor": ("classifier", lambda: AdaptiveRateMonitor(per_layer=True)),
    "SpectrumMonitor": ("classifier", lambda: SpectrumMonitor(every_n_steps=10)),
    "WarmupProbe": ("classifier", lambda: WarmupProbe(streams=4, steps=20)),
    "RobustnessMonitor": ("l2l", lambda: RobustnessMonitor(max_images=16, steps=2)),
    "PlanHistory": ("spot", PlanHistory),
    "PlanFigure": ("spot", lambda: PlanFigure(count=50, grid=11)),
    "SampleGrid": ("spectral_gan", lambda: SampleGrid(count=16)),
    "TranslationSamples": ("translation", lambda: TranslationSamples(count=2)),
}


class Resident(Callback):
    """Says how much memory the process holds, every so many steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % EVERY == 0:
            gc.collect()
            self.say(f"{trainer.global_step} {resident()}")


def resident() -> int:
    """Resident memory of this process, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fit(say: Callable[[str], None], module: str, monitor: str | None, steps: int) -> None:
    """Train for so many steps, saying what is resident."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    network, data = MODULES[module]()
    callbacks = [Resident(say), *([MONITORS[monitor][1]()] if monitor else [])]
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=TensorBoardLogger("."),
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=5, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(network, datamodule=data)


def measure(module: str, monitor: str | None, steps: int) -> dict[str, Any]:
    """One fit: its slope, and how much the memory grew once the first third was over."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        child = fork(lambda say: fit(say, module, monitor, steps), Path(folder))
        if child.wait():
            raise RuntimeError(f"{module} with {monitor}: {(Path(folder) / 'log.txt').read_text()[-3000:]}")
    looks = torch.tensor([[float(word) for word in line.split()] for line in child.said], dtype=torch.float64)
    late = looks[looks[:, 0] > steps / 3]
    centred = late - late.mean(dim=0)
    slope = (centred[:, 0] @ centred[:, 1] / centred[:, 0].square().sum()).item()
    return {
        "module": module,
        "monitor": monitor,
        "steps": steps,
        "first_mb": looks[0, 1].item() / 1e6,
        "last_mb": looks[-1, 1].item() / 1e6,
        "slope_kb_per_1000_steps": slope,  # bytes a step
        "seconds": time.monotonic() - begin,
    }


def describe(row: Mapping[str, Any]) -> str:
    return (
        f"{row['module']:<12} {row['monitor'] or 'no monitor':<20} {row['steps']} steps  {row['first_mb']:.0f} MB to "
        f"{row['last_mb']:.0f} MB  {row['slope_kb_per_1000_steps']:+.0f} kB per 1,000 steps  {row['seconds']:.0f} s"
    )


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--monitors", nargs="+", choices=list(MONITORS), help="default all; quick: PlanHistory")
    arguments.add_argument("--steps", type=int, help="of each fit (default 3000; quick: 300)")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    names = args.monitors or (["PlanHistory"] if args.quick else list(MONITORS))
    steps, rows = args.steps or (300 if args.quick else 3000), []
    alone = list(dict.fromkeys(MONITORS[name][0] for name in names))
    for module, monitor in [*((module, None) for module in alone), *((MONITORS[name][0], name) for name in names)]:
        rows.append(measure(module, monitor, steps))
        print(describe(rows[-1]), flush=True)
    write_result(output_path(NAME, args.out, args.quick), NAME, {"steps": steps, "every_n_steps": EVERY}, rows)


if __name__ == "__main__":
    main()
