"""Adam whose second moment is collected before the weights move: Adam-2k of the RAdam paper."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.optim._options import checked_params


class FrozenStartAdam(Optimizer):
    r"""Adam that first only looks: for ``frozen_steps`` steps the second moment is updated and nothing else.

    The RAdam paper's control experiment "Adam-2k" (arXiv:1908.03265, section 3.1, there with 2,000 steps): when the
    weights begin to move, the variance of the adaptive rate is small already. Weight decay is decoupled
    (arXiv:1711.05101).

    With n = ``frozen_steps`` and t counted from the first step:

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \qquad t > n: \; m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \;
        \theta_t = \theta_{t-1} - \eta \left( \frac{m_t / (1-\beta_1^{t-n})}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon} +
        \lambda \theta_{t-1} \right)

    A learning rate schedule counts the frozen steps like any others: the authors let theirs begin 2,000 steps earlier.

    Args:
        params: parameters, or groups of them.
        lr: :math:`\eta`, at least 0.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        weight_decay: :math:`\lambda`, at least 0.
        frozen_steps: n, at least 0; 0 is AdamW.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        frozen_steps: int = 2000,
    ) -> None:
        check_types(FrozenStartAdam, locals())
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "frozen_steps": frozen_steps}
        check_least(0, **numbers)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected argument `betas` to be in [0, 1) each but got {betas}.")
        super().__init__(checked_params(params), {**numbers, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see :meth:`torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        moved = step - group["frozen_steps"]
        if moved <= 0:
            return
        state["exp_avg"].lerp_(grad, 1 - beta1)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**moved))
