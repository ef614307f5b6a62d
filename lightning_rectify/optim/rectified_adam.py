"""RectifiedAdam: torch's RAdam, fused, with the paper's choices as arguments."""

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_rectify.arguments import check_types
from lightning_rectify.optim._options import check_options, checked_params, rectification_of, rule_of
from lightning_rectify.optim._updates import (
    LOW_PRECISION,
    Tensors,
    foreach_update,
    fused_serves,
    fused_update,
    loop_update,
    on_device_update,
    working_copies,
    write_back,
)
from lightning_rectify.optim.variance import Order, sma_length

EarlyPhase = Literal["momentum", "skip", "adam"]


class RectifiedRate(NamedTuple):
    """What a step of :class:`RectifiedAdam` did to the parameters of one group that share a step count.

    Attributes:
        group: index of the parameter group.
        step: their step count t, after the step.
        rho: length of the simple average, rho_t.
        rectification: r_t; 0 in the early phase.
        phase: "rectified", "momentum", "skip" or "adam".
        effective_lr: what multiplies m_hat * psi (rectified: lr * r_t; adam: lr) or m_hat (momentum: lr); 0 for a
            skipped step.
        tensors: how many parameter tensors.
    """

    group: int
    step: int
    rho: float
    rectification: float
    phase: str
    effective_lr: float
    tensors: int


