"""Figures of transport plans: what is drawn of numbers, points and images, when, and the curves over training."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_rectify._lightning import LightningModule, TensorBoardLogger
from lightning_rectify.callbacks import PlanFigure, PlanHistory
from lightning_rectify.callbacks.transport.figures import draw_history, draw_pairs, draw_plan_of_numbers, image_pairs
from lightning_rectify.data.transport import TransportData
from lightning_rectify.data.transport_plans import GaussianPlanData
from lightning_rectify.modules.spot import SPOT
from tests.helpers.training import differences, snapshot, trainer

SPOT_OPTIONS = {"width": 8, "critic_width": 8, "critic_steps": 1, "eval_samples": 100, "eta": 50.0}


def spot(**options):
    torch.manual_seed(1)
    return SPOT(**{**SPOT_OPTIONS, **options})


def data(kind=TransportData, **options):
    return kind(**{"batch_size": 16, "epoch_size": 48, "val_size": 40, "eval_batch_size": 20, **options})


def fit(module, datamodule, *callbacks, epochs=2, logger=None, **options):
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False) if logger is None else logger
    run = trainer(logger=logger, callbacks=list(callbacks), max_epochs=epochs, **options)
    run.fit(module, datamodule)
    return run


def folder(run):
    return Path(run.loggers[0].log_dir, "plans")


def names(run):
    return sorted(path.name for path in folder(run).glob("*.png"))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def lines_of(figure):
    """The segments from x to y of each panel."""
    found = [[c for c in ax.collections if isinstance(c, LineCollection)] for ax in figure.axes]
    return [np.stack(each[0].get_segments()) for each in found if each]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_pairs_are_joined_by_lines_beside_the_truth():
    x = torch.randn(400, 2)
    figure = draw_pairs((x, x + 3.0), (x, x), (x, 2.0 * x), "step 7")
    plan, truth = lines_of(figure)
    assert plan.shape == (150, 2, 2)  # no more than can be seen
    np.testing.assert_allclose(plan[:, 0], x[:150], atol=1e-6)  # float32
    np.testing.assert_allclose(plan[:, 1], x[:150] + 3.0, atol=1e-6)
    np.testing.assert_allclose(truth[:, 1], 2.0 * x[:150], atol=1e-6)
    assert figure.get_suptitle() == "step 7"
    assert len(lines_of(draw_pairs((x[:9], x[:9])))) == 1
    with pytest.raises(ValueError, match=r"as many numbers, at least 2, but got shapes \[\(2,\), \(3,\)\]"):
        draw_pairs((x, torch.zeros(400, 3)))


def test_more_numbers_are_shown_on_the_datas_principal_axes():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(500, 4, generator=generator) * torch.tensor([0.1, 5.0, 0.1, 2.0]) + 7.0
    x = data[:20]
    segments = lines_of(draw_pairs((x, x), (data, data)))[0][:, 0]
    expected = (x - data.mean(dim=0))[:, [1, 3]]
    # the axes are estimated: 500 points, deviations 0.1 against 2
    np.testing.assert_allclose(segments, expected, atol=0.4)


def test_density_is_drawn_beside_the_truths_on_one_scale():
    axes = (torch.linspace(-3, 3, 21, dtype=torch.float64), torch.linspace(-1, 1, 31, dtype=torch.float64))
    density = torch.rand(21, 31, dtype=torch.float64)
    truth = 2.0 * density
    pairs = (torch.randn(50, 1), torch.randn(50, 1))
    figure = draw_plan_of_numbers(pairs, axes, density, truth, None, pairs)
    ours, theirs = [c for ax in figure.axes for c in ax.collections if isinstance(c, QuadMesh)][:2]
    np.testing.assert_allclose(np.asarray(ours.get_array()).reshape(31, 21), density.T)  # x to the right, y up
    np.testing.assert_allclose(np.asarray(theirs.get_array()).reshape(31, 21), truth.T)
    assert ours.get_clim() == theirs.get_clim() == (0.0, float(truth.max()))


def test_image_pairs_stand_one_above_the_other():
    x = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 0.0, 3.0)])
    y = torch.stack([torch.full((3, 8, 8), value) for value in (1.0, -1.0, 0.0)])
    grid = image_pairs(x, y, columns=2, bounds=(-1.0, 1.0))
    assert grid.shape == (3, 2 * (16 + 2) + 2, 2 * (8 + 2) + 2)
    cells = [grid[:, 2 + r * 18 :, 2 + c * 10 :][:, :16, :8] for r, c in ((0, 0), (0, 1), (1, 0))]
    assert [(cell[:, :8].mean().item(), cell[:, 8:].mean().item()) for cell in cells] == [
        (0.0, 1.0), (0.5, 0.0), (1.0, 0.5)
    ]  # fmt: skip


# -- the callback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "datamodule"),
    [
        (lambda: spot(), lambda: data()),
        (lambda: spot(shape_x=3), lambda: data(problem="gaussians", dim=3)),
        (lambda: spot(shape_x=1), lambda: data(problem="mixture1")),
        (lambda: spot(shape_x=1, generator="ode", entropy=1.0), lambda: data(GaussianPlanData)),
        (lambda: spot(), lambda: data(x=torch.randn(60, 2), y=torch.randn(60, 2), val_size=4)),
    ],
    ids=["points", "principal axes", "numbers", "density", "a user's points"],
)
def test_every_plan_is_drawn(module, datamodule):
    run = fit(module(), datamodule(), PlanFigure(every_n_epochs=2, count=50, grid=15), epochs=3)
    steps = [2 * run.num_training_batches, 3 * run.num_training_batches]
    assert names(run) == [f"plan_step={step:06d}.png" for step in steps]
    assert np.ptp(pixels(folder(run) / names(run)[0])) > 100  # there is something on it
    events = EventAccumulator(run.loggers[0].log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("plan/pairs")] == steps


def test_images_become_a_grid_of_pairs():
    images = torch.rand(2, 60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module = spot(shape_x=[1, 8, 8], generator="dcgan", norm="none", critic="conv")
    datamodule = data(x=images[0], y=images[1], val_size=4)
    run = fit(module, datamodule, PlanFigure(images=6, columns=3, image_range=(0.0, 1.0), seed=4), epochs=1)
    x, y = module.sample_pairs(6, seed=4)
    expected = image_pairs(x, y, 3, (0.0, 1.0))
    shown = pixels(folder(run) / names(run)[0]) / 255
    np.testing.assert_allclose(shown, expected.permute(1, 2, 0), atol=0.51 / 255)  # one byte's rounding


def test_drawing_changes_nothing_of_the_run():
    runs = []
    for callbacks in ([], [PlanFigure(count=20, grid=5), PlanHistory(every_n_validations=1)]):
        torch.manual_seed(5)
        module = spot(shape_x=1, generator="ode", entropy=1.0, ode={"trace": "hutchinson", "steps": 2})
        run = fit(module, data(GaussianPlanData), *callbacks)
        runs.append((snapshot(run), torch.rand(1), module.training))
    assert differences(*runs) == []


def test_dry_runs_and_no_logger():
    run = fit(spot(), data(), PlanFigure(count=20), PlanHistory(), fast_dev_run=True)
    assert list(Path().rglob("*.png")) == []
    run = trainer(callbacks=[PlanFigure(count=20), PlanHistory()], max_epochs=1)
    run.fit(spot(), data())
    assert sorted(path.name for path in Path(run.default_root_dir, "plans").iterdir()) == [
        "history.csv", "history.png", "plan_step=000003.png"
    ]  # fmt: skip


class NoPairs(LightningModule):
    """A module of something else."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_another_module_is_refused():
    with pytest.raises(ValueError, match=r"PlanFigure to have a method `sample_pairs.*NoPairs without"):
        trainer(max_steps=1, callbacks=[PlanFigure()]).fit(NoPairs(), data())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlanFigure(every_n_epochs=0), "`every_n_epochs`.*at least 1.*got 0"),
        (lambda: PlanFigure(count=1), "`count`.*at least 2.*got 1"),
        (lambda: PlanFigure(grid=1), "`grid`.*at least 2.*got 1"),
        (lambda: PlanFigure(image_range=(1.0, 1.0)), "`image_range`.*smaller and a larger.*got"),
        (lambda: PlanHistory(every_n_validations=-1), "`every_n_validations`.*at least 0.*got -1"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=f"Expected argument {words}"):
        make()


