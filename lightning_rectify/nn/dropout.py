"""Dropout, fast on the CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Chances are counted in steps of 1/_STEPS: a word of 64 random bits decides for four features.
_STEPS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout`` for training, with cheaper random numbers on the CPU.

    On the CPU torch draws a float for each feature, one after the other: a fifth of a small Transformer's training
    step, and six times what it takes here (benchmarks/translation_speed.py). 16 random bits decide on each, so ``p`` is
    rounded to a multiple of 1/65,536, and what stays is scaled by the rounded chance, so that the expectation is x. The
    bits are those of torch's generator, for any number of threads. On other devices, and in graphs of
    ``torch.compile``, it is torch's own.

    Args:
        x: floating point, any shape.
        p: probability by which a feature is dropped, in [0, 1).

    Returns:
        Of x's shape and type.
    """
    if p == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(x.shape)
    dropped = min(round(p * _STEPS), _STEPS - 1)
    kept = (bits >= dropped - _STEPS // 2).to(x.dtype)
    return x * kept.mul_(_STEPS / (_STEPS - dropped))


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` by :func:`dropout`.

    Args:
        p: probability by which a feature is dropped while training, in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:
        """Of the input's shape and type."""
        return dropout(input, self.p) if self.training and self.p < 1.0 else super().forward(input)
