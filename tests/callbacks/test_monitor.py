import csv
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_rectify import AdaptiveRateMonitor, RectifiedAdam, RectifiedModule
from lightning_rectify._lightning import LightningModule, MisconfigurationException, TensorBoardLogger, Trainer
from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateWarning
from lightning_rectify.callbacks.adaptive_rate.dashboard import PREFIX, is_histogram_step
from lightning_rectify.callbacks.adaptive_rate.quantities import QUANTITIES
from lightning_rectify.callbacks.adaptive_rate.watch import OptimizerWatch
from lightning_rectify.optim import FrozenStartAdam
from lightning_rectify.optim.variance import sma_length


class Regression(LightningModule):
    """A user's module that knows nothing of the package."""

    def __init__(self, make=RectifiedAdam):
        super().__init__()
        self.make = make
        self.body, self.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self(x) - y).pow(2).mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


class Game(Regression):
    """Two players, manual optimization: the head takes two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        for optimizer in (body, head, head):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return (
            RectifiedAdam([{"params": self.body.parameters(), "name": "body"}]),
            torch.optim.NAdam([{"params": self.head.parameters(), "name": "head"}]),
        )


def data(batches=12, size=8, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 6, generator=generator)
    y = scale * (x.sum(1, keepdim=True) + 0.1 * torch.randn(len(x), 1, generator=generator))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)


def fit(module, monitor, batches=12, logger=None, scale=1.0, **kwargs):
    torch.manual_seed(0)
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 5}
    options |= {"enable_checkpointing": False, "accelerator": "cpu"}
    callbacks = [monitor] if monitor else []
    logger = TensorBoardLogger("logs", default_hp_metric=False) if logger is None else logger
    trainer = Trainer(logger=logger, callbacks=callbacks, **(options | kwargs))
    trainer.fit(module, data(batches, scale=scale))
    return trainer


def points(trainer):
    """The CSV as {group: {quantity: array}}."""
    with open(f"{trainer.log_dir}/adaptive_rate.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = dict.fromkeys(row["group"] for row in rows)
    return {
        g: {name: np.array([float(row[name]) for row in rows if row["group"] == g]) for name in ("step", *QUANTITIES)}
        for g in groups
    }


OPTIMIZERS = {
    "RectifiedAdam": RectifiedAdam,
    "skip": lambda p: RectifiedAdam(p, early_phase="skip"),
    "RAdam": torch.optim.RAdam,
    "Adam": torch.optim.Adam,
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.filterwarnings("ignore::lightning_rectify.callbacks.adaptive_rate.AdaptiveRateWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_are_those_of_the_optimizer(name):
    module = Regression(OPTIMIZERS[name])
    trainer = fit(module, AdaptiveRateMonitor(sample_size=None), batches=13)
    table = points(trainer)["model"]
    assert table["step"].tolist() == list(range(1, 14))
    (optimizer,) = trainer.optimizers
    group = optimizer.param_groups[0]
    key, beta2 = ("square_avg", 0.99) if name == "RMSprop" else ("exp_avg_sq", 0.999)
    v = torch.cat([optimizer.state[p][key].flatten() for p in module.parameters()]).double()
    if name == "RMSprop":
        psi = 1 / (v.sqrt() + group["eps"])
    elif name in ("RectifiedAdam", "skip", "RAdam"):
        psi = (1 - beta2**13) ** 0.5 / (v.sqrt() + group["eps"])
    else:
        psi = 1 / ((v / (1 - beta2**13)).sqrt() + group["eps"])
    # 1e-6: state is float32, and the CSV has nine digits.
    assert table["variance"][-1] == pytest.approx(psi.var(unbiased=False).item(), rel=1e-6)
    assert table["mean"][-1] == pytest.approx(psi.mean().item(), rel=1e-6)
    assert table["rho"].tolist() == pytest.approx([sma_length(float(t), beta2) for t in range(1, 14)], rel=1e-8)
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()]).abs()
    assert table["gradient_median"][-1] == pytest.approx(gradient.quantile(0.5).item(), rel=1e-6)


class Wide(Regression):
    """200 units: 1,601 coordinates."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 200), torch.nn.Linear(200, 1)


