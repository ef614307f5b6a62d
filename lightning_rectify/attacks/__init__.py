"""Attacks on classifiers of images: FGSM, PGD, APGD, Square, and a bridge to AutoAttack; torch only.

Each is a pure function of a model (images in pixel units to logits), images, labels and epsilon.
"""

from lightning_rectify.attacks.apgd import apgd
from lightning_rectify.attacks.autoattack import autoattack
from lightning_rectify.attacks.common import Model, attacking, correct, input_gradient
from lightning_rectify.attacks.gradient import fgsm, pgd
from lightning_rectify.attacks.losses import Loss
from lightning_rectify.attacks.square import square

__all__ = [
    "Loss",
    "Model",
    "apgd",
    "attacking",
    "autoattack",
    "correct",
    "fgsm",
    "input_gradient",
    "pgd",
    "square",
]
