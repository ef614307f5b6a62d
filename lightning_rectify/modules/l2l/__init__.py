"""Adversarial training with a learned attacker (arXiv:1811.01213), and with FGSM, PGD and TRADES beside it."""

from lightning_rectify.modules.l2l.attackers import FullResolutionAttacker, StridedAttacker, build_attacker
from lightning_rectify.modules.l2l.learned import learned_attack
from lightning_rectify.modules.l2l.module import L2LDefense
from lightning_rectify.modules.l2l.networks import PixelClassifier, WideResNet, build_classifier

__all__ = [
    "FullResolutionAttacker",
    "L2LDefense",
    "PixelClassifier",
    "StridedAttacker",
    "WideResNet",
    "build_attacker",
    "build_classifier",
    "learned_attack",
]
