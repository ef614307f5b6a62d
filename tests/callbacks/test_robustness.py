import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import LightningModule, ModelCheckpoint, TensorBoardLogger
from lightning_rectify.attacks import fgsm
from lightning_rectify.callbacks.robustness import RobustnessMonitor, RobustnessWarning, RobustReport
from lightning_rectify.modules.l2l import L2LDefense
from tests.helpers.pool import POOL
from tests.helpers.training import CSVLogger, differences, snapshot, trainer

PIXELS, COUNT = 16, 41  # an odd number: two processes get shares filled up by a repeat
EPSILON = 0.04


def images(count=COUNT, seed=1):
    return 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def plane(seed=0):
    return torch.randn(PIXELS, generator=torch.Generator().manual_seed(seed))


def labels(x):
    return ((x.flatten(1) - 0.5) @ plane() > 0).long()


class Turning(LightningModule):
    """A two-class linear model whose weights are set at the start of each epoch; nothing is learnt.

    First at random; then the four largest of the true ones, which few pixels can mislead; then the true ones, right
    without an attack but moved by every pixel.
    """

    def __init__(self, push=None):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(PIXELS))
        self.epsilon, self.push = EPSILON, push
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        half = (x.flatten(1) - 0.5) @ self.w / 2
        return torch.stack([-half, half], dim=1)

    def weights_of(self, epoch):
        true = plane()
        fewer = torch.where(true.abs() >= true.abs().sort().values[-4], true, torch.zeros_like(true))
        return (plane(8), fewer, true)[epoch]

    def on_train_epoch_start(self):
        with torch.no_grad():
            self.w.copy_(self.weights_of(self.current_epoch))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Defended(Turning):
    """It attacks by FGSM, with a share of epsilon."""

    def attack(self, x, y):
        if not self.push:
            return x
        return fgsm(self, x, y, self.epsilon * self.push)


def distances(w, x, y):
    """From the boundary in linf, below 0 on the wrong side; float64."""
    w, x = w.detach().double(), x.double()
    return (((x.flatten(1) - 0.5) @ w) * (2 * y - 1) / w.abs().sum()).numpy()


def loaders(count=COUNT):
    x = images(count)
    training = DataLoader(TensorDataset(images(8, 3), labels(images(8, 3))), batch_size=4)
    return training, DataLoader(TensorDataset(x, labels(x)), batch_size=6)


def fit(module, *callbacks, epochs=3, logger=None, **options):
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False) if logger is None else logger
    run = trainer(logger=logger, callbacks=list(callbacks), max_epochs=epochs, **options)
    run.fit(module, *loaders())
    return run


def logged(name, folder="csv"):
    """One value an epoch."""
    (path,) = Path(folder).rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def quiet(**options):
    return RobustnessMonitor(**{"examples": 0, "max_images": 1000, **options})


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference_mode", [True, False])
def test_each_epoch_has_the_robust_accuracy_of_the_closed_form(inference_mode):
    module = Turning()
    x = images()
    fit(module, quiet(steps=5), logger=CSVLogger("csv"), inference_mode=inference_mode)
    found = [distances(module.weights_of(epoch), x, labels(x)) for epoch in range(3)]
    assert min(np.abs(d / EPSILON - 1).min() for d in found) > 1e-4  # else float32 could decide an image
    # CSV and metrics hold float32
    assert logged("val/robust_accuracy") == pytest.approx([(d > EPSILON).mean() for d in found], rel=1e-6)
    assert logged("robustness/clean_accuracy") == pytest.approx([(d > 0).mean() for d in found], rel=1e-6)


def test_only_the_first_images_count():
    module, x = Turning(), images()[:10]
    fit(module, quiet(max_images=10, norm="l2", epsilon=0.1, steps=1), epochs=1, logger=CSVLogger("csv"))
    w = module.weights_of(0).double()
    distance = distances(w, x, labels(x)) * float(w.abs().sum() / w.norm())
    # One l2 step of 2.5 radii from a random start leaves the cosine with the gradient above 0.9.
    assert (distance > 0.1).mean() - 1e-6 <= logged("val/robust_accuracy")[0] <= (distance > 0.09).mean() + 1e-6
    assert logged("robustness/clean_accuracy")[0] == pytest.approx((distance > 0).mean(), rel=1e-6)


def test_own_attack_and_its_quality():
    module, x = Defended(push=0.25), images()
    with pytest.warns(RobustnessWarning):
        fit(module, quiet(own_attack_gap=0.05), epochs=1, logger=CSVLogger("csv"))
    distance = distances(module.weights_of(0), x, labels(x))
    own, robust = (distance > 0.25 * EPSILON).mean(), (distance > EPSILON).mean()
    assert logged("robustness/own_attack_accuracy")[0] == pytest.approx(own, rel=1e-6)
    assert logged("robustness/own_attack_gap")[0] == pytest.approx(own - robust, abs=1e-6)
    assert logged("robustness/sign_agreement")[0] == pytest.approx(1, abs=1e-6)
    assert logged("robustness/saturation")[0] == 0
    fit(Defended(push=1.0), quiet(), epochs=1, logger=CSVLogger("whole"))
    assert logged("robustness/saturation", "whole")[0] == pytest.approx(1, abs=1e-6)


