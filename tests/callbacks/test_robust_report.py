import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import LightningModule
from lightning_rectify.callbacks.robustness import Evidence, Limits, RobustReport, masking_checks, robust_report
from lightning_rectify.data.images import ImageData

PIXELS = 16
QUICK = {"steps": (1, 5), "restarts": (1, 2), "apgd_steps": 5, "queries": 30, "progress": False}
LOOK = {**QUICK, "attacks": ("fgsm", "pgd", "pgd_margin")}


def weights(classes=2):
    w = torch.randn(classes, PIXELS, generator=torch.Generator().manual_seed(0))
    return w, -0.5 * w.sum(dim=1)  # the boundary goes through the middle of the cube


class Linear(nn.Module):
    def __init__(self, classes=2, scale=1.0):
        super().__init__()
        w, b = weights(classes)
        self.w, self.b, self.scale = nn.Parameter(w), nn.Parameter(b), scale

    def forward(self, images):
        return self.scale * (images.flatten(1) @ self.w.T + self.b)


class Staircase(Linear):
    """Pixels are rounded to eighths before they are looked at: no gradient anywhere."""

    def forward(self, images):
        return super().forward(torch.round(images * 8) / 8)


def images(count=60, low=0.3, high=0.7):
    """Far enough from 0 and 1 that the bounds play no part at epsilon 0.2."""
    return low + (high - low) * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def labelled(count=60, wrong=5, **options):
    x = images(count, **options)
    y = Linear()(x).argmax(1)
    y[:wrong] = 1 - y[:wrong]
    return x, y


def margins(x, y, norm="linf"):
    """Distance to the boundary of the two-class model, below 0 on the wrong side; float64."""
    w, b = (value.double() for value in weights())
    difference = w[1] - w[0]
    z = (x.double().flatten(1) @ difference + b[1] - b[0]) * (2 * y - 1)
    return (z / (difference.abs().sum() if norm == "linf" else difference.norm())).numpy()


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("linf", 0.05), ("l2", 0.08), ("l2", 0.2)])
def test_a_linear_model_has_the_robust_accuracy_of_the_closed_form(norm, epsilon):
    x, y = labelled()
    distance = margins(x, y, norm)
    assert np.abs(distance / epsilon - 1).min() > 1e-4  # else float32 could decide an image
    report = robust_report(Linear(), (x, y), epsilon, norm=norm, **QUICK)
    robust = distance > epsilon
    assert 0 < robust.sum() < len(x) - 5
    np.testing.assert_array_equal(report.correct, distance > 0)
    np.testing.assert_array_equal(report.robust, robust)
    expected = robust.mean()
    alone = {row.name: row.alone for row in report.attacks if row.alone is not None}
    assert alone["fgsm"] == expected
    assert report.epsilons.tolist() == pytest.approx([0.5 * epsilon, epsilon, 2 * epsilon, 4 * epsilon])
    found = [(alone["pgd-1"], epsilon), (alone["pgd-5"], epsilon)]
    found += [(value, epsilon) for value in (*report.steps_accuracy, *report.restarts_accuracy)]
    found += zip(report.epsilons_accuracy, report.epsilons, strict=True)
    # In l2 each step of half the radius shrinks the angle to the gradient by a third: five leave its cosine above 0.95
    # (one step, of 2.5 radii, also). In linf the corner is reached.
    reach = 1.0 if norm == "linf" else 0.95
    for value, radius in found:
        assert (distance > radius).mean() <= value <= (distance > reach * radius).mean()
    assert report.passed
    assert set(report.skipped) == {"apgd_dlr_targeted"}


@pytest.mark.parametrize("attack", ["pgd_margin", "apgd_ce", "apgd_dlr", "apgd_dlr_targeted", "square"])
def test_each_further_attack_faces_what_is_left(attack):
    x = images()
    y = Linear(classes=5)(x).argmax(1)
    report = robust_report(Linear(classes=5), (x, y), 0.05, **{**QUICK, "attacks": (attack,)})
    last, before = report.attacks[-1], report.attacks[-2]
    assert last.faced == round(before.worst * 60)
    assert last.alone is None
    assert last.worst == report.robust_accuracy
    # A linear model's loss is convex: the corner that PGD reaches for two classes need not be the worst one for five,
    # so a further attack may break more, never fewer.
    assert last.worst <= before.worst


