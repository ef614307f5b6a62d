"""Clauses 2 and 3: a resumed run is the uninterrupted one, and every checkpoint loads with the safe default."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rectify._lightning import ModelCheckpoint
from lightning_rectify.cli import RectifyCLI
from lightning_rectify.optim import RectifiedAdam
from tests.helpers.training import CSVLogger, differences, snapshot, trainer, weights

EPOCHS = 3


# -- 2: stop and resume ------------------------------------------------------------------------------------------------


def run(row, seed=0, ckpt_path=None, keep=None, **options):
    module = row.make_module(
        seed=seed,
        noise=True,
        **row.optimizers(partial(RectifiedAdam, lr=0.01)),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS * row.batches),
        lr_scheduler_interval="step",
    )
    if keep is not None:
        options |= {"callbacks": [keep], "enable_checkpointing": True}
    fit = trainer(**{"max_epochs": EPOCHS, **options})
    fit.fit(module, row.make_data(), ckpt_path=ckpt_path)
    return fit


@pytest.fixture(scope="module")
def uninterrupted(row):
    return snapshot(run(row))


def stop_at_the_end_of_an_epoch(row, folder):
    keep = ModelCheckpoint(folder, filename="last")
    return run(row, keep=keep, max_epochs=1).checkpoint_callback.best_model_path


def stop_in_the_middle_of_an_epoch(row, folder):
    run(row, max_epochs=-1, max_steps=row.batches + 2).save_checkpoint(folder / "stopped.ckpt")
    return folder / "stopped.ckpt"


def lose_the_run_behind_its_checkpoint(row, folder):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=row.batches + 2, save_top_k=-1)
    run(row, keep=keep)
    return folder / f"step={row.batches + 2}.ckpt"


@pytest.mark.parametrize(
    "stop", [stop_at_the_end_of_an_epoch, stop_in_the_middle_of_an_epoch, lose_the_run_behind_its_checkpoint]
)
def test_stop_and_resume_is_the_uninterrupted_run(row, uninterrupted, stop, tmp_path):
    """Weights, moments, schedules, counts and the random state: all that a checkpoint holds, bit for bit."""
    path = stop(row, tmp_path)
    assert torch.load(path, weights_only=True)["global_step"] < EPOCHS * row.batches
    # Lightning counts an epoch that max_steps cut short as a whole one: such a run goes on by steps, an epoch ahead.
    cut = stop is stop_in_the_middle_of_an_epoch
    length = {"max_steps": EPOCHS * row.batches, "max_epochs": -1} if cut else {}
    # Another seed: whatever is as in the uninterrupted run came from the checkpoint.
    resumed = snapshot(run(row, seed=7, ckpt_path=path, **length))
    assert uninterrupted["global_step"] == EPOCHS * row.batches
    assert resumed["epoch"] == uninterrupted["epoch"] + cut
    assert differences({**uninterrupted, "epoch": 0}, {**resumed, "epoch": 0}) == []


def test_the_comparison_sees_random_state_that_is_lost(row, uninterrupted, tmp_path):
    """Noise is drawn: without the saved state the resumed run goes another way."""
    path = stop_at_the_end_of_an_epoch(row, tmp_path)
    saved = torch.load(path, weights_only=True)
    state = [key for key in saved if key.endswith("random_state")]
    assert state
    for key in state:
        del saved[key]
    torch.save(saved, path)
    resumed = snapshot(run(row, seed=7, ckpt_path=path))
    assert any(found.startswith("/state_dict") for found in differences(uninterrupted, resumed))


# -- 3: safe loading, from Python --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "class": torch.optim.AdamW,
    "partial": partial(torch.optim.AdamW, lr=0.01),
    "lambda": lambda params: torch.optim.AdamW(params, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["itself", "extra argument", "saves again"])
def test_checkpoint_loads_and_resumes_with_the_safe_default(row, kind, make, tmp_path):
    cls = row.subclasses.get(kind, row.module)
    extra = {} if cls is row.module else {"extra": 2.5}
    arguments = {**row.optimizers(OPTIMIZERS[make]), **extra}

    def fit(steps, ckpt_path=None):
        module = row.make_module(cls, **arguments)
        training = trainer(max_epochs=-1, max_steps=steps, limit_val_batches=0, logger=CSVLogger(tmp_path, version=0))
        training.fit(module, row.make_data(), ckpt_path=ckpt_path)
        return training

    first = fit(2)
    path = tmp_path / "plain.ckpt"
    first.save_checkpoint(path)
    # `weights_only` is passed nowhere: torch's and Lightning's default is the safe one.
    loaded = cls.load_from_checkpoint(path)
    assert differences(weights(loaded), weights(first.model)) == []
    for name, value in extra.items():
        assert loaded.hparams[name] == getattr(loaded, name) == value
    assert fit(4, path).global_step == 4
    text = next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "python/" not in text
    assert set(row.optimizers(None)).isdisjoint(yaml.safe_load(text))
    assert set(row.module_args) <= set(yaml.safe_load(text))


# -- 3: safe loading, from the command line ----------------------------------------------------------------------------


def cli(row, command, *arguments):
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return RectifyCLI([command, f"--config={row.config}", *quiet, *row.quick_cli, *arguments])


@pytest.mark.parametrize("kind", ["itself", "extra argument", "saves again"])
def test_command_line_resumes_and_tests_its_checkpoints(yaml_row, kind):
    row = yaml_row
    cls = row.subclasses.get(kind, row.module)
    name = [f"--model={cls.__module__}.{cls.__qualname__}"] if cls is not row.module else []
    extra = ["--model.init_args.extra=2.5"] if name else []
    first = cli(row, "fit", *name, *extra, "--trainer.max_epochs=1", "--test_after_fit=false").trainer
    path = first.checkpoint_callback.best_model_path
    assert type(first.model) is cls
    assert first.global_step == row.batches

    resumed = cli(row, "fit", *name, *extra, "--trainer.max_epochs=2", "--test_after_fit=false", f"--ckpt_path={path}")
    assert resumed.trainer.global_step == 2 * row.batches

    tested = cli(row, "test", *name, *extra, f"--ckpt_path={path}").trainer
    loaded = cls.load_from_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert differences(weights(tested.model), saved) == differences(weights(loaded), saved) == []
    if extra:
        assert tested.model.extra == loaded.extra == 2.5
    assert "python/" not in Path(first.loggers[0].log_dir, "hparams.yaml").read_text()
