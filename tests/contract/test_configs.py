"""Clause 1, the files: every shipped YAML parses and instantiates, and that of embedded data trains, with overlays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_rectify._lightning import NAME, TensorBoardLogger
from lightning_rectify.cli import RectifyCLI
from tests.contract.rows import CONFIGS, ROWS
from tests.helpers.training import CSVLogger

STEMS = sorted(CONFIGS.glob("*.yaml"))
ABLATIONS = sorted(CONFIGS.glob("ablation/*.yaml"))
OVERLAYS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path not in ABLATIONS)
ON_THIS_MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
PARSE = """
import sys
from lightning_rectify import _lightning
from lightning_rectify.cli import RectifyCLI
assert _lightning.NAME == sys.argv[1], _lightning.NAME
for paths in sys.argv[2:]:
    configs = [f"--config={path}" for path in paths.split(",")]
    RectifyCLI([*configs, "--trainer.accelerator=cpu", "--trainer.devices=1"], run=False)
    print("parsed", paths)
"""


def name_of(path):
    return str(path.relative_to(CONFIGS))


def test_there_is_a_config_for_every_row_and_a_row_for_every_stem():
    assert {row.config for row in ROWS if row.has_config} <= set(STEMS)
    # STEM_DATASET.yaml is a row's module on other data
    assert all(any(path.stem.startswith(row.stem) for row in ROWS if row.has_config) for path in STEMS)
    assert {path.parent.name for path in OVERLAYS} == {"trainer", "logger"}


@pytest.mark.parametrize("path", STEMS, ids=name_of)
def test_config_instantiates(path):
    cli = RectifyCLI([f"--config={path}", *ON_THIS_MACHINE], run=False)
    assert type(cli.config.seed_everything) is int  # True would draw another seed each time
    assert all(optimizer["name"] for optimizer in cli.model.parameter_groups())
    cli.model.configure_optimizers()  # class_path and init_args became a callable that works


# One file a module: those of larger data build networks of up to a gigabyte, and differ in numbers only. Overlays of
# several devices with one module of one player, and one game.
PAIRS = [
    pytest.param(path, overlay, id=f"{name_of(path)}-{name_of(overlay)}")
    for path in sorted(row.config for row in ROWS if row.has_config)
    for overlay in OVERLAYS
    if path.stem in ("classifier", "spectral_gan") or overlay.stem not in ("torchrun", "slurm", "fsdp")
]


@pytest.mark.parametrize(("path", "overlay"), PAIRS)
def test_overlay_combines(path, overlay):
    alone = RectifyCLI([f"--config={path}", *ON_THIS_MACHINE], run=False)
    both = RectifyCLI([f"--config={path}", f"--config={overlay}", *ON_THIS_MACHINE], run=False)
    if overlay.parent.name == "logger":
        expected = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}[overlay.stem]
        assert type(both.trainer.logger) is expected
    else:
        assert both.trainer.precision == ("32-true" if overlay.stem == "cpu" else "bf16-mixed")
        assert both.trainer.num_nodes == (2 if overlay.stem in ("torchrun", "slurm") else 1)
        words = {"cpu": "SingleDevice", "gpu": "SingleDevice", "fsdp": "ModelParallel"}.get(overlay.stem, "DDP")
        assert words in type(both.trainer.strategy).__name__
    # What the overlay does not speak of stays.
    assert both.trainer.max_epochs == alone.trainer.max_epochs
    assert both.config.model.as_dict() == alone.config.model.as_dict()


@pytest.mark.parametrize("stem", ["classifier_cifar10", "language_model", "translation_iwslt14"])
@pytest.mark.parametrize("overlay", ABLATIONS, ids=name_of)
def test_ablation_changes_the_optimizer_and_the_schedule_alone(stem, overlay):
    config = f"--config={CONFIGS / stem}.yaml"
    alone = RectifyCLI([config, *ON_THIS_MACHINE], run=False)
    both = RectifyCLI([config, f"--config={overlay}", *ON_THIS_MACHINE], run=False)
    before, after = (cli.config.model.init_args.as_dict() for cli in (alone, both))
    for name in ("lr", "betas", "weight_decay"):
        assert before["optimizer"]["init_args"].get(name) == after["optimizer"]["init_args"].get(name)
    own = ("optimizer", "lr_scheduler", "lr_scheduler_interval")
    assert {**after, **{name: before[name] for name in own}} == before
    made = both.model.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    adam = type(optimizer).__name__ == "Adam"
    assert adam == overlay.stem.startswith("adam") or overlay.stem == "adam_2k"
    assert (optimizer.param_groups[0]["eps"] == 1e-4) == (overlay.stem == "adam_eps")
    assert (isinstance(made, dict) and "lr_scheduler" in made) == (after["lr_scheduler"] is not None)
    assert ("warmup" in overlay.stem or "untuned" in overlay.stem) == (after["lr_scheduler"] is not None)


@pytest.mark.parametrize("overlay", ABLATIONS, ids=name_of)
def test_ablation_trains(overlay):
    row = next(row for row in ROWS if row.stem == "language_model")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--test_after_fit=false"]
    options = [*row.quick_cli, *quiet, "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    cli = RectifyCLI(["fit", f"--config={row.config}", f"--config={overlay}", *options])
    assert cli.trainer.global_step == row.batches
    assert torch.isfinite(cli.trainer.callback_metrics[row.metric])


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_configs_parse_under_the_other_name_too(name):
    """The name that this process does not use; in a process of its own, where nothing was imported before."""
    if name == NAME:
        pytest.skip("the tests above ran under this name")
    if name == "lightning.pytorch":
        pytest.importorskip("lightning")
    chains = [str(path) for path in STEMS] + [f"{STEMS[0]},{overlay}" for overlay in OVERLAYS]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, name, *chains],
        env={**os.environ, "RECTIFY_LIGHTNING": name},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parsed") == len(chains)


@pytest.mark.parametrize("overlays", [(), ("trainer/cpu", "logger/csv"), ("logger/tensorboard",)], ids="+".join)
def test_config_of_embedded_data_trains(yaml_row, overlays):
    row = yaml_row
    configs = [f"--config={row.config}", *(f"--config={CONFIGS / overlay}.yaml" for overlay in overlays)]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    options = [*row.quick_cli, *quiet, "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    cli = RectifyCLI(["fit", *configs, *options, "--test_after_fit=false"])
    assert cli.trainer.global_step == 2 * row.batches
    assert torch.isfinite(cli.trainer.callback_metrics[row.metric])
    assert Path(cli.trainer.checkpoint_callback.best_model_path).exists()
    folder = Path(cli.trainer.loggers[0].log_dir)
    assert folder.is_relative_to(Path.cwd() / "runs") or folder.parts[0] == "runs"
    assert (folder / "config.yaml").exists()
    assert (folder / "adaptive_rate.csv").exists()
