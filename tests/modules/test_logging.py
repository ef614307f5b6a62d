"""``RectifiedModule.log``: its short way for a key's later values says what Lightning's own way says."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MeanSquaredError

from lightning_rectify import RectifiedModule
from lightning_rectify._lightning import Callback, MisconfigurationException
from lightning_rectify.callbacks import AdaptiveRateMonitor
from lightning_rectify.modules import base
from tests.helpers.training import CSVLogger, trainer


class Logging(RectifiedModule):
    """Every kind of key: of steps, of epochs, of both, metrics, sums, and one that is not always logged."""

    def __init__(self):
        super().__init__()
        self.layer, self.error, self.mean = nn.Linear(2, 1), MeanSquaredError(), MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        values = self.layer(x)
        loss = (values - y).square().mean()
        self.error.update(values.detach(), y)
        self.log("train/loss", loss, batch_size=len(x), prog_bar=True)
        self.log("train/epoch", loss, on_step=False, on_epoch=True, batch_size=len(x))
        self.log("train/both", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("train/sum", loss.double(), reduce_fx="sum", on_step=False, on_epoch=True, batch_size=len(x))
        self.log("train/error", self.error, on_step=False, on_epoch=True, batch_size=len(x))
        self.log_dict({"train/whole": torch.tensor(batch_idx), "train/number": 0.5}, batch_size=len(x))
        self.log("train/guessed", loss)
        if batch_idx % 2:
            self.log("train/sometimes", loss, batch_size=len(x))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        values = self.layer(x)
        self.error.update(values, y)
        self.mean.update(values)
        self.log("val/error", self.error, batch_size=len(x))
        self.log("val/mean", self.mean, batch_size=len(x))
        self.log("val/loss", (values - y).square().mean(), batch_size=len(x))


class Seen(Callback):
    """What callbacks and the progress bar are shown after each batch and each validation."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(({**trainer.callback_metrics}, {**trainer.progress_bar_metrics}))

    def on_validation_end(self, trainer, *args):
        self.seen.append({**trainer.callback_metrics})


def run(folder):
    """Two epochs of five batches, the last one short, with a validation in the middle and at the end of each."""
    torch.manual_seed(0)
    module, seen, x = Logging(), Seen(), torch.randn(37, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    logger = CSVLogger(folder)
    options = {"max_epochs": 2, "val_check_interval": 2, "log_every_n_steps": 1, "callbacks": [seen], "logger": logger}
    trainer(**options).fit(module, loader, loader)
    return seen.seen, Path(logger.log_dir, "metrics.csv").read_text()


def test_it_says_what_lightnings_own_log_says(tmp_path, monkeypatch):
    answers, short = [], base.log_next
    monkeypatch.setattr(base, "log_next", lambda *args: answers.append(short(*args)) or answers[-1])
    seen, rows = run(tmp_path / "short")
    # In training, of 10 batches: all but the first after a validation or at an epoch's start.
    assert sum(answers) > 40
    monkeypatch.setattr(base, "log_next", lambda *args: False)
    own_seen, own_rows = run(tmp_path / "own")
    assert seen == own_seen
    assert rows == own_rows


def test_a_key_with_other_options_is_refused_as_lightning_does():
    class Changing(Logging):
        def training_step(self, batch, batch_idx):
            self.log("train/loss", torch.tensor(1.0), prog_bar=batch_idx > 0, batch_size=1)
            return super().training_step(batch, batch_idx)

    x = torch.zeros(4, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=2)
    with pytest.raises(MisconfigurationException, match="twice in `training_step` with different arguments"):
        trainer(max_epochs=1, limit_val_batches=0).fit(Changing(), loader)


@pytest.mark.filterwarnings("ignore:AdaptiveRateMonitor")  # early steps of RAdam follow the gradient's size
def test_what_the_monitors_hand_over_takes_the_short_way(tmp_path, monkeypatch):
    """The monitor's fifteen keys a step cost a small network as much as its forward pass by Lightning's own way."""
    asked, short = [], base.log_next
    monkeypatch.setattr(base, "log_next", lambda *args: asked.append((args[1], short(*args))) or asked[-1][1])
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=8)
    monitor = AdaptiveRateMonitor(figure=False)
    options = {"max_epochs": 1, "limit_val_batches": 0, "log_every_n_steps": 1, "callbacks": [monitor]}
    trainer(**options, logger=CSVLogger(tmp_path)).fit(Logging(), loader)
    answers = [answer for key, answer in asked if key.startswith("adaptive_rate/")]
    keys = {key for key, _ in asked if key.startswith("adaptive_rate/")}
    # Lightning's way: each key's first value, which is not asked about.
    assert len(keys) > 5
    assert answers.count(True) > 5 * len(keys)
    assert all(answers)
    # Nor does it send what the module logs the long way.
    assert all(answer for key, answer in asked if key == "train/loss")
