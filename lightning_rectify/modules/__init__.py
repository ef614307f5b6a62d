"""LightningModules; one folder each."""

from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.classifier import ImageClassifier
from lightning_rectify.modules.l2l import L2LDefense
from lightning_rectify.modules.language_model import LanguageModel
from lightning_rectify.modules.manifold import ManifoldRegressor
from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.modules.spectral_gan import SpectralGAN
from lightning_rectify.modules.spot import SPOT, SPOTAdaptation
from lightning_rectify.modules.translation import Translator

__all__ = [
    "SPOT",
    "ImageClassifier",
    "L2LDefense",
    "LanguageModel",
    "ManifoldRegressor",
    "MinimaxModule",
    "RectifiedModule",
    "SPOTAdaptation",
    "SpectralGAN",
    "Translator",
]
