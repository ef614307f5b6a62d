"""What runs on each of the two ranks."""

from functools import partial

import torch
from torch import nn

from lightning_rectify._lightning import Callback
from lightning_rectify.optim import RectifiedAdam
from tests.contract.rows import ROWS
from tests.helpers.training import snapshot, trainer, weights


class Noise(Callback):
    """Keeps what the first training batch drew: each dropout's mask, a game's latent noise, and a draw after it."""

    def __init__(self):
        self.masks, self.draw, self._handles = [], None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.draw is None:
            self._handles = [
                module.register_forward_hook(lambda _, __, output: self.masks.append(output.detach() == 0))
                for module in pl_module.modules()
                if isinstance(module, nn.Dropout) and module.p > 0 and module.training  # an average's rests
            ]
            if hasattr(pl_module, "generator"):  # of a game: the latent vectors
                keep = pl_module.generator.register_forward_pre_hook(
                    lambda _, inputs: self.masks.extend(part.detach() for part in inputs if _is_float(part))
                )
                self._handles.append(keep)

    def on_train_batch_end(self, *args):
        if self.draw is None:
            self.draw = torch.rand(4, generator=_copy_of_global_generator())  # looking does not move the state
        for handle in self._handles:
            handle.remove()


def _is_float(part):
    return isinstance(part, torch.Tensor) and part.is_floating_point()


def _copy_of_global_generator():
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def make(stem, noise=False, seed=0, **optimizer):
    """A row and its module, with optimizers and a schedule that change the weights at each step."""
    row = next(row for row in ROWS if row.stem == stem)
    module = row.make_module(
        noise=noise,
        seed=seed,
        **row.optimizers(partial(RectifiedAdam, **{"lr": 0.01, **optimizer})),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        lr_scheduler_interval="step",
    )
    return row, module


def train(stem, noise=False, batch_size=None, seed=0, stop=None, ckpt_path=None, save_as=None, ranks=2):
    """Train for three epochs, or ``stop`` steps; the same on two ranks as on one with the whole batch."""
    row, module = make(stem, noise, seed)
    look = Noise()
    length = {"max_epochs": 3} if stop is None else {"max_steps": stop, "max_epochs": -1}
    strategy = row.strategy if ranks > 1 else "auto"
    fit = trainer(devices=ranks, strategy=strategy, callbacks=[look], limit_val_batches=0, **length)
    fit.fit(module, row.make_data(batch_size=(batch_size or row.batch_size) // ranks), ckpt_path=ckpt_path)
    if save_as is not None:
        fit.save_checkpoint(save_as)
    return {
        "weights": weights(module),
        "snapshot": snapshot(fit),
        "masks": look.masks,
        "draw": look.draw,
        "steps": fit.global_step,
        "world_size": fit.world_size,
    }
