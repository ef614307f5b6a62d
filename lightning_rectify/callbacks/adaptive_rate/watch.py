"""Reading one optimizer: after each real step a sample of its second moments and gradients goes into a buffer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rectify.callbacks.adaptive_rate.quantities import Block
from lightning_rectify.optim.moments import SecondMoment, rectifier_options, second_moments
from lightning_rectify.optim.sampling import CoordinateSample

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_BUFFER_NUMBERS = 2**24  # 64 MiB of float32 for each of v and g


@dataclass
class Unit:
    """Parameters that make one line of the dashboard: a group, or a layer of it.

    Attributes:
        key: its name in the log keys.
        group: index of the parameter group.
        moments: their second moments.
        sample: the coordinates that are read.
        columns: where they stand in the buffer.
        tensors: where their counts stand among all counts read.
    """

    key: str
    group: int
    moments: list[SecondMoment]
    sample: CoordinateSample
    columns: slice
    tensors: slice

    @property
    def low_precision(self) -> bool:
        """Whether a second moment is kept in 16 bits."""
        return any(moment.value.dtype in _LOW_PRECISION for moment in self.moments)


class OptimizerWatch:
    """Buffers samples of one optimizer and hands them out as blocks.

    Nothing here waits for a device until :meth:`blocks` is called.

    Args:
        optimizer: the unwrapped optimizer.
        names: a name per parameter.
        keys: the group's key for each parameter group.
        per_layer: whether each layer makes a unit beside its group.
        sample_size: coordinates a unit; None for all.
        rows: points to buffer at most.
        seed: of the samples.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        keys: list[str],
        per_layer: bool,
        sample_size: int | None,
        rows: int,
        seed: int,
    ) -> None:
        self.optimizer = optimizer
        self.names, self.keys, self.per_layer = names, keys, per_layer
        self._sample_size, self._most_rows, self._seed = sample_size, rows, seed
        self.units: list[Unit] = []
        self._states = 0
        self._rows = self._capacity = 0
        self._lr: list[list[float | Tensor]] = []
        self._last_step: dict[str, float] = {}
        #: set where the optimizer turned out to keep no second moment
        self.silent = False
        #: real steps so far, counted by the hook; a resumed optimizer goes on where it stood
        self.calls = max((int(moment.step) for moment in second_moments(optimizer, names)), default=0)

    @property
    def stale(self) -> bool:
        """Whether parameters took their first step, or groups were added, since the samples were drawn."""
        return self._states != len(self.optimizer.state)

    @property
    def full(self) -> bool:
        """Whether the next point has no room."""
        return self._rows >= self._capacity

    def layer_keys(self) -> list[str]:
        """The units there will be once every parameter took a step, in order."""
        units = []
        for key, group in zip(self.keys, self.optimizer.param_groups, strict=False):
            units.append(key)
            if self.per_layer:
                units.extend(dict.fromkeys(f"{key}/{_layer(self.names.get(p, '?'))}" for p in group["params"]))
        return units

    def rebuild(self) -> None:
        """Draw the samples anew for all parameters that took a step."""
        moments = second_moments(self.optimizer, self.names)
        members: dict[tuple[str, int], list[SecondMoment]] = {}
        for moment in moments:
            key = self.keys[moment.group] if moment.group < len(self.keys) else f"pg{moment.group}"
            members.setdefault((key, moment.group), []).append(moment)
            if self.per_layer:
                members.setdefault((f"{key}/{_layer(moment.name)}", moment.group), []).append(moment)
        self.units, column, tensor = [], 0, 0
        for (key, group), entries in members.items():
            sample = CoordinateSample([m.value for m in entries], self._sample_size, self._seed)
            columns = slice(column, column + len(sample))
            self.units.append(Unit(key, group, entries, sample, columns, slice(tensor, tensor + len(entries))))
            column, tensor = columns.stop, tensor + len(entries)
        self._states = len(self.optimizer.state)
        self._capacity = max(1, min(self._most_rows, _BUFFER_NUMBERS // max(column, 1)))
        self._rows, self._lr = 0, []
        if not moments:
            return
        dtype = torch.float64 if any(m.value.dtype == torch.float64 for m in moments) else torch.float32
        device = moments[0].value.device
        self._readings = torch.empty(2, self._capacity, column, dtype=dtype, device=device)
        first = moments[0].step
        self._counts = torch.zeros(
            self._capacity, tensor, dtype=torch.float32, device=first.device if isinstance(first, Tensor) else "cpu"
        )

    def record(self) -> None:
        """Read the sampled coordinates of the step just taken."""
        row = self._rows
        for unit in self.units:
            unit.sample.read([m.value for m in unit.moments], self._readings[0, row, unit.columns])
            unit.sample.read([_gradient(m) for m in unit.moments], self._readings[1, row, unit.columns])
            counts = [torch.as_tensor(m.step, dtype=torch.float32, device=self._counts.device) for m in unit.moments]
            torch.stack(counts, out=self._counts[row, unit.tensors])
        self._lr.append([_rate(group["lr"]) for group in self.optimizer.param_groups])
        self._rows += 1

    def blocks(self, reduce: Callable[[Tensor], Tensor]) -> Iterator[tuple[Unit, Block]]:
        """Empty the buffer: one block a unit, without points of steps that a gradient scaler skipped.

        Args:
            reduce: sums a tensor over processes, maybe in place; called once, and only where state is sharded.
        """
        if not self._rows:
            return
        readings, rows = self._readings[:, : self._rows], self._rows
        if any(unit.sample.sharded for unit in self.units):
            # Replicas of a shard, and whole tensors beside it, are read on several processes: count them along.
            held = torch.cat([unit.sample.held for unit in self.units]).to(readings)
            total = reduce(torch.cat([readings.flatten(0, 1), held[None]]))
            readings = (total[:-1] / total[-1]).view_as(readings)
        values, counts = readings.cpu().numpy(), self._counts[:rows].cpu().numpy()
        rates = np.array([[float(lr) for lr in row] for row in self._lr])
        self._rows, self._lr = 0, []
        for unit in self.units:
            t = counts[:, unit.tensors]
            step = t.max(axis=1)
            reached = np.maximum.accumulate(np.concatenate([[self._last_step.get(unit.key, 0.0)], step]))
            new = step > reached[:-1]
            if not new.any():
                continue
            self._last_step[unit.key] = float(step.max())
            moment = unit.moments[0]
            yield (
                unit,
                Block(
                    v=values[0][new][:, unit.columns],
                    g=values[1][new][:, unit.columns],
                    t=t[new][:, unit.sample.owners],
                    lr=rates[new][:, unit.group],
                    beta2=moment.beta2,
                    eps=moment.eps,
                    corrected=moment.corrected,
                    eps_before_correction=moment.eps_before_correction,
                    rectifier=rectifier_options(self.optimizer, self.optimizer.param_groups[unit.group]),
                ),
            )


def group_keys(optimizers: list[Optimizer]) -> list[list[str]]:
    """A key for each group of each optimizer.

    Raises:
        ValueError: if two groups have one name.
    """
    single = sum(len(optimizer.param_groups) for optimizer in optimizers) == 1
    keys = []
    for i, optimizer in enumerate(optimizers):
        prefix = f"optimizer{i}/" if len(optimizers) > 1 else ""
        fallback = [f"{prefix}pg{j}" for j in range(len(optimizer.param_groups))]
        names = [group.get("name") for group in optimizer.param_groups]
        keys.append(["model" if single and not name else name or pg for name, pg in zip(names, fallback, strict=True)])
    flat = [key for group in keys for key in group]
    if repeated := sorted({key for key in flat if flat.count(key) > 1}):
        raise ValueError(f"Expected the `name` of each parameter group to be its own but got {repeated[0]!r} twice.")
    return keys


def _layer(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0] or name


def _gradient(moment: SecondMoment) -> Tensor | None:
    grad = moment.param.grad
    return grad.detach() if grad is not None else None


def _rate(lr: Any) -> float | Tensor:
    """A float, or for a rate on a device a copy that is read later."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.detach().clone()
    return float(lr)
