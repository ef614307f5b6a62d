"""Networks, features, manifolds and texts: what each of their arguments takes, as their docstrings say."""

import math
from functools import partial

import torch
from torch import nn

from lightning_rectify.modules.l2l import (
    FullResolutionAttacker,
    PixelClassifier,
    StridedAttacker,
    WideResNet,
    build_attacker,
    build_classifier,
    learned_attack,
)
from lightning_rectify.modules.language_model import LSTMNetwork
from lightning_rectify.modules.manifold import (
    ParametricManifold,
    Sphere,
    TangentCharts,
    Torus,
    bottleneck,
    covering_radius,
    dimension_curve,
    fill_distance,
    intrinsic_dimension,
    noisy_charts,
    reach,
)
from lightning_rectify.modules.spectral_gan import (
    ClassifierFeatures,
    EfficientNetLiteFeatures,
    RandomFeatures,
)
from lightning_rectify.modules.spot import FeatureCost
from lightning_rectify.modules.translation import Transformer
from lightning_rectify.text import Vocabulary
from lightning_rectify.words import WordVocabulary
from tests.bad_input.subjects import Subject
from tests.bad_input.values import INF, NAN, SEED, SHARE, flag, free, listing, number, whole, words

_SIZE = whole(1, right=(1, 4))
_NORM = words("batch", "group", "none")
_MULTIPLES = listing((), (0,), (-1, 1), (1.5, 1), ("a",), (None,), (True, 1))
_POSITIVE = number(0, ends="()", right=(0.5, 2))

NETWORKS = [
    Subject(
        Transformer,
        base={"width": 8, "heads": 2, "feedforward": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20},
        values={
            "vocab_size": whole(4),
            "target_vocab_size": whole(4, right=(None, 5)),
            "width": whole(1, right=(8,)) | listing(7, 9),
            "heads": whole(1, right=(1, 4)) | listing(3, 16),
            "feedforward": _SIZE,
            "encoder_layers": whole(1),
            "decoder_layers": whole(1),
            "dropout": SHARE,
            "attention_dropout": SHARE,
            "activation_dropout": SHARE,
            "norm": words("post", "pre"),
            "positions": words("sinusoidal", "learned"),
            "max_length": whole(1),
            "tied": flag(),
        },
        named={"heads": ("width",)},
    ),
    Subject(
        LSTMNetwork,
        base={"vocab_size": 50, "embedding_size": 8, "hidden_size": 8, "cutoffs": (20,), "layers": 1, "dropout": 0.0,
              "div_value": 2.0},
        values={
            "vocab_size": whole(3, right=(50,)),
            "embedding_size": _SIZE,
            "hidden_size": whole(1, right=(8,)),
            "layers": whole(1),
            "dropout": SHARE,
            "cutoffs": listing([], [0], [50], [30, 20], [2.5], ["a"], right=((20,), [10, 30])),
            "div_value": number(1, right=(1, 2.0)),
        },
    ),
    Subject(
        WideResNet,
        base={"depth": 10, "width": 1},
        values={
            "depth": whole(10, right=(10,)) | listing(11, 15),
            "width": whole(1),
            "num_classes": _SIZE,
            "in_channels": _SIZE,
            "dropout": SHARE,
        },
    ),
    Subject(
        StridedAttacker,
        base={"inputs": 2, "outputs": 1, "width": 4},
        values={
            "inputs": _SIZE,
            "outputs": whole(1),
            "multiples": _MULTIPLES,
            "width": _SIZE,
            "shrink": whole(1),
            "norm": _NORM,
            "norm_before_up": flag(),
            "head_bias": flag(),
            "gain": _POSITIVE,
            "learn_gain": flag(),
        },
    ),
    Subject(
        FullResolutionAttacker,
        base={"inputs": 2, "outputs": 1, "width": 2},
        values={
            "inputs": _SIZE,
            "outputs": whole(1),
            "multiples": _MULTIPLES,
            "width": _SIZE,
            "norm": _NORM,
            "skip": flag(),
            "gain": _POSITIVE,
        },
    ),
    Subject(
        PixelClassifier,
        base={"network": nn.Flatten()},
        values={
            "network": free(nn.Flatten()),
            "mean": listing(INF, [NAN], ["a"], [[0.1]], [None], [], right=(None, 0.5, [0.5, 0.2])),
            "std": number(0, ends="()", right=(None, 0.5, [0.5])) | listing([0.0], [-1.0], [NAN], [INF], ["a"], []),
        },
    ),
    Subject(
        build_attacker,
        base={"name": "strided", "channels": 1},
        values={
            "name": words("strided", "slim", "two_layer", "wide", right=("strided",)),
            "channels": _SIZE,
            "gradient": flag(),
            "warm_start": flag(),
        },
        named={"name": ("attacker",)},
    ),
    Subject(
        build_classifier,
        base={"name": "small_cnn", "num_classes": 3},
        values={
            "name": words("small_cnn", "resnet20", right=("small_cnn",)),
            "num_classes": _SIZE,
            "in_channels": _SIZE,
        },
        named={"name": ("network",)},
    ),
    Subject(
        learned_attack,
        base={
            "attacker": nn.Conv2d(2, 1, 1), "classifier": nn.Flatten(), "images": torch.rand(2, 1, 2, 2),
            "labels": torch.zeros(2, dtype=torch.int64), "epsilon": 0.1,
        },
        values={
            "attacker": listing(nn.Flatten(), right=(nn.Conv2d(2, 1, 1),)),
            "classifier": free(nn.Flatten()),
            "images": listing(torch.ones(2, 4), torch.zeros(2, 1, 2, 2).int()),
            "labels": listing(torch.zeros(2), torch.zeros(3, dtype=torch.int64)),
            "epsilon": number(0, 1, "(]"),
            "gradient": free(True),
            "steps": whole(1),
            "scale": words("sample_std", "batch_max"),
            "bptt": flag(),
            "attack_bn": words("eval", "train"),
            "random_start": number(0, 1, "[]"),
            "bounds": listing((), (0,), (1, 0), (0, INF), (NAN, 1), ("a", "b"), right=((0, 1),)),
            "generator": free(None, torch.Generator()),
            "start": listing(torch.rand(2, 4), right=(None, torch.rand(2, 1, 2, 2))),
        },
        named={"epsilon": ("bounds",), "bounds": ("images",), "labels": ("images",)},
    ),
    Subject(
        RandomFeatures,
        values={"num_features": _SIZE, "in_channels": _SIZE, "seed": SEED},
    ),
    Subject(
        ClassifierFeatures,
        values={
            "checkpoint": listing("nowhere.ckpt", "", "."),
            "network": words("small_cnn", "resnet20", right=("small_cnn",)),
            "num_classes": whole(2),
            "in_channels": _SIZE,
            "network_args": listing({"nonsense": 1}, {"width": 0}, right=(None, {"width": 2})),
            "epochs": whole(1),
            "batch_size": whole(2),
            "lr": _POSITIVE,
            "seed": SEED,
            "mean": listing(0.5, INF, [NAN], ["a"], [None], [], right=(None,)),
            "std": number(0, ends="()", right=(None,)) | listing([0.0], [NAN], ["a"], []),
        },
        named={"network_args": ("width",)},
    ),
    Subject(EfficientNetLiteFeatures, values={"size": whole(32, right=()) | listing(33, 100)}),
    Subject(FeatureCost, base={"features": nn.Flatten()}, values={
        "features": free(nn.Flatten()), "features_y": free(None, nn.Flatten()),
    }),
]  # fmt: skip

