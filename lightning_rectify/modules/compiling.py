"""What ``torch.compile`` can be trusted with."""

from functools import cache

import torch
from torch import Tensor, nn


@cache
def notices_frozen_weights() -> bool:
    """Whether compiled code is compiled anew once a weight needs a gradient that needed none before.

    torch 2.6 to 2.8 reuse the code without a gradient and say nothing, torch 2.14 does not. Measured and not read off
    the version; once a process, a second or two.
    """
    # The run's random state stays as it is; gradients are recorded also inside a validation.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        network = _Layer()
        compiled = torch.compile(network, backend="aot_eager")
        found = []
        for needed in (False, True):
            network.requires_grad_(needed)
            found.append(compiled(torch.zeros(2, 1)).requires_grad == needed)
    return all(found)


class _Layer(nn.Module):
    """A module that is no ``nn.Linear`` itself: of those torch's code is always right."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
