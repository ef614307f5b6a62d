from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_rectify._lightning import LightningModule, TensorBoardLogger
from lightning_rectify.callbacks import SampleGrid, SampleWriter
from tests.helpers.pool import Pool
from tests.helpers.training import differences, snapshot, trainer

LATENT = 4


class Painter(LightningModule):
    """A small generative module that keeps the protocol: noise from a generator of its own."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(LATENT, channels * 16), nn.BatchNorm1d(channels * 16), nn.Tanh(), nn.Dropout(0.1),
            nn.Unflatten(1, (channels, 4, 4)),
        )  # fmt: skip

    def noise(self, count, seed):
        return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))

    def sample(self, count, *, seed, labels=None, truncation=None):
        return self.net(self.noise(count, seed))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 0.5).pow(2).mean()

    def predict_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Between(Painter):
    """It interpolates as well, and notes how it was called."""

    def interpolate(self, pairs, steps, *, seed):
        self.asked = (pairs, steps, seed, self.training, torch.is_grad_enabled())
        ends = self.noise(2 * pairs, seed).view(2, pairs, 1, LATENT)
        weights = torch.linspace(0, 1, steps).view(1, steps, 1)
        return self.net(torch.lerp(ends[0], ends[1], weights).flatten(0, 1))


class Careless(Painter):
    """It draws from the global generator, against the protocol."""

    def sample(self, count, *, seed, labels=None, truncation=None):
        return self.net(torch.randn(count, LATENT))


def data(size=24):
    return torch.randn(size, LATENT, generator=torch.Generator().manual_seed(1))


def fit(module, *callbacks, epochs=2, logger=None, **options):
    torch.manual_seed(7)  # dropout draws from it
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False) if logger is None else logger
    run = trainer(logger=logger, callbacks=list(callbacks), max_epochs=epochs, **options)
    run.fit(module, torch.utils.data.DataLoader(data(), batch_size=8))
    return run


def names(folder):
    return sorted(path.name for path in Path(folder).glob("*"))


def pixels(path):
    """(C, H, W) bytes."""
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def expected_bytes(images):
    """The rounding of [-1, 1] to bytes, in numpy."""
    return np.floor((np.clip(images.double().numpy(), -1, 1) + 1) / 2 * 255 + 0.5)


def cells(grid, columns, size=4):
    """The images of a grid with torchvision's frame of two pixels."""
    pitch = size + 2
    rows = (grid.shape[1] - 2) // pitch
    return [grid[:, 2 + r * pitch :, 2 + c * pitch :][:, :size, :size] for r in range(rows) for c in range(columns)]


def test_grid_shows_the_samples_of_the_seed():
    module = Painter()
    run = fit(module, SampleGrid(count=6, columns=3, seed=5))
    folder = Path(run.loggers[0].log_dir, "samples")
    assert names(folder) == ["samples_step=000003.png", "samples_step=000006.png"]
    with torch.no_grad():
        images = module.eval().sample(6, seed=5)
    shown = cells(pixels(folder / "samples_step=000006.png"), columns=3)
    # One byte: float32 and float64 may round to either side.
    np.testing.assert_allclose(np.stack(shown), expected_bytes(images), rtol=0, atol=1)
    assert np.ptp(expected_bytes(images)) > 50  # they are not all one grey
    assert (pixels(folder / "samples_step=000003.png") != pixels(folder / "samples_step=000006.png")).any()


def test_interpolations_are_one_pair_a_row():
    module = Between()
    run = fit(module, SampleGrid(count=4, columns=5, seed=3, interpolations=2), epochs=1)
    assert module.asked == (2, 5, 3, False, False)
    folder = Path(run.loggers[0].log_dir, "samples")
    assert names(folder) == ["interpolation_step=000003.png", "samples_step=000003.png"]
    with torch.no_grad():
        images = module.eval().interpolate(2, 5, seed=3)
    shown = cells(pixels(folder / "interpolation_step=000003.png"), columns=5)
    np.testing.assert_allclose(np.stack(shown), expected_bytes(images), rtol=0, atol=1)
    run = fit(Between(), SampleGrid(interpolations=0), epochs=1, logger=TensorBoardLogger("none"))
    assert names(Path(run.loggers[0].log_dir, "samples")) == ["samples_step=000003.png"]


