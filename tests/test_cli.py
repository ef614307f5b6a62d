"""The command line: users' own classes, in processes as users start them; options and configs, in this process."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_rectify
from lightning_rectify import ImageClassifier, ImageData
from lightning_rectify._lightning import NAME, Trainer
from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateWarning
from lightning_rectify.cli import RectifyCLI, main, shipped_configs
from tests.helpers.training import differences, weights

CONFIG = Path(lightning_rectify.__file__).parents[1] / "configs" / "classifier.yaml"
SCRIPT = [str(Path(sys.executable).with_name("lightning-rectify"))]
MODULE = [sys.executable, "-m", "lightning_rectify"]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]

# What a user writes, who knows Lightning and nothing of this package.
USER = '''
import torch
import {name} as pl
from {name}.cli import OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    """A line through points.

    Args:
        slope: where it starts.
        optimizer: what fits it.
    """

    def __init__(self, slope: float = 0.0, optimizer: OptimizerCallable = torch.optim.Adam):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.constant_(self.layer.weight, slope)
        self.optimizer = optimizer

    def loss(self, batch):
        x, y = batch
        return (self.layer(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Points(pl.LightningDataModule):
    def __init__(self, size: int = 64):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        x = torch.randn(self.size, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, 3 * x.sum(1, keepdim=True)), batch_size=8)

    val_dataloader = train_dataloader
'''
# What a user writes on top of the package: the configuration of optimizers comes from there.
ON_TOP = """
from lightning_rectify import RectifiedModule


class Rectified(RectifiedModule):
    def __init__(self, slope: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.layer = nn.Linear(2, 1)
        nn.init.constant_(self.layer.weight, slope)

    loss, training_step, validation_step = Line.loss, Line.training_step, Line.validation_step
"""


def start(command, folder, *arguments, **env):
    """Run the command line in a folder, as from a shell."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RECTIFY_LIGHTNING", "PYTHONPATH")}
    return subprocess.run(
        [*command, *arguments, *QUIET],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "name", "module", "optimizer", "watched"),
    [
        (SCRIPT, "pytorch_lightning", "Line", "lightning_rectify.RectifiedAdam", True),
        (MODULE, "lightning.pytorch", "Rectified", "lightning_rectify.RectifiedAdam", True),
        (SCRIPT, "lightning.pytorch", "Line", "torch.optim.SGD", False),
    ],
    ids=["script", "python -m", "SGD"],
)
def test_users_classes_from_a_file_outside_the_package_train(command, name, module, optimizer, watched, tmp_path):
    if name == "lightning.pytorch":
        pytest.importorskip("lightning")
    (tmp_path / "mine.py").write_text(USER.format(name=name) + ON_TOP)
    model = [
        f"--model=mine.{module}",
        "--model.slope=0.5",
        f"--model.optimizer={optimizer}",
        "--model.optimizer.lr=0.2",
    ]
    options = [*model, "--data=mine.Points", "--data.size=80", "--trainer.max_epochs=4"]
    env = {"RECTIFY_LIGHTNING": name} if name == "pytorch_lightning" else {}
    done = start(
        command, tmp_path, "fit", *options, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=out", **env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "out").glob("lightning_logs/version_0")
    with open(folder / "metrics.csv", newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["init_args"]["size"] == 80
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.2
    assert (folder / "adaptive_rate.csv").exists() is watched
    assert ("AdaptiveRateMonitor is silent" in done.stderr + done.stdout) is not watched
    if watched:
        assert len((folder / "adaptive_rate.csv").read_text().splitlines()) == 1 + 40  # ten steps an epoch


# -- in this process ---------------------------------------------------------------------------------------------------

SMALL = [
    f"--config={CONFIG}",
    "--model.init_args.network_args={width: 4, norm: group}",
    "--data.init_args={train_size: 128, batch_size: 32}",
    *QUIET,
    "--trainer.max_epochs=1",
    "--test_after_fit=false",
]


def groups_of(cli):
    with open(Path(cli.trainer.loggers[0].log_dir, "adaptive_rate.csv"), newline="") as file:
        return {row["group"] for row in csv.DictReader(file)}


def test_printed_config_is_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, "--model.init_args.label_smoothing=0.25", "--print_config"])
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["label_smoothing"] == 0.25
    assert printed["adaptive_rate"]["strict"] is False
    assert printed["seed_everything"] == 1


