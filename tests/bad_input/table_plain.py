"""Optimizers, schedules, spectral control and attacks: what each of their arguments takes, as their docstrings say."""

from typing import Any

import torch
from torch import nn

from lightning_rectify.attacks import apgd, correct, fgsm, input_gradient, pgd, square
from lightning_rectify.nn import (
    Divergence,
    DOptimal,
    LipschitzRegularizer,
    SpectralConstraint,
    convolution_norm,
    matrix_layers,
    singular_values,
    spectral_control,
    weight_matrix,
)
from lightning_rectify.optim import (
    FrozenStartAdam,
    InverseSquareRoot,
    LinearDecay,
    LinearWarmup,
    RectifiedAdam,
    UntunedExponentialWarmup,
    UntunedLinearWarmup,
)
from lightning_rectify.optim.variance import (
    adaptive_rate_mean,
    adaptive_rate_variance,
    effective_warmup,
    log_adaptive_rate_variance,
    rectification,
    relative_variance,
    sma_length,
    sma_limit,
    variance_matched_length,
)
from tests.bad_input.subjects import Subject
from tests.bad_input.values import INF, NAN, Values, flag, free, listing, number, whole, words

_WEIGHT = number(0, right=(0, 0.5))


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


_PARAMS = listing([], None, 3, "nonsense", [None], [3], ["a"], [{"nonsense": []}], torch.ones(2), {})
_BETAS = listing(
    (), (0.9,), (0.9, 0.99, 0.999), (1.0, 0.999), (-0.1, 0.999), (0.9, 1.0), (0.9, -1), (NAN, 0.9), (0.9, NAN),
    ("a", "b"), (None, 0.9), ([0.9], [0.9]), right=((0.0, 0.99), [0.9, 0.999]),
)  # fmt: skip
_RATE = number(0, right=(0, 0.5, torch.tensor(0.1))) | listing(torch.tensor(NAN), torch.tensor(-1.0))


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.Adam(_parameters(), lr=0.5)


_OPTIMIZER = listing(None, 3, "nonsense", [], nn.Flatten(), torch.optim.Adam, right=(_optimizer(),))


def _schedule(make: Any, **values: Values) -> Subject:
    needed = {"total_steps": 4} if "total_steps" in values else {"warmup_steps": 2} if values else {}
    return Subject(make, base={"optimizer": _optimizer(), **needed}, values={"optimizer": _OPTIMIZER, **values})


OPTIM = [
    Subject(
        RectifiedAdam,
        base={"params": _parameters()},
        values={
            "params": _PARAMS,
            "lr": _RATE,
            "betas": _BETAS,
            "eps": _WEIGHT,
            "weight_decay": _WEIGHT,
            "decoupled_weight_decay": flag(),
            "early_phase": words("momentum", "skip", "adam"),
            "threshold": number(4, right=(4, 5.0)),
            "rectifier": words("first_order", "exact"),
            "foreach": flag(),
            "fused": flag(),
            "maximize": flag(),
            "capturable": flag(),
            "differentiable": flag(),
        },
    ),
    Subject(
        FrozenStartAdam,
        base={"params": _parameters()},
        values={
            "params": _PARAMS,
            "lr": _WEIGHT,
            "betas": _BETAS,
            "eps": _WEIGHT,
            "weight_decay": _WEIGHT,
            "frozen_steps": whole(0),
        },
    ),
    _schedule(LinearWarmup, warmup_steps=whole(0), start_factor=number(0, 1, "[]")),
    _schedule(InverseSquareRoot, warmup_steps=whole(0), start_factor=number(0, 1, "[]")),
    _schedule(
        LinearDecay,
        total_steps=whole(1),
        warmup_steps=whole(0, 3, right=(0, 3)),
        final_lr=number(0, 0.5, "[]"),
        start_lr=number(0, 0.5, "[]"),
    ),
    _schedule(UntunedLinearWarmup),
    _schedule(UntunedExponentialWarmup),
]

