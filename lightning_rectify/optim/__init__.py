"""Rectified Adam, the theory of its adaptive learning rate, schedules; torch only."""

from lightning_rectify.optim.frozen_start import FrozenStartAdam
from lightning_rectify.optim.rectified_adam import RectifiedAdam
from lightning_rectify.optim.schedules import (
    InverseSquareRoot,
    LinearDecay,
    LinearWarmup,
    UntunedExponentialWarmup,
    UntunedLinearWarmup,
)

__all__ = [
    "FrozenStartAdam",
    "InverseSquareRoot",
    "LinearDecay",
    "LinearWarmup",
    "RectifiedAdam",
    "UntunedExponentialWarmup",
    "UntunedLinearWarmup",
]
