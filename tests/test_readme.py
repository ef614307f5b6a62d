"""README's examples run as printed, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch

from lightning_rectify import TranslationData, Translator
from lightning_rectify._lightning import NAME
from lightning_rectify.cli import shipped_configs
from tests.helpers.markdown import blocks, broken_links, named_configs, text_of
from tests.helpers.training import trainer, weights

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# Folders of the repository; a path below them is a promise.
PATH = re.compile(r"(?<![\w./-])(?:configs|benchmarks|docs|tests|lightning_rectify)/[\w./*-]*[\w*]")
SLOW = ("SPOT.fit_samples", "robust_report(")
# What classes that an example defines are trained on for a few steps.
BATCHES = {"MyRegressor": (torch.randn(16, 8), torch.randn(16, 1)), "ToyGame": torch.randn(20, 2)}


def run(code):
    torch.manual_seed(0)
    names = {"__name__": "readme"}
    exec(compile(code.replace("lightning.pytorch", NAME), "README.md", "exec"), names)
    return names


def marked(number, code):
    marks = [pytest.mark.slow] if any(word in code for word in SLOW) else []
    return pytest.param(code, marks=marks, id=f"block {number}")


@pytest.fixture
def _translator():
    """The checkpoint of the reader's own translator, which the example reads."""
    module = Translator(vocab_size=100, width=16, heads=2, feedforward=32, encoder_layers=1, decoder_layers=1)
    data = TranslationData(vocab_size=100, train_size=32, val_size=8, batch_size=32)
    fit = trainer(max_steps=1, max_epochs=-1, limit_val_batches=0, use_distributed_sampler=False)
    fit.fit(module, data)
    fit.save_checkpoint("last_epoch.ckpt")


def test_there_are_examples():
    assert len(blocks(README)) >= 3
    assert any("AdaptiveRateMonitor" in code for code in blocks(README)[:3])


@pytest.mark.parametrize("code", [marked(number, code) for number, code in enumerate(blocks(README), 1)])
def test_example_runs_as_printed(code, request):
    if "last_epoch.ckpt" in code:
        request.getfixturevalue("_translator")
    names = run(code)
    for name in BATCHES.keys() & names.keys():
        fit = trainer(max_steps=3, max_epochs=-1)
        module = names.get("game") or names[name]()
        before = weights(module)
        fit.fit(module, torch.utils.data.DataLoader([BATCHES[name]] * 3, batch_size=None))
        assert fit.global_step == 3
        after = weights(module)
        assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_links_paths_and_configs_exist():
    assert broken_links(README) == []
    paths = set(PATH.findall(text_of(README)))
    assert "configs/classifier.yaml" in paths
    assert [path for path in sorted(paths) if not any(ROOT.glob(path))] == []
    shipped = shipped_configs()
    assert [name for name in named_configs(README) if name not in shipped] == []
    # `configs/l2l_fashion_mnist.yaml`, `..._cifar10.yaml`: the second is the first with another end.
    for first, rest in re.findall(r"`configs/(\w+)\.yaml`((?:, `\.\.\._?\w+\.yaml`)+)", text_of(README)):
        for end in re.findall(r"\.\.\.(_\w+)\.yaml", rest):
            assert any(name.endswith(end) and name.split("_")[0] == first.split("_")[0] for name in shipped), end