def test_saved_config_runs_again_and_gives_the_same_weights():
    first = RectifyCLI(["fit", *SMALL])
    path = Path(first.trainer.loggers[0].log_dir, "config.yaml")
    again = RectifyCLI(["fit", f"--config={path}"])
    assert again.trainer.loggers[0].log_dir != first.trainer.loggers[0].log_dir
    assert differences(weights(first.model), weights(again.model)) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.init_args.label_smothing=0.1", "label_smothing"),
        ("--data.init_args.batchsize=4", "batchsize"),
        ("--trainer.max_epohcs=2", "max_epohcs"),
        ("--adaptive_rate.perlayer=true", "perlayer"),
        ("--adaptive_rate.every_n_steps=often", "every_n_steps"),
        ("--optimizer=torch.optim.SGD", "optimizer"),  # an argument of the module, never of the command line
        ("--model.init_args.optimizer=torch.optim.Adamw", "Adamw"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(option, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, option])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flag", "file"])
def test_optimizer_is_swapped_without_code(how, tmp_path):
    option = "--model.init_args.optimizer=torch.optim.AdamW"
    if how == "file":
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "weight_decay": 0.5}}
        (tmp_path / "swap.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
        option = f"--config={tmp_path / 'swap.yaml'}"
    with pytest.warns(AdaptiveRateWarning, match="AdamW runs without warmup"):
        cli = RectifyCLI(["fit", *SMALL, "--trainer.max_epochs=3", option])
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    if how == "file":
        assert optimizer.param_groups[0]["initial_lr"] == 0.002
        assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_block_configures_the_monitor(tmp_path):
    plain = RectifyCLI(["fit", *SMALL])
    assert groups_of(plain) == {"model"}
    layers = RectifyCLI(["fit", *SMALL, "--adaptive_rate.per_layer=true", "--adaptive_rate.figure=false"])
    owners = {name.rpartition(".")[0] for name, _ in layers.model.named_parameters()}
    assert groups_of(layers) == {"model", *(f"model/{name}" for name in owners)}
    folder = Path(layers.trainer.loggers[0].log_dir)
    assert not (folder / "adaptive_rate.png").exists()
    assert (Path(plain.trainer.loggers[0].log_dir) / "adaptive_rate.png").exists()

    (tmp_path / "strict.yaml").write_text("adaptive_rate: {strict: true}\n")
    with pytest.raises(ValueError, match=r"second moment.*SGD"):
        main(["fit", *SMALL, f"--config={tmp_path / 'strict.yaml'}", "--model.init_args.optimizer=torch.optim.SGD"])


def test_without_a_logger_the_monitor_says_nothing():
    # No callbacks: the config's LearningRateMonitor is stricter than ours.
    options = ["--trainer.logger=false", "--trainer.callbacks=[]"]
    cli = RectifyCLI(["fit", *SMALL, *options])
    assert cli.trainer.global_step == 4
    assert not list(Path.cwd().rglob("adaptive_rate.csv"))


def test_predict_gives_a_label_an_image():
    labels = torch.cat(RectifyCLI(["predict", *without_fit(SMALL)]).trainer.predict_loop.predictions)
    assert len(labels) == 359  # the digits' test part
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) <= set(range(10))


def without_fit(options):
    """For the commands that have no such options."""
    return [option for option in options if not option.startswith("--test_after_fit")]


@pytest.mark.parametrize("checkpoints", [True, False])
def test_test_after_fit_prints_test_metrics(checkpoints, capsys):
    fit = ["fit", *SMALL, "--trainer.max_epochs=2", "--test_after_fit=true"]
    if not checkpoints:
        fit += ["--trainer.enable_checkpointing=false", "--trainer.callbacks=[]"]
    cli = RectifyCLI(fit)
    assert "test/accuracy" in capsys.readouterr().out
    after = cli.trainer.callback_metrics["test/accuracy"].item()
    if checkpoints:
        path = cli.trainer.checkpoint_callback.best_model_path
        assert cli.trainer.ckpt_path == path
        alone = RectifyCLI(["test", *without_fit(SMALL), f"--ckpt_path={path}"])
        assert alone.trainer.callback_metrics["test/accuracy"].item() == after
    else:
        assert cli.trainer.ckpt_path is None  # the last weights