def test_the_worst_case_is_counted_image_by_image():
    """Half of the images fall to the transferred attack alone, the gradient being masked there."""

    class Half(Linear):
        def forward(self, images):
            dull = (images[:, 0, 0, 0] < 0.5)[:, None]
            logits = super().forward(images)
            return torch.where(dull, logits.detach(), logits)

    x, y = labelled(wrong=0, low=0.3, high=0.7)
    x[::2, 0, 0, 0], x[1::2, 0, 0, 0] = 0.35, 0.65
    y = Linear()(x).argmax(1)
    epsilon, distance = 0.06, margins(x, y)
    report = robust_report(Half(), (x, y), epsilon, transfer_from={"open": Linear()}, **LOOK)
    falls = distance <= epsilon
    assert falls[::2].any()
    assert falls[1::2].any()
    np.testing.assert_array_equal(report.robust, ~falls)
    assert report.robust_accuracy < report.steps_accuracy.min()
    by = np.array(report.broken_by)
    assert set(by[falls]) == {"noise", "transfer from open"}  # they ran first
    assert (report.steps_accuracy < report.clean_accuracy).all()  # the other half falls to PGD
    assert (by[~falls] == "").all()
    assert {check.name for check in report.failed} >= {"zero_gradient", "transfer_weaker"}
    # What the weak attack broke was not kept from PGD: it still faced all images.
    assert next(row for row in report.attacks if row.name == "pgd-5").faced == 60


def test_standard_error_is_the_binomial_one():
    x, y = labelled()
    report = robust_report(Linear(), (x, y), 0.05, **LOOK)
    p = report.robust_accuracy
    draws = np.random.default_rng(0).binomial(60, p, size=200_000) / 60
    # Its relative error over 200,000 draws is 1 / sqrt(400,000) = 0.16 %.
    assert report.standard_error(p) == pytest.approx(draws.std(), rel=0.01)
    assert f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / 60):.1f}" in report.table()


def test_the_same_seed_gives_the_same_report_and_another_another():
    x, y = labelled()
    model = nn.Sequential(Linear(classes=8), nn.Tanh(), nn.Linear(8, 2))
    plain = [
        _without_times(robust_report(model, (x, y), 0.05, seed=seed, **QUICK).to_dict()) for seed in (3, 3, 4)
    ]  # fmt: skip
    assert plain[0] == plain[1]
    assert plain[0]["steps_loss"] != plain[2]["steps_loss"]


def _without_times(plain):
    return {**plain, "seconds": 0, "attacks": [{**row, "seconds": 0} for row in plain["attacks"]]}


# -- checks ------------------------------------------------------------------------------------------------------------


def failures(model, epsilon=0.05, data=None, **options):
    return {check.name for check in robust_report(model, data or labelled(), epsilon, **{**QUICK, **options}).failed}


def test_an_honest_model_passes_every_check():
    assert failures(Linear(), transfer_from=Linear(), own_attack=lambda x, y: x + 0.001) == {"collapse"}
    assert failures(Linear(), transfer_from=Linear()) == set()


def test_a_staircase_is_flagged():
    # PGD is no more than its random starts; Square needs no gradient.
    assert failures(Staircase(), epsilon=0.15, queries=200) >= {"zero_gradient", "square_weaker", "unbounded"}


def test_saturated_logits_are_flagged_and_the_margin_sees_through():
    x, y = labelled()
    report = robust_report(Linear(scale=1e4), (x, y), 0.05, **LOOK)
    assert not report.check("zero_gradient").passed
    assert report.check("zero_gradient").value > 0.5
    np.testing.assert_array_equal(report.robust, margins(x, y) > 0.05)  # scale moves no boundary
    assert report.robust_accuracy < report.steps_accuracy[-1]
    rounded = failures(lambda images: (1e4 * Linear()(images)).round().detach() + 0 * images.flatten(1)[:, :2])
    assert "zero_gradient" in rounded


def test_random_and_batch_dependent_outputs_are_flagged():
    def noisy(x):
        return Linear()(x) + 0.1 * torch.randn(len(x), 2)

    def together(x):
        logits = Linear()(x)
        return logits - logits.mean(dim=0)

    for model in (noisy, together):
        x, y = labelled()
        report = robust_report(model, (x, y), 0.02, **LOOK)
        assert report.check("deterministic").passed is False


def test_probabilities_are_flagged():
    assert "logits" in failures(lambda x: Linear()(x).softmax(1), attacks=())


def test_an_attack_outside_the_ball_does_not_count():
    x, y = labelled(wrong=0)
    opposite = {0: x[y == 1][0], 1: x[y == 0][0]}

    def cheat(images, labels):
        return torch.stack([opposite[int(label)] for label in labels])

    report = robust_report(Linear(), (x, y), 0.01, own_attack=cheat, **LOOK)
    assert report.check("inside").value == 60
    assert report.own_attack_accuracy == 1.0
    np.testing.assert_array_equal(report.robust, margins(x, y) > 0.01)


