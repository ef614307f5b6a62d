"""Learning rates: formulas, resume, groups, a real training."""

import io
import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import Callback
from lightning_rectify.modules.classifier.module import ImageClassifier
from lightning_rectify.optim.schedules import (
    InverseSquareRoot,
    LinearDecay,
    LinearWarmup,
    UntunedExponentialWarmup,
    UntunedLinearWarmup,
)
from lightning_rectify.optim.variance import effective_warmup
from tests.helpers.training import trainer

# rtol 1e-12 everywhere below: two ways to write a float64 formula, a few roundings apart.
close = partial(pytest.approx, rel=1e-12, abs=0)


def adam(lr=1e-3, betas=(0.9, 0.999)):
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr, betas=betas)


def rates(optimizer, schedule, updates):
    """What each update is made with: a list of the groups' rates for each."""
    found = []
    for _ in range(updates):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        assert schedule.get_last_lr() == found[-1]
        optimizer.step()
        schedule.step()
    return found


def rates_of(make, updates, optimizer=None):
    optimizer = adam() if optimizer is None else optimizer
    return [one for (one,) in rates(optimizer, make(optimizer), updates)]


# Each row: a schedule and what its definition gives for update t = 1, 2, ... of a group with rate 1e-3 and beta2 .999.
FORMULAS = {
    "warmup": (partial(LinearWarmup, warmup_steps=7), lambda t: 1e-3 * min(1, t / 7)),
    "warmup from a part": (
        partial(LinearWarmup, warmup_steps=10, start_factor=0.2),
        lambda t: 1e-3 * (0.2 + 0.8 * t / 10 if t < 10 else 1),
    ),
    "no warmup": (partial(LinearWarmup, warmup_steps=0, start_factor=0.3), lambda t: 1e-3),
    "inverse root": (
        partial(InverseSquareRoot, warmup_steps=9),
        lambda t: 1e-3 * (t / 9 if t <= 9 else (9 / t) ** 0.5),
    ),
    "inverse root from a part": (
        partial(InverseSquareRoot, warmup_steps=9, start_factor=0.5),
        lambda t: 1e-3 * (0.5 + 0.5 * t / 9 if t <= 9 else (9 / t) ** 0.5),
    ),
    "inverse root alone": (partial(InverseSquareRoot, warmup_steps=0), lambda t: 1e-3 / t**0.5),
    "decay": (partial(LinearDecay, total_steps=40), lambda t: 1e-3 * (40 - t) / 40 if t < 40 else 0),
    "decay after warmup": (
        partial(LinearDecay, total_steps=40, warmup_steps=8, final_lr=1e-6, start_lr=1e-5),
        lambda t: 1e-5 + 9.9e-4 * t / 8 if t <= 8 else 1e-3 + (1e-6 - 1e-3) * (t - 8) / 32 if t < 40 else 1e-6,
    ),
    "untuned line": (UntunedLinearWarmup, lambda t: 1e-3 * min(1, t * 0.001 / 2)),
    "untuned exponential": (UntunedExponentialWarmup, lambda t: 1e-3 * (1 - math.exp(-0.001 * t))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    make, formula = FORMULAS[name]
    updates = 2500 if name.startswith("untuned") else 60  # beyond the 2,000 updates of the untuned line
    # 1e-18: the last rates of a decay to 0. 1e-10: 1 - exp(-x) cancels three digits at x = .001.
    expected = [pytest.approx(formula(t), rel=1e-10, abs=1e-18) for t in range(1, updates + 1)]
    assert rates_of(make, updates) == expected


def test_the_transformers_own_schedule():
    """Vaswani et al. 2017, equation 3, as it is printed: width 512, 4000 updates of warmup."""
    printed = [512**-0.5 * min(t**-0.5, t * 4000**-1.5) for t in range(1, 6001)]
    optimizer = adam(lr=512**-0.5 * 4000**-0.5)
    assert rates_of(partial(InverseSquareRoot, warmup_steps=4000), 6000, optimizer) == [close(rate) for rate in printed]


def test_the_papers_translation_runs():
    """RAdam's IWSLT recipe: its corner points, and straight lines between them."""
    optimizer = adam(lr=3e-4)
    schedule = LinearDecay(optimizer, total_steps=70_000, warmup_steps=4_000, final_lr=1e-9, start_lr=1e-8)
    lines = {2_000: (1e-8 + 3e-4) / 2, 4_000: 3e-4, 37_000: (3e-4 + 1e-9) / 2, 70_000: 1e-9, 100_000: 1e-9}
    for update, rate in lines.items():
        schedule.last_epoch = update - 1
        # 1e-9: differences of numbers that are 1e5 apart.
        assert schedule.get_lr() == [pytest.approx(rate, rel=1e-9)]


def test_warmup_is_torchs_linear_lr_one_update_on():
    """Torch's first update has the start factor itself; ours is the one after, so that none is lost."""
    ours = rates_of(partial(LinearWarmup, warmup_steps=6, start_factor=0.25), 10)
    theirs = rates_of(partial(LinearLR, start_factor=0.25, total_iters=6), 11)
    assert ours == [close(rate) for rate in theirs[1:]]


@pytest.mark.parametrize("beta2", [0.9, 0.98, 0.99])
def test_untuned_warmups_hold_back_what_ma_and_yarats_say(beta2):
    """Sums of 1 - factor over all updates, in closed form; RAdam's own is within 50 % of the linear one's."""
    updates = int(40 / (1 - beta2))  # e^-40 is left of the exponential's tail
    line, exponential = (
        sum(1 - rate for rate in rates_of(make, updates, adam(lr=1.0, betas=(0.9, beta2))))
        for make in (UntunedLinearWarmup, UntunedExponentialWarmup)
    )
    # 1e-9: up to 4,000 terms are added.
    assert line == pytest.approx(1 / (1 - beta2) - 0.5, rel=1e-9)
    assert exponential == pytest.approx(1 / math.expm1(1 - beta2), rel=1e-9)
    assert line < effective_warmup(beta2) < 1.5 * line


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("stop", [1, 5, 9, 33])
def test_resume_is_bit_equal(name, stop):
    make, _ = FORMULAS[name]
    whole = rates_of(make, 50)
    optimizer = adam()
    schedule = make(optimizer)
    assert rates(optimizer, schedule, stop) == [[rate] for rate in whole[:stop]]
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for order in (("optimizer", "schedule"), ("schedule", "optimizer")):
        again = {"optimizer": adam(lr=0.5)}  # the rates come from the file
        again["schedule"] = make(again["optimizer"])
        for part in order:
            again[part].load_state_dict(saved[part])
        assert rates(again["optimizer"], again["schedule"], 50 - stop) == [[rate] for rate in whole[stop:]]


@pytest.mark.parametrize("name", FORMULAS)
def test_each_group_keeps_its_rate_and_its_betas(name):
    make, _ = FORMULAS[name]
    settings = [{"lr": 1e-3, "betas": (0.9, 0.999)}, {"lr": 0.2, "betas": (0.5, 0.9)}]
    optimizer = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in settings])
    together = rates(optimizer, make(optimizer), 30)
    alone = [rates_of(make, 30, adam(**group)) for group in settings]
    assert together == [list(pair) for pair in zip(*alone, strict=True)]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_rate_that_is_a_tensor(name):
    make, _ = FORMULAS[name]
    rate = torch.tensor(1e-3)
    optimizer = adam(lr=rate)
    # 1e-6: the tensor is float32.
    expected = [pytest.approx(value, rel=1e-6, abs=1e-10) for value in rates_of(make, 45)]
    assert rates_of(make, 45, optimizer) == expected
    assert optimizer.param_groups[0]["lr"] is rate  # a compiled step reads it where it is


