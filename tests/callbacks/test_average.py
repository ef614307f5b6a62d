"""The average of the last checkpoints: against numpy, as a checkpoint, over a resume, with broken files."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import Callback, LightningModule, ModelCheckpoint, TensorBoardLogger
from lightning_rectify.callbacks.average import AVERAGED_FROM, CheckpointAverage, average_checkpoints
from tests.helpers.training import differences, trainer


class Regression(LightningModule):
    """A small network with what a state dict can hold: floats of two widths, integers, a mask, extra state."""

    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))
        self.narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def get_extra_state(self):
        return {"updates": int(self.updates)}

    def set_extra_state(self, state):
        self.loaded = state

    def training_step(self, batch, batch_idx):
        self.updates += 1
        x, y = batch
        return (self.net(x) - y).pow(2).mean() + (self.narrow.float().sum() - y.mean()).pow(2)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", -float(self.updates), batch_size=8)  # the first is the best

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + 2), batch_size=8)


def fit(*callbacks, epochs=5, ckpt_path=None, module=None, logger=False, **options):
    module = Regression() if module is None else module
    options = {"max_epochs": epochs, "enable_checkpointing": True, "logger": logger, **options}
    run = trainer(callbacks=list(callbacks), **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


def read(path):
    return torch.load(path, weights_only=True)


def by_hand(paths):
    """The mean of each array of floats, by numpy in float64; the rest of the last file."""
    states = [read(path)["state_dict"] for path in paths]
    mean = dict(states[-1])
    for key, value in states[-1].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arrays = [state[key].double().numpy() for state in states]
            mean[key] = torch.from_numpy(np.asarray(np.sum(arrays, axis=0) / len(arrays))).to(value.dtype)
    return mean


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# -- what is written ---------------------------------------------------------------------------------------------------


def test_average_of_the_last_epochs(tmp_path, caplog):
    average = CheckpointAverage(last=3, dirpath=tmp_path)
    with caplog.at_level(logging.INFO):
        run = fit(average)
    files = [f"recent-epoch={epoch}-step={3 * epoch + 3}.ckpt" for epoch in (2, 3, 4)]
    assert names(tmp_path) == ["average.ckpt", *files]
    assert average.average_path == str(tmp_path / "average.ckpt")
    assert f"average of 3 checkpoints ({', '.join(files)})" in caplog.text
    saved, newest = read(average.average_path), read(tmp_path / files[-1])
    # Bit for bit: both sum three float64 numbers in the same order and round once.
    assert differences(saved["state_dict"], by_hand([tmp_path / name for name in files])) == []
    assert saved.pop(AVERAGED_FROM) == [str(tmp_path / name) for name in files]
    assert (
        differences(
            {k: v for k, v in saved.items() if k != "state_dict"},
            {k: v for k, v in newest.items() if k != "state_dict"},
        )
        == []
    )
    assert saved["state_dict"]["updates"] == run.global_step == 15
    assert saved["state_dict"]["_extra_state"] == {"updates": 15}
    assert (saved["state_dict"]["net.0.weight"] - newest["state_dict"]["net.0.weight"]).abs().max() > 1e-3


def test_average_is_a_checkpoint_like_any_other(tmp_path):
    average = CheckpointAverage(last=2, dirpath=tmp_path)
    fit(average, module=Regression(width=5))
    expected = read(average.average_path)["state_dict"]
    loaded = Regression.load_from_checkpoint(average.average_path, weights_only=True)
    assert loaded.hparams.width == 5
    assert differences(dict(loaded.state_dict()), dict(expected)) == []
    module, run = Regression(width=5), trainer()
    run.test(module, loader(), ckpt_path=average.average_path, weights_only=True, verbose=False)
    assert differences(dict(module.state_dict()), dict(expected)) == []
    assert module.loaded == {"updates": 15}
    again = fit(CheckpointAverage(last=2, dirpath=tmp_path), module=module, epochs=6, ckpt_path=average.average_path)
    assert again.global_step == 18


@pytest.mark.parametrize("last", [1, 10])
def test_fewer_than_asked_and_one(tmp_path, last):
    fit(CheckpointAverage(last=last, dirpath=tmp_path), epochs=3)
    files = [f"recent-epoch={epoch}-step={3 * epoch + 3}.ckpt" for epoch in range(3)][-last:]
    assert names(tmp_path) == ["average.ckpt", *files]
    assert differences(read("average.ckpt")["state_dict"], by_hand(files)) == []


@pytest.mark.parametrize(
    ("options", "running", "steps"),
    [
        ({"every_n_train_steps": 2}, {}, [10, 12, 14]),
        ({"every_n_train_steps": 3}, {"val_check_interval": 2}, [9, 12, 15]),
        ({"every_n_epochs": 2}, {}, [6, 12]),
        ({"every_n_epochs": 1}, {"check_val_every_n_epoch": 2}, [9, 12, 15]),
    ],
)
def test_every_n(tmp_path, options, running, steps):
    """No metric is waited for: neither validations at other times nor steps that end an epoch change anything."""
    average = CheckpointAverage(last=3, dirpath=tmp_path, filename="{step}", save_weights_only=True, **options)
    fit(average, **running)
    files = [f"step={step}.ckpt" for step in steps]
    assert sorted(names(tmp_path)) == sorted(["average.ckpt", *files])
    saved = read("average.ckpt")
    assert saved[AVERAGED_FROM] == [str(tmp_path / file) for file in files]
    assert differences(saved["state_dict"], by_hand(files)) == []
    assert "optimizer_states" not in saved


def test_a_module_that_logs_step(tmp_path):
    """A habit that moves the x axis of plots; it must not decide which checkpoints are the last."""

    class Axis(Regression):
        def training_step(self, batch, batch_idx):
            self.log("step", 100.0 - self.current_epoch, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    fit(CheckpointAverage(last=2, dirpath=tmp_path, filename="{epoch}"), module=Axis())
    assert read("average.ckpt")[AVERAGED_FROM] == [str(tmp_path / f"epoch={epoch}.ckpt") for epoch in (3, 4)]


def test_a_dry_run_writes_nothing(tmp_path):
    average = CheckpointAverage(dirpath=tmp_path / "dry")
    fit(average, fast_dev_run=2)
    assert average.average_path == ""
    assert not (tmp_path / "dry").exists()


def test_without_a_checkpoint_there_is_no_average(tmp_path):
    average = CheckpointAverage(dirpath=tmp_path, every_n_train_steps=100)
    with pytest.warns(UserWarning, match="wrote no average: no checkpoint was saved"):
        fit(average)
    assert average.average_path == ""
    assert names(tmp_path) == []


# -- with others, and over a resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_the_best_checkpoint_is_that_of_the_other_callback(tmp_path, first):
    best = ModelCheckpoint(tmp_path, filename="best-{epoch}", monitor="val/loss", mode="max")
    average = CheckpointAverage(last=2, dirpath=tmp_path)
    counts = []

    class Setups(Callback):
        def setup(self, trainer, pl_module, stage):
            counts.append(stage)

    pair = [average, best] if first else [best, average]
    run = fit(*pair, Setups())
    assert counts == ["fit"]  # moving itself behind the others, it hides none of them
    assert run.checkpoint_callback is best
    assert len(run.checkpoint_callbacks) == 2
    assert names(tmp_path) == [
        "average.ckpt", "best-epoch=0.ckpt", "recent-epoch=3-step=12.ckpt", "recent-epoch=4-step=15.ckpt"
    ]  # fmt: skip
    assert best.state_key != average.state_key
    assert average.state_key != CheckpointAverage(last=3).state_key
    run.test(ckpt_path="best", dataloaders=loader(), verbose=False)
    assert run.callback_metrics["val/loss"] == -3


def test_a_resumed_run_counts_the_checkpoints_before_it(tmp_path):
    whole = CheckpointAverage(last=3, dirpath=tmp_path / "whole")
    fit(whole, epochs=4)
    fit(CheckpointAverage(last=3, dirpath=tmp_path / "parts"), epochs=2)
    resumed = CheckpointAverage(last=3, dirpath=tmp_path / "parts")
    fit(resumed, epochs=4, ckpt_path=tmp_path / "parts/recent-epoch=1-step=6.ckpt")
    assert differences(read(whole.average_path)["state_dict"], read(resumed.average_path)["state_dict"]) == []
    # Lightning spares the checkpoint that a run goes on from; here it is still among the last anyway.
    assert names(tmp_path / "parts") == names(tmp_path / "whole")


def test_a_run_resumed_in_another_folder_counts_them_too(tmp_path):
    """As with any logger: each run has a folder of its own."""
    whole = CheckpointAverage(last=4, dirpath=tmp_path / "whole")
    fit(whole, epochs=5)
    fit(CheckpointAverage(last=4), epochs=3, logger=TensorBoardLogger("logs"))
    before = Path("logs/lightning_logs/version_0/checkpoints")
    there = names(before)
    resumed = CheckpointAverage(last=4)
    fit(resumed, epochs=5, logger=TensorBoardLogger("logs"), ckpt_path=before / "recent-epoch=2-step=9.ckpt")
    assert Path(resumed.average_path).parent == Path("logs/lightning_logs/version_1/checkpoints")
    saved = read(resumed.average_path)
    assert [Path(file).parts[-3] for file in saved[AVERAGED_FROM]] == ["version_0"] * 2 + ["version_1"] * 2
    assert differences(saved["state_dict"], read(whole.average_path)["state_dict"]) == []
    assert names(before) == there  # another run's files are left alone


def test_checkpoints_that_are_gone_are_named(tmp_path):
    class Lose(Callback):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "recent-epoch=0-step=3.ckpt").unlink()

    fit(CheckpointAverage(last=9, dirpath=tmp_path), epochs=2)
    average = CheckpointAverage(last=9, dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"averages without checkpoints that are gone: \S*recent-epoch=0-step=3.ckpt"):
        fit(average, Lose(), epochs=3, ckpt_path=tmp_path / "recent-epoch=1-step=6.ckpt")
    assert [Path(file).name for file in read(average.average_path)[AVERAGED_FROM]] == [
        "recent-epoch=1-step=6.ckpt", "recent-epoch=2-step=9.ckpt"
    ]  # fmt: skip


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Three checkpoints of a run."""
    fit(ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1), epochs=3)
    return sorted((tmp_path / "run").iterdir())