def test_a_weak_own_attack_is_a_collapse_and_a_strong_one_is_not():
    class Defended(Linear):
        push = 0.0

        def attack(self, images, labels):
            w = self.w.detach()
            down = -(w[labels] - w[1 - labels]).sign().view_as(images)
            return images + self.push * down

    x, y = labelled()
    model = Defended()
    assert robust_report(model, (x, y), 0.05, **LOOK).own_attack_accuracy is None  # it changes nothing: no attack
    for push, passed in ((0.005, False), (0.05, True)):
        model.push = push
        report = robust_report(model, (x, y), 0.05, **LOOK)
        assert report.check("collapse").passed is passed
        assert report.own_attack_accuracy == (margins(x, y) > push).mean()
        assert report.check("collapse").value == pytest.approx(report.own_attack_accuracy - report.robust_accuracy)
    assert robust_report(model, (x, y), 0.05, own_attack=False, **LOOK).own_attack_accuracy is None


GOOD = Evidence(
    images=1000, clean=0.9, fgsm=0.7, steps=(1, 10, 50), steps_accuracy=(0.71, 0.66, 0.65), steps_loss=(0.8, 0.9, 0.91),
    restarts=(1, 5), restarts_accuracy=(0.65, 0.64), white_box=0.63, noise=0.89, unbounded=0.0, zero_gradients=0.0,
    repeat_difference=1e-7, looks_like_probabilities=False, outside=0, transfer={"a": 0.8, "b": 0.7}, square_gain=0.0,
    own_attack=0.72,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, []),
        ({"steps_accuracy": (0.71, 0.68, 0.65)}, ["more_steps"]),
        ({"steps_loss": (0.8, 0.9, 0.7)}, ["loss_rises"]),
        ({"restarts_accuracy": (0.65, 0.62)}, ["restarts"]),
        ({"fgsm": 0.6}, ["fgsm_weaker"]),
        ({"noise": 0.6}, ["noise_weaker"]),
        ({"transfer": {"a": 0.8, "b": 0.6}}, ["transfer_weaker:b"]),
        ({"transfer": {"b": 0.6}}, ["transfer_weaker"]),
        ({"square_gain": 0.006}, ["square_weaker"]),
        ({"unbounded": 0.05}, ["unbounded"]),
        ({"zero_gradients": 0.02}, ["zero_gradient"]),
        ({"zero_gradients": float("nan")}, ["zero_gradient"]),
        ({"repeat_difference": 0.01}, ["deterministic"]),
        ({"looks_like_probabilities": True}, ["logits"]),
        ({"outside": 1}, ["inside"]),
        ({"own_attack": 0.77}, ["collapse"]),
    ],
)
def test_each_check_fails_for_its_own_reason(change, failed):
    checks = masking_checks(dataclasses.replace(GOOD, **change))
    assert [check.name for check in checks if check.passed is False] == failed


