"""Agreement with other people's packages, where they are installed (neither is a dependency of the tests)."""

import sys

import pytest
import torch
from torch import nn

from lightning_rectify.attacks import apgd, autoattack, correct, fgsm, pgd, square
from tests.attacks.models import batch, excess, generator, smooth


@pytest.fixture
def trained():
    """A network with a margin that attacks break in part; images and labels that it gets right."""
    torch.manual_seed(0)
    images, _ = batch(200, classes=10, shape=(1, 6, 6), dtype=torch.float32)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
    with torch.no_grad():
        labels = net(images).argmax(1)
    return net, images, labels


@pytest.mark.parametrize("steps", [1, 10])
def test_torchattacks_linf(trained, steps):
    torchattacks = pytest.importorskip("torchattacks")
    net, images, labels = trained
    theirs = torchattacks.PGD(net, eps=0.1, alpha=0.03, steps=steps, random_start=False)(images, labels)
    ours = pgd(net, images, labels, 0.1, steps=steps, step_size=0.03, random_start=0.0)
    # their gradient is of the mean loss: where it underflows a sign may differ, nowhere else
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        fgsm(net, images, labels, 0.1), torchattacks.FGSM(net, eps=0.1)(images, labels), rtol=0, atol=1e-6
    )


def test_torchattacks_l2(trained):
    torchattacks = pytest.importorskip("torchattacks")
    net, images, labels = trained
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=10, random_start=False)(images, labels)
    ours = pgd(net, images, labels, 0.5, steps=10, step_size=0.1, random_start=0.0, norm="l2")
    # they add 1e-10 to the norm of the gradient of the mean, which is 1e-5 and more here
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow  # AutoAttack's 5,000 queries
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.12)])
def test_autoattack(trained, norm, epsilon):
    pytest.importorskip("pyautoattack")
    net, images, labels = trained
    tracer, state = sys.gettrace(), torch.get_rng_state()
    net.train()
    robust = {}
    for name in ("apgd-dlr", "apgd-t", "square"):
        found = autoattack(net, images, labels, epsilon, norm=norm, version="custom", attacks=[name])
        assert excess(images, found, epsilon, norm) <= 0
        robust[name] = correct(net, found, labels).float().mean().item()
        assert torch.equal(found[correct(net, found, labels)], images[correct(net, found, labels)])
    assert net.training
    assert sys.gettrace() is tracer
    assert torch.equal(torch.get_rng_state(), state)
    ours = {
        "apgd-dlr": apgd(net, images, labels, epsilon, norm=norm, loss="dlr", restarts=5, generator=generator()),
        "apgd-t": apgd(net, images, labels, epsilon, norm=norm, loss="dlr_targeted", generator=generator()),
        "square": square(net, images, labels, epsilon, norm=norm, queries=2000, generator=generator()),
    }
    for name, found in ours.items():
        assert 0.05 < robust[name] < 0.95
        # within one point of 200 images; ours may be stronger
        assert correct(net, found, labels).float().mean().item() <= robust[name] + 0.0101, name


@pytest.mark.slow
def test_autoattack_with_other_bounds_and_few_classes():
    pytest.importorskip("pyautoattack")
    net = smooth(classes=4, shape=(1, 6, 6)).float()
    images, _ = batch(40, shape=(1, 6, 6), dtype=torch.float32)
    labels = net(images).argmax(1)
    unit = autoattack(net, images, labels, 0.05)

    def shifted(images):
        return net((images + 1) / 2)

    wide = autoattack(shifted, images * 2 - 1, labels, 0.1, bounds=(-1.0, 1.0))
    assert excess(images * 2 - 1, wide, 0.1, "linf") <= 0
    one, other = correct(net, unit, labels).float().mean(), correct(shifted, wide, labels).float().mean()
    assert 0 < one < 1
    assert abs(one - other) <= 1 / 40 + 1e-6  # rounding may tip one image


def test_autoattack_names_the_extra(monkeypatch):
    for name in ("autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    images, labels = batch()
    with pytest.raises(ImportError, match=r"pip install 'lightning-rectify\[attacks\]'"):
        autoattack(smooth(), images, labels, 0.1)