def change(path, **state):
    """Write other tensors into a checkpoint."""
    saved = read(path)
    for key, value in state.items():
        saved["state_dict"][key.replace("__", ".")] = value
    torch.save(saved, path)


def test_the_newest_is_that_with_most_steps(files, tmp_path):
    output = average_checkpoints([files[2], files[0], files[1]], tmp_path / "new" / "mean.ckpt")
    assert output == tmp_path / "new" / "mean.ckpt"
    saved = read(output)
    assert (saved["global_step"], saved["state_dict"]["updates"]) == (9, 9)
    assert saved[AVERAGED_FROM] == [str(file) for file in (files[2], files[0], files[1])]
    expected = by_hand(files)
    for key, value in saved["state_dict"].items():
        if isinstance(value, torch.Tensor):
            # One float32 (bfloat16) rounding: sums of another order may fall on its other side.
            torch.testing.assert_close(value, expected[key], rtol=2**-7 if key == "narrow" else 2e-7, atol=1e-9)
    (mean,) = (average_checkpoints(files[1:2], "one.ckpt"),)
    assert differences(read(mean)["state_dict"], read(files[1])["state_dict"]) == []


def test_sums_are_float64(files):
    """Float32 would lose the small number beside the large ones; the mean of these three is 1 exactly."""
    for file, value in zip(files, (2.0**30, 3.0, -(2.0**30)), strict=True):
        change(file, net__0__bias=torch.full((4,), value))
    assert read(average_checkpoints(files, "mean.ckpt"))["state_dict"]["net.0.bias"].tolist() == [1.0] * 4


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file(files, which, value):
    change(files[which], net__3__weight=torch.tensor([[1.0, value, 0.0, 2.0]]))
    Path("average.ckpt").write_text("before")
    with pytest.raises(ValueError, match=rf"finite but got '\S*{files[which].name}' with 'net.3.weight'"):
        average_checkpoints(files, "average.ckpt")
    assert Path("average.ckpt").read_text() == "before"
    assert [path for path in os.listdir() if "tmp" in path] == []