def test_limits_move_a_check_and_what_cannot_be_made_is_neither():
    weak = dataclasses.replace(GOOD, own_attack=0.77)
    assert all(check.passed for check in masking_checks(weak, Limits(own_attack_gap=0.2)))
    few = dataclasses.replace(
        GOOD, steps=(10,), steps_accuracy=(0.65,), steps_loss=(1.0,), restarts=(1,), restarts_accuracy=(0.65,),
        transfer={}, square_gain=None, own_attack=None,
    )  # fmt: skip
    open_ = [check.name for check in masking_checks(few) if check.passed is None]
    assert open_ == ["loss_rises", "more_steps", "restarts", "transfer_weaker", "square_weaker", "collapse"]
    # One image of a hundred is above 0.2 points, and says nothing.
    assert all(c.passed is not False for c in masking_checks(dataclasses.replace(GOOD, images=100, square_gain=0.01)))


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_report_reads_back(tmp_path):
    x, y = labelled()
    report = robust_report(Linear(), (x, y), 0.05, transfer_from=Linear(), **QUICK)
    folder = report.save(tmp_path / "deep" / "report")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"robust_report.{end}" for end in ("csv", "json", "png", "txt")
    ]
    for path in (folder, folder / "robust_report.json"):
        again = RobustReport.load(path)
        assert again.to_dict() == report.to_dict()
        assert again.table() == report.table()
        for name in ("correct", "robust", "labels", "steps_loss"):
            assert getattr(again, name).dtype == getattr(report, name).dtype
    plain = json.loads((folder / "robust_report.json").read_text())
    assert plain["robust_accuracy"] == report.robust.mean()
    with (folder / "robust_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    curve = [float(row["accuracy"]) for row in rows if row["kind"] == "epsilon"]
    # nine digits are written
    assert curve == pytest.approx([*report.epsilons_accuracy, report.unbounded_accuracy], abs=1e-9)
    assert (folder / "robust_report.png").read_bytes()[:4] == b"\x89PNG"


def test_table_and_figure_show_what_failed():
    x, y = labelled()
    report = robust_report(Staircase(), (x, y), 0.15, **QUICK)
    text = report.table()
    assert "FAIL zero_gradient" in text
    assert "attack harder before" in text
    figure = report.plot()
    assert isinstance(figure, Figure)
    assert "zero_gradient" in figure.get_suptitle()
    by_epsilon = figure.axes[0].lines[0].get_ydata()
    assert by_epsilon.tolist() == [100 * value for value in (report.clean_accuracy, *report.epsilons_accuracy)]


# -- data --------------------------------------------------------------------------------------------------------------


def test_data_may_be_tensors_a_loader_or_a_datamodule():
    module = ImageData("digits", normalization="unit", batch_size=50, val_size=100)
    module.setup("test")
    x = torch.cat([batch[0] for batch in module.test_dataloader()])[:70]
    y = torch.cat([batch[1] for batch in module.test_dataloader()])[:70]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    options = {**LOOK, "max_images": 70, "batch_size": 32}
    loader = DataLoader(TensorDataset(x, y), batch_size=9)
    reports = [robust_report(model, data, 0.02, **options) for data in ((x, y), loader, module)]
    assert reports[0].images == 70
    first = _without_times(reports[0].to_dict())
    assert all(_without_times(report.to_dict()) == first for report in reports)
    part = robust_report(model, module, 0.02, part="val", **{**options, "max_images": None})
    module.setup("validate")
    assert part.labels.tolist() == torch.cat([batch[1] for batch in module.val_dataloader()]).tolist()


def test_normalized_images_are_refused():
    x, y = labelled()
    with pytest.raises(ValueError, match=r"pixels within `bounds` \(0, 1\).*normalization inside the model"):
        robust_report(Linear(), ((x - 0.5) / 0.1, y), 0.1)
    x[3, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="pixels within"):
        robust_report(Linear(), (x, y), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "`epsilon` to be above 0"),
        ({"epsilon": 8.0}, r"`epsilon` to be at most 1.*8 / 255"),
        ({"norm": "l1"}, "`norm` to be 'linf' or 'l2'"),
        ({"bounds": (1.0, 0.0)}, "`bounds`"),
        ({"steps": ()}, "`steps`"),
        ({"steps": (0, 10)}, "`steps`"),
        ({"restarts": (0,)}, "`restarts`"),
        ({"epsilons": (0.1, -0.1)}, "`epsilons`"),
        ({"attacks": ("pdg",)}, "`attacks` .* but got 'pdg'"),
        ({"queries": 0}, "`queries`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"max_images": 0}, "`max_images`"),
        ({"part": "train"}, "`part`"),
        ({"own_attack": True}, "`own_attack`"),
        ({"transfer_from": 3}, "`transfer_from`"),
        ({"data": 3}, "`data`"),
        ({"data": []}, "at least one image"),
        ({"data": (torch.zeros(2, 16), torch.zeros(2, dtype=torch.long))}, r"images \(N, C, H, W\)"),
        ({"data": (torch.zeros(2, 1, 4, 4), torch.full((2,), 2))}, "labels from 0 to 1"),
        ({"model": lambda x: x.flatten(1).sum(1)}, "logits"),
    ],
)
def test_bad_arguments_are_named(options, message):
    x, y = labelled()
    given = {"model": Linear(), "data": (x, y), "epsilon": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        robust_report(given.pop("model"), given.pop("data"), given.pop("epsilon"), **given)


# -- the model is given back -------------------------------------------------------------------------------------------


class Messy(LightningModule):
    """Batch normalization, some of it frozen, dropout, and an attack that draws from the global state."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(),
            nn.Linear(16, 2),
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.net(x)

    def attack(self, x, y):
        return (x + 0.05 * torch.rand(x.shape).sign() * torch.rand(x.shape, generator=self.generator)).clamp(0, 1)


@pytest.mark.parametrize("inference", [False, True])
def test_modes_buffers_gradients_and_random_state_are_given_back(inference):
    x, y = labelled()
    module = Messy()
    module.train()
    module.net[3].eval()
    module.net[0].requires_grad_(False)
    module(x).sum().backward()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    modes = [part.training for part in module.modules()]
    required = [p.requires_grad for p in module.parameters()]
    state, own = torch.get_rng_state(), module.generator.get_state()
    with torch.inference_mode(inference):
        report = robust_report(module, (x, y), 0.05, **QUICK)
    assert report.own_attack_accuracy is not None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == required
    for name, p in module.named_parameters():
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.generator.get_state(), own)
    assert report.check("deterministic").passed  # eval mode: dropout is off


def test_progress_is_said_on_standard_error(capsys):
    x, y = labelled()
    robust_report(Linear(), (x, y), 0.05, **{**LOOK, "progress": True})
    said = capsys.readouterr()
    assert said.out == ""
    assert "pgd-5: " in said.err
    robust_report(Linear(), (x, y), 0.05, **LOOK)
    assert capsys.readouterr().err == ""
