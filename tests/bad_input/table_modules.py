"""The modules: what each of their arguments takes, as their docstrings say."""

import torch
from hypothesis import strategies as st
from torch import nn

from lightning_rectify.modules import (
    SPOT,
    ImageClassifier,
    L2LDefense,
    LanguageModel,
    ManifoldRegressor,
    MinimaxModule,
    RectifiedModule,
    SpectralGAN,
    SPOTAdaptation,
    Translator,
)
from lightning_rectify.modules.spectral_gan import RandomFeatures
from lightning_rectify.nn import DOptimal
from tests.bad_input.subjects import Subject
from tests.bad_input.values import (
    INF,
    NAN,
    OPTIMIZER,
    SCHEDULE,
    SEED,
    SHARE,
    Values,
    flag,
    free,
    listing,
    number,
    whole,
    words,
)
from tests.helpers.games import Game

_SIZE = whole(1, right=(4,))
_INTERVAL = words("step", "epoch")
_WEIGHT = number(0, right=(0, 0.5))
_NETWORK_ARGS = listing({"nonsense": 1}, {"width": "a"}, {"width": 0}, {"width": 2.5}, right=(None, {}, {"width": 3}))


class _Pair(nn.Module):
    """Latents to a pair of points."""

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z[:, :2], z[:, 2:4]