_ANGLE = torch.linspace(0, 2 * math.pi, 65)[:64]
_CIRCLE = torch.stack([_ANGLE.cos(), _ANGLE.sin()], 1)
_TANGENTS = torch.stack([-_ANGLE.sin(), _ANGLE.cos()], 1)[:, :, None]
_POINTS = listing(
    _CIRCLE[0], _CIRCLE[:0], _CIRCLE[None], _CIRCLE * NAN, _CIRCLE.long(), _CIRCLE * INF, right=(_CIRCLE,)
)
_MOST = whole(1, right=(1000,))
_QUERIES = {
    "method": words("local_pca", "twonn", "mle"),
    "queries": whole(1, right=(8,)),
    "bootstrap": whole(0, right=(0, 2)),
    "confidence": number(0, 1, "()", right=(0.5,)),
    "seed": SEED,
    "warn": flag(),
    "most": _MOST,
}

MANIFOLDS = [
    Subject(
        Sphere,
        values={
            "dim": whole(1),
            "ambient_dim": whole(3, right=(None, 3, 5)),
            "radius": _POSITIVE,
            "frame": listing(torch.eye(2), torch.ones(3, 3), torch.eye(3) * NAN, right=(None, torch.eye(3))),
        },
    ),
    Subject(
        Torus,
        values={
            "ambient_dim": whole(3, right=(None, 3, 5)),
            "major": number(0.5, ends="()", right=(1, 2.0)),
            "minor": number(0, 1, "()", right=(0.25,)),
            "frame": listing(torch.eye(2), torch.ones(3, 3), torch.eye(3) * NAN, right=(None, torch.eye(3))),
        },
        named={"major": ("minor",)},
    ),
    Subject(
        ParametricManifold,
        base={"embedding": lambda t: torch.cat([t.cos(), t.sin()], 1), "ranges": [(0.0, 3.0)], "reach": 1.0},
        values={
            "embedding": free(),
            "ranges": listing([], [(0,)], [(1, 0)], [(0, 0)], [(0, INF)], [(NAN, 1)], ["ab"], [3], right=([(0, 1)],)),
            "reach": _POSITIVE,
            "lift_radius": _POSITIVE,
        },
    ),
    Subject(
        TangentCharts,
        base={"centers": _CIRCLE[:3], "bases": _TANGENTS[:3], "radius": 1.0, "inner_radius": 0.5},
        values={
            "centers": listing(_CIRCLE[0], _CIRCLE[:2], _CIRCLE[:3] * NAN),
            "bases": listing(_TANGENTS[:2], _CIRCLE[:3], 2 * _TANGENTS[:3]),
            "radius": number(0.5, ends="()", right=(1,)),
            "inner_radius": number(0, 1, "[)", right=(0, 0.5)),
            "report": free(None),
        },
        named={"centers": ("bases",), "radius": ("inner_radius",)},
    ),
    Subject(
        intrinsic_dimension,
        base={"points": _CIRCLE, "bootstrap": 0, "warn": False},
        values={"points": _POINTS, "neighbors": whole(2, 63, right=(None, 5)), **_QUERIES},
    ),
    Subject(
        dimension_curve,
        base={"points": _CIRCLE, "bootstrap": 0, "warn": False},
        values={
            "points": _POINTS,
            "neighbors": listing([], [0], [1], [64], [4, 2], [2.5], ["a"], [True], right=(None, [2, 4])),
            "estimator": listing(3, "nonsense", object(), right=(None,)),
            "fractions": listing([0.5], [], [2.0], [NAN], ["a"], right=(None,)),
            **_QUERIES,
        },
        named={"fractions": ("estimator",)},
    ),
    Subject(
        bottleneck,
        base={"points": _CIRCLE, "tangents": _TANGENTS},
        values={
            "points": _POINTS,
            "tangents": listing(_CIRCLE, _TANGENTS[:3], _TANGENTS * NAN, right=(_TANGENTS,)),
            "angle": number(0, 1, "()", right=(0.5,)),
            "apart": number(0, right=(0, 0.5)),
            "most": _MOST,
        },
        named={"points": ("tangents",)},
    ),
    Subject(
        reach,
        base={"points": _CIRCLE, "d": 1},
        beside={"tangents": {"d": None}, "closest": {"d": None, "tangents": _TANGENTS}},
        values={
            "points": _POINTS,
            "tangents": listing(_CIRCLE, _TANGENTS[:3], _TANGENTS * NAN, None, right=(_TANGENTS,)),
            "d": whole(1, 2, right=(1,)),
            "closest": number(0, right=(0, 0.1)),
            "quantile": number(0, 1, "[)", right=(0, 0.5)),
        },
        named={"tangents": ("d",)},
    ),
    Subject(
        covering_radius,
        base={"points": _CIRCLE, "centers": _CIRCLE[:3]},
        values={
            "points": _POINTS,
            "centers": listing(_CIRCLE[:0], torch.ones(3, 5), _CIRCLE * NAN),
            "most": _MOST,
        },
        named={"points": ("centers",)},
    ),
    Subject(
        fill_distance,
        base={"points": _CIRCLE, "probes": _CIRCLE},
        values={
            "points": _POINTS,
            "probes": listing(torch.ones(3, 5), _CIRCLE[:0], _CIRCLE * NAN, right=(None, Sphere(1))),
            "most": _MOST,
        },
        named={"points": ("probes",)},
    ),
    Subject(
        noisy_charts,
        base={"x": _CIRCLE, "d": 1, "charts": 5},
        values={
            "x": _POINTS,
            "d": whole(1, 2, right=(1,)),
            "charts": whole(1, 64, right=(5,)),
            "outside": number(0, 1, "[)", right=(0, 0.1)),
        },
    ),
]

_LINES = ["one two", "two three"]
TEXTS = [
    Subject(Vocabulary, values={"model": listing(b"", b"nonsense")}),
    Subject(
        partial(Vocabulary.train, _LINES * 20),
        of=Vocabulary.train,
        base={"size": 30, "kind": "char"},
        values={
            "sentences": free(),
            "size": whole(5, right=(30,)),
            "kind": words("bpe", "unigram", "char", right=("char",)),
            "character_coverage": number(0.98, 1, "[]"),
        },
        left={"sentences": "given by place"},
    ),
    Subject(
        WordVocabulary,
        values={"words": listing([], ["a"], [1, 2], ["<unk>", "<eos>", "a", "a"], ["<unk>", "<eos>", "a b"], [None])},
    ),
    Subject(
        WordVocabulary.build,
        base={"sentences": ["one two"]},
        values={
            "sentences": listing([], [""]),
            "min_count": whole(1),
            "size": whole(3, right=(None, 3)),
        },
    ),
]
