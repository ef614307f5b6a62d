"""Clause 7: one finite point a real optimizer step a player, in TensorBoard, in other loggers and in the CSV."""

import csv
import math
import re
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_rectify._lightning import TensorBoardLogger
from lightning_rectify.callbacks import AdaptiveRateMonitor
from lightning_rectify.optim import RectifiedAdam
from tests.helpers.training import CSVLogger, trainer

# DESIGN.md, "Metric keys": dashboards read these, so the list is written out here and not imported.
QUANTITIES = (
    "rho",
    "rectification",
    "variance",
    "log_variance",
    "mean",
    "theory_variance",
    "update_surprise",
    "effective_lr",
    "eps_share",
    "gradient_median",
)


def run(row, steps, ckpt_path=None, module_args=None, **options):
    module = row.make_module(**row.optimizers(partial(RectifiedAdam, lr=0.01)), **(module_args or {}))
    loggers = [TensorBoardLogger("tensorboard", version=0, default_hp_metric=False), CSVLogger("csv", version=0)]
    length = {"max_steps": steps, "max_epochs": -1}
    fit = trainer(logger=loggers, callbacks=[AdaptiveRateMonitor()], log_every_n_steps=4, **length, **options)
    fit.fit(module, row.make_data(), ckpt_path=ckpt_path)
    return fit


def events_of(fit):
    """Scalars of the event files: {tag: [(step, value), ...]}, and the reader."""
    events = EventAccumulator(fit.loggers[0].log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def expected_steps(row, batches):
    """The step numbers of each player."""
    return {player: list(range(1, count * batches + 1)) for player, (_, count) in row.players.items()}


def check_points(scalars, steps):
    for player, numbers in steps.items():
        for quantity in QUANTITIES:
            points = scalars[f"adaptive_rate/{player}/{quantity}"]
            assert [step for step, _ in points] == numbers, quantity  # each step once, and rising
            assert all(math.isfinite(value) for _, value in points), quantity


def test_every_key_has_one_finite_point_a_step(row):
    check_points(events_of(run(row, 13))[0], expected_steps(row, 13))


def test_accumulated_batches_make_one_point(row):
    fit = run(row, 7, **row.accumulation(2))
    check_points(events_of(fit)[0], expected_steps(row, 7))


def test_layout_shows_only_what_is_logged_and_shows_the_theory_beside_it(row):
    scalars, events = events_of(run(row, 6))
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert len(layout.category) == len(row.players)
    together = []
    for category in layout.category:
        for chart in category.chart:
            shown = [{tag for tag in scalars if re.search(pattern, tag)} for pattern in chart.multiline.tag]
            assert shown
            assert all(len(tags) == 1 for tags in shown), chart.title  # each pattern is one line
            together.append({tag for tags in shown for tag in tags})
    for player in row.players:
        pair = {f"adaptive_rate/{player}/{name}" for name in ("variance", "theory_variance")}
        assert any(pair <= chart for chart in together)


def test_all_loggers_have_the_same_numbers(row):
    fit = run(row, 9)
    scalars, _ = events_of(fit)
    with open(Path(fit.loggers[1].log_dir, "metrics.csv"), newline="") as file:
        logged = list(csv.DictReader(file))
    with open(Path(fit.loggers[0].log_dir, "adaptive_rate.csv"), newline="") as file:
        stored = {(line["group"], int(line["step"])): line for line in csv.DictReader(file)}
    for player, numbers in expected_steps(row, 9).items():
        for quantity in QUANTITIES:
            tag = f"adaptive_rate/{player}/{quantity}"
            theirs = {int(line["step"]): float(line[tag]) for line in logged if line.get(tag)}
            ours = {step: float(stored[player, step][quantity]) for step in numbers}
            assert theirs == pytest.approx(ours, rel=1e-8)  # nine digits in adaptive_rate.csv
            assert dict(scalars[tag]) == pytest.approx(ours, rel=1e-6)  # float32 in event files


def test_a_resumed_run_goes_on_counting(row, tmp_path):
    run(row, 8).save_checkpoint(tmp_path / "8.ckpt")
    fit = run(row, 14, ckpt_path=tmp_path / "8.ckpt")
    check_points(events_of(fit)[0], expected_steps(row, 14))
    with open(Path(fit.loggers[0].log_dir, "adaptive_rate.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    for player, numbers in expected_steps(row, 14).items():
        assert [int(line["step"]) for line in lines if line["group"] == player] == numbers