def test_after_one_another():
    """As a part of torch's SequentialLR each counts from where its turn begins."""
    optimizer = adam()
    parts = [LinearWarmup(optimizer, warmup_steps=5), CosineAnnealingLR(optimizer, T_max=20)]
    found = rates(optimizer, SequentialLR(optimizer, parts, milestones=[5]), 25)
    expected = [t / 5 for t in range(1, 6)] + [(1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)]
    assert found == [[pytest.approx(1e-3 * factor, rel=1e-9)] for factor in expected]  # torch's cosine is a recursion
    optimizer = adam()
    parts = [LinearLR(optimizer, 0.5, total_iters=4), InverseSquareRoot(optimizer, warmup_steps=0)]
    found = rates(optimizer, SequentialLR(optimizer, parts, milestones=[4]), 10)
    assert [rate for (rate,) in found[4:]] == [close(1e-3 / t**0.5) for t in range(1, 7)]


def test_resume_of_a_chain_is_bit_equal():
    def make():
        optimizer = adam()
        parts = [LinearWarmup(optimizer, warmup_steps=5), LinearDecay(optimizer, total_steps=20)]
        return optimizer, SequentialLR(optimizer, parts, milestones=[5])

    whole = rates(*make(), 30)
    optimizer, schedule = make()
    rates(optimizer, schedule, 9)
    again_optimizer, again = make()
    again_optimizer.load_state_dict(optimizer.state_dict()), again.load_state_dict(schedule.state_dict())
    assert rates(again_optimizer, again, 21) == whole[9:]
    optimizer = adam()  # a chain multiplies nothing here: the last part decides
    chain = ChainedScheduler([LinearWarmup(optimizer, warmup_steps=5), LinearDecay(optimizer, total_steps=20)])
    assert rates(optimizer, chain, 10) == [[close(1e-3 * (20 - t) / 20)] for t in range(1, 11)]