class _Scores(nn.Module):
    """Two critics."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sum(1), y.sum(1)


def _features() -> nn.Module:
    return RandomFeatures(num_features=4, in_channels=3)


MODULES = [
    Subject(
        RectifiedModule,
        values={
            "optimizer": OPTIMIZER,
            "lr_scheduler": SCHEDULE,
            "lr_scheduler_interval": _INTERVAL,
            "compile": flag(),
        },
    ),
    Subject(
        Game,
        of=MinimaxModule,
        values={
            "turns": listing(
                {"critic": 0},
                {"driver": 1},
                {"critic": 1.5},
                {"critic": True},
                {"critic": None},
                right=(None, {}, {"critic": 2}),
            ),
            "clip_norm": number(0, ends="(]", right=(None, 0.5, INF, {"critic": 0.1}))
            | listing({"critic": 0}, {"driver": 1.0}, {"critic": NAN}, {"critic": "1"}),
            "accumulate": whole(1),
            "joint": flag(),
            "averages": listing(
                {"critic": 1.0},
                {"critic": -0.1},
                {"driver": 0.5},
                {"critic": NAN},
                {"critic": "0.5"},
                right=(None, {"critic": 0.0}),
            ),
        },
    ),
    Subject(
        ImageClassifier,
        base={"network_args": {"width": 2}},
        values={
            "network": words("small_cnn", "resnet20", right=("small_cnn",)),
            "num_classes": whole(2, right=(2, 10)),
            "in_channels": whole(1, right=(1, 3)),
            "image_size": _SIZE,
            "label_smoothing": SHARE,
            "network_args": _NETWORK_ARGS,
        },
        named={"network_args": ("width",)},
    ),
    Subject(
        LanguageModel,
        base={"vocab_size": 50, "embedding_size": 8, "hidden_size": 8, "cutoffs": (20,), "layers": 1, "div_value": 2.0},
        values={
            "vocab_size": whole(3, right=(50,)),
            "embedding_size": _SIZE,
            "hidden_size": whole(1, right=(8,)),
            "layers": whole(1),
            "dropout": SHARE,
            "cutoffs": listing(
                [], [0], [-1], [50], [20, 20], [30, 20], [2.5], ["a"], [True], [None], right=((20,), [10, 30])
            ),
            "div_value": number(1, right=(1, 2.0)) | listing(1e6, right=()),
        },
    ),
    Subject(
        Translator,
        base={"width": 8, "heads": 2, "feedforward": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20},
        values={
            "vocab_size": whole(4, right=(4, 30)),
            "target_vocab_size": whole(4, right=(None, 5)),
            "width": whole(1, right=(8, 16)) | listing(7, 9),
            "heads": whole(1, right=(1, 4)) | listing(3, 16),
            "feedforward": _SIZE,
            "encoder_layers": whole(1),
            "decoder_layers": whole(1),
            "dropout": SHARE,
            "norm": words("post", "pre"),
            "network_args": listing(
                {"nonsense": 1},
                {"positions": "x"},
                {"max_length": 0},
                {"tied": 2},
                {"attention_dropout": 1.0},
                {"activation_dropout": -0.5},
                right=(None, {}, {"tied": False, "positions": "learned"}),
            ),
            "label_smoothing": SHARE,
            "beam_size": whole(1),
            "length_penalty": listing(INF, -INF, right=(0, 1.0, -0.5)),
            "max_length_ratio": number(0, ends="()", right=(0.5,)),
            "val_translations": flag(),
        },
        named={
            "network_args": ("positions", "max_length", "tied", "attention_dropout", "activation_dropout"),
            "heads": ("width",),
        },
    ),
    Subject(
        SpectralGAN,
        base={"generator_width": 8, "discriminator_width": 8, "latent_size": 4},
        values={
            "network": words("cnn", "resnet"),
            "image_size": Values(
                (32, 48), st.integers().filter(lambda size: size not in (32, 48)), (0, 16, 31, 33, 64)
            ),
            "in_channels": whole(1, right=(1, 3)),
            "generator_width": whole(1, right=(8,)),
            "discriminator_width": whole(1, right=(8,)),
            "latent_size": whole(1, right=(1, 4)),
            "latent_distribution": words("uniform", "normal"),
            "generator_norm": words("batch", "group", "none"),
            "num_classes": whole(1, right=(None, 3)),
            "loss": words("non_saturating", "hinge", "wasserstein", "least_squares"),
            "control": words("d_optimal", "plain", "spectral_norm", right=("plain", 1, DOptimal(), ["normalization"]))
            | listing(4, -1, 99, [], ["nonsense"], [None], [True], ["plain", "d_optimal"]),
            "spectrum_start": words("ones", "spread", "weight"),
            "orthogonality": _WEIGHT,
            "retraction": whole(0, right=(0, 2)),
            "gradient_penalty": _WEIGHT,
            "r1": _WEIGHT,
            "n_dis": whole(1),
            "ema_decay": number(0, 1, "[)", right=(None, 0, 0.9)),
            "features": free(None, _features()),
            "generator_optimizer": OPTIMIZER,
            "discriminator_optimizer": OPTIMIZER,
            "eval_seed": SEED,
        },
        named={"generator_norm": ("norm",), "spectrum_start": ("start",)},
    ),
    Subject(
        SPOT,
        base={"width": 4, "critic_width": 4, "depth": 1, "critic_depth": 1},
        beside={
            "ode": {"generator": "ode", "latent_size": 4},
            "entropy": {"generator": "ode", "latent_size": 4},
            "latent_size": {"preset": "spot"},
            "reduction": {"cost": "euclidean"},
            "critic_norm": {"critic": "conv", "shape_x": [1, 8, 8], "constraint": "clip"},
        },
        values={
            "preset": words("spot", "spot_released", right=("spot",)),
            "shape_x": whole(1, right=(3, [3], [1, 8, 8])) | listing([], [0], [-1, 2], [2.5], ["a"], [True]),
            "shape_y": whole(1, right=(None, 3)) | listing([], [0], [-1, 2], [2.5], ["a"], [True]),
            "cost": words("squared", "euclidean", "contour", right=("squared", "euclidean")),
            "reduction": words("mean", "released"),
            "eta": number(0, ends="()", right=(None, 1, 2.5, "auto")) | words("auto"),
            "entropy": number(0, right=(0, 0.1)),
            "generator": words("mlp", "ode", right=("mlp", _Pair())),
            "ode": listing(
                {"nonsense": 1},
                {"steps": 0},
                {"rtol": -1.0},
                {"rtol": NAN},
                {"method": "x"},
                {"trace": "x"},
                right=(None, {}, {"steps": 2}),
            ),
            "latent_size": whole(1, right=(None, 1, 4)),
            "width": _SIZE,
            "depth": whole(1),
            "share": words("trunk", "none"),
            "norm": words("batch", "group", "none"),
            "critic": words("mlp", "conv", right=("mlp",)),
            "critic_width": _SIZE,
            "critic_depth": whole(1),
            "critic_norm": words("batch", "none"),
            "constraint": words("spectral", "gradient_penalty", "groupsort", "clip"),
            "penalty_weight": number(0, ends="()", right=(0.5, 10)),
            "clip": number(0, ends="()", right=(0.5,)),
            "critic_steps": whole(1),
            "burst": whole(0),
            "ema_decay": number(0, 1, "[)", right=(None, 0, 0.9)),
            "standardize": flag(),
            "decay_steps": whole(0, right=(None, 0, 3)),
            "generator_optimizer": OPTIMIZER,
            "critic_optimizer": OPTIMIZER,
            "eval_samples": whole(2),
            "eval_seed": SEED,
            "lr_scheduler_interval": _INTERVAL,
        },
        named={"ode": ("steps", "rtol", "method", "trace")},
    ),
    Subject(
        SPOTAdaptation,
        base={"generator_width": 4, "critic_width": 4, "classifier_width": 4, "latent_size": 2},
        values={
            "method": words("two_stage", "joint", right=("two_stage",)),
            "num_classes": whole(2, right=(2, 5)),
            "in_channels": whole(1, right=(1, 3)),
            "image_size": whole(16, right=(16, 20)) | listing(17, 18),
            "cost": words("squared", "euclidean", "contour"),
            "eta": number(0, ends="()", right=(1, 2.5)),
            "semantic_weight": _WEIGHT,
            "class_weight": _WEIGHT,
            "transport_weight": _WEIGHT,
            "source_steps": whole(0),
            "plan_steps": whole(1, right=(None, 1)),
            "alternate": flag(),
            "carried_weight": _WEIGHT,
            "pseudo_weight": _WEIGHT,
            "pseudo_threshold": number(0, 1, "(]"),
            "augment": number(0, right=(None, 0, 0.5)),
            "adversarial": words("wasserstein", "logistic"),
            "penalty_weight": number(0, right=(None, 0, 0.5)),
            "generator": free(None),
            "critic": free(None),
            "classifier": free(None, nn.Sequential(nn.Flatten(), nn.Linear(256, 10))),
            "latent_size": whole(1, right=(None, 1)),
            "generator_width": whole(1, right=(1,)),
            "classifier_width": whole(1, right=(1,)),
            "critic_width": whole(1, right=(1,)),
            "dropout": SHARE,
            "ema_decay": number(0, 1, "[)", right=(None, 0, 0.9)),
            "decay_steps": whole(0, right=(None, 0)),
            "generator_optimizer": OPTIMIZER,
            "critic_optimizer": OPTIMIZER,
            "classifier_optimizer": OPTIMIZER,
            "lr_scheduler_interval": _INTERVAL,
        },
    ),
    Subject(
        L2LDefense,
        base={"classifier_args": {"width": 2}, "attacker_args": {"width": 2}},
        values={
            "classifier": words("small_cnn", "resnet20", right=("small_cnn",)),
            "classifier_args": _NETWORK_ARGS,
            "num_classes": whole(2, right=(2, 5)),
            "in_channels": whole(1, right=(1, 3)),
            "image_size": _SIZE,
            "mean": listing(INF, [NAN], ["a"], [[0.1]], [None], [], [0.1, 0.2], right=(None, 0.5, [0.5])),
            "std": number(0, ends="()", right=(None, 0.5, [0.5]))
            | listing([0.0], [-1.0], [NAN], [INF], ["a"], [], [1.0, 1.0]),
            "attack": words("l2l", "fgsm", "pgd", "trades", "none"),
            "epsilon": number(0, 1, "(]", right=(0.1, 1)),
            "bounds": listing(
                [],
                [0],
                [0, 1, 2],
                [1, 0],
                [0, 0],
                [0, INF],
                [NAN, 1],
                ["a", "b"],
                [None, 1],
                [[0], [1]],
                right=(None, [0, 1], [-1.0, 1.0]),
            ),
            "variant": words("gradient", "naive"),
            "steps": whole(1),
            "attacker": words("strided", "slim", "two_layer", "wide", right=(None, "strided", "slim")),
            "attacker_args": listing(
                {"nonsense": 1},
                {"width": 0},
                {"width": "a"},
                {"gain": -1.0},
                {"gain": NAN},
                {"norm": "x"},
                right=(None, {}, {"width": 2}),
            ),
            "gradient_scale": words("sample_std", "batch_max"),
            "warm_start": flag(),
            "bptt": flag(),
            "order": words("joint", "alternate"),
            "attack_bn": words("eval", "train"),
            "random_start": number(0, 1, "[]", right=(None, 0, 0.5, 1)),
            "clean_weight": SHARE,
            "train_steps": whole(1),
            "step_size": number(0, ends="()", right=(None, 0.1)),
            "memory": flag(),
            "trades_beta": _WEIGHT,
            "val_attack_steps": whole(0),
            "test_attack_steps": whole(0),
            "eval_seed": SEED,
            "preset": words("released", right=(None,)),
            "classifier_optimizer": OPTIMIZER,
            "attacker_optimizer": OPTIMIZER,
            "classifier_lr_scheduler": SCHEDULE,
            "attacker_lr_scheduler": SCHEDULE,
        },
        named={
            "classifier": ("network",),
            "classifier_args": ("network_args", "width"),
            "attacker_args": ("width", "gain", "norm"),
        },
    ),
    Subject(
        ManifoldRegressor,
        beside={"dropout": {"expert": "mlp"}},
        values={
            "in_features": whole(1, right=(1, 64)),
            "outputs": whole(1),
            "num_classes": whole(2, right=(None, 2)),
            "dim": whole(1, 64, right=("auto", 1, 64)) | words("auto"),
            "expert": words("polynomial", "p1", "mlp"),
            "degree": whole(0, right=("auto", 0, 2)) | words("auto"),
            "cells": whole(1),
            "hidden": whole(1),
            "dropout": SHARE,
            "radius": number(0, ends="()", right=("auto", 0.5)) | words("auto"),
            "init": words("least_squares", "construction", "random"),
            "gate": words("frozen", "trained"),
            "dispatch": whole(1),
            "outside": words("nearest", "mean"),
            "anchor": number(0, right=(None, 0, 0.5)),
            "early_stopping": whole(0, right=(None, 0)),
            "seed": SEED,
        },
    ),
]  # fmt: skip
