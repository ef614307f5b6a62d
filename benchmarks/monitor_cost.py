"""What does AdaptiveRateMonitor cost a training step? Default settings (sampled) and exact, beside a plain torch loop.

Two ways, in the same fit of Lightning's Trainer with a real TensorBoard logger:

- direct: the time spent inside the monitor's own hooks, those on the optimizer included, against the rest of the step;
- paired: blocks of steps with the monitor switched on, switched off, and of a plain torch loop (its own copy of the
  model, the same batches) take turns, and the ratio is taken block by neighbouring block. It also sees what the monitor
  makes others do later (the writer's thread, garbage), but is as noisy as the machine.

What a fit costs once (set-up, the first steps with their histograms, CSV and figure at the end) is a number of its own.

    python benchmarks/monitor_cost.py
"""

import contextlib
import copy
import gc
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from timing import environment, output_path, parser, ratio_of, write_result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_rectify import AdaptiveRateMonitor, RectifiedAdam
from lightning_rectify._lightning import Callback, LightningModule, TensorBoardLogger, Trainer, seed_everything
from lightning_rectify.modules.image_networks import build_network

NAME = "monitor_cost"
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "exact": {"sample_size": None}}
BUFFER = 50  # steps between two flushes of the monitor at Lightning's default log_every_n_steps
STEP_HOOKS = ("on_train_batch_", "on_before_", "on_after_", "optimizer")  # the others run once a fit or an epoch


class SmallTransformer(nn.Module):
    """A causal language model: tokens (B, T) to logits (B, T, V)."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True))


def images_task(batch: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The paper's ResNet-20 and four batches of random 32x32 images."""
    batches = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(4)]
    return build_network("resnet20", 10, 3), batches


