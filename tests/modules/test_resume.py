"""A run that goes on from a checkpoint of ``on_train_batch_end`` does what the one that made it did after that batch.

Lightning goes on with the next batch: it leaves out the validation that was due, and after an epoch's last batch
``on_train_epoch_end``.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify import MinimaxModule, RectifiedModule
from lightning_rectify._lightning import Callback, LightningDataModule, ModelCheckpoint
from lightning_rectify.data.resumable import training_loader
from tests.helpers.training import CSVLogger, differences, snapshot, trainer

BATCHES, EPOCHS = 4, 4


class Told:
    """Validation draws random numbers and remembers what it saw; a schedule waits for its metric."""

    def __init__(self):
        super().__init__()
        self.layer, self.told = nn.Linear(2, 1), []
        self.register_buffer("best", torch.tensor(torch.inf))

    def loss_of(self, batch):
        return (self.layer(batch[0]) + torch.randn(1) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss_of(batch), batch_size=len(batch[0]))

    def on_validation_epoch_end(self):
        if self.trainer.state.fn == "fit":
            self.best.copy_(torch.minimum(self.best, self.trainer.callback_metrics["val/loss"]))
            self.told.append(("validation", self.current_epoch, self.global_step))

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.told.append(("epoch", self.current_epoch, self.global_step))


class Alone(Told, RectifiedModule):
    def training_step(self, batch, batch_idx):
        return self.loss_of(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss", "strict": False}}


class Game(Told, MinimaxModule):
    players = ("layer",)

    def layer_loss(self, batch):
        return self.loss_of(batch)


class Remembers(Callback):
    """What a callback counts of validations and epochs goes with the checkpoint."""

    def __init__(self):
        self.validations = self.epochs = 0

    def on_validation_end(self, trainer, pl_module):
        self.validations += trainer.state.fn == "fit"

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1

    def state_dict(self):
        return {"validations": self.validations, "epochs": self.epochs}

    def load_state_dict(self, state_dict):
        vars(self).update(state_dict)


class Points(LightningDataModule):
    """Points whose training loader goes on in the middle of an epoch."""

    def __init__(self):
        super().__init__()
        x = torch.randn(8 * BATCHES, 2, generator=torch.Generator().manual_seed(0))
        self.points = TensorDataset(x, x.sum(1, keepdim=True))

    def __getitem__(self, key):
        return self.points[key[1]]

    def __len__(self):
        return len(self.points)

    def train_dataloader(self):
        return training_loader(self, 8, 0, self.trainer, "points", generator=torch.Generator())

    def val_dataloader(self):
        return DataLoader(self.points, batch_size=16, generator=torch.Generator())


def run(make, folder, ckpt_path=None, every=0, **options):
    torch.manual_seed(0 if ckpt_path is None else 9)
    keep = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    options = {"max_epochs": EPOCHS, "callbacks": [Remembers(), *keep], "enable_checkpointing": bool(every), **options}
    fit = trainer(**options)
    fit.fit(make(), Points(), ckpt_path=ckpt_path)
    return fit


@pytest.mark.parametrize("make", [Alone, Game])
@pytest.mark.parametrize("check", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"max_epochs": 2}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("step", [2 * BATCHES, BATCHES + 2, BATCHES + 1])
def test_a_run_goes_on_as_the_one_that_made_the_checkpoint(make, check, step, tmp_path):
    whole = run(make, tmp_path, every=1, **check)
    resumed = run(make, tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **check)
    expected = [told for told in whole.lightning_module.told if told[2] >= step]
    assert resumed.lightning_module.told == expected
    assert any(told[0] == "validation" for told in expected)
    same = [{key: value for key, value in snapshot(fit).items() if key != "callbacks"} for fit in (whole, resumed)]
    assert differences(*same) == []
    remembered = [next(c for c in fit.callbacks if isinstance(c, Remembers)).state_dict() for fit in (whole, resumed)]
    assert remembered[0] == remembered[1]


def test_a_checkpoint_that_the_validation_made_needs_nothing_made_up(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss", save_top_k=1, save_on_train_epoch_end=False)
    whole = run(Alone, tmp_path, callbacks=[Remembers(), best], enable_checkpointing=True)
    path = best.best_model_path
    begun = torch.load(path, weights_only=True)["global_step"]
    resumed = run(Alone, tmp_path, ckpt_path=path)
    expected = [told for told in whole.lightning_module.told if told[2] >= begun]
    assert resumed.lightning_module.told == [
        told for told in expected if told != ("validation", begun // BATCHES - 1, begun)
    ]


def test_an_epoch_without_a_validation_before_it_waits_for_no_metric(tmp_path):
    """Validation after three of four batches made the checkpoint: the metric is not known when the epoch ends."""

    class Strict(Alone):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            return {**found, "lr_scheduler": {**found["lr_scheduler"], "strict": True}}

    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"val_check_interval": 3, "enable_checkpointing": True}
    run(Strict, tmp_path, callbacks=[Remembers(), best], **options)
    path = next(path for path in best.best_k_models if f"step={BATCHES + 3}" in path)
    resumed = run(Strict, tmp_path / "b", ckpt_path=path, val_check_interval=3)
    assert [told[0] for told in resumed.lightning_module.told] == [
        "epoch",
        "validation",
        "epoch",
        "validation",
        "epoch",
    ]


def test_what_is_made_up_is_logged_where_it_was(tmp_path):
    options = {"every": BATCHES, "log_every_n_steps": 1}
    whole = CSVLogger(tmp_path / "whole")
    run(Alone, tmp_path, logger=whole, **options)
    resumed = CSVLogger(tmp_path / "resumed")
    run(Alone, tmp_path / "b", ckpt_path=tmp_path / f"step={2 * BATCHES}.ckpt", logger=resumed, **options)
    rows = [(row["epoch"], row["step"], row["val/loss"]) for row in whole.experiment.metrics if "val/loss" in row]
    assert [
        (row["epoch"], row["step"], row["val/loss"]) for row in resumed.experiment.metrics if "val/loss" in row
    ] == (rows[1:])
