"""Checkpoints from strangers: code in them is never run, and what is none is said to be none."""

import inspect
import os
import pickle
from pathlib import Path

import pytest
import torch

from lightning_rectify._lightning import TorchCheckpointIO
from lightning_rectify.callbacks.average import average_checkpoints
from lightning_rectify.checkpoints import AtomicCheckpointIO, BrokenCheckpointError, UntrustedCheckpointError
from lightning_rectify.cli import main
from tests.contract.rows import ROWS
from tests.helpers.training import trainer

CLASSIFIER = next(row for row in ROWS if row.stem == "classifier")
QUIET = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_model_summary")]


class Poison:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What a real run of each kind leaves."""
    path = tmp_path_factory.mktemp("strangers") / "good.ckpt"
    fit = trainer(max_steps=2)
    fit.fit(CLASSIFIER.make_module(), CLASSIFIER.make_data())
    fit.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def poisoned(good: dict, where: str, mark: Path, path: Path, zipped: bool) -> None:
    poison = Poison(str(mark))
    places = {
        "a key of its own": {"poison": poison},
        "hyperparameters": {"hyper_parameters": {**good["hyper_parameters"], "poison": poison}},
        "weights": {"state_dict": {**good["state_dict"], "poison": poison}},
        "optimizer": {"optimizer_states": [{**good["optimizer_states"][0], "poison": poison}]},
        "class": {"lightning_rectify_class_path": poison},
    }
    torch.save({**good, **places[where]}, path, _use_new_zipfile_serialization=zipped)


def ways(path: Path):
    """All doors that a file of a stranger comes through."""
    module = CLASSIFIER.module
    plugin = trainer(max_steps=3, plugins=[AtomicCheckpointIO()])
    return {
        "load_from_checkpoint": lambda: module.load_from_checkpoint(path),
        "fit in Python": lambda: plugin.fit(CLASSIFIER.make_module(), CLASSIFIER.make_data(), ckpt_path=path),
        "test in Python": lambda: plugin.test(CLASSIFIER.make_module(), CLASSIFIER.make_data(), ckpt_path=path),
        "fit": lambda: main(["fit", "--config", "classifier", *QUIET, "--ckpt_path", str(path)]),
        "test": lambda: main(["test", "--config", "classifier", *QUIET, f"--ckpt_path={path}"]),
        "average": lambda: average_checkpoints([path], path.with_name("average.ckpt")),
    }


@pytest.mark.parametrize("where", ["a key of its own", "hyperparameters", "weights", "optimizer", "class"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_in_a_checkpoint_is_not_run(good, where, zipped, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "poisoned.ckpt"
    poisoned(good, where, mark, path, zipped)
    for name, way in ways(path).items():
        with pytest.raises(UntrustedCheckpointError, match=r"(?s)poisoned.*plain values alone but got `posix.mkdir`"):
            way()
        assert not mark.exists(), name


def test_the_poison_would_work(good, tmp_path):
    """Else the test above could not fail."""
    mark, path = tmp_path / "mark", tmp_path / "poisoned.ckpt"
    poisoned(good, "weights", mark, path, True)
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.skipif(
    "weights_only" not in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters,
    reason="Lightning before 2.6 loads it: the docstring of AtomicCheckpointIO says so",
)
def test_lightnings_own_reader_refuses_it_too(good, tmp_path):
    """A Trainer without our plugin: in torch's words."""
    mark, path = tmp_path / "mark", tmp_path / "poisoned.ckpt"
    poisoned(good, "weights", mark, path, True)
    with pytest.raises(pickle.UnpicklingError):
        trainer(max_steps=3).fit(CLASSIFIER.make_module(), CLASSIFIER.make_data(), ckpt_path=path)
    assert not mark.exists()


STRANGE = {
    "a list": (lambda good, path: torch.save([1], path), "a list"),
    "weights alone": (lambda good, path: torch.save(good["state_dict"], path), "without state_dict"),
    "no version": (lambda good, path: torch.save({"state_dict": {}}, path), "without pytorch-lightning_version"),
    "a tensor": (lambda good, path: torch.save(torch.ones(2), path), "a Tensor"),
    "a folder": (lambda good, path: path.mkdir(), "folder"),
    "a text": (lambda good, path: path.write_text("weights"), "do not begin as those of torch.save"),
    "empty": (lambda good, path: path.touch(), "it is empty"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_checkpoint_is_called_so(good, kind, tmp_path):
    path = tmp_path / "strange.ckpt"
    make, words = STRANGE[kind]
    make(good, path)
    for name, way in ways(path).items():
        if name.endswith("Python") and words.startswith(
            "without"
        ):  # the plugin is Fabric's, too: Lightning looks at keys
            with pytest.raises(KeyError, match="version"):
                way()
        elif name == "average":  # in words of its own, without what is missing
            with pytest.raises(ValueError, match=r"^Expected .*strange.ckpt"):
                way()
        else:
            with pytest.raises(BrokenCheckpointError, match=rf"(?s)^Expected .*strange.ckpt' .*{words}"):
                way()


def test_another_module_is_named(good, tmp_path):
    """A sound checkpoint of a class that is not this one."""
    path = tmp_path / "classifier.ckpt"
    torch.save(good, path)
    other = next(row for row in ROWS if row.stem == "manifold")
    with pytest.raises(
        ValueError, match=r"^Expected .*classifier.ckpt' to be .*ManifoldRegressor but .*ImageClassifier"
    ):
        other.module.load_from_checkpoint(path)