def test_an_attack_that_changes_nothing_is_none():
    fit(Defended(push=0.0), quiet(), epochs=1, logger=CSVLogger("csv"))
    with pytest.raises(KeyError):
        logged_row("robustness/own_attack_gap")
    assert logged("val/robust_accuracy")


def logged_row(name):
    (path,) = Path("csv").rglob("metrics.csv")
    with path.open() as file:
        return next(csv.DictReader(file))[name]


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_it_drives_model_checkpoint_whichever_stands_first():
    x = images()
    robust = [(distances(Turning().weights_of(epoch), x, labels(x)) > EPSILON).mean() for epoch in range(3)]
    clean = [(distances(Turning().weights_of(epoch), x, labels(x)) > 0).mean() for epoch in range(3)]
    best = int(np.argmax(robust))
    assert best not in (0, int(np.argmax(clean)))  # neither the first nor the best without an attack
    for order in (1, -1):
        checkpoint = ModelCheckpoint(
            dirpath=f"kept{order}", monitor="val/robust_accuracy", mode="max", filename="{epoch}"
        )
        callbacks = [quiet(), checkpoint][::order]
        fit(Turning(), *callbacks, enable_checkpointing=True)
        assert [path.name for path in Path(f"kept{order}").iterdir()] == [f"epoch={best}.ckpt"]
        assert checkpoint.best_model_score.item() == pytest.approx(robust[best], rel=1e-6)