def test_sampled_is_near_exact():
    exact = points(fit(Wide(), AdaptiveRateMonitor(sample_size=None)))["model"]
    sampled = points(fit(Wide(), AdaptiveRateMonitor(sample_size=800)))["model"]
    assert (exact["rho"] == sampled["rho"]).all()
    assert (exact["log_variance"] != sampled["log_variance"]).any()
    # Three standard errors: sqrt(2/800) = 5 % for a normal law, less for half of all coordinates without replacement.
    np.testing.assert_allclose(sampled["log_variance"], exact["log_variance"], rtol=0.15)


def test_training_is_not_touched():
    with_monitor, without = Regression(), Regression()
    without.load_state_dict(with_monitor.state_dict())
    fit(with_monitor, AdaptiveRateMonitor(per_layer=True)), fit(without, None)
    for a, b in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_point_a_real_step_of_each_player():
    game = Game()
    with pytest.warns(AdaptiveRateWarning, match="NAdam runs without warmup"):
        trainer = fit(game, AdaptiveRateMonitor(), batches=9)
    table = points(trainer)
    assert table["body"]["step"].tolist() == list(range(1, 10))
    assert table["head"]["step"].tolist() == list(range(1, 19))
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars(f"{PREFIX}/head/variance")] == list(range(1, 19))


def test_accumulation_counts_steps_not_micro_batches():
    trainer = fit(Regression(), AdaptiveRateMonitor(), batches=12, accumulate_grad_batches=4)
    assert points(trainer)["model"]["step"].tolist() == [1, 2, 3]


def test_skipped_steps_leave_no_point():
    """torch's fused Adam calls its hooks also where a gradient scaler found an overflow and nothing moved."""
    weight = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.Adam([weight], fused=True)
    watch = OptimizerWatch(optimizer, {weight: "w"}, ["model"], False, None, rows=50, seed=0)
    for overflow in (0.0, 0.0, 1.0, 0.0, 1.0):
        weight.grad = torch.ones(50)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(overflow)
        optimizer.step()
        if watch.stale:
            watch.rebuild()
        watch.record()
    ((_, block),) = watch.blocks(lambda tensor: tensor)
    assert block.t[:, 0].tolist() == [1, 2, 3]


def test_thinning_keeps_the_beginning_and_the_papers_iterations():
    trainer = fit(Regression(), AdaptiveRateMonitor(every_n_steps=7), batches=60)
    kept = [t for t in range(1, 61) if t <= 10 or t % 7 == 0 or is_histogram_step(t)]
    assert points(trainer)["model"]["step"].tolist() == kept


def test_layers_on_demand_and_their_keys():
    table = points(fit(Regression(), AdaptiveRateMonitor(per_layer=True)))
    assert list(table) == ["model", "model/body", "model/head"]
    assert all(column["step"].tolist() == list(range(1, 13)) for column in table.values())


class Grouped(RectifiedModule):
    """The base class's named groups; the head is unfrozen at step 5."""

    def __init__(self, names=("body", "head")):
        super().__init__(optimizer=partial(RectifiedAdam, early_phase="skip"))
        self.names = list(names)
        self.body, self.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)
        self.head.requires_grad_(False)

    training_step = Regression.training_step
    forward = Regression.forward

    def parameter_groups(self):
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters()}]
        return [group | ({"name": name} if name else {}) for group, name in zip(groups, self.names, strict=True)]

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 5:
            self.head.requires_grad_(True)


def test_late_parameters_get_a_line_of_their_own_when_they_start():
    table = points(fit(Grouped(), AdaptiveRateMonitor()))
    assert table["body"]["step"].tolist() == list(range(1, 13))
    assert table["head"]["step"].tolist() == list(range(1, 8))


def test_unnamed_groups_are_numbered_and_names_are_unique():
    assert list(points(fit(Grouped((None, "head")), AdaptiveRateMonitor()))) == ["pg0", "head"]
    with pytest.raises(ValueError, match="'head' twice"):
        fit(Grouped(("head", "head")), AdaptiveRateMonitor())