def test_checkpoint_brings_class_and_arguments_between_files_and_flags():
    """Of a fit in Python, which no command line has seen; no logger, so nothing is left in the folder either."""
    fit = Trainer(max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
    fit.fit(ImageClassifier(network_args={"width": 4}, label_smoothing=0.1), ImageData(train_size=128))
    fit.save_checkpoint("python.ckpt")
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.callbacks=[]"]
    alone = RectifyCLI(["test", "--ckpt_path=python.ckpt", "--data=lightning_rectify.ImageData", *quiet])
    assert type(alone.model) is ImageClassifier
    assert alone.model.label_smoothing == 0.1
    config = f"--config={CONFIG}"
    assert RectifyCLI(["test", "--ckpt_path", "python.ckpt", config, *quiet]).model.label_smoothing == 0.1
    flag = "--model.init_args.label_smoothing=0.3"
    told = RectifyCLI(["test", flag, "--ckpt_path=python.ckpt", config, *quiet])
    assert told.model.label_smoothing == 0.3
    assert differences(weights(told.model), weights(alone.model)) == []
    assert not list(Path.cwd().rglob("config.yaml"))


def test_probe_measures_and_does_not_train():
    cli = RectifyCLI(["probe", *without_fit(SMALL), "--streams=2", "--steps=8", "--beta2=0.99"])
    assert cli.trainer.state.finished
    assert cli.trainer.global_step == 0
    (probe,) = cli.trainer.callbacks
    assert probe.result.streams == 2
    assert probe.result.players["model"].beta2 == 0.99
    assert probe.result.players["model"].step.tolist() == list(range(1, 9))
    folder = Path(cli.trainer.loggers[0].log_dir)
    assert (folder / "warmup_probe.txt").read_text() == probe.result.table() + "\n"
    assert (folder / "warmup_probe.csv").exists()
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "probe"])
def test_config_serves_every_command(command):
    """One YAML, whatever the command: none of its keys is an error for any."""
    cli = RectifyCLI([command, *(SMALL if command == "fit" else without_fit(SMALL)), "--trainer.fast_dev_run=true"])
    assert cli.trainer.state.finished
    assert cli.model.__class__.__name__ == "ImageClassifier"


SHORT = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.callbacks=[]"]


@pytest.mark.parametrize(
    "named",
    [
        ["--config", "classifier"],
        ["--config=classifier.yaml"],
        ["-c", "configs/classifier.yaml"],
    ],
    ids=" ".join,
)
def test_shipped_config_is_found_by_name_and_overlays_stack(named):
    overlay = ["--config=ablation/adam_2k", "--config", "trainer: {max_epochs: 7}"]
    cli = RectifyCLI([*named, *overlay, *SHORT], run=False)
    assert type(cli.model) is ImageClassifier
    assert cli.config.model.init_args.optimizer.class_path == "lightning_rectify.optim.FrozenStartAdam"
    assert cli.trainer.max_epochs == 7  # YAML in place of a file is left to jsonargparse


def test_path_that_exists_wins_over_a_shipped_name(tmp_path):
    model = "model: {class_path: lightning_rectify.ImageClassifier, init_args: {num_classes: 5}}"
    (tmp_path / "classifier").write_text(model)
    assert (
        RectifyCLI(
            ["--config", "classifier", "--data=lightning_rectify.ImageData", *SHORT], run=False
        ).model.num_classes
        == 5
    )
    assert RectifyCLI(["--config", "classifier.yaml", *SHORT], run=False).model.num_classes == 10


def test_unknown_config_is_an_error_that_lists_the_names(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "clasifier"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Expected argument `--config` to be a file or the name of one that comes with the package" in said
    assert "but got 'clasifier'" in said
    names = shipped_configs()
    assert all(name in said for name in names)
    assert {"classifier", "spot_density", "ablation/adam_2k", "trainer/cpu"} <= names.keys()


def test_users_file_in_the_folder_one_stands_in_is_found(tmp_path, monkeypatch):
    (tmp_path / "standing_here.py").write_text(USER.format(name=NAME))
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() adds to it
    options = ["--model=standing_here.Line", "--data=standing_here.Points", "--trainer.max_steps=3", *QUIET]
    try:
        main(["fit", *options, "--model.optimizer=lightning_rectify.RectifiedAdam"])
    finally:
        sys.modules.pop("standing_here", None)
    assert list(tmp_path.rglob("adaptive_rate.csv"))