def tokens_task(
    batch: int, layers: int, width: int, vocabulary: int, length: int
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A small Transformer and four batches of random tokens."""
    batches = [tuple(torch.randint(vocabulary, (2, batch, length))) for _ in range(4)]
    return SmallTransformer(layers, width, max(1, width // 64), vocabulary, length), batches


TASKS: dict[str, Callable[[], tuple[nn.Module, list[tuple[Tensor, Tensor]]]]] = {
    "ResNet-20, batch 128, 32x32": lambda: images_task(128),
    "Transformer, 4 layers, width 256, batch 32x64": lambda: tokens_task(32, 4, 256, 5000, 64),
    "tiny Transformer": lambda: tokens_task(2, 1, 16, 50, 8),
}


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())


class Model(LightningModule):
    """The network in Lightning; hooks put on its optimizer go through the meter."""

    def __init__(self, network: nn.Module, meter: "Meter") -> None:
        super().__init__()
        self.network, self.meter = network, meter

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = RectifiedAdam([{"params": list(self.parameters()), "name": "model"}], lr=1e-3)
        for name in ("register_step_pre_hook", "register_step_post_hook"):
            setattr(optimizer, name, self.meter.through(getattr(optimizer, name)))
        return optimizer


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The same few ready batches over and over, so that loading costs nothing."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= self.steps:
            raise IndexError(index)
        return self.batches[index % len(self.batches)]


@dataclass
class Meter:
    """Stands before the monitor's hooks: lets them through or not, and counts their seconds by hook."""

    on: bool = True
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside: bool = False

    def watch(self, monitor: Callback) -> Callback:
        """Put the meter before every hook that the monitor overrides."""
        for name in dir(Callback):
            if name.startswith("_") or getattr(type(monitor), name) is getattr(Callback, name):
                continue
            if callable(hook := getattr(monitor, name)) and name.startswith(("on_", "setup", "teardown")):
                setattr(monitor, name, self._wrap(name, hook))
        return monitor

    def through(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """A ``register_step_..._hook`` whose hooks go through the meter."""
        return lambda hook, *args, **kwargs: register(self._wrap("optimizer", hook), *args, **kwargs)

    def step_seconds(self) -> float:
        """Seconds in hooks that run at every step."""
        return sum(value for name, value in self.seconds.items() if name.startswith(STEP_HOOKS))

    def _wrap(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        stoppable = name.startswith(STEP_HOOKS)

        def metered(*args: Any, **kwargs: Any) -> Any:
            if stoppable and not self.on:
                return None
            if self._inside:  # a hook called by a hook: its time is being counted
                return hook(*args, **kwargs)
            self._inside, begin = True, time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin
                self._inside = False

        return metered


class Turns(Callback):
    """Cuts the fit into blocks: a first one with the monitor on, then rounds of plain loop, off and on by turns.

    The monitor works up its readings when a buffer is full, every ``BUFFER`` steps: the first block is one buffer long,
    a round has so many blocks that it holds that once, and a round's samples are means over all of it.

    It stands first among the callbacks, so a block runs from one ``on_train_batch_start`` to another and holds whole
    steps.
    """

    def __init__(self, meter: Meter, plain: Callable[[int], float], block: int, rounds: int) -> None:
        self.meter, self.plain, self.block = meter, plain, block
        self.blocks_a_round = -(-BUFFER // block)
        # On-off, off-on, ...: drift within a round cancels over two rounds.
        turns = ((True, False), (False, True))
        pairs = rounds * self.blocks_a_round
        self.plan = [(True, BUFFER)] + [(on, block) for index in range(pairs) for on in turns[index % 2]]
        self.steps = sum(length for _, length in self.plan)
        self.blocks: dict[str, list[float]] = {"plain": [], "off": [], "on": [], "inside": []}  # seconds a step
        self.first = 0.0
        self._left, self._index, self._begin, self._before = 0, -1, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._left == 0:
            self._finish()
            self._start()
        self._left -= 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()
        self.meter.on = True

    def samples(self, kind: str) -> list[float]:
        """Seconds a step: "plain", "off", "on", or "inside" the hooks while on; one number a round."""
        blocks, size = self.blocks[kind], self.blocks_a_round
        return [sum(blocks[i : i + size]) / size for i in range(0, len(blocks), size)]

    def _start(self) -> None:
        self._index += 1
        on, self._left = self.plan[self._index]
        if self._index % 2 == 1:  # a pair of blocks begins
            self.blocks["plain"].append(self.plain(self.block))
        gc.collect()  # what one block leaves is not the next one's to clear away
        self.meter.on, self._before, self._begin = on, self.meter.step_seconds(), time.perf_counter()

    def _finish(self) -> None:
        if self._index < 0:
            return
        on, length = self.plan[self._index]
        seconds = time.perf_counter() - self._begin
        inside = self.meter.step_seconds() - self._before
        if self._index == 0:
            self.first = inside
            return
        self.blocks["on" if on else "off"].append(seconds / length)
        if on:
            self.blocks["inside"].append(inside / length)


def plain_loop(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[int], float]:
    """A torch loop over the batches; called with a number of steps, it returns the seconds a step took."""
    optimizer = RectifiedAdam(network.parameters(), lr=1e-3)
    stream = cycle(batches)

    def steps(count: int) -> float:
        begin = time.perf_counter()
        for batch in islice(stream, count):
            optimizer.zero_grad()
            loss_of(network, batch).backward()
            optimizer.step()
        return (time.perf_counter() - begin) / count

    return steps


def measure(task: str, setting: str, block: int, rounds: int) -> dict[str, Any]:
    """One row: one fit of one task with one setting of the monitor."""
    seed_everything(0, verbose=False)
    network, batches = TASKS[task]()
    meter = Meter()
    plain = plain_loop(copy.deepcopy(network).train(), batches)
    with torch.enable_grad():
        plain(2)
    turns = Turns(meter, plain, block, rounds)
    monitor = meter.watch(AdaptiveRateMonitor(**SETTINGS[setting]))
    with tempfile.TemporaryDirectory() as folder, quiet():
        begin = time.perf_counter()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            callbacks=[turns, monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Model(network, meter), DataLoader(Batches(batches, turns.steps), batch_size=None, shuffle=False))
        total = time.perf_counter() - begin
    return row_of(task, setting, turns, meter, total, sum(p.numel() for p in network.parameters()))


def row_of(task: str, setting: str, turns: Turns, meter: Meter, total: float, parameters: int) -> dict[str, Any]:
    on, off, plain, inside = (turns.samples(kind) for kind in ("on", "off", "plain", "inside"))
    direct = ratio_of(inside, [step - hooks for step, hooks in zip(on, inside, strict=True)])
    paired = ratio_of(on, off)
    return {
        "model": task,
        "parameters": parameters,
        "monitor": setting,
        "step_ms_plain_loop": 1e3 * statistics.median(plain),
        "step_ms_trainer": 1e3 * statistics.median(off),
        "step_ms_trainer_and_monitor": 1e3 * statistics.median(on),
        "hooks_ms_per_step": 1e3 * statistics.median(inside),
        "direct_percent": 100 * direct.median,
        "direct_percent_quartiles": [100 * direct.low, 100 * direct.high],
        "paired_percent": 100 * (paired.median - 1),
        "paired_percent_quartiles": [100 * (paired.low - 1), 100 * (paired.high - 1)],
        "trainer_to_plain_percent": 100 * (ratio_of(off, plain).median - 1),
        "first_steps_seconds": turns.first,
        "once_a_fit_seconds": sum(meter.seconds.values()) - meter.step_seconds(),
        "once_a_fit_by_hook": {
            name: round(value, 4) for name, value in meter.seconds.items() if not name.startswith(STEP_HOOKS)
        },
        "fit_seconds": total,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's hints and the monitor's alarms: random data are no training to advise on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def describe(row: Mapping[str, Any]) -> str:
    """One line of the console."""
    return (
        f"{row['model']:<46} {row['monitor']:<8} step {row['step_ms_trainer']:8.2f} ms (plain loop "
        f"{row['step_ms_plain_loop']:.2f})  hooks {row['hooks_ms_per_step']:.3f} ms = {row['direct_percent']:.2f} %"
        f"  paired {row['paired_percent']:+.2f} % ({row['paired_percent_quartiles'][0]:+.2f} to "
        f"{row['paired_percent_quartiles'][1]:+.2f})  once {row['once_a_fit_seconds']:.2f} s"
    )


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--models", nargs="+", choices=list(TASKS), help="default: both real ones")
    arguments.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    arguments.add_argument("--rounds", type=int, help="rounds of 50 steps of each kind (default 8; quick: 1)")
    arguments.add_argument("--block", type=int, help="steps in a block (default 10)")
    arguments.add_argument("--threads", type=int, help="torch's intra-op threads (default: torch's own choice)")
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.block and BUFFER % args.block:
        arguments.error(f"--block: expected a divisor of {BUFFER} but got {args.block}")
    models = args.models or ([list(TASKS)[-1]] if args.quick else list(TASKS)[:-1])
    rounds, block = args.rounds or (1 if args.quick else 8), args.block or 10
    rows = []
    for model in models:
        for setting in args.settings:
            rows.append(measure(model, setting, block, rounds))
            print(describe(rows[-1]), flush=True)
    settings = {"rounds": rounds, "steps_a_block": block, "first_steps": BUFFER, "monitors": SETTINGS}
    path = output_path(NAME, args.out, args.quick)
    write_result(path, NAME, settings, rows, environment=environment(packages=("tensorboard",)))


if __name__ == "__main__":
    main()
