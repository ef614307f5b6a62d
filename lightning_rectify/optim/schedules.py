r"""Learning rates that rise and fall with the number of updates, as translation models train with.

Update number :math:`t = 1, 2, \dots` is made with the rate that a schedule gives for :math:`t`; torch's ``last_epoch``
is then :math:`t - 1`, the updates made before. So the first update of a warmup from 0 over W updates has 1/W of the
rate, not none of it, and update W is the first with all of it.

Each rate is a closed form of :math:`t` and of the group's own rate: nothing adds up from step to step, and a schedule
that goes on from a ``state_dict`` is bit for bit the one that never stopped. As with torch's own schedules, the state
dict holds the arguments as well.

Step them once an update: in Lightning, ``"interval": "step"`` (``lr_scheduler_interval="step"`` of the package's
modules).
"""

import math
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from lightning_rectify.arguments import check_least, check_types


class _ClosedForm(LRScheduler):
    """A schedule that is a function of the update's number alone."""

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group for the update that comes next."""
        groups = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        return [self._rate(base, self.last_epoch + 1, group) for base, group in groups]

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        """The rate of update number ``step``, from 1, for a group that began with the rate ``base``."""
        raise NotImplementedError


class LinearWarmup(_ClosedForm):
    r"""From a part of the rate to all of it, in a straight line; constant from then on.

    .. math:: \eta_t = \eta \left(s + (1 - s) \min(1, t / W)\right)

    with W = ``warmup_steps``, s = ``start_factor`` and the group's own rate :math:`\eta`.

    Args:
        optimizer: any; each of its groups keeps a rate of its own.
        warmup_steps: updates until the full rate, at least 0; 0 is no warmup.
        start_factor: part of the rate from which the line starts (at t = 0, before the first update), in [0, 1].

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.8)
        >>> schedule = LinearWarmup(optimizer, warmup_steps=4)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 3) for rate in rates]
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, start_factor: float = 0.0) -> None:
        check_types(LinearWarmup, locals())
        check_least(0, warmup_steps=warmup_steps)
        _check_part("start_factor", start_factor)
        self.warmup_steps, self.start_factor = warmup_steps, start_factor
        super().__init__(optimizer)

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        return base * _line(step, self.warmup_steps, self.start_factor)