class RectifiedAdam(torch.optim.RAdam):
    r"""Adam whose adaptive learning rate has the same variance at every step.

    .. math::
        \theta_t = \theta_{t-1} - \eta\, \hat m_t\, r_t \frac{\sqrt{1-\beta_2^t}}{\sqrt{v_t}+\epsilon}
        \;\;\mathrm{if}\; \rho_t > \mathrm{threshold},\qquad
        \theta_t = \theta_{t-1} - \eta\, \hat m_t \;\;\mathrm{(or\ no\ step)\ before}

    with :math:`\eta` ``lr``, :math:`\beta` ``betas``, :math:`\epsilon` ``eps`` and :math:`\rho_t`, :math:`r_t` of
    :mod:`lightning_rectify.optim.variance`. RAdam paper (arXiv:1908.03265), algorithm 2. Defaults, state keys and
    results are those of ``torch.optim.RAdam``; state dicts load in both directions. What differs from torch's:

    - rectified steps use torch's fused Adam kernels wherever those serve (see ``fused``);
    - the gate :math:`\rho_t >` ``threshold`` and :math:`r_t` are computed in float64 also under ``torch.compile`` and
      ``capturable`` (torch's float32 rectifies wrong steps from beta2 = .9995 on);
    - float16 and bfloat16 parameters keep float32 moments (in bfloat16 the second moment stalls);
    - a zero gradient with ``eps=0`` makes no NaN;
    - a ``beta2`` that never rectifies is refused.

    The paper rectifies from :math:`\rho_t > 4` and decouples weight decay; the authors' released code tests
    :math:`\rho_t \ge 5` (never different from torch's > 5), decouples, and since 2021 skips early steps.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, not negative; a 1-element tensor is allowed.
        betas: decays of first and second moment, in [0, 1); the second large enough that steps are rectified
            (above 2/3 with the default threshold).
        eps: added to the square root of the uncorrected second moment, not negative.
        weight_decay: not negative.
        decoupled_weight_decay: shrink weights by lr * weight_decay (the paper's, AdamW's) in place of adding
            weight_decay * weight to the gradient (torch's default).
        early_phase: before the first rectified step, "momentum" takes plain bias-corrected momentum steps (the paper,
            torch), which scale with the gradient; "skip" moves nothing and decays nothing while both moments fill (the
            authors' released default); "adam" takes Adam's steps, whose variance is then infinite or large: the paper's
            control experiment (appendix C, table 3), not for use.
        threshold: steps with :math:`\rho_t` above it are rectified; at least 4 ("exact": at least 2).
        rectifier: "first_order" (the paper's), or "exact": :math:`r_t` from the exact variance (ours), which damps the
            first rectified steps less (step 6: .0379 in place of .0258).
        foreach: multi-tensor operations; None: where the fused kernel does not serve.
        fused: torch's fused kernels for rectified steps. None: for dense real or complex parameters on CPU or CUDA. If
            True, a GradScaler leaves unscaling to the optimizer (as for torch's fused Adam), and Lightning then refuses
            gradient clipping under 16-bit mixed precision.
        maximize: ascend.
        capturable: keep step counts on the device, for CUDA graphs.
        differentiable: let autograd run through the step.

    Raises:
        ValueError: for an argument out of its range, or options that exclude each other.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = RectifiedAdam([weight], lr=0.01)
        >>> weight.grad = torch.tensor([0.5])
        >>> for _ in range(6):
        ...     optimizer.step()
        >>> optimizer.rates[0].phase, round(optimizer.rates[0].rectification, 4)
        ('rectified', 0.0258)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        early_phase: EarlyPhase = "momentum",
        threshold: float = 5.0,
        rectifier: Order = "first_order",
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_types(RectifiedAdam, locals())
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
            "early_phase": early_phase,
            "threshold": threshold,
            "rectifier": rectifier,
            "fused": fused,
        }
        self._rates: list[RectifiedRate] = []
        # Past RAdam's constructor, which knows neither our options nor our checks.
        super(torch.optim.RAdam, self).__init__(checked_params(params), defaults)
        self._step_supports_amp_scaling = bool(fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it does not state are the constructor's.

        Raises:
            ValueError: for an option out of its range.
        """
        super().add_param_group(param_group)
        try:
            check_options(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def rates(self) -> list[RectifiedRate]:
        """One :class:`RectifiedRate` per group and step count: what the latest step did.

        Kept by the step itself. A compiled or capturable step leaves no Python object behind; after one, the numbers
        are worked out from the counts and the present ``lr`` (on a GPU the host waits for it).
        """
        counts: list[dict[float, int]] = []
        for group in self.param_groups:
            counts.append({})
            for param in group["params"]:
                if param in self.state:
                    step = float(self.state[param]["step"])
                    counts[-1][step] = counts[-1].get(step, 0) + 1
                    if any(rate.step == step for rate in self._rates):
                        return self._rates
        self._rates = [
            _rate(index, group, step, rectification_of(group, step), tensors)
            for index, group in enumerate(self.param_groups)
            for step, tensors in counts[index].items()
        ]
        return self._rates

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A GradScaler sets these two where fused=True; as for the unfused optimizers, an overflow costs one host read.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return loss
        on_device = torch.compiler.is_compiling() or any(group["capturable"] for group in self.param_groups)
        rates: list[RectifiedRate] = []
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for index, group in enumerate(self.param_groups):
                for step, batch in self._batches(group, by_count=not on_device):
                    if step is None:
                        work = working_copies(batch)
                        on_device_update(work, rule_of(group, work.params[0].dtype))
                        write_back(batch, work)
                    else:
                        rates.append(_update(index, group, step, batch, scale))
        self._rates = rates
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a RectifiedAdam or a ``torch.optim.RAdam``.

        Args:
            state_dict: from ``state_dict()``. Options that torch's RAdam does not know keep this optimizer's values.
        """
        super().load_state_dict(state_dict)
        # torch casts moments to the parameter's dtype and, where fused is set, moves counts to its device.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, group, param in zip(saved, *self._flat_parameters(), strict=True):
            state, original = self.state.get(param), state_dict["state"].get(key)
            if not state or not original:
                continue
            if not group["capturable"]:
                state["step"] = state["step"].cpu()
            if param.dtype in LOW_PRECISION:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = original[name].to(device=param.device, dtype=torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rates = []
        for group in self.param_groups:
            for option in ("early_phase", "threshold", "rectifier", "fused"):
                group.setdefault(option, self.defaults[option])
        self._step_supports_amp_scaling = any(group["fused"] for group in self.param_groups)

    def _flat_parameters(self) -> tuple[list[dict[str, Any]], list[Tensor]]:
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        return [group for group, _ in pairs], [param for _, param in pairs]

    def _batches(self, group: dict[str, Any], by_count: bool) -> list[tuple[float | None, Tensors]]:
        """The tensors that have a gradient, those of one device, dtype and (``by_count``) next step together."""
        batches: dict[tuple[float | None, torch.device, torch.dtype], Tensors] = {}
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "RectifiedAdam expected dense gradients but got a sparse one; use a dense layer (sparse=False)."
                )
            state = self.state[param]
            if not state:
                _fill_state(state, param, group["capturable"])
            step = state["step"].item() + 1.0 if by_count else None
            batch = batches.setdefault((step, param.device, param.dtype), Tensors([], [], [], [], []))
            entry = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            for column, tensor in zip(batch, entry, strict=True):
                column.append(tensor)
        return [(step, batch) for (step, _, _), batch in batches.items()]


def _fill_state(state: dict[str, Any], param: Tensor, capturable: bool) -> None:
    # Counts on the CPU are read without waiting for a device.
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if capturable else "cpu")
    dtype = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _update(index: int, group: dict[str, Any], step: float, batch: Tensors, scale: Tensor | None) -> RectifiedRate:
    """Take the step of one batch; returns what it did."""
    # The one is wrapped once: for counts on the CPU foreach is a loop that would wrap a number each time.
    torch._foreach_add_(batch.steps, torch.tensor(1.0), alpha=1.0)
    if scale is not None:
        torch._foreach_div_(batch.grads, scale.to(batch.grads[0].device))
    rect = rectification_of(group, step)
    work = working_copies(batch)
    factor = 1.0 if rect == 0.0 and group["early_phase"] == "adam" else rect
    # Unless the user chose a way, adaptive steps are fused.
    fused = group["fused"] or (group["fused"] is None and group["foreach"] is None and not group["differentiable"])
    if factor > 0.0 and fused and fused_serves(work):
        update = fused_update
    elif group["differentiable"] or (group["foreach"] is False and not group["fused"]):
        update = loop_update
    else:
        update = foreach_update
    update(work, rule_of(group, work.params[0].dtype), step, factor)
    write_back(batch, work)
    return _rate(index, group, step, rect, len(batch.params))


def _rate(index: int, group: dict[str, Any], step: float, rect: float, tensors: int) -> RectifiedRate:
    phase = "rectified" if rect > 0.0 else group["early_phase"]
    share = {"rectified": rect, "momentum": 1.0, "skip": 0.0, "adam": 1.0}[phase]
    rho = sma_length(step, group["betas"][1])
    return RectifiedRate(index, int(step), rho, rect, phase, float(group["lr"]) * share, tensors)
