"""Callbacks and reports: what each of their arguments takes, as their docstrings say."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lightning_rectify.callbacks import (
    AdaptiveRateMonitor,
    CheckpointAverage,
    PlanFigure,
    PlanHistory,
    RobustnessMonitor,
    SampleGrid,
    SampleWriter,
    SpectrumMonitor,
    TranslationSamples,
    TranslationWriter,
    WarmupProbe,
    probe_warmup,
    robust_report,
)
from lightning_rectify.callbacks.robustness import Limits
from lightning_rectify.modules import ImageClassifier
from tests.bad_input.subjects import Subject
from tests.bad_input.values import INF, NAN, SEED, flag, free, listing, number, whole, words

_EVERY = whole(1)
_SOME = whole(2, right=(None, 2))
_PROBE = {
    "streams": whole(2),
    "steps": whole(1),
    "sample_size": whole(1, right=(None, 1)),
    "beta2": number(0, 1, "()", right=(None, 0.9)),
    "tolerance": number(1, ends="()", right=(1.5,)),
    "worse_than": number(1, ends="()", right=(1.5,)),
    "loss": free(None, max) | listing({}, {"model": 3}, {1: max}),
    "accumulate": whole(1, right=(None, 1)),
    "seed": SEED,
}
_BOUNDS = listing(
    (), (0,), (0, 1, 2), (1, 0), (0, 0), (0, INF), (NAN, 1), ("a", "b"), (None, 1), right=((0.0, 1.0), (0, 1))
)
_IMAGES = torch.linspace(0, 1, 3).view(3, 1, 1, 1)
_LABELS = torch.tensor([0, 1, 1])


def _model(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([0.5 - images, images - 0.5], dim=1).flatten(1)


def _classifier() -> ImageClassifier:
    return ImageClassifier(num_classes=2, image_size=1, network=nn.Sequential(nn.Flatten(), nn.Linear(1, 2)))


CALLBACKS = [
    Subject(
        AdaptiveRateMonitor,
        values={
            "every_n_steps": _EVERY,
            "sample_size": _SOME,
            "per_layer": flag(),
            "histograms": flag(),
            "figure": flag(),
            "strict": flag(),
            "seed": SEED,
        },
    ),
    Subject(
        SpectrumMonitor,
        values={
            "every_n_steps": _EVERY,
            "module": listing("", right=(None, "network")),
            "image_size": whole(1, right=(None, 1)),
            "figure": flag(),
            "values": flag(),
        },
    ),
    Subject(WarmupProbe, values={**_PROBE, "stop": flag()}),
    Subject(
        RobustnessMonitor,
        values={
            "epsilon": number(0, ends="()", right=(None, 0.1)),
            "norm": words("linf", "l2", right=(None, "l2")),
            "bounds": _BOUNDS,
            "every_n_epochs": _EVERY,
            "max_images": whole(1),
            "steps": whole(1),
            "restarts": whole(1),
            "own_attack_gap": number(0, 1, "(]", right=(0.5, 1)),
            "examples": whole(0),
            "report_at_end": flag(),
            "report_options": listing({"nonsense": 1}, {1: 2}, right=(None, {}, {"queries": 5})),
            "seed": SEED,
        },
    ),
    Subject(
        CheckpointAverage,
        values={
            "last": whole(1),
            "dirpath": free(None, "somewhere", Path("somewhere")),
            "filename": listing("", right=("{epoch}",)),
            "every_n_epochs": whole(1, right=(None, 1)),
            "every_n_train_steps": whole(1, right=(None, 1)),
            "save_weights_only": flag(),
        },
    ),
    Subject(
        PlanFigure,
        values={
            "every_n_epochs": _EVERY,
            "count": whole(1, right=(10,)),
            "images": whole(1),
            "columns": whole(1),
            "image_range": listing(
                (), (0,), (1, 0), (0, 0), (0, INF), (NAN, 1), ("a", "b"), right=((-1.0, 1.0), (0, 1))
            ),
            "grid": whole(2, right=(10,)),
            "seed": SEED,
        },
    ),
    Subject(PlanHistory, values={"every_n_validations": whole(0)}),
    Subject(
        SampleGrid,
        values={
            "every_n_epochs": _EVERY,
            "count": whole(1),
            "columns": whole(1, right=(8,)),
            "seed": SEED,
            "interpolations": whole(0),
        },
    ),
    Subject(SampleWriter, values={"output_dir": free(None, "somewhere", Path("somewhere"))}),
    Subject(TranslationSamples, values={"count": whole(1), "every_n_epochs": _EVERY, "beam_size": whole(1)}),
    Subject(TranslationWriter, values={"output": listing("", right=("-", "some.txt", Path("some.txt")))}),
    Subject(
        robust_report,
        base={
            "model": _model, "data": (_IMAGES, _LABELS), "epsilon": 0.1, "steps": (1,), "restarts": (1,),
            "attacks": ("fgsm",), "queries": 2, "apgd_steps": 1, "progress": False,
        },
        values={
            "model": listing(None, 3, "nonsense", [], {}, right=(_model,)),
            "data": listing(
                None, 3, "nonsense", [], (), {}, _IMAGES, (_IMAGES,), (_LABELS, _IMAGES), (_IMAGES, _LABELS[:2]),
                (_IMAGES[:0], _LABELS[:0]), (_IMAGES + 1, _LABELS), (_IMAGES, _LABELS + 5), (_IMAGES, _LABELS - 1),
                (_IMAGES[0], _LABELS), (_IMAGES * NAN, _LABELS), (_IMAGES, _LABELS.float()),
                right=((_IMAGES, _LABELS), [_IMAGES, _LABELS]),
            ),
            "epsilon": number(0, 1, "(]", right=(0.1, 1)),
            "norm": words("linf", "l2"),
            "bounds": _BOUNDS,
            "steps": listing((), (0,), (-1,), (1.5,), ("a",), (True,), (None,), right=((1, 2), [1])),
            "restarts": listing((), (0,), (-1,), (1.5,), ("a",), (True,), (None,), right=((1, 2), [1])),
            "epsilons": listing((0.0,), (-1.0,), (NAN,), (INF,), ("a",), (None,), right=(None, (0.1,))),
            "attacks": listing(("nonsense",), (1,), (None,), right=((), ["pgd"])),
            "apgd_steps": whole(1),
            "queries": whole(1),
            "max_images": whole(1, right=(None, 1)),
            "batch_size": whole(1),
            "part": words("val", "test"),
            "own_attack": free(None, False),
            "transfer_from": listing(3, "nonsense", {"a": 3}, [1], right=(None, _model, {"a": _model})),
            "limits": free(None, Limits()),
            "device": listing("nonsense", "", "cpu:x", right=(None, "cpu", torch.device("cpu"))),
            "seed": SEED,
            "progress": flag(),
        },
    ),
    Subject(
        probe_warmup,
        values={
            **{name: replace(values, right=()) for name, values in _PROBE.items()},
            "module": free(),
            "data": free(),
            "folder": free(),
            "trainer_options": listing({1: 2}),
        },
        base={"module": _classifier(), "data": [(_IMAGES, _LABELS)]},
    ),
]  # fmt: skip