_BETA2 = number(0, 1, "()", right=(0.99,))
_RHO, _STEP = number(0, ends="(]", right=(5.0, 8, INF)), number(1, ends="[]", right=(1, 7, INF))
_ORDER, _RECTIFIER = words("exact", "first_order"), words("exact", "first_order")
THEORY = [
    Subject(sma_limit, values={"beta2": _BETA2}),
    Subject(sma_length, base={"step": 5, "beta2": 0.99}, values={"step": _STEP, "beta2": _BETA2}),
    Subject(variance_matched_length, base={"step": 5, "beta2": 0.99}, values={"step": _STEP, "beta2": _BETA2}),
    Subject(adaptive_rate_variance, base={"rho": 6.0}, values={"rho": _RHO, "order": _ORDER}),
    Subject(relative_variance, base={"rho": 6.0}, values={"rho": _RHO, "order": _ORDER}),
    Subject(adaptive_rate_mean, values={"rho": _RHO}),
    Subject(log_adaptive_rate_variance, values={"rho": _RHO}),
    Subject(
        rectification,
        base={"step": 9, "beta2": 0.99},
        values={
            "step": _STEP,
            "beta2": _BETA2,
            "threshold": number(4, right=(4, 5.0)),
            "rectifier": _RECTIFIER,
        },
    ),
    Subject(
        effective_warmup,
        base={"beta2": 0.99},
        values={"beta2": _BETA2, "threshold": number(4, right=(4, 5.0)), "rectifier": _RECTIFIER},
    ),
]

_LAYERS = listing(None, 3, "nonsense", [], nn.Flatten(), nn.Embedding(2, 2), torch.ones(2, 2))


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.LazyLinear(2))


def _controlled(**arguments: Any) -> nn.Module:
    return spectral_control(**{"module": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), **arguments})


NN = [
    Subject(DOptimal, values={"weight": _WEIGHT}),
    Subject(LipschitzRegularizer, values={"weight": _WEIGHT}),
    Subject(SpectralConstraint, values={"bound": number(0, ends="()", right=(0.5, 2))}),
    Subject(
        Divergence,
        values={
            "weight": _WEIGHT,
            "scale": number(0, ends="()", right=(0.5, 2)),
            "reference": free(None, torch.log),
            "spacing": number(0, ends="()", right=(0.5, 2)),
        },
    ),
    Subject(
        _controlled,
        of=spectral_control,
        values={
            "module": listing(None, 3, "nonsense", [], nn.Flatten(), _network()),
            "control": words("d_optimal", "plain", right=("plain", 8, DOptimal(), ["normalization"]))
            | listing(4, -1, 99, [], ["nonsense"], [None], [True], ["plain", "d_optimal"]),
            "start": words("weight", "ones", "spread"),
            "orthogonality": _WEIGHT,
            "retraction": whole(0, right=(0, 3)),
            "exclude": listing("nonsense", ["nonsense"], [3], [None], ["0", "1"], right=("1", ["0"])),
        },
        named={"exclude": ("module",)},
    ),
    Subject(
        convolution_norm,
        base={"layer": nn.Conv2d(2, 3, 3, stride=2), "size": 8},
        values={
            "layer": _LAYERS | listing(nn.Linear(2, 2), right=(nn.Conv1d(1, 1, 3),)),
            "size": whole(1, right=(8, (8, 4))) | listing((), (0, 8), (8,), (8, 8, 8), (2.5, 8), ("a", "b"), 7, (8, 7)),
        },
    ),
    Subject(
        matrix_layers,
        base={"module": nn.Sequential(nn.Linear(2, 2))},
        values={
            "module": free(nn.Linear(2, 2)),
            "exclude": listing("nonsense", ["nonsense"], [3], [None], right=("0", ["0"])),
        },
    ),
    Subject(singular_values, values={"matrix": listing(torch.ones(2), right=(torch.ones(2, 3),))}),
    Subject(weight_matrix, values={"layer": _LAYERS | free(nn.Linear(2, 3))}),
]


