"""A loss that leaves the range of 16 bits stops training in the name of its player, and spoils nothing."""

from importlib import import_module

import pytest
import torch

from lightning_rectify._lightning import NAME, Callback, ModelCheckpoint
from lightning_rectify.modules.base import NonFiniteLossError
from tests.faults.conftest import BY_STEM
from tests.helpers.training import trainer, weights


def fp16():
    """Lightning's plugin, with a scaler that works on the CPU."""
    precision = import_module(f"{NAME}.plugins.precision").MixedPrecision
    return {"plugins": [precision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}


# Precision, and a pixel's value that it cannot hold: a float32 can.
SETTINGS = {"bf16": (lambda: {"precision": "bf16-mixed"}, 3.4e38), "fp16": (fp16, 1e5)}


class Glare(Callback):
    """Makes one batch as large as that, every second sample below zero."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            numbers = batch if isinstance(batch, torch.Tensor) else batch[0]
            numbers[::2], numbers[1::2] = self.value, -self.value


@pytest.mark.parametrize("stem", ["classifier", "toy_game"])
@pytest.mark.parametrize("precision", SETTINGS)
def test_a_loss_out_of_range_stops_and_leaves_the_last_checkpoint_good(precision, stem, tmp_path):
    row, (options, value) = BY_STEM[stem], SETTINGS[precision]
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    short = {"max_epochs": 1, "limit_val_batches": 0}
    fit = trainer(**short, callbacks=[Glare(value), keep], enable_checkpointing=True, **options())
    module = row.make_module(noise=True)
    with pytest.raises(NonFiniteLossError, match=rf"player '{row.players_loss}' is (nan|-?inf) at step 4\b"):
        fit.fit(module, row.make_data())
    assert all(torch.isfinite(value).all() for value in weights(module).values())

    again = trainer(**short, **options())
    again.fit(row.make_module(noise=True), row.make_data(), ckpt_path=tmp_path / "step=4.ckpt")
    assert again.global_step == row.batches


@pytest.mark.parametrize("stem", ["classifier", "toy_game"])
def test_in_float32_the_same_batch_is_in_range(stem):
    row = BY_STEM[stem]
    fit = trainer(max_epochs=1, limit_val_batches=0, callbacks=[Glare(SETTINGS["fp16"][1])])
    fit.fit(row.make_module(noise=True), row.make_data())
    assert fit.global_step == row.batches