def test_tensorboard_gets_histograms_figure_and_layout():
    trainer = fit(Regression(), AdaptiveRateMonitor(), batches=11)
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    for kind in ("log_gradient", "log_rate"):
        assert [event.step for event in events.Histograms(f"{PREFIX}/model/{kind}")] == [1, 5, 10]
    assert events.Images(f"{PREFIX}/figure")[0].width > 500
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    with open(f"{trainer.log_dir}/adaptive_rate.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_latest_values_reach_callback_metrics():
    trainer = fit(Regression(), AdaptiveRateMonitor())
    table = points(trainer)["model"]
    for name in QUANTITIES:  # the last flush before the last batch's end is at step 10
        assert trainer.callback_metrics[f"{PREFIX}/model/{name}"].item() == pytest.approx(table[name][9], rel=1e-6)


def test_a_failed_run_leaves_its_points_and_figure():
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 7:
                raise RuntimeError("the disk is on fire")
            return super().training_step(batch, batch_idx)

    logger = TensorBoardLogger("logs", default_hp_metric=False)
    monitor = AdaptiveRateMonitor()
    with pytest.raises(RuntimeError, match="on fire"):
        fit(Failing(), monitor, logger=logger)
    with open(f"{logger.log_dir}/adaptive_rate.csv") as file:
        assert sum(1 for _ in file) == 1 + 7
    assert monitor._handles == []


def test_a_run_that_goes_on_in_its_folder_rewrites_what_came_after_the_checkpoint():
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False)
    options = {"logger": logger, "batches": 10, "enable_checkpointing": True}
    module = Regression()
    fit(module, AdaptiveRateMonitor(), **options, max_steps=4, max_epochs=-1)
    torch.manual_seed(0)
    trainer = Trainer(logger=logger, callbacks=[AdaptiveRateMonitor()], max_epochs=2, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    checkpoint = f"{logger.log_dir}/checkpoints/epoch=0-step=4.ckpt"
    # More steps were taken than the checkpoint knows.
    with open(f"{logger.log_dir}/adaptive_rate.csv", "a") as file:
        file.write(",".join(["model", "5", *["0.0"] * len(QUANTITIES)]) + "\n")
    trainer.fit(Regression(), data(10), ckpt_path=checkpoint)
    table = points(trainer)["model"]
    assert table["step"].tolist() == list(range(1, 15))
    assert table["rho"].min() > 0


def test_needs_a_logger_and_a_second_moment():
    with pytest.raises(MisconfigurationException, match="logger=False"):
        fit(Regression(), AdaptiveRateMonitor(), logger=False)
    with pytest.raises(ValueError, match=r"second moment.*but got SGD"):
        fit(Regression(lambda p: torch.optim.SGD(p, lr=0.1)), AdaptiveRateMonitor())
    fit(Regression(), AdaptiveRateMonitor(strict=False), logger=False)
    fit(Regression(lambda p: torch.optim.SGD(p, lr=0.1)), AdaptiveRateMonitor(strict=False))
    fit(Regression(), AdaptiveRateMonitor(), fast_dev_run=3)
    # Adamax shows betas but keeps no second moment: known only after its first step.
    with pytest.raises(ValueError, match="Adamax keeps"):
        fit(Regression(torch.optim.Adamax), AdaptiveRateMonitor())
    trainer = fit(Regression(torch.optim.Adamax), AdaptiveRateMonitor(strict=False))
    assert trainer.global_step == 12


@pytest.mark.parametrize(
    ("options", "words"), [({"every_n_steps": 0}, "every_n_steps"), ({"sample_size": 1}, "sample_size")]
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveRateMonitor(**options)


# -- alarms ------------------------------------------------------------------------------------------------------------


def warmup(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


class Scheduled(Regression):
    def __init__(self, make, steps):
        super().__init__(make)
        self.steps = steps

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return [optimizer], [{"scheduler": warmup(optimizer, self.steps), "interval": "step"}]


def alarms_of(module, **kwargs):
    monitor = AdaptiveRateMonitor()
    fit(module, monitor, **kwargs)
    return {alarm for alarm, _ in monitor.alarms}


def test_healthy_runs_raise_no_alarm():
    # An AdaptiveRateWarning that no test asks for is an error, so these also fail loudly.
    assert alarms_of(Regression(lambda p: RectifiedAdam(p, early_phase="skip")), batches=60) == set()
    assert alarms_of(Scheduled(torch.optim.AdamW, 40), batches=60) == set()


def test_alarm_early_jump():
    with pytest.warns(AdaptiveRateWarning, match=r"steps 1 to 5 were [\d.e+]+ times larger.*first rectified step 6"):
        assert alarms_of(Regression(), scale=1e4) == {"early_jump"}


def test_alarm_double_warmup():
    with pytest.warns(AdaptiveRateWarning, match=r"over 40 steps on top of rectification.*rectification alone 1033"):
        found = alarms_of(Scheduled(lambda p: RectifiedAdam(p, early_phase="skip"), 40), batches=60)
    assert found == {"double_warmup"}


def test_alarm_no_warmup():
    with pytest.warns(AdaptiveRateWarning, match=r"AdamW runs without warmup.*0.0258 at step 6, 0.215 at 100"):
        assert alarms_of(Regression(torch.optim.AdamW)) == {"no_warmup"}


def test_alarm_never_rectifies():
    with pytest.warns(AdaptiveRateWarning, match=r"beta2 = 0.65 never rectifies"):
        assert alarms_of(Regression(lambda p: torch.optim.RAdam(p, betas=(0.9, 0.65)))) == {"never_rectifies"}


def test_alarm_eps_ruled():
    with pytest.warns(AdaptiveRateWarning, match=r"eps rules 100% of the coordinates"):
        found = alarms_of(Regression(lambda p: RectifiedAdam(p, eps=1e3, early_phase="skip")), batches=30)
    assert found == {"eps_ruled"}


class Deep(Regression):
    """ReLUs behind each other, without normalization: a few steps that are too large switch them all off."""

    def __init__(self, make):
        super().__init__(make)
        widths = (6, 16, 16, 16, 16, 6)
        layers = [part for a, b in pairwise(widths) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        self.before = torch.nn.Sequential(*layers)

    def forward(self, x):
        return super().forward(x + self.before(x))


def test_alarm_collapse():
    with pytest.warns(AdaptiveRateWarning, match=r"median gradient fell from \S+ at the first step to \S+ at step 50"):
        found = alarms_of(Deep(partial(RectifiedAdam, lr=30.0, early_phase="skip")), batches=60)
    assert found == {"collapse"}
    assert alarms_of(Deep(partial(RectifiedAdam, lr=0.01, early_phase="skip")), batches=60) == set()


@pytest.mark.filterwarnings("ignore:.*runs without warmup")
def test_alarm_collapse_counts_from_the_first_step_that_moves_a_weight():
    make = partial(FrozenStartAdam, lr=1.0, frozen_steps=40)
    assert "collapse" not in alarms_of(Deep(make), batches=85)  # 45 moved
    with pytest.warns(AdaptiveRateWarning, match=r"fell from \S+ at the first step to \S+ at step 90"):
        assert "collapse" in alarms_of(Deep(make), batches=95)


def test_alarm_stalled_moments_in_bfloat16():
    class Half(Regression):
        def __init__(self, make):
            super().__init__(make)
            self.bfloat16()

        def training_step(self, batch, batch_idx):
            # Gradients of one size, as late in training: v approaches g^2 and then every change is below its last bit.
            return super().training_step([part.bfloat16() for part in batch], batch_idx).sqrt()

    with pytest.warns(AdaptiveRateWarning, match=r"stands still in \d+% of the coordinates"):
        found = alarms_of(Half(lambda p: torch.optim.RAdam(p, betas=(0.9, 0.9999))), batches=200)
    assert "stalled" in found
    assert "stalled" not in alarms_of(
        Half(lambda p: RectifiedAdam(p, betas=(0.9, 0.9999), early_phase="skip")), batches=200
    )


def test_alarms_are_said_once_and_survive_a_resume():
    monitor = AdaptiveRateMonitor()
    with pytest.warns(AdaptiveRateWarning):
        fit(Regression(torch.optim.Adam), monitor)
    other = AdaptiveRateMonitor()
    other.load_state_dict(monitor.state_dict())
    fit(Regression(torch.optim.Adam), other)  # no second warning: it would be an error
    assert other.alarms == monitor.alarms