def _model(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :5] * torch.arange(1, 6)


_IMAGES = torch.linspace(0, 1, 3 * 12).view(3, 3, 2, 2)
_LABELS = torch.tensor([0, 1, 4])
_ATTACKED: dict[str, Any] = {"model": _model, "images": _IMAGES, "labels": _LABELS, "epsilon": 0.1}
_NO_MODELS = (
    None, 3, "nonsense", lambda x: None, lambda x: x, lambda x: x.sum(), lambda x: "logits", lambda x: _model(x)[:2],
)  # fmt: skip
_NO_LABELS = (_LABELS[:2], _LABELS.float(), _LABELS[:, None], _LABELS.bool())
_OF_ATTACKS: dict[str, Values] = {
    "model": listing(*_NO_MODELS, lambda x: _model(x).detach(), right=(_model,)),
    "images": listing(
        _IMAGES[0], _IMAGES.flatten(1), (255 * _IMAGES).int(), _IMAGES + 1, _IMAGES * NAN, _IMAGES[:2], _IMAGES[:0],
        2 * _IMAGES - 1, right=(_IMAGES, _IMAGES.half()),
    ),
    "labels": listing(*_NO_LABELS, _LABELS + 1, _LABELS - 1, right=(_LABELS,)),
    "epsilon": number(0, 1, "[]"),
    "norm": words("linf", "l2"),
    "loss": words("ce", "margin", "dlr"),
    "bounds": listing(
        (), (0,), (0, 1, 2), (1, 0), (0, 0), (0, INF), (NAN, 1), ("a", "b"), (None, 1), right=((0, 1), [0.0, 1.0])
    ),
    "generator": free(None, torch.Generator()),
    "steps": whole(1),
    "restarts": whole(1),
    "step_size": number(0, ends="()", right=(None, 0.1)),
    "random_start": number(0, 1, "[]"),
    "start": listing(_IMAGES[:2], _IMAGES.flatten(1), right=(None, _IMAGES, 1 - _IMAGES)),
}  # fmt: skip


def _attack(make: Any, *own: str, base: Any = None, **values: Values) -> Subject:
    shared = ("model", "images", "labels", "epsilon", "norm", "bounds", "generator", *own)
    return Subject(
        make,
        base=base or _ATTACKED,
        values={**{name: _OF_ATTACKS[name] for name in shared}, **values},
        named={"images": ("labels",), "epsilon": ("bounds",), "bounds": ("images",)},
    )


ATTACKS = [
    _attack(fgsm, "loss", "step_size", "random_start", "start"),
    _attack(pgd, "loss", "steps", "step_size", "restarts", "random_start", "start"),
    _attack(
        apgd, "restarts", steps=whole(1, right=(1, 2)), loss=words("ce", "margin", "dlr", "dlr_targeted"),
        targets=listing(0, -1, 5, 100, right=(None,)),
    ),
    _attack(
        square, base={**_ATTACKED, "queries": 3}, model=listing(*_NO_MODELS, right=(_model,)),
        queries=whole(1, right=(1, 3)), p_init=number(0, 1, "(]"), rescale=flag(),
    ),
    Subject(
        input_gradient,
        base={name: _ATTACKED[name] for name in ("model", "images", "labels")},
        values={
            **{name: _OF_ATTACKS[name] for name in ("model", "loss")},
            "images": free(_IMAGES),
            "labels": listing(*_NO_LABELS, right=(_LABELS,)),  # whether they are classes is for the attacks to ask
        },
    ),
    Subject(
        correct,
        base={name: _ATTACKED[name] for name in ("model", "images", "labels")},
        values={"model": free(_model), "images": free(_IMAGES), "labels": listing(*_NO_LABELS, right=(_LABELS,))},
    ),
]  # fmt: skip
