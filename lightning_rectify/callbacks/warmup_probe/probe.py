"""The probe: gradients of many streams at frozen weights, and what their second moments say about warmup."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rectify._lightning import LightningModule, Trainer
from lightning_rectify.arguments import check_above, check_least
from lightning_rectify.callbacks._sharded import refuse_sharded
from lightning_rectify.callbacks._untouched import random_state, untouched
from lightning_rectify.callbacks.warmup_probe.advice import LayerProbe, PlayerProbe, advise
from lightning_rectify.callbacks.warmup_probe.gradients import (
    GradientMaker,
    LossFunction,
    Player,
    find_players,
    silent,
)
from lightning_rectify.callbacks.warmup_probe.result import WarmupProbeResult
from lightning_rectify.callbacks.warmup_probe.stream_variance import StreamVariance, bias, ideal_medians
from lightning_rectify.callbacks.warmup_probe.streams import Streams
from lightning_rectify.optim.sampling import CoordinateSample
from lightning_rectify.optim.variance import log_adaptive_rate_variance, relative_variance, sma_length

_WORST = 0.9


@dataclass(frozen=True)
class ProbeOptions:
    """The arguments of :class:`WarmupProbe` that say how to measure; see there."""

    streams: int = 16
    steps: int = 100
    sample_size: int | None = 1024
    beta2: float | None = None
    tolerance: float = 2.0
    worse_than: float = 2.0
    loss: LossFunction | Mapping[str, LossFunction] | None = None
    accumulate: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(0, seed=self.seed)
        check_least(1, steps=self.steps, sample_size=self.sample_size, accumulate=self.accumulate)
        check_least(2, streams=self.streams)
        check_above(1, tolerance=self.tolerance, worse_than=self.worse_than)
        if self.beta2 is not None and not 0.0 < self.beta2 < 1.0:
            raise ValueError(f"Expected argument `beta2` to be in (0, 1), or None, but got {self.beta2!r}.")
        if isinstance(self.loss, Mapping) and not self.loss:
            raise ValueError("Expected argument `loss` to be a function, or a dict of them by player, but got {}.")


def measure(trainer: Trainer, module: LightningModule, options: ProbeOptions) -> WarmupProbeResult:
    """Probe a module inside ``fit``, before its first batch; module, data and random state stay as they are.

    On every process; see :class:`WarmupProbe` for what several of them do.

    Args:
        trainer: fitting the module.
        module: at the weights to probe.
        options: how.

    Raises:
        ValueError: as :class:`WarmupProbe` says.
    """
    refuse_sharded([module], "WarmupProbe")
    begin = time.perf_counter()
    rank_seed = int(np.random.SeedSequence([options.seed, trainer.global_rank]).generate_state(1)[0])
    loader = trainer.train_dataloader
    players = find_players(module, trainer, options.loss, options.beta2)
    accumulate = options.accumulate or _accumulated(trainer, module)
    with untouched(module), random_state(rank_seed, module.device, [loader, getattr(trainer, "datamodule", None)]):
        streams = Streams(loader, options.streams, options.steps * accumulate, options.seed, trainer.global_rank)
        runs = [_PlayerRun(player, options) for player in players]
        maker = GradientMaker(module, trainer)
        with silent(module, trainer):
            batches = iter(streams)
            for _ in range(options.steps):
                for stream in range(options.streams):
                    window = [maker.move(batch) for batch in islice(batches, accumulate)]
                    for run in runs:
                        run.take(stream, maker.mean_gradient(run.player, window), trainer)
                for run in runs:
                    run.variance.end_step()
            del batches  # and its workers
    probes = {run.player.name: run.finish() for run in runs}
    count = options.steps * options.streams * len(runs) * accumulate
    return WarmupProbeResult(probes, options.streams, count, time.perf_counter() - begin, streams.notes)


def _accumulated(trainer: Trainer, module: LightningModule) -> int:
    """Batches that make one gradient in training."""
    if module.automatic_optimization:
        return int(trainer.accumulate_grad_batches)
    own = getattr(module, "accumulate", 1)
    return own if isinstance(own, int) else 1


class _PlayerRun:
    """What is measured of one player."""

    def __init__(self, player: Player, options: ProbeOptions) -> None:
        self.player, self.options = player, options
        self._layers: dict[str, list[int]] = {}
        self._shapes = list(player.parameters.values())
        for index, name in enumerate(player.parameters):
            self._layers.setdefault(_layer(name), []).append(index)
        self._samples = [
            CoordinateSample([self._shapes[i] for i in indices], options.sample_size, options.seed)
            for indices in self._layers.values()
        ]
        self._counts = [sum(self._shapes[i].numel() for i in indices) for indices in self._layers.values()]
        sizes = [len(sample) for sample in self._samples]
        weights = [count / size for count, size in zip(self._counts, sizes, strict=True)]
        device = self._shapes[0].device
        self.variance = StreamVariance(sizes, weights, options.streams, options.steps, player.beta2, device)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._shapes) else torch.float32
        self._read = torch.empty(sum(sizes), dtype=dtype, device=device)

    def take(self, stream: int, gradients: list[Tensor], trainer: Trainer) -> None:
        """Read the sampled coordinates of a gradient; ranks average them, as DDP would all coordinates."""
        parts = self._read.split([len(sample) for sample in self._samples])
        for sample, indices, out in zip(self._samples, self._layers.values(), parts, strict=True):
            sample.read([gradients[i] for i in indices], out)
        read = self._read
        if trainer.world_size > 1:
            read = torch.as_tensor(trainer.strategy.reduce(read.clone(), reduce_op="mean"))
        self.variance.update(stream, read)

    def finish(self) -> PlayerProbe:
        """The measurements, corrected for the few streams, beside theory."""
        player, options, variance = self.player, self.options, self.variance
        if not variance.finite:
            raise ValueError(
                f"Expected the gradient of player {player.name!r} to be finite at the weights that WarmupProbe finds "
                "but got NaN or infinity. Look at the loss, or at the precision."
            )
        ideal = ideal_medians(options.streams, options.steps, player.beta2, options.seed)
        correction = bias(ideal.curves, player.beta2)
        curves = variance.curves()
        # 0 * infinity, of a gradient without noise in the first two steps, is infinite too: theory says so of all.
        curves[:2] = torch.where(correction.isinf()[..., None], torch.inf, curves[:2] * correction[..., None])
        factors = variance.factors() / ideal.factor
        middle, worst = variance.medians(factors).tolist(), variance.medians(factors, _WORST).tolist()
        zero, dead = variance.shares().tolist()
        names = ["whole", *self._layers]
        coordinates = [sum(self._counts), *self._counts]
        sampled = [len(self._read), *(len(sample) for sample in self._samples)]
        layers = [
            LayerProbe(
                name=name, player=player.name, coordinates=coordinates[i], sampled=sampled[i],
                relative_variance=curves[0, :, i].numpy(), log_variance=curves[1, :, i].numpy(),
                unseen_share=curves[2, :, i].numpy(), zero_share=zero[i], dead_share=dead[i],
                factor=middle[i], worst_factor=worst[i],
            )
            for i, name in enumerate(names)
        ]  # fmt: skip
        step = torch.arange(1, options.steps + 1)
        rho = sma_length(step, player.beta2)
        probe = PlayerProbe(
            name=player.name, beta2=player.beta2, tolerance=options.tolerance, step=step.numpy(),
            theory=torch.where(rho > 2.0, relative_variance(rho.clamp(min=2.1)), torch.inf).numpy(),
            theory_log=log_adaptive_rate_variance(rho).numpy(), bias=correction.numpy(), whole=layers[0],
            layers=layers[1:], notes=player.notes,
        )  # fmt: skip
        advise(probe, options.worse_than)
        return probe


def _layer(name: str) -> str:
    """The module that a parameter belongs to, also through a parametrization such as spectral normalization."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0] or name


@contextmanager
def lent(module: LightningModule, datamodule: Any) -> Iterator[None]:
    """Inside this context the module may be fitted by another trainer; it goes back to its own, and to its device."""
    device, own = module.device, module._trainer
    its_own = getattr(datamodule, "trainer", None)
    place = {name: value.device for name, value in _tensors(module)}
    try:
        with untouched(module), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            try:
                yield
            finally:
                if any(value.device != place.get(name, value.device) for name, value in _tensors(module)):
                    module.to(device)
    finally:
        module._trainer = own
        if datamodule is not None:
            datamodule.trainer = its_own


def _tensors(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