# -- the history -------------------------------------------------------------------------------------------------------


def rows(run):
    with (folder(run) / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_history_has_what_validation_logged():
    logged = []

    class Keep(PlanHistory):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                logged.append((trainer.global_step, float(trainer.callback_metrics["val/cost"])))

    run = fit(spot(), data(), Keep(every_n_validations=2), epochs=3)
    assert [(int(row["step"]), float(row["cost"])) for row in rows(run)] == logged
    assert [step for step, _ in logged] == [3, 6, 9]
    assert all(float(row["l2_uvp"]) > 0 for row in rows(run))
    assert all(row["plan_kl"] == "nan" for row in rows(run))
    events = EventAccumulator(run.loggers[0].log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("plan/history")] == [6, 9]
    validation = trainer(callbacks=[Keep()])
    validation.validate(spot(), data(), verbose=False)  # no fit: nothing to draw
    assert not Path(validation.default_root_dir, "plans").exists()


def test_history_goes_on_after_a_resume(tmp_path):
    run = fit(spot(), data(), PlanHistory(), epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    later = trainer(
        logger=TensorBoardLogger("logs", version=1, default_hp_metric=False), callbacks=[PlanHistory()], max_epochs=4
    )
    later.fit(spot(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert [int(row["step"]) for row in rows(later)] == [3, 6, 9, 12]
    assert rows(later)[:2] == rows(run)
    again = PlanHistory()
    fit(spot(), data(), again, epochs=2)
    run = fit(spot(), data(), again, epochs=1, logger=TensorBoardLogger("fresh"))  # another fit: no old values
    assert [int(row["step"]) for row in rows(run)] == [3]


def test_history_shows_the_truth():
    values = {"cost": [9.0, 6.0], "marginal_gap_x": [0.5, 0.2], "marginal_floor_x": [0.1, 0.1], "l2_uvp": [50.0, 2.0]}
    figure = draw_history([10, 20], values, {"truth": 5.0, "independent coupling": 9.3})
    cost, gaps, judged = figure.axes
    assert [line.get_label() for line in cost.get_lines()] == ["plan", "truth", "independent coupling"]
    assert list(cost.get_lines()[1].get_ydata()) == [5.0, 5.0]
    assert [line.get_label() for line in gaps.get_lines()] == ["x, plan", "x, two halves of the data"]
    assert judged.get_title() == "L2-UVP, %"
