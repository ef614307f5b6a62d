"""A quiet trainer, what a run has become, and where two of those differ."""

import tempfile
from importlib import import_module
from pathlib import Path

import torch

from lightning_rectify._lightning import NAME, Trainer

CSVLogger = import_module(f"{NAME}.loggers").CSVLogger

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 4,
}
# What a checkpoint says about the run's surroundings, not about what was trained.
_SURROUNDINGS = ("callbacks", "loops", "pytorch-lightning_version", "hparams_name", "hyper_parameters")


def trainer(**options):
    return Trainer(**{**QUIET, **options})


def snapshot(fit):
    """What a checkpoint of the run would hold (weights, moments, schedules, random state, counts), read safely.

    Collective under DDP.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = fit.strategy.broadcast(str(Path(folder) / "now.ckpt"))
        fit.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        fit.strategy.barrier()  # rank 0's folder goes when all have read
    return {key: value for key, value in saved.items() if key not in _SURROUNDINGS}


def differences(a, b, path=""):
    """Where two nested states are not bit for bit equal: a list of paths, empty if they are."""
    if isinstance(a, dict) and isinstance(b, dict):
        lonely = [f"{path}/{key} on one side only" for key in a.keys() ^ b.keys()]
        return lonely + [found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path} has lengths {len(a)} and {len(b)}"]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]


def largest_difference(a, b):
    """Over all numbers of two state dicts with the same keys and shapes."""
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a if a[key].numel())


def weights(module):
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