def test_a_weak_own_attack_alarms_once_and_a_strong_one_never():
    with pytest.warns(RobustnessWarning, match=r"epoch 0 .*PGD-10 only .*gap of .* points") as caught:
        fit(Defended(push=0.1), quiet())
    assert len([w for w in caught if w.category is RobustnessWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustnessWarning)
        fit(Defended(push=1.0), quiet())
        fit(Defended(push=0.1), quiet(own_attack_gap=1.0))


def test_epochs_between_are_left_out_and_a_checkpoint_out_of_step_is_warned_of():
    fit(Turning(), quiet(every_n_epochs=2), logger=CSVLogger("csv"))
    assert len(logged("val/robust_accuracy")) == 1
    checkpoint = ModelCheckpoint(monitor="val/robust_accuracy", mode="max", every_n_epochs=1)
    with pytest.warns(RobustnessWarning, match=r"ModelCheckpoint\(every_n_epochs=2\)"):
        RobustnessMonitor(every_n_epochs=2).setup(
            trainer(callbacks=[checkpoint], enable_checkpointing=True), Turning(), "fit"
        )


def test_validate_alone_logs_too():
    module = Turning()
    with torch.no_grad():
        module.w.copy_(module.weights_of(1))
    (result,) = trainer(callbacks=[quiet(every_n_epochs=5)]).validate(module, loaders()[1], verbose=False)
    x = images()
    assert result["val/robust_accuracy"] == pytest.approx(
        (distances(module.w, x, labels(x)) > EPSILON).mean(), rel=1e-6
    )


# -- training is not touched -------------------------------------------------------------------------------------------


class Random(LightningModule):
    """Batch normalization, some of it frozen, dropout, an attack that draws from all it can."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(),
            nn.Linear(16, 2),
        )  # fmt: skip
        self.epsilon, self.modes = 0.05, []
        self.noise = torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.net(x)

    def attack(self, x, y):
        return (x + 0.02 * torch.randn_like(x).sign() * torch.rand(x.shape, generator=self.noise)).clamp(0, 1)

    def on_train_epoch_start(self):
        self.net[3].eval()
        self.draw = torch.rand(2, generator=self.noise)

    def on_train_batch_start(self, *args):
        self.modes.append([part.training for part in self.modules()])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_training_is_bit_equal_with_and_without():
    """Weights, moments, running statistics, modes, random states."""
    results = []
    for callbacks in ([], [RobustnessMonitor(restarts=2, own_attack_gap=1.0, report_at_end=True, report_options={
        "steps": (1, 2), "restarts": (1,), "attacks": (), "progress": False})]):  # fmt: skip
        torch.manual_seed(7)
        module = Random()
        state = snapshot(fit(module, *callbacks))
        results.append((state, module.modes, module.draw, module.noise.get_state(), torch.get_rng_state()))
    (a, modes_a, *draws_a), (b, modes_b, *draws_b) = results
    assert differences(a, b) == []
    assert modes_a == modes_b
    assert any(True in row and False in row for row in modes_a)
    assert all(torch.equal(x, y) for x, y in zip(draws_a, draws_b, strict=True))


class Looking(Random):
    """It has gradients during validation, and looks at them after it."""

    def on_validation_epoch_start(self):
        with torch.inference_mode(False):  # Lightning took them away
            for p in list(self.parameters())[2:]:
                p.grad = torch.ones_like(p)

    def on_validation_epoch_end(self):
        self.after = [None if p.grad is None else p.grad.clone() for p in self.parameters()]


def test_gradients_are_left_alone():
    module = Looking()
    module.net[0].requires_grad_(False)
    fit(module, quiet(own_attack_gap=1.0), epochs=1, num_sanity_val_steps=0)
    assert module.after[:2] == [None, None]
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in module.after[2:])
    assert not module.net[0].weight.requires_grad


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_tensorboard_and_the_folder_have_curves_and_figures():
    fit(Defended(push=1.0), RobustnessMonitor(examples=3), epochs=2)
    folder = Path("logs/lightning_logs/version_0")
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"val/robust_accuracy", "robustness/clean_accuracy", "robustness/own_attack_gap"} <= set(tags["scalars"])
    assert [event.step for event in events.Images("robustness/examples")] == [2, 4]
    names = sorted(path.name for path in (folder / "robustness").iterdir())
    assert names == ["examples_step=000002.png", "examples_step=000004.png"]
    assert "custom_scalars__config__" in tags["tensors"]


def test_report_at_the_end():
    options = {"steps": (1, 3), "restarts": (1,), "attacks": ("pgd_margin",), "progress": False}
    module = Turning()
    fit(module, quiet(report_at_end=True, report_options=options), logger=CSVLogger("csv"))
    (path,) = Path("csv").rglob("robust_report.json")
    x = images()
    report = RobustReport.load(path)
    assert report.robust_accuracy == (distances(module.w, x, labels(x)) > EPSILON).mean()
    assert logged("robustness/worst_case") == pytest.approx([report.robust_accuracy], rel=1e-6)


def test_a_dry_run_writes_nothing():
    fit(Turning(), RobustnessMonitor(report_at_end=True), fast_dev_run=True)
    assert list(Path().rglob("*.png")) == []
    assert list(Path().rglob("*.json")) == []


# -- with the package's own module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_attack_steps", [0, 3])
def test_with_the_learned_defense(val_attack_steps):
    module = L2LDefense(
        classifier=nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)), num_classes=2, image_size=4, epsilon=EPSILON,
        val_attack_steps=val_attack_steps,
    )  # fmt: skip
    run = fit(module, quiet(own_attack_gap=1.0), epochs=1)
    x, y = images(), labels(images())
    with torch.no_grad():
        linear = module.classifier.network[1]
        logit = x.double().flatten(1) @ (linear.weight[1] - linear.weight[0]).double()
        logit += (linear.bias[1] - linear.bias[0]).double()
        size = (linear.weight[1] - linear.weight[0]).double().abs().sum()
        robust = (logit * (2 * y - 1) / size > EPSILON).double().mean()
    assert run.callback_metrics["val/robust_accuracy"].item() == pytest.approx(robust.item(), rel=1e-6)
    assert 0 <= run.callback_metrics["robustness/sign_agreement"] <= 1


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "`epsilon`"),
        ({"norm": "l1"}, "`norm`"),
        ({"every_n_epochs": 0}, "`every_n_epochs`"),
        ({"max_images": 0}, "`max_images`"),
        ({"steps": 0}, "`steps`"),
        ({"restarts": 0}, "`restarts`"),
        ({"own_attack_gap": 0.0}, "`own_attack_gap`"),
        ({"examples": -1}, "`examples`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RobustnessMonitor(**options)


def test_a_module_without_epsilon_and_normalized_images_are_refused():
    with pytest.raises(ValueError, match=r"`epsilon` of RobustnessMonitor .* Plain has None"):
        fit(type("Plain", (Turning,), {"epsilon": None, "__setattr__": _no_epsilon})(), quiet())
    with pytest.raises(ValueError, match="pixels within `bounds`"):
        fit(Turning(), quiet(bounds=(0.0, 0.5)))


def _no_epsilon(self, name, value):
    if name != "epsilon":
        nn.Module.__setattr__(self, name, value)


# -- two processes -----------------------------------------------------------------------------------------------------


def watch_two():
    found = []
    for max_images in (1000, 15):
        monitor = RobustnessMonitor(max_images=max_images, own_attack_gap=1.0)
        run = fit(Defended(push=0.25), monitor, logger=CSVLogger("two"), devices=2, strategy="ddp", epochs=2)
        found.append({name: value.item() for name, value in run.callback_metrics.items()})
    return found


@pytest.mark.ddp
def test_two_processes_count_what_one_counts():
    ranks = POOL.run(f"{__name__}.watch_two", timeout=240)
    assert ranks[0] == ranks[1]
    for two, max_images in zip(ranks[0], (1000, 15), strict=True):
        one = fit(Defended(push=0.25), quiet(max_images=max_images, own_attack_gap=1.0), epochs=2)
        # Sums of float32 in another order.
        assert two == pytest.approx({name: value.item() for name, value in one.callback_metrics.items()}, abs=1e-6)
        x = images()[:max_images]
        robust = distances(Turning().weights_of(1), x, labels(x)) > EPSILON
        assert two["val/robust_accuracy"] == pytest.approx(robust.mean(), rel=1e-6)
    assert len(list(Path("two").rglob("*.png"))) == 4  # one process drew, once an epoch
