"""Looking at a network in the middle of training and leaving it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within this context the modules are in evaluation mode and nothing is recorded for gradients.

    Each submodule gets back the mode that it had: a frozen batch normalization stays in evaluation mode.

    Args:
        modules: any modules.

    Yields:
        Nothing.
    """
    # The attribute and not train(): modules override that to do more.
    modes = {part: part.training for module in modules for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