class Rates(Callback):
    """The rate of each update, as the optimizer sees it."""

    def __init__(self):
        self.found = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.found.append(optimizer.param_groups[0]["lr"])
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_counts_updates(accumulate, tmp_path):
    """Under a real Trainer, over epochs, with accumulation, and after a resume in the middle of an epoch."""
    data = TensorDataset(torch.zeros(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64))
    make = partial(LinearDecay, total_steps=9, warmup_steps=4)

    def run(steps, ckpt_path=None):
        module = ImageClassifier(
            optimizer=partial(torch.optim.Adam, lr=0.01), lr_scheduler=make, lr_scheduler_interval="step"
        )
        seen = Rates()
        fit = trainer(max_epochs=-1, max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[seen])
        fit.fit(module, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
        return fit, seen.found

    expected = [0.01 * (t / 4 if t <= 4 else max(0, 9 - t) / 5) for t in range(1, 11)]
    assert run(10)[1] == [pytest.approx(rate, rel=1e-12, abs=1e-18) for rate in expected]
    fit, first = run(4)
    fit.save_checkpoint(tmp_path / "stopped.ckpt")
    assert first + run(10, tmp_path / "stopped.ckpt")[1] == run(10)[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(LinearWarmup, warmup_steps=-1), "`warmup_steps` to be at least 0 but got -1"),
        (partial(LinearWarmup, warmup_steps=2, start_factor=1.5), r"`start_factor` to be in \[0, 1\] but got 1.5"),
        (partial(InverseSquareRoot, warmup_steps=-3), "`warmup_steps` to be at least 0 but got -3"),
        (partial(InverseSquareRoot, warmup_steps=3, start_factor=math.nan), "`start_factor`.*but got nan"),
        (partial(LinearDecay, total_steps=0), "`total_steps` to be above `warmup_steps`, which is 0, but got 0"),
        (partial(LinearDecay, total_steps=5, warmup_steps=5), "`total_steps`.*which is 5, but got 5"),
        (partial(LinearDecay, total_steps=5, warmup_steps=-1), "`warmup_steps` to be at least 0 but got -1"),
        (partial(LinearDecay, total_steps=5, final_lr=-1e-9), r"`final_lr` to be in \[0, 0.001\].*but got -1e-09"),
        (partial(LinearDecay, total_steps=5, final_lr=0.01), r"`final_lr` to be in \[0, 0.001\].*but got 0.01"),
        (partial(LinearDecay, total_steps=5, start_lr=0.1), r"`start_lr` to be in \[0, 0.001\].*but got 0.1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(adam())


@pytest.mark.parametrize("make", [UntunedLinearWarmup, UntunedExponentialWarmup])
def test_untuned_warmup_needs_betas(make):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"`optimizer` of {make.__name__} to have `betas`.*got SGD without"):
        make(sgd)
    optimizer = adam()
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match=r"`betas\[1\]`.*in \[0, 1\) but got 1.0"):
        make(optimizer)