def test_tensorboard_has_the_images():
    run = fit(Between(), SampleGrid(count=6, columns=3))
    events = EventAccumulator(run.loggers[0].log_dir, size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["samples/fixed_noise", "samples/interpolation"]
    images = events.Images("samples/fixed_noise")
    assert [event.step for event in images] == [3, 6]
    assert (images[0].width, images[0].height) == (3 * 6 + 2, 2 * 6 + 2)


@pytest.mark.parametrize(
    ("every", "epochs", "options", "steps"),
    [(1, 3, {}, [3, 6, 9]), (2, 5, {}, [6, 12, 15]), (10, 2, {}, [6]), (1, -1, {"max_steps": 5}, [3, 5])],
)
def test_epochs_and_the_end_of_fit(every, epochs, options, steps):
    run = fit(Painter(), SampleGrid(every_n_epochs=every, count=2), epochs=epochs, **options)
    assert names(Path(run.loggers[0].log_dir, "samples")) == [f"samples_step={step:06d}.png" for step in steps]


@pytest.mark.parametrize("make", [Painter, Between, Careless])
def test_training_is_bit_equal_with_and_without(make):
    """Weights, moments, batch normalization's averages, random state."""
    a = snapshot(fit(make(), SampleGrid(count=5)))
    state = torch.get_rng_state()
    b = snapshot(fit(make()))
    assert differences(a, b) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_each_submodule_keeps_its_mode():
    module = Painter()

    class Frozen(Painter):
        def on_train_epoch_start(self):
            self.net[1].eval()

        def on_train_epoch_end(self):  # after the callbacks' own
            self.modes = {name: part.training for name, part in self.named_modules()}

    module = Frozen()
    fit(module, SampleGrid(count=2))
    assert [name for name, training in module.modes.items() if not training] == ["net.1"]


def test_grey_images_and_values_out_of_range():
    class Loud(Painter):
        def sample(self, count, **_):
            return torch.linspace(-3, 3, count).view(count, 1, 1, 1).expand(-1, 1, 4, 4)

    run = fit(Loud(), SampleGrid(count=7, columns=7), epochs=1)
    grid = pixels(Path(run.loggers[0].log_dir, "samples", "samples_step=000003.png"))
    assert [cell[0, 0, 0] for cell in cells(grid, 7)] == [0, 0, 0, 128, 255, 255, 255]


def test_without_a_logger_and_in_a_dry_run(tmp_path):
    fit(Painter(), SampleGrid(count=2), logger=False, epochs=1)
    assert names(tmp_path / "samples") == ["samples_step=000003.png"]
    module = Between()
    fit(module, SampleGrid(count=2), fast_dev_run=2)
    assert hasattr(module, "asked")
    assert len(list(tmp_path.rglob("*.png"))) == 1


class Regression(LightningModule):
    """It has no ``sample``."""

    training_step, configure_optimizers = Painter.training_step, Painter.configure_optimizers


def test_a_module_that_cannot_sample_is_refused():
    with pytest.raises(ValueError, match=r"method `sample\(count, seed=.*but got Regression without one"):
        fit(Regression(), SampleGrid())


@pytest.mark.parametrize("images", [torch.zeros(3, 4, 4), torch.zeros(2, 2, 4, 4), [1.0]])
def test_samples_that_are_no_images_are_refused(images):
    class Wrong(Painter):
        def sample(self, count, **_):
            return images

    with pytest.raises(ValueError, match=r"SampleGrid draws \(fixed_noise\) to be images .* but got (\(|list)"):
        fit(Wrong(), SampleGrid())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` to be at least 1 but got 0"),
        ({"count": 0}, "`count` to be at least 1"),
        ({"columns": 0}, "`columns` to be at least 1"),
        ({"interpolations": -1}, "`interpolations` to be at least 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SampleGrid(**options)


# -- predictions as files ----------------------------------------------------------------------------------------------


def predict(module, *writers, loaders=None, logger=False, **options):
    if loaders is None:
        loaders = torch.utils.data.DataLoader(data(11), batch_size=4)
    run = trainer(logger=logger, callbacks=list(writers), **options)
    run.predict(module, loaders, return_predictions=False)
    return run


def test_predictions_are_files_with_the_number_of_the_sample():
    module = Painter()
    predict(module, SampleWriter("out"))
    assert names("out") == [f"{i:06d}.png" for i in range(11)]
    with torch.no_grad():
        images = expected_bytes(module.eval().net(data(11)))
    for i in range(11):
        np.testing.assert_allclose(pixels(f"out/{i:06d}.png"), images[i], rtol=0, atol=1)  # one byte of rounding


def test_numbers_are_those_of_the_sampler():
    loader = torch.utils.data.DataLoader(data(11), batch_size=2, sampler=[7, 2, 9])
    module = Painter()
    predict(module, SampleWriter("out"), loaders=loader)
    assert names("out") == ["000002.png", "000007.png", "000009.png"]
    with torch.no_grad():
        images = expected_bytes(module.eval().net(data(11)))
    np.testing.assert_allclose(pixels("out/000007.png"), images[7], rtol=0, atol=1)


def test_folders(tmp_path):
    run = predict(Painter(), SampleWriter(), logger=TensorBoardLogger("logs"))
    assert len(names(Path(run.loggers[0].log_dir, "predictions"))) == 11
    predict(Painter(), SampleWriter())
    assert len(names(tmp_path / "predictions")) == 11
    loaders = [torch.utils.data.DataLoader(data(n), batch_size=4) for n in (5, 2)]

    class Two(Painter):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self.net(batch)

    predict(Two(), SampleWriter("both"), loaders=loaders)
    assert [len(names(f"both/dataloader_{i}")) for i in (0, 1)] == [5, 2]
    predict(Painter(), SampleWriter("dry"), fast_dev_run=1)
    assert not Path("dry").exists()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data(5))


@pytest.mark.filterwarnings("ignore:.*infer the batch indices")
def test_data_without_places_are_numbered_as_they_come():
    writer = SampleWriter("out")
    for _ in range(2):  # a second call begins anew
        predict(Painter(), writer, loaders=torch.utils.data.DataLoader(Stream(), batch_size=2))
        assert names("out") == [f"{i:06d}.png" for i in range(5)]


def test_predictions_that_are_no_images_are_refused():
    class Wrong(Painter):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx)[:1]

    with pytest.raises(ValueError, match="one image a sample of the batch but got 1 for 4"):
        predict(Wrong(), SampleWriter("out"))
    with pytest.raises(ValueError, match=r"`predict_step` returns .*C 1 or 3 but got \(4, 2, 4, 4\)"):
        predict(Painter(channels=2), SampleWriter("out"))


class Counting(Painter):
    """It counts how often it was asked."""

    calls = 0

    def sample(self, count, *, seed, labels=None, truncation=None):
        self.calls += 1
        return super().sample(count, seed=seed)


def both_callbacks():
    """On two ranks."""
    strategy = {"devices": 2, "strategy": "ddp"}
    module = Counting()
    run = fit(module, SampleGrid(count=3), epochs=1, **strategy)
    # Loggers of two processes may disagree on the folder, as here the ranks do.
    predict(module, SampleWriter(f"rank{run.global_rank}"), **strategy)
    stream = torch.utils.data.DataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match="could not be numbered"):
        predict(module, SampleWriter("stream"), loaders=stream, **strategy)
    return {"calls": module.calls, "steps": run.global_step}


@pytest.mark.ddp
def test_two_processes():
    pool = Pool()
    try:
        ranks = pool.run(f"{__name__}.both_callbacks")
    finally:
        pool.close()
    assert ranks == [{"calls": 1, "steps": 2}, {"calls": 0, "steps": 2}]
    assert names("logs/lightning_logs/version_0/samples") == ["samples_step=000002.png"]
    assert names("rank0") == [f"{i:06d}.png" for i in range(11)]
    assert not Path("rank1").exists()
