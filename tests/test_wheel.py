"""The wheel as strangers get it: built, installed into an empty environment, started in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import lightning_rectify
from lightning_rectify.cli import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("lightning_rectify", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
QUICK = (
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.init_args.train_size=128",
)
EDITABLE = "from setuptools.build_meta import build_editable; build_editable('{}')"
WHERE = "import lightning_rectify, pathlib; print(pathlib.Path(lightning_rectify.__file__).parent.resolve())"


def run(*command, folder):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RECTIFY_LIGHTNING")}
    options = {"cwd": folder, "env": {**clean, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([str(part) for part in command], **options, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout, folder=checkout)
    (path,) = folder.glob("*.whl")
    return path


def empty_environment(folder, wheel):
    """A new environment with this package alone; what it depends on is borrowed, not installed a second time."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}", "install", "--quiet", "--no-deps")
    run(*pip, wheel, folder=folder)
    # A line of a .pth file adds a folder; .pth files in there, as of this checkout's editable install, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_wheel_holds_sources_every_yaml_the_marker_of_types_and_nothing_else(wheel):
    assert wheel.name == f"lightning_rectify-{lightning_rectify.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "lightning-rectify = lightning_rectify.cli:main" in archive.read(entry).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_rectify").rglob("*.py")}
    configs = {f"lightning_rectify/configs/{name}.yaml" for name in shipped_configs()}
    held = {name for name in names if ".dist-info/" not in name}
    assert held == sources | configs | {"lightning_rectify/py.typed"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_fits_by_the_name_of_a_yaml(kind, wheel, checkout, tmp_path):
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    environment.mkdir()
    folder.mkdir()
    if kind == "editable":  # what `pip install --editable` builds, without its download of setuptools
        run(sys.executable, "-c", EDITABLE.format(tmp_path), folder=checkout)
        (wheel,) = tmp_path.glob("*.whl")
    programs = empty_environment(environment, wheel)
    package = Path(run(programs / "python", "-c", WHERE, folder=folder).strip())
    assert package.is_relative_to(checkout if kind == "editable" else environment)
    overlay = ("--config", "ablation/adam_2k", "--model.init_args.optimizer.init_args.frozen_steps=1")
    command = ("fit", "--config", "classifier", *overlay, "--config=trainer/cpu.yaml", *QUICK)
    run(programs / "lightning-rectify", *command, folder=folder)
    saved = (folder / "runs" / "classifier" / "version_0" / "config.yaml").read_text()
    assert "FrozenStartAdam" in saved
    assert (folder / "runs" / "classifier" / "version_0" / "checkpoints" / "last_epoch.ckpt").exists()