def test_nan_in_the_only_file_is_refused(files):
    change(files[0], narrow=torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"epoch=0.ckpt' with 'narrow'"):
        average_checkpoints(files[:1], "average.ckpt")


def test_bad_weights_end_the_run_with_an_error(tmp_path):
    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            change(tmp_path / "recent-epoch=1-step=6.ckpt", narrow=torch.full((2,), float("nan"), dtype=torch.bfloat16))

    with pytest.raises(ValueError, match=r"finite but got '\S*recent-epoch=1-step=6.ckpt' with 'narrow'"):
        fit(CheckpointAverage(dirpath=tmp_path), Break(), epochs=3)
    assert len(names(tmp_path)) == 3


def test_a_write_that_fails_leaves_nothing_half_done(files, monkeypatch):
    Path("average.ckpt").write_text("before")

    def full_disk(value, path, *args):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            average_checkpoints(files, "average.ckpt")
    assert Path("average.ckpt").read_text() == "before"
    assert names(".") == ["average.ckpt", "run"]


def test_other_wrong_input(files, tmp_path):
    with pytest.raises(ValueError, match="`paths` to be at least one checkpoint but got none"):
        average_checkpoints([], "average.ckpt")
    with pytest.raises(ValueError, match=r"`output` to be none of `paths` but got '\S*epoch=1.ckpt'"):
        average_checkpoints(files, files[1])
    with pytest.raises(ValueError, match="to be a file but got the folder"):
        average_checkpoints([tmp_path / "run"], "average.ckpt")
    torch.save({"weights": torch.ones(2)}, "plain.ckpt")
    with pytest.raises(ValueError, match=r"to be a checkpoint of Lightning but got 'plain.ckpt'"):
        average_checkpoints(["plain.ckpt"], "average.ckpt")
    change(files[1], net__0__bias=torch.ones(7), other=torch.ones(1))
    with pytest.raises(ValueError, match=r"got '\S*epoch=1.ckpt', which differs from \S+ in net.0.bias, other"):
        average_checkpoints(files, "average.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, "`last` to be at least 1 but got 0"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be at least 1 but got 0"),
        ({"every_n_train_steps": -2}, "`every_n_train_steps` to be at least 1 but got -2"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "`every_n_train_steps` to be None with `every_n_epochs`.*5"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointAverage(**options)
