"""callbacks._logs: what goes to the loggers."""

from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lightning_rectify._lightning import TensorBoardLogger
from lightning_rectify.callbacks._logs import log_at_step

POINTS = {3: {"a/x": 0.5, "a/y": float("inf")}, 4: {"a/x": -2.0, "b": 1e-30}}


def trainer(*loggers, is_global_zero=True):
    return SimpleNamespace(loggers=list(loggers), is_global_zero=is_global_zero)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def events(folder):
    (file,) = folder.glob("**/events*")
    return [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]


@pytest.fixture
def usual(tmp_path):
    """What TensorBoard reads of the logger's own way."""
    logger = TensorBoardLogger(tmp_path, name="usual", version="")
    for step, values in POINTS.items():
        logger.log_metrics(values, step)
    logger.finalize("success")
    return scalars(tmp_path / "usual")


def test_tensorboard_reads_one_event_a_step_as_it_reads_one_a_number(tmp_path, usual):
    logger = TensorBoardLogger(tmp_path, name="short", version="")
    for step, values in POINTS.items():
        log_at_step(trainer(logger), values, step)
    logger.finalize("success")
    assert scalars(tmp_path / "short") == usual
    assert [len(event.summary.value) for event in events(tmp_path / "short")] == [2, 2]
    assert len(events(tmp_path / "usual")) == 4


def test_a_prefix_is_kept(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="", prefix="mine")
    log_at_step(trainer(logger), POINTS[3], 3)
    logger.finalize("success")
    assert set(scalars(tmp_path / "run")) == {"mine-a/x", "mine-a/y"}


def test_other_loggers_are_asked_as_usual(tmp_path):
    class Own(TensorBoardLogger):
        asked = None

        def log_metrics(self, metrics, step=None):
            self.asked = metrics, step

    class Plain:
        asked = None

        def log_metrics(self, metrics, step):
            self.asked = metrics, step

    loggers = Own(tmp_path), Plain()
    log_at_step(trainer(*loggers), POINTS[4], 4)
    assert [logger.asked for logger in loggers] == [(POINTS[4], 4)] * 2


def test_other_ranks_write_nothing(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    logger.log_metrics = lambda metrics, step: None  # as rank_zero_only leaves it there
    log_at_step(trainer(logger, is_global_zero=False), POINTS[3], 3)
    assert not list(tmp_path.glob("**/events*"))