class InverseSquareRoot(_ClosedForm):
    r"""A linear warmup, then a fall with the inverse square root of the update's number.

    .. math::
        \eta_t = \eta \left(s + (1 - s)\, t / W\right) \;\; (t \le W), \qquad \eta_t = \eta \sqrt{W / t} \;\; (t > W)

    The schedule of the Transformer (Vaswani et al. 2017, arXiv:1706.03762, section 5.3, equation 3), there with s = 0,
    W = 4000 and :math:`\eta = d^{-1/2} W^{-1/2}` for a model of width d. Without warmup
    :math:`\eta_t = \eta / \sqrt{t}`.

    Args:
        optimizer: any; each of its groups keeps a rate of its own, reached at update ``warmup_steps``.
        warmup_steps: updates W until the full rate, at least 0; 0 is no warmup.
        start_factor: part of the rate from which the line starts (at t = 0, before the first update), in [0, 1].

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, start_factor: float = 0.0) -> None:
        check_types(InverseSquareRoot, locals())
        check_least(0, warmup_steps=warmup_steps)
        _check_part("start_factor", start_factor)
        self.warmup_steps, self.start_factor = warmup_steps, start_factor
        super().__init__(optimizer)

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        if step <= self.warmup_steps:
            return base * _line(step, self.warmup_steps, self.start_factor)
        return base * math.sqrt(max(self.warmup_steps, 1) / step)


class LinearDecay(_ClosedForm):
    r"""A linear warmup, then a straight line down to ``final_lr`` at update ``total_steps``; constant from then on.

    .. math::
        \eta_t = \eta_0 + (\eta - \eta_0)\, t / W \;\; (t \le W), \qquad
        \eta_t = \eta_T + (\eta - \eta_T) \frac{T - t}{T - W} \;\; (W < t \le T)

    with W = ``warmup_steps``, T = ``total_steps``, :math:`\eta_0` = ``start_lr`` and :math:`\eta_T` = ``final_lr``.
    The IWSLT translation runs of the RAdam paper (arXiv:1908.03265, and its authors' recipes) go from 3e-4 to 1e-9 over
    70,000 updates; Adam warms up over 4,000 of them from 1e-8, RAdam does not.

    Args:
        optimizer: any; each of its groups keeps a rate of its own.
        total_steps: update T from which on the rate is ``final_lr``, above ``warmup_steps``.
        warmup_steps: updates W until the full rate, at least 0; 0 is no warmup.
        final_lr: the last rate of every group (a rate, not a factor), at least 0 and at most each group's rate.
        start_lr: the rate from which the warmup starts (at t = 0, before the first update), in the same range.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        final_lr: float = 0.0,
        start_lr: float = 0.0,
    ) -> None:
        check_types(LinearDecay, locals())
        check_least(0, warmup_steps=warmup_steps)
        if not total_steps > warmup_steps:
            raise ValueError(
                f"Expected argument `total_steps` to be above `warmup_steps`, which is {warmup_steps}, but got "
                f"{total_steps!r}."
            )
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.final_lr, self.start_lr = final_lr, start_lr
        lowest = min(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        for name, value in (("final_lr", final_lr), ("start_lr", start_lr)):
            if not 0.0 <= value <= lowest:  # above it a "decay" would rise
                raise ValueError(
                    f"Expected argument `{name}` to be in [0, {lowest:g}], {lowest:g} being the smallest rate of the "
                    f"optimizer's groups, but got {value!r}."
                )
        super().__init__(optimizer)

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        if step <= self.warmup_steps:
            return self.start_lr + (base - self.start_lr) * (step / self.warmup_steps)
        left = max(0, self.total_steps - step) / (self.total_steps - self.warmup_steps)
        return self.final_lr + (base - self.final_lr) * left


class UntunedLinearWarmup(_ClosedForm):
    r"""A linear warmup whose length follows from Adam's second moment.

    .. math:: \eta_t = \eta \min\left(1, \frac{1 - \beta_2}{2} t\right)

    A rule of thumb of Ma and Yarats 2019 (arXiv:1910.04209), over :math:`2/(1-\beta_2)` updates: with it, they find,
    Adam trains much as RAdam does. It holds back :math:`1/(1-\beta_2) - 1/2` updates' worth of the rate, where
    ``effective_warmup`` of ``optim/variance.py`` says how much RAdam does. On top of RAdam it warms up twice.

    Args:
        optimizer: one whose groups have ``betas``, such as Adam; each group is warmed up by its own.

    Raises:
        ValueError: for a group without ``betas``, or whose second one is not in [0, 1).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_types(UntunedLinearWarmup, locals())
        _check_betas(optimizer, type(self).__name__)
        super().__init__(optimizer)

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        return base * min(1.0, (1.0 - float(group["betas"][1])) / 2.0 * step)


class UntunedExponentialWarmup(_ClosedForm):
    r"""An exponential warmup whose length follows from Adam's second moment.

    .. math:: \eta_t = \eta \left(1 - e^{-(1 - \beta_2) t}\right)

    The other rule of thumb of Ma and Yarats 2019 (arXiv:1910.04209). On top of RAdam it warms up twice.

    Args:
        optimizer: one whose groups have ``betas``, such as Adam; each group is warmed up by its own.

    Raises:
        ValueError: for a group without ``betas``, or whose second one is not in [0, 1).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_types(UntunedExponentialWarmup, locals())
        _check_betas(optimizer, type(self).__name__)
        super().__init__(optimizer)

    def _rate(self, base: float | Tensor, step: int, group: dict[str, Any]) -> float | Tensor:
        return base * -math.expm1((float(group["betas"][1]) - 1.0) * step)


def _line(step: int, length: int, start: float) -> float:
    return start + (1.0 - start) * step / length if step < length else 1.0


def _check_part(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Expected argument `{name}` to be in [0, 1] but got {value!r}.")


def _check_betas(optimizer: Optimizer, schedule: str) -> None:
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if betas is None:
            raise ValueError(
                f"Expected argument `optimizer` of {schedule} to have `betas` in each parameter group, as Adam has, "
                f"but got {type(optimizer).__name__} without."
            )
        if not 0.0 <= float(betas[1]) < 1.0:
            raise ValueError(f"Expected `betas[1]` of each group for {schedule} to be in [0, 1) but got {betas[1]!r}.")
